"""Samplers of flow-matching models, on the clock of the straight path x = (1 - s) x0 + s n."""

from __future__ import annotations

from fastdiff.compiler.lin import Lin
from fastdiff.compiler.run import Run
from fastdiff.compiler.solvers.registry import solver
from fastdiff.compiler.solvers.steps import ode_step


@solver("flow_euler", order=1)
def flow_euler(run: Run, x: Lin) -> Lin:
    """Euler on dx/ds = u = E[n - x0 | x] (Liu et al. 2023, Lipman et al. 2023): x' = x + (t - s) u, u = (x - D)/s."""
    if run.schedule is None or run.schedule.kind != "flow":
        name = "custom levels" if run.schedule is None else f"schedule {run.schedule.name!r}"
        raise ValueError(f"flow_euler needs a flow schedule (rectified_flow), got {name}; use 'euler' or 'ddim' there")
    for _, s, t in run.intervals():
        x = ode_step(x, run.denoise(x, s), s, t)
    return x
