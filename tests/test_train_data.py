"""Training data: every kind of file read back exactly, the order, and what bad sets say."""

from __future__ import annotations

import gzip
import io
import struct
import sys
import tarfile
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image

from fastdiff.training.data import Resident, Source, open_data
from fastdiff.training.data.loader import Loader
from fastdiff.training.data.order import image_indices, sample_seeds
from fastdiff.training.data.source import Faults, root_mean_square

RNG = np.random.default_rng(0)
PIXELS = RNG.integers(0, 256, (12, 3, 8, 8), dtype=np.uint8)
LATENTS = np.zeros((3, 4, 8, 8), np.float32)
LABELS = np.arange(12) % 3


def png(pixels: NDArray[np.uint8]) -> bytes:
    """One picture [C, H, W] as PNG."""
    file = io.BytesIO()
    Image.fromarray(pixels.transpose(1, 2, 0) if len(pixels) == 3 else pixels[0]).save(file, "PNG")
    return file.getvalue()


def folder(path: Path) -> tuple[Path, NDArray[np.int64]]:
    for label, kind in enumerate(("ape", "bee", "cow")):
        (path / kind).mkdir(parents=True)
        for i in np.nonzero(label == LABELS)[0]:
            (path / kind / f"{i:03d}.png").write_bytes(png(PIXELS[i]))
    return path, np.argsort(LABELS, kind="stable")


def shards(path: Path) -> tuple[Path, NDArray[np.int64]]:
    path.mkdir()
    for shard in range(3):
        with tarfile.open(path / f"set-{shard:03d}.tar", "w") as tar:
            for i in range(4 * shard, 4 * shard + 4):
                add(tar, f"{i:05d}.png", png(PIXELS[i]))
                add(tar, f"{i:05d}.cls", str(LABELS[i]).encode())
    return path, np.arange(12)


def npy_of(path: Path, array: NDArray[Any]) -> Path:
    np.save(path / "a.npy", array)
    return path / "a.npy"


def npz_of(path: Path, **arrays: NDArray[Any]) -> Path:
    np.savez(path / "a.npz", **arrays)
    return path / "a.npz"


def file_of(path: Path, name: str, content: bytes) -> Path:
    (path / name).write_bytes(content)
    return path / name


def add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    item = tarfile.TarInfo(name)
    item.size = len(data)
    tar.addfile(item, io.BytesIO(data))


def npz(path: Path) -> tuple[Path, NDArray[np.int64]]:
    np.savez(path.with_suffix(".npz"), images=PIXELS, labels=LABELS)
    return path.with_suffix(".npz"), np.arange(12)


def npy(path: Path) -> tuple[Path, NDArray[np.int64]]:
    path.mkdir()
    np.save(path / "set.npy", PIXELS.transpose(0, 2, 3, 1))  # channels last
    np.save(path / "labels.npy", LABELS)
    return path / "set.npy", np.arange(12)


def brace(path: Path) -> tuple[Path, NDArray[np.int64]]:
    return shards(path)[0] / "set-{000..002}.tar", np.arange(12)


def fetched(source: Source) -> tuple[torch.Tensor, torch.Tensor | None]:
    return source.fetch(np.arange(len(source)))


@pytest.mark.parametrize("write", [folder, shards, brace, npz, npy])
def test_every_kind_gives_back_what_was_written(tmp_path: Path, write: Any) -> None:
    path, order = write(tmp_path / "set")
    source = open_data(path, size=8)
    pictures, labels = fetched(source)
    assert len(source) == 12 and source.shape == (3, 8, 8) and source.num_classes == 3
    assert source.class_names == (("ape", "bee", "cow") if write is folder else ())
    np.testing.assert_array_equal(pictures, PIXELS[order])
    np.testing.assert_array_equal(labels, LABELS[order])
    kept = Resident(source)
    again = kept.fetch(np.array([7, 0, 7]))
    assert torch.equal(again[0], pictures[[7, 0, 7]]) and torch.equal(again[1], labels[[7, 0, 7]])
    assert fetched(open_data(path, size=8, classes=0))[1] is None
    expected = ((PIXELS / 127.5 - 1) ** 2).mean() ** 0.5
    assert root_mean_square(source) == pytest.approx(expected, rel=1e-6)


