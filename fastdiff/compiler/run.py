"""Run a solver function once on symbolic registers and write down what it did.

May import: lin, process. A solver sees a `Run`: its levels, `denoise` (one model evaluation, one row),
`noise` (a fresh unit normal), `keep` (record a combination in a register) and `given` (a register the caller fills).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from fastdiff.compiler.layout import STREAM_STEP
from fastdiff.compiler.lin import Atom, Lin, nonzero
from fastdiff.process.schedules import Level, Schedule

PARALLEL = 1e-14  # relative; combinations this close to multiples of each other share a register


@dataclass
class Segment:
    """What a sampler computes between one model evaluation and the next.

    level: where the model was evaluated (None before the first evaluation);
    kept: combinations recorded here; state: what the next row evaluates, or the result.
    estimate: what E is in this row, "unguided" or "unclamped"; spread: (log, slope) of the noise's learned spread.
    """

    level: Level | None
    kept: dict[Atom, dict[Atom, float]] = field(default_factory=dict)
    state: dict[Atom, float] = field(default_factory=dict)
    estimate: str | None = None
    spread: tuple[float, float] | None = None


class Run:
    """One symbolic run of a solver over `levels` (descending, the last one where the sample is wanted)."""

    def __init__(self, solver: str, levels: Sequence[Level], schedule: Schedule | None) -> None:
        self.solver = solver
        self.levels = tuple(levels)
        self.schedule = schedule
        self.segments = [Segment(level=None)]
        self.draws = 0
        self.drawn_in: list[int] = []
        self.drawn_over: dict[int, tuple[float, float] | None] = {}
        self._interval: tuple[float, float] | None = None
        self.givens: list[str] = []
        self.centre: str | None = None
        self.notes: list[str] = []
        self._kept = 0
        self.start = self._lin(Atom("start", 0))

    @property
    def steps(self) -> int:
        """The number of intervals between levels."""
        return len(self.levels) - 1

    def intervals(self) -> Iterator[tuple[int, Level, Level]]:
        """(i, s, t): the i-th interval goes from level s down to level t."""
        for i in range(self.steps):
            s, t = self.levels[i], self.levels[i + 1]
            self._interval = s.rho, t.rho
            yield i, s, t

    def denoise(self, x: Lin, level: Level) -> Lin:
        """D(x; level), one model evaluation: the current row ends here and `x` becomes a register."""
        if not isinstance(x, Lin) or not isinstance(level, Level):
            raise TypeError(
                f"{self._where()} calls run.denoise(state, level) with {type(x).__name__} and {type(level).__name__}; "
                "the state is a register, the level one of run.intervals() or run.levels"
            )
        row = len(self.segments) - 1
        self.segments[-1].state = x.terms
        x.become(Atom("x", row))
        self.segments.append(Segment(level=level))
        return self._lin(Atom("D", row))

    def unclamped(self) -> Lin:
        """The current row's estimate before its clamp; D itself where nothing is clamped."""
        self.segments[-1].estimate = "unclamped"
        return self._lin(Atom("E", len(self.segments) - 2))

    def spread_noise(self, log_low: float, log_high: float) -> None:
        """Multiply this row's noise, element by element, by exp(((1 - V) log_low + (1 + V) log_high) / 2).

        V in [-1, 1] is what a network with a learned variance says (Nichol and Dhariwal 2021, eq. 15, v = (1 + V)/2).
        """
        self.segments[-1].spread = (0.5 * (log_low + log_high), 0.5 * (log_high - log_low))

    def noise(self, s: Level | None = None, t: Level | None = None) -> Lin:
        """A fresh unit normal; use the same value again to reuse the draw.

        s, t: the levels it covers on the way down, by default the interval the solver is in. Under noise="brownian" it
        is the increment of the sample's path there, so a solver that draws twice in an interval says which part each
        draw covers: parts that overlap give correlated normals.
        """
        if s is not None and t is not None:
            self.drawn_over[self.draws] = s.rho, t.rho
        elif self._interval is not None:
            self.drawn_over[self.draws] = self._interval
            self._interval = None  # a second draw here does not say what it covers
        return self._draw()

    def white_noise(self) -> Lin:
        """A fresh unit normal under any noise: for churn and Langevin steps, which are no part of the way down."""
        self.drawn_over[self.draws] = None
        return self._draw()

    def _draw(self) -> Lin:
        self.draws += 1
        self.drawn_in.append(len(self.segments) - 1)
        return self._lin(Atom("z", self.draws - 1, STREAM_STEP))

    @property
    def intervals_drawn(self) -> tuple[tuple[float, float] | None, ...]:
        """(sigma/alpha left, reached) of every draw, None for white noise; () if the solver did not say of all."""
        return tuple(self.drawn_over[i] for i in range(self.draws)) if len(self.drawn_over) == self.draws else ()

    def given(self, name: str, *, centre: bool = False) -> Lin:
        """A tensor of the state's shape that the caller gives each run: `Sampler.sample(..., given={name: tensor})`.

        centre: the process runs about it, x = alpha x0 + (1 - alpha) centre + sigma n, so that a run which starts from
        noise starts from centre + sigma n, and one which starts from an image from that image noised in this way.
        """
        if name not in self.givens:
            self.givens.append(name)
        if centre:
            self.centre = name
        return self._lin(Atom("given", self.givens.index(name)))

    def keep(self, value: Lin) -> Lin:
        """Record a combination in a register of its own, so that later rows read it instead of its parts."""
        atom = Atom("kept", self._kept)
        self._kept += 1
        self.segments[-1].kept[atom] = value.terms
        return self._lin(atom)

    def carry(self, state: Lin, values: Iterable[Lin]) -> None:
        """Before `denoise(state)`: give every combination among `values` that later rows may read a register.

        Multiples of the state are read from the state's register, and multiples of each other share one. The values
        stay what they are; only how they are written down changes.
        """
        kept: list[tuple[dict[Atom, float], Lin]] = []
        for value in values:
            terms = value.terms
            if value is state or not terms:
                continue
            factor = multiple(terms, state.terms)
            if factor is not None:
                value.terms = {Atom("x", len(self.segments) - 1): factor}
            elif len(terms) > 1:
                value.terms = self._kept_as(value, kept)

    def _kept_as(self, value: Lin, kept: list[tuple[dict[Atom, float], Lin]]) -> dict[Atom, float]:
        """The value over a kept combination: one of `kept` if it is a multiple of that, else a new one."""
        for terms, register in kept:
            factor = multiple(value.terms, terms)
            if factor is not None:
                return {atom: factor * c for atom, c in register.terms.items()}
        kept.append((value.terms, self.keep(value)))
        return kept[-1][1].terms

    def note(self, text: str) -> None:
        """Say something about this plan that its reader should know; `explain()` shows it."""
        self.notes.append(text)

    def finish(self, x: Lin) -> list[Segment]:
        """Close the run with its result."""
        self.segments[-1].state = x.terms
        return self.segments

    def level_from_rho(self, rho: float) -> Level:
        """The level of the plan's schedule with sigma / alpha = rho."""
        if self.schedule is None:
            return Level(alpha=1.0, sigma=rho, time=float("nan"))
        return self.schedule.level_from_rho(rho, clip=True)

    def linear(self, terms: dict[Atom, float]) -> Lin:
        """A combination of atoms of this run."""
        return Lin(nonzero(terms), self._where)

    def level_between(self, s: Level, t: Level, r: float) -> Level:
        """The level at lambda_s + r (lambda_t - lambda_s), lambda = log(alpha/sigma); r = 1 is t itself."""
        return t if r == 1.0 else self.level_from_rho(s.rho ** (1.0 - r) * t.rho**r)

    def _lin(self, atom: Atom) -> Lin:
        return Lin({atom: 1.0}, self._where)

    def _where(self) -> str:
        row = len(self.segments) - 2
        return f"solver {self.solver!r}, {'before row 0' if row < 0 else f'row {row}'},"


def record(solver: str, function: Callable[..., Lin], run: Run, options: dict[str, object]) -> list[Segment]:
    """Run `function(run, x, **options)` on symbolic registers; a result that is not affine is a TypeError."""
    result = function(run, run.start, **options)
    if not isinstance(result, Lin):
        raise TypeError(
            f"solver {solver!r} returned {type(result).__name__}, expected the final state (a symbolic register); "
            "return x at the end of the function"
        )
    return run.finish(result)


def multiple(terms: Mapping[Atom, float], of: Mapping[Atom, float]) -> float | None:
    """c with terms = c * of, or None."""
    if terms.keys() != of.keys() or not terms:
        return None
    pivot = max(of, key=lambda atom: abs(of[atom]))
    factor = terms[pivot] / of[pivot]
    same = all(abs(c - factor * of[atom]) <= PARALLEL * abs(c) for atom, c in terms.items())
    return factor if same else None
