"""One call of an accelerated pipeline: what its own loop sees instead of its scheduler, network and guidance.

May import: torch, and the other files of this folder. Everything before and after the loop is the pipeline's own code.
In the loop the network that it sees only remembers what it was asked, and the first `step` runs every row; the
iterations that are left are skipped as an interrupt skips them. With a callback each `step` runs its one row.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator, Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from fastdiff.engine.ops import MODEL_DTYPES
from fastdiff.integrations.diffusers.asking import Asked
from fastdiff.integrations.diffusers.desk import Needs
from fastdiff.integrations.diffusers.loop import Loop
from fastdiff.integrations.diffusers.pipelines import Arguments, Kind
from fastdiff.integrations.diffusers.program import Start
from fastdiff.integrations.diffusers.solving import Solving

CALLBACKS = ("callback_on_step_end", "callback")


class Call:
    """The state of one call.

    solving: what stands for the scheduler, None where it stands for itself. looping: the pipeline's own loop is
    asking, and nobody else. finished: all rows have run. hoists: one step runs all rows.
    """

    def __init__(self, pipe: Any, base: type, kind: Kind, engine: Any, arguments: Arguments, solving: Solving | None):
        self.pipe, self.base, self.kind, self.engine = pipe, base, kind, engine
        self.solving = solving
        self._scheduler = vars(pipe)["scheduler"]
        self._arguments = arguments
        self.thread = threading.get_ident()
        self.hoists = all(arguments[name] is None for name in CALLBACKS)
        self._watch(arguments)
        self.looping = self.finished = False
        self.stand_ins = {"scheduler": Steps(self), kind.network: Network(self)}
        self._asked: list[Asked] = []
        self._loop: Loop | None = None
        self.bar: Any = None
        self.iterations = 0

    def close(self) -> None:
        """Let go of everything: what refers to a call goes with it, not when the garbage is collected."""
        vars(self).clear()

    def component(self, name: str) -> Any:
        """The scheduler or the network, as the pipeline is to see it outside its loop."""
        if name == "scheduler" and self.solving is not None:
            return self.solving
        return self.own(name)

    def own(self, name: str) -> Any:
        """The pipeline's own component."""
        return vars(self.pipe)[name]

    def _watch(self, arguments: Arguments) -> None:
        """Callbacks see the pipeline as it is, not the stand-ins."""
        for name in CALLBACKS:
            function = arguments[name]
            if function is None:
                continue
            if hasattr(function, "tensor_inputs"):
                arguments[f"{name}_tensor_inputs"] = function.tensor_inputs
            if name in arguments.more:
                arguments.more[name] = self._aside(function)
            else:
                arguments[name] = self._aside(function)

    def _aside(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def called(*args: Any, **kw: Any) -> Any:
            self.looping = False
            try:
                return function(*args, **kw)
            finally:
                self.looping = True

        return called

    def progress_bar(self, iterable: Any, total: int | None) -> Any:
        """The bar that the pipeline's loop begins with: from here to its end the stand-ins are there."""
        if iterable is None:
            self.iterations = self.pipe.num_timesteps
            return Bar(self, self.base.progress_bar(self.pipe, total=total))  # type: ignore[attr-defined]
        self.iterations = len(iterable)
        return self._over(iterable, self.base.progress_bar(self.pipe, total=len(iterable)))  # type: ignore[attr-defined]

    def _over(self, iterable: Any, bar: Any) -> Iterator[Any]:
        with Bar(self, bar):
            if self.iterations:
                yield iterable[0]

    def ask(self, args: tuple[Any, ...], kw: dict[str, Any]) -> Any:
        """Remember what the network is asked; the answer has no numbers, in the form the pipeline asks for."""
        self._asked.append(Asked.of(args, kw))
        return ANSWER if kw.get("return_dict", True) else (NOTHING,)

    def step(self, timestep: Tensor, sample: Tensor, generator: Any, options: dict[str, Any]) -> Tensor:
        """Run the rows that this step stands for; the state after them."""
        if self.own("scheduler") is not self._scheduler:
            raise RuntimeError(
                f"{self.base.__name__}: its scheduler was replaced while it runs, and the rows are the first one's; "
                "replace it between two calls, or restore(pipe)"
            )
        asked, self._asked = self._asked, []
        self.looping = False
        try:
            scale, rescale = self._guidance(asked)
            guided = scale is not None
            halved = guided and self.kind.doubled
            latents = sample[: sample.shape[0] // 2] if halved else sample
            loop = self._loop
            if loop is None:
                start = self._start(timestep, latents, options)
                desk = self.engine.desk(self._needs(latents, guided), start.program)
                loop = self._loop = Loop(self, desk, start, sample.shape, generator)
                loop.open(latents)
            elif loop.changed(sample):
                loop.put(latents)
            loop.ask(asked, scale, rescale)
            loop.run(len(loop.rows) if self.hoists else 1)
            self.finished = self.hoists
            state = loop.state(halved)
        finally:
            self.looping = True
        return state

    def _guidance(self, asked: Sequence[Asked]) -> tuple[float | None, float]:
        """(guidance scale, None where this step has a single branch; phi of its rescaling)."""
        kind, pipe = self.kind, self.pipe
        if kind.branches is None:
            return None, 0.0
        if kind.branches == "apart":
            return (float(self._arguments[kind.scale]), 0.0) if len(asked) == 2 else (None, 0.0)
        if kind.scale:
            scale = float(self._arguments[kind.scale])
            return (scale, 0.0) if scale > 1 else (None, 0.0)
        if not pipe.do_classifier_free_guidance:
            return None, 0.0
        return float(pipe.guidance_scale), float(getattr(pipe, "guidance_rescale", 0.0))

    def _needs(self, latents: Tensor, guided: bool) -> Needs:
        if latents.dtype not in MODEL_DTYPES:
            raise TypeError(
                f"{self.base.__name__}: its latents are {latents.dtype}, and accelerate computes in float32 for "
                "float32, float16 and bfloat16; cast the pipeline, or restore(pipe)"
            )
        two = guided or (not self.hoists and self.kind.branches is not None)
        return Needs(latents.shape, latents.dtype, latents.device, 2 if two else 1)

    def _start(self, timestep: Tensor, latents: Tensor, options: dict[str, Any]) -> Start:
        if self.solving is None:
            start: Start = self.engine.start(self.pipe, timestep, options, latents)
            if len(start.program) - start.first < self.iterations:
                raise ValueError(
                    f"accelerate: the pipeline makes {self.iterations} steps and {type(self._scheduler).__name__} has "
                    f"{len(start.program) - start.first} from where it stands"
                )
            return start
        program = self.solving.program(self.kind, latents.dtype)
        if not self.hoists and len(program) != self.iterations:
            raise ValueError(
                f"accelerate: {self.solving.solver} evaluates the network {len(program)} times in {self.iterations} "
                "steps, so a callback after every step has no state to see; leave the callback out, or use a solver "
                "with one evaluation a step, such as dpmpp_2m"
            )
        return Start(program, 0, 0)


class Steps:
    """The scheduler that the pipeline's loop sees."""

    def __init__(self, call: Call) -> None:
        self._call = call

    def __getattr__(self, name: str) -> Any:
        return getattr(self._call.component("scheduler"), name)

    @property
    def order(self) -> Any:
        """What most loops read, for which `__getattr__` is the long way."""
        return self._call.component("scheduler").order

    def scale_model_input(self, sample: Tensor, timestep: Any = None) -> Tensor:
        """The sample: the row before has scaled what the network is given."""
        return sample

    def step(self, model_output: Nothing, timestep: Tensor, sample: Tensor, **options: Any) -> Any:
        """The state after this step, in the form of a scheduler's output."""
        whole = options.pop("return_dict", True)
        state = self._call.step(timestep, sample, options.pop("generator", None), options)
        return SimpleNamespace(prev_sample=state) if whole else (state,)


class Network:
    """The network that the pipeline's loop sees."""

    def __init__(self, call: Call) -> None:
        self._call = call

    def __getattr__(self, name: str) -> Any:
        return getattr(self._call.own(self._call.kind.network), name)

    def cache_context(self, name: str, **options: Any) -> contextlib.nullcontext[None]:
        """Nothing: caches are refused, nothing is computed in here, and theirs goes through every module to say so."""
        return contextlib.nullcontext()

    def __call__(self, *args: Any, **kw: Any) -> Any:
        """Only remembered."""
        return self._call.ask(args, kw)


class Nothing:
    """An output without numbers: whatever a pipeline's guidance makes of it is it."""

    def _same(self, *_: Any) -> Nothing:
        return self

    __add__ = __radd__ = __sub__ = __rsub__ = __mul__ = __rmul__ = __getitem__ = _same

    def __len__(self) -> int:
        return 2

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Two of it where a tensor is split, else it."""
        return (NOTHING, NOTHING) if func in (torch.split, torch.chunk) else NOTHING


NOTHING = Nothing()
ANSWER = SimpleNamespace(sample=NOTHING)


class Bar:
    """A progress bar: the loop runs between its ends. Where one step runs all rows, they move it."""

    def __init__(self, call: Call, bar: Any) -> None:
        self._call, self._bar = call, bar

    def __enter__(self) -> Bar:
        self._call.bar = self._bar.__enter__()
        self._call.looping = True
        return self

    def __exit__(self, *error: Any) -> None:
        self._call.looping = False
        self._bar.__exit__(*error)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._bar, name)

    def update(self, n: int = 1) -> None:
        """Another iteration of the pipeline's."""
        if not self._call.hoists:
            self._bar.update(n)
