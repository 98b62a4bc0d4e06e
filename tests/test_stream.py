"""Continuous batching: a request in a running batch gives the sample it gives alone, and what a stream refuses."""

from __future__ import annotations

import gc
import itertools
import re
import threading
import time
import weakref
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import fastdiff as fd
from fastdiff.engine import buffers, crowd, seats
from fastdiff.engine.table import PlanTable
from fastdiff.errors import QueueFull, RequestCancelled

BACKENDS = [name for name in ("reference", "cpp") if fd.backends()[name].ok]
SHAPE = (3, 6, 5)
# several orders, two-stage, noisy, with a history of model outputs, with draws that are used again
SOLVERS = ("ddim", "heun", "ddpm", "dpmpp_2m", "dpmpp_2s_ancestral", "dpmpp_2m_sde", "unipc", "sa_solver", "edm")


def labelled(x: Tensor, t: Tensor, label: Tensor) -> Tensor:
    """Treats each element alone, so that only the stream can make a sample differ from itself alone."""
    return torch.tanh(x + 0.1 * label.view(-1, 1, 1, 1)) * (1 + 0.1 * t.cos().view(-1, 1, 1, 1))


@pytest.fixture
def model() -> fd.Denoiser:
    return fd.Denoiser(labelled, fd.schedules.edm(), "edm", sigma_data=0.5)


def asks(count: int, **more: Any) -> list[dict[str, Any]]:
    """Requests that differ in everything."""
    return [
        {
            "solver": SOLVERS[i % len(SOLVERS)],
            "steps": 2 + (5 * i) % 7,
            "seed": 1000 - 17 * i,
            "guidance": (1.0, 2.5, 0.0, -1.0)[i % 4],
            "cond": {"label": torch.tensor([float(i)])},
            "uncond": {"label": torch.tensor([-float(i % 3)])},
            "noise": ("white", "brownian")[i % 10 == 4],
            **more,
        }
        for i in range(count)
    ]


def alone(model: fd.Denoiser, ask: dict[str, Any], backend: str = "auto") -> Tensor:
    return fd.sample(model, (1, *SHAPE), **{**ask, "seed": [ask["seed"]]}, backend=backend)[0]


def submit(stream: fd.Stream, ask: dict[str, Any]) -> Any:
    return stream.submit(ask["solver"], **{k: v for k, v in ask.items() if k != "solver"})


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_a_request_in_a_running_batch_is_the_request_alone(
    model: fd.Denoiser, backend: str, layout: torch.memory_format
) -> None:
    wanted = asks(18)
    stream = fd.stream(model, SHAPE, slots=4, backend=backend, memory_format=layout)
    requests = [submit(stream, ask) for ask in wanted[:5]]
    for ask in wanted[5:]:  # the others come while these run
        stream.step()
        requests.append(submit(stream, ask))
    for _ in stream:
        pass
    for ask, request in zip(wanted, requests, strict=True):
        assert torch.equal(request.result(), alone(model, ask, backend)), ask
        assert request.nfe == fd.plan(ask["solver"], model.schedule, ask["steps"]).nfe
    done = stream.stats()
    assert done.done == len(wanted) and done.failed == 0
    # every entry that was evaluated is one that a row reads: both branches where guidance is not 1
    assert done.evaluated == sum(r.nfe * (1 + (a["guidance"] != 1.0)) for r, a in zip(requests, wanted, strict=True))


def test_who_waits_longest_joins_first_and_leaves_when_done(model: fd.Denoiser) -> None:
    plain = fd.Denoiser(lambda x, t: 0.5 * x, "edm", "x0")
    stream = fd.stream(plain, SHAPE, slots=2)
    lengths = (3, 5, 2, 1)
    requests = [stream.submit("ddim", steps=n, seed=n) for n in lengths]
    ended: dict[int, int] = {}
    for row in itertools.count(1):
        for request in stream.step():
            ended[requests.index(request)] = row
        if not stream.pending:
            break
    # two slots: 3 and 5 first; the third from row 4 to 5, the fourth in row 6
    assert ended == {0: 3, 1: 5, 2: 5, 3: 6}
    assert stream.stats().rows == 6 and stream.stats().evaluated == sum(lengths)
    assert stream.stats().occupancy == sum(lengths) / 12
    joined = [request.submitted + request.waited for request in requests]
    assert joined[0] <= joined[1] < joined[2] < joined[3]
    assert all(r.latency > r.waited for r in requests)


