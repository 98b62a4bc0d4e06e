"""Which runs share what was captured, what is kept and what goes, and what happens where nothing can be captured."""

from __future__ import annotations

import gc
import warnings
from typing import Any

import pytest
import torch
from stand_in import StandIn, stand_in  # noqa: F401
from torch import Tensor, nn

import fastdiff as fd
from fastdiff.engine import graphs, seats
from fastdiff.engine.held import Memory
from fastdiff.engine.kept import Kept

SHAPE = (2, 3, 6, 5)
BACKEND = "cpp" if fd.backends()["cpp"].ok else "reference"


class Net(nn.Module):
    """Treats each element alone."""

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.tensor(0.9))

    def forward(self, x: Tensor, t: Tensor, label: Tensor | None = None) -> Tensor:
        shift = 0.0 if label is None else 0.1 * label.view(-1, 1, 1, 1)
        return self.gain * torch.tanh(x + shift) * (1 + 0.1 * t.cos().view(-1, 1, 1, 1))


def denoiser(net: Any = None) -> fd.Denoiser:
    return fd.Denoiser(net or Net(), "edm", "edm", sigma_data=0.5)


def labels(value: float, batch: int = 2) -> dict[str, Tensor]:
    return {"label": torch.full((batch,), value)}


def draw(model: fd.Denoiser, solver: str, steps: int, graph: Any = True, **arguments: Any) -> Tensor:
    plan = fd.plan(solver, model.schedule, steps, **arguments.pop("plan", {}))
    sampler = fd.Sampler(plan, model, BACKEND if graph is False else "auto", graph=graph)
    return sampler.sample(SHAPE, **arguments)


@pytest.mark.parametrize("graph", [True, "loop"])
def test_one_capture_serves_samplers_steps_seeds_labels_and_guidance(stand_in: type[StandIn], graph: Any) -> None:  # noqa: F811
    model = denoiser()
    runs = [
        ("dpmpp_2m", 7, 0, 2.0, 1.0),
        ("dpmpp_2m", 7, 5, 3.0, 4.0),
        ("res_multistep", 7, 1, -1.0, 4.0),
        ("dpmpp_2m", 12, 5, 3.0, [1.0, 4.0]),
    ]
    for solver, steps, seed, w, label in runs:
        given = {"seed": seed, "guidance": w, "cond": labels(torch.tensor(label).mean().item()), "uncond": labels(0.0)}
        expected = draw(model, solver, steps, graph=False, **given)
        assert torch.equal(draw(model, solver, steps, graph=graph, **given), expected)
    # a loop is captured anew for another number of rows, a step is not
    assert stand_in.records == (1 if graph is True else 2)


@pytest.mark.filterwarnings("ignore:noise='brownian' is of samplers")
def test_what_needs_another_capture(stand_in: type[StandIn]) -> None:  # noqa: F811
    model, guided = denoiser(), {"guidance": 2.0, "cond": labels(1.0), "uncond": labels(0.0)}
    counts = []
    for solver, given in (
        ("ddim", {}),
        ("euler_ancestral", {}),  # as many registers
        ("dpmpp_2m", {}),  # more registers
        ("ddim", {"cond": labels(1.0)}),  # other conditions
        ("ddim", guided),  # another branch
        ("ddim", guided | {"plan": {"guidance_interval": (0.5, 5.0)}}),  # rows of two kinds
        ("ddim", {"noise": "brownian"}),  # a deterministic plan: the same
        ("ddim", {}),
    ):
        assert torch.equal(draw(model, solver, 6, **given), draw(model, solver, 6, graph=False, **given))
        counts.append(stand_in.records)
    assert counts == [1, 1, 2, 3, 4, 5, 5, 5]
    model.net.gain = nn.Parameter(torch.tensor(0.5))  # type: ignore[union-attr]
    assert torch.equal(draw(model, "ddim", 6), draw(model, "ddim", 6, graph=False))
    assert stand_in.records == 6, "weights that moved"


def test_noise_that_is_given_and_a_callback(stand_in: type[StandIn]) -> None:  # noqa: F811
    model = denoiser()
    noise = torch.randn(5, *SHAPE, generator=torch.Generator().manual_seed(0))
    for given in ({"noise": noise}, {}, {"noise": 2 * noise}):
        assert torch.equal(draw(model, "ddpm", 6, **given), draw(model, "ddpm", 6, graph=False, **given))
    seen: list[list[Tensor]] = [[], []]
    for into, graph in zip(seen, (True, False), strict=True):
        draw(model, "dpmpp_2m", 5, graph=graph, callback=lambda at, into=into: into.append(at.denoised.clone()))
    assert len(seen[0]) == 5 and all(torch.equal(a, b) for a, b in zip(*seen, strict=True))
    with pytest.raises(ValueError, match="callback cannot be part of a captured loop"):
        draw(model, "dpmpp_2m", 5, graph="loop", callback=print)


