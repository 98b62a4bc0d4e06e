"""The measure op on every executor: its numbers against float64, and what must not change a bit of them."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from interpreted import DEVICE, interpreted  # noqa: F401
from interpreted import measure as kernel
from torch import Tensor

import fastdiff as fd
from fastdiff.compiler import layout as at
from fastdiff.engine import measure, native
from fastdiff.engine.measure import MeasureTensors

PLAIN = [name for name in ("reference", "cpp") if fd.backends()[name].ok]
EXECUTORS = [*PLAIN, "triton"]
QUANTITIES = {"error": at.ERROR, "change": at.CHANGE}
TOLERANCES = {"rtol": 0.4, "atol": 0.3}
SHAPES = [(1,), (7,), (3, 5, 7), (4, 24, 20), (3, 57, 61), (1, 33001, 1), (2**17 + 4,)]
INTERPRETED = 10_000  # elements from which the interpreter takes seconds
LAYOUTS = (torch.contiguous_format, torch.channels_last)

pytestmark = [
    pytest.mark.parametrize("quantity", QUANTITIES),
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),  # NumPy under the interpreter, on inf and NaN
]


def tensors(
    shape: tuple[int, ...], batch: int = 3, layout: torch.memory_format = torch.contiguous_format, seed: int = 0
) -> MeasureTensors:
    rng = np.random.default_rng(seed)

    def image() -> Tensor:
        tensor = torch.from_numpy(rng.normal(size=(batch, *shape)).astype(np.float32))
        return tensor.contiguous(memory_format=layout) if tensor.dim() == 4 else tensor

    return MeasureTensors(
        value=image(),
        before=image(),
        found=torch.full((batch, 2), float("nan")),
        partial=torch.full((batch, at.PARTS), float("nan"), dtype=torch.float64),
        ticket=torch.zeros(batch, dtype=torch.int32),
        after=image(),
        status=torch.arange(-1, batch - 1, dtype=torch.int32),
    )


def expected(t: MeasureTensors, quantity: str) -> np.ndarray:
    """The formulas, written out in float64."""
    value, before, after = (image.double().flatten(1).numpy() for image in (t.value, t.before, t.after))
    if quantity == "change":
        return np.abs(value - before).mean(1)
    allowed = np.maximum(0.3, 0.4 * np.maximum(np.abs(before), np.abs(after)))
    return np.sqrt(np.square(value / allowed).mean(1))


def find(t: MeasureTensors, quantity: str, executor: str) -> MeasureTensors:
    """The op, on a copy."""
    t = copy.deepcopy(t)
    options: dict[str, Any] = {"quantity": QUANTITIES[quantity], **TOLERANCES}
    if executor != "triton":
        measure.bind(t, executor=executor, **options)()
        return t
    measure.check(t, **options)
    there = [None if tensor is None else tensor.to(DEVICE) for tensor in t.arguments()]
    kernel.bind(*there, **options)()
    return MeasureTensors(*(None if tensor is None else tensor.cpu() for tensor in there))  # type: ignore[arg-type]


def long_for(executor: str, shape: tuple[int, ...]) -> bool:
    return executor == "triton" and DEVICE.type == "cpu" and np.prod(shape) > INTERPRETED


@pytest.mark.parametrize("executor", EXECUTORS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_numbers_against_float64(shape: tuple[int, ...], executor: str, quantity: str) -> None:
    for seed, layout in enumerate(LAYOUTS[-1:] if long_for(executor, shape) else LAYOUTS):
        t = tensors(shape, layout=layout, seed=seed)
        t.status = t.status if seed else None
        got = find(t, quantity, executor)
        np.testing.assert_allclose(got.found[:, 0].numpy(), expected(t, quantity), rtol=2e-7)
        assert got.found[:, 1].tolist() == ([-1.0, 0.0, 1.0] if seed else [-1.0] * 3)
        assert torch.equal(got.before, t.value if quantity == "change" else t.before)
        for name in ("value", "after", "ticket"):
            assert torch.equal(getattr(got, name), getattr(t, name)), name


@pytest.mark.parametrize("shape", SHAPES[1:], ids=str)
def test_a_sample_has_one_number_whatever_finds_it(shape: tuple[int, ...], quantity: str) -> None:
    """Alone or in a batch, on any threads, in both memory formats, on every executor and every instruction set."""
    source = tensors(shape, 7)
    want = find(source, quantity, "reference").found[:, 0]
    alone = MeasureTensors(*(tensor[3:4].clone() for tensor in source.arguments()))  # type: ignore[union-attr]
    last = tensors(shape, 7, torch.channels_last)
    threads = torch.get_num_threads()
    for executor in EXECUTORS:
        assert torch.equal(find(alone, quantity, executor).found[:, 0], want[3:4])
        if not long_for(executor, shape):
            assert torch.equal(find(last, quantity, executor).found[:, 0], want)
    for executor in PLAIN:
        try:
            for number in (1, 2, 3):
                torch.set_num_threads(number)
                assert torch.equal(find(source, quantity, executor).found[:, 0], want)
        finally:
            torch.set_num_threads(threads)
    if "cpp" not in EXECUTORS:
        return
    choose, best = native.load().fastdiff_cpu_isa, native.load().fastdiff_cpu_isa(-1)
    try:
        for instructions in range(best + 1):
            assert choose(instructions) == instructions
            assert torch.equal(find(source, quantity, "cpp").found[:, 0], want)
    finally:
        choose(best)


@pytest.mark.parametrize("executor", EXECUTORS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_value_that_is_not_finite_ends_and_stays_in_its_sample(bad: float, executor: str, quantity: str) -> None:
    for shape in ((7,), (3, 40, 40)):
        t = tensors(shape)
        clean = find(t, quantity, executor).found
        t.value[1].view(-1)[-1] = bad
        found = find(t, quantity, executor).found
        assert torch.equal(found[[0, 2]], clean[[0, 2]])
        assert not found[1, 0].isfinite()
        t.value[1].view(-1)[-1] = 0.0
        t.after[1].view(-1)[-1] = float("nan")
        assert bool(find(t, quantity, executor).found[1, 0].isnan()) == (quantity == "error")
        t.after[1].view(-1)[-1] = 0.5
        t.before[1].view(-1)[-1] = float("nan")
        found = find(t, quantity, executor).found
        t.before[1].view(-1)[-1] = 0.0
        smaller = find(t, quantity, executor).found
        assert found[1, 0].isnan() if quantity == "change" else torch.equal(found, smaller)


def test_values_of_any_size(quantity: str) -> None:
    """Squares that leave fp32 are inf; a sum of many that would is not lost to one large."""
    for executor in EXECUTORS:
        t = tensors((2**15,), 1)
        for image in (t.value, t.before, t.after):
            image.mul_(1e-3)
        t.value[0, 5] = 1e4
        np.testing.assert_allclose(find(t, quantity, executor).found[0, 0], expected(t, quantity)[0], rtol=2e-7)
        t.value[0, 5] = 1e30
        assert find(t, quantity, executor).found[0, 0].isfinite() == (quantity == "change")


@pytest.mark.parametrize("executor", PLAIN)
def test_the_bound_call_is_the_dispatched_op(executor: str, quantity: str) -> None:
    t = tensors((3, 5, 4))
    options: dict[str, Any] = {"quantity": QUANTITIES[quantity], "executor": executor, **TOLERANCES}
    torch.library.opcheck(torch.ops.fastdiff.measure.default, copy.deepcopy(t).arguments(), options)
    bound = find(t, quantity, executor)
    measure.measure(t, **options)
    assert torch.equal(t.found, bound.found) and torch.equal(t.before, bound.before)


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"found": torch.zeros(3, 1)}, ValueError, r"found has shape \(3, 1\), expected \(3, 2\)"),
        ({"partial": torch.zeros(3, 64)}, TypeError, "partial has dtype torch.float32, expected torch.float64"),
        (
            {"status": torch.zeros(3, device="meta", dtype=torch.int32)},
            ValueError,
            "status is on meta, the state on cpu",
        ),
        ({"before": torch.zeros(3, 3, 4, 5).mT}, ValueError, "before must be contiguous like the state"),
        ({"value": torch.zeros(3, 3, 5, 4).half()}, TypeError, "has dtype torch.float16, expected torch.float32"),
    ],
)
def test_what_does_not_fit_is_refused(
    quantity: str, change: dict[str, Tensor], error: type[Exception], words: str
) -> None:
    t = tensors((3, 5, 4))
    for name, value in change.items():
        setattr(t, name, value)
    with pytest.raises(error, match=words):
        measure.measure(t, QUANTITIES[quantity], "reference", **TOLERANCES)


def test_what_has_no_meaning_is_refused(quantity: str) -> None:
    t = tensors((7,))
    with pytest.raises(ValueError, match=r"quantity must be 0 or 1 \(ERROR, CHANGE\), got 2"):
        measure.measure(t, 2, "reference")
    for options in (
        {"rtol": -0.1}, {"atol": 0.0}, {"rtol": float("nan")}, {"atol": float("inf")}, {"rtol": 1e39}, {"atol": 1e-60},
    ):  # fmt: skip
        with pytest.raises(ValueError, match="rtol must be finite and at least 0 and atol above 0"):
            measure.measure(t, QUANTITIES[quantity], "reference", **options)
    t.after = None
    if quantity == "error":
        with pytest.raises(ValueError, match="after is None"):
            measure.measure(t, at.ERROR, "reference")


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE.type == "cpu", reason="torch sees no CUDA device")
@pytest.mark.parametrize("executor", ["triton", "cuda"])
@pytest.mark.parametrize("shape", [(3, 57, 61), (4, 24, 20), (2**20,)], ids=str)
def test_captured_launches_are_the_reference(shape: tuple[int, ...], executor: str, quantity: str) -> None:
    """To a rounding, in either memory format, and the same from replay to replay: no sum is read before it is there."""
    for layout in LAYOUTS:
        source = tensors(shape, 16, layout)
        want = find(source, quantity, "reference")
        t = MeasureTensors(*(tensor.to(DEVICE) for tensor in source.arguments()))  # type: ignore[union-attr]
        before = t.before.clone(memory_format=torch.preserve_format)
        run = measure.bind(t, QUANTITIES[quantity], executor, **TOLERANCES)
        run()
        torch.testing.assert_close(t.found.cpu(), want.found, rtol=2e-7, atol=0)
        first, graph = t.found.clone(), torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            run()
        differs = torch.zeros((), dtype=torch.int64, device=DEVICE)
        for _ in range(500):
            t.before.copy_(before)
            t.partial.fill_(float("nan"))
            graph.replay()
            differs += (t.found != first).sum()
        assert int(differs) == 0 and not t.ticket.any()
        assert torch.equal(t.before.cpu(), want.before)