def test_images_given_tensors_and_other_predictions(model: fd.Denoiser) -> None:
    image = torch.linspace(-1, 1, 90).view(1, *SHAPE)
    stream = fd.stream(model, SHAPE, slots=3)
    same = {"cond": {"label": torch.tensor([2.0])}}
    request = stream.submit("dpmpp_2m", steps=6, strength=0.3, init=image, seed=4, **same)
    plan = fd.plan("dpmpp_2m", model.schedule, 5)
    from_state = stream.submit(plan, init=3.0 * image, seed=4, **same)
    other = stream.submit("ddpm", steps=4, seed=9, **same)
    one = (1, *SHAPE)
    expected = fd.sample(model, one, "dpmpp_2m", 6, init=image, strength=0.3, seed=4, **same)
    assert torch.equal(request.result(), expected[0])
    assert torch.equal(from_state.result(), fd.Sampler(plan, model).sample(one, seed=4, init=3.0 * image, **same)[0])
    assert torch.equal(other.result(), fd.sample(model, one, "ddpm", 4, seed=9, **same)[0])

    restores = fd.Denoiser(lambda x, t: 0.5 * x, "vp", "x0")
    mu = {"mu": 0.7 * image}
    got = fd.stream(restores, SHAPE).submit("mean_reverting", steps=4, seed=3, given={"mu": mu["mu"][0]}).result()
    assert torch.equal(got, fd.sample(restores, one, "mean_reverting", 4, seed=3, given=mu)[0])


@pytest.mark.parametrize("rule", [None, fd.guidance.Rescale(0.7), fd.guidance.APG(), fd.guidance.CFGZero(1)])
@pytest.mark.parametrize("threshold", [None, fd.guidance.DynamicThreshold(0.9)])
def test_guidance_rules_of_all_requests(model: fd.Denoiser, rule: Any, threshold: Any) -> None:
    wanted = asks(6)
    stream = fd.stream(model, SHAPE, slots=2, rule=rule, threshold=threshold)
    requests = [submit(stream, ask) for ask in wanted]
    for ask, request in zip(wanted, requests, strict=True):
        expected = alone(model, ask | {"rule": rule, "threshold": threshold})
        assert torch.equal(request.result(), expected)


def test_branches_with_networks_of_their_own_and_a_learned_variance() -> None:
    weak = fd.Denoiser(lambda x, t, label: 0.8 * labelled(x, t, label), "edm", "edm", sigma_data=0.5)
    model = fd.Denoiser(labelled, "edm", "edm", sigma_data=0.5)
    wanted = [ask | {"uncond": None} for ask in asks(5)]
    for i, ask in enumerate(wanted):
        ask["perturbed_scale"] = float(i % 3)
    stream = fd.Sampler(fd.plan("ddim", "edm", 3), model, guide=weak, perturbed=weak).stream(SHAPE, slots=3)
    requests = [submit(stream, ask) for ask in wanted]
    default = stream.submit(seed=5, cond={"label": torch.tensor([1.0])})
    for ask, request in zip(wanted, requests, strict=True):
        assert torch.equal(request.result(), alone(model, ask | {"guide": weak, "perturbed": weak}))
    once = fd.sample(model, (1, *SHAPE), "ddim", 3, seed=5, cond={"label": torch.tensor([1.0])})
    assert torch.equal(default.result(), once[0])

    learns = fd.Denoiser(lambda x, t: torch.cat([torch.tanh(x), torch.sin(3 * x)], 1), "linear", learned_variance=True)
    stream = fd.stream(learns, SHAPE, slots=2)
    asked = [("ddpm", {"steps": 3, "variance": "learned_range"}), ("ddim", {"steps": 4}), ("ddpm", {"steps": 5})]
    requests = [stream.submit(name, seed=i, **options) for i, (name, options) in enumerate(asked)]
    for i, ((name, options), request) in enumerate(zip(asked, requests, strict=True)):
        assert torch.equal(request.result(), fd.sample(learns, (1, *SHAPE), name, seed=i, **options)[0])


