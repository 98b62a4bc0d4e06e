"""How a call of fastdiff.integrations.k_diffusion runs: what is kept, threads, interruptions, bad input, noise."""

from __future__ import annotations

import threading
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from k_diffusion_cases import TOLERANCE, apart, levels_of, model, run, sigmas_of, start
from torch import Tensor

from fastdiff.integrations import k_diffusion as K
from fastdiff.integrations.k_diffusion import loop, tables

pytest_plugins = ["k_diffusion_cases"]  # the fixture `theirs`


@pytest.mark.parametrize("disable", [True, False])
def test_progress(theirs: Any, disable: bool, capsys: pytest.CaptureFixture[str]) -> None:
    shown = []
    for library in (K, theirs):
        for name in ("sample_euler", "sample_dpm_fast"):
            run(getattr(library, name), model, start(), *levels_of(name, 5), disable=disable)
        shown.append(capsys.readouterr().err)
    assert [text.count("5/5") for text in shown] == [0 if disable else 2] * 2


def test_tables_and_buffers_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """A repeated call compiles, binds and allocates nothing; what is kept is bounded."""
    K.clear()
    compiled = []
    real = tables.compile_levels
    monkeypatch.setattr(tables, "compile_levels", lambda *args: compiled.append(args[0]) or real(*args))
    sigmas = sigmas_of(9) + 0.001 * torch.rand(1, generator=torch.Generator().manual_seed(9))
    run(K.sample_dpmpp_2m, model, start(), sigmas)
    (memory,) = loop._kept
    step = next(iter(memory._steps.values()))[0]
    run(K.sample_dpmpp_2m, model, start(), sigmas.clone())
    assert compiled == ["dpmpp_2m"]
    assert loop._kept == [memory] and next(iter(memory._steps.values()))[0] is step
    for steps in range(2, 2 + loop.KEPT_STEPS + 3):
        run(K.sample_euler, model, start(), sigmas_of(steps))
    assert loop._kept == [memory] and len(memory._steps) == loop.KEPT_STEPS
    for width in range(1, loop.KEPT_BUFFERS + 3):
        run(K.sample_euler, model, start((1, width)), sigmas_of(3))
    assert len(loop._kept) == loop.KEPT_BUFFERS
    assert tables.on_sigmas.cache_info().maxsize == tables.TABLES
    K.clear()
    assert loop._kept == []


