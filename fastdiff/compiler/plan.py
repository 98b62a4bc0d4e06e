"""The table: a sampler on fixed levels as rows of float64 scalars, frozen.

May import: assemble, explain, layout, process. Executors never see a Plan, only what `pack` makes of it.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from fastdiff.compiler import layout as at
from fastdiff.compiler.assemble import Output, Row
from fastdiff.compiler.explain import explain
from fastdiff.process import predictions
from fastdiff.process.schedules import Level, Schedule

if TYPE_CHECKING:
    from fastdiff.compiler.verify import Report

_FORMAT = "fastdiff-plan-1"
OPENINGS = ("noise", "state", "image")
Interval = tuple[float, float] | None


@dataclass(frozen=True)
class Packed:
    """A plan as the row kernel reads it: coef fp32 [rows, *] and ids int32 [rows, *] (fastdiff.compiler.layout)."""

    coef: NDArray[np.float32]
    ids: NDArray[np.int32]


@dataclass(frozen=True)
class Plan:
    """A compiled sampler: rows of  r_o' = sum_i A[o,i] r_i + B[o] D + sum_k C[o,k] N(id_k).

    rows[0] is the opening row (no model evaluation: it makes the first state); each other row is one evaluation.
    registers: how many state-sized buffers the rows use. result: the register that ends as the sample.
    draws: how many unit normals the rows name (noise ids 0 .. draws - 1).
    latent_scale: what multiplies the latents; None: sigma of the first level.
    notes: what the solver had to say: where it lowered its order, and why.
    intervals: (sigma/alpha left, reached) that each draw covers on the way down, None where it is no part of it; empty
    where the sampler does not say.
    given: the register of each tensor that the caller fills before a run, by name. centre: which of them the process
    runs about, x = alpha x0 + (1 - alpha) centre + sigma n; None: about 0.
    """

    solver: str
    options: Mapping[str, Any]
    schedule: Schedule | None
    grid: str
    levels: tuple[Level, ...]
    rows: tuple[Row, ...]
    registers: int
    result: int
    draws: int
    latent_scale: float | None = None
    notes: tuple[str, ...] = ()
    intervals: tuple[Interval, ...] = ()
    given: Mapping[str, int] = field(default_factory=dict)
    centre: str | None = None

    @property
    def nfe(self) -> int:
        """Model evaluations in one run."""
        return sum(not row.reused for row in self.rows[1:])

    @property
    def reads_unguided(self) -> bool:
        """True when a row uses the unguided branch's own estimate, so that it evaluates both whatever the guidance."""
        return any(row.estimate == "unguided" for row in self.rows)

    @property
    def uses_second_estimate(self) -> bool:
        """True when a row gives its second estimate E a weight."""
        return any(output.other != 0.0 for row in self.rows for output in row.outputs)

    @property
    def learns_spread(self) -> bool:
        """True when the size of a row's noise is the network's to say."""
        return any(row.spread is not None for row in self.rows)

    @property
    def stochastic(self) -> bool:
        """True when the rows draw noise after the initial latents."""
        return self.draws > 0

    def explain(self) -> str:
        """The table as readable formulas, one line per register written."""
        return explain(self)

    def verify(self) -> Report:
        """Check the table against laws every sampler must obey; see `fastdiff.compiler.verify`."""
        from fastdiff.compiler.verify import verify

        return verify(self)

    def guided(
        self,
        *,
        interval: tuple[float, float] | None = None,
        schedule: Sequence[float] | Callable[[Level], float] | None = None,
        perturbed_interval: tuple[float, float] | None = None,
        cfg_pp: bool = False,
        clamp: tuple[float, float] | None = None,
    ) -> Plan:
        """The same sampler with what of guidance is linear written into its rows (fastdiff.compiler.guided).

        interval: (low, high) in sigma/alpha; rows outside it evaluate the conditional branch alone, half the batch
        (Kynkäänniemi et al. 2024). schedule: per row g in w_row = 1 + g (w - 1), not the scale itself: a number per
        evaluation or a function of the level. perturbed_interval: the levels where the perturbed branch is evaluated.
        cfg_pp: CFG++ (Chung et al. 2024) in the rows within interval, whose scale the paper takes from [0, 1]. clamp:
        bounds of D in every row, but not of E, a second estimate that some rows use. Raises ValueError for values that
        do not fit and, with cfg_pp, for a plan that does not say what levels it reaches or does not carry its state on.
        """
        from fastdiff.compiler import guided

        rows = self.rows
        if interval is not None:
            rows = guided.within(rows, interval)
        if perturbed_interval is not None:
            rows = guided.perturbed_within(rows, perturbed_interval)
        if cfg_pp:
            rows = guided.plus_plus(replace(self, rows=rows)).rows
        if schedule is not None:
            rows = guided.scheduled(rows, schedule)
        return replace(self, rows=rows if clamp is None else guided.clamped(rows, clamp))

    def skipping(self, rows: Sequence[int] | None = None, *, every: int | None = None, order: int = 2) -> Plan:
        """An approximation: some rows do not ask the network, its output is extrapolated (fastdiff.compiler.skipping).

        rows: which, counted from 0, or every: all but each every-th and the last. order: from how many outputs it is
        extrapolated; 1 repeats the last one, which is what samplers that add noise want. `nfe` counts the rows that
        ask. A clamp is not applied to what is extrapolated. Raises ValueError for rows that cannot be skipped, and
        where a row would need more registers than the kernel has.
        """
        from fastdiff.compiler.skipping import extrapolated

        return extrapolated(self, rows, every, order)

    def pack(
        self,
        prediction: str | None = None,
        sigma_data: float | None = None,
        opening: str = "noise",
        latent_id: int = 0,
    ) -> Packed:
        """Fold the prediction type and preconditioning in, choose the delta form, and round once to fp32.

        prediction: what the network returns (fastdiff.process.predictions); None: D itself. sigma_data: for "edm".
        opening: "noise" starts from sigma_0 N(latent), "state" from register 0 as it is, "image" from
        alpha_0 * register 0 + sigma_0 N(latent); with a centre, "noise" adds it and "image" (1 - alpha_0) of it.
        latent_id: the noise id of the latents.
        A row with a reading of its own keeps it, whatever `prediction` says.
        Raises ValueError for a prediction that is undefined at one of the plan's levels.
        """
        expected = self.options.get("prediction")
        if expected is not None and prediction not in (expected, None):
            if self.rows[-1].reading is None:
                raise ValueError(
                    f"this plan of {self.solver} is for a network that predicts {expected!r}, got one that predicts "
                    f"{prediction!r}; its option prediction= says what the network predicts"
                )
            raise ValueError(
                f"this plan was captured from a scheduler whose network predicts {expected!r}, got a network that "
                f"predicts {prediction!r}; give the scheduler its prediction_type and capture it again"
            )
        terms = max(len(row.noise) for row in self.rows) + 1
        coef = np.zeros((len(self.rows), at.COEF_FIXED + at.NOISE_STRIDE * terms))
        ids = np.zeros((len(self.rows), at.IDS_FIXED + at.TERM_IDS_STRIDE * terms), dtype=np.int32)
        folds = [self._reading(row, prediction or "x0", sigma_data) for row in self.rows[1:]]
        for i, row in enumerate(self.rows):
            if i and not row.reused:
                coef[i, [at.P, at.Q]] = folds[i - 1].P, 0.0 if row.muted else folds[i - 1].Q
                ids[i, at.FLAGS] = at.READS_MODEL + at.E_UNGUIDED * (row.estimate == "unguided")
            if row.spread is not None:
                ids[i, at.FLAGS] += at.SPREADS_NOISE
                coef[i, [at.SPREAD_LOG, at.SPREAD_SLOPE]] = row.spread
            coef[i, [at.GAIN, at.PERTURB]] = row.gain, row.perturb
            coef[i, [at.CLAMP_LO, at.CLAMP_HI]] = row.clamp or (-np.inf, np.inf)
            following = folds[i] if i < len(folds) else None
            coef[i, [at.EMIT_SCALE, at.EMIT_TIME]] = (following.c_in, following.time) if following else (1.0, 0.0)
            _pack_row(row, coef[i], ids[i])
        self._pack_opening(opening, latent_id, coef[0], ids[0])
        return Packed(self._rounded(coef), ids)

    def _rounded(self, coef: NDArray[np.float64]) -> NDArray[np.float32]:
        with np.errstate(over="ignore"):
            rounded = coef.astype(np.float32)
        bad = ~np.isfinite(rounded)
        bad[:, [at.CLAMP_LO, at.CLAMP_HI]] = False
        if bad.any():
            row = int(bad.any(axis=1).argmax())
            raise ValueError(
                f"{self.solver}: {'the opening row' if row == 0 else f'row {row - 1}'} has a coefficient outside "
                f"float32 ({coef[row][bad[row]][0]:.3g}); choose levels whose sigma/alpha is less extreme"
            )
        return rounded

    def _reading(self, row: Row, prediction: str, sigma_data: float | None) -> predictions.Prediction:
        if row.reading is not None:
            return row.reading
        assert row.level is not None
        return predictions.coefficients(prediction, row.level, self.schedule, sigma_data)

    def _pack_opening(self, opening: str, latent_id: int, coef: NDArray[np.float64], ids: NDArray[np.int32]) -> None:
        if opening not in OPENINGS:
            raise ValueError(f"opening must be one of {', '.join(OPENINGS)}, got {opening!r}")
        if opening == "state":
            return
        first = self.levels[0]
        sigma = first.sigma if opening == "image" or self.latent_scale is None else self.latent_scale
        term = int(ids[at.TERMS])
        ids[at.TERMS] = term + 1
        ids[[at.TERM_IDS + 2 * term, at.TERM_IDS + 2 * term + 1]] = latent_id, at.STREAM_LATENT
        for o, output in enumerate(self.rows[0].outputs):
            column = at.OUTPUT + at.OUTPUT_STRIDE * o
            coef[column + at.OUT_DELTA] = 0.0
            coef[column + at.OUT_K] = output.x * first.alpha if opening == "image" else 0.0
            coef[at.NOISE + at.NOISE_STRIDE * term + o] = output.x * sigma
        if self.centre is not None:
            slot = self._opening_slot(self.given[self.centre], ids)
            weight = 1.0 - first.alpha if opening == "image" else 1.0
            for o, output in enumerate(self.rows[0].outputs):
                coef[at.OUTPUT + at.OUTPUT_STRIDE * o + at.OUT_A + slot] += output.x * weight

    def _opening_slot(self, register: int, ids: NDArray[np.int32]) -> int:
        """Which input of the opening row this register is; a new one where the row does not read it yet."""
        if register in self.rows[0].slots:
            return self.rows[0].slots.index(register)
        slot = int(ids[at.SLOTS])
        ids[at.SLOTS], ids[at.SLOT + 1 + slot] = slot + 1, register
        return slot

    def to_json(self) -> str:
        """The plan as JSON text with a digest; `Plan.from_json` gives it back bit for bit."""
        schedule = None if self.schedule is None else self.schedule.to_dict()
        body = {f.name: getattr(self, f.name) for f in fields(self)} | {"schedule": schedule}
        body = _portable(body)
        return json.dumps({"format": _FORMAT, "digest": _digest(body), "plan": body}, indent=1, allow_nan=False)

    @staticmethod
    def from_json(text: str) -> Plan:
        """Read a plan; ValueError when the text is truncated, edited, or not a plan."""
        try:
            document = json.loads(text)
        except json.JSONDecodeError as error:
            raise ValueError(
                f"not a complete plan: {error}; the file is truncated or not JSON. Write it again with plan.to_json()"
            ) from None
        if not isinstance(document, dict) or document.get("format") != _FORMAT or "plan" not in document:
            raise ValueError(
                f"not a plan: expected a JSON object with format {_FORMAT!r}; write it with plan.to_json()"
            )
        body = document["plan"]
        if _digest(body) != document.get("digest"):
            raise ValueError(
                "the plan's digest does not match its rows: the file was edited or damaged. "
                "Change the solver's options and compile it again instead of editing the table"
            )
        body = _unported(body)
        return Plan(
            solver=body["solver"],
            options=body["options"],
            schedule=None if body["schedule"] is None else Schedule.from_dict(body["schedule"]),
            grid=body["grid"],
            levels=tuple(Level(**level) for level in body["levels"]),
            rows=tuple(_row(row) for row in body["rows"]),
            registers=body["registers"],
            result=body["result"],
            draws=body["draws"],
            latent_scale=body.get("latent_scale"),
            notes=tuple(body.get("notes", ())),
            intervals=tuple(None if pair is None else (pair[0], pair[1]) for pair in body.get("intervals", ())),
            given=body.get("given", {}),
            centre=body.get("centre"),
        )


