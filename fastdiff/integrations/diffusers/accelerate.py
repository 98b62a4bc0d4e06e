"""`accelerate(pipe)`: the pipeline as it is, its denoising loop run by fastdiff; `restore(pipe)` undoes it.

May import: torch, engine, models, and the other files of this folder. The object stays the user's own: only its class
becomes a subclass that looks after `__call__`, the progress bar its loop begins with, and what that loop reads.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import threading
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor

from fastdiff.engine import graphs, memory
from fastdiff.errors import warn
from fastdiff.integrations.diffusers.asking import Asking, moves_weights, recorded
from fastdiff.integrations.diffusers.call import Call
from fastdiff.integrations.diffusers.desk import Desk, Needs
from fastdiff.integrations.diffusers.pipelines import Arguments, check, kind_of
from fastdiff.integrations.diffusers.program import Program, Seen, Start, Starts
from fastdiff.integrations.diffusers.solving import Solving, check_call, check_solver
from fastdiff.models.denoiser import Denoiser

Pipeline = TypeVar("Pipeline")
ENGINE = "_fastdiff_engine"  # the attribute of an accelerated pipeline that holds its engine
KEPT_DESKS = 2
TRIED_STEPS = 3, 12  # of the trials that tell a scheduler that is no table; some need more than a few


def accelerate(
    pipe: Pipeline, solver: str | None = None, steps: int | None = None, graph: bool | str = "auto"
) -> Pipeline:
    """Run the denoising loop of a diffusers pipeline as fused rows; everything else of its call stays as it is.

    pipe: one of `KINDS` in pipelines.py; changed itself, and returned. solver: None runs the pipeline's own scheduler,
    with its draws and its pictures up to rounding; a name of `fd.solvers.names()` runs that instead, on levels spaced
    as the scheduler's config says. steps: num_inference_steps of calls that do not give it. graph: "auto" records the
    step as a CUDA graph where the network is on a GPU, True insists, False never. Accelerating again changes these.
    Raises TypeError or ValueError, and leaves the pipeline as it is, for a pipeline, scheduler or solver that cannot be
    taken over. A call is refused with ValueError for an argument that is not taken over, before anything is drawn.
    """
    engine = _engine(pipe)
    base: type = type(pipe) if engine is None else engine.base
    if engine is None and not hasattr(pipe, "scheduler"):
        how = ", which is sampled with fd.sample(model, shape) or fd.Sampler(plan, model)"
        raise TypeError(
            f"accelerate: {base.__name__} is not a pipeline; it takes a diffusers pipeline as from_pretrained makes "
            f"one, not a {'Denoiser' + how if isinstance(pipe, Denoiser) else 'part of it or a network'}"
        )
    kind_of(base)  # TypeError where it is not known
    if solver is not None:
        check_solver(solver)
    if steps is not None and (isinstance(steps, bool) or not isinstance(steps, int) or steps < 1):
        raise ValueError(f"accelerate: steps must be a number of steps, 1 or more, or None, got {steps!r}")
    if graph not in (True, False, "auto"):
        raise ValueError(f"accelerate: graph must be 'auto', True or False, got {graph!r}")
    engine = Engine(base, solver, steps, graph)
    engine.check(pipe)
    restore(pipe)
    vars(pipe)[ENGINE] = engine
    pipe.__class__ = _accelerated(base)
    return pipe


def restore(pipe: Pipeline) -> Pipeline:
    """Undo `accelerate`: the pipeline is of its own class again, and nothing else is left. Others are left alone."""
    engine = _engine(pipe)
    if engine is not None:
        if engine.current is not None:
            raise RuntimeError("restore: the pipeline is running; restore it after its call")
        pipe.__class__ = engine.base
        del vars(pipe)[ENGINE]
    return pipe


class Engine:
    """What an accelerated pipeline keeps between calls: settings, and buffers that fit the last ones.

    base: the pipeline's own class. current: the call that is running. recorder: what records a step on a device, None
    where nothing does.
    """

    def __init__(self, base: type, solver: str | None, steps: int | None, graph: bool | str) -> None:
        self.kind, self.base, self.solver, self.steps, self.graph = kind_of(base), base, solver, steps, graph
        self.current: Call | None = None
        self._running = threading.Lock()
        self._starts = Starts(self.kind)
        self._desks: list[Desk] = []
        self._solving: tuple[Solving, Seen] | None = None  # of a scheduler that stood so
        self._timed = False

    def __reduce__(self) -> tuple[Any, ...]:
        return Engine, (self.base, self.solver, self.steps, self.graph)

    def check(self, pipe: Any) -> None:
        """Raise what a call would, as far as the pipeline's components and the settings alone decide it."""
        tried = TRIED_STEPS if self.steps is None else (self.steps,)
        for steps in tried[:-1]:
            with contextlib.suppress(Exception):
                self._try(vars(pipe)["scheduler"], steps)
                return
        self._try(vars(pipe)["scheduler"], tried[-1])

    def _try(self, scheduler: Any, steps: int) -> None:
        shift = {"mu": 1.0} if scheduler.config.get("use_dynamic_shifting") else {}
        if self.solver is not None:
            trial = Solving(scheduler, self.solver)
            trial.set_timesteps(steps, **shift)
            trial.program(self.kind, torch.float32)
            return
        plain = copy.deepcopy(scheduler)
        plain.set_timesteps(steps, **shift)
        Starts(self.kind).of(plain, plain.timesteps[0], {}, (torch.float32, torch.float32))

    def call(self, pipe: Any, args: tuple[Any, ...], kw: dict[str, Any]) -> Any:
        """One call of the pipeline."""
        name = self.base.__name__
        if not self._running.acquire(blocking=False):
            raise RuntimeError(
                f"{name}: this pipeline is running already, in another thread or around this call, and has one "
                "scheduler and one set of buffers; give each thread one of its own (copy.deepcopy(pipe))"
            )
        try:
            self.forget(vars(pipe).get(self.kind.network))
            arguments = Arguments(self.base, pipe, args, kw)
            check(self.kind, name, arguments, vars(pipe).get(self.kind.network))
            solving = None
            if self.solver is not None:
                check_call(self.solver, name, arguments)
                solving = self._solver_for(vars(pipe)["scheduler"])
            spaced = any(arguments.given.get(key) is not None for key in ("num_inference_steps", "timesteps", "sigmas"))
            if self.steps is not None and not spaced:
                arguments["num_inference_steps"] = self.steps
            self.current = Call(pipe, self.base, self.kind, self, arguments, solving)
            positional, named = arguments.call
            return self.base.__call__(pipe, *positional, **named)
        finally:
            if self.current is not None:
                self.current.close()
            self.current = None
            self._running.release()

    def forget(self, network: Any) -> None:
        """Let the records of every other network go, and with them the network."""
        for desk in self._desks:
            for key in [key for key, step in desk.recorded.items() if step.network is not network]:
                del desk.recorded[key]

    def _solver_for(self, scheduler: Any) -> Solving:
        solving, seen = self._solving or (None, None)
        if solving is None or seen is None or solving.original is not scheduler or not seen.stands(vars(scheduler)):
            assert self.solver is not None
            solving = Solving(scheduler, self.solver)
            self._solving = solving, Seen(scheduler)
        return solving

    def start(self, pipe: Any, timestep: Tensor, options: dict[str, Any], latents: Tensor) -> Start:
        """Where in the pipeline's own scheduler a loop begins."""
        device, dtype = "cpu" if latents.is_cpu else latents.device.type, latents.dtype
        output = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else dtype
        return self._starts.of(vars(pipe)["scheduler"], timestep, options, (output, dtype))

    def desk(self, needs: Needs, program: Program) -> Desk:
        """Buffers for this program: the last ones that fit, or new ones."""
        for found in self._desks:
            if found.fits(needs, program):
                break
        else:
            found = Desk(needs, program)
        if not self._desks or self._desks[0] is not found:
            self._desks = [found, *(desk for desk in self._desks if desk is not found)][:KEPT_DESKS]
        return found

    def replay(self, asking: Asking) -> Callable[[], None] | None:
        """What replays the recorded step for this run's conditions; None where it is run as it is."""
        recorder = self._recorder(asking)
        if recorder is None:
            return None
        try:
            with _current(asking.desk.needs.device):
                return recorded(asking, recorder).replay
        except RuntimeError as error:
            if self.graph is True or memory.ran_out(error):
                raise
            self.graph = False
            warn(f"{self.base.__name__}: {graphs.cannot_capture(error)}")
            return None

    def _recorder(self, asking: Asking) -> graphs.Recorder | None:
        desk = asking.desk
        recorder = None if self.graph is False else desk.recorder
        hooked = recorder is not None and moves_weights(asking.network)
        if self.graph is True and (recorder is None or hooked):
            runs = f"runs on {desk.needs.device} with executor {desk.executor!r}"
            raise ValueError(
                "accelerate: graph=True needs a network whose weights stay on a CUDA device and executor 'triton' or "
                f"'cuda'; this one {'has hooks that move or cast its weights' if hooked else runs}. Use graph='auto'"
            )
        return None if hooked else recorder

    def check_time(self, shown: Tensor, expected: Tensor) -> None:
        """Once: what the pipeline shows its network is what the rows will show it."""
        if self._timed:
            return
        if float(shown.reshape(-1)[0]) != float(expected.reshape(-1)[0]):
            raise RuntimeError(
                f"accelerate: {self.base.__name__} shows its network the time {float(shown.reshape(-1)[0])} where "
                f"{float(expected.reshape(-1)[0])} was expected: this version of diffusers drives its loop in a way "
                "that is not known; restore(pipe)"
            )
        self._timed = True


