"""A network made worse on purpose, for the perturbed branch of guidance: the same weights, some layers not as trained.

May import: models.denoiser. The layers are changed by hooks that are there during a call only, and act in the thread of
that call only; the network itself is not changed.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from fastdiff.errors import unknown_name
from fastdiff.models.denoiser import Denoiser


def skip_layers(model: Denoiser, names: Sequence[str]) -> Denoiser:
    """The same network with the named modules left out: each returns its first argument (skip-layer guidance).

    names: of `model.net.named_modules()`; modules whose output has the shape of their first argument. Use it as
    `Sampler(..., perturbed=skip_layers(model, names))` with perturbed_scale: F + s (Fc - Fp) moves away from what the
    network says without them. Raises ValueError for a name that is not there, or, at the call, for a module that is
    not called or whose output has another shape.
    """

    @contextmanager
    def skipped(name: str, layer: nn.Module) -> Iterator[list[bool]]:
        caller, reached = threading.get_ident(), []

        def hook(_: nn.Module, arguments: tuple[Any, ...], output: Any) -> Any:
            if threading.get_ident() != caller:
                return output
            given = arguments[0] if arguments else None
            if not isinstance(given, Tensor) or not isinstance(output, Tensor) or given.shape != output.shape:
                raise ValueError(
                    f"skip_layers: {name!r} cannot be left out, its output is not shaped as its first argument; "
                    "name a residual block or an attention layer"
                )
            reached.append(True)
            return given

        handle = layer.register_forward_hook(hook)
        try:
            yield reached
        finally:
            handle.remove()

    return _changed(model, names, "skip_layers", skipped)


def identity_attention(model: Denoiser, names: Sequence[str]) -> Denoiser:
    """The same network with softmax(q k^T) v replaced by v in the named modules (PAG: Ahn et al. 2024, section 4).

    names: self-attention modules of `model.net.named_modules()` that call torch's scaled_dot_product_attention, as
    this package's and diffusers' do. Raises ValueError for a name that is not there, or, at the call, for a module
    that does not attend in that way or attends to something else than its input.
    """

    @contextmanager
    def passing(name: str, layer: nn.Module) -> Iterator[list[bool]]:
        mode, caller, reached = _Identity(name), threading.get_ident(), []

        def enter(*_: Any) -> None:
            if threading.get_ident() == caller:
                mode.__enter__()

        def leave(*_: Any) -> None:
            if threading.get_ident() != caller:
                return
            mode.__exit__(None, None, None)
            reached.append(True)
            if not mode.seen:
                raise ValueError(f"identity_attention: {name!r} does not call scaled_dot_product_attention")

        handles = (layer.register_forward_pre_hook(enter), layer.register_forward_hook(leave, always_call=True))
        try:
            yield reached
        finally:
            for handle in handles:
                handle.remove()

    return _changed(model, names, "identity_attention", passing)


class _Identity(TorchFunctionMode):
    """Attention in which every token attends to itself alone."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name, self.seen = name, False

    def __torch_function__(self, function: Any, types: Any, arguments: Any = (), options: Any = None) -> Any:
        if function is not functional.scaled_dot_product_attention:
            return function(*arguments, **(options or {}))
        self.seen = True
        named = dict(zip(("query", "key", "value"), arguments, strict=False)) | (options or {})
        if named["query"].shape[-2] != named["value"].shape[-2]:
            raise ValueError(f"identity_attention: {self.name!r} attends to another sequence; name self-attention only")
        return named["value"]


def _changed(model: Denoiser, names: Sequence[str], caller: str, change: Callable[[str, nn.Module], Any]) -> Denoiser:
    if not isinstance(model, Denoiser):
        raise TypeError(f"{caller} needs a Denoiser, got {type(model).__name__}; wrap the network: fd.Denoiser")
    net = model.net
    if not isinstance(net, nn.Module):
        raise TypeError(f"{caller} needs a network that is a torch module, got {type(net).__name__}")
    modules = dict(net.named_modules())
    if isinstance(names, str) or not names:
        raise ValueError(f"{caller} needs a list of module names, got {names!r}")
    for name in names:
        if name not in modules:
            raise unknown_name("module", name, [known for known in modules if known])

    def call(*arguments: Any, **conditions: Any) -> Any:
        with ExitStack() as stack:
            reached = [stack.enter_context(change(name, modules[name])) for name in names]
            output = net(*arguments, **conditions)
        missed = [name for name, was in zip(names, reached, strict=True) if not was]
        if missed:
            inside = [name for name in modules if name.startswith(f"{missed[0]}.")][:3]
            hint = f"; it holds {', '.join(inside)}" if inside else ""
            raise ValueError(f"{caller}: the network never called {missed[0]!r}{hint}")
        return output

    return model.around(call)
