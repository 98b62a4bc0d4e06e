"""fastdiff: any diffusion or flow sampler compiled to one table, run by one fused kernel."""

from fastdiff import models
from fastdiff.compiler import solvers
from fastdiff.compiler.adaptive import AdaptivePlan
from fastdiff.compiler.build import plan
from fastdiff.compiler.capture import capture
from fastdiff.compiler.plan import Plan
from fastdiff.compiler.solvers import solver
from fastdiff.compiler.trace import trace
from fastdiff.engine import guidance, suite
from fastdiff.engine.backends import probe as backends
from fastdiff.engine.frames import FrameNoise
from fastdiff.engine.gits import gits
from fastdiff.engine.loop import RowInfo
from fastdiff.engine.rolling import rolling
from fastdiff.engine.sample import sample
from fastdiff.engine.sampler import Sampler
from fastdiff.engine.skipping import AdaptiveSkip
from fastdiff.engine.stream import Stream
from fastdiff.engine.stream import Stream as stream
from fastdiff.errors import BackendUnavailable
from fastdiff.models.denoiser import Denoiser
from fastdiff.models.shipped import load
from fastdiff.process import grids, predictions, schedules
from fastdiff.process.schedules import Level, Schedule

__version__ = "0.1.0"

__all__ = [
    "AdaptivePlan",
    "AdaptiveSkip",
    "BackendUnavailable",
    "Denoiser",
    "FrameNoise",
    "Level",
    "Plan",
    "RowInfo",
    "Sampler",
    "Schedule",
    "Stream",
    "backends",
    "capture",
    "gits",
    "grids",
    "guidance",
    "load",
    "models",
    "plan",
    "predictions",
    "rolling",
    "sample",
    "schedules",
    "solver",
    "solvers",
    "stream",
    "suite",
    "trace",
]