def test_a_network_made_ready_for_the_times_of_a_plan_serves_others_too() -> None:
    torch.manual_seed(0)
    config = fd.models.UNetConfig(
        sample_size=8,
        in_channels=1,
        out_channels=1,
        block_out_channels=(8, 8),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D"),
        norm_num_groups=4,
        attention_head_dim=8,
    )
    model = fd.Denoiser(fd.models.UNet(config).eval().fast(), "linear")
    sampler = fd.Sampler(fd.plan("ddim", "linear", 3), model)
    stream = sampler.stream((1, 8, 8), slots=2)
    requests = [stream.submit(seed=0), stream.submit("dpmpp_2m", steps=4, seed=1)]
    expected = [fd.sample(model, (1, 1, 8, 8), *what, seed=i) for i, what in enumerate((("ddim", 3), ("dpmpp_2m", 4)))]
    for request, solo in zip(requests, expected, strict=True):
        assert (request.result() - solo[0]).abs().max() < 1e-5 * solo.abs().max()
    assert fd.Sampler(fd.plan("ddim", "linear", 3), model)._shelf is sampler._shelf


def test_guidance_interval_asks_for_the_unguided_branch_inside_it_only(model: fd.Denoiser) -> None:
    ask = asks(2)[1] | {"solver": "dpmpp_2m", "steps": 8, "guidance_interval": (0.5, 10.0)}
    stream = fd.stream(model, SHAPE, slots=2)
    request = submit(stream, ask)
    assert torch.equal(request.result(), alone(model, ask))
    plan = fd.plan("dpmpp_2m", model.schedule, 8, guidance_interval=(0.5, 10.0))
    inside = sum(row.gain != 0.0 for row in plan.rows[1:])
    assert 0 < inside < 8 and stream.stats().evaluated == 8 + inside


def test_a_cancelled_request_leaves_at_once_and_the_others_do_not_notice(model: fd.Denoiser) -> None:
    wanted = asks(6, steps=6)
    stream = fd.stream(model, SHAPE, slots=2)
    requests = [submit(stream, ask) for ask in wanted]
    stream.step()
    assert requests[0].state == "running" and requests[4].state == "waiting"
    assert requests[0].cancel() and requests[4].cancel() and not requests[4].cancel()
    assert stream.pending == 4
    finished = list(stream)
    assert requests[0] not in finished and len(finished) == 4
    for i in (1, 2, 3, 5):
        assert torch.equal(requests[i].result(), alone(model, wanted[i]))
    for i in (0, 4):
        with pytest.raises(RequestCancelled, match="submit it again"):
            requests[i].result()
    assert stream.stats().cancelled == 2 and not requests[1].cancel()


def test_a_request_that_fails_is_told_so_and_the_others_go_on(model: fd.Denoiser) -> None:
    def breaks(x: Tensor, t: Tensor, label: Tensor) -> Tensor:
        bad = (label > 5) & (t < 0.25 * torch.tensor(1.0).log())  # edm: t = log(sigma) / 4
        return torch.where(bad.view(-1, 1, 1, 1), torch.full_like(x, float("nan")), labelled(x, t, label))

    broken = fd.Denoiser(breaks, model.schedule, "edm", sigma_data=0.5)
    stream = fd.stream(broken, SHAPE, slots=3)
    requests = [
        stream.submit("dpmpp_2m", steps=8, seed=i, cond={"label": torch.tensor([v])})
        for i, v in enumerate((1.0, 6.0, 2.0))
    ]
    plan = fd.plan("dpmpp_2m", model.schedule, 8, "karras")
    first = next(i for i, level in enumerate(plan.levels) if level.sigma < 1.0)
    assert len(list(stream)) == 3 and requests[1].state == "failed"
    with pytest.raises(FloatingPointError, match=f"row {first} of 8.*seed 1"):
        requests[1].result()
    for i, label in ((0, 1.0), (2, 2.0)):
        same = {"cond": {"label": torch.tensor([label])}}
        assert torch.equal(requests[i].result(), fd.sample(model, (1, *SHAPE), "dpmpp_2m", 8, seed=[i], **same)[0])

    wrong = fd.stream(fd.Denoiser(lambda x, t: x[:, :1], "edm", "x0"), SHAPE)
    with pytest.raises(ValueError, match="they must be equal"):
        wrong.submit("ddim", steps=2).result()
    assert wrong.pending == 0 and wrong.stats().failed == 1


