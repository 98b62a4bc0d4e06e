"""Continuous batching: a request in a running batch gives the sample it gives alone."""

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
from stream_cases import SHAPE, alone, asks, labelled, labelled_model, submit  # noqa: F401
from torch import Tensor

import fastdiff as fd
from fastdiff.engine import buffers, seats
from fastdiff.engine.table import PlanTable

BACKENDS = [name for name in ("reference", "cpp") if fd.backends()[name].ok]


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
