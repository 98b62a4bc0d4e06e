"""The norm op on the CPU: against float64 and torch's own errors, its gradient, torch.compile, and what it refuses."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from fastdiff.kernels import norm as kernel
from instruction_sets import INSTRUCTION_SETS, best_instruction_set  # noqa: F401
from norm_cases import CONTIGUOUS, EXTRAS, LAST, Case, assert_as_good_as_torch, error
from torch import Tensor

from bench.shapes import NETWORKS, Norm
from fastdiff.engine import native, norm, norm_cpu, reference_norm
from fastdiff.errors import BackendUnavailable
from fastdiff.models.unet import UNet
from fastdiff.models.unet_presets import PRESETS

EXECUTORS = ("reference", "cpp")
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@pytest.fixture(autouse=True)
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every output full of NaN before it is written."""
    outputs, image = norm._outputs, norm._image

    def poisoned_outputs(*arguments: Any) -> tuple[Tensor, ...]:
        return tuple(tensor.fill_(float("nan")) for tensor in outputs(*arguments))

    monkeypatch.setattr(norm, "_outputs", poisoned_outputs)
    monkeypatch.setattr(norm, "_image", lambda *arguments: image(*arguments).fill_(float("nan")))


def run(case: Case, executor: str) -> tuple[Tensor, Tensor, Tensor]:
    return norm._forward(*case.arguments(), True, executor=executor)


# channels not divisible by a vector, one pixel, one channel a group, and sizes of several patches
ODD = [
    Case(1, 2, (1, 1), 1),
    Case(2, 7, (5, 3), 7),
    Case(3, 12, (9, 1), 4),
    Case(1, 20, (6, 6), 2),
    Case(2, 33, (7, 11), 3),
    Case(5, 96, (13, 16), 8),
    Case(1, 640, (8, 9), 32),
]


