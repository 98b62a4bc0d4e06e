"""`fast(SchedulerClass)`: the user's own scheduler class, with a step that is one fused row.

May import: torch, and the other files of this folder.
"""

from __future__ import annotations

import functools
from typing import Any, TypeVar

from torch import Tensor

from fastdiff.integrations.diffusers.run import Run
from fastdiff.integrations.diffusers.standing import OURS
from fastdiff.integrations.diffusers.table import parameters

Scheduler = TypeVar("Scheduler")


@functools.cache
def fast(kind: type[Scheduler]) -> type[Scheduler]:
    """A subclass of a scheduler class whose `step` gives the same numbers in one fused row.

    kind: a diffusers scheduler class, or one like them. Constructor, config, saving and loading, signatures and outputs
    are the original's; it has the original's name too, so what it saves loads without fastdiff.
        pipe.scheduler = fast(type(pipe.scheduler)).from_config(pipe.scheduler.config)
    `set_timesteps` compiles the steps as `fastdiff.capture` does, once per schedule in a process, and raises its
    TypeError, with the step, for a scheduler that is not a table; a step before it is the class's own. Raises TypeError
    where `kind` is not such a class, or a subclass of a fast one.
    """
    if not isinstance(kind, type):
        how = "import the class and give that" if isinstance(kind, str) else "write fast(type(scheduler))"
        raise TypeError(f"fast takes a scheduler class, got an object of {type(kind).__name__}; {how}")
    if "_fast_of" in vars(kind):
        return kind
    original: Any = kind
    if hasattr(kind, "_fast_of"):
        raise TypeError(
            f"fast: {kind.__name__} is made from a fast class, and what it changes runs beside the rows; make it a "
            f"subclass of {original._fast_of.__name__} itself, and that one fast"
        )
    for method in ("set_timesteps", "step"):
        if not callable(getattr(kind, method, None)):
            raise TypeError(
                f"fast: {kind.__name__} has no {method}(); expected a scheduler class such as diffusers' are"
            )
    names = tuple(parameters(original))

    @functools.wraps(original.__init__)
    def __init__(self: Any, *args: Any, **kw: Any) -> None:
        self.__dict__[OURS] = None  # a constructor that sets timesteps, all of training's, compiles nothing
        original.__init__(self, *args, **kw)
        del self.__dict__[OURS]

    @functools.wraps(original.set_timesteps)
    def set_timesteps(self: Any, *args: Any, **kw: Any) -> Any:
        constructing = self.__dict__.get(OURS, self) is None
        before = self.__dict__.get(OURS)
        result = original.set_timesteps(self, *args, **kw)
        if not constructing:
            self.__dict__.pop(OURS, None)
            self.__dict__[OURS] = Run(self, original, before)
        return result

    @functools.wraps(original.step)
    def step(self: Any, model_output: Any, timestep: Any, sample: Any, *args: Any, **kw: Any) -> Any:
        if args:
            kw = _named(original, names, args, kw)
        run = self.__dict__.get(OURS)
        if run is None:
            return original.step(self, model_output, timestep, sample, **kw)
        return run.step(self, model_output, timestep, sample, kw)

    members = {"_fast_of": original, "__init__": __init__, "__reduce_ex__": _reduce}
    members |= {"set_timesteps": set_timesteps, "step": step}
    if hasattr(original, "scale_model_input"):

        @functools.wraps(original.scale_model_input)
        def scale_model_input(self: Any, sample: Tensor, *args: Any, **kw: Any) -> Tensor:
            run = self.__dict__.get(OURS)
            timestep = args[0] if args else kw.get("timestep")
            if run is None or timestep is None or not run.scales:
                return original.scale_model_input(self, sample, *args, **kw)
            return run.scale(self, sample, timestep)

        members["scale_model_input"] = scale_model_input
    for name in ("__module__", "__doc__", "__qualname__"):
        members[name] = getattr(original, name)
    return type(original.__name__, (original,), members)


def _named(kind: type, names: tuple[str, ...], args: tuple[Any, ...], kw: dict[str, Any]) -> dict[str, Any]:
    if len(args) > len(names):
        raise TypeError(f"{kind.__name__}.step() takes at most {len(names) + 4} positional arguments")
    named = dict(zip(names, args, strict=False))
    twice = named.keys() & kw.keys()
    if twice:
        raise TypeError(f"{kind.__name__}.step() got multiple values for argument {min(twice)!r}")
    return named | kw


def _blank(kind: type) -> Any:
    made: type = fast(kind)
    return object.__new__(made)


def _reduce(self: Any, protocol: Any) -> Any:
    if "_fast_of" not in vars(type(self)):
        return object.__reduce_ex__(self, protocol)  # a subclass, to be found under its own name
    # the class has its original's name, under which pickle would find the original
    return _blank, (type(self)._fast_of,), self.__dict__
