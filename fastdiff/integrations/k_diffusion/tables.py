"""Which table each of k-diffusion's functions is, and where in it that function draws noise and calls back.

May import: compiler, process. The tables are our own solvers' in x = x0 + sigma n, so k-diffusion need not be there.
"""

from __future__ import annotations

import functools
import itertools
import math
import numbers
import reprlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from fastdiff.compiler import layout as at
from fastdiff.compiler.build import compile_levels
from fastdiff.compiler.plan import Packed, Plan
from fastdiff.compiler.solvers.steps import ancestral_split
from fastdiff.process.schedules import Level

CHURNED = ("euler", "heun", "dpm_2")  # draw with torch.randn_like before every step, used or not
ANCESTRAL = ("euler_ancestral", "dpm_2_ancestral", "dpmpp_2s_ancestral", "dpm_fast")
BROWNIAN = ("dpmpp_sde", "dpmpp_2m_sde", "dpmpp_3m_sde")  # draw from a Brownian tree unless told otherwise
DETERMINISTIC = ("lms", "dpmpp_2m")
SLOPE_FIRST = (*CHURNED, "lms", "dpm_fast")  # take the slope (x - D) / sigma before the callback, the others after it
TABLES = 64  # compiled tables that are kept

_FIXED: dict[str, dict[str, Any]] = {"lms": {"flavor": "k_diffusion"}, "dpm_fast": {"denoise": False}}
_RENAMED = {"solver_type": "correction"}


class Refused(ValueError):
    """Arguments the table form does not cover; raised before the model is called and before anything is drawn.

    inside: it comes from a sampler that the model itself called.
    """

    inside = False


@dataclass(frozen=True)
class Recipe:
    """One function on one set of sigmas.

    draws: for the stretch before row 0 and after each row, whether the function draws there. used: whether that draw
    has a weight. drawn_in: the step of each draw. first: the step that each row begins, None for a step's other rows.
    gamma: how far each step is churned, sigma_hat = (1 + gamma) sigma. sigma: what each row's model call is shown.
    opens: a row without model call comes first. external: `packed` for draws that are handed over one at a time.
    """

    name: str
    plan: Plan
    draws: tuple[bool, ...]
    used: tuple[bool, ...]
    drawn_in: tuple[int, ...]
    first: tuple[int | None, ...]
    gamma: tuple[float, ...]
    sigma: tuple[float, ...]
    opens: bool
    packed: Packed
    external: Packed


@functools.lru_cache(maxsize=TABLES)
def on_sigmas(name: str, sigmas: tuple[float, ...], options: tuple[tuple[str, Any], ...]) -> Recipe:
    """The recipe of sample_{name} on these sigmas; Refused where there is none. options: from `checked`."""
    given = dict(options)
    _check_sigmas(name, sigmas, given)
    levels = [Level(1.0, sigma, sigma) for sigma in sigmas]
    steps = [_step(name, s, t, given) for s, t in itertools.pairwise(levels)]
    gamma = [_gamma(s, len(steps), given) for s in sigmas[:-1]]
    return _recipe(name, name, levels, given, steps, gamma)


@functools.lru_cache(maxsize=TABLES)
def dpm_fast(sigma_min: float, sigma_max: float, n: int, options: tuple[tuple[str, Any], ...]) -> Recipe:
    """The recipe of sample_dpm_fast; Refused where there is none. Arguments: from `fast_levels` and `checked`."""
    given = dict(options)
    if n == 1:  # one step of order 1 from end to end, where eta has no room
        ends = [Level(1.0, sigma, sigma) for sigma in (sigma_max, sigma_min)]
        return _recipe("dpm_fast", "euler", ends, {}, [(1, (1,))], [0.0])
    levels = [Level(1.0, float(sigma), float(sigma)) for sigma in [*np.geomspace(sigma_max, sigma_min, n), 0.0]]
    return _recipe("dpm_fast", "dpm_fast", levels, given, [(k, (k,)) for k in fast_orders(n)], [])


def fast_orders(n: int) -> list[int]:
    """The orders of dpm_fast's blocks, n model calls together (Lu et al. 2022a, section 3.4)."""
    blocks = n // 3 + 1
    return [3] * (blocks - 2) + [2, 1] if n % 3 == 0 else [3] * (blocks - 1) + [n % 3]


def _recipe(
    name: str,
    solver: str,
    levels: Sequence[Level],
    options: Mapping[str, Any],
    steps: Iterable[tuple[int, tuple[int, ...]]],
    gamma: Sequence[float],
) -> Recipe:
    renamed = {_RENAMED.get(key, key): value for key, value in options.items()}
    try:
        plan = compile_levels(solver, levels, None, "k_diffusion", renamed | _FIXED.get(solver, {}))
        # a level between two given ones has no time of its own: the model is shown its sigma
        plan = replace(
            plan, rows=tuple(row if row.level is None else replace(row, level=_own(row.level)) for row in plan.rows)
        )
        packed = plan.pack(opening="state")
    except ValueError as error:  # levels or options so extreme that a coefficient leaves float32
        raise Refused(f"sample_{name}: {error}") from error
    first: list[int | None] = []
    drawn: dict[int, int] = {}
    for i, (rows, after) in enumerate(steps):
        drawn |= {len(first) + offset: i for offset in after}
        first += [i, *[None] * (rows - 1)]
    if len(first) != plan.nfe or any(len(row.noise) > (r in drawn) for r, row in enumerate(plan.rows)):
        raise Refused(
            f"sample_{name}: no table with {_shown(options)} makes k-diffusion's draws; leave eta at 1 or below"
        )
    one_slot = packed.ids.copy()
    one_slot[:, at.TERM_IDS :: at.TERM_IDS_STRIDE] = 0
    opening, *rest = plan.rows
    (start,) = opening.outputs
    return Recipe(
        name=name,
        plan=plan,
        draws=tuple(r in drawn for r in range(len(plan.rows))),
        used=tuple(bool(row.noise) for row in plan.rows),
        drawn_in=tuple(drawn.values()),
        first=tuple(first),
        gamma=tuple(gamma),
        sigma=tuple(row.level.sigma for row in rest if row.level is not None),
        opens=start.x != 1.0 or bool(opening.noise) or start.dest != opening.x,
        packed=packed,
        external=Packed(packed.coef, one_slot),
    )


