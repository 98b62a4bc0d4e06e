"""The compiled extension: finding it, filling its argument blocks, and the hot path of executors "cpp" and "cuda".

May import: checks, native_blocks, errors. The extension is a shared object of C functions called through ctypes: a
step is one call with a pointer to a block that is filled in when the plan is bound, so no dispatcher and no allocation
stand in between.
On a CPU a row is a function of Python's own interface instead, which looks at the tensors it is given through torch's
stable C functions: after milliseconds of network what a step costs is how much it touches, and ctypes touches the most.
The norm op, of which a network runs a hundred between two steps, is one too.
"""

from __future__ import annotations

import ctypes
import functools
import importlib
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fastdiff.engine.checks import channels_of
from fastdiff.engine.native_blocks import (
    AFFINE_POINTERS,
    GUIDE_POINTERS,
    MEASURE_POINTERS,
    AffineArgs,
    AttentionArgs,
    GuideArgs,
    MeasureArgs,
    NormArgs,
    TrainArgs,
    WinogradArgs,
    WinogradTrainArgs,
)
from fastdiff.errors import BackendUnavailable

if TYPE_CHECKING:
    from fastdiff.engine.guide import GuideTensors
    from fastdiff.engine.measure import MeasureTensors
    from fastdiff.engine.ops import StepTensors
    from fastdiff.engine.train_ops import TrainTensors

_FIX = (
    "install a C++17 compiler (g++ or clang++) and reinstall fastdiff from source: "
    "pip install -e . --no-build-isolation"
)
DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2, torch.uint8: 3}
_OUT_OF_MEMORY = 8  # kOutOfMemory in csrc/affine.h

Step = Callable[..., "bool | None"]
Apart = Callable[[int, Tensor, "Tensor | None", Tensor, "Tensor | None"], None]


@functools.cache
def load() -> ctypes.CDLL:
    """The extension's C functions; raises BackendUnavailable when it is missing or does not fit this package."""
    folder = Path(__file__).resolve().parent.parent
    found = sorted(folder.glob("_C.*so"))
    if not found:
        raise BackendUnavailable(f"the compiled extension is not in {folder}", _FIX)
    blocks = {
        "": AffineArgs, "guide_": GuideArgs, "measure_": MeasureArgs, "train_": TrainArgs, "norm_": NormArgs,
        "attention_": AttentionArgs, "winograd_": WinogradArgs, "winograd_train_": WinogradTrainArgs,
    }  # fmt: skip
    try:
        library = ctypes.CDLL(str(found[0]))
        sizes = [getattr(library, f"fastdiff_{name}args_size") for name in blocks]
        library.fastdiff_torch_generator_unmoved.argtypes = [ctypes.c_void_p] * 2
    except (OSError, AttributeError) as error:
        raise BackendUnavailable(f"the compiled extension {found[0].name} does not load ({error})", _FIX) from error
    for size, block in zip(sizes, blocks.values(), strict=True):
        size.restype = ctypes.c_int64
        if size() == ctypes.sizeof(block):
            continue
        raise BackendUnavailable(f"the compiled extension {found[0].name} is of another version", _FIX)

    library.fastdiff_error.argtypes, library.fastdiff_error.restype = [ctypes.c_int], ctypes.c_char_p
    library.fastdiff_cpu_isa.argtypes = [ctypes.c_int]
    library.fastdiff_cpu_isa_name.argtypes, library.fastdiff_cpu_isa_name.restype = [ctypes.c_int], ctypes.c_char_p
    library.fastdiff_torch_normal.argtypes = [ctypes.c_void_p, *[ctypes.c_int64] * 2, *[ctypes.c_void_p] * 2]
    library.fastdiff_philox_blocks.argtypes = [ctypes.c_int64, *[ctypes.c_void_p] * 3]
    count, address = ctypes.c_int64, ctypes.c_void_p
    library.fastdiff_training_draws.argtypes = [count, address, ctypes.c_uint64, address, address]
    ops = "affine_step", "guide", "measure", "noise_images", "loss", "norm", "norm_backward", "attention"
    for op in (*ops, *(f"winograd_{part}" for part in ("into", "out", "convolution", "gradient"))):
        getattr(library, f"fastdiff_{op}_cpu").argtypes = [ctypes.c_void_p]
        if hasattr(library, f"fastdiff_{op}_cuda"):
            getattr(library, f"fastdiff_{op}_cuda").argtypes = [ctypes.c_void_p, ctypes.c_void_p]
    return library


@functools.cache
def python() -> ModuleType:
    """The extension as a module, for what ctypes would slow down."""
    load()
    return importlib.import_module("fastdiff._C")


def cpu_instruction_set() -> str:
    """What the CPU executor runs on this machine: "avx512", "avx2" or "scalar"."""
    library = load()
    return library.fastdiff_cpu_isa_name(library.fastdiff_cpu_isa(-1)).decode()


