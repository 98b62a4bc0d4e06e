"""The basis run: every value of a step is a vector with a single 1, so what comes back is its coefficients.

May import: torch, run, lin, process, and the other files of this folder but the proof.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastdiff.compiler.capture import readings
from fastdiff.compiler.capture.intercept import Intercept
from fastdiff.compiler.capture.source import Refused, Source, latent_scale
from fastdiff.compiler.capture.stored import Leaf, leaves_of
from fastdiff.compiler.lin import Atom, Lin
from fastdiff.compiler.run import Run
from fastdiff.process.predictions import Prediction
from fastdiff.process.schedules import Level

SMALLEST, PER_STEP = (
    67,
    4,
)  # elements of a basis vector: for schedulers that keep a tensor of every step, this many a step
TRIED = range(0, 28, 4)  # added to it until no tensor of the scheduler has that size
ROUNDING = {False: 1e-12, True: 1e-6}  # what remains of a sum that cancels, relative to its terms: float64, float32


@dataclass(frozen=True)
class Found:
    """What the basis run measured. quantile: as in `Intercept`."""

    run: Run
    result: Lin
    readings: list[Prediction]
    clamps: list[tuple[float, float] | None]
    last: Level
    latent_scale: float
    precision: str
    quantile: bool


def measure(source: Source, every_call: bool) -> Found:
    """Run the scheduler once on unit vectors and write down every step as a segment of a run.

    every_call: as in `Intercept`.
    """
    run = Run(source.name, (), None)
    scheduler = source.fresh(lambda *sigmas: basis.draw_between(*sigmas))
    times = source.times(scheduler)
    basis = Basis(run, source.name, _free_size(source.name, scheduler, len(times)), every_call)
    found: list[Prediction] = []
    folds: list[_Fold] = []
    state = run.start
    stored: list[tuple[Leaf, Lin]] = []
    for i, time in enumerate(times):
        run.carry(state, [value for _, value in stored if all(atom.kind != "F" for atom in value.terms)])
        denoised = run.denoise(state, Level(1.0, math.nan, float(time)))
        (x,), (D,) = state.terms, denoised.terms
        F = Atom("F", i)
        basis.begin(i, x, F, D)
        for leaf, value in stored:
            leaf.write(basis.vector(value.terms, leaf.value.dtype).reshape(leaf.value.shape))
        following = times[i + 1] if i + 1 < len(times) else None
        with basis.watching():
            c_in = _input_scale(basis, source.scaled(scheduler, i, basis.vector({x: 1.0}), time))
            was = readings.level(scheduler, source.first + i, float(time))
            outcome, result = source.step(scheduler, i, basis.vector({F: 1.0}), time, basis.vector({x: 1.0}), following)
        fold = _fold(basis, scheduler, result, was, c_in)
        folds.append(fold)
        found.append(Prediction(fold.P, fold.Q, c_in, float(time)))
        run.segments[-1].level = Level(fold.level.alpha, fold.level.sigma, float(time))
        state = run.linear(_in_estimates(basis, basis.read(outcome), fold))
        if F in state.terms:
            raise TypeError(
                f"{source.name}, step {i}: clips its estimate of a noise-free state, which does not contain the model "
                "output, and uses that output beside it; set clip_sample=False"
            )
        leaves = leaves_of(scheduler, basis.numel)
        stored = [(leaf, run.linear(_in_estimates(basis, basis.read(leaf.value), fold))) for leaf in leaves]
    return Found(
        run=run,
        result=state,
        readings=found,
        clamps=[fold.clamp for fold in folds],
        last=readings.last_level(scheduler),
        latent_scale=latent_scale(scheduler),
        precision="float32" if basis.single else "float64",
        quantile=basis.quantile,
    )


def _input_scale(basis: Basis, scaled: Tensor) -> float:
    terms = basis.read(scaled)
    if set(terms) != {basis.x}:
        raise TypeError(
            f"{basis.name}, step {basis.number}: scale_model_input gives something else than a multiple of the state"
        )
    return terms[basis.x]


@dataclass(frozen=True)
class _Fold:
    """How a step reads its network: D = P x + Q F, clipped, at this level."""

    P: float
    Q: float
    level: Level
    clamp: tuple[float, float] | None


def _fold(basis: Basis, scheduler: Any, result: Any, was: Level | None, c_in: float) -> _Fold:
    """From the argument of the clamp, else from `pred_original_sample`, else from the prediction type in the config."""
    prediction = getattr(result, "pred_original_sample", None)
    terms: dict[Atom, float] = {}
    clamp = None
    if basis.cut is not None:
        terms, clamp = basis.cut
    elif isinstance(prediction, Tensor) and prediction.numel() == basis.numel:
        terms = basis.read(prediction)
    P, Q = terms.get(basis.x, 0.0), terms.get(basis.raw, 0.0)
    usable = Q != 0.0 and set(terms) <= {basis.x, basis.raw} and max(abs(P), abs(Q)) <= readings.LARGEST
    if usable or clamp is not None:
        level = readings.level_of(readings.kind(scheduler), P, Q, c_in) or was
    else:
        (P, Q), level = readings.fold(scheduler, was, c_in), was
    return _Fold(P, Q, level or Level(1.0, math.nan), clamp)


def _in_estimates(basis: Basis, terms: dict[Atom, float], fold: _Fold) -> dict[Atom, float]:
    """Replace F by (D - P x) / Q, D before its clamp; what cancels up to the scheduler's rounding is gone."""
    raw = terms.get(basis.raw, 0.0)
    if raw == 0.0 or fold.Q == 0.0:
        return terms
    own, back = terms.get(basis.x, 0.0), -raw * fold.P / fold.Q
    rest = own + back
    if abs(rest) <= ROUNDING[basis.single] * (abs(own) + abs(back)):
        rest = 0.0
    (estimate,) = {basis.denoised: 1.0} if fold.clamp is None else basis.run.unclamped().terms
    changed = {atom: c for atom, c in terms.items() if atom not in (basis.raw, basis.x)}
    return {**changed, basis.x: rest, estimate: raw / fold.Q}


