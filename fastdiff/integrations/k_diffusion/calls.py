"""What is the same in every function: its table, its callback's dictionary, its draws, its progress bar.

May import: engine.seeds, tables, noise, loop.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastdiff.engine.seeds import per_sample as seeds_of
from fastdiff.integrations.k_diffusion import loop, tables
from fastdiff.integrations.k_diffusion.noise import Host, NoiseSampler
from fastdiff.integrations.k_diffusion.tables import Recipe, Refused

Extra = Mapping[str, Any] | None
Callback = Callable[[dict[str, Any]], Any] | None
Seed = int | Sequence[int] | Tensor | None
Ends = Callable[[], tuple[Sequence[Tensor], Sequence[Tensor]]]  # sigma and sigma_next of every draw, in order
BOUNDS = ("s_tmin", "s_tmax")


class Call(NamedTuple):
    """What every function is given besides its levels and its options."""

    model: loop.Model
    x: Tensor
    extra_args: Extra
    callback: Callback
    disable: bool | None
    noise_sampler: NoiseSampler | None
    seed: Seed
    host: Host


def on_sigmas(name: str, call: Call, sigmas: Tensor, **options: Any) -> Tensor:
    """sample_{name} on sigmas [steps + 1]."""
    if not isinstance(sigmas, Tensor) or sigmas.dim() != 1 or not sigmas.is_floating_point():
        got = f"{sigmas.dtype} {tuple(sigmas.shape)}" if isinstance(sigmas, Tensor) else type(sigmas).__name__
        raise Refused(f"sample_{name}: sigmas must be a floating-point tensor [steps + 1], got {got}")
    loop.check_state(name, call.x)
    options = tables.checked(name, {key: _plain(value) if key in BOUNDS else value for key, value in options.items()})
    if len(sigmas) < 2:
        return call.x  # no step to make, as in k-diffusion
    if options.get("s_churn"):
        for bound in BOUNDS:  # compared with sigmas in their dtype
            options[bound] = torch.tensor(options[bound], dtype=sigmas.dtype).item()
    recipe = tables.on_sigmas(name, tuple(sigmas.tolist()), tuple(options.items()))

    def tell(i: int, x: Tensor, denoised: Tensor) -> None:
        assert call.callback is not None
        sigma = sigmas[i]
        hat = sigma * (recipe.gamma[i] + 1) if name in tables.CHURNED else sigma
        call.callback({"x": x, "i": i, "sigma": sigma, "sigma_hat": hat, "denoised": denoised})

    def ends() -> tuple[Sequence[Tensor], Sequence[Tensor]]:
        if name == "dpmpp_sde":
            return _halves(sigmas, recipe, options["r"])
        each = sigmas.unbind()
        return [each[i] for i in recipe.drawn_in], [each[i + 1] for i in recipe.drawn_in]

    bar = call.host.steps(len(sigmas) - 1, call.disable)
    result = _run(recipe, call, tell, ends, sigmas, None if bar is None else bar.__next__, None)
    if bar is not None:
        next(bar, None)  # closes it
    return result


def dpm_fast(call: Call, sigma_min: Any, sigma_max: Any, n: int, **options: Any) -> Tensor:
    """sample_dpm_fast, whose callback is told the time -log sigma as well."""
    loop.check_state("dpm_fast", call.x)
    options = tables.checked("dpm_fast", options)
    sigma_min, sigma_max, n = tables.fast_levels(_plain(sigma_min), _plain(sigma_max), n)
    recipe = tables.dpm_fast(sigma_min, sigma_max, n, tuple(options.items()))
    start, end = (float(-torch.tensor(sigma).log()) for sigma in (sigma_max, sigma_min))
    times = torch.linspace(start, end, len(tables.fast_orders(n)) + 1, device=call.x.device)

    def tell(i: int, x: Tensor, denoised: Tensor) -> None:
        assert call.callback is not None
        t = times[i]
        sigma = t.neg().exp()
        call.callback({"sigma": sigma, "sigma_hat": sigma, "x": x, "i": i, "t": t, "t_up": t, "denoised": denoised})

    def ends() -> tuple[Sequence[Tensor], Sequence[Tensor]]:
        sigmas = times.neg().exp().unbind()
        return sigmas[:-1], sigmas[1:]

    with call.host.counter(n, call.disable) as bar:
        return _run(recipe, call, tell, ends, None, None, bar.update)


def _plain(value: Any) -> Any:
    """A level taken from a tensor of levels, as a number; anything else as it is."""
    return value.item() if isinstance(value, Tensor) and value.numel() == 1 and not value.is_meta else value


def _halves(sigmas: Tensor, recipe: Recipe, r: float) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
    """dpmpp_sde draws from each sigma to the middle and to the next one; in k-diffusion's roundings, since a path that
    is asked for a time next to the one it was asked for has moved by the root of the distance."""
    t = sigmas.log().neg()
    middle = (t[:-1] + (t[1:] - t[:-1]) * r).neg().exp().unbind()
    at = t.neg().exp().unbind()
    steps = dict.fromkeys(recipe.drawn_in)
    return [at[i] for i in recipe.drawn_in], [end for i in steps for end in (middle[i], at[i + 1])]


def _run(
    recipe: Recipe,
    call: Call,
    tell: Callable[[int, Tensor, Tensor], None],
    ends: Ends,
    sigmas: Tensor | None,
    on_step: Callable[[], Any] | None,
    on_call: Callable[[], Any] | None,
) -> Tensor:
    extra_args = {} if call.extra_args is None else call.extra_args
    seeds = draw = None
    drawn = recipe.draws if call.host.discards or recipe.name not in tables.CHURNED else recipe.used
    if call.seed is not None:
        if call.noise_sampler is not None:
            raise Refused(f"sample_{recipe.name}: give noise_sampler= or seed=, not both")
        seeds = seeds_of(call.seed, call.x.shape[0])
    else:
        draw = _source(recipe, call, ends, sigmas, extra_args, any(drawn))
    callback = None if call.callback is None else tell
    try:
        return loop.run(recipe, call.model, call.x, extra_args, callback, draw, drawn, seeds, on_step, on_call)
    except Refused as refused:
        refused.inside = True
        raise


def _source(
    recipe: Recipe, call: Call, ends: Ends, sigmas: Tensor | None, extra_args: Mapping[str, Any], draws: bool
) -> loop.Draw | None:
    """What k-diffusion's function of this name draws from; made even where it draws nothing, as theirs is."""
    sampler = call.noise_sampler
    if sampler is None and recipe.name in tables.BROWNIAN:
        assert sigmas is not None
        sampler = call.host.brownian(call.x, sigmas, extra_args, draws)
    elif sampler is None and recipe.name in tables.ANCESTRAL:
        sampler = call.host.white(call.x, extra_args)
    if not draws:
        return None
    return call.host.like(call.x) if sampler is None else loop.from_sampler(recipe, sampler, *ends())
