"""A diffusers-style scheduler object to a Plan: run it once, unmodified, on basis vectors.

May import: torch, run, lin, assemble, plan, readings, verify, process.

The state, the model output, every tensor the scheduler has stored and every normal it draws are a vector each with a
single 1; each element of what `step` returns or stores is then one coefficient of the row, exact in the scheduler's own
arithmetic. Between steps the stored tensors (found by walking the object's attributes, lists and dicts) are replaced by
the basis vectors of the registers they have become, so every step is measured on its own. The places of the ones
rotate, so a tensor that the walk cannot see betrays itself by an old place. A clamp of a combination of state and
output is cut: its argument is the row's D = P x + Q F, its result a new basis vector. A second run on random tensors
is compared with the table, state by state, and anything that is not affine differs there.

The rows are in D where the scheduler says what its network predicts (`pred_original_sample`, a clamp, or the
prediction type in its config), else in D := F; each row carries P, Q, c_in = scale_model_input, the model time and the
clamp, so the network's own `prediction` is not asked for. Brownian noise is replaced by white noise.
"""

from __future__ import annotations

import copy
import inspect
import math
from collections.abc import Callable, Mapping, MutableSequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from fastdiff.compiler import readings
from fastdiff.compiler.assemble import Row, assemble
from fastdiff.compiler.lin import Atom, Lin
from fastdiff.compiler.plan import Plan
from fastdiff.compiler.run import Run
from fastdiff.compiler.verify import execute
from fastdiff.process.predictions import Prediction
from fastdiff.process.schedules import Level

Array = np.ndarray[Any, np.dtype[np.float64]]

SIZES = (67, 71, 73, 79, 83, 89, 97)  # elements of a basis vector: the first that no tensor of the scheduler has
SHAPE = (2, 3, 4, 4)  # of the random run
TOLERANCE = {"float64": 1e-9, "float32": 2e-5}  # relative mismatch of the random run, by the scheduler's arithmetic
DEPTH = 4  # how deep the walk looks into lists and objects
# These list one time more than they evaluate: where the sample ends.
LISTS_THE_END = ("SCMScheduler", "DDPMWuerstchenScheduler")
TIME_PER_SAMPLE = ("DDPMWuerstchenScheduler",)  # step wants a timestep for every sample


def capture(scheduler: Any, steps: int = 20, *, step_options: Mapping[str, Any] | None = None, **kw: Any) -> Plan:
    """Compile a scheduler object to a table that does what its `step` does, by running it on basis vectors.

    scheduler: an object with `set_timesteps`, `timesteps` and `step(model_output, timestep, sample)`, as diffusers'
    have; it is copied, not changed. steps: for set_timesteps, with kw (which may give timesteps or sigmas instead).
    step_options: further arguments of `step`, e.g. {"eta": 1.0}.
    The plan's `options` state the arithmetic found ("float32" where the scheduler casts) and the largest relative
    mismatch against the scheduler itself on random tensors. Its noise ids are the scheduler's draws in order.
    Raises TypeError, with the step, for a scheduler that is not a table: not affine (with the size of the mismatch),
    hidden state, or a step that needs more than these three arguments; RuntimeError when the scheduler itself fails.
    Deterministic.
    """
    name = type(scheduler).__name__
    options = dict(step_options or {})
    _check_interface(scheduler, name, options)
    source = _Source(scheduler, name, steps, options, kw)
    with torch.no_grad():
        witness = _witness(source)
        found = _measure(source, witness.precision == "float32")
        plan = _plan(source, found, witness.precision)
        mismatch = _prove(source, plan, witness)
    return replace(plan, options={**plan.options, "mismatch": float(f"{mismatch:.1e}")})


