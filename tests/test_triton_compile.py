"""The Triton kernels compiled for GPUs on a machine that has none: access widths, registers, spills, precision.

Every specialisation is compiled by the launcher itself, with a stand-in for the CUDA driver, so what is checked is what
a GPU would run. That happens in another process, because this one may have been told to interpret Triton.
"""

from __future__ import annotations

import json
import re
import sys
from collections import Counter
from typing import Any, NamedTuple

import pytest
import torch
from compiled import ARCHITECTURES, Compiled, describe, elsewhere

from fastdiff.compiler import layout as at

DTYPES = ("float32", "float16", "bfloat16")


class Specialisation(NamedTuple):
    """What the launcher compiles for: the model's dtypes, where normals come from, the shape of a sample, and extras.

    Of the guide op, `kernel` is its rule or "quantile", of the measure op its quantity; of the training ops
    "noising" or "loss", model_in the images'.
    """

    path: str
    model_out: str
    model_in: str
    extras: tuple[str, ...] = ()
    kernel: str = "row"

    @property
    def shape(self) -> tuple[int, ...]:
        return PATHS[self.path][1]


# name -> (memory format, shape of a sample, noise given); odd shapes have no 16-byte aligned samples
PATHS: dict[str, tuple[str, tuple[int, ...], bool]] = {
    "contiguous": ("contiguous", (3, 32, 32), False),
    "given noise": ("channels_last", (3, 32, 32), True),
    "3 channels last": ("channels_last", (3, 32, 32), False),
    "16 channels last": ("channels_last", (16, 32, 32), False),
    "channels last, odd image": ("channels_last", (4, 33, 33), False),
    "contiguous, odd": ("contiguous", (3, 33, 33), False),
    "given noise, odd": ("contiguous", (3, 33, 33), True),
    "channels last, odd": ("channels_last", (3, 33, 33), False),
    "long": ("contiguous", (3, 256, 256), False),
}
ROW_PATHS = [path for path in PATHS if path != "long"]
# of the row: what makes the launcher compile more than the plain step; "second" is a weight of E in the table
EXTRAS = [("mix",), ("mix", "momentum"), ("mix", "perturbed"), ("second",), ("variance",)]
EVERYTHING = ("mix", "momentum", "perturbed", "second", "variance")
RULES = ("plain", "rescale", "apg", "cfg_zero")
SAME = [(dtype, dtype) for dtype in DTYPES]
PAIRS = [(model_out, model_in) for model_out in DTYPES for model_in in DTYPES]
EVERY = [Specialisation(path, *pair) for path in ROW_PATHS for pair in PAIRS]
# the model's dtypes touch nothing else, so by default their product is compiled for one architecture and path
USUAL = {
    80: [Specialisation(path, dtype, dtype) for path in ROW_PATHS for dtype in ("float32", "bfloat16")],
    90: [Specialisation(path, *pair) for path in ROW_PATHS for pair in (PAIRS if path == "contiguous" else SAME)],
    100: [Specialisation(path, dtype, dtype) for path in ROW_PATHS for dtype in ("float32", "bfloat16")],
}
EXTENDED = [
    *[Specialisation("contiguous", "bfloat16", "bfloat16", extras) for extras in EXTRAS],
    *[Specialisation(path, dtype, dtype, EVERYTHING) for path in ROW_PATHS for dtype in ("float32", "bfloat16")],
]
GUIDES = [
    Specialisation(path, dtype, "float32", extras, kernel)
    for path in ("contiguous", "contiguous, odd", "long")
    for dtype in ("float32", "bfloat16")
    for kernel in (*RULES, "quantile", "apg quantile")
    for extras in ((("mix",), ("mix", "perturbed")) if kernel in ("rescale", "apg quantile") else (("mix",),))
]
TRAINING = [
    Specialisation(path, dtype, images, (), kernel)
    for path in ("contiguous", "contiguous, odd", "3 channels last", "16 channels last", "channels last, odd", "long")
    for dtype in ("float32", "bfloat16")
    for images in ("uint8", "float32")
    for kernel in ("noising", "loss")
]
USUAL_TRAINING = [
    one
    for one in TRAINING
    if one.path in ("contiguous", "contiguous, odd", "3 channels last")
    and (one.model_out, one.model_in) in (("bfloat16", "uint8"), ("float32", "float32"))
]
MEASURES = {"error": at.ERROR, "change": at.CHANGE}
MEASURING = [
    Specialisation(path, "float32", "float32", (), kernel)
    for path in ("contiguous", "contiguous, odd", "long")
    for kernel in MEASURES
]
# loads of each branch, loads of a fp32 register or of M, and stores of M, per vector
GUIDE_ACCESSES = {
    "plain": (0, 0, 0),
    "rescale": (2, 0, 0),  # the first tile twice: its means, then its sums
    "apg": (1, 2, 1),
    "cfg_zero": (1, 0, 0),
    "quantile": (2, 2, 0),  # the counting pass and the one for the value above
    "apg quantile": (2, 4, 0),
}


