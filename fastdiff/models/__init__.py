"""Networks and the denoisers around them."""

from .classifier_guidance import classifier_guided
from .feature_reuse import reuse_features
from .noisy_classifier import NoisyClassifier, UNetClassifier
from .perturb import identity_attention, skip_layers
from .shipped import load_noisy_classifier
from .unet import UNet
from .unet_config import UNetConfig

__all__ = [
    "NoisyClassifier",
    "UNet",
    "UNetClassifier",
    "UNetConfig",
    "classifier_guided",
    "identity_attention",
    "load_noisy_classifier",
    "reuse_features",
    "skip_layers",
]
