"""What a fast class and its steps refuse: bad input, steps out of order, two threads, schedulers that are no table."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import scheduler_loops as loops
import torch
from capture_cases import make
from fast_cases import X, both, ready

from fastdiff.integrations.diffusers import fast

diffusers = pytest.importorskip("diffusers")
pytestmark = pytest.mark.usefixtures("quiet_diffusers")


class Bent(diffusers.EulerDiscreteScheduler):
    """Overridden maths that is not."""

    def step(self, model_output: Any, timestep: Any, sample: Any, return_dict: bool = True) -> Any:
        result = super().step(model_output, timestep, sample)
        result.prev_sample = result.prev_sample + 0.1 * model_output.abs()
        return result


@pytest.mark.gpu
def test_a_generator_of_another_device() -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    _, twin = both("EulerAncestralDiscrete", {}, 4)
    x = torch.randn(loops.SHAPE)
    with pytest.raises(ValueError, match="Cannot generate a cpu tensor from a generator of type cuda"):
        twin.step(x, twin.timesteps[0], x, generator=torch.Generator("cuda"))


@pytest.mark.parametrize(
    ("error", "words", "act"),
    [
        (IndexError, r"timestep 17 is not in the schedule .*830", lambda s: s["DDIM"].step(X, 17, X)),
        (IndexError, r"timestep 3 is not in the schedule", lambda s: s["EulerDiscrete"].step(X, 3.0, X)),
        (TypeError, r"float64.*float32", lambda s: s["DDIM"].step(X.double(), 0, X.double())),
        (ValueError, r"model_output is \(2, 3, 8, 8\).*\(1, 3, 8, 8\)", lambda s: s["DDIM"].step(X, 0, X[:1])),
        (ValueError, "learned variance", lambda s: s["DDPM"].step(torch.cat([X, X], 1), 0, X)),
        (ValueError, "no elements", lambda s: s["DDIM"].step(X[:0], 0, X[:0])),
        (TypeError, "unexpected keyword argument 'etaa'", lambda s: s["DDIM"].step(X, 0, X, etaa=1.0)),
        (TypeError, "unexpected keyword argument 'generator'", lambda s: s["UniPC"].step(X, 0, X, generator=None)),
        (TypeError, "multiple values for argument 'eta'", lambda s: s["DDIM"].step(X, 0, X, 1.0, eta=1.0)),
        (TypeError, "at most", lambda s: s["DDIM"].step(X, 0, X, *[None] * 9)),
        (TypeError, "eta is a tensor", lambda s: s["DDIM"].step(X, 0, X, eta=torch.tensor(0.1))),
        (ValueError, "both given", lambda s: s["DDIM"].step(X, 332, X, 1.0, False, torch.Generator(), X)),
        (ValueError, r"variance_noise is \(1,", lambda s: s["DDIM"].step(X, 332, X, eta=1.0, variance_noise=X[:1])),
        (RuntimeError, "requires one.*no_grad", lambda s: s["DDIM"].step(X.clone().requires_grad_(), 0, X)),
        (ValueError, "prev_timestep must be the timestep after", lambda s: s["UnCLIP"].step(X, 999, X, 3)),
        (IndexError, "list index out of range", lambda s: s["DDPM"].step(X, 830, X, [torch.Generator()] * 0 or [])),
        (RuntimeError, "asked for step 3", lambda s: _jump(s["UniPC"])),
        (ValueError, r"got timestep 300, this is step 1, whose timestep is 850", lambda s: _skip(s["PNDM"])),
        (ValueError, r"\(1, 3, 8, 8\).*this run began with \(2, 3, 8, 8\)", lambda s: _batch(s["UniPC"])),
        (IndexError, "position 6.*call set_timesteps", lambda s: _once_more(s["UniPC"])),
        (ValueError, "step options changed within a run", lambda s: _options(s["FlowMatchHeunDiscrete"])),
        (RuntimeError, "call set_timesteps", lambda s: _again(s["UniPC"])),
    ],
)
def test_bad_input(error: type[Exception], words: str, act: Any) -> None:
    made = Made()
    with pytest.raises(error, match=words):
        act(made)


class Made(dict):  # type: ignore[type-arg]
    def __missing__(self, name: str) -> Any:
        full = {"UniPC": "UniPCMultistep"}.get(name, name)
        return ready(full, 10 if name == "PNDM" else 6, **({"clip_sample": False} if name == "DDIM" else {}))


def _jump(scheduler: Any) -> None:
    scheduler.step(X, scheduler.timesteps[0], X)
    scheduler._step_index = 3
    scheduler.step(X, scheduler.timesteps[3], X)


def _skip(scheduler: Any) -> None:
    scheduler.step(X, scheduler.timesteps[0], X)
    scheduler.step(X, 300, X)


def _batch(scheduler: Any) -> None:
    scheduler.step(X, scheduler.timesteps[0], X)
    scheduler.step(X[:1], scheduler.timesteps[1], X[:1])


def _once_more(scheduler: Any) -> None:
    for t in [*scheduler.timesteps, 0]:
        scheduler.step(X, t, X)


def _options(scheduler: Any) -> None:
    scheduler.step(X, scheduler.timesteps[0], X)
    scheduler.step(X, scheduler.timesteps[1], X, s_noise=2.0)


def _again(scheduler: Any) -> None:
    scheduler.step(X, scheduler.timesteps[0], X)
    scheduler._step_index = None
    scheduler.step(X, scheduler.timesteps[0], X)


@pytest.mark.parametrize(
    ("kind", "config", "words"),
    [
        ("DPMSolverMultistep", {"thresholding": True, "sample_max_value": 4.0}, r"step \d.*quantile"),
        ("DDIMInverse", {"clip_sample": True}, "clip_sample=False"),
        ("RePaint", {}, "original_image, mask"),
        ("Amused", {"mask_token_id": 5}, "class indices"),
        ("Helios", {"stages": 1}, "returns last_sample, which is no combination"),
        (Bent, {}, r"Bent, step 0: is not affine.*differs from the table by"),
    ],
)
def test_what_is_no_table_is_refused_at_set_timesteps(kind: Any, config: dict[str, Any], words: str) -> None:
    kind = type(make(kind, config)) if isinstance(kind, str) else kind
    scheduler = fast(kind)(**config)  # neither the class nor an object of it is in the way
    with pytest.raises(TypeError, match=words):
        scheduler.set_timesteps(10)


@pytest.mark.parametrize(
    ("what", "words"),
    [
        (diffusers.DDIMScheduler(), r"got an object of DDIMScheduler; write fast\(type"),
        (diffusers.ScoreSdeVeScheduler, "has no step"),
        (torch.nn.Linear, "has no set_timesteps"),
    ],
)
def test_what_is_no_scheduler_class(what: Any, words: str) -> None:
    with pytest.raises(TypeError, match=words):
        fast(what)


def test_threads() -> None:
    """Independent steps may come from any thread; steps that count are refused in a second one, by name."""
    original, twin = both("DDIM", {"clip_sample": False}, 20)
    raws = torch.randn(8, *loops.SHAPE)
    wrong: list[str] = []

    def many(k: int) -> None:
        for t in original.timesteps.tolist() * 5:
            ours, theirs = (s.step(raws[k], t, raws[-k]).prev_sample for s in (twin, original))
            if loops.difference(ours, theirs) > 1e-6:
                wrong.append(f"thread {k}, timestep {t}")

    threads = [threading.Thread(target=many, args=(k,)) for k in range(1, 5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong, wrong[:3]

    counting, alone = ready("UniPCMultistep"), ready("UniPCMultistep")
    caught: list[str] = []

    def step(i: int) -> None:
        try:
            counting.step(X, counting.timesteps[i], X)
        except RuntimeError as error:
            caught.append(str(error))

    def elsewhere(i: int) -> None:
        thread = threading.Thread(target=step, args=(i,))
        thread.start()
        thread.join()

    step(0)
    elsewhere(0)  # a run of its own
    elsewhere(3)
    assert len(caught) == 2 and all("two threads" in each and "deepcopy" in each for each in caught)
    elsewhere(1)  # the same run, carried on, as a server does that streams from a pool of threads
    elsewhere(2)
    for t in alone.timesteps[:3]:
        alone.step(X, t, X)
    ours, theirs = (s.step(X, s.timesteps[3], X).prev_sample for s in (counting, alone))
    assert len(caught) == 2 and torch.equal(ours, theirs)


def test_no_steps() -> None:
    scheduler = fast(diffusers.EulerDiscreteScheduler)()
    with pytest.raises(ValueError, match="has no timesteps"):
        scheduler.set_timesteps(0)