@dataclass(frozen=True)
class _Source:
    """The scheduler, and how to step a fresh copy of it."""

    scheduler: Any
    name: str
    steps: int
    options: Mapping[str, Any]
    timesteps_options: Mapping[str, Any]

    def fresh(self, draw: Callable[..., Tensor]) -> Any:
        """A copy with its timesteps set; a Brownian noise sampler, if it has one, replaced by `draw`."""
        scheduler = copy.deepcopy(self.scheduler)
        kw = self.timesteps_options
        given = any(kw.get(key) is not None for key in ("timesteps", "sigmas"))
        self.call(None, scheduler.set_timesteps, *(() if given else (self.steps,)), **kw)
        if hasattr(scheduler, "noise_sampler"):
            scheduler.noise_sampler = draw
        return scheduler

    def times(self, scheduler: Any) -> list[Any]:
        """The timesteps it evaluates."""
        times = list(scheduler.timesteps)
        return times[:-1] if self.name in LISTS_THE_END else times

    def scaled(self, scheduler: Any, i: int, x: Tensor, time: Any) -> Tensor:
        """The network's input for state x."""
        scale = getattr(scheduler, "scale_model_input", None)
        return x if scale is None else self.call(i, scale, x, time)

    def step(self, scheduler: Any, i: int, output: Tensor, time: Any, x: Tensor, following: Any) -> tuple[Tensor, Any]:
        """(the next state, everything `step` returned)."""
        options = dict(self.options)
        if self.name in TIME_PER_SAMPLE:
            time = time.expand(x.shape[0])
        if "prev_timestep" in inspect.signature(scheduler.step).parameters:
            options.setdefault("prev_timestep", following)
        result = self.call(i, scheduler.step, model_output=output, timestep=time, sample=x, **options)
        state = getattr(result, "prev_sample", None)
        if state is None:
            state = result[0] if isinstance(result, tuple | list) else result
        if not isinstance(state, Tensor) or state.shape != x.shape:
            what = f"shape {tuple(state.shape)}" if isinstance(state, Tensor) else type(state).__name__
            raise TypeError(f"{self.name}, step {i}: returned {what}, expected the next state, {tuple(x.shape)}")
        return state, result

    def call(self, i: int | None, function: Callable[..., Any], *args: Any, **kw: Any) -> Any:
        """Call the scheduler; what it raises itself is reported as its own failure."""
        try:
            return function(*args, **kw)
        except _Refused as refused:
            raise refused.error from None
        except Exception as error:
            where = "set_timesteps" if i is None else f"step {i}"
            raise RuntimeError(
                f"{self.name} itself fails in {where}: {type(error).__name__}: {error}. Check its config, the number of "
                "steps and step_options; a scheduler that does not run cannot be captured"
            ) from error


class _Refused(Exception):
    """Carries a refusal through the scheduler's code."""

    def __init__(self, error: TypeError) -> None:
        super().__init__(str(error))
        self.error = error


@dataclass(frozen=True)
class _Found:
    """What the basis run measured."""

    run: Run
    result: Lin
    readings: list[Prediction]
    clamps: list[tuple[float, float] | None]
    last: Level
    latent_scale: float


class _Intercept(TorchFunctionMode):
    """Sees every torch call of the scheduler; normals of the state's size are ours."""

    def __init__(self, numel: int) -> None:
        super().__init__()
        self.numel = numel
        self.quantile = False
        self.single = False

    def draw(self, shape: tuple[int, ...], dtype: torch.dtype | None) -> Tensor:
        """The next draw of the scheduler."""
        raise NotImplementedError

    def clamp(self, value: Tensor, low: float, high: float) -> Tensor:
        """`value` clipped to constant bounds."""
        return torch.clamp(value, low, high)

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kw = dict(kwargs or {})
        if func is torch.randn:
            shape = kw.get("size", args[0] if len(args) == 1 and not isinstance(args[0], int) else args)
            if math.prod(shape) == self.numel:
                return self.draw(tuple(shape), kw.get("dtype"))
        elif func is torch.randn_like and args[0].numel() == self.numel:
            return self.draw(tuple(args[0].shape), kw.get("dtype") or args[0].dtype)
        elif func in _CLAMPS and isinstance(args[0], Tensor) and args[0].numel() == self.numel:
            bounds = _bounds(*args[1:], **kw)
            if bounds is not None:
                return self.clamp(args[0], *bounds)
        elif func is torch.quantile and args[0].numel() == self.numel:
            self.quantile = True
        result = func(*args, **kw)
        if func in _CASTS and args[0].dtype == torch.float64 and args[0].numel() == self.numel:
            self.single = self.single or result.dtype != torch.float64
        return result


