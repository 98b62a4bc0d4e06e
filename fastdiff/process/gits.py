"""GITS: the levels that serve one model best, by dynamic programming over measured costs (Chen et al. 2024).

On the Trajectory Regularity of ODE-based Diffusion Sampling, section 5. `fastdiff.engine.gits` measures the costs.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from .clocks import Array, Schedule

# the weight of each jump against the one before it: theirs is 1.15, for another distance; by this one about 1.05 left
# the smallest error of the samples, on mixtures and on the network that comes with the package
COEFFICIENT = 1.05
_FORMAT = "fastdiff-gits-1"


def best_path(cost: Array, jumps: int, coefficient: float = COEFFICIENT) -> list[int]:
    """The indices i_0 = 0 < i_1 < ... from which `jumps` jumps to the end M cost least.

    V[j][1] = c[j][M] and V[j][k] = min_i c[j][i] + coefficient V[i][k - 1], so that the k-th jump of the path weighs
    coefficient^(k - 1); of equal paths the one with the earliest indices.
    cost: [M + 1, M + 1], of which entries above the diagonal are read. Returns `jumps` indices, M left out.
    Raises ValueError for another shape or an infinite cost, unless 1 <= jumps <= M, and unless coefficient > 0.
    """
    end = len(cost) - 1
    if cost.shape != (end + 1, end + 1) or end < 1:
        raise ValueError(f"cost must be square, [M + 1, M + 1] with M >= 1, got shape {cost.shape}.")
    above = np.triu(np.ones(cost.shape, dtype=bool), 1)
    if not np.isfinite(cost[above]).all():
        raise ValueError("Every cost above the diagonal must be finite: one is inf or nan. Measure them again.")
    if not 1 <= jumps <= end:
        raise ValueError(
            f"There are costs between {end} levels and the clean one, so steps must be 1..{end}, got {jumps}. "
            "Measure them on more levels: teacher_steps of fastdiff.gits."
        )
    if not (math.isfinite(coefficient) and coefficient > 0):
        raise ValueError(f"coefficient must be finite and above 0, got {coefficient!r}. 1.05 is usual.")
    reachable = np.where(above, cost, math.inf)
    value = reachable[:, end]
    following = []
    for _ in range(jumps - 1):
        totals = reachable[:, :end] + coefficient * value[:end]
        following.append(totals.argmin(axis=1))
        value = totals.min(axis=1)
    path = [0]
    for choice in reversed(following):
        path.append(int(choice[path[-1]]))
    return path


@dataclass(frozen=True)
class Costs:
    """What a jump from one level straight to another costs on one model: the matrix of GITS and what it belongs to.

    schedule: the model's. times: [M] descending, on its clock. cost: [M + 1, M + 1], entry [i, j > i] the mean distance
    between the teacher's state at level j and one Euler step from its state at i; index M is the clean level.
    measured: how, as JSON values (teacher, seeds ...); a file is only taken for a request with the same.
    """

    schedule: Schedule
    times: Array
    cost: Array
    measured: Mapping[str, Any]

    def levels(self, steps: int, coefficient: float = COEFFICIENT) -> Array:
        """The best `steps` of the times, descending from the first. Raises ValueError as best_path does."""
        return self.times[best_path(self.cost, steps, coefficient)]

    def to_json(self) -> str:
        """The costs as JSON text with a digest; `from_json` gives them back bit for bit."""
        body = {
            "schedule": self.schedule.to_dict(),
            "measured": dict(self.measured),
            "times": self.times.tolist(),
            "cost": [row[i + 1 :].tolist() for i, row in enumerate(self.cost[:-1])],
        }
        document = {"format": _FORMAT, "digest": _digest(body), "costs": body}
        return json.dumps(document, allow_nan=False) + "\n"

    @staticmethod
    def from_json(text: str) -> Costs:
        """Read what to_json wrote. Raises ValueError when it is truncated, edited, or something else."""
        try:
            document = json.loads(text)
        except ValueError as error:
            raise ValueError(f"not complete JSON ({error})") from None
        if not isinstance(document, dict) or document.get("format") != _FORMAT or "costs" not in document:
            raise ValueError(f"not a file of GITS costs (a JSON object with format {_FORMAT!r})")
        body = document["costs"]
        if _digest(body) != document.get("digest"):
            raise ValueError("its digest does not match: the file was edited or damaged")
        times = np.array(body["times"], dtype=np.float64)
        cost = np.zeros((len(times) + 1, len(times) + 1))
        for i, row in enumerate(body["cost"]):
            cost[i, i + 1 :] = row
        return Costs(Schedule.from_dict(body["schedule"]), times, cost, body["measured"])


def read(cache: str | os.PathLike[str], schedule: Schedule) -> Costs:
    """The costs in this file. Raises ValueError unless it is whole and was measured on `schedule`, OSError without it.

    A file is known by its digest, not by the weights of the network: delete it once the network is another.
    """
    path = Path(cache)
    if not path.is_file():
        raise FileNotFoundError(
            f"There are no GITS costs at {path}. Measure them on your model, once: "
            f"fastdiff.gits(model, shape, steps, cache={str(path)!r})."
        )
    try:
        costs = Costs.from_json(path.read_text(encoding="utf-8"))
    except ValueError as error:  # bytes that are no text are a ValueError too
        raise ValueError(f"Cannot read GITS costs from {path}: {error}. Delete it and measure again.") from None
    if costs.schedule != schedule:
        raise ValueError(
            f"The GITS costs in {path} were measured on {costs.schedule!r}, asked for on {schedule!r}. Give the file "
            "of a model with this schedule, or measure one: fastdiff.gits(model, shape, steps, cache=...)."
        )
    return costs


def gits(
    schedule: Schedule,
    steps: int,
    *,
    cache: str | os.PathLike[str] | None = None,
    coefficient: float = COEFFICIENT,
) -> Array:
    """The levels between which Euler steps stay closest to the model's own trajectories (Chen et al. 2024, section 5).

    cache: the file of costs that `fastdiff.gits` measured on the model; it serves any number of steps up to the
    teacher's. coefficient: how much more than the jump before it a jump counts (best_path; theirs is 1.15). Raises
    ValueError without a file, and for one that is damaged or was measured on another schedule.
    """
    if cache is None:
        raise ValueError(
            "Grid gits is measured on a model, so it needs the file of its costs. Make one with fastdiff.gits(model, "
            "shape, steps, cache='gits.json') and give grid_options={'cache': 'gits.json'}, or use karras."
        )
    return read(cache, schedule).levels(steps, coefficient)


def _digest(body: Any) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
