"""The norm op on the Triton executor, on a GPU or interpreted: every path of it, held to torch's own errors."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from interpreted import DEVICE, channel_add, interpreted, norm, norm_backward  # noqa: F401
from norm_cases import CONTIGUOUS, EXTRAS, LAST, Case, assert_as_good_as_torch, error
from torch import Tensor

from bench.shapes import NETWORKS
from fastdiff.engine import reference_norm
from fastdiff.engine.norm_checks import Inputs

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NumPy under the interpreter, on inf and NaN
NAN = float("nan")
PATHS = ("whole", "looped", "shared")


@pytest.fixture
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Small images take the path of large ones, in tiles and parts of a few pixels."""
    if request.param != "whole":
        monkeypatch.setattr(norm, "WHOLE", 8)
        monkeypatch.setattr(norm, "TILE", 128)
        monkeypatch.setattr(norm, "PARTS", 3)
        monkeypatch.setattr(norm, "PROGRAMS", 1 if request.param == "looped" else 10**9)
    return str(request.param)


def moved(given: Inputs, move: Callable[[Tensor], Tensor]) -> Inputs:
    return Inputs(*[None if tensor is None else move(tensor) for tensor in given])  # type: ignore[arg-type]


def run(case: Case) -> tuple[Tensor, Tensor, Tensor]:
    """y, the sum and the statistics, from outputs poisoned with NaN."""
    given = moved(case.inputs(), lambda tensor: tensor.to(DEVICE))
    y = torch.full((case.batch, case.all, *case.size), NAN, dtype=case.dtype, device=DEVICE)
    y = y.contiguous(memory_format=case.layout)
    total = y.clone(memory_format=torch.preserve_format)
    stats = torch.full((case.batch, case.groups, 2), NAN, device=DEVICE)
    norm.forward(given, case.groups, case.eps, case.act, y, total, stats, case.layout == LAST)
    return y.cpu(), total.cpu(), stats.cpu()


@pytest.mark.parametrize("path", PATHS, indirect=True)
@pytest.mark.parametrize(
    "case",
    [
        Case(2, 7, (5, 3), 7, torch.float32, CONTIGUOUS, ("before", "scale"), act=False),
        Case(2, 12, (5, 5), 3, torch.bfloat16, LAST, EXTRAS, skip=6, shared=True),
        Case(1, 20, (6, 6), 2, torch.float16, LAST, ("residual", "shift")),
        Case(2, 16, (4, 8), 4, torch.float32, LAST, EXTRAS, skip=8),
        Case(1, 4, (1, 1), 1, torch.float32, LAST),
    ],
    ids=lambda case: f"{case.channels}ch-{case.dtype}".replace("torch.", ""),
)
def test_against_float64(case: Case, path: str) -> None:
    y, total, stats = run(case)
    assert_as_good_as_torch(case, y, total)
    expected = reference_norm.forward(case.inputs(), case.groups, case.eps, case.act)[2]
    torch.testing.assert_close(stats, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("path", PATHS, indirect=True)
def test_a_mean_far_above_the_spread(path: str) -> None:
    case = Case(2, 8, (9, 6), 2, layout=LAST, offset=3000.0)
    assert_as_good_as_torch(case, run(case)[0], None)


def test_the_batch_changes_no_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    """A sample alone, its groups shared between programs, and in a batch that fills the GPU."""
    for name, value in {"WHOLE": 8, "TILE": 128, "PARTS": 3, "PROGRAMS": 4}.items():
        monkeypatch.setattr(norm, name, value)
    batch = Case(5, 12, (6, 7), 3, layout=LAST, extras=("before", "residual"))
    y, total, stats = run(batch)
    alone = Case(1, 12, (6, 7), 3, layout=LAST, extras=("before", "residual"))
    assert norm.launches(5, 42, 12, 3, 4) == 1 and norm.launches(1, 42, 12, 3, 4) == 2
    alone.x, alone.weight, alone.bias = batch.x[3:4], batch.weight, batch.bias
    alone.options |= {name: batch.options[name][3:4] for name in ("before", "residual")}
    mine = run(alone)
    for got, expected in zip(mine, (y, total, stats), strict=True):
        assert torch.equal(got[0], expected[3])


def test_channel_add() -> None:
    for layout, dtype in ((LAST, torch.bfloat16), (CONTIGUOUS, torch.float32)):
        case = Case(2, 21, (5, 6), 3, dtype, layout, ("before", "residual"), shared=layout == LAST)
        x, residual = case.x.to(DEVICE), case.options["residual"].to(DEVICE)
        total = torch.full_like(x, NAN)
        channel_add.add(x, case.options["before"].to(DEVICE), residual, total, layout == LAST)
        exact = reference_norm.total_of(case.x.double(), case.options["before"], case.options["residual"], None)
        torch.testing.assert_close(total.cpu().double(), exact, rtol=torch.finfo(dtype).eps / 2, atol=6e-7)


# -- backward


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize(
    "case",
    [
        Case(2, 7, (5, 3), 7, torch.float32, CONTIGUOUS, ("before", "scale", "shift")),
        Case(2, 12, (5, 5), 3, torch.bfloat16, LAST, ("before", "scale")),
        Case(1, 40, (6, 6), 4, torch.float32, LAST, (), act=False),
        Case(2, 16, (4, 8), 4, torch.float16, LAST, ("shift",)),
    ],
    ids=lambda case: f"{case.channels}ch-{case.dtype}".replace("torch.", ""),
)
def test_backward(case: Case, shared: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """du and the sums against float64: at most twice the error of the reference, which computes in fp32."""
    if shared:
        for name, value in {"ALONE": 8, "TILE": 64, "BACKWARD_PARTS": 2}.items():
            monkeypatch.setattr(norm_backward, name, value)
    x = case.x
    grad = torch.randn(x.shape, generator=torch.Generator().manual_seed(7)).to(case.dtype)
    grad = grad.contiguous(memory_format=case.layout)
    stats = reference_norm.forward(case.inputs(), case.groups, case.eps, case.act)[2]

    there = moved(case.inputs(), lambda tensor: tensor.to(DEVICE))
    du = torch.full_like(there.x, NAN)
    sums = torch.full((case.batch, 3, case.channels), NAN, device=DEVICE)
    norm_backward.backward(
        grad.to(DEVICE), there, stats.to(DEVICE), case.groups, case.act, du, sums, case.layout == LAST
    )  # fmt: skip

    wide = moved(case.inputs(), Tensor.double)
    exact = reference_norm.backward(grad.double(), wide, stats.double(), case.groups, case.act)
    own = reference_norm.backward(grad, case.inputs(), stats, case.groups, case.act)
    for got, best, theirs in zip((du.cpu(), sums.cpu()), exact, own, strict=True):
        least = torch.finfo(got.dtype).eps * float(best.abs().max()) / 2
        assert error(got, best) <= max(2 * error(theirs, best), 2 * least)


@pytest.mark.gpu
@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_norm_of_the_networks(network: str, dtype: torch.dtype) -> None:
    for channels, size in sorted(set(NETWORKS[network])):
        for batch in (1, 9):
            case = Case(batch, channels, (size, size), 32, dtype, LAST, ("before", "residual"))
            y, total, _ = run(case)
            assert_as_good_as_torch(case, y, total)