_CASTS = (Tensor.to, Tensor.float, Tensor.type, Tensor.type_as)
_CLAMPS = (torch.clamp, torch.clip, Tensor.clamp, Tensor.clip, Tensor.clamp_, Tensor.clip_)


class _Basis(_Intercept):
    """Values of one step as unit vectors: `vector` writes a Lin, `read` finds the coefficients again."""

    def __init__(self, run: Run, name: str, numel: int, single: bool) -> None:
        super().__init__(numel)
        self.run, self.name, self.rounding = run, name, 1e-6 if single else 1e-12
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
        vector = torch.zeros(1, 1, 1, self.numel, dtype=dtype)
        for atom, c in terms.items():
            vector[..., self._place(atom)] += c
        return vector

    def read(self, value: Tensor) -> dict[Atom, float]:
        """The combination a tensor is."""
        numbers = value.detach().reshape(-1).double().numpy()
        if not np.isfinite(numbers).all():
            raise TypeError(f"{self.name}, step {self.number}: gives inf or nan on finite tensors; it divides by zero there")
        terms = {atom: float(numbers[place]) for atom, place in self._places.items() if numbers[place] != 0.0}
        rest = np.delete(numbers, list(self._places.values()))
        if rest.any():
            if (rest == rest[0]).all():
                what = f"adds the constant {rest[0]:.6g} to every element, and a row has no constants"
            else:
                what = (
                    "uses a tensor from an earlier step that is not in its attributes, so the capture cannot see it; "
                    "keep it in an attribute, a list or a dict of the scheduler"
                )
            raise TypeError(f"{self.name}, step {self.number}: {what}")
        return terms

    def draw(self, shape: tuple[int, ...], dtype: torch.dtype | None) -> Tensor:
        (atom,) = self.run.noise().terms
        return self.vector({atom: 1.0}, dtype or torch.float32).reshape(shape)

    def clamp(self, value: Tensor, low: float, high: float) -> Tensor:
        try:
            terms = self.read(value)
        except TypeError as error:
            raise _Refused(error) from None
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

    def _refused(self, what: str) -> _Refused:
        return _Refused(TypeError(f"{self.name}, step {self.number}: {what}"))

    def _place(self, atom: Atom) -> int:
        if atom not in self._places:
            if len(self._places) >= self.numel // 3:
                raise self._refused(f"keeps or draws more than {self.numel // 3} tensors in one step")
            self._places[atom] = self._next
            self._next = (self._next + 1) % self.numel
        return self._places[atom]


def _measure(source: _Source, single: bool) -> _Found:
    """The basis run. single: the scheduler computes in float32."""
    run = Run(source.name, (), None)
    basis = _Basis(run, source.name, _free_size(source), single)
    scheduler = source.fresh(lambda *_: basis.draw((1, 1, 1, basis.numel), torch.float64))
    times = source.times(scheduler)
    found: list[tuple[Prediction, tuple[float, float] | None]] = []
    state = run.start
    stored: list[tuple[_Leaf, Lin]] = []
    for i, time in enumerate(times):
        run.carry(state, [value for _, value in stored if all(atom.kind != "F" for atom in value.terms)])
        denoised = run.denoise(state, Level(1.0, math.nan, float(time)))
        (x,), (D,) = state.terms, denoised.terms
        F = Atom("F", i)
        basis.begin(i, x, F, D)
        for leaf, value in stored:
            leaf.write(basis.vector(value.terms, leaf.value.dtype).reshape(leaf.value.shape))
        following = times[i + 1] if i + 1 < len(times) else None
        with basis:
            c_in = _input_scale(basis, source.scaled(scheduler, i, basis.vector({x: 1.0}), time))
            was = readings.level(scheduler, i, float(time))
            outcome, result = source.step(scheduler, i, basis.vector({F: 1.0}), time, basis.vector({x: 1.0}), following)
        P, Q, where, clamp = _fold(basis, scheduler, result, was, c_in)
        found.append((Prediction(P, Q, c_in, float(time)), clamp))
        run.segments[-1].level = Level(where.alpha, where.sigma, float(time))
        state = run.linear(_in_denoised(basis, basis.read(outcome), P, Q, clamp))
        if F in state.terms:
            raise TypeError(
                f"{source.name}, step {i}: clips the denoised estimate and also uses the model output as it was, which a "
                "row cannot; set clip_sample=False (or use_clipped_model_output=True in step_options, where it has that)"
            )
        leaves = _leaves(scheduler, basis.numel)
        stored = [(leaf, run.linear(_in_denoised(basis, basis.read(leaf.value), P, Q, clamp))) for leaf in leaves]
    return _Found(
        run=run,
        result=state,
        readings=[reading for reading, _ in found],
        clamps=[clamp for _, clamp in found],
        last=readings.last_level(scheduler),
        latent_scale=_latent_scale(scheduler),
    )