# ---- in the other process


def uses_e(coef: torch.Tensor) -> bool:
    return bool(coef[:, at.OUTPUT + at.OUT_E : at.SPREAD_LOG : at.OUTPUT_STRIDE].any())


def compile_all(architecture: int, wanted: list[Specialisation]) -> list[dict[str, Any]]:
    """Launch each specialisation on a stand-in driver and describe the kernel that a GPU would have got."""
    from fastdiff.kernels import affine, guide, measure, train

    kernels = (
        (affine, "affine_kernel"),
        (guide, "guide_kernel"),
        (guide, "quantile_kernel"),
        (measure, "measure_kernel"),
        (train, "train_kernel"),
    )
    compiled = Compiled(architecture, kernels)
    reports = []
    for specialisation in wanted:
        t = tensors(specialisation)
        if specialisation.kernel in ("noising", "loss"):
            train.bind(**t, factor=1.0)()
            reports.append(report(*compiled.last["train_kernel"]))
            continue
        if specialisation.kernel in MEASURES:
            measure.bind(**t, quantity=MEASURES[specialisation.kernel], rtol=0.1, atol=0.1)()
            reports.append(report(*compiled.last["measure_kernel"]))
            continue
        branches = t["model_out"], t["unguided"], t["perturbed"]
        if specialisation.kernel == "row":
            affine.bind(**t, second=uses_e(t["coef"]))(*branches)
            reports.append(report(*compiled.last["affine_kernel"]))
            continue
        rule, _, name = specialisation.kernel.rpartition(" ")
        wanted_rule = rule or ("plain" if name == "quantile" else name)
        bound = {key: t[key] for key in ("state", "model_out", "coef", "ids", "row", "guidance", "mix", "ticket")}
        sizes = {"settings": torch.zeros(8), "partial": torch.zeros(2, 64, 8), "momentum": t["state"][0].clone()}
        find = guide.bind(
            **bound,
            **sizes,
            unguided=t["unguided"],
            perturbed=t["perturbed"],
            rule=RULES.index(wanted_rule),
            threshold=True,
        )
        find(*branches)
        reports.append(report(*compiled.last["quantile_kernel" if name == "quantile" else "guide_kernel"]))
    return reports