def test_idx_files_are_padded(tmp_path: Path) -> None:
    for name, array in (("images-idx3", PIXELS[:, 0]), ("labels-idx1", LABELS.astype(np.uint8))):
        header = bytes((0, 0, 8, array.ndim)) + struct.pack(f">{array.ndim}I", *array.shape)
        (tmp_path / f"train-{name}-ubyte.gz").write_bytes(gzip.compress(header + array.tobytes()))
    source = open_data(tmp_path, size=16, resize="pad")
    pictures, labels = fetched(source)
    np.testing.assert_array_equal(pictures[:, :, 4:12, 4:12], PIXELS[:, :1])
    assert pictures.sum() == PIXELS[:, 0].sum(dtype=np.int64) and labels.tolist() == LABELS.tolist()


@pytest.mark.parametrize("channels", [4, 16])
def test_latents_keep_their_values(channels: int, tmp_path: Path) -> None:
    latents = np.random.default_rng(channels).standard_normal((6, channels, 8, 8)).astype(np.float16)
    np.save(tmp_path / "latents.npy", latents)
    with tarfile.open(tmp_path / "latents.tar", "w") as tar:
        for i, latent in enumerate(latents):
            file = io.BytesIO()
            np.save(file, latent)
            add(tar, f"{i}.npy", file.getvalue())
    for path in (tmp_path / "latents.npy", tmp_path / "latents.tar"):
        source = open_data(path, size=8, resize="none", channels=channels)
        assert source.shape == (channels, 8, 8) and source.num_classes == 0
        pictures, labels = fetched(source)
        assert labels is None and torch.equal(pictures, torch.from_numpy(latents).float())
    batch = Loader(source, seed=0, batch=6, scale=0.5).read(0)
    assert torch.equal(batch.pictures, 0.5 * torch.from_numpy(latents[image_indices(6, 0, 0, 6)]).float())


def test_pictures_are_scaled_and_cropped_like_pillow(tmp_path: Path) -> None:
    wide = RNG.integers(0, 256, (16, 40, 3), dtype=np.uint8)
    Image.fromarray(wide).save(tmp_path / "wide.png")
    Image.fromarray(wide).convert("RGBA").save(tmp_path / "x.webp", lossless=True)
    pictures, _ = fetched(open_data(tmp_path, size=8))
    expected = Image.fromarray(wide).resize((20, 8), Image.Resampling.BICUBIC, reducing_gap=3.0).crop((6, 0, 14, 8))
    for picture in pictures:
        np.testing.assert_array_equal(picture.permute(1, 2, 0), np.asarray(expected))
    grey = open_data(tmp_path, size=8, channels=1)
    np.testing.assert_array_equal(
        fetched(grey)[0][0, 0],
        np.asarray(Image.fromarray(wide).convert("L").resize((20, 8), 3, reducing_gap=3.0).crop((6, 0, 14, 8))),
    )


def test_grey_of_16_bit_is_the_picture_of_8_bit(tmp_path: Path) -> None:
    for kind, array in (("8", PIXELS[:, 0]), ("16", PIXELS[:, 0].astype(np.uint16) * 257)):
        (tmp_path / kind).mkdir()
        for i, picture in enumerate(array):
            Image.fromarray(picture).save(tmp_path / kind / f"{i:02d}.png")
    assert Image.open(tmp_path / "16" / "00.png").mode == "I;16"
    for channels in (None, 1, 3, 4):
        narrow, wide = (open_data(tmp_path / kind, size=8, channels=channels) for kind in ("8", "16"))
        assert wide.shape == narrow.shape == (channels or 1, 8, 8)
        assert torch.equal(fetched(wide)[0], fetched(narrow)[0])
    np.testing.assert_array_equal(fetched(open_data(tmp_path / "16", size=8))[0][:, 0], PIXELS[:, 0])


def test_pictures_of_floats_are_named(tmp_path: Path) -> None:
    for i in range(2):
        Image.fromarray(np.full((8, 8), 0.5, np.float32)).save(tmp_path / f"{i}.tiff")
    with pytest.raises(ValueError, match=r"0\.tiff: a picture of floats \(mode F\) .*: save it as 8 or 16 bit"):
        fetched(open_data(tmp_path, size=8))