def _latent_scale(scheduler: Any) -> float:
    return float(getattr(scheduler, "init_noise_sigma", 1.0))


def _input_scale(basis: _Basis, scaled: Tensor) -> float:
    terms = basis.read(scaled)
    if set(terms) != {basis.x}:
        raise TypeError(f"{basis.name}, step {basis.number}: scale_model_input gives something else than a multiple of the state")
    return terms[basis.x]


def _fold(
    basis: _Basis, scheduler: Any, result: Any, was: Level | None, c_in: float
) -> tuple[float, float, Level, tuple[float, float] | None]:
    """(P, Q, level, clamp) of D = P x + Q F in this step, and what is known of its level."""
    kind = readings.kind(scheduler)
    prediction = getattr(result, "pred_original_sample", None)
    terms: dict[Atom, float] = {}
    if basis.cut is not None:
        terms = basis.cut[0]
    elif isinstance(prediction, Tensor) and prediction.numel() == basis.numel:
        terms = basis.read(prediction)
    clamp = None if basis.cut is None else basis.cut[1]
    P, Q = terms.get(basis.x, 0.0), terms.get(basis.raw, 0.0)
    measured = Q != 0.0 and set(terms) <= {basis.x, basis.raw} and max(abs(P), abs(Q)) <= readings.LARGEST
    if measured or clamp is not None:
        return P, Q, readings.level_of(kind, P, Q, c_in) or was or Level(1.0, math.nan), clamp
    P, Q = readings.fold(scheduler, was, c_in)
    return P, Q, was or Level(1.0, math.nan), clamp


def _in_denoised(
    basis: _Basis, terms: dict[Atom, float], P: float, Q: float, clamp: tuple[float, float] | None
) -> dict[Atom, float]:
    """Replace F by (D - P x) / Q; what cancels up to the scheduler's rounding is gone."""
    raw = terms.get(basis.raw, 0.0)
    if clamp is not None or raw == 0.0:
        return terms
    own, back = terms.get(basis.x, 0.0), -raw * P / Q
    rest = own + back
    if abs(rest) <= basis.rounding * (abs(own) + abs(back)):
        rest = 0.0
    changed = {atom: c for atom, c in terms.items() if atom not in (basis.raw, basis.x)}
    return {**changed, basis.x: rest, basis.denoised: raw / Q}


def _plan(source: _Source, found: _Found, precision: str) -> Plan:
    segments = found.run.finish(found.result)
    rows, registers, home = assemble(source.name, segments)
    opening, *evaluated = rows
    read: list[Row] = [
        replace(row, reading=reading, clamp=clamp)
        for row, reading, clamp in zip(evaluated, found.readings, found.clamps, strict=True)
    ]
    drawn = any(row.noise for row in rows)
    levels = [row.level for row in read if row.level is not None]
    prediction = readings.kind(source.scheduler)
    return Plan(
        solver=f"capture:{source.name}",
        options={
            "steps": source.steps,
            **{key: _plain(value) for key, value in {**source.timesteps_options, **source.options}.items()},
            **({} if prediction is None else {"prediction": prediction}),
            "precision": precision,
        },
        schedule=None,
        grid="captured",
        levels=(*levels, found.last),
        rows=(opening, *read),
        registers=registers,
        result=home,
        draws=found.run.draws if drawn else 0,
        latent_scale=found.latent_scale,
    )


