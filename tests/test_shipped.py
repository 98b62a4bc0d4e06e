"""The shipped network: what its file says, that it draws what is asked, and how far batch size can move a picture."""

from __future__ import annotations

import subprocess
import sys
from importlib import resources
from pathlib import Path

import pytest
import torch

import fastdiff as fd

LABELS = torch.arange(10)


@pytest.fixture(scope="module")
def model() -> fd.Denoiser:
    return fd.load("fashion")


def draw(model: fd.Denoiser, labels: torch.Tensor, seeds: list[int], steps: int = 10) -> torch.Tensor:
    assert model.shape is not None and model.null_label is not None
    return fd.sample(
        model, (len(labels), *model.shape), steps=steps, seed=seeds, guidance=2.0,
        cond={"class_labels": labels}, uncond={"class_labels": torch.full_like(labels, model.null_label)},
    )  # fmt: skip


def test_the_file_says_what_a_denoiser_needs(model: fd.Denoiser) -> None:
    assert model.shape == (1, 32, 32)
    assert len(model.class_names) == 10 and model.null_label == 10
    assert model.prediction == "edm" and 0.5 < (model.sigma_data or 0) < 1.0


def test_weights_are_small_and_a_card_is_beside_them() -> None:
    folder = Path(str(resources.files("fastdiff.models.weights")))
    assert sum(path.stat().st_size for path in folder.glob("*.safetensors")) < 8 * 2**20
    card = (folder / "fashion.md").read_text(encoding="utf-8")
    for word in ("Fashion-MNIST", "MIT", "recipes/fashion.py", "seed", "agreement", "Fréchet"):
        assert word in card


def test_a_picture_hardly_depends_on_its_batch(model: fd.Denoiser) -> None:
    seeds = list(range(100, 164))
    labels = LABELS.repeat(7)[:64]
    batch = draw(model, labels, seeds, steps=4)
    for place in (0, 31, 63):
        alone = draw(model, labels[place : place + 1], seeds[place : place + 1], steps=4)
        assert (alone[0] - batch[place]).abs().max() <= 1e-3


def test_a_classifier_trained_on_real_photographs_sees_the_class_asked_for(model: fd.Denoiser) -> None:
    from fastdiff.models.classifier import load_classifier

    labels = LABELS.repeat(6)
    guessed = load_classifier()(draw(model, labels, list(range(60))))[0].argmax(1)
    assert (guessed == labels).float().mean() >= 0.85  # 10,000 samples give the figure on the card


def test_loading_does_not_load_the_compiler() -> None:
    """torch._dynamo takes seconds to import; torch's normals on the device meta would load it."""
    code = "import sys, fastdiff as fd; fd.load(); print('torch._dynamo' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"


@pytest.mark.skipif(torch.cuda.is_available(), reason="the device is there")
def test_a_gpu_that_is_not_there() -> None:
    for ask in (lambda: fd.load("fashion", device="cuda"), lambda: fd.load("fashion").to("cuda")):
        with pytest.raises(ValueError, match="'cuda' was asked for, and torch sees no CUDA device here; use 'cpu'"):
            ask()


def test_bad_files(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="Did you mean 'fashion'"):
        fd.load("fashin")
    with pytest.raises(ValueError, match="Known: fashion. There is no folder of a run 'mine' here"):
        fd.load("mine")
    with pytest.raises(FileNotFoundError, match="no folder or file runs/mine; give the folder of a run"):
        fd.load("runs/mine")
    with pytest.raises(FileNotFoundError, match="no model file"):
        fd.load(tmp_path / "x.safetensors")
    with pytest.raises(FileNotFoundError, match=f"no weights in {tmp_path} yet: .* each checkpoint .*--resume auto"):
        fd.load(tmp_path)
    broken = tmp_path / "broken.safetensors"
    whole = Path(str(resources.files("fastdiff.models.weights") / "fashion.safetensors"))
    broken.write_bytes(whole.read_bytes()[:5000])
    with pytest.raises(ValueError, match="broken.safetensors"):
        fd.load(broken)
    unnamed = tmp_path / "unnamed.safetensors"
    fd.load("fashion").net.save(unnamed, torch.float16, {})
    with pytest.raises(ValueError, match="does not say what its network predicts"):
        fd.load(unnamed)