def _pack_row(row: Row, coef: NDArray[np.float64], ids: NDArray[np.int32]) -> None:
    ids[at.SLOT : at.SLOT + at.MAX_SLOTS] = -1
    ids[at.DEST : at.DEST + at.MAX_OUTPUTS] = -1
    ids[at.SLOT] = row.x
    ids[at.SLOT + 1 : at.SLOT + 1 + len(row.slots)] = row.slots
    ids[at.SLOTS] = len(row.slots)
    ids[at.TERMS] = len(row.noise)
    for t, name in enumerate(row.noise):
        ids[at.TERM_IDS + 2 * t : at.TERM_IDS + 2 * t + 2] = name
    for o, output in enumerate(row.outputs):
        ids[at.DEST + o] = output.dest
        column = at.OUTPUT + at.OUTPUT_STRIDE * o
        total = _total(output)
        delta = is_delta(output)
        coef[column + at.OUT_K] = total - 1.0 if delta else output.x
        coef[column + at.OUT_DELTA] = float(delta)
        coef[column + at.OUT_B] = output.denoised
        coef[column + at.OUT_E] = output.other
        coef[column + at.OUT_A : column + at.OUT_A + len(output.slots)] = output.slots
        coef[at.NOISE + o : at.NOISE + o + at.NOISE_STRIDE * len(output.noise) : at.NOISE_STRIDE] = output.noise