def arguments(tensors: StepTensors) -> AffineArgs:
    """The C argument block of checked tensors; it holds addresses, so the tensors must outlive it."""
    args = AffineArgs()
    _fill(args, tensors, AFFINE_POINTERS)
    args.channels = tensors.channels
    args.noise_count = 0 if tensors.noise is None else tensors.noise.shape[0]
    args.model_in_dtype = 0 if tensors.model_in is None else DTYPES[tensors.model_in.dtype]
    for name in ("model_in", "model_time"):
        tensor = getattr(tensors, name)
        setattr(args, f"{name}_batch", 0 if tensor is None else tensor.shape[0] // max(args.B, 1))
    return args


def _point(args: ctypes.Structure, tensors: object, pointers: tuple[str, ...]) -> None:
    for name in pointers:
        tensor = getattr(tensors, name)
        setattr(args, name, None if tensor is None else tensor.data_ptr() or None)


def _fill(args: AffineArgs | GuideArgs, tensors: StepTensors | GuideTensors, pointers: tuple[str, ...]) -> None:
    _point(args, tensors, pointers)
    args.K, args.B, *shape = tensors.state.shape
    args.N = torch.Size(shape).numel()
    args.R, args.coef_width = tensors.coef.shape
    args.ids_width = tensors.ids.shape[1]
    args.model_out_dtype = DTYPES[tensors.model_out.dtype]


def bind(tensors: StepTensors, executor: str) -> Step:
    """`step(model_out, unguided, perturbed)` running one row on checked tensors: deterministic, capturable on "cuda".

    Raises ValueError, and has done nothing, when a model output is not like the one that was bound: its memory is read
    as it stands. True: all model outputs so far were finite; None: look at `status`.
    """
    args = arguments(tensors)
    step = _bind(args, tensors, executor, "affine_step")
    return _quick(args, tensors, step) or step if executor == "cpp" else step


def bind_within(tensors: StepTensors, whole: Tensor) -> Step | None:
    """`step(whole)` for outputs like this one; None and ValueError as `_quick` and `bind`."""
    args = arguments(tensors)
    return _quick(args, tensors, _bind(args, tensors, "cpp", "affine_step"), whole)


def _quick(args: AffineArgs, tensors: StepTensors, step: Step, whole: Tensor | None = None) -> Step | None:
    """`step` as one C function, which hands on to it all that is not like the tensors that were bound.

    whole: what it is given instead of model_out, which are its first channels; one that is not contiguous is gathered.
    None where torch keeps its tensors in another way than that function knows.
    """

    def fail(code: int) -> None:
        raise failed("affine_step on cpp", code)

    model_out = tensors.model_out if whole is None else whole
    given = model_out, tensors.unguided, tensors.perturbed
    gathered = 0 if whole is None or whole.is_contiguous() else whole.numel() * whole.element_size()
    stacked = 0, *_stacked(args, model_out)
    return python().bind_step(ctypes.addressof(args), Tensor, given, stacked, gathered, step, fail)


def bind_guide(tensors: GuideTensors, rule: int, threshold: bool, executor: str) -> Callable[..., None]:
    """`find(model_out, unguided, perturbed)`, finding each sample's scalars on checked tensors: otherwise as `bind`."""
    args = GuideArgs(rule=rule, threshold=threshold)
    _fill(args, tensors, GUIDE_POINTERS)
    return _bind(args, tensors, executor, "guide")


def _bind(
    args: AffineArgs | GuideArgs, tensors: StepTensors | GuideTensors, executor: str, op: str
) -> Callable[..., None]:
    address = ctypes.addressof(args)
    run = _function(op, executor, tensors.state.device)
    like = tensors.model_out
    shape, dtype, kind = like.shape, like.dtype, like.device
    contiguous = tensors.state[0].is_contiguous()
    memory_format = torch.contiguous_format if contiguous else torch.channels_last
    second, third = _stacked(args, like)
    apart = tensors.unguided is not None or tensors.perturbed is not None

    def step(model_out: Tensor, unguided: Tensor | None = None, perturbed: Tensor | None = None) -> None:
        if (
            model_out.shape != shape
            or model_out.dtype is not dtype
            or model_out.device != kind
            or not model_out.is_contiguous(memory_format=memory_format)
        ):
            raise _unlike(op, "model output", model_out, like, memory_format)
        model_out = model_out.resolve_neg()
        start = args.model_out = model_out.data_ptr()
        if second:
            args.unguided = start + second
        if third:
            args.perturbed = start + third
        if apart or unguided is not None or perturbed is not None:
            unguided, perturbed = (None if given is None else given.resolve_neg() for given in (unguided, perturbed))
            place("unguided", unguided)
            place("perturbed", perturbed)
        code = run(address)
        if code:
            raise failed(f"{op} on {executor}", code)

    def place(name: str, given: Tensor | None) -> None:
        bound = getattr(tensors, name)
        if (given is None) != (bound is None):
            raise ValueError(
                f"{op}: {name} was {_given(bound)} when it was bound and is {_given(given)} now; bind again"
            )
        if given is None:
            return
        unlike = given.shape != bound.shape or given.dtype is not dtype or given.device != kind
        if unlike or not given.is_contiguous(memory_format=memory_format):
            raise _unlike(op, f"{name} branch", given, bound, memory_format)
        setattr(args, name, given.data_ptr())

    return step


def _stacked(args: AffineArgs | GuideArgs, like: Tensor) -> tuple[int, int]:
    """Where in a stack of outputs Fu and Fp begin, in bytes; 0: not in it."""
    copies = like.shape[0] // max(args.B, 1)
    branch = like.numel() // max(copies, 1) * like.element_size()
    return branch if copies > 1 else 0, 2 * branch if copies > 2 else 0


def bind_measure(tensors: MeasureTensors, quantity: int, rtol: float, atol: float, executor: str) -> Callable[[], None]:
    """`find()`, writing each sample's number on checked tensors: deterministic, capturable on "cuda"."""
    args = MeasureArgs(rtol=rtol, atol=atol, quantity=quantity)
    _point(args, tensors, MEASURE_POINTERS)
    args.B, args.N = len(tensors.value), tensors.value[0].numel()
    run = _function("measure", executor, tensors.value.device)

    def find() -> None:
        if code := run(ctypes.addressof(args)):
            # tensors is named so that the bound call keeps what the block points to
            raise failed(f"measure on {executor}, values {tuple(tensors.value.shape)}", code)

    return find


def train(op: str, tensors: TrainTensors, factor: float, executor: str) -> None:
    """Run "noise_images" or "loss" once on checked tensors; capturable on "cuda"."""
    images, table, key, out, model_out, weight, partial = tensors.arguments()
    model = out if model_out is None else model_out
    assert images is not None and model is not None
    batch = len(images)
    read = images, table, key, model_out, weight
    args = TrainArgs(
        *(None if tensor is None else tensor.data_ptr() for tensor in (*read, partial, out)),
        *(batch, images.numel() // batch, images.shape[-1], channels_of(images)),
        *(DTYPES[images.dtype], DTYPES[model.dtype], factor),
    )
    if code := _function(op, executor, tensors.images.device)(ctypes.addressof(args)):
        raise failed(f"{op} on {executor}", code)


def bind_apart(tensors: StepTensors, executor: str) -> Apart:
    """`step(i, model_out, x, first, denoised)` on tensors like those that were bound, which is not checked.

    The first output goes to `first` instead of its register where it is fp32.
    """
    library, args = load(), arguments(tensors)
    address = ctypes.addressof(args)
    if executor == "cuda":
        return _apart_on_cuda(library, args, tensors)
    assert tensors.model_in is not None

    def fail(code: int) -> None:
        raise failed(_named(executor, args, tensors), code)

    return python().bind_apart(address, tensors.model_in.dtype == torch.float32, fail)


def _apart_on_cuda(library: ctypes.CDLL, args: AffineArgs, tensors: StepTensors) -> Apart:
    run = _function("affine_step", "cuda", tensors.state.device)
    address, row = ctypes.addressof(args), tensors.row

    def step(i: int, model_out: Tensor, x: Tensor | None, first: Tensor, denoised: Tensor | None) -> None:
        row.fill_(i)
        args.model_out, args.model_in = model_out.data_ptr(), first.data_ptr()
        args.denoised = None if denoised is None else denoised.data_ptr()
        code = run(address)
        if code:
            raise failed(_named("cuda", args, tensors), code)

    return step


def failed(where: str, code: int) -> RuntimeError | MemoryError:
    """The error for what a function of the extension returned."""
    message = f"{where}: {load().fastdiff_error(code).decode()} (code {code})"
    return MemoryError(message) if code == _OUT_OF_MEMORY else RuntimeError(message)


def _named(executor: str, args: AffineArgs, tensors: StepTensors) -> str:
    # both are named so that a step keeps the block and what it points to
    return f"affine_step on {executor}, {args.R} rows, state {tuple(tensors.state.shape)}"


def _given(tensor: Tensor | None) -> str:
    return "absent" if tensor is None else "given"


def _function(op: str, executor: str, device: torch.device) -> Callable[[int], int]:
    """The extension's function for an op, of the address of its block; on a GPU in the current stream."""
    run: Callable[[int], int] = getattr(load(), f"fastdiff_{op}_{'cuda' if executor == 'cuda' else 'cpu'}")
    return _on_current_stream(run, device) if executor == "cuda" else run


def _on_current_stream(launch: Callable[..., int], device: torch.device) -> Callable[[int], int]:
    index = device.index or 0

    def run(address: int) -> int:
        if torch.cuda.current_device() != index:
            with torch.cuda.device(index):
                return launch(address, torch._C._cuda_getCurrentRawStream(index))
        return launch(address, torch._C._cuda_getCurrentRawStream(index))

    return run


def _unlike(op: str, what: str, got: Tensor, bound: Tensor, memory_format: torch.memory_format) -> ValueError:
    return ValueError(
        f"{op}: the {what} is {tuple(got.shape)} {got.dtype} on {got.device} with strides {got.stride()}, "
        f"the one bound was {tuple(bound.shape)} {bound.dtype} on {bound.device}, {memory_format}; "
        "bind again, or make the network return what it returned first"
    )
