"""What a pipeline asks of its network in one step, remembered, and asked again on the loop's own buffers.

May import: torch, engine, and the other files of this folder.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from itertools import repeat
from operator import attrgetter, itemgetter
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastdiff.engine import conditions
from fastdiff.engine.graphs import WARM_UP, Recorder
from fastdiff.engine.ops import Step
from fastdiff.integrations.diffusers.desk import Desk
from fastdiff.integrations.diffusers.pipelines import Kind

Evaluate = Callable[[Tensor], "tuple[Tensor, Tensor | None]"]
KEPT_STEPS = 4  # recorded ones, on a desk
_SCALAR = torch.Size()
_FIRST, _SAMPLE = itemgetter(0), attrgetter("sample")
WEIGHTS = "_parameters", "_buffers", "_modules"  # told apart by where they live
BY_VALUE, COLLECTIONS = (bool, int, str), (OrderedDict, dict, set, list, tuple)


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
        name = None if args else "hidden_states" if "hidden_states" in cond else "sample" if "sample" in cond else None
        state = args[0] if args else None if name is None else cond.pop(name)
        time = args[1] if len(args) > 1 else cond.pop("timestep", None)
        if not isinstance(state, Tensor) or not isinstance(time, Tensor) or len(args) > 2:
            raise TypeError(
                f"accelerate: the pipeline calls its network with {len(args)} positional arguments and "
                f"{', '.join(kw) or 'no others'}; expected a state and a timestep. restore(pipe) runs it as it was"
            )
        return Asked(name, len(args) > 1, time, cond)

    def arguments(self, x: Tensor, times: Sequence[Tensor]) -> Arguments:
        """Those of the same call of this state, of each time."""
        cond = self.cond if self.state is None else {self.state: x, **self.cond}
        if self.by_position:
            return Arguments(list(zip(repeat(x), times)), cond, None)
        return Arguments([(x,) if self.state is None else ()] * len(times), dict(cond), times)

    def call(self, network: Any, x: Tensor, cond: dict[str, Any]) -> Callable[[Tensor], Any]:
        """The same call of this state with these conditions, of a time."""
        if self.state is not None:
            cond = {self.state: x, **cond}
            return lambda time: network(timestep=time, **cond)
        if self.by_position:
            return lambda time: network(x, time, **cond)
        return lambda time: network(x, timestep=time, **cond)


class Arguments(NamedTuple):
    """Of a call, in each row: by position, per row; by name; and per row the time among those, None where it is not.

    The time is written into `named`, which is the same for all rows: a call hands on a copy.
    """

    positional: Sequence[tuple[Tensor, ...]]
    named: dict[str, Any]
    times: Sequence[Tensor] | None


class Direct(NamedTuple):
    """Rows as `row(pick(network(*args, **kw)))`; apart: the arguments of a second call.

    The row raises ValueError, and has done nothing, for an output that is not like the ones before.
    """

    network: Any
    calls: Arguments
    apart: Arguments | None
    pick: Callable[[Any], Tensor]
    row: Step


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
        stacked = guided and len(asked) == 1
        self._inputs = desk.inputs(len(asked), stacked)
        self._pick: Callable[[Any], Tensor] = _FIRST  # what makes the last output of what the network returned
        self._whole: tuple[Callable[[Any], Tensor], Tensor] | None = None  # the same without a copy, and what it gave
        self.time_shape = torch.Size([2 * desk.batch if stacked else desk.batch]) if asked[0].time.dim() else _SCALAR

    def signature(self) -> tuple[Any, ...]:
        """What a recorded step depends on: the calls' form and conditions, the branches, the network as it stands."""
        forms = tuple((one.state, one.by_position, one.time.dim(), one.time.dtype) for one in self.asked)
        modules = [self.network] if isinstance(self.network, nn.Module) else []
        weights = tuple(weight.data_ptr() for net in modules for weight in (*net.parameters(), *net.buffers()))
        state = tuple(as_it_stands(module) for net in modules for module in net.modules())
        return forms, conditions.signature(self.conditions), self.form, id(self.network), weights, state

    @property
    def conditions(self) -> list[dict[str, Any]]:
        """Of every call."""
        return [one.cond for one in self.asked]

    def on(self, own: Sequence[dict[str, Any]] | None = None) -> Evaluate:
        """`evaluate(time)`: the raw outputs, one or a stack of two, and the unguided one where it is apart.

        own: conditions like the calls', instead of them.
        """
        calls = self._calls(self.conditions if own is None else own)
        first, last, output = calls[0], calls[-1], self.output

        def evaluate(time: Tensor) -> tuple[Tensor, Tensor | None]:
            return output(first(time)), None

        def apart(time: Tensor) -> tuple[Tensor, Tensor | None]:
            return output(first(time)), output(last(time))

        def split(time: Tensor) -> tuple[Tensor, Tensor | None]:
            unguided, conditional = output(first(time)).chunk(2)
            return conditional, unguided

        return apart if len(calls) > 1 else split if self.rescaled else evaluate

    def direct(self, times: Sequence[Tensor]) -> Direct | None:
        """Rows of calls like these, if the last one on this desk went to its row as the network returned it."""
        known = self.desk.direct.get(self.form)
        if known is None:
            return None
        calls = [one.arguments(x, times) for one, x in zip(self.asked, self._inputs, strict=True)]
        return Direct(self.network, calls[0], calls[1] if len(calls) > 1 else None, *known)

    def settle(self, conditional: Tensor, unguided: Tensor | None = None) -> None:
        """The row on what the calls gave, which from now on stands for what the next ones will."""
        desk, form = self.desk, self.form
        desk.advance(conditional, unguided, form)
        if self.rescaled or desk.row is None:
            return
        desk.direct[form] = self._pick, desk.row
        if self._whole is not None and unguided is None:
            pick, whole = self._whole
            row = desk.row_within(whole, conditional)
            if row is not None:
                desk.direct[form] = pick, row

    def _calls(self, conds: Sequence[dict[str, Any]]) -> list[Callable[[Tensor], Any]]:
        return [one.call(self.network, x, cond) for one, x, cond in zip(self.asked, self._inputs, conds, strict=True)]

    def output(self, returned: Any) -> Tensor:
        """The latents' channels of what a call returned, contiguous."""
        pick = _FIRST if isinstance(returned, tuple) else _SAMPLE
        output: Tensor = pick(returned)
        channels, found = self.desk.channels, output.size(1)
        if found != channels and not self.kind.variance:
            what = "a variance that it predicts" if found == 2 * channels else "what it is given beside them"
            raise ValueError(
                f"accelerate: the network gives {found} channels for latents of {channels}; {what} is not "
                "taken over here. restore(pipe) runs it as it was"
            )
        self._pick, self._whole = pick, None
        if found != channels or not output.is_contiguous() or output.is_neg():
            self._pick = lambda again: pick(again).narrow(1, 0, channels).resolve_neg().contiguous()
            self._whole = None if output.is_neg() else (pick, output)
        return self._pick(returned)


