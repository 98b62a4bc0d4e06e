"""The bound row of executor "cpp", a C function: what it refuses, what it keeps, and that it is the same row."""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import re
import sys
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from row_cases import Case
from torch import Tensor

import fastdiff as fd
from fastdiff.engine import native, ops

pytestmark = pytest.mark.skipif(not fd.backends()["cpp"].ok, reason="no compiled extension")

LAYOUTS = (torch.contiguous_format, torch.channels_last)


def copied(tensors: ops.StepTensors) -> ops.StepTensors:
    """The same numbers elsewhere."""
    return dataclasses.replace(
        tensors,
        **{
            field.name: None if value is None else value.clone()
            for field in dataclasses.fields(tensors)
            for value in [getattr(tensors, field.name)]
        },
    )


def outputs(tensors: ops.StepTensors) -> tuple[Tensor, Tensor | None, Tensor | None]:
    return tensors.model_out, tensors.unguided, tensors.perturbed


def in_python(tensors: ops.StepTensors) -> Callable[..., Any]:
    """The step that takes what the C function does not know."""
    return native._bind(native.arguments(tensors), tensors, "cpp", "affine_step")


def written(tensors: ops.StepTensors) -> list[Tensor]:
    """The bits of all that a row writes."""
    named = (tensors.state, tensors.model_in, tensors.model_time, tensors.row, tensors.denoised, tensors.status)
    return [one.contiguous().view(torch.uint8) for one in named if one is not None]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    "branches",
    [
        {"guided": False},
        {},
        {"branches": "apart"},
        {"perturbed": True, "mixed": True},
        {"perturbed": True, "mixed": True, "branches": "apart"},
        {"guided": False, "perturbed": True, "mixed": True, "branches": "apart"},
    ],
    ids=str,
)
def test_the_same_row_to_the_bit_as_in_python(
    layout: torch.memory_format, dtype: torch.dtype, branches: dict[str, Any]
) -> None:
    ours = Case(shape=(3, 5, 7), layout=layout, model_dtype=dtype, emit_dtype=dtype, **branches).tensors()
    theirs = copied(ours)
    step = ops.bind(ours, "cpp")
    assert type(step).__name__ == "builtin_function_or_method"
    before = written(copied(ours))
    assert step(*outputs(ours)) is True
    in_python(theirs)(*outputs(theirs))
    assert all(torch.equal(a, b) for a, b in zip(written(ours), written(theirs), strict=True))
    assert not torch.equal(written(ours)[0], before[0])


def test_other_tensors_like_those_bound_and_names_for_the_branches() -> None:
    tensors = Case(branches="apart").tensors()
    again, moved = copied(tensors), copied(tensors)
    ops.bind(tensors, "cpp")(*outputs(tensors))
    step = ops.bind(again, "cpp")
    again.model_out.fill_(float("nan"))  # what was bound is not read
    step(moved.model_out, unguided=moved.unguided)
    assert all(torch.equal(a, b) for a, b in zip(written(tensors), written(again), strict=True))


def test_a_dimension_of_one_may_have_any_stride() -> None:
    tensors = Case(shape=(1, 4, 4), batch=1, guided=False).tensors()
    odd = tensors.model_out.as_strided((1, 1, 4, 4), (5, 7, 4, 1))
    assert ops.bind(tensors, "cpp")(odd) is True
    assert int(tensors.row) != int(Case(shape=(1, 4, 4), batch=1, guided=False).tensors().row)


class Own(Tensor):
    pass


def refused(like: Tensor) -> dict[str, tuple[tuple[Any, ...], dict[str, Any], type[Exception], str]]:
    """Calls of a step bound to one stack of outputs: arguments, and what is raised."""
    unlike = "affine_step: the model output is .*, the one bound was "
    return {
        "shape": ((like[:2],), {}, ValueError, unlike + re.escape(str(tuple(like.shape)))),
        "dimensions": ((like[0],), {}, ValueError, unlike),
        "dtype": ((like.half(),), {}, ValueError, r"is \(6, 3, 5, 7\) torch.float16 on cpu with strides"),
        "integers": ((like.int(),), {}, ValueError, "torch.int32 on cpu"),
        "strides": ((like.transpose(2, 3).contiguous().transpose(2, 3),), {}, ValueError, r"strides \(105, 35, 1, 5\)"),
        "expanded": ((like[:1].expand_as(like),), {}, ValueError, r"strides \(0, 35, 7, 1\)"),
        "device": ((like.to("meta"),), {}, ValueError, "on meta with strides"),
        "subclass": ((like[:2].as_subclass(Own),), {}, ValueError, unlike),
        "no tensor": (([like],), {}, AttributeError, "shape"),
        "nothing": ((None,), {}, AttributeError, "shape"),
        "no arguments": ((), {}, TypeError, "model_out"),
        "four arguments": ((like, None, None, None), {}, TypeError, "4 were given"),
        "a name": ((like,), {"denoised": like}, TypeError, "unexpected keyword argument 'denoised'"),
        "unguided": ((like, like), {}, ValueError, "unguided was absent when it was bound and is given now"),
        "perturbed": ((like, None, like), {}, ValueError, "perturbed was absent when it was bound and is given now"),
    }