def test_no_memory_for_larger_buffers_fails_the_request_that_needs_them(
    model: fd.Denoiser, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = asks(2, steps=4)[:1] + asks(2, solver="unipc", guidance=1.0, steps=4)[1:]
    stream = fd.stream(model, SHAPE, slots=2)
    first = submit(stream, wanted[0])
    stream.step()

    def full(room: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    with monkeypatch.context() as patch:
        patch.setattr(seats, "Buffers", full)
        second = submit(stream, wanted[1])
        assert list(stream) == [second, first]
    with pytest.raises(torch.OutOfMemoryError):
        second.result()
    assert torch.equal(first.result(), alone(model, wanted[0]))
    assert torch.equal(submit(stream, wanted[1]).result(), alone(model, wanted[1]))


@pytest.mark.parametrize("where", ["conditions", "opening"])
def test_buffers_that_grow_in_part_only_leave_the_stream_as_it_was(
    model: fd.Denoiser, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    plain = asks(3, guidance=1.0, steps=4)
    guided = asks(1, guidance=2.0, steps=4)[0]
    stream = fd.stream(model, SHAPE, slots=2)
    first = submit(stream, plain[0])
    stream.step()

    def full(*_: Any, **__: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    with monkeypatch.context() as patch:
        patch.setattr(*((crowd.Lane, "grow") if where == "conditions" else (seats.ops, "bind")), full)
        second = submit(stream, guided)
        stream.step()
        assert second.state == "failed"
    # what joins from now on is read where it was written, and so is what needs larger buffers
    for request, ask in ((first, plain[0]), (submit(stream, plain[2]), plain[2]), (submit(stream, guided), guided)):
        assert torch.equal(request.result(), alone(model, ask))


def test_an_image_that_cannot_be_kept_fails_all_and_loses_none(
    model: fd.Denoiser, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = asks(3, solver="ddim", steps=3)
    stream = fd.stream(model, SHAPE, slots=3)
    requests = [submit(stream, ask) for ask in wanted]
    whole, calls = seats.Seats._left, []

    def second_fails(own: seats.Seats, seat: seats.Seat) -> seats.Left:
        calls.append(seat)
        if len(calls) == 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return whole(own, seat)

    with monkeypatch.context() as patch:
        patch.setattr(seats.Seats, "_left", second_fails)
        assert list(stream) == requests and stream.pending == 0 and stream.stats().failed == 3
    assert torch.equal(submit(stream, wanted[1]).result(), alone(model, wanted[1]))


def test_a_full_queue_and_a_closed_stream(model: fd.Denoiser) -> None:
    same = {"cond": {"label": torch.tensor([2.0])}}
    stream = fd.stream(model, SHAPE, slots=1, queue=2)
    requests = [stream.submit("ddim", steps=2, seed=i, **same) for i in range(2)]
    with pytest.raises(QueueFull, match="2 requests wait"):
        stream.submit("ddim", steps=2, **same)
    stream.step()
    requests.append(stream.submit("ddim", steps=2, seed=2, **same))
    assert requests[0].result().shape == SHAPE
    with stream:
        pass
    assert [r.state for r in requests] == ["done", "cancelled", "cancelled"]
    with pytest.raises(RuntimeError, match="closed"):
        stream.submit("ddim", steps=2, **same)


@pytest.mark.parametrize(
    ("request_", "error", "words"),
    [
        ({"plan": "ddmi"}, ValueError, "Did you mean 'ddpm' or 'ddim'"),
        ({"plan": None}, TypeError, "needs a plan or the name"),
        ({"plan": 3}, TypeError, "needs a plan"),
        ({"plan": "rk45"}, ValueError, "chooses its rows while it runs"),
        ({"plan": "ddim", "steps": 99}, ValueError, "100 rows, the stream's table 64: give the stream table_rows=100"),
        ({"seed": 2**64}, ValueError, "64-bit"),
        ({"seed": [1, 2]}, ValueError, "one integer per sample"),
        ({"guidance": 3.0}, ValueError, "needs uncond"),
        ({"uncond": {"label": torch.zeros(1)}}, ValueError, "give guidance= too, 2.0 say .*leave uncond= out"),
        ({"guidance": float("inf")}, ValueError, "finite"),
        ({"perturbed_scale": 1.0}, ValueError, "needs a third branch"),
        ({"noise": lambda i, shape: torch.zeros(shape)}, ValueError, "'white' or 'brownian'"),
        ({"init": torch.zeros(3, 6, 6)}, ValueError, r"init must have shape \(3, 6, 5\)"),
        ({"init": torch.zeros(SHAPE, dtype=torch.uint8)}, TypeError, "floating-point"),
        ({"init": torch.full(SHAPE, float("nan"))}, ValueError, "inf or nan"),
        ({"cond": {"label": torch.zeros(2)}}, ValueError, "one entry per sample"),
        ({"cond": {"label": torch.zeros(1, 2)}}, ValueError, r"\({'label': float32 \[2\]}\) have another structure"),
        ({"cond": None}, ValueError, r"request \(None\) have another structure.* first \({'label': "),
        ({"given": {"mu": torch.zeros(SHAPE)}}, ValueError, "takes no given="),
        ({"plan": "mean_reverting"}, ValueError, "mu"),
        ({"guidence": 2.0}, TypeError, "guidence"),
    ],
)
def test_what_is_wrong_is_said_at_submit_and_nothing_joins(
    model: fd.Denoiser, request_: dict[str, Any], error: type[Exception], words: str
) -> None:
    same = {"cond": {"label": torch.tensor([2.0])}}
    stream = fd.stream(model, SHAPE, slots=2, table_rows=64)
    good = stream.submit("ddim", steps=3, **same)
    with pytest.raises(error, match=words):
        stream.submit(**({"plan": "ddim"} | same | request_))
    assert stream.pending == 1
    assert torch.equal(good.result(), fd.sample(model, (1, *SHAPE), "ddim", 3, **same)[0])


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"model": labelled}, TypeError, "needs a Denoiser"),
        ({"slots": 0}, ValueError, "slots must be an integer >= 1"),
        ({"queue": 1.5}, ValueError, "queue must be an integer"),
        ({"shape": (3, 0)}, ValueError, "every size >= 1"),
        ({"graph": True}, ValueError, "needs a CUDA device"),
        ({"graph": "loop"}, ValueError, "graph must be"),
        ({"backend": "cpu"}, ValueError, "Did you mean 'cpp'"),
        ({"rule": 0.7}, TypeError, "fd.guidance.Rescale"),
    ],
)
def test_what_a_stream_refuses(
    model: fd.Denoiser, arguments: dict[str, Any], error: type[Exception], words: str
) -> None:
    with pytest.raises(error, match=words):
        fd.stream(**({"model": model, "shape": SHAPE} | arguments))


def test_a_batch_in_the_shape_is_refused_where_the_channels_are_known() -> None:
    for shape in ((1, 1, 28, 28), (3, 28, 28)):
        with pytest.raises(ValueError, match=r"must be \(1, height, width\), without a batch: the network takes 1 "):
            fd.stream(fd.load("fashion"), shape)


def test_a_request_whose_result_was_taken_is_not_kept(model: fd.Denoiser) -> None:
    same = {"cond": {"label": torch.tensor([2.0])}}
    stream = fd.stream(model, SHAPE, slots=4)
    requests = [stream.submit("ddim", steps=2, seed=i, **same) for i in range(4)]
    alive = [weakref.ref(request) for request in requests]
    requests[2].result()  # the others are done with it and wait for a step
    requests.pop(1).result()
    del requests[1:]
    gc.collect()
    assert [ref() is None for ref in alive] == [False, True, True, False]
    landed = stream.step()
    assert landed[0] is requests[0] and landed[1:] == [alive[3]()] and list(stream) == []


def test_what_a_stream_says_of_itself_may_be_asked_while_it_runs(model: fd.Denoiser) -> None:
    counting = threading.Event()

    class Slow(list[seats.Left]):
        def __len__(self) -> int:
            counting.set()
            time.sleep(0.1)  # the other thread has all this time to change what is counted
            return super().__len__()

    stream = fd.stream(model, SHAPE, slots=1)
    stream.submit("ddim", steps=3, cond={"label": torch.tensor([2.0])})
    stream._flight.append((None, Slow()))
    with ThreadPoolExecutor(1) as pool:
        stepped = pool.submit(lambda: counting.wait() and stream.step())
        assert stream.pending == 1
        assert stepped.result() == [] and len(list(stream)) == 1
    assert stream.stats().done == 1 and stream.pending == 0


def test_threads_take_turns(model: fd.Denoiser) -> None:
    wanted = asks(12)
    stream = fd.stream(model, SHAPE, slots=3)
    got: dict[int, Tensor] = {}

    def client(i: int) -> None:
        got[i] = submit(stream, wanted[i]).result()

    threads = [threading.Thread(target=client, args=(i,)) for i in range(len(wanted))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    for i, ask in enumerate(wanted):
        assert torch.equal(got[i], alone(model, ask))


def test_a_plan_is_uploaded_once_and_the_one_used_longest_ago_makes_room(
    model: fd.Denoiser, monkeypatch: pytest.MonkeyPatch
) -> None:
    written: list[int] = []
    write = buffers.write_rows
    monkeypatch.setattr("fastdiff.engine.table.write_rows", lambda *a: (written.append(len(a[2])), write(*a)))
    same = {"cond": {"label": torch.tensor([2.0])}}
    stream = fd.stream(model, SHAPE, slots=1, table_rows=20)
    for steps in (5, 9, 5, 5, 11, 5, 9):  # 6 + 10 rows fit beside each other; 12 take the place of 10, and back
        solo = fd.sample(model, (1, *SHAPE), "ddim", steps, seed=steps, **same)[0]
        assert torch.equal(stream.submit("ddim", steps=steps, seed=steps, **same).result(), solo)
    assert written == [6, 10, 12, 10]
    # equal plans made anew are one
    stream.submit(fd.plan("ddim", model.schedule, 9), **same).result()
    assert len(written) == 4


def test_places_of_a_table() -> None:
    def packed(rows: int) -> Any:
        return fd.plan("ddim", "edm", rows - 1).pack("x0")

    table = PlanTable(*buffers.empty_table(10, 1, torch.device("cpu")))
    assert table.take("a", packed(4)) == 0 and table.take("b", packed(4)) == 4
    assert table.take("c", packed(3)) is None, "both are in use"
    table.release("a")
    assert table.take("c", packed(3)) == 0 and table.plans == ("b", "c")
    assert table.take("b", packed(4)) == 4
    table.release("b")
    assert table.take("d", packed(6)) is None, "b has a user still"
    table.release("b")
    assert table.take("d", packed(6)) == 3
    expected = packed(6)
    assert torch.equal(table.coef[3:9, :44], torch.from_numpy(expected.coef[:, :44]))


def test_sizes_of_captured_batches() -> None:
    sizes = [seats.batch_size(n, 24) for n in range(25)]
    assert sorted(set(sizes)) == [0, 1, 2, 3, 4, 6, 8, 12, 16, 24]
    assert all(n <= size and 3 * (size - n) <= size for n, size in enumerate(sizes))


def test_the_page_about_streams_runs_as_it_stands(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = (root / "docs" / "streaming.md").read_text()
    blocks = re.findall(r"^```python\n(.*?)^```", page, re.M | re.S)
    assert len(blocks) == 4
    names: dict[str, Any] = {}
    for block in blocks:
        exec(compile(block, "docs/streaming.md", "exec"), names)
    printed = capsys.readouterr().out
    # 6 + 4 evaluations, and 5 of both branches
    assert "20 evaluations" in printed and "heun 5 waited" in printed
    assert len(names["frames"]) == 12 and len(names["longer"]) == 9
