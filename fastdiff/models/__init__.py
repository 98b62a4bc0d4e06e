"""Networks and the denoisers around them."""

from .unet import UNet
from .unet_config import UNetConfig

__all__ = ["UNet", "UNetConfig"]
