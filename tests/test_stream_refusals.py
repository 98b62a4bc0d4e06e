"""What a stream refuses, and requests that are cancelled or fail: the others go on as if nothing were."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from stream_cases import SHAPE, alone, asks, labelled, labelled_model, submit  # noqa: F401
from torch import Tensor

import fastdiff as fd
from fastdiff.engine import crowd, seats
from fastdiff.errors import QueueFull, RequestCancelled


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
