"""Distances between sets of samples that need no fit: precision and recall, sliced Wasserstein, nearest neighbours.

May import: nothing of the package. All are deterministic, and computed in blocks so that memory stays small.
"""

from __future__ import annotations

import torch
from torch import Tensor

_BLOCK = 1024


def precision_recall(samples: Tensor, real: Tensor, neighbours: int = 3) -> tuple[float, float]:
    """Share of samples within the real set's manifold, and of real ones within the samples' (Kynkäänniemi et al. 2019).

    The manifold of a set is the union of balls around its points that reach to their k-th nearest neighbour (eq. 1).
    samples, real: features [N, F], [M, F]. Raises: ValueError for sets of no more than k points.
    """
    for name, points in (("samples", samples), ("real", real)):
        if points.dim() != 2 or len(points) <= neighbours:
            raise ValueError(
                f"precision_recall: got {name} of shape {list(points.shape)}, expected [N, F] with N above {neighbours}"
            )
    samples, real = samples.double(), real.double()
    return _covered(samples, real, neighbours), _covered(real, samples, neighbours)


def sliced_wasserstein(first: Tensor, second: Tensor, directions: int = 512, seed: int = 0) -> float:
    """Root of the mean over directions of the squared 2-Wasserstein distance of projections (Bonneel et al. 2015).

    first, second: [N, ...] and [M, ...] of one shape of sample. Where N and M differ the larger set is thinned evenly
    in the order of each projection. directions: uniform on the sphere, from `seed`.
    """
    a, b = first.flatten(1).double(), second.flatten(1).double()
    if a.shape[1] != b.shape[1] or not len(a) or not len(b):
        raise ValueError(
            f"sliced_wasserstein: got {list(first.shape)} and {list(second.shape)}, expected one shape of sample"
        )
    generator = torch.Generator().manual_seed(seed)
    axes = torch.randn(a.shape[1], directions, dtype=torch.float64, generator=generator)
    axes /= axes.norm(dim=0)
    count = min(len(a), len(b))
    projected = [_thinned((points @ axes).sort(dim=0).values, count) for points in (a, b)]
    return float((projected[0] - projected[1]).square().mean().sqrt())


def nearest(pictures: Tensor, known: Tensor) -> tuple[Tensor, Tensor]:
    """Root mean square difference of each picture to the nearest of `known`, and which that is: [N] float64, [N] int64.

    pictures, known: uint8 or float [N, ...], [M, ...]; the difference is in their units (grey levels of uint8).
    """
    a, b = pictures.flatten(1).float(), known.flatten(1).float()
    squares = b.square().sum(1)
    found = []
    for block in a.split(_BLOCK):
        best = torch.full((len(block),), torch.inf)
        where = torch.zeros(len(block), dtype=torch.int64)
        for start in range(0, len(b), 16 * _BLOCK):
            part = slice(start, start + 16 * _BLOCK)
            value, index = torch.addmm(squares[part], block, b[part].T, alpha=-2.0).min(dim=1)
            where = torch.where(value < best, index + start, where)
            best = torch.minimum(value, best)
        found.append(where)
    index = torch.cat(found)
    # The expanded square loses digits where a copy is nearly exact, so the distance is taken again.
    gaps = [
        (x - b[i]).double().square().mean(1).sqrt() for x, i in zip(a.split(_BLOCK), index.split(_BLOCK), strict=True)
    ]
    return torch.cat(gaps), index


def _covered(points: Tensor, manifold: Tensor, neighbours: int) -> float:
    radii = torch.cat(
        [torch.cdist(block, manifold).kthvalue(neighbours + 1).values for block in manifold.split(_BLOCK)]
    )
    inside = [(torch.cdist(block, manifold) <= radii).any(dim=1) for block in points.split(_BLOCK)]
    return float(torch.cat(inside).double().mean())


def _thinned(values: Tensor, count: int) -> Tensor:
    if len(values) == count:
        return values
    place = ((torch.arange(count, dtype=torch.float64) + 0.5) * len(values) / count).long()
    return values[place]
