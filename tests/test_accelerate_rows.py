"""Rows of an accelerated pipeline that go from its network to the kernel directly, and what becomes of the others."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import accelerate_cases
import pytest
import torch
from accelerate_cases import KINDS, LATENT, apart, tiny

from fastdiff.integrations.diffusers import accelerate, ahead, asking
from fastdiff.integrations.diffusers.accelerate import ENGINE
from fastdiff.integrations.diffusers.asking import Direct
from fastdiff.integrations.diffusers.pipelines import interruption

diffusers = pytest.importorskip("diffusers")


def call(pipe: Any, **more: Any) -> torch.Tensor:
    """What five steps give."""
    return torch.as_tensor(accelerate_cases.call(pipe, num_inference_steps=5, **more))


def network_of(pipe: Any) -> Any:
    return getattr(pipe, "unet", None) or pipe.transformer


def rows_of(pipe: Any, monkeypatch: pytest.MonkeyPatch) -> list[Direct | None]:
    """What the rows of calls are run by from here on, as each loop is made ready."""
    seen: list[Direct | None] = []
    own = asking.Asking.direct

    def direct(self: Any, times: Any) -> Direct | None:
        seen.append(own(self, times))
        return seen[-1]

    monkeypatch.setattr(asking.Asking, "direct", direct)
    return seen


@pytest.mark.parametrize("kind", KINDS)
def test_a_second_call_runs_every_row_directly_and_gives_the_same_bits(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipe = accelerate(tiny.make(kind))
    seen = rows_of(pipe, monkeypatch)
    first = call(pipe)
    assert seen[0] is None and isinstance(seen[1], Direct) and len(seen) == 2
    assert torch.equal(call(pipe), first)
    assert isinstance(seen[2], Direct) and len(seen) == 3


def test_rescaled_guidance_takes_two_steps_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    plain, pipe = tiny.make("StableDiffusionPipeline"), accelerate(tiny.make("StableDiffusionPipeline"))
    seen = rows_of(pipe, monkeypatch)
    assert apart(call(pipe, guidance_rescale=0.7), call(plain, guidance_rescale=0.7)) <= LATENT
    assert set(seen) == {None}


FORMS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "strides": lambda output: output.transpose(-1, -2).contiguous().transpose(-1, -2),
    "parameter": lambda output: torch.nn.Parameter(output, requires_grad=False),
    "dtype": lambda output: output.double().float(),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", ["StableDiffusionPipeline", "FluxPipeline", "DiTPipeline", "DDPMPipeline"])
def test_an_output_in_another_form_in_between(kind: str, form: str) -> None:
    pipe = accelerate(tiny.make(kind))
    expected, count = call(pipe), 0

    def change(module: Any, args: Any, output: Any) -> Any:
        nonlocal count
        count += 1
        if count not in (2, 3, 6):
            return output
        if isinstance(output, tuple):
            return (FORMS[form](output[0]), *output[1:])
        output.sample = FORMS[form](output.sample)
        return output

    network_of(pipe).register_forward_hook(change)
    assert torch.equal(call(pipe), expected)
    assert count >= 5


def test_a_network_that_returns_an_object_from_now_on() -> None:
    pipe = accelerate(tiny.make("StableDiffusionPipeline"))
    expected, forward = call(pipe), pipe.unet.forward
    (desk,) = vars(pipe)[ENGINE]._desks
    assert [pick for pick, _ in desk.direct.values()] == [asking._FIRST]
    # the pipeline's own loop reads [0] of what stands in for the network, so only the rows see the object
    pipe.unet.forward = lambda *args, **kw: SimpleNamespace(sample=forward(*args, **kw)[0])
    assert torch.equal(call(pipe), expected)
    assert [pick for pick, _ in desk.direct.values()] == [asking._SAMPLE]


def test_an_output_in_another_dtype_in_between_binds_a_step_of_its_own() -> None:
    pipe = accelerate(tiny.make("StableDiffusionPipeline"))
    expected, count = call(pipe), 0

    def half(module: Any, args: Any, output: Any) -> Any:
        nonlocal count
        count += 1
        return (output[0].half(),) if count == 3 else output

    pipe.unet.register_forward_hook(half)
    assert 0 < apart(call(pipe), expected) < 2e-3
    (desk,) = vars(pipe)[ENGINE]._desks
    assert {key[0] for key in desk._steps} == {torch.float32, torch.float16}
    count = 3
    assert torch.equal(call(pipe), expected)


def test_too_many_channels_are_refused_in_any_row() -> None:
    pipe, count = accelerate(tiny.make("StableDiffusionPipeline")), 0
    call(pipe)

    def double(module: Any, args: Any, output: Any) -> Any:
        nonlocal count
        count += 1
        return (torch.cat([output[0]] * 2, 1),) if count == 3 else output

    pipe.unet.register_forward_hook(double)
    with pytest.raises(ValueError, match="the network gives 8 channels for latents of 4; a variance") as refused:
        call(pipe)
    assert refused.value.__context__ is None


@pytest.mark.parametrize("kind", KINDS)
def test_where_an_interruption_is_looked_for(kind: str) -> None:
    pipe = tiny.make(kind)
    found, of = interruption(type(pipe), pipe)
    if not hasattr(type(pipe), "interrupt"):
        assert found is None
        return
    assert found is not None
    for value in (False, True):
        pipe._interrupt = value
        assert found(of) is pipe.interrupt is value


def test_an_interruption_of_somebody_s_own_class() -> None:
    class Own(diffusers.StableDiffusionPipeline):  # type: ignore[misc,name-defined]
        @property
        def interrupt(self) -> bool:
            return self.stops

    pipe = tiny.make("StableDiffusionPipeline")
    pipe.__class__, pipe.stops = Own, True
    pipe._interrupt = False
    found, of = interruption(Own, pipe)
    assert found is not None and found(of) is True


@pytest.mark.parametrize("batch", [1, 2])
def test_a_learned_variance_is_left_where_it_is_in_a_batch_of_one(batch: int) -> None:
    plain, pipe = tiny.make("DiTPipeline"), accelerate(tiny.make("DiTPipeline"))
    given = {"class_labels": [3, 5][:batch]}
    for guidance in (4.0, 1.0):
        expected = call(plain, guidance_scale=guidance, **given)
        for _ in range(2):
            assert apart(call(pipe, guidance_scale=guidance, **given), expected) <= LATENT
    for desk in vars(pipe)[ENGINE]._desks:
        assert [pick is asking._SAMPLE for pick, _ in desk.direct.values()] == [batch == 1]


def drawing(kind: str) -> Any:
    """A pipeline whose every step draws."""
    ancestral = diffusers.EulerAncestralDiscreteScheduler(**tiny.LATENT, steps_offset=1)
    return tiny.make(kind, None if kind == "DDPMPipeline" else ancestral)


@pytest.mark.parametrize("kind", ["DDPMPipeline", "StableDiffusionPipeline"])
def test_normals_drawn_ahead_are_the_schedulers(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A whole call, one that is interrupted and one that fails leave the generator where they leave it."""
    pipes, made, count, stop = [drawing(kind), accelerate(drawing(kind))], list[int](), 0, "never"
    own = ahead.Ahead.__init__

    def ahead_of(self: Any, normals: torch.Tensor, source: torch.Generator) -> None:
        made.append(len(normals))
        own(self, normals, source)

    monkeypatch.setattr(ahead.Ahead, "__init__", ahead_of)

    def watch(pipe: Any) -> None:
        nonlocal count
        count += 1
        if count == 3 and stop == "fails":
            raise ArithmeticError
        pipe._interrupt = count == 3 and stop == "interrupted"

    for pipe in pipes:
        network_of(pipe).register_forward_pre_hook(lambda *_, pipe=pipe: watch(pipe))
    for stop in ("never", "fails", *(("interrupted",) if kind != "DDPMPipeline" else ()), "never"):
        pictures, states = [], []
        for pipe in pipes:
            count, generator = 0, torch.Generator().manual_seed(4)
            with pytest.raises(ArithmeticError) if stop == "fails" else contextlib.nullcontext():
                pictures.append(call(pipe, generator=generator))
            states.append(generator.get_state())
        assert torch.equal(*states)
        assert stop == "fails" or apart(*pictures) <= LATENT
    assert len(made) == (3 if kind == "DDPMPipeline" else 4) and set(made) <= {4, 5}