def tensors(specialisation: Specialisation) -> dict[str, Any]:
    layout, shape, noise_given = PATHS[specialisation.path]
    memory_format = torch.channels_last if layout == "channels_last" else torch.contiguous_format
    batch, terms, extras = 2, 1, specialisation.extras

    def images(count: int, dtype: str = "float32") -> torch.Tensor:
        return torch.zeros(count, *shape, dtype=getattr(torch, dtype)).contiguous(memory_format=memory_format)

    def integers(dtype: torch.dtype) -> torch.Tensor:
        return torch.zeros(batch, dtype=dtype)

    if specialisation.kernel in ("noising", "loss"):
        given: dict[str, Any] = {
            "images": images(batch, specialisation.model_in),
            "table": torch.zeros(batch, at.TRAIN_COLUMNS),
            "key": integers(torch.int64),
            "out": images(batch, specialisation.model_out),
        }
        taught = {"weight": torch.zeros(batch), "partial": torch.zeros(batch, at.PARTS)}
        return given | ({**taught, "model_out": given["out"].clone()} if specialisation.kernel == "loss" else {})
    if specialisation.kernel in MEASURES:
        named = {name: images(batch) for name in ("value", "before", "after")}
        sums = {"found": torch.zeros(batch, 2), "partial": torch.zeros(batch, at.PARTS, dtype=torch.float64)}
        return {**named, **sums, "ticket": integers(torch.int32), "status": integers(torch.int32)}
    coef = torch.zeros(7, at.COEF_FIXED + at.NOISE_STRIDE * terms)
    coef[3, at.OUTPUT + at.OUTPUT_STRIDE + at.OUT_E] = float("second" in extras)
    return {
        "state": images(6 * batch).unflatten(0, (6, batch)),
        "model_out": images((3 if "perturbed" in extras else 2) * batch, specialisation.model_out),
        "model_in": images(2 * batch, specialisation.model_in),
        "model_time": torch.zeros(2 * batch),
        "coef": coef,
        "ids": torch.zeros(7, at.IDS_FIXED + at.TERM_IDS_STRIDE * terms, dtype=torch.int32),
        "row": integers(torch.int32),
        "seed": integers(torch.int64),
        "guidance": torch.zeros(batch),
        "noise": images(4 * batch).unflatten(0, (4, batch)) if noise_given else None,
        "denoised": images(batch),
        "status": integers(torch.int32),
        "ticket": integers(torch.int32),
        "unguided": None,
        "perturbed": None,
        "mix": torch.zeros(batch, at.MIX) if "mix" in extras else None,
        "momentum": images(batch) if "momentum" in extras else None,
        "variance": images(batch, specialisation.model_out) if "variance" in extras else None,
    }


