"""What `capture` refuses: schedulers that are no tables, with the step at which it shows, and wrong arguments."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from capture_cases import make, tiny
from own_scheduler_cases import DrawsFromItsOwn, InPlace, Own

import fastdiff as fd


class Hidden(Own):
    def __init__(self) -> None:
        super().__init__()
        seen: list[Any] = []

        def remember(value: Any) -> Any:
            seen.append(value)
            return seen[-2] if len(seen) > 1 else 0.0 * value

        self.remember = remember

    def step(self, model_output: Any, timestep: Any, sample: Any) -> Any:
        return sample + model_output + 0.5 * self.remember(model_output)


class Nonlinear(Own):
    def step(self, model_output: Any, timestep: Any, sample: Any) -> Any:
        return sample + (torch.tanh(model_output) if timestep == 2.0 else model_output)


class Normed(Own):
    def step(self, model_output: Any, timestep: Any, sample: Any) -> Any:
        return sample + model_output / model_output.norm()


class Branching(Own):
    def step(self, model_output: Any, timestep: Any, sample: Any) -> Any:
        return sample + (model_output if model_output.abs().max() < 1.5 else 2.0 * model_output)


class Constant(Own):
    def step(self, model_output: Any, timestep: Any, sample: Any) -> Any:
        return sample + model_output + 0.25


class ClipsState(Own):
    def step(self, model_output: Any, timestep: Any, sample: Any) -> Any:
        self.old = model_output if self.old is None else self.old + model_output
        return (sample + self.old).clamp(-1, 1)


class Stochastic(Own):
    def step(self, model_output: Any, timestep: Any, sample: Any) -> Any:
        return sample + model_output * torch.rand(sample.shape)


class Greedy(Own):
    def step(self, model_output: Any, timestep: Any, sample: Any) -> Any:
        self.old = [*(self.old or []), model_output]
        return sample + sum((i + 1) * value for i, value in enumerate(self.old))


class Wrong(Own):
    def step(self, model_output: Any, timestep: Any, sample: Any) -> Any:
        return sample[:, :1, :1, :1]


class DrawsAndAdds(DrawsFromItsOwn):
    def step(self, model_output: Any, timestep: Any, sample: Any) -> Any:
        return super().step(model_output, timestep, sample) + 0.25


class DrawsInAThread(Own):
    def step(self, model_output: Any, timestep: Any, sample: Any) -> Any:
        with ThreadPoolExecutor(1) as pool:
            return 0.5 * sample + model_output + pool.submit(torch.randn_like, sample).result()


class DrawsLess(Own):
    """Draws on tensors that are mostly zeros, and not on others."""

    def step(self, model_output: Any, timestep: Any, sample: Any) -> Any:
        noise = torch.randn_like(sample) if (sample == 0.0).any() else 0.0
        return 0.5 * sample + model_output + noise


@pytest.mark.parametrize(
    ("name", "config", "options", "words"),
    [
        ("DDIMInverse", {"clip_sample": True}, {}, r"step 0.*noise-free.*clip_sample=False"),
        ("DDPM", {"thresholding": True, "sample_max_value": 1.5, "clip_sample": False}, {}, r"step \d+.*quantile"),
        ("DPMSolverMultistep", {"thresholding": True, "sample_max_value": 4.0}, {}, r"step \d+.*\de.*quantile"),
        ("CogVideoXDPM", {}, {}, "old_pred_original_sample, timestep_back"),
        ("RePaint", {}, {}, "original_image, mask"),
        ("ScoreSdeVe", {}, {}, "has no step"),
        ("DDPM", {"variance_type": "learned"}, {}, "itself fails"),
        ("Amused", {"mask_token_id": 5}, {}, "class indices"),
    ],
)
def test_diffusers_schedulers_that_are_no_tables(
    name: str, config: dict[str, Any], options: dict[str, Any], words: str
) -> None:
    with pytest.raises((TypeError, RuntimeError), match=words) as error:
        fd.capture(make(name, config), 10, step_options=options)
    assert name in str(error.value)


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        (Hidden, "step 0: uses a tensor from an earlier step that is not in its attributes"),
        (Nonlinear, r"step 8: is not affine: .* differs from the table by \d"),
        (Normed, r"step 0: is not affine"),
        (Branching, r"is not affine"),
        (
            DrawsLess,
            r"DrawsLess: is not affine: .* it draws 0 normals, its table 10; it branches on data",
        ),
        (DrawsInAThread, r"step 0: uses a tensor from an earlier step"),
        (DrawsAndAdds, r"step 0: adds the constant 0.25"),
        (Constant, r"step 0: adds the constant 0.25"),
        (ClipsState, r"step 1: clips something else"),
        (Stochastic, r"step 0: is not affine"),
        (Greedy, r"reads \d+.*at most 6"),
        (Wrong, r"step 0: returned shape \(1, 1, 1, 1\)"),
        (Own, r"itself fails in step 0: NotImplementedError"),
    ],
)
def test_what_is_no_table_is_refused_with_its_step(kind: type[Own], words: str) -> None:
    with pytest.raises((TypeError, ValueError, RuntimeError), match=words) as error:
        fd.capture(kind(), 10)
    assert kind.__name__ in str(error.value)


@pytest.mark.parametrize(
    ("scheduler", "steps", "words"),
    [
        (Own, 5, "got the class Own, expected an object"),
        (3, 5, "int has no set_timesteps"),
        (InPlace(), 0, "InPlace has no timesteps"),
        (InPlace(), "five", "InPlace itself fails in set_timesteps"),
    ],
)
def test_bad_arguments(scheduler: Any, steps: Any, words: str) -> None:
    with pytest.raises((TypeError, RuntimeError), match=words):
        fd.capture(scheduler, steps)


@pytest.mark.parametrize("wrong", ["x0", "v"])
def test_a_network_of_another_kind_is_refused(wrong: str) -> None:
    plan = fd.capture(make("DDIM", {"clip_sample": False}), 3)
    with pytest.raises(ValueError, match=f"predicts 'eps'.*predicts '{wrong}'"):
        fd.Sampler(plan, fd.Denoiser(tiny, "linear", wrong))


def test_laws_need_levels() -> None:
    plan = fd.capture(make("IPNDM", {}), 5)
    with pytest.raises(ValueError, match="IPNDMScheduler does not say at what level"):
        plan.verify()