class FakeTable:
    """As much of a `datasets.Dataset` as the reader uses."""

    def __init__(self, rows: list[dict[str, Any]]) -> None:
        self.rows, self.column_names = rows, list(rows[0])
        self.features = {"label": types.SimpleNamespace(names=["ape", "bee", "cow"])}

    def cast_column(self, name: str, kind: Any) -> FakeTable:
        assert name == "image" and kind == "undecoded"
        return self

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, key: int | str) -> Any:
        return [row[key] for row in self.rows] if isinstance(key, str) else self.rows[key]


def test_a_table_of_the_datasets_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "state.json").write_text("{}")
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ImportError, match="pip install datasets"):
        open_data(tmp_path, size=8)
    rows = [{"image": {"bytes": png(PIXELS[i]), "path": None}, "label": int(LABELS[i])} for i in range(12)]
    package = types.SimpleNamespace(
        load_from_disk=lambda path: {"train": FakeTable(rows), "test": FakeTable(rows[:2])},
        Image=lambda decode: "undecoded" if not decode else "decoded",
    )
    monkeypatch.setitem(sys.modules, "datasets", package)
    source = open_data(tmp_path, size=8)
    pictures, labels = fetched(source)
    np.testing.assert_array_equal(pictures, PIXELS)
    assert labels.tolist() == LABELS.tolist() and source.class_names == ("ape", "bee", "cow")
    assert len(open_data(tmp_path, size=8, split="test")) == 2
    with pytest.raises(ValueError, match="splits train, test, not 'validation'"):
        open_data(tmp_path, size=8, split="validation")


def test_a_folder_of_parquet_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As the hub's sets are downloaded; the package finds the splits by the names of the files."""
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "train-00000-of-00001.parquet").touch()
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ImportError, match="this set needs the package datasets, .* pip install datasets"):
        open_data(tmp_path, size=8)
    rows = [{"image": {"bytes": png(PIXELS[i]), "path": None}, "label": int(LABELS[i])} for i in range(12)]
    package = types.SimpleNamespace(
        load_dataset=lambda path: {"train": FakeTable(rows), path: FakeTable(rows[:2])},
        Image=lambda decode: "undecoded",
    )
    monkeypatch.setitem(sys.modules, "datasets", package)
    np.testing.assert_array_equal(fetched(open_data(tmp_path, size=8))[0], PIXELS)
    assert len(open_data(tmp_path, size=8, split=str(tmp_path))) == 2


@pytest.mark.parametrize("table", ["metadata", "labels", "00000"])
def test_tables_beside_pictures_or_tars_are_not_the_set(table: str, tmp_path: Path) -> None:
    """img2dataset lays 00000.parquet, links and captions, beside 00000.tar."""
    folder(tmp_path / "pictures")
    shards(tmp_path / "tars")
    for name in ("pictures", "tars"):
        (tmp_path / name / f"{table}.parquet").touch()
        assert len(open_data(tmp_path / name, size=8)) == 12


def many(tmp_path: Path, count: int, bad: dict[int, bytes]) -> Path:
    """A folder of `count` pictures, some with other bytes."""
    tmp_path.joinpath("many").mkdir()
    for i in range(count):
        data = bad.get(i, png(np.full((1, 2, 2), i % 256, np.uint8)))
        (tmp_path / "many" / f"{i:05d}.png").write_bytes(data)
    return tmp_path / "many"


def test_an_unreadable_file_is_skipped_counted_and_named(tmp_path: Path) -> None:
    whole = png(np.full((1, 2, 2), 1, np.uint8))
    source = open_data(many(tmp_path, 2000, {700: b"", 1999: whole[:-25]}), size=2)
    pictures, _ = source.fetch(np.array([699, 700, 701, 1999, 700]))
    # the next file takes the place of a bad one, and the first that of the last
    assert pictures[:, 0, 0, 0].tolist() == [699 % 256, 701 % 256, 701 % 256, 0, 701 % 256]
    assert sorted(Path(name).name for name in source.faults.reasons) == ["00700.png", "01999.png"]
    (tmp_path / "many" / "00003.png").write_bytes(b"no picture")
    with pytest.raises(ValueError, match=r"3 of 2000 files cannot be read, at most 0.1% may be") as caught:
        source.fetch(np.array([3]))
    assert "00700.png: cannot identify" in str(caught.value)