def test_adaptive_rows_replay_too(stand_in: type[StandIn]) -> None:  # noqa: F811
    model = denoiser()
    runs = [fd.sample(model, SHAPE, "dpm_adaptive", rtol=0.05, graph=g, backend=BACKEND) for g in ("auto", False)]
    assert torch.equal(*runs) and stand_in.records == 1


def test_kept_by_bytes_the_least_recently_used_goes(stand_in: type[StandIn]) -> None:  # noqa: F811
    model = denoiser()
    plan = fd.plan("ddim", model.schedule, 3)
    sampler = fd.Sampler(plan, model)

    def kept() -> list[int]:
        return [entry.buffers.batch for entry in sampler._shelf.entries]

    for batch in (1, 2, 3, 1):
        sampler.sample((batch, 3, 6, 5))
    assert kept() == [2, 3, 1]
    memory = sampler.memory()
    held = {entry.buffers.batch: entry.bytes for entry in sampler._shelf.entries}
    assert memory.captured == 3 and memory.graphs == 3 * StandIn.size and memory.limit == 1 << 30
    assert memory.buffers + memory.graphs == sum(held.values())
    # state, network input and their scalars: 90 numbers each of 4 bytes, for every sample
    assert held[3] - held[2] == held[2] - held[1] > 2 * 90 * 4

    small = fd.Sampler(plan, model, kept_bytes=held[1] + held[2])
    small.sample((2, 3, 6, 5))
    assert kept() == [1, 2]
    small.kept_bytes = 0
    small.sample((1, 3, 6, 5))
    assert kept() == [1], "the latest stays whatever its size"
    assert torch.equal(small.sample((2, 3, 6, 5)), draw(model, "ddim", 3, graph=False, seed=0))
    assert stand_in.records == 4
    small.release()
    assert small.memory() == Memory(0, 0, 0, 0)


def test_entries_are_lent_to_one_at_a_time() -> None:
    class Entry:
        bytes = 10

    kept: Kept[Any] = Kept()
    first = kept.lend("a", Entry)
    second = kept.lend("a", Entry)
    assert first is not second
    kept.give_back("a", first, 20)
    kept.give_back("a", second, 20)
    assert kept.lend("a", Entry) is second and kept.lend("a", Entry) is first and kept.entries == ()
    for key in "abc":
        kept.give_back(key, Entry(), 20)
    assert len(kept.entries) == 2
    kept.clear()
    assert kept.entries == ()


def test_a_run_that_fails_leaves_nothing_behind_and_a_model_takes_its_memory_along() -> None:
    model = denoiser()
    sampler = fd.Sampler(fd.plan("ddim", model.schedule, 3), model)
    with pytest.raises(RuntimeError, match="no"):
        sampler.sample(SHAPE, callback=lambda at: (_ for _ in ()).throw(RuntimeError("no")))
    assert sampler.memory().buffers == 0
    sampler.sample(SHAPE)
    (entry,) = sampler._shelf.entries
    state = torch.utils.weak.WeakTensorKeyDictionary({entry.buffers.tensors.state: 1})
    assert len(state) == 1
    del entry, sampler, model
    gc.collect()
    assert len(state) == 0


class Branches(nn.Module):
    """Chooses by the values it is given."""

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        if x.mean() > 1e9:
            return x
        return 0.5 * x


class Cached(torch.nn.Module):
    """Writes into a tensor of its first call, which outside inference mode it may not where that was in it."""

    cache: Tensor | None = None

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        if self.cache is None:
            self.cache = torch.zeros_like(x)
        return 0.5 * self.cache.copy_(x)


def test_a_network_that_runs_in_inference_mode_alone_is_not_captured(stand_in: type[StandIn]) -> None:  # noqa: F811
    model = denoiser(Cached())
    expected = draw(denoiser(lambda x, t: 0.5 * x), "ddim", 3, graph=False)
    with torch.inference_mode():
        model.net(torch.zeros(SHAPE), torch.zeros(SHAPE[0]))
        with pytest.warns(UserWarning, match="Inplace update to inference tensor"):
            assert torch.equal(fd.Sampler(fd.plan("ddim", model.schedule, 3), model).sample(SHAPE), expected)
    assert stand_in.records == 0


def syncs(x: Tensor, t: Tensor) -> Tensor:
    return x * float(t[0].cos().item())


