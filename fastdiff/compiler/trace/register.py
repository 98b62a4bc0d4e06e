"""What a traced function works on: registers that look like tensors, and the model that ends a row.

May import: torch, run, lin, process, and what captures know of torch's functions.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from fastdiff.compiler.capture.intercept import writes
from fastdiff.compiler.lin import Lin
from fastdiff.compiler.run import Run
from fastdiff.process.schedules import Level, Schedule

SHAPE = (1, 4, 8, 8)  # what the function believes the state looks like; no element of it exists


class Register(Tensor):
    """A tensor without elements: its shape is `SHAPE`, its value a `Lin`. Weighted sums work, the rest is refused."""

    lin: Lin
    tracer: Tracer

    @staticmethod
    def __new__(cls, lin: Lin, tracer: Tracer) -> Register:
        self = Tensor._make_wrapper_subclass(cls, SHAPE, dtype=torch.float64)
        self.lin, self.tracer = lin, tracer
        return self

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        name, operation, in_place = _known(func)
        options = dict(kwargs or {})
        if name in _METADATA:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **options)
        if name in _ALIASES:
            return args[0]
        if name == "expand_as" and not isinstance(args[0], Register):
            return args[0].expand(SHAPE)
        tracer = _tracer_in((*args, *options.values()))
        if name.startswith("new_") or name in ("ones_like", "full_like"):
            like = torch.empty(SHAPE, dtype=torch.float64)
            return getattr(like, name)(*args[1:], **options) if name[0] == "n" else func(like, *args[1:], **options)
        out = options.pop("out", None)
        target = args[0] if in_place else out
        try:
            if operation is None:
                raise tracer.refuse(f"uses torch.{name} on a register")
            if target is not None and not isinstance(target, Register):
                raise tracer.refuse("writes a register into a tensor that holds numbers")
            lin = operation(tracer, *args, **options)
        except TypeError as error:
            raise Refused(error) from None
        if target is None:
            return tracer.register(lin)
        target.lin = lin
        return target

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        raise TypeError(f"{func} reads the elements of a register, which has none")

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"Register({self.lin!r})"


class Refused(Exception):
    """Carries a TypeError past torch's operators, which swallow it to try the other operand."""

    def __init__(self, error: TypeError) -> None:
        super().__init__(str(error))
        self.error = error


class Tracer:
    """What the function talks to: the model, and the registers that are alive."""

    def __init__(self, run: Run, schedule: Schedule | None) -> None:
        self.run = run
        self.schedule = schedule
        self.sampled = 0  # draws by `noise`
        self._alive: list[weakref.ref[Register]] = []

    def register(self, lin: Lin) -> Register:
        """A new register with this value."""
        register = Register(lin, self)
        self._alive.append(weakref.ref(register))
        return register

    def noise(self, *sigmas: Any, **_: Any) -> Register:
        """The next draw; with its two sigmas, as k-diffusion's noise_sampler(sigma, sigma_next) is called."""
        self.sampled += 1
        if len(sigmas) != 2 or any(isinstance(sigma, Register) for sigma in sigmas):
            return self.register(self.run.noise())
        low, high = sorted(self.number(sigma, "draws noise at") for sigma in sigmas)
        return self.register(self.run.noise(Level(1.0, high), Level(1.0, low)))

    def evaluate(self, x: Register, sigma: Any, *_: Any, **__: Any) -> Register:
        """The model as the function sees it: D(x; sigma), the end of a row."""
        if not isinstance(x, Register):
            raise self.refuse(f"calls the model on {type(x).__name__} instead of a state")
        level = level_of(self.number(sigma, "calls the model at"), self.schedule)
        alive = [register for ref in self._alive if (register := ref()) is not None]
        self._alive = [weakref.ref(register) for register in alive]
        self.run.carry(x.lin, [register.lin for register in alive])
        return self.register(self.run.denoise(x.lin, level))

    def number(self, value: Any, what: str = "multiplies a register by") -> float:
        """A scalar, or a tensor of equal numbers, as a float."""
        if isinstance(value, Tensor) and value.numel() != 1:
            values = value.detach().reshape(-1)
            if not values.numel() or not bool((values == values[0]).all()):
                raise self.refuse(f"{what} a tensor of shape {tuple(value.shape)} whose elements differ")
            return float(values[0])
        return float(value)

    def refuse(self, what: str) -> TypeError:
        """The TypeError for `what`, with the function and the row."""
        return self.run.start.refuse(what)


class Draws(TorchFunctionMode):
    """Turns the normals a function draws by shape alone (torch.randn(x.shape)) into noise ids."""

    def __init__(self, tracer: Tracer) -> None:
        super().__init__()
        self.tracer = tracer

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is torch.randn or func is torch.rand:
            size = kwargs.get("size", args[0] if len(args) == 1 else args)
            if isinstance(size, Sequence) and tuple(size) == SHAPE:
                if func is torch.rand:
                    raise self.tracer.refuse("draws torch.rand, and a row draws unit normals only,")
                return self.tracer.register(self.tracer.run.noise())
        return func(*args, **kwargs)


def level_of(sigma: float, schedule: Schedule | None) -> Level:
    """alpha = 1 and this sigma: the coordinates of k-diffusion functions. Its time: the schedule's, or sigma itself."""
    if schedule is None or sigma == 0.0:
        return Level(1.0, sigma, sigma)
    return Level(1.0, sigma, float(schedule.time_from_rho(sigma, clip=True)))


