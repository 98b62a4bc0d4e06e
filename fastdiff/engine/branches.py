"""What the networks are asked in each row: the conditional branch, the unguided one, the perturbed one.

May import: conditions, ops, compiler, models.denoiser. F = Fu + w (Fc - Fu) + s (Fc - Fp): Fu comes from the
same network on another condition, in one batch with Fc, or from a network of its own (autoguidance: Karras et al.
2024); so does Fp (perturbed attention: Ahn et al. 2024; skipped layers; or one more condition: Brooks et al. 2023).
"""

from __future__ import annotations

import copy
import threading
import weakref
from collections.abc import Hashable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastdiff.compiler.assemble import Row
from fastdiff.engine.conditions import stacks
from fastdiff.engine.ops import MODEL_DTYPES
from fastdiff.models.denoiser import Condition, Denoiser

CONDITIONAL, UNGUIDED, PERTURBED = "cond", "uncond", "perturbed"


@dataclass(frozen=True)
class Outputs:
    """A row's network outputs as the op takes them: a stack and what stands apart; the stack's learned variance."""

    model_out: Tensor
    unguided: Tensor | None = None
    perturbed: Tensor | None = None
    variance: Tensor | None = None

    def arguments(self) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """The arguments of a bound step."""
        return self.model_out, self.unguided, self.perturbed


class Branches:
    """The networks of one run, and which of them a row needs.

    stack: the branches in the main network's batch, in order. conditions: one tree for each length of the stack.
    apart: branches with a network of their own, and its condition.
    """

    def __init__(
        self,
        model: Denoiser,
        batch: int,
        conditions: dict[str, Condition],
        networks: dict[str, Denoiser],
    ) -> None:
        self.model, self.batch = model, batch
        self.stack = tuple(name for name in conditions if name not in networks)
        self.conditions = stacks({name: conditions[name] for name in self.stack}, batch, model.device)
        self.apart = {
            name: (networks[name], stacks({name: conditions[name]}, batch, model.device)[0])
            for name in conditions
            if name in networks
        }

    @property
    def names(self) -> tuple[str, ...]:
        """Every branch of the run."""
        return (*self.stack, *self.apart)

    def needed(self, row: Row) -> tuple[str, ...]:
        """The branches this row reads."""
        if row.reused:
            return ()
        off = set()
        if row.gain == 0.0 and row.estimate != "unguided":
            off.add(UNGUIDED)
        if row.perturb == 0.0:
            off.add(PERTURBED)
        return tuple(name for name in self.names if name not in off)

    def modes(self, rows: Sequence[Row]) -> list[Any]:
        """How the main network works in each row of a run, where it has ways to choose from; None where it has not.

        A network whose calls are not alike (fastdiff.models.feature_reuse) has `modes(batches)`, which says it of every
        call of a run, and an attribute `mode`, which is set for the length of each.
        """
        net: Any = self.model.net
        if not has_modes(self.model):
            return [None] * len(rows)
        needed = [self.needed(row) for row in rows]
        return net.modes([self.copies(names) * self.batch if names else 0 for names in needed])

    def kind(self, row: Row, mode: Any = None) -> Hashable:
        """Equal for rows that evaluate the same networks on the same batch in the same mode."""
        needed = self.needed(row)
        return needed, mode if needed else None

    def copies(self, needed: Sequence[str]) -> int:
        """How much of the stack is evaluated: up to the last branch that is needed."""
        return max(i + 1 for i, name in enumerate(self.stack) if name in needed)

    def evaluate(
        self, row: Row, x: Tensor, time: Tensor, memory_format: torch.memory_format, mode: Any = None
    ) -> Outputs | None:
        """Ask the networks at x [nB, *S] and time [nB]: a copy of one input for each of the n branches, in order.

        A network may write into its input, so no two of them are given the same copy. None: the row asks nothing.
        """
        needed = self.needed(row)
        if not needed:
            return None
        copies = self.copies(needed)
        count = copies * self.batch
        own = (x, time) if count == x.shape[0] else (x[:count], time[:count])
        with nullcontext() if mode is None else _in_mode(self.model.net, mode):
            stacked, variance = ask(self.model, *own, self.conditions[copies - 1], memory_format)
        apart: dict[str, Tensor] = {}
        for i, (name, (network, condition)) in enumerate(self.apart.items(), len(self.stack)):
            if name in needed:
                place = slice(i * self.batch, (i + 1) * self.batch)
                apart[name] = ask(network, x[place], time[place], condition, memory_format)[0]
                if apart[name].dtype != stacked.dtype:
                    apart[name] = apart[name].to(stacked.dtype)
        if self.stack[:copies] == (CONDITIONAL, PERTURBED):
            apart[PERTURBED] = stacked[self.batch :]
            stacked = stacked[: self.batch]
        return Outputs(stacked, apart.get(UNGUIDED), apart.get(PERTURBED), variance)

    def direct(self, row: Row, x: Tensor, time: Tensor) -> tuple[Tensor, Tensor, Any] | None:
        """What the main network is called with in rows like this one, where that call is all that they ask."""
        needed = self.needed(row)
        if not needed or not set(needed) <= set(self.stack) or self.model.dtype != x.dtype or has_modes(self.model):
            return None
        copies = self.copies(needed)
        if self.stack[:copies] == (CONDITIONAL, PERTURBED) or self.model.learned_variance:
            return None
        count = copies * self.batch
        own = (x, time) if count == x.shape[0] else (x[:count], time[:count])
        return *own, self.conditions[copies - 1]

    def conditions_of_all(self) -> list[Any]:
        """Every condition of every network, as one tree."""
        return [self.conditions, [condition for _, condition in self.apart.values()]]

    def with_conditions(self, tree: list[Any]) -> Branches:
        """The same branches on a tree like `conditions_of_all` gives."""
        own = copy.copy(self)
        own.conditions = tree[0]
        own.apart = {
            name: (network, condition)
            for (name, (network, _)), condition in zip(self.apart.items(), tree[1], strict=True)
        }
        return own


