"""How much room a run needs, so that runs which need the same can use the same buffers and graphs.

May import: compiler, models.denoiser. What only the contents of the buffers depend on is no part of it: the sampler,
its steps up to the next power of two, seeds, guidance, labels.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from fastdiff.compiler.plan import Plan
from fastdiff.models.denoiser import Denoiser

LEAST_ROWS, LEAST_TERMS = 64, 2  # of a table: below that, all samplers share


@dataclass(frozen=True)
class Room:
    """shape: [B, *S] of the samples. registers: state-sized buffers. rows, terms: of the table, without its opening
    row, and noise terms of a row. opening_terms: of the opening row, which has a table of its own: it draws the
    latents, which would widen a deterministic plan's. copies: of the network's input, one per branch.
    keep_denoised: D is kept for a callback. dtype: of the network. second: some row gives E a weight. learns_spread:
    some row's noise has a learned spread. work: the guidance rule to run before each row, and whether it thresholds.
    perturbed: a perturbed branch has a scale of its own.
    """

    shape: torch.Size
    registers: int
    rows: int
    terms: int
    opening_terms: int
    copies: int
    dtype: torch.dtype
    device: torch.device
    memory_format: torch.memory_format = torch.contiguous_format
    keep_denoised: bool = False
    second: bool = False
    learns_spread: bool = False
    work: tuple[int, bool] | None = None
    perturbed: bool = False

    @staticmethod
    def of(
        plan: Plan,
        shape: torch.Size,
        copies: int,
        model: Denoiser,
        memory_format: torch.memory_format = torch.contiguous_format,
        keep_denoised: bool = False,
        work: tuple[int, bool] | None = None,
        perturbed: bool = False,
    ) -> Room:
        """What a run of `plan` needs. Raises ValueError for a shape without a batch or without elements."""
        if len(shape) < 2 or min(shape) < 1:
            raise ValueError(f"shape must be [batch, *sample] with every size >= 1, got {tuple(shape)}")
        opening, *rows = (len(row.noise) for row in plan.rows)
        return Room(
            shape=shape,
            registers=plan.registers,
            rows=rounded_up(len(rows), LEAST_ROWS),
            terms=rounded_up(max(rows), LEAST_TERMS),
            opening_terms=rounded_up(opening + 1, LEAST_TERMS),
            copies=copies,
            dtype=model.dtype,
            device=model.device,
            memory_format=memory_format if len(shape) == 4 else torch.contiguous_format,
            keep_denoised=keep_denoised,
            second=plan.uses_second_estimate,
            learns_spread=plan.learns_spread,
            work=work,
            perturbed=perturbed,
        )

    @property
    def batch(self) -> int:
        """B."""
        return self.shape[0]


def rounded_up(count: int, least: int = 0) -> int:
    """The next power of two, or `least`; 0 stays 0."""
    return max(least, 1 << (count - 1).bit_length()) if count else least
