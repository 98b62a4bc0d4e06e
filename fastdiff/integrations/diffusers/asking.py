"""What a pipeline asks of its network in one step, remembered, and asked again on the loop's own buffers.

May import: torch, engine, and the other files of this folder.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastdiff.engine import conditions
from fastdiff.integrations.diffusers.desk import Desk
from fastdiff.integrations.diffusers.pipelines import Kind

Evaluate = Callable[[Tensor], "tuple[Tensor, Tensor | None]"]
Record = Callable[[Callable[[], None]], Callable[[], None]]
WARM_UP, KEPT_GRAPHS = 3, 4


class Asked(NamedTuple):
    """One call of the network: how state and time were given, the time, and all else by name."""

    state: str | None  # the keyword of the state; None: by position
    by_position: bool  # the time
    time: Tensor
    cond: dict[str, Any]

    @staticmethod
    def of(args: tuple[Any, ...], kw: dict[str, Any]) -> Asked:
        """A call without its state; TypeError where it is none that is known."""
        cond = dict(kw)
        name = None if args else next((name for name in ("hidden_states", "sample") if name in cond), None)
        state = args[0] if args else None if name is None else cond.pop(name)
        time = args[1] if len(args) > 1 else cond.pop("timestep", None)
        if not isinstance(state, Tensor) or not isinstance(time, Tensor) or len(args) > 2:
            raise TypeError(
                f"accelerate: the pipeline calls its network with {len(args)} positional arguments and "
                f"{', '.join(kw) or 'no others'}; expected a state and a timestep. restore(pipe) runs it as it was"
            )
        return Asked(name, len(args) > 1, time, cond)

    def call(self, network: Any, x: Tensor, cond: dict[str, Any]) -> Callable[[Tensor], Any]:
        """The same call of this state with these conditions, of a time."""
        if self.state is None:
            ask = functools.partial(network, x, **cond)
        else:
            ask = functools.partial(network, **{self.state: x}, **cond)
        return ask if self.by_position else lambda time: ask(timestep=time)


class Asking:
    """The calls of one step, on a desk.

    guided: whether the step combines two branches; rescaled: and rescales what it gets. swapped: the outputs are a
    stack with the unguided branch first, which is guidance of that branch by the other: Fu + w (Fc - Fu) is
    Fc + (1 - w) (Fu - Fc).
    """

    def __init__(
        self, kind: Kind, network: Any, asked: Sequence[Asked], guided: bool, rescaled: bool, desk: Desk
    ) -> None:
        self.kind, self.network, self.asked, self.desk = kind, network, tuple(asked), desk
        self.guided, self.rescaled = guided, rescaled
        self.form = len(asked), guided, rescaled
        self.swapped = guided and not rescaled and kind.branches == "uncond first"
        batch = desk.batch
        stacked = 2 * batch if guided and len(asked) == 1 else batch
        self._inputs = [desk.model_in[i * batch : i * batch + stacked] for i in range(len(asked))]
        self.time_shape = torch.Size([stacked]) if asked[0].time.dim() else torch.Size()

    def signature(self) -> tuple[Any, ...]:
        """What a recorded step depends on: the calls' form and conditions, the branches, where the weights live."""
        forms = tuple((one.state, one.by_position, one.time.dim(), one.time.dtype) for one in self.asked)
        modules = [self.network] if isinstance(self.network, nn.Module) else []
        weights = tuple(weight.data_ptr() for net in modules for weight in (*net.parameters(), *net.buffers()))
        return forms, conditions.signature(self.conditions), self.form, id(self.network), weights

    @property
    def conditions(self) -> list[dict[str, Any]]:
        """Of every call."""
        return [one.cond for one in self.asked]

    def on(self, own: Sequence[dict[str, Any]] | None = None) -> Evaluate:
        """`evaluate(time)`: the raw outputs, one or a stack of two, and the unguided one where it is apart.

        own: conditions like the calls', instead of them.
        """
        conds = self.conditions if own is None else own
        calls = [one.call(self.network, x, cond) for one, x, cond in zip(self.asked, self._inputs, conds, strict=True)]
        first, last, output = calls[0], calls[-1], self._output

        def evaluate(time: Tensor) -> tuple[Tensor, Tensor | None]:
            return output(first(time)), None

        def apart(time: Tensor) -> tuple[Tensor, Tensor | None]:
            return output(first(time)), output(last(time))

        def split(time: Tensor) -> tuple[Tensor, Tensor | None]:
            unguided, conditional = output(first(time)).chunk(2)
            return conditional, unguided

        return apart if len(calls) > 1 else split if self.rescaled else evaluate

    def _output(self, returned: Any) -> Tensor:
        output = returned[0] if isinstance(returned, tuple) else returned.sample
        if self.kind.variance and output.shape[1] != self.desk.model_in.shape[1]:
            output = output[:, : self.desk.model_in.shape[1]]
        return output.contiguous()


class RecordedStep:
    """One evaluation and its row, recorded; each run's conditions are copied into its own."""

    def __init__(self, asking: Asking, record: Record) -> None:
        desk, first = asking.desk, asking.asked[0].time
        self._own = conditions.clone(asking.conditions)
        evaluate = asking.on(self._own)
        count = asking.time_shape.numel()

        def work() -> None:
            time = desk.model_time[:count].view(asking.time_shape).to(first.dtype)
            desk.advance(*evaluate(time), asking.form)

        t = desk.tensors
        changed = [
            live for live in (t.row, t.status, t.state, t.mix, desk.model_in, desk.model_time) if live is not None
        ]
        saved = [live.clone() for live in changed]
        try:
            with torch.inference_mode(False), torch.no_grad():
                self.replay = record(work)
        finally:
            for live, before in zip(changed, saved, strict=True):
                live.copy_(before)

    def load(self, asking: Asking) -> None:
        """This run's conditions."""
        conditions.load(self._own, asking.conditions)


def record_cuda(work: Callable[[], None]) -> Callable[[], None]:
    """A CUDA graph of `work`, warmed up on a side stream as torch asks for."""
    graph, side = torch.cuda.CUDAGraph(), torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(WARM_UP):
            work()
    torch.cuda.current_stream().wait_stream(side)
    with torch.cuda.graph(graph, stream=side):
        work()
    return graph.replay


def recorded(asking: Asking, record: Record) -> RecordedStep:
    """The desk's recorded step for calls like these, with their conditions; recorded where there is none yet."""
    steps = asking.desk.recorded
    key = asking.signature()
    if key not in steps:
        steps[key] = RecordedStep(asking, record)
        while len(steps) > KEPT_GRAPHS:
            del steps[next(iter(steps))]
    steps[key].load(asking)
    return steps[key]