def test_normals_are_drawn_one_by_one_where_somebody_may_draw_in_between(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(ahead.Ahead, "__init__")  # none can be made
    pipes, pictures = [drawing("StableDiffusionPipeline"), accelerate(drawing("StableDiffusionPipeline"))], []
    for pipe in pipes:
        torch.manual_seed(2)
        pictures.append([call(pipe, generator=None)])
        given = {"callback_on_step_end": lambda pipe, i, t, tensors: {}}
        pictures[-1].append(call(pipe, generator=torch.Generator().manual_seed(1), **given))
    for theirs, ours in zip(*pictures, strict=True):
        assert apart(ours, theirs) <= LATENT


def test_a_context_of_caches_that_are_refused_is_not_entered(monkeypatch: pytest.MonkeyPatch) -> None:
    pipe, entered = tiny.make("FluxPipeline"), list[str]()
    own = type(pipe.transformer).cache_context

    def context(self: Any, name: str, **options: Any) -> Any:
        entered.append(name)
        return own(self, name, **options)

    monkeypatch.setattr(type(pipe.transformer), "cache_context", context)
    before = call(pipe)
    assert entered == ["cond", "uncond"] * 5
    assert apart(call(accelerate(pipe)), before) <= LATENT and len(entered) == 10


@pytest.mark.parametrize("generator", ["default", "given as the default", "the caller's"])
def test_a_network_that_draws_draws_before_the_step_as_in_diffusers(generator: str) -> None:
    """Two calls, so that both the first row and those that run directly are compared."""

    def dropping() -> Any:
        pipe = drawing("StableDiffusionPipeline")
        network_of(pipe).register_forward_hook(lambda module, args, output: (torch.nn.functional.dropout(output[0]),))
        return pipe

    def pictures(pipe: Any) -> list[torch.Tensor]:
        found = []
        for _ in range(2):
            torch.manual_seed(3)
            mine = torch.Generator().manual_seed(4) if generator == "the caller's" else None
            given = torch.default_generator if generator == "given as the default" else mine
            found += [call(pipe, generator=given), torch.get_rng_state().float()]
        return found

    for ours, theirs in zip(pictures(accelerate(dropping())), pictures(dropping()), strict=True):
        assert apart(ours, theirs) <= LATENT


def test_rows_that_are_left_may_draw_nothing() -> None:
    """The last step of DDPM has no noise."""
    scheduler = diffusers.DDPMScheduler(**tiny.LATENT, clip_sample=False, timestep_spacing="leading")
    plain, pipe = (tiny.make("StableDiffusionXLImg2ImgPipeline", scheduler) for _ in range(2))
    accelerate(pipe)
    found = []
    for one in (pipe, plain):
        generator = torch.Generator().manual_seed(3)
        found += [call(one, strength=0.2, generator=generator), generator.get_state().float()]
    assert apart(found[0], found[2]) <= LATENT
    assert torch.equal(found[1], found[3])


@pytest.mark.parametrize("kind", ["StableDiffusionPipeline", "DDPMPipeline", "DiTPipeline"])
@pytest.mark.parametrize("contiguous", [True, False])
def test_an_output_whose_sign_torch_has_still_to_turn(kind: str, contiguous: bool) -> None:
    """Torch keeps z.conj().imag as a view of z with a bit that says minus."""

    def turned(pipe: Any) -> Any:
        def hook(module: Any, args: Any, output: Any) -> Any:
            minus = -(output[0] if isinstance(output, tuple) else output.sample)
            view = torch._neg_view(minus) if contiguous else torch.complex(minus, -minus).conj().imag
            assert view.is_neg() and view.is_contiguous() == contiguous
            return (view,) if isinstance(output, tuple) else type(output)(sample=view)

        network_of(pipe).register_forward_hook(hook)
        return pipe

    plain, pipe = turned(tiny.make(kind)), turned(accelerate(tiny.make(kind)))
    assert apart(call(pipe), call(plain)) <= LATENT
