"""What was asked of a run and changes nothing of it, said in warnings: a sweep over settings may pass through there.

May import: compiler. What can only be a mistake is an error, where the arguments are checked.
"""

from __future__ import annotations

from collections.abc import Iterator

from fastdiff.compiler.adaptive import AdaptivePlan
from fastdiff.compiler.plan import Plan
from fastdiff.errors import warn


def warn_of(plan: Plan, path: bool, guided: bool, perturbed: bool) -> None:
    """UserWarning for each setting of this run without an effect.

    path: whether noise is increments of a path. guided, perturbed: whether a sample has a guidance other than 1, a
    perturbed_scale other than 0.
    """
    for message in _idle(plan, path, guided, perturbed):
        warn(message)


def _idle(plan: Plan, path: bool, guided: bool, perturbed: bool) -> Iterator[str]:
    if path and not plan.draws:
        yield (
            f"noise='brownian' is of samplers that draw noise on the way, and {plan.solver} draws none with these "
            "options: it has no effect. Take one that does (dpmpp_2m_sde, say), or leave noise out"
        )
    elif path and plan.intervals and not any(plan.intervals):
        yield (
            f"noise='brownian': no draw of {plan.solver} is part of the way down, so none is taken from the path: it "
            "has no effect. Leave noise out"
        )
    if not guided and not plan.reads_unguided and _in_part(plan, "interval", "gain"):
        yield (
            "the plan says where guidance applies (guidance_interval or guidance_schedule), and guidance is 1: it has "
            "no effect. Give guidance=, cond= and uncond=, or make the plan without"
        )
    if not perturbed and _in_part(plan, "perturbed_interval", "perturb"):
        yield (
            "the plan says where the perturbed branch applies (perturbed_interval), and perturbed_scale is 0: it has "
            "no effect. Give perturbed_scale=, or make the plan without"
        )


def _in_part(plan: Plan, interval: str, factor: str) -> bool:
    if isinstance(plan, AdaptivePlan):
        return plan.guidance.get(interval) is not None
    return any(getattr(row, factor) != 1.0 for row in plan.rows[1:])