@pytest.mark.parametrize("name", list(refused(torch.zeros(6, 3, 5, 7))))
def test_refused_and_nothing_done(name: str) -> None:
    tensors = Case().tensors()
    step, before = ops.bind(tensors, "cpp"), copied(tensors)
    args, kw, error, words = refused(tensors.model_out)[name]
    with pytest.raises(error, match=words):
        step(*args, **kw)
    assert all(torch.equal(a, b) for a, b in zip(written(tensors), written(before), strict=True))
    assert step(tensors.model_out) is True


def test_a_sparse_output_is_not_read() -> None:
    tensors = Case(shape=(3, 5, 7), guided=False).tensors()
    step = ops.bind(tensors, "cpp")
    with pytest.raises((RuntimeError, ValueError)):
        step(tensors.model_out.to_sparse())
    assert step(tensors.model_out) is True


def test_a_subclass_with_memory_of_its_own_is_read_as_a_tensor_is() -> None:
    ours, theirs = Case().tensors(), Case().tensors()
    ops.bind(ours, "cpp")(ours.model_out)
    ops.bind(theirs, "cpp")(theirs.model_out.as_subclass(Own))
    assert all(torch.equal(a, b) for a, b in zip(written(ours), written(theirs), strict=True))


def test_an_output_that_is_not_finite_is_told_until_the_status_is_cleared() -> None:
    tensors = Case().tensors()
    tensors.coef[:, 0:2] = 1.0
    step = ops.bind(tensors, "cpp")
    good, start = tensors.model_out, tensors.row.clone()
    assert step(good) is True
    tensors.row.copy_(start)
    bad = good.clone()
    bad[1, 0, 0, 0] = float("inf")
    assert step(bad) is None
    assert tensors.status.tolist()[1] == int(start[1])
    tensors.row.copy_(start)
    assert step(good) is None
    tensors.status.fill_(-1)
    tensors.row.copy_(start)
    assert step(good) is True


def test_the_kernel_s_own_refusal_is_raised() -> None:
    tensors = Case().tensors()
    step = ops.bind(tensors, "cpp")
    tensors.ids[:, 6] = 99
    with pytest.raises(RuntimeError, match=r"affine_step on cpp: a row names a register .* \(code 4\)"):
        step(tensors.model_out)


def test_no_reference_is_kept_or_lost() -> None:
    tensors = Case(branches="apart").tensors()
    step = ops.bind(tensors, "cpp")
    given, wrong = copied(tensors), tensors.model_out[:1]
    watched = [step, given.model_out, given.unguided, wrong, None, True, Tensor, tensors.state]

    def use() -> None:
        tensors.row.zero_()
        step(given.model_out, given.unguided)
        for args, kw in (((wrong, given.unguided), {}), ((given.model_out,), {"nothing": wrong})):
            with contextlib.suppress(ValueError, TypeError):
                step(*args, **kw)

    use()
    gc.collect()
    before = [sys.getrefcount(one) for one in watched]
    for _ in range(1000):
        use()
    gc.collect()
    grown = [sys.getrefcount(one) - count for one, count in zip(watched, before, strict=True)]
    assert all(abs(more) < 50 for more in grown), grown  # other code counts too, on None and True


def test_a_step_keeps_its_tensors_and_goes_with_its_last_reference() -> None:
    tensors = Case(guided=False).tensors()
    state, output = weakref.ref(tensors.state), tensors.model_out.clone()
    step = ops.bind(tensors, "cpp")
    del tensors
    gc.collect()
    assert step(output) is True
    assert state() is not None
    del step
    gc.collect()
    assert state() is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    ("batch", "channels", "form"),
    [
        (1, 6, torch.contiguous_format),
        (1, 6, torch.channels_last),
        (1, 3, torch.channels_last),
        (2, 3, torch.channels_last),
    ],
)
def test_a_step_within_a_whole_output(batch: int, channels: int, form: torch.memory_format, dtype: torch.dtype) -> None:
    """In place or gathered, both branches of the stack: the bits of the step on a copy."""
    ours, theirs = (Case(shape=(3, 5, 7), batch=batch, model_dtype=dtype).tensors() for _ in range(2))
    whole = torch.full((2 * batch, channels, 5, 7), float("nan"), dtype=dtype)
    whole[:, :3] = ours.model_out
    whole = whole.contiguous(memory_format=form)
    step = ops.bind_within(ours, "cpp", whole)
    assert step is not None
    assert step(whole) is ops.bind(theirs, "cpp")(theirs.model_out)
    assert all(torch.equal(a, b) for a, b in zip(written(ours), written(theirs), strict=True))
    with pytest.raises(ValueError, match="bind again"):
        step(whole[:, :2])


def test_where_only_a_copy_will_do() -> None:
    large = Case(shape=(1, 96, 96), batch=1, guided=False).tensors()
    assert ops.bind_within(large, "cpp", large.model_out.expand(2, 2, 96, 96)[:1].transpose(2, 3)) is None
    several = Case(shape=(3, 5, 7), batch=2).tensors()
    assert ops.bind_within(several, "cpp", torch.zeros(4, 6, 5, 7)) is None
    one = Case(shape=(3, 5, 7), batch=1).tensors()
    assert ops.bind_within(one, "reference", one.model_out) is None
    flat = Case(shape=(3, 5, 7), batch=1, layout=torch.channels_last).tensors()
    assert ops.bind_within(flat, "cpp", flat.model_out) is None
