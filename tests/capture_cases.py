"""Configurations of diffusers' schedulers, and diffusers' own loop on given draws: for the tests of captures."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

diffusers = pytest.importorskip("diffusers")

Array = np.ndarray[Any, np.dtype[np.float64]]

STEPS = (1, 2, 3, 10, 20)
VP_KINDS = ("epsilon", "v_prediction", "sample")
SIZE = (2, 3, 4, 4)
EXACT = {"float64": 1e-10, "float32": 5e-6}  # by what the scheduler computes in
KINDS = {"epsilon": "eps", "v_prediction": "v", "sample": "x0", "flow_prediction": "flow"}

KARRAS = {"use_karras_sigmas": True}
V = {"prediction_type": "v_prediction"}
X0 = {"prediction_type": "sample"}
FLOW = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0}
CASES: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    ("DDIM", {"clip_sample": False}, {}),
    ("DDIM", {"clip_sample": False, **V, "timestep_spacing": "trailing", "rescale_betas_zero_snr": True}, {"eta": 0.7}),
    ("DDIM", {"clip_sample": True}, {"use_clipped_model_output": True}),
    ("DDIM", {"clip_sample": True}, {}),
    ("DDIM", {"clip_sample": True, "prediction_type": "v_prediction"}, {"eta": 1.0}),
    ("DDIM", {"clip_sample": False, **X0}, {"eta": 1.0}),
    ("DDIMInverse", {"clip_sample": False}, {}),
    ("DDIMParallel", {"clip_sample": False}, {"eta": 0.5}),
    ("DDPM", {}, {}),
    ("DDPM", {"clip_sample": False, "variance_type": "fixed_large", **V}, {}),
    ("DDPM", {"clip_sample": False, "thresholding": True, "sample_max_value": 1.0}, {}),
    ("DDPMParallel", {"clip_sample_range": 2.0}, {}),
    ("CogVideoXDDIM", V, {}),
    ("EulerDiscrete", {}, {}),
    ("EulerDiscrete", {**V, **KARRAS, "timestep_spacing": "leading"}, {}),
    ("EulerDiscrete", {}, {"s_churn": 3.0, "s_noise": 1.003}),
    ("EulerAncestralDiscrete", {}, {}),
    ("HeunDiscrete", {}, {}),
    ("HeunDiscrete", {**KARRAS, "clip_sample": True}, {}),
    ("KDPM2Discrete", KARRAS, {}),
    ("KDPM2AncestralDiscrete", {}, {}),
    ("LMSDiscrete", {}, {}),
    ("PNDM", {}, {}),
    ("PNDM", {"skip_prk_steps": True, **V}, {}),
    ("DPMSolverMultistep", {}, {}),
    ("DPMSolverMultistep", {"solver_order": 3, **KARRAS}, {}),
    ("DPMSolverMultistep", {"algorithm_type": "dpmsolver", "final_sigmas_type": "sigma_min"}, {}),
    ("DPMSolverMultistep", {"algorithm_type": "sde-dpmsolver++", **V}, {}),
    ("DPMSolverMultistep", {"thresholding": True, "sample_max_value": 1.0}, {}),
    ("DPMSolverMultistep", FLOW, {}),
    ("DPMSolverMultistepInverse", {}, {}),
    ("DPMSolverSinglestep", {"lower_order_final": True}, {}),
    ("DPMSolverSinglestep", {"solver_order": 3, "lower_order_final": True, **X0}, {}),
    ("DPMSolverSDE", {}, {}),
    ("UniPCMultistep", {}, {}),
    ("UniPCMultistep", {"solver_order": 3, "solver_type": "bh1", "final_sigmas_type": "sigma_min", **V}, {}),
    ("UniPCMultistep", FLOW, {}),
    ("DEISMultistep", {"solver_order": 3}, {}),
    ("SASolver", {}, {}),
    ("SASolver", {"predictor_order": 3, "corrector_order": 4, **V}, {}),
    ("IPNDM", {}, {}),
    ("LCM", {}, {}),
    ("LCM", {"clip_sample": True}, {}),
    ("TCD", {}, {"eta": 0.4}),
    ("FlowMatchEulerDiscrete", {"shift": 3.0}, {}),
    ("FlowMatchEulerDiscrete", {"stochastic_sampling": True}, {}),
    ("FlowMatchHeunDiscrete", {"shift": 3.0}, {}),
    ("FlowMatchLCM", {}, {}),
    ("FlowMapEulerDiscrete", {}, {}),
    ("LTXEulerAncestralRF", {}, {}),
    ("EDMEuler", {}, {}),
    ("EDMDPMSolverMultistep", {}, {}),
    ("EDMDPMSolverMultistep", {"algorithm_type": "sde-dpmsolver++", **V}, {}),
    ("CosineDPMSolverMultistep", {}, {}),
    ("CMStochasticIterative", {}, {}),
    ("UnCLIP", {}, {}),
    ("Helios", {"stages": 1}, {}),
    ("MiniMaxH3", {}, {}),
]
# Steps at which diffusers itself raises or gives nan: fewer than its start-up needs, or a division by a zero sigma.
UNABLE = {("PNDM", 1), ("PNDM", 2), ("PNDM", 3), ("UnCLIP", 1), ("MiniMaxH3", 1)}
IDS = ["-".join(map(str, (name, *config.values(), *options.values()))) for name, config, options in CASES]


_MADE: dict[str, Any] = {}


def make(name: str, config: dict[str, Any]) -> Any:
    """The scheduler of that name; skipped where diffusers has it only with packages that are not there.

    A copy of the first one made with this config: KDPM2's constructor takes half a second.
    """
    label = f"{name} {config}"
    if label not in _MADE:
        _MADE[label] = _make(name, config)
    return copy.deepcopy(_MADE[label])


def _make(name: str, config: dict[str, Any]) -> Any:
    found = getattr(diffusers, f"{name}Scheduler", None)
    if found is None:
        module = __import__("diffusers.schedulers", fromlist=["x"])
        found = getattr(module, f"{name}Scheduler", None)
    assert found is not None, f"diffusers has no {name}Scheduler"
    try:
        return found(**config)
    except ImportError as missing:  # scipy, torchsde: development dependencies
        pytest.skip(str(missing).strip().splitlines()[0])


class Loop:
    """diffusers' own loop: init_noise_sigma, scale_model_input, step; the k-th draw is normals[k]."""

    def __init__(self, scheduler: Any, steps: int, options: dict[str, Any], dtype: torch.dtype) -> None:
        rng = np.random.default_rng(steps)
        self.scheduler = copy.deepcopy(scheduler)
        self.scheduler.set_timesteps(steps)
        if hasattr(self.scheduler, "noise_sampler"):
            self.scheduler.noise_sampler = lambda *_: self._draw(SIZE, dtype=dtype)
        self.options, self.dtype = options, dtype
        self.normals: Array = rng.standard_normal((120, *SIZE))
        self.latents: Array = rng.standard_normal(SIZE)
        scale = float(getattr(self.scheduler, "init_noise_sigma", 1.0))
        self.start = (torch.from_numpy(self.latents) * scale).to(dtype)
        self.drawn = 0
        self.states: list[torch.Tensor] = []

    def run(self, net: Callable[[torch.Tensor, torch.Tensor], torch.Tensor], patch: pytest.MonkeyPatch) -> torch.Tensor:
        x = self.start
        times = list(self.scheduler.timesteps)
        with patch.context() as patched:
            patched.setattr(torch, "randn", self._draw)
            for i, t in enumerate(times):
                options = dict(self.options)
                if "prev_timestep" in inspect.signature(self.scheduler.step).parameters:
                    options["prev_timestep"] = times[i + 1] if i + 1 < len(times) else None
                self.states.append(x)
                scaled = x
                if hasattr(self.scheduler, "scale_model_input"):
                    scaled = self.scheduler.scale_model_input(x, t)
                output = net(scaled, t.expand(len(x)) if t.ndim == 0 else t)
                x = self.scheduler.step(output, t, x, **options).prev_sample.to(self.dtype)
        return x

    def _draw(self, *_: Any, dtype: torch.dtype | None = None, **__: Any) -> torch.Tensor:
        self.drawn += 1
        return torch.from_numpy(self.normals[self.drawn - 1]).to(dtype or torch.float32)


def tiny(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    """A network: nonlinear, mixes channels, depends on the time, in the input's dtype."""
    clock = torch.sin(t.to(x.dtype) / 300).view(-1, *[1] * (x.ndim - 1))
    return torch.tanh(0.7 * x + 0.2 * x.roll(1, dims=1)) + 0.3 * clock
