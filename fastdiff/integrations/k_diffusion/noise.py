"""Where a run's noise and progress bar come from: this package, or a program's own copy of k-diffusion's sampling.

May import: torch, engine, tqdm, torchsde where it is installed. A program that keeps its own sampling module may have
changed how noise is drawn there (a seed for each image, a generator of its own); with that module as host its draws are
used.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from tqdm import auto

from fastdiff.engine import torch_normals

NoiseSampler = Callable[[Tensor, Tensor], Tensor]
_RANDN_LIKE = torch.randn_like


class Host:
    """The source of noise and progress bars. module: k-diffusion's sampling module or a program's copy, None: ours.

    discards: sample_euler, sample_heun and sample_dpm_2 draw for every step, as k-diffusion's do, though most draws
    have no weight; False where the module's own draw what they use and no more. seeded: the module's functions seed
    their noise with extra_args["seed"], as ComfyUI's do.
    """

    def __init__(self, module: ModuleType | None = None, discards: bool = True, seeded: bool = False) -> None:
        self.module = module
        self.discards = discards
        self.seeded = seeded

    def like(self, x: Tensor) -> Callable[[Tensor], Any]:
        """`draw(slot)`: the normals torch.randn_like(x) gives, in `slot`."""
        library = getattr(self.module, "torch", torch)
        plain = library is torch and torch.randn_like is _RANDN_LIKE
        if plain and x.dtype == torch.float32 and x.is_contiguous():
            return torch_normals.fill  # the same numbers as randn_like's, without a tensor in between
        return lambda slot: slot.copy_(library.randn_like(x))

    def white(self, x: Tensor, extra_args: Mapping[str, Any]) -> NoiseSampler | None:
        """The noise sampler of ancestral functions; None: `like` does."""
        made = getattr(self.module, "default_noise_sampler", None)
        return None if made is None else made(x, **self._options(made, extra_args))

    def brownian(self, x: Tensor, sigmas: Tensor, extra_args: Mapping[str, Any], draws: bool) -> NoiseSampler | None:
        """The noise sampler of SDE functions, over the noisy levels of `sigmas`. draws: it will be called."""
        if self.module is None and not draws:
            _entropy()
            return None
        made = getattr(self.module, "BrownianTreeNoiseSampler", BrownianTreeNoiseSampler)
        return made(x, sigmas[sigmas > 0].min(), sigmas.max(), **self._options(made, extra_args))

    def steps(self, count: int, disable: bool | None) -> Iterator[int] | None:
        """The progress bar over steps, advanced by next(); None: none is shown."""
        if self.module is None and disable:
            return None
        return iter(getattr(self.module, "trange", auto.trange)(count, disable=disable))

    def counter(self, total: int, disable: bool | None) -> Any:
        """The progress bar over model calls, advanced by update()."""
        return getattr(self.module, "tqdm", auto.tqdm)(total=total, disable=disable)

    def _options(self, function: Any, extra_args: Mapping[str, Any]) -> dict[str, Any]:
        if not self.seeded:
            return {}
        given = {"seed": extra_args.get("seed"), "cpu": True}  # the trees of these functions are always on the CPU
        return {key: value for key, value in given.items() if key in inspect.signature(function).parameters}


HERE = Host()


class BrownianTreeNoiseSampler:
    """(W(sigma) - W(sigma_next)) / sqrt(|sigma - sigma_next|), W a Brownian path on [sigma_min, sigma_max].

    x: [B, *S], whose shape, device and dtype the path has. seed: of the path, drawn from torch's global generator
    where it is None; or one for each sample, which then has a path of its own. The same numbers as k-diffusion's class
    of that name. Raises ImportError without torchsde.
    """

    def __init__(self, x: Tensor, sigma_min: Any, sigma_max: Any, seed: int | list[int] | None = None) -> None:
        try:
            import torchsde
        except ImportError as error:
            raise ImportError(
                "the SDE samplers draw from torchsde's Brownian tree by default, and torchsde is not installed: "
                "pip install torchsde, or give noise_sampler=, or seed= for noise made in the kernel"
            ) from error
        if seed is None:
            seed = _entropy()
        self._each = isinstance(seed, list | tuple)
        low, high = torch.as_tensor(sigma_min), torch.as_tensor(sigma_max)
        start = torch.zeros_like(x)
        seeds = list(seed) if isinstance(seed, list | tuple) else [seed]
        if self._each and len(seeds) != x.shape[0]:
            raise ValueError(f"seed must hold one integer per sample: the batch is {x.shape[0]}, got {len(seeds)}")
        self._paths = [
            torchsde.BrownianTree(low, start[0] if self._each else start, high, entropy=entropy) for entropy in seeds
        ]

    def __call__(self, sigma: Tensor, sigma_next: Tensor) -> Tensor:
        """A unit normal [B, *S]: the increment over this step."""
        start, end = torch.as_tensor(sigma), torch.as_tensor(sigma_next)
        sign, low, high = (1, start, end) if start < end else (-1, end, start)
        parts = [path(low, high) for path in self._paths]
        increment = sign * (torch.stack(parts) if self._each else parts[0])
        return increment / (end - start).abs().sqrt()


def _entropy() -> int:
    """A seed for a path, from torch's global generator."""
    return int(torch.randint(0, 2**63 - 1, []).item())
