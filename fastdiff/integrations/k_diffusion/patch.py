"""Put the functions of this package into a program's sampling module, and take them out again.

May import: functions, noise, tables. A function is replaced only if ours has its signature and, tried here and now,
gives its numbers: a program's copy of k-diffusion may have been changed, and then its own function stays.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import itertools
import sys
import threading
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from fastdiff.errors import warn
from fastdiff.integrations.k_diffusion import functions
from fastdiff.integrations.k_diffusion.noise import Host
from fastdiff.integrations.k_diffusion.tables import Refused

TOLERANCE = 1e-4  # relative; a rounding of fp32 at each of a few steps, far below any change of a sampler
ADDED = ("seed", "host")
_lock = threading.Lock()


@dataclass(frozen=True)
class Patched:
    """What `patch` did: the functions now ours, and why each other `sample_*` of the module stayed as it was."""

    module: str
    replaced: tuple[str, ...]
    left: dict[str, str] = field(default_factory=dict)


def patch(module: ModuleType | None = None) -> Patched:
    """Replace the `sample_*` functions of a module by ours where they do the same, and say which.

    module: k_diffusion.sampling if None; or a program's own copy (comfy.k_diffusion.sampling). Noise and progress bars
    stay the module's: its torch.randn_like, default_noise_sampler, BrownianTreeNoiseSampler, trange and tqdm are
    called as its own functions call them. Arguments no table covers go to the function that was there, with a
    warning. Doing it twice changes nothing. Modules that imported a function by name before keep what they have.

    Call it before threads that sample start: each function is tried on the CPU, for which torch's global CPU generator
    and the module's `torch` are set aside and put back at the end; a sampler that runs in another thread meanwhile
    would draw from the wrong generator. CUDA's generators are not touched. Raises ImportError when there is no module
    to patch, ValueError when it has no such functions.
    """
    module = _module(module)
    replaced, left = [], {}
    with _lock:
        for name in _names(module):
            theirs = getattr(module, name)
            if _original(theirs) is not None:
                replaced.append(name)
                continue
            ours = getattr(functions, name, None)
            why = "no table of this function here" if ours is None else _unlike(ours, theirs)
            found = why if why or ours is None else _host(module, name, ours, theirs)
            if isinstance(found, str) or ours is None:
                left[name] = why or str(found)
            else:
                setattr(module, name, _replacement(ours, theirs, *found))
                replaced.append(name)
    return Patched(module.__name__, tuple(replaced), left)


def unpatch(module: ModuleType | None = None) -> Patched:
    """Put back what `patch` replaced, the same objects; `replaced` names them."""
    module = _module(module)
    restored = []
    with _lock:
        for name in _names(module):
            theirs = _original(getattr(module, name))
            if theirs is not None:
                setattr(module, name, theirs)
                restored.append(name)
    return Patched(module.__name__, tuple(restored))


def _module(module: ModuleType | None) -> ModuleType:
    if isinstance(module, ModuleType):
        if not _names(module):
            raise ValueError(f"patch: {module.__name__} has no sample_* functions; give the module that defines them")
        return module
    if module is not None:
        raise TypeError(f"patch: module must be a module with sample_* functions, got {type(module).__name__}")
    try:
        return sys.modules.get("k_diffusion.sampling") or importlib.import_module("k_diffusion.sampling")
    except ImportError as error:
        raise ImportError(
            f"k_diffusion.sampling cannot be imported ({error}); give patch() the module to patch, for example "
            "comfy.k_diffusion.sampling"
        ) from error


def _names(module: ModuleType) -> list[str]:
    return [name for name in sorted(vars(module)) if name.startswith("sample_") and callable(getattr(module, name))]


def _original(function: Any) -> Any:
    return getattr(function, "_fastdiff_original", None)


def _replacement(
    ours: Callable[..., Tensor], theirs: Callable[..., Tensor], host: Host, looks_inside: bool
) -> Callable[..., Tensor]:
    @functools.wraps(theirs)
    def sample(*args: Any, **kwargs: Any) -> Tensor:
        if looks_inside and not _adds_noise(args[0] if args else kwargs.get("model")):
            return theirs(*args, **kwargs)
        try:
            return ours(*args, **kwargs, host=host)
        except Refused as refused:
            if refused.inside or kwargs.get("seed") is not None:
                raise
            warn(f"{refused}. The module's own {theirs.__name__} runs instead")
        return theirs(*args, **kwargs)

    sample._fastdiff_original = theirs  # type: ignore[attr-defined]
    return sample


def _unlike(ours: Callable[..., Any], theirs: Callable[..., Any]) -> str:
    """How the arguments differ, "" where they do not."""
    mine, other = (
        [(p.name, p.default) for p in inspect.signature(function).parameters.values() if p.name not in ADDED]
        for function in (ours, theirs)
    )
    if inspect.signature(ours).parameters.keys().isdisjoint(ADDED):
        return "not a table here: it chooses its steps for the whole batch as it goes"
    if mine == other:
        return ""
    named = [f"{name}={default}" for name, default in other if (name, default) not in mine]
    missing = [name for name, _ in mine if name not in dict(other)]
    what = [f"has {', '.join(named)}"] * bool(named) + [f"lacks {', '.join(missing)}"] * bool(missing)
    return "its signature differs: it " + (" and ".join(what) or "has another order")


def _host(
    module: ModuleType, name: str, ours: Callable[..., Tensor], theirs: Callable[..., Tensor]
) -> tuple[Host, bool] | str:
    """The host with which ours gives theirs' numbers and leaves the generator where they do, or why there is none.

    And whether theirs looks inside the model, for which it was given one with something inside.
    """
    found = ""
    for model, looks_inside in ((_model, False), (_Comfy(), True)):
        for discards, seeded in itertools.product((True, False), (False, True)):
            host = Host(module, discards, seeded)
            try:
                found = _difference(module, name, ours, theirs, host, model)
            except Exception as error:
                found = f"does not run on a plain model: {type(error).__name__}: {error}"
                break
            if not found:
                return host, looks_inside
        if not found.startswith("does not run"):
            break
    return found


def _difference(
    module: ModuleType,
    name: str,
    ours: Callable[..., Tensor],
    theirs: Callable[..., Tensor],
    host: Host,
    model: Callable[..., Tensor],
) -> str:
    known = inspect.signature(theirs).parameters
    options: list[dict[str, Any]] = [{}]
    options += [{"eta": 0.6, "s_noise": 1.1}] if "eta" in known else []
    options += [{"s_churn": 1.5, "s_tmin": 0.4, "s_tmax": 6.0, "s_noise": 1.1}] if "s_churn" in known else []
    levels: list[Any] = [torch.tensor([9.0, 4.0, 2.5, 1.0, 0.3, 0.0]), torch.tensor([9.0, 4.0, 2.5, 1.0])]
    levels = [(0.3, 9.0, 5), (0.3, 9.0, 6)] if "sigmas" not in known else [(sigmas,) for sigmas in levels]
    for given, option in itertools.product(levels, options):
        with _apart(module):
            results = []
            for function, more in ((theirs, {}), (ours, {"host": host})):
                torch.default_generator.manual_seed(11)  # torch.manual_seed sets those of every GPU too
                x = given[0][0] * torch.randn(2, 3, 4, 4) if len(given) == 1 else given[1] * torch.randn(2, 3, 4, 4)
                end = function(model, x, *given, extra_args={"seed": 5}, disable=True, **option, **more)
                results.append((end, torch.get_rng_state()))
        (expected, state), (got, after) = results
        error = float((got - expected).abs().max() / expected.abs().max())
        if not error <= TOLERANCE:
            return f"gives other numbers than k-diffusion's {name}: {error:.1e} apart with {option or 'its defaults'}"
        if not torch.equal(state, after):
            return f"draws otherwise than k-diffusion's {name} with {option or 'its defaults'}"
    return ""


def _model(x: Tensor, sigma: Tensor, **_: Any) -> Tensor:
    """A smooth denoiser: D of unit Gaussian data, bent."""
    s = sigma.view(-1, 1, 1, 1)
    return x / (1.0 + s * s) + 0.3 * torch.sin(x + s)


class _Comfy:
    """The same denoiser where ComfyUI's functions look for the kind of its schedule, which is none they know."""

    def __init__(self) -> None:
        self.model_sampling = object()
        self.inner_model = self.model_patcher = self

    def get_model_object(self, name: str) -> Any:
        return getattr(self, name)

    def __call__(self, x: Tensor, sigma: Tensor, **extra: Any) -> Tensor:
        return _model(x, sigma, **extra)


def _adds_noise(model: Any) -> bool:
    """Whether a ComfyUI model tells its schedule, and x = x0 + sigma n in it; those of flows are of class CONST."""
    try:
        guider = model.inner_model
        told = [guider.inner_model.model_sampling]
        if hasattr(guider, "model_patcher"):
            told.append(guider.model_patcher.get_model_object("model_sampling"))
    except AttributeError:
        return False
    return all(kind.__name__ != "CONST" for sampling in told for kind in type(sampling).__mro__)


@contextmanager
def _apart(module: ModuleType) -> Any:
    """The global generator is left as it was, and so is one that the program has put in torch's place."""
    put = vars(module).get("torch")
    if put is not None:
        module.torch = torch  # type: ignore[attr-defined]
    try:
        with torch.random.fork_rng(devices=[]):
            yield
    finally:
        if put is not None:
            module.torch = put  # type: ignore[attr-defined]
