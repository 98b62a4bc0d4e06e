"""Everything that says what a run is: one frozen dataclass, its checks, its file, and what may change on a resume.

May import: nothing of the package but errors and files.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from functools import cache
from pathlib import Path
from types import UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

from fastdiff.errors import unknown_name
from fastdiff.files import write_atomically

PRECISIONS = ("auto", "fp32", "bf16", "fp16")
DECAYS = ("constant", "cosine", "linear", "inverse_sqrt")
PARALLEL = ("auto", "ddp", "fsdp")
RESIDENT = ("auto", "yes", "no")
_POSITIVE = (
    "size", "images", "batch", "micro_batch", "workers", "threads", "save_images", "log_images", "keep",
    "ema_halflife", "eval_count", "sample_steps",
)  # fmt: skip
_NOT_NEGATIVE = (
    "warmup_images", "clip_norm", "weight_decay", "ema_rampup", "eval_images", "sample_images", "max_skips"
)  # fmt: skip


def _option(default: Any, about: str, free: bool = False) -> Any:
    """A field with its help. free: a resume may change it: where, how fast and how long, not what is trained."""
    metadata = {"help": about, "free": free}
    if isinstance(default, dict):
        return field(default_factory=dict, metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass(frozen=True)
class TrainConfig:
    """One training run. Lengths are in images; fields are the options of `fastdiff train`.

    Fields with "auto" or None are filled in from the data when a run starts, and saved filled in.
    """

    preset: str = _option("", "the preset this started from")
    data: str = _option("", "folder or file of the training set", free=True)
    size: int = _option(32, "height and width to train at")
    resize: str = _option("crop", "crop, pad or none: how pictures come to that size")
    channels: int | None = _option(None, "of the pictures; None: what the first one has")
    classes: int | None = _option(None, "of the labels; 0 leaves them out, None counts them")
    class_names: tuple[str, ...] = _option((), "where the data do not say them")
    flip: bool = _option(False, "mirror half of the pictures")
    scale: float = _option(1.0, "what float data, such as latents, are multiplied by")
    resident: str = _option("auto", "yes, no or auto: keep the whole set on the device", free=True)
    workers: int = _option(4, "threads that read and decode", free=True)

    network: dict[str, Any] = _option({}, "fields of UNetConfig, as NAME=VALUE")  # noqa: RUF009
    objective: str = _option("edm", "see fastdiff.training.objectives.names()")
    objective_options: dict[str, Any] = _option({}, "of it, as NAME=VALUE")  # noqa: RUF009
    drop_label: float = _option(0.1, "share of samples that train the unguided branch")
    init: str = _option("", "weights to start from: a run's folder, a .safetensors file, or a shipped model's name")

    images: int = _option(1_000_000, "how many to train on, counted with repetition", free=True)
    batch: int = _option(128, "images of one step, over all processes")
    micro_batch: int | None = _option(None, "images at once on one device; None: its share", free=True)
    learning_rate: float = _option(1e-3, "peak")
    warmup_images: int = _option(0, "over which the rate rises from 0")
    decay: str = _option("cosine", f"one of {', '.join(DECAYS)}")
    beta1: float = _option(0.9, "of AdamW")
    beta2: float = _option(0.999, "of AdamW")
    epsilon: float = _option(1e-8, "of AdamW")
    weight_decay: float = _option(0.0, "of AdamW")
    clip_norm: float = _option(1.0, "largest norm of the gradient; 0 does not clip")
    ema_halflife: int = _option(500_000, "of the weights' average, in images")
    ema_rampup: float = _option(0.05, "half-life at most this share of the images so far")
    ema_profiles: tuple[float, ...] = _option((), "relative widths of power-function averages, kept beside or instead")
    seed: int = _option(0, "of weights, order, noise, levels and flips")

    precision: str = _option("auto", "fp32, bf16 or fp16, weights stay fp32; auto: bf16 on a GPU, else fp32")
    channels_last: bool = _option(True, "memory format of the network", free=True)
    compile: bool = _option(False, "torch.compile the network", free=True)
    graph: bool = _option(False, "one CUDA graph for the whole step (GPU only)", free=True)
    recompute: bool = _option(False, "activation checkpointing: less memory, a third more work", free=True)
    math_attention: bool = _option(False, "plain attention, quicker for few tokens on a CPU", free=True)
    parallel: str = _option("auto", "ddp, fsdp (shards weights), or auto: ddp", free=True)
    device: str = _option("auto", "auto, cpu or cuda", free=True)
    threads: int | None = _option(None, "of torch on a CPU; None: the cores, shared out", free=True)
    peak_tflops: float | None = _option(None, "of the device, for MFU; None: known or measured", free=True)

    save_images: int = _option(100_000, "between two checkpoints", free=True)
    keep: int = _option(2, "checkpoints", free=True)
    async_save: bool = _option(True, "write checkpoints while training goes on", free=True)
    weights_dtype: str = _option("float32", "float32, float16 or bfloat16, of model.safetensors", free=True)
    log_images: int = _option(5_000, "between two lines of metrics.jsonl", free=True)
    eval_images: int = _option(0, "between two evaluations of the loss; 0: never", free=True)
    eval_data: str = _option("", "set to evaluate on; default: the training set", free=True)
    eval_count: int = _option(512, "images of one evaluation", free=True)
    sample_images: int = _option(0, "between two grids of samples, of latents .npy; 0: never", free=True)
    sample_steps: int = _option(12, "of a sample grid", free=True)
    guidance: float = _option(1.5, "of a sample grid, where there are classes", free=True)
    tensorboard: bool = _option(False, "write TensorBoard files too", free=True)
    max_skips: int = _option(0, "steps with a gradient that is not finite to leave out", free=True)

    def __post_init__(self) -> None:
        for entry in fields(self):
            object.__setattr__(self, entry.name, _checked(entry.name, getattr(self, entry.name)))
        _one_of("resize", self.resize, ("crop", "pad", "none"))
        _one_of("precision", self.precision, PRECISIONS)
        _one_of("decay", self.decay, DECAYS)
        _one_of("parallel", self.parallel, PARALLEL)
        _one_of("resident", self.resident, RESIDENT)
        _one_of("weights_dtype", self.weights_dtype, ("float32", "float16", "bfloat16"))
        for name in _POSITIVE:
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        for name in _NOT_NEGATIVE:
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} must be at least 0, got {getattr(self, name)}")
        if not 0 <= self.drop_label < 1:
            raise ValueError(f"drop_label must be within [0, 1), got {self.drop_label}")
        for name in ("learning_rate", "scale", "peak_tflops"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"{name} must be above 0, got {value}")
        if self.graph and self.precision == "fp16":
            raise ValueError(
                "graph cannot be combined with fp16, whose loss scale the host changes; use precision=bf16"
            )

    def change(self, **changes: Any) -> TrainConfig:
        """This configuration with other values; dictionaries are merged, but another objective begins without options.

        Raises: ValueError for an unknown name.
        """
        known = {entry.name for entry in fields(self)}
        for name in changes:
            if name not in known:
                raise unknown_name("option of a run", name, known)
        if changes.get("objective", self.objective) != self.objective:
            return replace(self, objective=changes["objective"], objective_options={}).change(**changes)
        merged: dict[str, Any] = {
            name: {**getattr(self, name), **value} if isinstance(value, Mapping) else value
            for name, value in changes.items()
        }
        return replace(self, **merged)

    def at_once(self, world: int) -> int:
        """How many images each of `world` processes computes at once."""
        share = self.batch // world
        return min(share, self.micro_batch or share)

    def to_json(self) -> str:
        """Readable JSON that `from_json` reads back to an equal configuration."""
        return json.dumps(asdict(self), indent=2)

    @classmethod
    def from_json(cls, text: str) -> TrainConfig:
        """Inverse of `to_json`. Raises: ValueError for text that is no such JSON."""
        try:
            content = json.loads(text)
        except json.JSONDecodeError as error:
            raise ValueError(f"not the configuration of a run: {error}") from error
        return cls().change(**content)

    def save(self, path: Path) -> None:
        """Write it whole, or not at all."""
        write_atomically(path, lambda temporary: temporary.write_text(self.to_json() + "\n", encoding="utf-8"))

    @classmethod
    def load(cls, path: Path) -> TrainConfig:
        """Read what `save` wrote. Raises: FileNotFoundError, ValueError naming the file."""
        try:
            return cls.from_json(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error


def check_resume(saved: TrainConfig, given: TrainConfig, world: int | None = None) -> None:
    """Raises: ValueError listing each difference that would make the resumed run another run.

    world: how many processes there are, where what each of them computes at once makes another run too.
    """
    names = [entry.name for entry in fields(saved) if not entry.metadata["free"]]
    pairs = [(name, getattr(saved, name), getattr(given, name)) for name in names]
    if world is not None:
        # a run with a number has it from its own processes, of which there may have been another number
        was = saved.at_once(world if saved.micro_batch is None else 1)
        pairs.append(("micro_batch", was, given.at_once(world)))
    wrong = [f"  {name}: {was!r} in the run, {now!r} now" for name, was, now in pairs if was != now]
    if wrong:
        raise ValueError(
            "the run cannot go on with another configuration:\n"
            + "\n".join(wrong)
            + "\nGive these options as the run has them, or train into another folder."
        )


def read_value(name: str, text: str) -> Any:
    """A field's value from the command line: JSON where it is JSON, else the text. Raises: ValueError."""
    hint = _hints()[name]
    if hint is str:
        return text
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        lowered = {"true": True, "yes": True, "false": False, "no": False, "none": None}
        if text.lower() in lowered:
            return lowered[text.lower()]
        if get_origin(hint) is tuple:
            return tuple(text.split(","))
        return text


@cache
def _hints() -> dict[str, Any]:
    return get_type_hints(TrainConfig)


def _one_of(name: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        raise unknown_name(name, value, known)


def _checked(name: str, value: Any) -> Any:
    """`value` as the type of its field. Raises: TypeError naming field, value and type."""
    hint = _hints()[name]
    optional = get_origin(hint) in (Union, UnionType)
    kinds = [kind for kind in get_args(hint) if kind is not type(None)] if optional else [hint]
    kind = kinds[0]
    if value is None and optional:
        return None
    if get_origin(kind) is tuple and isinstance(value, list | tuple):
        return tuple(str(item) if get_args(kind)[0] is str else float(item) for item in value)
    if get_origin(kind) is dict and isinstance(value, Mapping):
        return json.loads(json.dumps(dict(value)))  # tuples become lists, as they will be when read back
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if kind is int and isinstance(value, float) and value.is_integer():
        return int(value)
    if isinstance(kind, type) and isinstance(value, kind) and (kind is bool or not isinstance(value, bool)):
        return value
    shown = getattr(kind, "__name__", str(kind)) if get_origin(kind) is None else str(kind)
    raise TypeError(f"{name} must be {shown}{' or none' if optional else ''}, got {value!r}")
