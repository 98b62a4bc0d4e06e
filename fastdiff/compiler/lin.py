"""Symbolic registers: a sampler runs on `Lin` values and leaves behind the scalars it multiplied them by.

May import: nothing of the package. `Lin` is a float64 linear combination of atoms; an atom is a value a
running sampler will hold: a state, a denoised estimate, a recorded combination, or a named unit normal.
"""

from __future__ import annotations

import math
import numbers
import operator
from collections.abc import Callable
from typing import Any, NamedTuple


class Atom(NamedTuple):
    """A value known when its row runs.

    kind "x": the state row `number` evaluates the model at; "D": that row's denoised estimate; "E": its second one
    (the unguided branch's, or D before its clamp); "kept": recorded combination `number`; "start": the state the plan
    begins with; "given": tensor `number` that the caller fills before the first row;
    "z": the unit normal with id `number` on noise stream `stream`.
    """

    kind: str
    number: int
    stream: int = 0


class Lin:
    """sum_a c_a * a over atoms, closed under +, -, and multiplication by a number; anything else is a TypeError.

    terms: {a: c_a}, none of them 0; replaced and never written into.
    """

    __slots__ = ("terms", "where")

    def __init__(self, terms: dict[Atom, float], where: Callable[[], str]) -> None:
        self.terms = terms
        self.where = where

    def __add__(self, other: Lin | float) -> Lin:
        if isinstance(other, Lin):
            total = dict(self.terms)
            for atom, c in other.terms.items():
                total[atom] = total.get(atom, 0.0) + c
            return Lin(nonzero(total), self.where)
        if _is_number(other) and float(other) == 0.0:
            return self
        raise self.refuse(f"adds the constant {other!r} to a register")

    __radd__ = __add__

    def __sub__(self, other: Lin | float) -> Lin:
        return self + (-other)

    def __rsub__(self, other: Lin | float) -> Lin:
        return -self + other

    def __mul__(self, factor: float) -> Lin:
        if not _is_number(factor):
            what = "multiplies two registers" if isinstance(factor, Lin) else f"multiplies a register by {factor!r}"
            raise self.refuse(what)
        value = float(factor)
        if not math.isfinite(value):
            raise ValueError(
                f"{self.where()} multiplies a register by {value}; check its options and the ends of the grid"
            )
        scaled = {atom: product for atom, c in self.terms.items() if (product := value * c) != 0.0}
        return Lin(scaled, self.where)

    __rmul__ = __mul__

    def __truediv__(self, divisor: float) -> Lin:
        if not _is_number(divisor):
            raise self.refuse("divides by a register" if isinstance(divisor, Lin) else f"divides by {divisor!r}")
        return self * (1.0 / float(divisor))

    def __rtruediv__(self, other: object) -> Lin:
        raise self.refuse("divides by a register")

    def __neg__(self) -> Lin:
        return self * -1.0

    def __pow__(self, exponent: object) -> Lin:
        raise self.refuse("raises a register to a power")

    def __abs__(self) -> Lin:
        raise self.refuse("takes the absolute value of a register")

    def __bool__(self) -> bool:
        raise self.refuse("branches on the value of a register")

    def __float__(self) -> float:
        raise self.refuse("reads the value of a register")

    def __int__(self) -> int:
        raise self.refuse("reads the value of a register")

    def __eq__(self, other: object) -> bool:
        raise self.refuse("compares a register")

    __ne__ = __lt__ = __le__ = __gt__ = __ge__ = __eq__
    __hash__ = object.__hash__

    def __getitem__(self, key: object) -> Lin:
        raise self.refuse("takes a part of a register")

    def __getattr__(self, name: str) -> Lin:
        if name.startswith("__"):
            raise AttributeError(name)
        raise self.refuse(f"uses .{name} of a register")

    def __array_ufunc__(self, ufunc: Callable[..., object], method: str, *inputs: Any, **options: Any) -> Lin:
        """NumPy on the left: scalars take part in sums and products, every other function is refused."""
        name = ufunc.__name__
        operation = _NUMPY.get(name)
        values = [_plain(value) for value in inputs]
        plain = all(isinstance(value, Lin) or _is_number(value) for value in values)
        if operation is None or method != "__call__" or options or not plain:
            raise self.refuse(f"applies numpy.{name} to a register")
        result: Lin = operation(*values)
        return result

    def __repr__(self) -> str:
        return " + ".join(f"{c:.6g} {atom.kind}{atom.number}" for atom, c in self.terms.items()) or "0"

    def become(self, atom: Atom) -> None:
        """Turn this value into `atom`: it is being written to a register, so later uses read it from there."""
        self.terms = {atom: 1.0}

    def refuse(self, what: str) -> TypeError:
        """The TypeError for something a row cannot do: `what` it is, and which solver and row did it."""
        return TypeError(
            f"{self.where()} {what}: a row must be linear in its registers with scalars known in advance. "
            "Express the update as a weighted sum, or run this sampler with its own loop."
        )


def nonzero(terms: dict[Atom, float]) -> dict[Atom, float]:
    """The terms that are not 0; the same dict where all are, since no one writes into terms."""
    return {atom: c for atom, c in terms.items() if c != 0.0} if 0.0 in terms.values() else terms


_NUMPY: dict[str, Callable[..., Lin]] = {
    "add": operator.add,
    "subtract": operator.sub,
    "multiply": operator.mul,
    "divide": operator.truediv,
    "negative": operator.neg,
    "positive": lambda value: value,
}


def _plain(value: Any) -> Any:
    """A NumPy scalar as a Python number, anything else as it is."""
    return value if isinstance(value, Lin) or getattr(value, "shape", None) != () else value.item()


def _is_number(value: object) -> bool:
    if type(value) is float or type(value) is int:  # most are; the test of an abstract class is slow
        return True
    return isinstance(value, numbers.Real) and not isinstance(value, bool)
