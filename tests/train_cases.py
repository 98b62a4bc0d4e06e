"""Random calls of the two training ops, and what they must give in float64."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch

from fastdiff.compiler import layout as at
from fastdiff.engine import noise as counter_noise
from fastdiff.engine.train_ops import TrainTensors

NAN = float("nan")
# tables worth telling apart: (P, Q, R, A, B, C)
TABLES = {
    "eps": (0.8, 0.6, 0.0, 0.0, 1.0, 0.0),
    "v": (0.8, 0.6, 0.0, -0.6, 0.8, 0.0),
    "x0": (0.8, 0.6, 0.0, 1.0, 0.0, 0.0),
    "perturbed": (0.8, 0.6, 0.06, 0.0, 1.0, 0.0),
    "interpolant": (0.3, 0.7, 0.45, -1.0, 1.0, -0.4),
    "clean": (0.9, 0.0, 0.0, 0.5, 0.0, 0.0),
}


@dataclass(frozen=True)
class Case:
    """One call, filled at random; what is to be written holds NaN."""

    shape: tuple[int, ...] = (3, 5, 7)
    batch: int = 3
    layout: torch.memory_format = torch.contiguous_format
    image_dtype: torch.dtype = torch.uint8
    model_dtype: torch.dtype = torch.float32
    table: str = "interpolant"
    flip: bool = True
    seed: int = 0

    def tensors(self) -> TrainTensors:
        """The tensors of the loss; its first four are those of the noising."""
        generator = torch.Generator().manual_seed(self.seed)
        size = (self.batch, *self.shape)

        def like(values: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
            return values.to(dtype).contiguous(memory_format=self.layout)

        if self.image_dtype == torch.uint8:
            images = torch.randint(0, 256, size, generator=generator)
        else:
            images = 2 * torch.rand(size, generator=generator) - 1
        table = torch.zeros(self.batch, at.TRAIN_COLUMNS)
        table[:, : at.FLIP] = torch.tensor(TABLES[self.table])
        table[:, : at.FLIP] *= 1 + 0.2 * torch.rand(self.batch, at.FLIP, generator=generator)
        if self.flip:
            table[::2, at.FLIP] = 1.0
        table[:, at.FLIP + 1] = NAN
        return TrainTensors(
            images=like(images, self.image_dtype),
            table=table,
            key=torch.randint(-(2**63), 2**63 - 1, (self.batch,), generator=generator),
            out=like(torch.full(size, NAN), self.model_dtype),
            model_out=like(torch.randn(size, generator=generator), self.model_dtype),
            weight=torch.rand(self.batch, generator=generator) + 0.5,
            partial=torch.full((self.batch, at.PARTS), NAN),
        )


def fresh(t: TrainTensors, device: torch.device | str = "cpu", **changes: torch.Tensor | None) -> TrainTensors:
    """A copy whose outputs hold NaN again."""
    moved = {
        name: None if tensor is None else tensor.to(device, copy=True)
        for name, tensor in zip(TrainTensors.__dataclass_fields__, t.arguments(), strict=True)
    }
    copied = replace(TrainTensors(**moved), **changes)  # type: ignore[arg-type]
    for written in (copied.out, copied.partial):
        if written is not None:
            written.fill_(NAN)
    return copied


def expected(t: TrainTensors, factor: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """x_in, the sum of squares of each sample and the gradient."""
    images = t.images.double().numpy() if t.images.dtype != torch.uint8 else t.images.double().numpy() / 127.5 - 1
    x, gradient, sums = np.zeros(images.shape), np.zeros(images.shape), np.zeros(len(images))
    assert t.model_out is not None and t.weight is not None
    for b, row in enumerate(t.table.double().numpy()):
        image = images[b][..., ::-1] if row[at.FLIP] else images[b]
        z, y = (
            counter_noise.normal(int(t.key[b]), image.size, number, 3).astype(np.float64).reshape(image.shape)
            for number in (0, 1)
        )
        x[b], target = (sum(map(np.multiply, row[c : c + 3], (image, z, y))) for c in (at.INPUT_X0, at.TARGET_X0))
        rest = t.model_out[b].double().numpy() - target
        sums[b] = (rest**2).sum()
        gradient[b] = factor * float(t.weight[b]) * rest
    return x, sums, gradient
