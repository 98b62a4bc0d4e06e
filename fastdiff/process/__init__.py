"""What the noise does: schedules, grids of levels, prediction types. NumPy and float64."""

from __future__ import annotations

from . import grids, predictions, schedules
from .clocks import CLEAN, Level, Schedule
from .predictions import Prediction

__all__ = ["CLEAN", "Level", "Prediction", "Schedule", "grids", "predictions", "schedules"]