@contextmanager
def _in_mode(net: Any, mode: Any) -> Iterator[None]:
    before, net.mode = net.mode, mode
    try:
        yield
    finally:
        net.mode = before


_claimed: weakref.WeakSet[Any] = weakref.WeakSet()  # networks with modes that a run works with now
_claiming = threading.Lock()


@contextmanager
def claimed(models: Iterable[Denoiser | None]) -> Iterator[None]:
    """Keep networks whose calls are not alike to one run: RuntimeError where another one works with one of them."""
    nets = {id(model.net): model.net for model in models if model is not None and has_modes(model)}
    with _claiming:
        if any(net in _claimed for net in nets.values()):
            raise RuntimeError(
                "another run works with this network now, which keeps the features of one run (reuse_features); give "
                "each thread a reuse_features(...) of its own around the same UNet"
            )
        _claimed.update(nets.values())
    try:
        yield
    finally:
        with _claiming:
            _claimed.difference_update(nets.values())


def has_modes(model: Denoiser) -> bool:
    """Whether the network's calls in a run are not alike."""
    return hasattr(model.net, "modes")


def refuse_modes(model: Denoiser, what: str) -> None:
    """ValueError for a network whose calls are not alike, where samples at different rows share one."""
    if has_modes(model):
        raise ValueError(
            f"{what} has samples at different rows in one call of the network, and this one reuses features of the row "
            "before; give it the network without reuse_features"
        )


def ask(
    network: Denoiser, x: Tensor, time: Tensor, condition: Any, memory_format: torch.memory_format
) -> tuple[Tensor, Tensor | None]:
    """F and, of a network with a learned variance, V, like x and in `memory_format`; ValueError or TypeError if not."""
    return fitted(network, network(x.to(network.dtype), time, condition), x, memory_format)


def fitted(
    network: Denoiser, output: Tensor, x: Tensor, memory_format: torch.memory_format
) -> tuple[Tensor, Tensor | None]:
    """What `ask` returns, of what the network did."""
    variance = None
    if network.learned_variance and output.dim() > 1 and output.shape[1] == 2 * x.shape[1]:
        output, variance = output.chunk(2, dim=1)
    if output.shape != x.shape:
        raise ValueError(
            f"the network returned shape {tuple(output.shape)} for an input of shape {tuple(x.shape)}; they must "
            "be equal. One that also predicts a variance needs Denoiser(..., learned_variance=True)"
        )
    if output.dtype not in MODEL_DTYPES or output.device != x.device:
        raise TypeError(
            f"the network returned {output.dtype} on {output.device}, expected float32, float16 or bfloat16 "
            f"on {x.device}"
        )
    return output.contiguous(memory_format=memory_format), variance


def arrange(
    model: Denoiser,
    batch: int,
    cond: Condition,
    uncond: Condition,
    perturbed_cond: Condition,
    *,
    guided: bool,
    perturbed: bool,
    guide: Denoiser | None,
    perturbed_net: Denoiser | None,
    reads_unguided: bool,
) -> Branches:
    """The branches of a run, from what the caller gave; ValueError where a branch is wanted and cannot be made."""
    conditions: dict[str, Condition] = {CONDITIONAL: cond}
    networks: dict[str, Denoiser] = {}
    if guided or reads_unguided:
        if uncond is None and guide is None:
            why = "guidance != 1" if guided else "cfg_pp"
            raise ValueError(f"{why} needs uncond=, the condition of the unguided branch (e.g. the null label)")
        conditions[UNGUIDED] = cond if uncond is None else uncond
        if guide is not None:
            networks[UNGUIDED] = guide
    if perturbed:
        if perturbed_cond is None and perturbed_net is None:
            raise ValueError(
                "perturbed_scale != 0 needs a third branch: Sampler(..., perturbed=network) or perturbed_cond="
            )
        conditions[PERTURBED] = cond if perturbed_cond is None else perturbed_cond
        if perturbed_net is not None:
            networks[PERTURBED] = perturbed_net
    return Branches(model, batch, conditions, networks)
