"""The samplers: each one short function over symbolic registers, found by the literature's name."""

from fastdiff.compiler.solvers import (
    adams,
    adaptive,
    ancestral,
    ddim,
    dpmpp,
    er_sde,
    euler,
    few_step,
    flow,
    langevin,
    momentum,
    multistep,
    sa_solver,
    sde,
    singlestep,
    unipc,
)
from fastdiff.compiler.solvers.registry import Solver, get, names, solver

__all__ = [
    "Solver",
    "adams",
    "adaptive",
    "ancestral",
    "ddim",
    "dpmpp",
    "er_sde",
    "euler",
    "few_step",
    "flow",
    "get",
    "langevin",
    "momentum",
    "multistep",
    "names",
    "sa_solver",
    "sde",
    "singlestep",
    "solver",
    "unipc",
]