def as_it_stands(module: nn.Module) -> tuple[Any, ...]:
    """What a module's forward may depend on besides weights: class, mode, hooks, processors, numbers and switches."""
    found: list[Any] = [type(module)]
    for name, value in vars(module).items():
        kind = type(value)
        if kind in BY_VALUE:
            found.append((name, value))
        elif value is not None and name not in WEIGHTS and (kind not in COLLECTIONS or value):
            found.append((name, _told(value)))
    return tuple(found)


def moves_weights(network: Any) -> bool:
    """Whether hooks on the network or in it move or cast its weights while it runs: offloading, layerwise casting."""
    modules = network.modules() if isinstance(network, nn.Module) else [network]
    return any(
        hasattr(module, "_hf_hook") or bool(getattr(getattr(module, "_diffusers_hook", None), "hooks", None))
        for module in modules
    )


def _told(value: Any) -> Any:
    """Numbers and names by value, collections by what is in them, all else by identity, kept alive where it can be."""
    if isinstance(value, float):
        return round(value, 9)  # an adapter's scale, multiplied and divided again in each call
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, Tensor):
        return value.data_ptr(), value.shape
    if isinstance(value, Mapping):
        return tuple((str(key), _told(part)) for key, part in value.items())
    if isinstance(value, list | tuple | set | frozenset):
        return tuple(_told(part) for part in value)
    by_identity = type(value).__hash__ is object.__hash__ and type(value).__eq__ is object.__eq__
    return value if by_identity else id(value)


class RecordedStep:
    """One evaluation and its row, recorded; each run's conditions are copied into its own."""

    def __init__(self, asking: Asking, recorder: Recorder) -> None:
        desk, first = asking.desk, asking.asked[0].time
        self.network = asking.network  # which must outlive the record
        with torch.inference_mode(False), torch.no_grad():  # written in and out of inference mode
            self._own = conditions.clone(asking.conditions)
        evaluate, form, shape, dtype = asking.on(self._own), asking.form, asking.time_shape, first.dtype
        count = shape.numel()

        def work() -> None:
            time = desk.model_time[:count].view(shape).to(dtype)
            desk.advance(*evaluate(time), form)

        t = desk.tensors
        changed = [
            live for live in (t.row, t.status, t.state, t.mix, desk.model_in, desk.model_time) if live is not None
        ]
        saved = [live.clone() for live in changed]
        try:
            with torch.inference_mode(False), torch.no_grad():
                self.replay = recorder.record(work, WARM_UP)
        finally:
            for live, before in zip(changed, saved, strict=True):
                live.copy_(before)

    def load(self, asking: Asking) -> None:
        """This run's conditions."""
        with torch.inference_mode(False), torch.no_grad():
            conditions.load(self._own, asking.conditions)


def recorded(asking: Asking, recorder: Recorder) -> RecordedStep:
    """The desk's recorded step for calls like these, with their conditions; recorded where there is none yet."""
    steps = asking.desk.recorded
    key = asking.signature()
    if key not in steps:
        steps[key] = RecordedStep(asking, recorder)
        while len(steps) > KEPT_STEPS:
            del steps[next(iter(steps))]
    steps[key].load(asking)
    return steps[key]