def _term(tracer: Tracer, value: Any) -> Lin | float:
    """What may be added to a register: a register, or zeros."""
    return value.lin if isinstance(value, Register) else tracer.number(value, "adds to a register")


def _factor(tracer: Tracer, value: Any) -> Any:
    """What a register may be multiplied by; a register is left for `Lin` to refuse."""
    return value.lin if isinstance(value, Register) else tracer.number(value)


def _add(tracer: Tracer, a: Any, b: Any, *, alpha: float = 1) -> Lin:
    return _term(tracer, a) + _scaled(tracer, b, alpha)


def _sub(tracer: Tracer, a: Any, b: Any, *, alpha: float = 1) -> Lin:
    return _term(tracer, a) - _scaled(tracer, b, alpha)


def _scaled(tracer: Tracer, value: Any, factor: Any) -> Any:
    term = _term(tracer, value)
    return term if isinstance(factor, int) and factor == 1 else term * tracer.number(factor)


def _mul(tracer: Tracer, a: Any, b: Any) -> Lin:
    return _factor(tracer, a) * _factor(tracer, b)


def _div(tracer: Tracer, a: Any, b: Any, *, rounding_mode: str | None = None) -> Lin:
    if rounding_mode is not None:
        raise tracer.refuse(f"divides with rounding_mode={rounding_mode!r}")
    return _factor(tracer, a) / _factor(tracer, b)


def _lerp(tracer: Tracer, start: Any, end: Any, weight: Any) -> Lin:
    w = _factor(tracer, weight)
    return _term(tracer, start) * (1.0 - w) + _term(tracer, end) * w


def _addcmul(tracer: Tracer, base: Any, a: Any, b: Any, *, value: float = 1) -> Lin:
    return _term(tracer, base) + _mul(tracer, a, b) * tracer.number(value)


def _addcdiv(tracer: Tracer, base: Any, a: Any, b: Any, *, value: float = 1) -> Lin:
    return _term(tracer, base) + _div(tracer, a, b) * tracer.number(value)


def _clone(tracer: Tracer, value: Any, **_: Any) -> Lin:
    return tracer.run.linear(value.lin.terms)


def _copy(tracer: Tracer, target: Any, source: Any, *_: Any) -> Lin:
    return _term(tracer, source) + tracer.run.start * 0.0


def _nothing(tracer: Tracer, *_: Any, **__: Any) -> Lin:
    return tracer.run.start * 0.0


def _draw(tracer: Tracer, *_: Any, **__: Any) -> Lin:
    return tracer.run.noise()


# Names without the underscores of operators (__radd__) and of in-place methods (add_).
_OPERATIONS: dict[str, Callable[..., Lin]] = {
    "add": _add,
    "radd": _add,
    "iadd": _add,
    "sub": _sub,
    "subtract": _sub,
    "isub": _sub,
    "rsub": lambda tracer, a, b, **options: _sub(tracer, b, a, **options),
    "mul": _mul,
    "multiply": _mul,
    "rmul": _mul,
    "imul": _mul,
    "div": _div,
    "divide": _div,
    "true_divide": _div,
    "truediv": _div,
    "itruediv": _div,
    "rdiv": lambda tracer, a, b: _div(tracer, b, a),
    "rtruediv": lambda tracer, a, b: _div(tracer, b, a),
    "neg": lambda tracer, a: -a.lin,
    "negative": lambda tracer, a: -a.lin,
    "lerp": _lerp,
    "addcmul": _addcmul,
    "addcdiv": _addcdiv,
    "zeros_like": _nothing,
    "zero": _nothing,
    "randn_like": _draw,
    "copy": _copy,
    "empty_like": _nothing,
    "clone": _clone,
}
# These give their argument itself, or another view of its storage: writing into one writes into the other.
_ALIASES = {
    *("detach", "contiguous", "to", "type_as", "float", "double", "cpu", "requires_grad_", "positive", "data", "type"),
}
_METADATA = {
    *("shape", "ndim", "dtype", "device", "layout", "is_cuda", "is_cpu", "is_mps", "is_meta", "is_sparse", "names"),
    *("is_quantized", "is_leaf", "grad_fn", "grad", "size", "dim", "numel", "nelement", "is_floating_point"),
    *("__len__", "element_size", "is_complex", "is_contiguous", "get_device", "_version", "is_nested", "__hash__"),
}


_READS = {"__float__", "__int__", "__bool__", "__index__", "__complex__", "__contains__", "__iter__"}


def _tracer_in(values: Iterable[Any]) -> Tracer:
    """The tracer of the first register among the values, or in a list among them."""
    for value in values:
        if isinstance(value, Register):
            return value.tracer
        if isinstance(value, list | tuple):
            for inner in value:
                if isinstance(inner, Register):
                    return inner.tracer
    raise TypeError("a torch function takes a register where none can be seen; write the update with + and *")


@functools.cache
def _known(func: Any) -> tuple[str, Callable[..., Lin] | None, bool]:
    """The function's name (of Tensor.shape: the attribute's), what it does to a `Lin`, and whether it is in place."""
    name: str = getattr(func, "__name__", str(func))
    if name in ("__get__", "__set__"):
        name = getattr(func.__self__, "__name__", name)
    operation = None if name in _READS else _OPERATIONS.get(name.strip("_"))
    return name, operation, writes(func)
