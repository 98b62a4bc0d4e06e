"""Every group normalisation of the UNets the benchmarks and tests speak of, derived from their configurations."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple


class Norm(NamedTuple):
    """channels in 32 groups, over size x size pixels."""

    channels: int
    size: int

    @property
    def pixels(self) -> int:
        return self.size * self.size


def walk(
    size: int,
    channels: int,
    widths: tuple[int, ...],
    blocks: int,
    attends_down: Callable[[int], bool],
    attends_up: Callable[[int, int], bool],
    resblocks: bool,
) -> list[Norm]:
    """The norms of a UNet in the order they run: two of each residual block, one of each attention, one at the end.

    widths: channels of each level. resblocks: halving and doubling are residual blocks of their own, the first norm of
    which sees the size before. attends_down(level), attends_up(level, index): whether a block has attention; that of
    the first middle block always does.
    """
    found: list[Norm] = []

    def block(inside: int, outside: int, before: int, after: int, attends: bool = False) -> None:
        found.extend((Norm(inside, before), Norm(outside, after), *([Norm(outside, after)] if attends else [])))

    now, skips = channels, [channels]
    for level, width in enumerate(widths):
        if level:
            if resblocks:
                block(now, now, size, size // 2)
            size //= 2
            skips.append(now)
        for _ in range(blocks):
            block(now, width, size, size, attends_down(level))
            now = width
            skips.append(now)
    block(now, now, size, size, True)
    block(now, now, size, size)
    for level in reversed(range(len(widths))):
        if level < len(widths) - 1:
            if resblocks:
                block(now, now, size, 2 * size)
            size *= 2
        for index in range(blocks + 1):
            block(now + skips.pop(), widths[level], size, size, attends_up(level, index))
            now = widths[level]
    return [*found, Norm(now, size)]


NETWORKS: dict[str, list[Norm]] = {
    # google/ddpm-cifar10-32: attention at 16x16
    "ddpm-cifar10": walk(32, 128, (128, 256, 256, 256), 2, lambda i: i == 1, lambda i, _: i == 1, False),
    # NVlabs/edm, DDPM++ on CIFAR-10: attention at 16x16, on the way up in the last block only
    "edm-cifar10": walk(32, 128, (256, 256, 256), 4, lambda i: i == 1, lambda i, k: i == 1 and k == 4, True),
    # NVlabs/edm, ADM on ImageNet-64: attention at 32x32, 16x16 and 8x8
    "adm-64": walk(64, 192, (192, 384, 576, 768), 3, lambda i: i > 0, lambda i, _: i > 0, True),
    # Stable Diffusion 1.5 on latents of 64x64
    "sd-1.5": walk(64, 320, (320, 640, 1280, 1280), 2, lambda i: i < 3, lambda i, _: i < 3, False),
}