def _engine(pipe: Any) -> Engine | None:
    return getattr(pipe, "__dict__", {}).get(ENGINE)


def _call(pipe: Any) -> Call | None:
    """The call that is running, if it is this thread's."""
    current: Call | None = vars(pipe)[ENGINE].current
    return current if current is not None and current.thread == threading.get_ident() else None


def _current(device: torch.device) -> Any:
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


@functools.cache
def _accelerated(base: Any) -> type:
    """The subclass of a pipeline class whose calls go through the engine; it has its original's name."""

    @functools.wraps(base.__call__)
    def __call__(self: Any, *args: Any, **kw: Any) -> Any:
        return vars(self)[ENGINE].call(self, args, kw)

    @functools.wraps(base.progress_bar)
    def progress_bar(self: Any, iterable: Any = None, total: int | None = None) -> Any:
        call = _call(self)
        return base.progress_bar(self, iterable, total) if call is None else call.progress_bar(iterable, total)

    members: dict[str, Any] = {"__call__": __call__, "progress_bar": progress_bar, "__reduce_ex__": _reduce}
    members |= {name: _component(name) for name in ("scheduler", kind_of(base).network)}
    if hasattr(base, "interrupt"):

        def interrupt(self: Any) -> bool:
            call = self.__dict__[ENGINE].current
            return (call is not None and call.finished) or base.interrupt.fget(self)

        members["interrupt"] = property(interrupt)
    if hasattr(base, "do_classifier_free_guidance"):

        def do_classifier_free_guidance(self: Any) -> bool:
            call = _call(self)
            return not (call is not None and call.looping) and base.do_classifier_free_guidance.fget(self)

        members["do_classifier_free_guidance"] = property(do_classifier_free_guidance)
    for name in ("__module__", "__doc__", "__qualname__"):
        members[name] = getattr(base, name)
    return type(base.__name__, (base,), members)


def _component(name: str) -> property:
    def read(self: Any) -> Any:
        own = self.__dict__
        if name not in own:  # what the base class makes of it: its config still knows the name
            raise AttributeError(name)
        call = own[ENGINE].current
        if call is None or call.thread != threading.get_ident():
            return own[name]
        return call.stand_ins[name] if call.looping else call.component(name)

    def write(self: Any, value: Any) -> None:
        vars(self)[name] = value

    def delete(self: Any) -> None:
        if vars(self).pop(name, self) is self:
            raise AttributeError(name)

    return property(read, write, delete)


def _blank(base: type) -> Any:
    return object.__new__(_accelerated(base))


def _reduce(self: Any, protocol: Any) -> Any:
    # the class has its original's name, under which pickle would find the original
    return _blank, (vars(self)[ENGINE].base,), vars(self)
