"""Networks and the denoisers around them."""

from .feature_reuse import reuse_features
from .perturb import identity_attention, skip_layers
from .unet import UNet
from .unet_config import UNetConfig

__all__ = ["UNet", "UNetConfig", "identity_attention", "reuse_features", "skip_layers"]
