"""The command line, as a user meets it: what it prints, what it writes, how it fails."""

from __future__ import annotations

import argparse
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import fastdiff as fd
from fastdiff import cli, images
from fastdiff.cli import spelling


def run(capsys: pytest.CaptureFixture[str], *argv: str) -> tuple[int, str, str]:
    status = cli.main(list(argv))
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def test_sample_writes_the_same_array_the_library_gives(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "x.npy"
    status, text, _ = run(
        capsys, "sample", "--class", "Sneaker", "--class", "8", "--count", "2", "--steps", "3", "--seed", "5",
        "--guidance", "1.5", "--out", str(out),
    )  # fmt: skip
    assert status == 0
    model = fd.load("fashion")
    labels = torch.tensor([7, 7, 8, 8])
    x = fd.sample(
        model, (4, *model.shape), steps=3, seed=[5, 6, 7, 8], guidance=1.5, memory_format=torch.channels_last,
        cond={"class_labels": labels}, uncond={"class_labels": torch.full((4,), model.null_label)},
    )  # fmt: skip
    assert np.array_equal(np.load(out), images.to_pixels(x))
    assert re.search(r"NFE +3 per sample, each of two branches with guidance 1.5", text)
    assert re.search(r"samples +4 in [\d.]+ s: [\d.]+ images/s", text)
    assert re.search(r"time +[\d.]+ s in the model, [\d.]+ s in everything else", text)
    assert "seeds     5 .. 8" in text
    assert [path.name for path in tmp_path.iterdir()] == ["x.npy"]


def test_rule_noise_and_a_picture_to_start_from(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """As the library's rule=, noise=, init= and strength=, in two batches."""
    out, picture = tmp_path / "x.npy", tmp_path / "start.png"
    model, pixels = fd.load("fashion"), np.random.default_rng(0).integers(0, 256, (32, 32), dtype=np.uint8)
    Image.fromarray(pixels).save(picture)
    status, text, _ = run(
        capsys, "sample", "--class", "bag", "--count", "3", "--steps", "4", "--solver", "dpmpp_2m_sde", "--batch", "2",
        "--noise", "brownian", "--rule", "rescale,phi=0.5", "--init", str(picture), "--strength", "0.4", "--out",
        str(out),
    )  # fmt: skip
    assert status == 0
    assert f"from {picture} at strength 0.4" in text and "guidance 1.5 and rule rescale,phi=0.5" in text
    init = (torch.from_numpy(pixels).float() / 127.5 - 1.0).expand(3, 1, 32, 32)
    options = {
        "solver": "dpmpp_2m_sde", "steps": 4, "init": init, "strength": 0.4, "guidance": 1.5,
        "cond": {"class_labels": torch.full((3,), 8)}, "uncond": {"class_labels": torch.full((3,), model.null_label)},
    }  # fmt: skip
    rule = fd.guidance.Rescale(phi=0.5)
    x = fd.sample(model, (3, 1, 32, 32), noise="brownian", rule=rule, **options)
    drawn = np.load(out).astype(int)
    assert np.abs(drawn - images.to_pixels(x)).max() <= 1
    assert np.abs(drawn - images.to_pixels(fd.sample(model, (3, 1, 32, 32), rule=rule, **options))).max() > 9
    assert np.abs(drawn - images.to_pixels(fd.sample(model, (3, 1, 32, 32), noise="brownian", **options))).max() > 9


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--init", "small.png"], "small.png is 28x30, and the model draws 32x32: crop, scale or pad it"),
        (["--init", "none.png"], "No such file"),
        (["--init", ".", "--strength", "0.5"], "expected a picture file (PNG, JPEG ...) to read, got a folder: ."),
        (["--init", ""], "expected a picture file (PNG, JPEG ...) to read, got a folder: ."),
        (["--init", __file__], f"expected a picture file (PNG, JPEG ...) to read, got {__file__}, which is none"),
        (["--init", "small.png", "--strength", "1"], "--strength must be above 0 and below 1"),
        (["--init", "small.png", "--strength", "0"], "--strength must be above 0 and below 1"),
        (["--strength", "0.5"], "--strength needs --init"),
        (["--rule", "rescle"], "Unknown rule 'rescle'. Did you mean 'rescale'"),
        (["--rule", "rescale,psi=1"], "Unknown option of rule 'rescale' 'psi'. Did you mean 'phi'"),
        (["--rule", "rescale,phi"], "options of --rule rescale must be NAME=VALUE, got 'phi'"),
        (["--rule", "rescale", "--guidance", "1"], "--guidance 1 is off: give another --guidance, or leave --rule out"),
        (["--rule", "cfg_zero,zero_init=0", "--guidance", "1"], "--rule cfg_zero,zero_init=0 changes what guidance"),
        (["--rule", "rescale,phi=2"], "phi must be a finite number from 0 to 1, got 2"),
    ],
)
def test_what_does_not_go_together_writes_nothing(
    argv: list[str], words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Image.new("L", (30, 28)).save("small.png")
    status, out, err = run(capsys, "sample", "--steps", "1", *argv)
    assert status == 2
    assert words in err and len(err.strip().splitlines()) == 1
    assert out == "" and [path.name for path in tmp_path.iterdir()] == ["small.png"]


def test_a_rule_needs_classes_or_an_effect_without_guidance(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model, argv = fd.load("fashion"), ("sample", "--steps", "2", "--count", "1", "--out", str(tmp_path / "x.npy"))
    status, text, _ = run(capsys, *argv, "--class", "bag", "--guidance", "1", "--rule", "cfg_zero")
    assert status == 0 and "2 per sample, rule cfg_zero\n" in text  # its first row is taken as 0 all the same
    drawn = np.load(tmp_path / "x.npy")
    run(capsys, *argv, "--class", "bag", "--guidance", "1")
    assert np.abs(drawn.astype(int) - np.load(tmp_path / "x.npy")).max() > 9
    monkeypatch.setattr(model, "class_names", ())
    monkeypatch.setattr(fd, "load", lambda *_, **__: model)
    status, _, err = run(capsys, *argv, "--rule", "apg")
    assert status == 2 and "--rule apg changes what guidance does, and this model has no classes to guide by" in err


def test_a_picture_of_16_bit_reads_as_the_one_of_8(tmp_path: Path) -> None:
    """v / 257, rounded: 257 k is k, and 128 more is still k, but no more."""
    pixels = np.arange(256, dtype=np.uint16).reshape(16, 16)
    wide = pixels * 257 + np.where(pixels == 255, 0, 128).astype(np.uint16)
    wide[0, :2] = 128, 257 - 128
    pixels[0, :2] = 0, 1
    Image.fromarray(pixels.astype(np.uint8)).save(tmp_path / "8.png")
    Image.fromarray(wide).save(tmp_path / "16.png")
    Image.fromarray(wide.astype(">u2")).save(tmp_path / "big.tiff")
    Image.fromarray(wide.astype(np.int32)).save(tmp_path / "32.tiff")
    modes = {name: Image.open(tmp_path / name).mode for name in ("16.png", "big.tiff", "32.tiff")}
    assert modes == {"16.png": "I;16", "big.tiff": "I;16B", "32.tiff": "I"}
    for shape in ((1, 16, 16), (3, 16, 16)):
        expected = images.read(tmp_path / "8.png", shape)
        assert torch.equal(expected, (torch.from_numpy(pixels.astype(np.float32)) / 127.5 - 1).expand(shape))
        for name in modes:
            assert torch.equal(images.read(tmp_path / name, shape), expected)


def test_pictures_without_a_known_white_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.tiff"
    for array, words in (
        (np.full((4, 4), 0.5, np.float32), r"x.tiff: a picture of floats \(mode F\) .*: save it as 8 or 16 bit"),
        (np.full((4, 4), 65536, np.int32), r"x.tiff: a grey .* must hold 0 .. 65535, got 65536 .. 65536: save it"),
        (np.full((4, 4), -1, np.int32), r"must hold 0 .. 65535, got -1 .. -1"),
    ):
        Image.fromarray(array).save(path)
        with pytest.raises(ValueError, match=words):
            images.read(path, (1, 4, 4))


def test_transparency_is_left_out(tmp_path: Path) -> None:
    Image.new("RGBA", (4, 4), (255, 51, 0, 0)).save(tmp_path / "x.png")
    assert images.read(tmp_path / "x.png", (3, 4, 4))[:, 0, 0].tolist() == pytest.approx([1.0, -0.6, -1.0])


def test_batches_do_not_change_the_pictures(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arrays = []
    for batch in ("3", "64"):
        out = tmp_path / f"{batch}.npy"
        run(capsys, "sample", "--count", "1", "--steps", "3", "--batch", batch, "--out", str(out))
        arrays.append(np.load(out).astype(int))
    assert np.abs(arrays[0] - arrays[1]).max() <= 1  # convolutions may round differently with batch size


def test_sample_grid_and_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    grid, folder = tmp_path / "grid.png", tmp_path / "folder"
    for out in (grid, folder):
        run(capsys, "sample", "--class", "bag", "--count", "3", "--steps", "2", "--out", str(out))
    names = sorted(path.name for path in folder.iterdir())
    assert names == ["00000_bag.png", "00001_bag.png", "00002_bag.png"]
    tile = np.asarray(Image.open(folder / names[1]).convert("RGB").resize((64, 64), Image.Resampling.NEAREST))
    sheet = np.asarray(Image.open(grid))
    left = sheet.shape[1] - (3 - 1) * 66  # the second of three 64-pixel tiles with 2-pixel gaps
    assert np.array_equal(sheet[2:66, left : left + 64], tile)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["folder", "grid.png"]


def test_plan_prints_formulas_nfe_and_checks(capsys: pytest.CaptureFixture[str]) -> None:
    status, text, _ = run(capsys, "plan", "dpmpp_2m", "--steps", "4")
    assert status == 0
    assert "4 model evaluations, 2 registers" in text
    assert re.search(r"r0 <- [\d.]+ x \+ [\d.]+ D - [\d.]+ r1", text)
    assert "dpmpp_2m" in text.splitlines()[0] and "ok" in text.splitlines()[-1]


def test_plan_json_round_trip(capsys: pytest.CaptureFixture[str]) -> None:
    _, text, _ = run(capsys, "plan", "ddim", "--steps", "5", "--option", "eta=0.5", "--json")
    assert fd.Plan.from_json(text) == fd.plan("ddim", "linear", 5, "karras", eta=0.5)


def test_info_names_every_backend(capsys: pytest.CaptureFixture[str]) -> None:
    status, text, _ = run(capsys, "info")
    assert status == 0 and "sampler.memory()" in text
    for name, backend in fd.backends().items():
        line = next(line for line in text.splitlines() if line.startswith(f"backend    {name} "))
        assert ("ok" in line) if backend.ok else (backend.reason in line and backend.fix in line)


def test_verify_passes(capsys: pytest.CaptureFixture[str]) -> None:
    status, text, _ = run(capsys, "verify")
    assert status == 0, text
    assert all(f"table {name}" in text for name in fd.solvers.names())
    assert text.splitlines()[-1] == "all checks passed"


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["plan", "dpmp_2m"], "Did you mean 'dpmpp_2m'"),
        (["plan", "ddim", "--grid", "karas"], "Did you mean 'karras'"),
        (["plan", "ddim", "--schedule", "cosin"], "Did you mean 'cosine'"),
        (["plan", "ddim", "--schedule", "squaredcos"], "Did you mean --schedule cosine? Known"),
        (["plan", "ddim", "--steps", "0"], "steps"),
        (["plan", "ddim", "--option", "etta=1"], "has no option 'etta'"),
        (["plan", "ddim", "--option", "eta"], "NAME=VALUE"),
        (["sample", "--class", "hat"], "unknown class 'hat'"),
        (["sample", "--class", "12"], "unknown class '12'"),
        (["sample", "--count", "0"], "--count"),
        (["sample", "--out", "a.jpg"], "got '.jpg'"),
        (["sample", "--class", "²"], "unknown class '²'"),
        (["sample", "--device", "foo"], "unknown device 'foo'"),
        (["sample", "--device", "cuda:99"], "torch sees"),
        (["sample", "--guidance", "1e39", "--steps", "1"], "finite in float32"),
        (["plan", "ddim", "--option", "eta=-1"], "amount of noise"),
        (["plan", "random_walk", "--option", "tau=3"], "must hold 20 finite numbers"),
        (["sample", "--model", "fashon"], "Did you mean 'fashion'"),
        (["sample", "--model", "missing.safetensors"], "no model file"),
        (["sample", "--out", "no/such/folder/x.png"], "does not exist"),
        (["sample", "--backend", "cudnn"], "Unknown backend"),
        (["sample", "--grid", "logsnr", "--solver", "flow_euler"], "needs a flow schedule"),
    ],
)
def test_errors_are_one_line_and_write_nothing(
    argv: list[str], words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    status, out, err = run(capsys, *argv)
    assert status == 2
    assert words in err and len(err.strip().splitlines()) == 1
    assert out == "" and not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["train", "--preset", "fashion32", "--lr", "1e-4"], "--lr 1e-4; --lr: did you mean --learning-rate?"),
        (["train", "--preset", "fashion32", "--batch-size=4"], "--batch-size: did you mean --batch?"),
        (
            ["train", "--preset", "fashion32", "--epochs", "3"],
            "--epochs: did you mean --images? (lengths are in images: epochs times the pictures of the set, or steps "
            "times --batch)",
        ),
        (["train", "--preset", "fashion32", "--learning-raet", "1"], "--learning-raet: did you mean --learning-rate?"),
        (["eval", "--count", "32"], "--count: did you mean --samples?"),
        (["sample", "--num_inference_steps", "9"], "--num_inference_steps: did you mean --steps?"),
        (["eval", "--qqq", "pictures"], "unrecognized arguments: --qqq pictures\n"),
    ],
)
def test_an_option_that_is_not_there_names_the_one_meant(
    argv: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        cli.main(argv)
    err = capsys.readouterr().err
    assert words in err and err.startswith(f"usage: fastdiff {argv[0]} ")


def test_names_of_other_programs_stand_for_options_there_are() -> None:
    commands = next(iter(cli._parser()._subparsers._group_actions)).choices.values()  # type: ignore[union-attr]
    assert set(spelling._ELSEWHERE) <= {option for parser in commands for option in parser._option_string_actions}


@pytest.mark.parametrize(
    ("said", "spelt"),
    [
        ("larger; use resize=crop, or sample_images=0.", "larger; use --resize crop, or --sample-images 0."),
        ("Did you mean objective='v'?", "Did you mean --objective v?"),
        ("fd.Sampler(seed=3), plan(x, seed=range(4)), of /data/seed=3/x, grid=[1]",) * 2,
    ],
)
def test_what_an_error_tells_to_set_is_spelt_as_an_option(said: str, spelt: str) -> None:
    parser = argparse.ArgumentParser()
    for option in ("--resize", "--sample-images", "--objective", "--seed", "--grid"):
        parser.add_argument(option)
    assert spelling.spelt(said, parser) == spelt


def test_a_model_without_classes_is_not_guided(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """An amount that is asked for is refused there; the usual one is of models with classes."""
    model = fd.Denoiser(lambda x, t: torch.zeros_like(x), "edm", "x0", shape=(1, 4, 4))
    monkeypatch.setattr(fd, "load", lambda *_, **__: model)
    argv = ("sample", "--steps", "2", "--count", "1", "--out", str(tmp_path / "x.npy"))
    status, _, err = run(capsys, *argv, "--guidance", "2")
    assert status == 2 and "--guidance 2 has no effect: this model has no classes to guide by; leave it out" in err
    status, out, _ = run(capsys, *argv)
    assert status == 0 and "NFE       2 per sample\n" in out
    status, _, err = run(capsys, "eval", "--guidance", "2", "--data", "none")
    assert status == 2 and "--guidance 2 has no effect" in err


def test_a_failed_write_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: object, **kwargs: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(np, "save", fail)
    with pytest.raises(OSError, match="disk full"):
        images.save(tmp_path / "x.npy", np.zeros((1, 2, 2, 1), np.uint8), [], 1)
    assert not list(tmp_path.iterdir())


def test_pixels_round_and_clip() -> None:
    x = torch.tensor([-2.0, -1.0, 0.0, 1.0, 1.5, 2 * 100 / 255 - 1]).view(1, 1, 2, 3)
    assert images.to_pixels(x).ravel().tolist() == [0, 0, 128, 255, 255, 100]