@pytest.mark.parametrize("executor", EXECUTORS)
@pytest.mark.parametrize("layout", [CONTIGUOUS, LAST], ids=["first", "last"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_against_float64(dtype: torch.dtype, layout: torch.memory_format, executor: str) -> None:
    for i, odd in enumerate(ODD):
        for extras in ((), EXTRAS, EXTRAS[i % 5 :], EXTRAS[: i % 5]):
            skip = odd.groups * (1 + i % 3)
            case = Case(
                odd.batch, odd.channels, odd.size, odd.groups, dtype, layout, extras, skip, i % 3 > 0, shared=i % 2 > 0
            )  # fmt: skip
            y, total, stats = run(case, executor)
            assert_as_good_as_torch(case, y, total)
            exact = case.in_torch(torch.float64)[1].flatten(2).unflatten(1, (case.groups, -1)).flatten(2)
            torch.testing.assert_close(stats[:, :, 0].double(), exact.mean(2), rtol=1e-5, atol=1e-5)
            rstd = (exact.var(2, correction=0) + case.eps).rsqrt()
            torch.testing.assert_close(stats[:, :, 1].double(), rstd, rtol=1e-5, atol=0)
            without = norm._forward(*case.arguments(), False, executor=executor)[0]
            assert_as_good_as_torch(case, without, None)


@pytest.mark.parametrize("network", NETWORKS)
def test_every_norm_of_the_networks(network: str) -> None:
    for channels, size in sorted(set(NETWORKS[network])):
        if channels * size**2 > 1_500_000:
            continue  # more pixels of a kind that smaller images have too
        case = Case(1, channels, (size, size), 32, layout=LAST, extras=("before",))
        assert_as_good_as_torch(case, run(case, "cpp")[0], None)


def test_counts_of_the_networks() -> None:
    assert {name: len(shapes) for name, shapes in NETWORKS.items()} == {
        "ddpm-cifar10": 51, "edm-cifar10": 73, "adm-64": 95, "sd-1.5": 61,
    }  # fmt: skip
    assert NETWORKS["ddpm-cifar10"].count(Norm(384, 32)) == 1
    assert NETWORKS["sd-1.5"].count(Norm(960, 64)) == 1


@pytest.mark.parametrize("network", ["ddpm-cifar10", "adm-64"])
def test_norms_of_the_networks_are_those_that_run(network: str) -> None:
    """In order, in this package's UNet of that configuration."""
    config, seen = PRESETS[network], []
    with torch.device("meta"), torch.no_grad():
        net = UNet(config)
        for module in net.modules():
            if isinstance(module, torch.nn.GroupNorm):
                module.register_forward_pre_hook(lambda _, given: seen.append(Norm(*given[0].shape[1:3])))
        labels = torch.empty(1, dtype=torch.int64) if config.num_class_embeds else None
        net(torch.empty(1, 3, config.sample_size, config.sample_size), torch.empty(1), labels)
    assert seen == NETWORKS[network]


def test_kernels_fill_a_gpu_with_every_norm_of_the_networks() -> None:
    for shape in {shape for shapes in NETWORKS.values() for shape in shapes}:
        for size in (2, 4):
            cut = kernel.geometry(shape.pixels, shape.channels, 32, size)
            chunks = -(-32 // cut.groups)
            assert cut.width >= cut.groups * shape.channels // 32
            assert (cut.parts - 1) * cut.part < shape.pixels <= cut.parts * cut.part
            assert cut.parts <= kernel.PARTS
            assert cut.pixels * cut.width <= (kernel.WHOLE if cut.whole else 2 * kernel.TILE)
            assert cut.whole or chunks * cut.parts >= 64, (shape, cut)
            assert kernel.launches(64, shape.pixels, shape.channels, 32, size) == 1 or chunks <= 4


# patches of pixels of every channel, and columns of groups: with a rest, and with a skip that begins within a group
CUT = {"patches": Case(3, 40, (30, 31), 4, extras=EXTRAS), "columns": Case(3, 1300, (9, 8), 25, extras=EXTRAS, skip=75)}


@pytest.mark.parametrize("cut", CUT)
@pytest.mark.parametrize("layout", [CONTIGUOUS, LAST], ids=["first", "last"])
def test_instruction_sets_and_threads_agree(layout: torch.memory_format, cut: str) -> None:
    """Threads and batch to the bit; instruction sets to a rounding, since their lanes add in another order."""
    case = dataclasses.replace(CUT[cut], layout=layout)
    assert_as_good_as_torch(case, *run(case, "cpp")[:2])
    before, found = torch.get_num_threads(), []
    for n in INSTRUCTION_SETS:
        assert native.load().fastdiff_cpu_isa(n) == n
        found.append(run(case, "cpp"))
    for other in found[:-1]:
        torch.testing.assert_close(other[0], found[-1][0], rtol=1e-5, atol=1e-5)
        assert torch.equal(other[1], found[-1][1])
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            assert all(torch.equal(a, b) for a, b in zip(run(case, "cpp"), found[-1], strict=True))
    finally:
        torch.set_num_threads(before)
    x, *rest = case.arguments()
    vectors = [v[1:2] if v is not None and v.dim() > 1 else v for v in rest[:7]]
    alone = norm._forward(x[1:2], *vectors, *rest[7:], True, executor="cpp")
    assert torch.equal(alone[0][0], found[-1][0][1])


@pytest.mark.parametrize("act", [True, False])
@pytest.mark.parametrize("layout", [CONTIGUOUS, LAST], ids=["first", "last"])
def test_gradients_of_instruction_sets_and_threads_agree(layout: torch.memory_format, act: bool) -> None:
    """Against the formulas in float64; of threads and batch to the bit. A sample is three patches and a rest."""
    case = Case(3, 44, (30, 31), 4, layout=layout, extras=("before", "scale", "shift"))
    before = torch.get_num_threads()
    stats = run(case, "cpp")[2]
    grad = torch.randn(case.x.shape, generator=torch.Generator().manual_seed(1)).contiguous(memory_format=layout)
    given = case.inputs()
    exact = reference_norm.backward(
        grad.double(), given._replace(x=given.x.double()), stats.double(), 4, act
    )  # fmt: skip

    def gradient(first: int = 0, last: int = 3) -> tuple[Tensor, Tensor]:
        rows = slice(first, last)
        vectors = [given.weight, given.bias, given.before[rows], given.scale[rows], given.shift[rows]]
        return norm._backward(grad[rows], given.x[rows], *vectors, stats[rows], 4, act, executor="cpp")

    for n in INSTRUCTION_SETS:
        assert native.load().fastdiff_cpu_isa(n) == n
        du, sums = gradient()
        torch.testing.assert_close(du.double(), exact[0], rtol=1e-5, atol=2e-6)
        torch.testing.assert_close(sums[:, :2].double(), exact[1][:, :2], rtol=1e-5, atol=2e-4)
        torch.testing.assert_close(sums[:, 2].double(), exact[1][:, 2], rtol=1e-5, atol=2e-4)
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            assert all(torch.equal(a, b) for a, b in zip(gradient(), (du, sums), strict=True))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a[0], b[1]) for a, b in zip(gradient(1, 2), (du, sums), strict=True))


@pytest.mark.parametrize("executor", EXECUTORS)
def test_a_mean_far_above_the_spread(executor: str) -> None:
    case = Case(2, 8, (24, 24), 2, layout=LAST, offset=3000.0)
    assert_as_good_as_torch(case, run(case, executor)[0], None)


@pytest.mark.parametrize("executor", EXECUTORS)
def test_a_constant_image_and_one_that_is_not_finite(executor: str) -> None:
    x = torch.full((3, 4, 6, 6), 2.5)
    x[1, 2, 3, 3] = float("nan")
    x[2] = torch.randn(4, 6, 6)
    y = norm.norm_act(x, torch.ones(4), torch.full((4,), 0.5), 2, act=False, executor=executor)
    torch.testing.assert_close(y[0], torch.full((4, 6, 6), 0.5), rtol=0, atol=1e-4)
    assert y[1, 2:].isnan().all() and y[1, :2].isfinite().all() and y[2].isfinite().all()


@pytest.mark.parametrize("executor", EXECUTORS)
def test_channel_add(executor: str) -> None:
    for layout in (CONTIGUOUS, LAST):
        for dtype in DTYPES:
            case = Case(3, 21, (5, 6), 3, dtype, layout, ("before", "residual"), shared=dtype == torch.float16)
            for before in (None, case.options["before"], case.options["before"][0]):
                got = norm.channel_add(case.x, before, case.options["residual"], executor)
                exact = case.x.double() + case.options["residual"].double()
                exact = exact if before is None else exact + before.double().reshape(-1, 21, 1, 1)
                torch.testing.assert_close(got.double(), exact, rtol=torch.finfo(dtype).eps / 2, atol=6e-7)
                assert got.is_contiguous(memory_format=layout)
    x = torch.randn(2, 3, 4)
    assert norm.channel_add(x) is x
    torch.testing.assert_close(norm.channel_add(x.transpose(1, 2), torch.ones(4)), x.transpose(1, 2) + 1)


@pytest.fixture
def nothing_known(monkeypatch: pytest.MonkeyPatch) -> dict[Any, Any]:
    known: dict[Any, Any] = {}
    monkeypatch.setattr(norm_cpu, "_known", known)
    return known


@pytest.mark.parametrize("layout", [CONTIGUOUS, LAST], ids=["first", "last"])
def test_a_layout_is_checked_once_and_other_tensors_of_it_give_their_own_bits(
    layout: torch.memory_format, nothing_known: dict[Any, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def cases(seed: int) -> Iterator[Case]:
        for i, odd in enumerate(ODD):
            for extras in ((), EXTRAS[i % 5 :], ("before", "residual")[: 1 + i % 2]):
                skip, dtype = odd.groups * (1 + i % 3), DTYPES[i % 3]
                yield Case(
                    odd.batch, odd.channels, odd.size, odd.groups, dtype, layout, extras, skip, i % 2 > 0,
                    shared=i % 2 > 0, seed=seed,
                )  # fmt: skip

    def compare(seed: int) -> None:
        for case in cases(seed):
            y, total, _ = run(case, "cpp")
            affine = case.x, case.weight, case.bias, case.groups, case.eps
            got = norm.sum_norm_act(*affine, act=case.act, **case.options)
            assert torch.equal(got[0], y) and torch.equal(got[1], total)
            assert got[0].is_contiguous(memory_format=layout) and got[0].dtype == case.dtype
            alone = norm.norm_act(*affine, act=case.act, **case.options)
            assert torch.equal(alone, norm._forward(*case.arguments(), False, executor="cpp")[0])
            if case.options["skip"] is None:
                added = case.x, case.options["before"], case.options["residual"]
                assert torch.equal(norm.channel_add(*added), norm.channel_add(*added, executor="cpp"))

    compare(0)
    assert any(known is not None and known.last for known in nothing_known.values()) == (layout == LAST)

    def fails(*_: Any) -> None:
        raise AssertionError("checked again")

    known = len(nothing_known)
    for name in ("check", "check_add"):
        monkeypatch.setattr(norm_cpu, name, fails)
    compare(1)
    assert len(nothing_known) == known


@pytest.mark.parametrize("dtype", DTYPES[1:])
def test_vectors_of_other_dtypes_are_known_too_and_give_the_bits_of_single_ones(
    dtype: torch.dtype, nothing_known: dict[Any, Any]
) -> None:
    case = Case(2, 24, (5, 3), 4, dtype, LAST, EXTRAS)
    vectors = {name: case.options[name].to(dtype)[:, :24] for name in ("before", "scale")}
    vectors["shift"] = case.options["shift"][1, :24].to(dtype)
    weight, bias = case.weight[:24].to(dtype), case.bias[:24].to(dtype)
    got = norm.norm_act(case.x, weight, bias, 4, **vectors)
    single = {name: vector.float() for name, vector in vectors.items()}
    assert torch.equal(got, norm.norm_act(case.x, weight.float(), bias.float(), 4, **single))
    assert [known.casts for known in nothing_known.values()] == [True, False]


@pytest.mark.parametrize("wide", [256, 320])
def test_sums_of_runs_of_planes_are_those_of_single_planes(wide: int) -> None:
    """Without `before` the planes of a group are added up as one; with one of zeros, each by itself."""
    x = torch.randn(2, wide, 4, 5) + torch.arange(wide).reshape(-1, 1, 1)
    exact = torch.nn.functional.group_norm(x.double(), 32)
    for before in (None, torch.zeros(wide)):
        y = norm.norm_act(x, torch.ones(wide), torch.zeros(wide), 32, act=False, before=before)
        torch.testing.assert_close(y.double(), exact, rtol=0, atol=4e-6)


def test_what_fits_one_layout_is_not_taken_for_another(nothing_known: dict[Any, Any]) -> None:
    x, weight = torch.randn(2, 8, 3, 3), torch.ones(8)
    vector = torch.randn(2, 16)
    for shift in (vector[:, :8], vector[:, :8].contiguous(), vector[1, :8], vector[:, :8].double(), None):
        got = norm.norm_act(x, weight, weight, 2, shift=shift)
        rows = shift if shift is None or shift.dim() == 2 else shift.expand(2, -1)
        assert torch.equal(got, norm._forward(x, weight, weight, None, None, rows, None, None, 2, 1e-5, True, False,
                                              executor="cpp")[0])  # fmt: skip
    for shift in (vector[:, ::2], vector[:1, :8], torch.zeros(2, 8, device="meta")):
        with pytest.raises(ValueError, match="norm_act: shift"):
            norm.norm_act(x, weight, weight, 2, shift=shift)
    with pytest.raises(ValueError, match="8 channels do not divide into 3 groups"):
        norm.norm_act(x, weight, weight, 3)
    with pytest.raises(TypeError, match=r"residual is torch.float16"):
        norm.channel_add(x, residual=x.half())
    with pytest.raises(ValueError, match=r"channel_add: before has shape \(2, 9\)"):
        norm.channel_add(x, torch.ones(2, 9))


def test_layouts_that_are_known_are_bounded(nothing_known: dict[Any, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(norm_cpu, "KEPT", 3)
    for size in range(1, 9):
        case = Case(1, 4, (size, 1), 2)
        assert torch.equal(norm.norm_act(case.x, case.weight, case.bias, 2), run(case, "cpp")[0])
        assert 1 <= len(nothing_known) <= 3


def test_threads_of_one_layout_do_not_meet(nothing_known: dict[Any, Any]) -> None:
    cases = [Case(2, 32, (9, 8), 4, layout=LAST, extras=EXTRAS, seed=seed) for seed in range(8)]
    expected = [norm._forward(*case.arguments(), False, executor="cpp")[0] for case in cases]

    def work(i: int) -> bool:
        case = cases[i % 8]
        y = norm.norm_act(case.x, case.weight, case.bias, case.groups, case.eps, **case.options)
        return torch.equal(y, expected[i % 8])

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(work, range(800)))


def test_other_strides_are_copied_once() -> None:
    x = torch.randn(2, 6, 8, 8)
    view = x[:, :, ::2, ::2]
    expected = norm.norm_act(view.contiguous(), torch.ones(6), torch.zeros(6), 3)
    assert torch.equal(norm.norm_act(view, torch.ones(6), torch.zeros(6), 3), expected)
    mixed = norm.norm_act(x, torch.ones(6), torch.zeros(6), 3, residual=x.contiguous(memory_format=LAST))
    torch.testing.assert_close(mixed, norm.norm_act(2 * x, torch.ones(6), torch.zeros(6), 3, eps=1e-5))
    tokens = torch.randn(2, 6, 9)
    assert norm.norm_act(tokens, torch.ones(6), torch.zeros(6), 2).shape == tokens.shape


# -- gradients


def wants_gradient(tensors: list[Tensor | None]) -> list[Tensor | None]:
    return [
        None if t is None else t.double().clone(memory_format=torch.preserve_format).requires_grad_() for t in tensors
    ]


@pytest.mark.parametrize("layout", [CONTIGUOUS, LAST], ids=["first", "last"])
@pytest.mark.parametrize("extras", [(), ("before", "scale", "shift"), EXTRAS])
def test_gradcheck(layout: torch.memory_format, extras: tuple[str, ...]) -> None:
    case = Case(2, 4, (2, 3), 2, layout=layout, extras=extras, skip=2, act=bool(extras), shared=True)
    tensors = wants_gradient(list(case.arguments()[:8]))

    def call(*given: Tensor | None) -> tuple[Tensor, Tensor]:
        x, weight, bias, before, scale, shift, residual, skip = given
        return norm.sum_norm_act(
            x, weight, bias, case.groups, act=case.act, before=before, scale=scale, shift=shift, residual=residual,
            skip=skip, executor="reference",
        )  # fmt: skip

    assert torch.autograd.gradcheck(call, tensors)


@pytest.mark.parametrize("layout", [CONTIGUOUS, LAST], ids=["first", "last"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("extras", [("before",), EXTRAS])
def test_gradients_are_as_good_as_torch(
    dtype: torch.dtype, extras: tuple[str, ...], layout: torch.memory_format
) -> None:
    """On cpp: each gradient's error against float64 at most twice that of torch in the same dtype."""
    case = Case(3, 24, (7, 6), 4, dtype, layout, extras)
    seed = torch.randn(case.in_torch(torch.float32)[0].shape, generator=torch.Generator().manual_seed(5))

    def gradients(inside: torch.dtype, ours: bool) -> dict[str, Tensor]:
        leaves = {"x": case.x, "weight": case.weight, "bias": case.bias} | {
            name: tensor for name, tensor in case.options.items() if tensor is not None
        }
        leaves = {
            name: tensor.detach().to(inside).clone(memory_format=torch.preserve_format).requires_grad_()
            for name, tensor in leaves.items()
        }
        twin = Case(3, 24, (7, 6), 4, dtype, layout, extras)
        twin.x, twin.weight, twin.bias = leaves["x"], leaves["weight"], leaves["bias"]
        twin.options = {name: leaves.get(name) for name in EXTRAS}
        if ours:
            y = norm.norm_act(*twin.arguments()[:3], twin.groups, **twin.options, executor="cpp")
        else:
            y = twin.in_torch(inside)[0]
        y.backward(seed.to(y.dtype))
        return {name: leaf.grad for name, leaf in leaves.items() if leaf.grad is not None}

    exact, own, got = gradients(torch.float64, False), gradients(dtype, False), gradients(dtype, True)
    assert got.keys() == exact.keys()
    for name in exact:
        assert got[name].dtype == dtype
        least = torch.finfo(dtype).eps * float(exact[name].abs().max()) / 2
        assert error(got[name], exact[name]) <= max(2 * error(own[name], exact[name]), least), name


@pytest.mark.parametrize("executor", EXECUTORS)
def test_opcheck(executor: str) -> None:
    case = Case(2, 4, (3, 3), 2, layout=LAST, extras=("before", "scale", "residual"))
    for tensor in (case.x, case.weight, case.options["before"]):
        tensor.requires_grad_()
    ops, check = torch.ops.fastdiff, torch.library.opcheck
    if executor == "reference":  # tracing does not depend on who runs
        check = functools.partial(check, test_utils=("test_schema", "test_faketensor", "test_autograd_registration"))
    check(ops.norm_act.default, (*case.arguments(), True), {"executor": executor})
    grad, stats = torch.randn_like(case.x), torch.rand(2, 2, 2)
    vectors = case.weight.detach(), case.bias, None, case.options["scale"], None
    backward = (grad, case.x.detach(), *vectors, stats, 2, True)
    check(ops.norm_act_backward.default, backward, {"executor": executor})
    added = case.x.detach(), case.options["before"].detach(), case.options["residual"]
    check(ops.channel_add.default, added, {"executor": executor})


def test_compiles_without_a_break() -> None:
    case = Case(2, 8, (4, 4), 2, layout=LAST, extras=("before", "residual"))
    x, weight, bias = case.arguments()[:3]

    def call(x: Tensor) -> Tensor:
        added = norm.channel_add(x, bias, case.options["residual"])
        return norm.norm_act(added, weight, bias, 2, before=case.options["before"]) * 2

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), call(x), rtol=1e-6, atol=1e-6)
    leaf, twin = (case.x.clone().requires_grad_() for _ in range(2))
    compiled(leaf).sum().backward()
    call(twin).sum().backward()
    torch.testing.assert_close(leaf.grad, twin.grad, rtol=1e-5, atol=1e-5)


# -- refusals


@pytest.mark.parametrize(
    ("change", "failure", "words"),
    [
        ({"x": torch.zeros(2, 8)}, ValueError, r"x must be \[batch, channels, \*pixels\]"),
        ({"x": torch.zeros(2, 8, 3, 3).double()}, TypeError, "float64, expected float32, float16 or bfloat16"),
        ({"x": torch.zeros(2, 9, 3, 3)}, ValueError, "9 channels do not divide into 2 groups"),
        ({"weight": torch.zeros(7)}, ValueError, r"weight has shape \(7,\), expected \(8,\)"),
        ({"bias": torch.zeros(8, device="meta")}, ValueError, "bias is on meta"),
        ({"before": torch.zeros(3, 8)}, ValueError, r"before has shape \(3, 8\), expected \(2, 8\)"),
        ({"scale": torch.zeros(2, 8, dtype=torch.int32)}, TypeError, "scale has dtype torch.int32"),
        ({"shift": torch.zeros(2, 16)[:, ::2]}, ValueError, "shift must have consecutive channels"),
        ({"residual": torch.zeros(2, 8, 3, 4)}, ValueError, "residual has shape"),
        ({"residual": torch.zeros(2, 8, 3, 3).half()}, TypeError, "residual is torch.float16"),
        ({"skip": torch.zeros(2, 8, 3, 4)}, ValueError, "skip has shape"),
        ({"executor": "cuda"}, BackendUnavailable, "no CUDA C\\+\\+ kernel.*use executor 'triton'"),
        ({"executor": "cpu"}, ValueError, "Unknown backend 'cpu'"),
    ],
)
def test_refuses(change: dict[str, Any], failure: type[Exception], words: str) -> None:
    given: dict[str, Any] = {
        "x": torch.zeros(2, 8, 3, 3),
        "weight": torch.zeros(8),
        "bias": torch.zeros(8),
        "groups": 2,
    }
    given |= {"executor": "cpp"} | change
    with pytest.raises(failure, match=words):
        norm.norm_act(**given)


def test_an_empty_batch_is_an_empty_batch() -> None:
    for executor in EXECUTORS:
        assert norm.norm_act(torch.zeros(0, 4, 3, 3), torch.ones(4), torch.ones(4), 2, executor=executor).shape[0] == 0


@pytest.mark.parametrize("act", [True, False])
def test_second_derivatives(act: bool) -> None:
    generator = torch.Generator().manual_seed(5)
    shapes = (2, 8, 4, 3), (8,), (8,), (2, 8), (2, 8), (2, 8)
    given = [torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_() for shape in shapes]
    x, weight, bias, before, scale, shift = given

    def second(y: torch.Tensor) -> tuple[torch.Tensor, ...]:
        first = torch.autograd.grad(y.square().sum(), given, create_graph=True)
        return torch.autograd.grad(sum((g * g.cos()).sum() for g in first), given)  # type: ignore[arg-type]

    def over(vector: torch.Tensor) -> torch.Tensor:
        return vector[:, :, None, None]

    plain = torch.nn.functional.group_norm(x + over(before), 2, weight, bias) * (1 + over(scale)) + over(shift)
    expected = second(torch.nn.functional.silu(plain) if act else plain)
    vectors = {"before": before, "scale": scale, "shift": shift}
    got = second(norm.norm_act(x, weight, bias, 2, act=act, executor="reference", **vectors))
    for one, other in zip(got, expected, strict=True):
        assert float((one - other).abs().max()) <= 1e-9 * float(other.abs().max())
