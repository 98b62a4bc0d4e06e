"""One sample's way through an adaptive run: which rows come next, and what an error makes of them.

May import: adaptive, assemble, brownian, layout, solvers.steps, step_control. The caller runs the rows (on a device, or
in NumPy) and reports the error; nothing here sees a state.
"""

from __future__ import annotations

import math

from fastdiff.compiler import brownian
from fastdiff.compiler import layout as at
from fastdiff.compiler.adaptive import AdaptivePlan, Phase
from fastdiff.compiler.assemble import Output, Row
from fastdiff.compiler.solvers.steps import ancestral_split
from fastdiff.compiler.step_control import StepSize
from fastdiff.process.schedules import Level

SMALLEST = 1e-6  # a step in log(alpha/sigma) below this is none in float32

Noise = tuple[tuple[tuple[int, int], ...], tuple[float, ...]]  # (id, stream) of the normals, and their weights
SILENT: Noise = ((), ())


class Walk:
    """The steps of one sample. level: where it is. accepted, rejected, evaluations: so far; grid: levels reached.

    path: noise are increments of one Brownian path, and steps end where the path has a short name (`brownian.near`);
    else a fresh normal for each accepted step.
    """

    def __init__(self, plan: AdaptivePlan, sample: int = 0, path: bool = False) -> None:
        self.plan = plan
        self.level = plan.first
        self.accepted = self.rejected = 0
        self.evaluations = len(plan.start.rows) - 1
        self.grid = [self.level]
        self._sample, self._path = sample, path and plan.stochastic
        self._size = StepSize(plan.method.control)
        self._sources = tuple(range(plan.method.held))  # the registers with what is held now
        self._noise = SILENT  # to be added to register 0
        self._ahead: tuple[Phase, Level, Noise] | None = None

    @property
    def done(self) -> bool:
        """Whether the last level is reached."""
        return self.level.rho <= self.plan.last.rho

    def trial(self) -> tuple[Row, ...]:
        """The rows of the next trial step; the first evaluates nothing and takes the last accepted step into effect.

        Raises FloatingPointError where the steps become too small or too many.
        """
        self._check()
        target = self.plan.level(self.level.lam + self._size.h)
        if self._path and target != self.plan.last:
            target = self.plan.level(-math.log(brownian.near(target.rho, self._size.h)))
        down, noise = self._landing(target)
        phase = self.plan.trial(self.level, down)
        if phase.results != self.plan.example.results:
            raise ValueError(f"{self.plan.solver}: a trial step left its results in other registers than the first one")
        rows = (self._commit(phase.rows[0], lasting=True), *phase.rows[1:])
        self._ahead = (phase, target, noise)
        self._sources, self._noise = tuple(range(self.plan.method.held)), SILENT
        self.evaluations += len(rows) - 1
        return rows

    def judge(self, error: float) -> None:
        """Accept or reject the trial step from the norm of its error, in units of the tolerance."""
        assert self._ahead is not None
        phase, target, noise = self._ahead
        if not self._size.judge(error):
            self.rejected += 1
            return
        self.accepted += 1
        self.level = target
        self.grid.append(target)
        end, _, *carried = phase.results
        self._sources, self._noise = (end, *carried), noise

    def finish(self) -> tuple[Row, ...]:
        """The rows that end the run; the first evaluates nothing."""
        first, *rows = self.plan.finish.rows
        self.evaluations += len(rows)
        return (self._commit(first, lasting=False), *rows)

    def _commit(self, opening: Row, lasting: bool) -> Row:
        """The row `opening`, reading what is held from where it lies now and, if lasting, bringing it home."""
        names, normals = self._noise
        slots = tuple(r for i, r in enumerate(self._sources) if i)

        def output(dest: int, weights: list[float]) -> Output:
            return Output(dest, weights[0], tuple(weights[1:]), 0.0, tuple(weights[0] * c for c in normals))

        ((target, x, others),) = [(o.dest, o.x, o.slots) for o in opening.outputs]
        read = dict(zip(opening.slots, others, strict=True))
        outputs = [output(target, [x, *(read.get(i, 0.0) for i in range(1, len(self._sources)))])]
        if lasting and self._sources != tuple(range(len(self._sources))):
            count = len(self._sources)
            outputs += [output(i, [float(i == j) for j in range(count)]) for i in range(count)]
        return Row(None, self._sources[0], slots, tuple(outputs), names)

    def _landing(self, t: Level) -> tuple[Level, Noise]:
        """Where a step to t ends before its noise, and the noise."""
        eta, s_noise = self.plan.method.noise
        if eta == 0.0:
            return t, SILENT
        rho = max(self.plan.last.rho, ancestral_split(self.level, t, eta)[0])
        down = self.plan.level(-math.log(rho))
        added = s_noise * math.sqrt(max(0.0, t.rho**2 - down.rho**2))
        if added == 0.0:
            return down, SILENT
        if not self._path:
            return down, (((self.accepted, at.STREAM_STEP),), (added,))
        draw = brownian.increment(self.level.rho, t.rho)
        return down, (tuple((node, at.STREAM_BROWNIAN) for node in draw), tuple(added * w for w in draw.values()))

    def _check(self) -> None:
        where = f"sample {self._sample} at sigma/alpha={self.level.rho:.4g}, time={self.level.time:.6g}"
        counts = f"{self.accepted} steps accepted, {self.rejected} rejected"
        if self._size.h < (max(SMALLEST, 2.0 * brownian.RESOLUTION) if self._path else SMALLEST):
            raise FloatingPointError(
                f"{self.plan.solver}: the step size of {where} fell to {self._size.h:.1e} in log(alpha/sigma) "
                f"({counts}); no image was made. The network's output is not smooth at this tolerance: raise rtol and "
                "atol, or run it in float32"
            )
        if self.accepted + self.rejected >= self.plan.method.max_steps:
            raise FloatingPointError(
                f"{self.plan.solver}: {where} needs more than max_steps={self.plan.method.max_steps} trial steps "
                f"({counts}); no image was made. Raise rtol and atol, or max_steps"
            )
