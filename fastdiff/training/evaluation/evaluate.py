"""One model against real pictures: samples by their features, the network by its errors, both beside baselines.

May import: the modules of this folder, data; models, engine, compiler, images.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from fastdiff import images as pictures_of
from fastdiff.compiler.plan import Plan
from fastdiff.engine.sampler import Sampler
from fastdiff.models.denoiser import Denoiser

from ..data import Source
from ..data.source import scaled
from . import features as features_of
from .distances import nearest, precision_recall, sliced_wasserstein
from .fid import fid as inception_fid
from .fid import package as inception_package
from .likelihood import Levels, levels
from .metrics import class_agreement, fit_gaussian, frechet_distance

FEWEST = 4  # pictures: three neighbours of each
MEMORY_PROBE = 1000  # samples whose nearest training picture is looked for


@dataclass(frozen=True)
class Row:
    """One set of pictures against the reference; a number that does not apply is nan.

    agreement: share whose class the classifier sees. distance: squared Fréchet distance of features. wasserstein:
    sliced, of pixels in [-1, 1]. nearest: median and least root mean square, in grey levels, to a training picture.
    """

    name: str
    count: int
    agreement: float = math.nan
    distance: float = math.nan
    precision: float = math.nan
    recall: float = math.nan
    wasserstein: float = math.nan
    nearest: float = math.nan
    nearest_least: float = math.nan
    fid: float = math.nan
    by_class: list[float] = field(default_factory=list)

    def __str__(self) -> str:
        gap = f"{_number(self.nearest, '.1f')} ({_number(self.nearest_least, '.1f')})"
        return (
            f"{self.name:22}{self.count:9,}{_number(100 * self.agreement, '.2f', ' %'):>11}"
            f"{_number(self.distance, '.4f'):>10}{_number(self.precision, '.3f'):>11}{_number(self.recall, '.3f'):>8}"
            f"{_number(self.wasserstein, '.4f'):>11}{gap:>17}{_number(self.fid, '.2f'):>9}"
        )


@dataclass(frozen=True)
class Report:
    """rows: real pictures and samples. levels: sigma/alpha, error on training and on test pictures. bits: of these."""

    features: str
    rows: list[Row]
    levels: list[tuple[float, float, float]]
    bits: float

    def to_dict(self) -> dict[str, Any]:
        """JSON values; nan as None."""
        return {key: _plain(value) for key, value in asdict(self).items()}

    def __str__(self) -> str:
        head = f"{'':22}{'pictures':>9}{'agreement':>11}{'Fréchet':>10}{'precision':>11}{'recall':>8}{'sliced W2':>11}"
        head += f"{'nearest (least)':>17}{'FID':>9}"
        table = [f"features: {self.features}", head, *map(str, self.rows)]
        if self.levels:
            table += ["", "sigma/alpha   error, training   error, test   (|x0 - D|^2 an element)"]
            table += [f"{rho:11.4g}{train:18.3e}{test:14.3e}" for rho, train, test in self.levels]
        if math.isfinite(self.bits):
            table += ["", f"at most {self.bits:.3f} bits a dimension of the test pictures"]
        return "\n".join(table)


def evaluate(
    model: Denoiser,
    plan: Plan,
    train: Source,
    test: Source,
    samples: int = 10_000,
    features: str = "auto",
    guidance: float = 1.0,
    seed: int = 0,
    batch: int = 200,
    likelihood: int = 500,
    fid: bool = False,
    progress: bool = False,
    scale: float = 1.0,
) -> Report:
    """Measure samples and, beside them, training pictures; both against the test pictures.

    samples: equally many of each class, sample i with seed `seed` + i. likelihood: pictures of each set for the errors
    by level, 0 leaves them out. scale: what float values were multiplied by in training; where a set has such values,
    all are compared in the units of the network, and samples are not rounded to pixels.
    Raises: ValueError where model and data do not fit each other.
    """
    shape = model.shape
    if shape is None or tuple(train.shape) != shape or tuple(test.shape) != shape:
        raise ValueError(f"the model draws {shape}, the data are {train.shape} and {test.shape}: open them at its size")
    if fid:
        inception_package()
    for what, count in (("samples", samples), ("test pictures", len(test)), ("training pictures", len(train))):
        if count < FEWEST:
            raise ValueError(
                f"{count} {what} are too few to measure: precision and recall need {FEWEST} or more of each"
            )
    features = features_of.resolve(features, shape, model.class_names)
    measure = features_of.get(features, shape)
    known, known_labels = _all(train, samples, scale)
    real, real_labels = _all(test, len(test), scale)
    every = _all(train, len(train), scale)[0] if len(train) <= 100_000 else known
    pixels = known.dtype == real.dtype == torch.uint8
    if not pixels:
        if fid or features == "fashion":
            raise ValueError("FID and features 'fashion' are of pixels, and these sets hold float values; use pixels")
        known, real, every = scaled(known), scaled(real), scaled(every)
    if likelihood and model.class_names and (known_labels is None or real_labels is None):
        raise ValueError(
            f"the model has {len(model.class_names)} classes, and its errors by level need the labels of the training "
            "and the test pictures: give sets that have them, or likelihood 0"
        )
    asked = _asked(model, samples)
    drawn = draw(model, plan, samples if asked is None else len(asked), asked, guidance, seed, batch, progress, pixels)
    _, reference = measure(real)
    rows = []
    for name, pictures, labels in (
        ("test pictures", real, real_labels),
        ("training pictures", known, known_labels),
        ("samples", drawn, asked),
    ):
        predicted, found = measure(pictures)
        row: dict[str, Any] = {}
        if predicted is not None and labels is not None:
            row["agreement"], each = class_agreement(predicted.numpy(), labels.numpy(), max(train.num_classes, 1))
            row["by_class"] = each.tolist()
        if name != "test pictures":
            row["distance"] = frechet_distance(fit_gaussian(found.numpy()), fit_gaussian(reference.numpy()))
            row["precision"], row["recall"] = precision_recall(found, reference)
            row["wasserstein"] = sliced_wasserstein(scaled(pictures), scaled(real))
            row["fid"] = inception_fid(pictures, real) if fid else math.nan
        if name != "training pictures":
            gaps = nearest(pictures[_spread(len(pictures), MEMORY_PROBE)], every)[0] * (1.0 if pixels else 127.5)
            row["nearest"], row["nearest_least"] = float(gaps.median()), float(gaps.min())
        rows.append(Row(name, len(pictures), **row))
    return Report(features, rows, *_likelihood(model, likelihood, (known, known_labels), (real, real_labels)))


def draw(
    model: Denoiser,
    plan: Plan,
    count: int,
    asked: Tensor | None,
    guidance: float = 1.0,
    seed: int = 0,
    batch: int = 200,
    progress: bool = False,
    pixels: bool = True,
) -> Tensor:
    """Samples [N, C, H, W] of the classes asked for, uint8 or (pixels False) fp32; sample i has seed `seed` + i."""
    sampler, drawn = Sampler(plan, model), []
    for start in tqdm(range(0, count, batch), disable=not progress, desc="samples", unit="batch"):
        part = None if asked is None else asked[start : start + batch].to(model.device)
        size = min(batch, count - start)
        conditions: dict[str, Any] = {}
        if part is not None:
            conditions["cond"] = {"class_labels": part}
        if part is not None and guidance != 1.0 and model.null_label is not None:
            conditions |= {"uncond": {"class_labels": torch.full_like(part, model.null_label)}, "guidance": guidance}
        x = sampler.sample((size, *(model.shape or ())), seed=range(seed + start, seed + start + size), **conditions)
        drawn.append(torch.from_numpy(pictures_of.to_pixels(x)).permute(0, 3, 1, 2) if pixels else x.float().cpu())
    return torch.cat(drawn).contiguous()


def _likelihood(
    model: Denoiser, count: int, train: tuple[Tensor, Tensor | None], test: tuple[Tensor, Tensor | None]
) -> tuple[list[tuple[float, float, float]], float]:
    if not count:
        return [], math.nan
    found: list[Levels] = []
    for pictures, labels in (train, test):
        place = _spread(len(pictures), count)
        found.append(levels(model, pictures[place], None if not model.class_names or labels is None else labels[place]))
    rows = zip(found[0].rhos.tolist(), found[0].errors.tolist(), found[1].errors.tolist(), strict=True)
    return list(rows), found[1].bits


def _all(source: Source, most: int, scale: float) -> tuple[Tensor, Tensor | None]:
    """Up to `most` pictures in the order of the set, of a labelled set equally many of each class."""
    pictures, labels = source.fetch(_chosen(source, most))
    return pictures * scale if pictures.is_floating_point() else pictures, labels


def _chosen(source: Source, most: int) -> NDArray[np.int64]:
    if not source.num_classes or most >= len(source):
        return np.arange(min(most, len(source)))
    labels = source.fetch(np.arange(len(source)))[1]
    assert labels is not None
    each = max(1, most // source.num_classes)
    chosen = torch.cat([(labels == c).nonzero()[:each, 0] for c in range(source.num_classes)])
    return chosen.numpy()


def _asked(model: Denoiser, samples: int) -> Tensor | None:
    classes = len(model.class_names)
    return torch.arange(classes).repeat_interleave(max(1, samples // classes)) if classes else None


def _spread(size: int, most: int) -> Tensor:
    return torch.linspace(0, size - 1, min(size, most), dtype=torch.float64).long()


def _number(value: float, form: str, unit: str = "") -> str:
    return f"{value:{form}}{unit}" if math.isfinite(value) else "–"


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
