"""Which samplers share a panel of the plot, and which orders are promised elsewhere. May import: nothing."""

from __future__ import annotations

OTHER = "Other samplers"
FAMILIES = {
    "One slope or two": ("ddim", "euler", "ancestral"),
    "Stages within a step": ("singlestep",),
    "Multistep in log(alpha/sigma)": ("dpmpp", "multistep", "mean_reverting", "unipc"),
    "Multistep in sigma/alpha, momentum": ("adams", "momentum"),
    "Stochastic and Langevin": ("er_sde", "sa_solver", "sde", "langevin"),
    "Flow": ("flow",),
}

# The order that a paper, a library or the name promises where the method with its default options has a lower one.
PROMISED: dict[str, tuple[int, str]] = {
    "dpmpp_3m": (
        3,
        "the second difference has half the weight that integrates a parabola; `curvature='exact'` is of order 3",
    ),
    "dpmpp_3m_sde": (3, "the weights of `dpmpp_3m`, so of order 2 for the same reason"),
    "dpmpp_sde": (
        2,
        "its two draws in a step are independent; as increments of one path (`noise='brownian'`) it has 2",
    ),
    "er_sde": (3, "the first derivative is a backward difference in every step"),
    "heunpp2": (2, "the mean of up to three slopes, one of them from beyond the step"),
    "ipndm": (4, "Adams-Bashforth weights of equal steps on a grid that is uneven in sigma/alpha; `ipndm_v` has 4"),
    "pndm": (4, "Adams-Bashforth weights of equal steps on a grid that is uneven in sigma/alpha"),
    "seeds_3": (3, "three stages, but of order 2 in the variance with the noise on"),
}

# What a measured order does not say by itself.
REMARKS: dict[str, str] = {
    "edm": "its default `s_noise=1.003` leaves +0.6% of variance at any number of steps; with 1 the order is Heun's",
    "sa_solver": "with tau between 0 and 1 the order is 2; at the default tau = 1 the term of order 2 is not there, "
    "on a mixture either. With tau = 0 predictor p and corrector c have the order min(p + 1, c) of the paper",
    "langevin_pc": "towards a bias of its corrector that falls with the last levels; the slope is between 0.8 and 1.4",
}


def family(module: str) -> str:
    """The panel of a solver whose function is in this module."""
    package, _, name = module.rpartition(".")
    if package == "fastdiff.compiler.solvers":
        for title, members in FAMILIES.items():
            if name in members:
                return title
    return OTHER
