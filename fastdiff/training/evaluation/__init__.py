"""How good a model is, beside real pictures measured the same way: see `evaluate`."""

from .evaluate import Report, evaluate

__all__ = ["Report", "evaluate"]