class _Random(_Intercept):
    """Draws for the scheduler on random tensors; `normals` are they."""

    def __init__(self, generator: np.random.Generator, shape: tuple[int, ...]) -> None:
        super().__init__(math.prod(shape))
        self._generator = generator
        self.normals: list[Tensor] = []

    def draw(self, shape: tuple[int, ...], dtype: torch.dtype | None) -> Tensor:
        normal = torch.from_numpy(self._generator.standard_normal(shape)).to(dtype or torch.float32)
        self.normals.append(normal)
        return normal


@dataclass(frozen=True)
class _Witness:
    """The scheduler itself on random tensors: what it was given, every state, and how it computes."""

    outputs: Array
    normals: list[Tensor]
    inputs: list[Array]
    states: list[Array]
    precision: str
    quantile: bool


def _witness(source: _Source) -> _Witness:
    generator = np.random.default_rng(20)
    random = _Random(generator, SHAPE)
    scheduler = source.fresh(lambda *_: random.draw(SHAPE, torch.float64))
    times = source.times(scheduler)
    outputs = torch.from_numpy(generator.standard_normal((len(times), *SHAPE)))
    x = torch.from_numpy(generator.standard_normal(SHAPE)) * _latent_scale(scheduler)
    states, inputs = [x.numpy()], []
    for i, time in enumerate(times):
        following = times[i + 1] if i + 1 < len(times) else None
        with random:
            x = x.double()
            inputs.append(source.scaled(scheduler, i, x, time).double().numpy())
            x, _ = source.step(scheduler, i, outputs[i], time, x, following)
        states.append(x.double().numpy())
    precision = "float32" if random.single else "float64"
    return _Witness(outputs.numpy(), random.normals, inputs, states, precision, random.quantile)


def _prove(source: _Source, plan: Plan, witness: _Witness) -> float:
    """The largest relative mismatch, over all states, between the table and the scheduler on random tensors."""
    reached: list[Array] = []

    def denoise(state: Array, level: Level) -> Array:
        i = len(reached)
        row, reading = plan.rows[i + 1], plan.rows[i + 1].reading
        assert reading is not None
        if i:
            _check(source, i - 1, _relative(state, witness.states[i]), witness, "its next state")
        _check(source, i, _relative(reading.c_in * state, witness.inputs[i]), witness, "the network's input")
        reached.append(state)
        estimate = reading.P * state + reading.Q * witness.outputs[i]
        return estimate if row.clamp is None else estimate.clip(*row.clamp)

    result = execute(plan, denoise, witness.states[0], lambda index, _: witness.normals[index].double().numpy())
    _check(source, plan.nfe - 1, _relative(result, witness.states[-1]), witness, "its result")
    return max(_relative(ours, theirs) for ours, theirs in zip([*reached, result], witness.states, strict=True))


def _check(source: _Source, i: int, mismatch: float, witness: _Witness, what: str) -> None:
    allowed = TOLERANCE[witness.precision]
    if mismatch <= allowed:
        return
    if witness.quantile:
        why = "it thresholds by a quantile of each sample; set thresholding=False or clip_sample=True"
    else:
        why = "it branches on data, multiplies tensors, or keeps state where the capture cannot see it"
    raise TypeError(
        f"{source.name}, step {i}: is not affine: on random tensors {what} differs from the table by {mismatch:.1e} "
        f"(relative; allowed {allowed:.0e}); {why}. Otherwise run it with its own loop"
    )


def _relative(ours: Array, theirs: Array) -> float:
    size = float(np.abs(theirs).max())
    off = float(np.abs(ours - theirs).max())
    return off / size if size > 0 and math.isfinite(off) else off if math.isfinite(off) else math.inf