@pytest.mark.parametrize("name", ["sample_dpmpp_2m", "sample_euler_ancestral"])
def test_two_threads(name: str) -> None:
    """Each call has buffers of its own, also one that starts inside another's model."""
    gate = threading.Barrier(2, timeout=20)
    alone = [getattr(K, name)(model, k * start(), sigmas_of(5), seed=k, disable=True) for k in (1, 2)]
    ends: dict[int, Tensor] = {}

    def meet(x: Tensor, sigma: Tensor) -> Tensor:
        gate.wait()
        return model(x, sigma)

    def work(k: int) -> None:
        ends[k] = getattr(K, name)(meet, k * start(), sigmas_of(5), seed=k, disable=True)

    threads = [threading.Thread(target=work, args=(k,)) for k in (1, 2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert torch.equal(ends[1], alone[0]) and torch.equal(ends[2], alone[1])


def test_streams_do_not_share_buffers(monkeypatch: pytest.MonkeyPatch) -> None:
    """A run returns while its kernels are queued: the next on another stream must not get its memory."""
    now = [7]
    monkeypatch.setattr(loop, "_stream", lambda device: now[0])
    K.clear()
    run(K.sample_euler, model, start(), sigmas_of(3))
    (first,) = loop._kept
    now[0] = 8
    run(K.sample_euler, model, start(), sigmas_of(3))
    _, second = loop._kept
    assert (first.key.stream, second.key.stream) == (7, 8)
    assert not {t.data_ptr() for t in (first.state, first.row, first.ticket, first.noise)} & {
        t.data_ptr() for t in (second.state, second.row, second.ticket, second.noise)
    }
    now[0] = 7
    run(K.sample_euler, model, start(), sigmas_of(3))
    assert loop._kept == [second, first], "each stream gets its own again"
    K.clear()


def test_stream_of_a_device(monkeypatch: pytest.MonkeyPatch) -> None:
    class Stream:
        def __init__(self, device: torch.device) -> None:
            self.cuda_stream = 100 + (device.index or 0)

    monkeypatch.setattr(torch.cuda, "current_stream", Stream)
    assert [loop._stream(torch.device(d)) for d in ("cpu", "cuda:0", "cuda:3")] == [0, 100, 103]


def test_call_inside_a_model() -> None:
    inner = lambda x, sigma: K.sample_euler(model, x, sigmas_of(2), disable=True)  # noqa: E731
    outer, _ = run(K.sample_euler, inner, start(), sigmas_of(3))
    x = start()
    for s, t in zip(sigmas_of(3)[:-1], sigmas_of(3)[1:], strict=True):
        denoised, _ = run(K.sample_euler, model, x, sigmas_of(2))
        x = denoised + t / s * (x - denoised)
    assert apart(outer, x) < TOLERANCE


def test_interrupted_run_leaves_nothing_behind() -> None:
    class Interrupted(BaseException):
        pass

    def stopping(at: dict[str, Any]) -> None:
        if at["i"] == 2:
            raise Interrupted

    expected, _ = run(K.sample_dpmpp_2m, model, start(), sigmas_of(6))
    with pytest.raises(Interrupted):
        run(K.sample_dpmpp_2m, model, start(), sigmas_of(6), callback=stopping)
    assert torch.equal(run(K.sample_dpmpp_2m, model, start(), sigmas_of(6))[0], expected)


BAD: list[tuple[str, dict[str, Any], type[Exception], str]] = [
    ("sample_euler", {"sigmas": torch.tensor([1.0, 2.0, 0.0])}, ValueError, "descending"),
    ("sample_euler", {"sigmas": torch.tensor([2.0, 1.0, 1.0, 0.0])}, ValueError, "no two equal"),
    ("sample_euler_ancestral", {"sigmas": torch.tensor([1.0, 2.0])}, ValueError, "descending"),
    ("sample_euler", {"sigmas": torch.tensor([1.0, 2.0]), "s_churn": 1.0}, ValueError, "descending"),
    ("sample_euler", {"sigmas": torch.tensor([float("nan"), 0.0])}, ValueError, "finite"),
    ("sample_euler", {"sigmas": torch.tensor([1.0, -1.0])}, ValueError, ">= 0, got 1, -1"),
    ("sample_euler", {"sigmas": torch.ones(2, 3)}, ValueError, r"\[steps \+ 1\], got torch.float32 \(2, 3\)"),
    ("sample_euler", {"sigmas": [1.0, 0.0]}, ValueError, "must be a floating-point tensor"),
    ("sample_euler", {"sigmas": torch.tensor([3, 0])}, ValueError, "got torch.int64"),
    ("sample_euler_ancestral", {"eta": torch.tensor(1.0)}, ValueError, "eta is an amount of noise"),
    ("sample_euler", {"x": torch.ones(2, 3, dtype=torch.float64)}, ValueError, "float32, float16 or bfloat16"),
    ("sample_euler", {"x": torch.ones(2, 3, dtype=torch.long)}, ValueError, "got torch.int64"),
    ("sample_euler", {"x": torch.ones(3)}, ValueError, r"\[batch, \*sample\]"),
    ("sample_euler", {"x": torch.ones(0, 3)}, ValueError, "at least one element"),
    ("sample_euler", {"s_churn": -1.0}, ValueError, "s_churn is an amount of noise"),
    ("sample_euler_ancestral", {"eta": float("nan")}, ValueError, "eta is an amount of noise"),
    ("sample_euler", {"eta": 1.0}, TypeError, "eta"),
    ("sample_dpm_2_ancestral", {"eta": 9.0}, ValueError, "leave eta at 1 or below"),
    ("sample_lms", {"order": 5}, ValueError, "order must be an integer of 1..4"),
    ("sample_dpmpp_2m_sde", {"solver_type": "euler"}, ValueError, "'heun' or 'midpoint'"),
    ("sample_dpmpp_sde", {"r": 0.0}, ValueError, r"\(0, 1\]"),
    ("sample_euler", {"model": lambda x, s: x[:1]}, ValueError, r"returned \(1, 4, 8, 8\) on cpu in call 0"),
    ("sample_euler", {"model": lambda x, s: x.to("meta")}, ValueError, "on meta in call 0"),
    ("sample_euler", {"model": lambda x, s: (x,)}, TypeError, "returned tuple in call 0"),
    ("sample_euler", {"model": lambda x, s: x.long()}, TypeError, "returned torch.int64"),
    ("sample_euler_ancestral", {"noise_sampler": lambda s, t: torch.ones(4)}, ValueError, r"returned \(4,\), expected"),
]


@pytest.mark.parametrize(
    ("name", "change", "kind", "text"), BAD, ids=[f"{b[0]}-{next(iter(b[1]))}-{i}" for i, b in enumerate(BAD)]
)
def test_bad_input(name: str, change: dict[str, Any], kind: type[Exception], text: str) -> None:
    arguments = {"model": model, "x": start(), "sigmas": sigmas_of(4), "disable": True} | change
    with pytest.raises(kind, match=text):
        getattr(K, name)(**arguments)
    run(K.sample_euler, model, start(), sigmas_of(4))  # nothing is left half-done


@pytest.mark.parametrize(
    ("levels", "text"),
    [((0.0, 1.0, 5), "0 < sigma_min"), ((2.0, 1.0, 5), "0 < sigma_min"), ((0.1, 1.0, 0), "number of model calls")],
)
def test_bad_input_of_dpm_fast(levels: tuple[Any, ...], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        K.sample_dpm_fast(model, start(), *levels, disable=True)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("sample_res_multistep", r"no attribute 'sample_res_multistep'; that solver is fd\.plan\('res_multistep', sch"),
        ("sample_uni_pc", r"fd\.plan\('unipc', schedule\), run by fd\.Sampler on denoiser\(model\)\. The functions"),
        ("sample_eulr", r"did you mean sample_euler\? The functions of k-diffusion it has: sample_dpm_2, .*sample_lms"),
        ("sample_ttm", r"no attribute 'sample_ttm'\. The functions of k-diffusion it has: sample_dpm_2, "),
        ("smaple_euler", r"no attribute 'smaple_euler'$"),
    ],
)
def test_a_function_that_is_not_here(name: str, words: str) -> None:
    with pytest.raises(AttributeError, match=words):
        getattr(K, name)
    assert not hasattr(K, name)


def test_numbers_of_other_kinds() -> None:
    """A bound taken from the sigmas, a fraction, NumPy's numbers: the same as the plain number, bit for bit."""
    plain = {"s_churn": 0.5, "s_tmin": float(sigmas_of(5)[3]), "s_noise": 1.5}
    other = {"s_churn": np.float32(0.5), "s_tmin": sigmas_of(5)[3], "s_noise": Fraction(3, 2)}
    ends = [run(K.sample_euler, model, start(), sigmas_of(5), **options)[0] for options in (plain, other)]
    assert torch.equal(*ends)
    assert not torch.equal(ends[0], run(K.sample_euler, model, start(), sigmas_of(5))[0])


def test_double_output_is_taken_as_float() -> None:
    ends = [run(K.sample_euler, f, start(), sigmas_of(4))[0] for f in (model, lambda x, s: model(x, s).double())]
    assert torch.equal(*ends)


def test_brownian_without_torchsde(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "torchsde", None)
    with pytest.raises(ImportError, match="pip install torchsde, or give noise_sampler=, or seed="):
        K.sample_dpmpp_2m_sde(model, start(), sigmas_of(4), disable=True)
    assert K.sample_dpmpp_2m_sde(model, start(), sigmas_of(4), disable=True, eta=0.0).isfinite().all()


def test_brownian_tree_is_theirs(theirs: Any) -> None:
    """One seed, seeds per sample, either direction: the same numbers."""
    x, sigmas = start(), torch.tensor([9.0, 4.0, 1.0, 0.2])
    for seed in (None, 3, [3, 4]):
        torch.manual_seed(0)
        ours = K.BrownianTreeNoiseSampler(x, sigmas.min(), sigmas.max(), seed)
        torch.manual_seed(0)
        expected = theirs.BrownianTreeNoiseSampler(x, sigmas.min(), sigmas.max(), seed)
        for s, t in [(sigmas[0], sigmas[1]), (sigmas[1], sigmas[3]), (sigmas[3], sigmas[2])]:
            assert torch.equal(ours(s, t), expected(s, t))
    with pytest.raises(ValueError, match="the batch is 2, got 3"):
        K.BrownianTreeNoiseSampler(x, 0.2, 9.0, [1, 2, 3])


def test_adaptive_is_theirs_or_a_clear_error(theirs: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    end, info = K.sample_dpm_adaptive(model, start(), 0.03, 14.6, disable=True, return_info=True)
    expected, known = theirs.sample_dpm_adaptive(model, start(), 0.03, 14.6, disable=True, return_info=True)
    assert torch.equal(end, expected) and info == known
    monkeypatch.setitem(__import__("sys").modules, "k_diffusion.sampling", None)
    with pytest.raises(NotImplementedError, match=r"chooses one step for the whole batch.*fd.sample\(.*dpm_adaptive"):
        K.sample_dpm_adaptive(model, start(), 0.03, 14.6)