def test_faults_are_counted_once() -> None:
    faults = Faults(1000)
    for _ in range(3):
        faults.record("a", ValueError("broken"))
    assert faults.reasons == {"a": "broken"}
    with pytest.raises(ValueError, match="2 of 1000"):
        faults.record("b", ValueError("broken"))


def test_a_damaged_shard_keeps_what_comes_before(tmp_path: Path) -> None:
    """Cut in the middle: the samples before are there, and the shard is named among the faults."""
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for i in range(1500):
            add(tar, f"{i}.png", png(np.full((1, 2, 2), i % 256, np.uint8)))
    data = (tmp_path / "a.tar").read_bytes()
    garbage = data[: 1024 * 1400] + b"\x17" * 512 + data[1024 * 1400 + 512 :]
    (tmp_path / "a.tar").write_bytes(garbage)
    source = open_data(tmp_path / "a.tar", size=2)
    assert len(source) == 1400
    assert list(source.faults.reasons) == [str(tmp_path / "a.tar")]
    assert f"damaged at byte {1024 * 1400}" in source.faults.reasons[str(tmp_path / "a.tar")]
    assert source.fetch(np.array([1399]))[0].unique().tolist() == [1399 % 256]


@pytest.mark.parametrize(
    ("make", "options", "words"),
    [
        (lambda p: p, {}, "holds no pictures: expected pictures, IDX files, tar shards or parquet files"),
        (lambda p: (p / "notes.txt").write_text("x") and p, {}, "holds no pictures: expected files ending in .png"),
        (lambda p: npy_of(p, PIXELS[:0]), {}, "N at least 1"),
        (lambda p: npy_of(p, PIXELS[0]), {"size": 9, "resize": "none"}, "has 8x8, expected 9x9"),
        (lambda p: npy_of(p, LATENTS), {"size": 9, "resize": "none"}, "only pixels resize; use size=8"),
        (lambda p: npy_of(p, LATENTS), {"channels": 1}, "has 4 channels, expected 1; use channels=4"),
        (lambda p: folder(p / "set")[0], {"channels": 8}, "channels must be 1, 3 or 4 for pictures, got 8"),
        (lambda p: npy_of(p, PIXELS.astype(int)), {}, "got values of int64"),
        (lambda p: npy_of(p, PIXELS[0, 0]), {}, r"got shape \[8, 8\]"),
        (lambda p: npz_of(p, foo=PIXELS), {}, "expected one of images, latents"),
        (lambda p: npz_of(p, images=PIXELS, labels=LABELS[1:]), {}, "12 pictures but 11 labels"),
        (lambda p: npz_of(p, images=PIXELS, labels=LABELS - 1), {}, "first is -1 of picture 0"),
        (lambda p: npz_of(p, images=PIXELS, labels=LABELS), {"classes": 2}, "first is 2 of picture 2"),
        (lambda p: npz_of(p, images=PIXELS, labels=LABELS * 0.5), {}, "one integer per picture"),
        (lambda p: file_of(p, "a.npz", b"PK\3\4"), {}, "damaged or cut short"),
        (lambda p: file_of(p, "a.gz", b"x"), {}, "is of no known kind"),
        (lambda p: p / "nowhere", {}, "no data at"),
        (lambda p: p / "a-{0..3}.tar", {}, "4 shards of"),
        (lambda p: folder(p / "set")[0], {"resize": "none", "size": 16}, "is 8x8, expected 16x16 as the others"),
        (lambda p: folder(p / "set")[0], {"resize": "pad", "size": 4}, "more than the 4x4 it is padded to"),
        (lambda p: folder(p / "set")[0], {"resize": "corp"}, "Did you mean 'crop'"),
    ],
)  # fmt: skip
def test_bad_sets_say_what_is_wrong(tmp_path: Path, make: Any, options: dict[str, Any], words: str) -> None:
    with pytest.raises((ValueError, FileNotFoundError), match=words):
        open_data(make(tmp_path), **options)


def test_mixed_sizes_are_named_before_the_first_step(tmp_path: Path) -> None:
    path = folder(tmp_path / "set")[0]
    (path / "bee" / "odd.png").write_bytes(png(RNG.integers(0, 256, (3, 8, 9), dtype=np.uint8)))
    with pytest.raises(ValueError, match=r"bee/odd.png is 8x9, expected 8x8 .* mixed sizes need resize=crop"):
        open_data(path, resize="none")
    assert len(open_data(path, size=8)) == 13
    objects = np.empty(2, object)
    objects[:] = [PIXELS[0], PIXELS[0, :, :4]]
    np.save(tmp_path / "objects.npy", objects, allow_pickle=True)
    with pytest.raises(ValueError, match="such as pictures of mixed sizes"):
        open_data(tmp_path / "objects.npy")


