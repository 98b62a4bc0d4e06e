"""The samplers: each one short function over symbolic registers, found by the literature's name."""

from fastdiff.compiler.solvers import (
    adams,
    ancestral,
    ddim,
    dpmpp,
    euler,
    flow,
    langevin,
    multistep,
    sa_solver,
    sde,
    singlestep,
    unipc,
)
from fastdiff.compiler.solvers.registry import Solver, get, names, solver

__all__ = ["Solver", "ancestral", "ddim", "dpmpp", "euler", "flow", "get", "langevin", "names", "sde", "solver"]
