"""Somebody's own sampling function to a Plan: run it once, unmodified, on symbolic registers.

May import: torch, the rest of the compiler, process; its files are its own. `Register` looks like a tensor to the
function and holds a `Lin`; the model handed to the function ends a row; normals it draws become noise ids in order.

What crosses a row. The function keeps values between model calls in its own variables, so when it calls the model,
every register that is still alive and is a combination of several values becomes a register of the table
("kept"), once per direction: two live values that are multiples of each other share one. An expression therefore
never grows with the history, and a row stays as wide as the number of values the function itself carries. Python
frees a value with its last reference, so what is alive is known exactly; a variable that lingers without being read
again costs nothing, because rows drop what nobody reads.

A second run on random tensors is compared with the table, state by state: what the registers cannot show (two views of
one storage, state that the function keeps from call to call, scalars that depend on the shape) differs there.
"""

from __future__ import annotations

import inspect
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from fastdiff.compiler.assemble import assemble
from fastdiff.compiler.brownian import partitioned
from fastdiff.compiler.capture.intercept import has_generator, without_draws
from fastdiff.compiler.lin import Lin
from fastdiff.compiler.plan import Plan
from fastdiff.compiler.run import Run
from fastdiff.compiler.trace.proof import prove
from fastdiff.compiler.trace.register import Draws, Refused, Register, Tracer, level_of
from fastdiff.process import schedules
from fastdiff.process.schedules import Level, Schedule


def trace(
    fn: Callable[..., Any], levels: Sequence[float] | Sequence[Level], schedule: Schedule | str | None = None, **kw: Any
) -> Plan:
    """Compile a k-diffusion style function `fn(model, x, sigmas, ...)` to a table, by running it on symbolic registers.

    fn: called with `model(x, sigma, **extra_args)` -> D, the state x = x0 + sigma n, and sigmas as float64; a function
    of `sigma_min, sigma_max, n` instead (k-diffusion's dpm_fast) gets the ends of the levels and their number.
    levels: sigma / alpha, descending, as fn expects them (k-diffusion: the last one 0); not the times on a clock that
    `fd.plan` takes. schedule: the one the network was trained on, or its name; without it the network is called with
    sigma itself. kw: further arguments of fn. A `noise_sampler` argument of fn is filled with unit normals, so Brownian
    trees are not built; the sigmas it is asked for say what each covers, so noise="brownian" puts them on our path.
    The plan's `options` hold kw and the largest relative mismatch of a second run, on random tensors.
    Noise ids are the draws of fn in order; a function none of whose draws reaches the sample has no draws.
    Raises TypeError, naming the function and the row, when fn multiplies registers, branches on data, or does anything
    else that is not a weighted sum; ValueError when a row carries more values than the row kernel has registers.
    Deterministic. Generators stay as they are, except that a function which is given none and draws by a shape alone
    draws its first normals from torch's default generator for real; they are lost.
    """
    if not callable(fn):
        raise TypeError(f"trace: fn must be a function fn(model, x, sigmas, ...), got {type(fn).__name__}")
    if isinstance(schedule, str):
        schedule = schedules.get(schedule)
    name = getattr(getattr(fn, "func", fn), "__name__", type(fn).__name__)
    sigmas = _sigmas(levels)
    points = [level_of(sigma, schedule) for sigma in sigmas]
    recorded = None
    defaults = [parameter.default for parameter in inspect.signature(fn).parameters.values()]
    if not has_generator([kw, defaults]):
        with suppress(TypeError, ValueError, RuntimeError):  # mostly a draw that takes a shape alone
            recorded = _recorded(fn, name, sigmas, Run(name, points, schedule), kw, every_call=False)
    if recorded is None:
        recorded = _recorded(fn, name, sigmas, Run(name, points, schedule), kw, every_call=True)
    tracer, arguments, result = recorded
    run = tracer.run
    rows, registers, home = assemble(name, run.finish(result))
    draws = run.draws if any(row.noise for row in rows) else 0
    visited = [row.level for row in rows if row.level is not None]
    plan = Plan(
        solver=f"trace:{name}",
        options={key: _plain(value) for key, value in kw.items()},
        schedule=schedule,
        grid="traced",
        levels=tuple(points),
        rows=rows,
        registers=registers,
        result=home,
        draws=draws,
        intervals=partitioned(run, rows, [*visited, points[-1]]) if draws else (),
    )
    mismatch = prove(fn, name, plan, arguments, watched=run.draws > tracer.sampled)
    return replace(plan, options={**plan.options, "mismatch": float(f"{mismatch:.1e}")})