def shard_with_one_odd(path: Path, odd: int) -> Path:
    """Forty 2 x 2 pictures and one of 2 x 3."""
    with tarfile.open(path / "a.tar", "w") as tar:
        for i in range(41):
            add(tar, f"{i:02d}.png", png(np.full((1, 2, 3 if i == odd else 2), i, np.uint8)))
    return path / "a.tar"


@pytest.mark.parametrize("odd", [0, 40])
def test_mixed_sizes_in_shards_are_named_at_the_opening(tmp_path: Path, odd: int) -> None:
    with pytest.raises(ValueError, match=r"a.tar:\d\d.png is 2x\d, expected 2x\d as the others: .* mixed sizes"):
        open_data(shard_with_one_odd(tmp_path, odd), resize="none")


def test_mixed_sizes_that_the_opening_does_not_meet_are_named_with_their_file(tmp_path: Path) -> None:
    """The opening reads a few samples of a shard, not all, and 1 is not among them."""
    source = open_data(shard_with_one_odd(tmp_path, 1), resize="none")
    with pytest.raises(ValueError, match=r"a.tar:01.png is 2x3, expected 2x2 as the others: .* mixed sizes"):
        Loader(source, seed=0, batch=41).read(0)


@pytest.mark.parametrize("size", [1, 2, 3, 17, 64, 1000])
def test_every_epoch_is_a_permutation_of_its_own(size: int) -> None:
    epochs = image_indices(size, 5, 0, 4 * size).reshape(4, size)
    assert (np.sort(epochs, axis=1) == np.arange(size)).all()
    assert size < 4 or len({tuple(epoch) for epoch in epochs}) == 4
    assert (image_indices(size, 5, size // 2, size) == epochs.ravel()[size // 2 : size // 2 + size]).all()
    assert size < 17 or (image_indices(size, 6, 0, size) != epochs[0]).any()


def test_the_order_is_as_random_as_it_must_be() -> None:
    """Which image is first, and which follows which, over 5,000 epochs of 10: chi-square with 9 and 89 freedoms."""
    epochs = image_indices(10, 1, 0, 50_000).reshape(5_000, 10)
    for place in (0, 5, 9):
        counts = np.bincount(epochs[:, place], minlength=10)
        assert ((counts - 500) ** 2 / 500).sum() < 27.9  # exceeded once in a thousand
    pairs = np.bincount((epochs[:, :-1] * 10 + epochs[:, 1:]).ravel(), minlength=100).reshape(10, 10)
    off = pairs[~np.eye(10, dtype=bool)]
    assert ((off - 500) ** 2 / 500).sum() < 140


def test_seeds_of_samples_differ_and_depend_on_nothing_else() -> None:
    seeds = sample_seeds(3, 0, 100_000)
    assert len(np.unique(np.concatenate([seeds, sample_seeds(4, 0, 100_000)]))) == 200_000
    assert (sample_seeds(3, 777, 5) == seeds[777:782]).all()
    assert sample_seeds(0, 0, 2).tolist() == sample_seeds(2**64, 0, 2).tolist()


@pytest.mark.parametrize("kept", [True, False])
def test_shares_of_processes_are_the_whole_batch(tmp_path: Path, kept: bool) -> None:
    source = open_data(npz(tmp_path / "set")[0], size=8)
    source = Resident(source) if kept else source
    whole = Loader(source, seed=9, batch=6).stream(3)
    shares = [Loader(source, seed=9, batch=6, rank=rank, world=3).stream(3) for rank in range(3)]
    for _ in range(5):
        batch, parts = next(whole), [next(share) for share in shares]
        for name, tensor in batch.tensors().items():
            assert torch.equal(tensor, torch.cat([part.tensors()[name] for part in parts]))
        joined = [torch.cat([piece.seeds for piece in batch.split(4)]), batch.seeds]
        assert torch.equal(*joined)
    for stream in (whole, *shares):
        stream.close()