def report(kernel: Any, options: dict[str, Any]) -> dict[str, Any]:
    return {"vectors": options["BLOCK"] // (4 * 32 * kernel.metadata.num_warps)} | describe(kernel)


# ---- in pytest


def assert_good(specialisation: Specialisation, report: dict[str, Any]) -> None:
    """16-byte accesses to fp32, 8-byte ones to halves, and no other; no spill; f64 in the measure op alone."""
    assert bool(report["doubles"]) == (specialisation.kernel in MEASURES)
    assert report["local"] == 0
    assert report["resources"]["STACK"] == 0
    assert report["resources"]["LOCAL"] == 0
    assert report["resources"]["REG"] <= (168 if "channels last" in specialisation.path else 128)
    accesses, vectors = Counter(report["accesses"]), report["vectors"]
    bulk = Counter({name: count for name, count in accesses.items() if re.search(r"global.*(\.v\d|b16)", name)})
    if specialisation.path.endswith(", odd"):
        assert not any(".v" in name for name in bulk)
        return
    if specialisation.kernel in ("noising", "loss"):
        expected = train_accesses(specialisation)
    elif specialisation.kernel in MEASURES:  # the error and two states; the state now and before, before written
        error = specialisation.kernel == "error"
        expected = Counter({"ld.global.v4.b32": 3 if error else 2, "st.global.v4.b32": 0 if error else 1})
    else:
        expected = row_accesses(specialisation) if specialisation.kernel == "row" else guide_accesses(specialisation)
    assert bulk == Counter({name: vectors * count for name, count in expected.items() if count})
    if specialisation.kernel != "row":
        return
    assert report["shuffles"] == 0
    exchanged = sum(count for name, count in accesses.items() if name.startswith("st.shared"))
    gather = 4 * vectors if specialisation.path.endswith("channels last") else 0
    assert exchanged == gather + 1  # the ticket's broadcast, and for channels_last the normals, once


def row_accesses(specialisation: Specialisation) -> Counter[str]:
    """Of a row, per vector: 6 slots read, 3 outputs and D written; the branches, V, and 3 copies of the model input."""
    extras = specialisation.extras
    expected = Counter({"ld.global.v4.b32": 6 + ("momentum" in extras), "st.global.v4.b32": 4})
    expected["ld.global.v4.b32"] += specialisation.path.startswith("given noise")
    wide = {"float32": "v4"}
    reads = 2 + ("perturbed" in extras) + ("variance" in extras)
    expected[f"ld.global.{wide.get(specialisation.model_out, 'v2')}.b32"] += reads
    expected[f"st.global.{wide.get(specialisation.model_in, 'v2')}.b32"] += 3
    return expected


def guide_accesses(specialisation: Specialisation) -> Counter[str]:
    branch, registers, stores = GUIDE_ACCESSES[specialisation.kernel]
    branches = 2 + ("perturbed" in specialisation.extras)
    expected = Counter({"ld.global.v4.b32": registers, "st.global.v4.b32": stores})
    expected["ld.global.v4.b32" if specialisation.model_out == "float32" else "ld.global.v2.b32"] += branch * branches
    return expected


def train_accesses(specialisation: Specialisation) -> Counter[str]:
    """F read, x_in or the gradient written, and images of fp32; of bytes 4 at a time, and mirrored ones singly."""
    wide = "v4" if specialisation.model_out == "float32" else "v2"
    expected = Counter({f"st.global.{wide}.b32": 1, f"ld.global.{wide}.b32": int(specialisation.kernel == "loss")})
    mirrored_wide = specialisation.path == "16 channels last"
    expected["ld.global.v4.b32"] += (specialisation.model_in == "float32") * (1 + mirrored_wide)
    return expected


def check(architecture: int, wanted: list[Specialisation], capsys: pytest.CaptureFixture[str]) -> None:
    reports = elsewhere(__file__, architecture, wanted)
    assert len(reports) == len(wanted)
    registers: dict[str, set[int]] = {}
    for specialisation, report in zip(wanted, reports, strict=True):
        name = specialisation.path if specialisation.kernel == "row" else specialisation.kernel
        registers.setdefault(name, set()).add(report["resources"]["REG"])
    with capsys.disabled():
        spread = (f"{path}: {min(counts)}-{max(counts)}" for path, counts in registers.items())
        print(f"\nTriton, sm_{architecture}, registers per thread: {'; '.join(spread)}")
    for specialisation, report in zip(wanted, reports, strict=True):
        try:
            assert_good(specialisation, report)
        except AssertionError as error:
            raise AssertionError(f"{specialisation} on sm_{architecture}: {report}") from error


@pytest.mark.long
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_specialisations(architecture: int, capsys: pytest.CaptureFixture[str]) -> None:
    """Rows, rows with what a rule may add, and the guide, measure and training kernels, by one process."""
    training = USUAL_TRAINING if architecture == 90 else [USUAL_TRAINING[0], USUAL_TRAINING[-1]]
    measuring = MEASURING if architecture == 90 else MEASURING[:2]
    extended, guides = fewer(architecture, EXTENDED), fewer(architecture, GUIDES)
    check(architecture, [*USUAL[architecture], *extended, *guides, *measuring, *training], capsys)


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_pair_of_model_dtypes(architecture: int, capsys: pytest.CaptureFixture[str]) -> None:
    check(architecture, [*EVERY, *EXTENDED, *GUIDES, *MEASURING, *TRAINING], capsys)


def fewer(architecture: int, wanted: list[Specialisation]) -> list[Specialisation]:
    """Both dtypes for sm_90; for the others bf16 on the paths that differ most."""
    paths = ("contiguous", "contiguous, odd", "3 channels last")
    return [one for one in wanted if architecture == 90 or (one.model_out == "bfloat16" and one.path in paths)]


if __name__ == "__main__":
    asked = [Specialisation(*fields) for fields in json.load(sys.stdin)]
    print(json.dumps(compile_all(int(sys.argv[1]), asked)))
