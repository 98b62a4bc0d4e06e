"""Networks and the denoisers around them."""

from .perturb import identity_attention, skip_layers
from .unet import UNet
from .unet_config import UNetConfig

__all__ = ["UNet", "UNetConfig", "identity_attention", "skip_layers"]