class Basis(Intercept):
    """Values of one step as unit vectors: `vector` writes a Lin, `read` finds the coefficients again."""

    def __init__(self, run: Run, name: str, numel: int, every_call: bool) -> None:
        super().__init__(numel, every_call)
        self.run, self.name = run, name
        self._places: dict[Atom, int] = {}
        self._next = 0
        self.cut: tuple[dict[Atom, float], tuple[float, float]] | None = None

    def begin(self, step: int, x: Atom, raw: Atom, denoised: Atom) -> None:
        """A new step: new places for everything."""
        self.number, self.x, self.raw, self.denoised = step, x, raw, denoised
        self._places, self.cut = {}, None
        self._place(x), self._place(raw)

    def vector(self, terms: Mapping[Atom, float], dtype: torch.dtype = torch.float64) -> Tensor:
        """The vector of a combination."""
        numbers = np.zeros((1, 1, 1, self.numel))
        for atom, c in terms.items():
            numbers[..., self._place(atom)] = c
        return self.watched(torch.from_numpy(numbers).to(dtype))

    def read(self, value: Tensor) -> dict[Atom, float]:
        """The combination a tensor is."""
        numbers = value.detach().as_subclass(Tensor).reshape(-1).double().numpy()
        if not np.isfinite(numbers).all():
            raise TypeError(
                f"{self.name}, step {self.number}: gives inf or nan on finite tensors; it divides by zero there"
            )
        places = list(self._places.values())
        terms = {atom: c for atom, c in zip(self._places, numbers[places].tolist(), strict=True) if c != 0.0}
        if np.count_nonzero(numbers) > len(terms):
            rest = np.delete(numbers, places)
            if (rest == rest[0]).all():
                what = f"adds the constant {rest[0]:.6g} to every element, and a row has no constants"
            else:
                what = (
                    "uses a tensor from an earlier step that is not in its attributes, so the capture cannot see it; "
                    "keep it in an attribute, a list or a dict of the scheduler"
                )
            raise TypeError(f"{self.name}, step {self.number}: {what}")
        return terms

    def draw(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        return self._normal(self.run.noise(), dtype).reshape(shape)

    def draw_between(self, sigma: Any, following: Any) -> Tensor:
        """A draw of the scheduler's Brownian tree, from one sigma to another."""
        low, high = sorted((float(sigma), float(following)))
        return self._normal(self.run.noise(Level(1.0, high), Level(1.0, low)), torch.float64)

    def _normal(self, drawn: Lin, dtype: torch.dtype) -> Tensor:
        (atom,) = drawn.terms
        return self.vector({atom: 1.0}, dtype)

    def clamp(self, value: Tensor, low: float, high: float) -> Tensor:
        try:
            terms = self.read(value)
        except TypeError as error:
            raise Refused(error) from None
        if set(terms) == {self.denoised} and terms[self.denoised] == 1.0:
            assert self.cut is not None
            if self.cut[1] == (low, high):
                return value
        if self.cut is not None and self.cut != (terms, (low, high)):
            raise self._refused("clips twice, and a row clips its denoised estimate once")
        if not set(terms) <= {self.x, self.raw}:
            raise self._refused("clips something else than a combination of the state and the model output")
        self.cut = (terms, (low, high))
        return self.vector({self.denoised: 1.0}, value.dtype).reshape(value.shape)

    def _refused(self, what: str) -> Refused:
        return Refused(TypeError(f"{self.name}, step {self.number}: {what}"))

    def _place(self, atom: Atom) -> int:
        if atom not in self._places:
            if len(self._places) >= self.numel // 3:
                raise self._refused(f"keeps or draws more than {self.numel // 3} tensors in one step")
            self._places[atom] = self._next
            self._next = (self._next + 1) % self.numel
        return self._places[atom]


def _free_size(name: str, scheduler: Any, steps: int) -> int:
    least = max(SMALLEST, PER_STEP * steps + 3)
    sizes = [least + more for more in TRIED]
    for size in sizes:
        if not leaves_of(scheduler, size):
            return size
    raise TypeError(f"{name} has tensors of all sizes {sizes}; choose another number of steps")
