"""One encoded picture to an array of the size and channels that are trained on. May import: source, images."""

from __future__ import annotations

import io
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from fastdiff.errors import unknown_name
from fastdiff.images import to_8_bit

from .source import UnreadableFile

RESIZE = ("crop", "pad", "none")
_MODES = {1: "L", 3: "RGB", 4: "RGBA"}


@dataclass(frozen=True)
class Fit:
    """How pictures come to one shape.

    size: height and width to reach, None for that of the first picture. resize: "crop" scales the short side to
    `size` and keeps the middle; "pad" centres smaller pictures on black; "none" takes only pictures of that size.
    channels: 1 grey, 3 colour, 4 with transparency, None for what the first picture has; with 1 and 3 transparency
    is left out, over no background (`images.to_8_bit`). Of arrays: what they have.
    """

    size: int | None = None
    resize: str = "crop"
    channels: int | None = None

    def __post_init__(self) -> None:
        if self.resize not in RESIZE:
            raise unknown_name("resize", self.resize, RESIZE)


def decode(data: bytes | Path, name: str, fit: Fit, shape: tuple[int, ...]) -> NDArray[np.uint8]:
    """The picture as uint8 [C, H, W] of `shape`. Raises: UnreadableFile, or ValueError where the size does not fit."""
    channels, height, width = shape
    try:
        with Image.open(data if isinstance(data, Path) else io.BytesIO(data)) as image:
            picture = to_8_bit(image, _MODES[channels])
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise UnreadableFile(str(error)) from error
    if picture.size != (width, height):
        picture = _fitted(picture, name, fit, height, width)
    array = np.asarray(picture, np.uint8)
    return np.ascontiguousarray(array[None] if array.ndim == 2 else array.transpose(2, 0, 1))


def shape_of(data: bytes | Path, fit: Fit) -> tuple[int, int, int]:
    """[C, H, W] that a picture comes to, from its header. Raises: UnreadableFile, or ValueError for other channels."""
    if fit.channels not in (None, *_MODES):
        raise ValueError(f"channels must be 1, 3 or 4 for pictures, got {fit.channels}")
    try:
        with Image.open(data if isinstance(data, Path) else io.BytesIO(data)) as image:
            grey = image.mode in ("1", "L", "I", "F") or image.mode.startswith("I;16")
            width, height = image.size
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise UnreadableFile(str(error)) from error
    channels = fit.channels or (1 if grey else 3)
    return (channels, height, width) if fit.size is None else (channels, fit.size, fit.size)


def _fitted(picture: Image.Image, name: str, fit: Fit, height: int, width: int) -> Image.Image:
    got = f"{picture.height}x{picture.width}"
    if fit.resize == "none":
        raise ValueError(
            f"{name} is {got}, expected {height}x{width} as the others: pictures of mixed sizes need resize=crop "
            "or resize=pad"
        )
    if fit.resize == "pad":
        if picture.height > height or picture.width > width:
            raise ValueError(f"{name} is {got}, more than the {height}x{width} it is padded to; use resize=crop")
        canvas = Image.new(picture.mode, (width, height))
        canvas.paste(picture, ((width - picture.width) // 2, (height - picture.height) // 2))
        return canvas
    scale = max(height / picture.height, width / picture.width)
    wide, high = max(width, round(picture.width * scale)), max(height, round(picture.height * scale))
    # A box filter first where much is thrown away, as the decoder would: quick, and no aliasing.
    grown = picture.resize((wide, high), Image.Resampling.BICUBIC, reducing_gap=3.0)
    left, top = (wide - width) // 2, (high - height) // 2
    return grown.crop((left, top, left + width, top + height))
