"""The samplers: each one short function over symbolic registers, found by the literature's name."""

from fastdiff.compiler.solvers import ancestral, ddim, dpmpp, euler, flow, langevin, sde
from fastdiff.compiler.solvers.registry import Solver, get, names, solver

__all__ = ["Solver", "ancestral", "ddim", "dpmpp", "euler", "flow", "get", "langevin", "names", "sde", "solver"]