@dataclass(frozen=True)
class _Leaf:
    """A state-sized tensor the scheduler keeps, and how to put another in its place."""

    value: Tensor
    write: Callable[[Tensor], None]


def _leaves(scheduler: Any, numel: int) -> list[_Leaf]:
    """Every tensor with this many elements in the object's attributes, lists, tuples, dicts and inner objects."""
    found: list[_Leaf] = []
    seen: set[int] = set()

    def visit(value: Any, write: Callable[[Any], None], depth: int) -> None:
        if isinstance(value, Tensor):
            if value.numel() == numel:
                found.append(_Leaf(value, write))
            return
        if depth > DEPTH or id(value) in seen:
            return
        if isinstance(value, tuple) and type(value) is tuple:
            parts = list(value)
            for i, part in enumerate(parts):
                visit(part, _into_tuple(parts, i, write), depth + 1)
            return
        items: list[tuple[Any, Any]] = []
        if isinstance(value, dict):
            items = list(value.items())
        elif isinstance(value, MutableSequence):
            items = list(enumerate(value))
        elif hasattr(value, "__dict__") and not callable(value) and not isinstance(value, type):
            value, items = vars(value), list(vars(value).items())
        if items:
            seen.add(id(value))
        for key, part in items:
            if key not in ("config", "_internal_dict"):
                visit(part, _into(value, key), depth + 1)

    visit(scheduler, _into({}, ""), 0)
    return found


def _into(container: Any, key: Any) -> Callable[[Any], None]:
    def write(value: Any) -> None:
        container[key] = value

    return write


def _into_tuple(parts: list[Any], i: int, write: Callable[[Any], None]) -> Callable[[Any], None]:
    def put(value: Any) -> None:
        parts[i] = value
        write(tuple(parts))

    return put


def _free_size(source: _Source) -> int:
    scheduler = source.fresh(lambda *_: torch.zeros(()))
    for size in SIZES:
        if not _leaves(scheduler, size):
            return size
    raise TypeError(f"{source.name} has tensors of all sizes {SIZES}; choose another number of steps")


def _bounds(*args: Any, **kw: Any) -> tuple[float, float] | None:
    """Constant bounds of a clamp, or None where they are tensors with different elements."""
    low, high = dict(enumerate(args)).get(0, kw.get("min")), dict(enumerate(args)).get(1, kw.get("max"))
    ends = []
    for bound, missing in ((low, -math.inf), (high, math.inf)):
        if isinstance(bound, Tensor):
            flat = bound.reshape(-1)
            if not bool((flat == flat[0]).all()):
                return None
            bound = float(flat[0])
        ends.append(missing if bound is None else float(bound))
    return ends[0], ends[1]


def _check_interface(scheduler: Any, name: str, options: Mapping[str, Any]) -> None:
    for attribute in ("set_timesteps", "step"):
        if not callable(getattr(scheduler, attribute, None)):
            raise TypeError(f"capture: {name} has no {attribute}(); expected a scheduler object such as diffusers' have")
    known = inspect.signature(scheduler.step).parameters
    own = ("model_output", "timestep", "sample")
    if not set(own) <= known.keys():
        raise TypeError(f"{name}.step takes ({', '.join(known)}), expected step(model_output, timestep, sample, ...)")
    if "LongTensor" in str(known["sample"].annotation):
        raise TypeError(f"{name}.step moves class indices (a LongTensor), and a row moves continuous samples")
    needed = [
        key
        for key, parameter in known.items()
        if parameter.default is inspect.Parameter.empty
        and parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)
        and key not in (*own, *options)
    ]
    if needed:
        raise TypeError(
            f"{name}.step also needs {', '.join(needed)}, which its caller would have to carry from step to step; "
            "give constants in step_options, or run it with its own loop"
        )


def _plain(value: Any) -> Any:
    if hasattr(value, "tolist"):
        return value.tolist()
    return value if isinstance(value, bool | int | float | str | list | dict | None) else repr(value)