@pytest.mark.parametrize(
    ("net", "operation"),
    [(Branches(), r"`x.mean\(\) > 1e9` in forward \(test_graphs.py:\d+\)"), (syncs, r"`.*item\(\).*` in syncs")],
)
def test_a_network_that_cannot_be_captured_runs_eagerly_with_one_warning(
    stand_in: type[StandIn],  # noqa: F811
    net: Any,
    operation: str,
) -> None:
    model = denoiser(net)
    expected = draw(model, "ddim", 3, graph=False)
    sampler = fd.Sampler(fd.plan("ddim", model.schedule, 3), model)
    with pytest.warns(UserWarning, match=operation) as caught:
        assert torch.equal(sampler.sample(SHAPE), expected)
    assert len(caught) == 1 and str(caught[0].filename) == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(sampler.sample(SHAPE), expected)
    assert stand_in.records == 0 and sampler.last_run is not None and sampler.last_run.graph == "none"
    with pytest.raises(RuntimeError, match="stream is capturing"):
        draw(model, "ddim", 3, graph=True)

    stream = fd.stream(model, SHAPE[1:], slots=2)
    requests = [stream.submit("ddim", steps=3, seed=seed) for seed in range(3)]
    with pytest.warns(UserWarning, match=operation) as caught:
        done = list(stream)
    assert [warning.filename for warning in caught] == [__file__] and len(done) == 3
    for seed, request in enumerate(requests):
        solo = fd.sample(model, (1, *SHAPE[1:]), "ddim", 3, seed=seed, graph=False)
        assert torch.equal(request.result(), solo[0])


@pytest.mark.parametrize("graph", ["auto", False])
def test_what_a_network_raises_itself_is_raised_once(stand_in: type[StandIn], graph: Any) -> None:  # noqa: F811
    """It is no failed capture: nothing is warned about and nothing runs a second time."""
    calls: list[int] = []

    def breaks(x: Tensor, t: Tensor) -> Tensor:
        calls.append(len(x))
        raise RuntimeError("sizes do not match")

    model = denoiser(breaks)
    stream = fd.stream(model, SHAPE[1:], slots=2, graph=graph)
    request = stream.submit("ddim", steps=3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert stream.step() == [request] and str(request.error) == "sizes do not match"
        assert calls == [1]
        with pytest.raises(RuntimeError, match="^sizes do not match$"):
            draw(model, "ddim", 3, graph="auto" if graph else False)
    assert calls == [1, 2] and stand_in.records == 0


def test_a_row_that_ran_is_not_run_again_where_something_fails_after_it(
    stand_in: type[StandIn],  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    calls: list[int] = []

    def counts(x: Tensor, t: Tensor) -> Tensor:
        calls.append(len(x))
        return 0.5 * x

    def fails(own: seats.Seats, seat: seats.Seat) -> seats.Left:
        raise RuntimeError("an unspecified failure of the device")

    stream = fd.stream(denoiser(counts), SHAPE[1:], slots=1)
    monkeypatch.setattr(seats.Seats, "_left", fails)
    request = stream.submit("ddim", steps=1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert stream.step() == [request] and str(request.error) == "an unspecified failure of the device"
    assert len(calls) == graphs.WARM_UP + 2, "the capture and one replay"


def test_the_culprit_is_where_it_began(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not the error that ends the capture, and not what the caller was handling."""

    class Ends(StandIn):
        def record(self, work: Any, warm_up: int) -> Any:
            try:
                return super().record(work, warm_up)
            finally:
                raise RuntimeError("the capture ended in an error")

    monkeypatch.setattr(graphs, "recorder_for", lambda device, executor: Ends(device))
    model = denoiser(syncs)
    with pytest.warns(UserWarning, match=r"`.*item\(\).*` in syncs .*failed with: the capture ended"):
        try:
            raise KeyError("the caller's")
        except KeyError:
            draw(model, "ddim", 3, graph="auto")


def test_a_stream_replays_one_graph_for_each_size_of_its_batch(stand_in: type[StandIn]) -> None:  # noqa: F811
    model = denoiser()
    stream = fd.stream(model, SHAPE[1:], slots=5)
    wanted = [("dpmpp_2m", 6, 1.0), ("ddpm", 4, 3.0), ("heun", 3, 1.0), ("ddim", 7, 2.0), ("ddim", 2, 1.0)] * 3
    both = {"cond": labels(2.0, 1), "uncond": labels(0.0, 1)}

    def submit_all() -> list[Any]:
        return [stream.submit(s, steps=n, seed=i, guidance=w, **both) for i, (s, n, w) in enumerate(wanted)]

    requests = submit_all()
    for i, ((solver, steps, w), request) in enumerate(zip(wanted, requests, strict=True)):
        solo = fd.sample(
            model, (1, *SHAPE[1:]), solver, steps, seed=i, guidance=w, graph=False, backend=BACKEND, **both
        )
        assert torch.equal(request.result(), solo[0])
    # at most 10 entries: sizes 1, 2, 3, 4, 6, 8, 10, each by index or, where the entries lie in a row, as a slice
    assert stand_in.records <= 14 < stream.stats().rows
    replays = stand_in.records
    again = [
        stream.submit(solver, steps=steps, seed=i, guidance=w, **both) for i, (solver, steps, w) in enumerate(wanted)
    ]
    assert all(torch.equal(a.result(), b.result()) for a, b in zip(again, requests, strict=True))
    assert stand_in.records == replays
