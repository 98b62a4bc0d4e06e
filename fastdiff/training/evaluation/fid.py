"""FID with the Inception network, by the package torch-fidelity if it is installed. May import: nothing of ours."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset


class _Pictures(Dataset[Tensor]):
    """uint8 [3, H, W] pictures as torch-fidelity wants them; grey ones three times."""

    def __init__(self, pictures: Tensor) -> None:
        self.pictures = pictures

    def __len__(self) -> int:
        return len(self.pictures)

    def __getitem__(self, index: int) -> Tensor:
        return self.pictures[index].expand(3, -1, -1)


def fid(samples: Tensor, real: Tensor) -> float:
    """FID of uint8 pictures [N, C, H, W], C = 1 or 3 (Heusel et al. 2017). Raises: ImportError with what to install."""
    numbers = package().calculate_metrics(
        input1=_Pictures(samples), input2=_Pictures(real), cuda=torch.cuda.is_available(), fid=True, verbose=False
    )
    return float(numbers["frechet_inception_distance"])


def package() -> Any:
    """torch-fidelity. Raises: ImportError with what to install."""
    try:
        import torch_fidelity
    except ImportError as error:
        raise ImportError(
            "FID needs the package torch-fidelity, which is not installed: pip install torch-fidelity (it brings "
            "torchvision and fetches Inception's weights), or leave --fid out"
        ) from error
    return torch_fidelity