def _recorded(
    fn: Callable[..., Any], name: str, sigmas: list[float], run: Run, kw: Mapping[str, Any], every_call: bool
) -> tuple[Tracer, dict[str, Any], Lin]:
    """fn run once on registers: what it talked to, its arguments, and its result.

    every_call: see all its torch calls, so that draws by a shape alone are named; else those on registers, and
    RuntimeError for such draws.
    """
    tracer = Tracer(run, run.schedule)
    arguments = _arguments(fn, name, sigmas, tracer, kw)
    try:
        with torch.no_grad(), Draws(tracer) if every_call else without_draws():
            result = fn(tracer.evaluate, tracer.register(run.start), **arguments)
    except Refused as refused:
        raise refused.error from None
    result = result[0] if isinstance(result, tuple | list) and result else result
    if not isinstance(result, Register):
        raise TypeError(
            f"{name} returned {type(result).__name__}, expected the final state: return x at the end of the function"
        )
    return tracer, arguments, result.lin


def _sigmas(levels: Sequence[float] | Sequence[Level]) -> list[float]:
    sigmas = [level.rho if isinstance(level, Level) else float(level) for level in levels]
    descending = all(a > b for a, b in itertools.pairwise(sigmas))
    if len(sigmas) < 2 or not descending or sigmas[-1] < 0 or not math.isfinite(sigmas[0]):
        raise ValueError(
            f"levels must be at least two finite sigmas >= 0, descending (0 last to end clean), got {sigmas[:8]}"
        )
    return sigmas


def _arguments(
    fn: Callable[..., Any], name: str, sigmas: list[float], tracer: Tracer, given: Mapping[str, Any]
) -> dict[str, Any]:
    """fn's arguments after model and x: the levels in the form it asks for, and what it must not make itself."""
    known = inspect.signature(fn).parameters
    open_ended = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in known.values())
    arguments: dict[str, Any] = {}
    if "sigmas" in known:
        arguments["sigmas"] = torch.tensor(sigmas, dtype=torch.float64)
    elif {"sigma_min", "sigma_max"} <= known.keys():
        noisy = [sigma for sigma in sigmas if sigma > 0]
        arguments |= {"sigma_min": noisy[-1], "sigma_max": noisy[0]}
        arguments |= {"n": len(sigmas) - 1} if "n" in known else {}
    else:
        raise TypeError(
            f"{name} takes ({', '.join(known)}), expected fn(model, x, sigmas, ...) or "
            "fn(model, x, sigma_min, sigma_max, n, ...); wrap it in a function of that form"
        )
    defaults: dict[str, Any] = {"extra_args": {}, "callback": None, "disable": True, "noise_sampler": tracer.noise}
    arguments |= {key: value for key, value in defaults.items() if key in known}
    unknown = [key for key in given if key not in known and not open_ended]
    if unknown:
        raise TypeError(f"{name} has no argument {', '.join(unknown)}; it takes {', '.join(known)}")
    return arguments | dict(given)


def _plain(value: Any) -> Any:
    """An option as JSON can hold it."""
    if isinstance(value, Tensor):
        return value.tolist()
    return value if isinstance(value, bool | int | float | str | list | dict | None) else repr(value)