def _own(level: Level) -> Level:
    return Level(1.0, level.sigma, level.sigma)


def _step(name: str, s: Level, t: Level, options: Mapping[str, Any]) -> tuple[int, tuple[int, ...]]:
    """(model calls of one step, the calls after which it draws; 0 stands for before the first)."""
    if name in CHURNED:
        return (1 if name == "euler" or t.sigma == 0.0 else 2), (0,)
    if name in DETERMINISTIC:
        return 1, ()
    if name == "dpmpp_sde":
        return (2, (1, 2)) if t.sigma > 0.0 else (1, ())
    if name in BROWNIAN:
        return 1, (1,) if t.sigma > 0.0 and options["eta"] else ()
    rows = 1 if name == "euler_ancestral" or ancestral_split(s, t, options["eta"])[0] == 0.0 else 2
    draws = t.sigma > 0.0 if name != "dpm_2_ancestral" else rows == 2
    return rows, (rows,) if draws else ()


def _gamma(sigma: float, steps: int, options: Mapping[str, Any]) -> float:
    if options.get("s_churn", 0.0) <= 0.0 or not options["s_tmin"] <= sigma <= options["s_tmax"]:
        return 0.0
    return min(options["s_churn"] / steps, math.sqrt(2.0) - 1.0)


def checked(name: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """The options with each number as a float, so that they can be hashed; Refused where one is none, or too far."""
    plain = {key: value if key in ("order", "solver_type") else _number(value) for key, value in options.items()}
    for key in ("eta", "s_churn", "s_noise"):
        if not 0.0 <= plain.get(key, 0.0) < math.inf:
            raise Refused(
                f"sample_{name}: {key} is an amount of noise, a finite number >= 0, got {_given(options[key])}"
            )
    for key in ("s_tmin", "s_tmax"):
        if math.isnan(plain.get(key, 0.0)):
            raise Refused(
                f"sample_{name}: {key} is a bound on the sigmas that are churned, a number, got {_given(options[key])}"
            )
    kind = plain.get("solver_type", "heun")
    if not isinstance(kind, str) or kind not in ("heun", "midpoint"):
        raise Refused(f"sample_{name}: solver_type must be 'heun' or 'midpoint', got {_given(kind)}")
    order = plain.get("order", 4)
    if isinstance(order, bool) or not isinstance(order, int) or not 1 <= order <= 4:
        raise Refused(f"sample_{name}: order must be an integer of 1..4, got {_given(order)}")
    if not 0.0 < plain.get("r", 0.5) <= 1.0:
        raise Refused(
            f"sample_{name}: r, where in the step the second model call is, must be a number in (0, 1], "
            f"got {_given(options['r'])}"
        )
    return plain


def fast_levels(sigma_min: Any, sigma_max: Any, n: Any) -> tuple[float, float, int]:
    """What `dpm_fast` takes, in plain numbers; Refused where it has no table from sigma_max to sigma_min in n calls."""
    low, high = _number(sigma_min), _number(sigma_max)
    if not 0.0 < low < high < math.inf:
        raise Refused(
            "sample_dpm_fast: expected 0 < sigma_min < sigma_max, two finite numbers, "
            f"got {_given(sigma_min)} and {_given(sigma_max)}"
        )
    if isinstance(n, bool) or not isinstance(n, numbers.Integral) or n < 1:
        raise Refused(f"sample_dpm_fast: n is a number of model calls, at least 1, got {_given(n)}")
    return low, high, int(n)


def _number(value: Any) -> float:
    """A real number as a float, NaN for anything else."""
    if not isinstance(value, numbers.Real):
        return math.nan
    try:
        return float(value)
    except OverflowError:
        return math.inf if value == abs(value) else -math.inf


def _given(value: Any) -> str:
    """A value as a message quotes it, on one line however large."""
    return reprlib.repr(value)


def _check_sigmas(name: str, sigmas: tuple[float, ...], options: Mapping[str, Any]) -> None:
    if not all(0.0 <= sigma < math.inf for sigma in sigmas):
        raise Refused(f"sample_{name}: sigmas must be finite and >= 0, got {_shown(sigmas)}")
    if all(a > b for a, b in itertools.pairwise(sigmas)):
        return
    upward = all(0.0 < a < b for a, b in itertools.pairwise(sigmas))
    if upward and (name in DETERMINISTIC or (name in CHURNED and not options["s_churn"])):
        return
    raise Refused(
        f"sample_{name}: sigmas must be descending, no two equal (0 last to end clean), got {_shown(sigmas)}; "
        "functions that add no noise take ascending ones too, to go from an image to its noise"
    )


def _shown(value: Any) -> str:
    if not isinstance(value, tuple):
        return ", ".join(f"{key}={item}" for key, item in value.items()) or "these options"
    return ", ".join(f"{sigma:g}" for sigma in value[:8]) + (", ..." if len(value) > 8 else "")