def is_delta(output: Output) -> bool:
    """Evaluate as x + sum c_j (r_j - x) + (sum c - 1) x: less rounding where the new value stays close to x."""
    return abs(output.x) >= 0.5 and abs(_total(output) - 1.0) <= 0.5


def _total(output: Output) -> float:
    return output.x + output.denoised + output.other + sum(output.slots)


def _row(body: dict[str, Any]) -> Row:
    return Row(
        level=None if body["level"] is None else Level(**body["level"]),
        x=body["x"],
        slots=tuple(body["slots"]),
        outputs=tuple(
            Output(o["dest"], o["x"], tuple(o["slots"]), o["denoised"], tuple(o["noise"]), o.get("other", 0.0))
            for o in body["outputs"]
        ),
        noise=tuple((index, stream) for index, stream in body["noise"]),
        gain=body["gain"],
        reading=None if body.get("reading") is None else predictions.Prediction(**body["reading"]),
        clamp=_pair(body.get("clamp")),
        estimate=body.get("estimate"),
        spread=_pair(body.get("spread")),
        perturb=body.get("perturb", 1.0),
        muted=body.get("muted", False),
        reused=body.get("reused", False),
    )


def _pair(value: list[float] | None) -> tuple[float, float] | None:
    return None if value is None else (value[0], value[1])


def _portable(value: Any) -> Any:
    """Rows and levels as dictionaries; inf and nan, which JSON does not have, as {"float": "inf"}."""
    if isinstance(value, float):
        return value if math.isfinite(value) else {"float": repr(value)}
    if isinstance(value, Mapping):
        return {key: _portable(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_portable(item) for item in value]
    if is_dataclass(value):
        return {f.name: _portable(getattr(value, f.name)) for f in fields(value)}
    return value


def _unported(value: Any) -> Any:
    if isinstance(value, dict):
        if value.keys() == {"float"}:
            return float(value["float"])
        return {key: _unported(item) for key, item in value.items()}
    return [_unported(item) for item in value] if isinstance(value, list) else value


def _digest(body: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
