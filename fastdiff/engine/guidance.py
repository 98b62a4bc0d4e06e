"""Guidance rules that are not linear: per sample, one reduction finds the scalars of the row (`fastdiff.engine.guide`).

May import: the table's layout. With D = P x + Q F from the guided output and Dc, Du
from the branches' own; every sum and norm is over one sample, so a sample does not depend on its batch.
"""

from __future__ import annotations

import math
import numbers
from dataclasses import dataclass

from fastdiff.compiler import layout as at


@dataclass(frozen=True)
class Rescale:
    """CFG-rescale (Lin et al. 2024, section 3.4): F <- phi F std(Fc) / std(F) + (1 - phi) F.

    phi: 0 is plain guidance, 1 gives F the spread of the conditional output; the paper uses 0.7.
    """

    phi: float = 0.7

    def __post_init__(self) -> None:
        _check("Rescale", "phi", self.phi, 0.0, 1.0)


@dataclass(frozen=True)
class APG:
    """Adaptive projected guidance (Sadat et al. 2024, Alg. 1), on denoised estimates.

    M <- (Dc - Du) + momentum M, shortened to norm_threshold where it is longer; the part of M along Dc is kept with
    weight eta only: D = Dc + (w - 1) (M_orthogonal + eta M_parallel). norm_threshold: 0 is none.
    """

    eta: float = 0.0
    momentum: float = -0.5
    norm_threshold: float = 0.0

    def __post_init__(self) -> None:
        _check("APG", "eta", self.eta, -math.inf, math.inf)
        _check("APG", "momentum", self.momentum, -1.0, 1.0)
        _check("APG", "norm_threshold", self.norm_threshold, 0.0, math.inf)


@dataclass(frozen=True)
class CFGZero:
    """CFG-Zero* (Fan et al. 2025, Alg. 1): F = a Fu + w (Fc - a Fu), a = <Fc, Fu> / <Fu, Fu>.

    zero_init: in this many first evaluations F is taken as 0 (for velocity networks the state stands still); the
    networks are evaluated all the same.
    """

    zero_init: int = 1

    def __post_init__(self) -> None:
        if isinstance(self.zero_init, bool) or not isinstance(self.zero_init, int) or self.zero_init < 0:
            raise ValueError(f"CFGZero: zero_init must be a number of rows, 0 or more, got {self.zero_init!r}")


@dataclass(frozen=True)
class DynamicThreshold:
    """Dynamic thresholding (Saharia et al. 2022, section 2.3): D <- clip(D, -s, s) / s.

    s = the `percentile` quantile of |D| over the sample, at least 1 and at most ceiling.
    """

    percentile: float = 0.995
    ceiling: float = math.inf

    def __post_init__(self) -> None:
        _check("DynamicThreshold", "percentile", self.percentile, 0.0, 1.0)
        if isinstance(self.ceiling, bool) or not isinstance(self.ceiling, numbers.Real):
            raise TypeError(f"DynamicThreshold: ceiling must be a number, got {self.ceiling!r}")
        if not self.ceiling >= 1.0:
            raise ValueError(f"DynamicThreshold: ceiling must be 1 or more, got {self.ceiling}")


Rule = Rescale | APG | CFGZero


@dataclass(frozen=True)
class Reduction:
    """What the guide op is to do in every row: at most one rule, and the threshold."""

    rule: Rule | None = None
    threshold: DynamicThreshold | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.rule, Rescale | APG | CFGZero | None):
            raise TypeError(f"rule must be fd.guidance.Rescale, APG or CFGZero, got {self.rule!r}")
        if not isinstance(self.threshold, DynamicThreshold | None):
            raise TypeError(f"threshold must be a fd.guidance.DynamicThreshold, got {self.threshold!r}")

    @property
    def kind(self) -> int:
        """The guide op's number of the rule."""
        kinds = {Rescale: at.RESCALE, APG: at.APG, CFGZero: at.CFG_ZERO}
        return next((kind for rule, kind in kinds.items() if isinstance(self.rule, rule)), at.PLAIN)

    @property
    def settings(self) -> list[float]:
        """The guide op's settings, one number per column."""
        columns = [0.0] * at.SETTINGS
        if isinstance(self.rule, Rescale):
            columns[at.PHI] = self.rule.phi
        elif isinstance(self.rule, APG):
            columns[at.ETA], columns[at.BETA] = self.rule.eta, self.rule.momentum
            columns[at.RADIUS] = self.rule.norm_threshold
        if self.threshold is not None:
            columns[at.PERCENTILE], columns[at.CEILING] = self.threshold.percentile, self.threshold.ceiling
        return columns

    @property
    def work(self) -> tuple[int, bool]:
        """What the guide op is bound for: its rule and whether it thresholds; all else are settings."""
        return self.kind, self.threshold is not None

    @property
    def remembers(self) -> bool:
        """True when a row depends on the outputs of rows before it through the rule."""
        return isinstance(self.rule, APG) and self.rule.momentum != 0.0

    @property
    def muted(self) -> int:
        """In how many first evaluations the network's output is taken as 0."""
        return self.rule.zero_init if isinstance(self.rule, CFGZero) else 0


def reduction(rule: Rule | None, threshold: DynamicThreshold | None) -> Reduction | None:
    """The reduction a run needs, or None."""
    wanted = Reduction(rule, threshold)
    return None if rule is None and threshold is None else wanted


def _check(rule: str, name: str, value: float, low: float, high: float) -> None:
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{rule}: {name} must be a number, got {value!r}")
    if not (low <= value <= high and math.isfinite(value)):
        raise ValueError(f"{rule}: {name} must be a finite number from {low:g} to {high:g}, got {value}")
