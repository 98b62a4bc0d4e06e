"""The run: opens data, builds or resumes, and trains until the images are spent or somebody says stop.

    trainer = Trainer(config, Path("runs/mine"), resume="auto")
    trainer.train()
May import: everything of fastdiff.training.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import replace
from functools import cached_property
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from fastdiff.files import write_atomically
from fastdiff.models.denoiser import Denoiser
from fastdiff.models.shipped import load

from . import flops, optimizer, records
from .checkpoint import Checkpoints, Progress, tensors_of
from .config import TrainConfig, check_resume
from .data import Resident, Source, open_data
from .data.identity import fingerprint
from .data.loader import Batch, Loader
from .ema import Ema
from .graphed import GraphedStep
from .interrupts import Interrupts
from .networks import FILLED, blocks, build_network, build_objective, fill, recompute, with_head, without_head
from .previews import Previews
from .ranks import Ranks, join, spread
from .records import Records
from .start import start_from
from .step import NotFinite, Outcome, Step

RESIDENT_BYTES = 2 << 30  # sets up to this size are kept whole, on the device, when resident is "auto"


class Trainer:
    """One run in a folder; every process of it makes one.

    config: what is asked for. run: folder of config.json, checkpoints/, model.safetensors, metrics.jsonl, samples/.
    resume: "auto" goes on from the newest whole checkpoint if there is one; "" refuses a folder that has one.
    ranks: of tests and callers that have joined already. source: a data set instead of that of config.data.
    Raises: ValueError or OSError for bad data, a bad configuration, or one that differs from the run's.
    """

    def __init__(
        self,
        config: TrainConfig,
        run: Path,
        resume: str = "",
        ranks: Ranks | None = None,
        source: Source | None = None,
    ) -> None:
        if resume not in ("", "auto"):
            raise ValueError(f"resume must be auto or left out, got {resume!r}")
        self.run = run
        self.ranks = join(config.device, config.threads) if ranks is None else ranks
        if config.precision == "auto":
            config = config.change(precision="bf16" if self.ranks.device.type == "cuda" else "fp32")
        self._check_batch(config)
        self.checkpoints = Checkpoints(run, self.ranks, config.keep, config.async_save, run / records.NAME)
        found = self._found(resume)
        saved = None if found is None else TrainConfig.load(run / "config.json")
        if saved is not None:  # before the data are read as another run would read them
            check_resume(saved, replace(config, **{name: getattr(saved, name) for name in FILLED}))
        self.source = _source(config, self.ranks.device) if source is None else source
        given = load(config.init) if config.init and found is None else None
        self.config = fill(config, self.source, _sigma_data(saved, given))
        self.objective = build_objective(self.config)
        dealt = getattr(self.objective, "pairing", "independent") == "transport"
        if dealt:  # noises, among what is computed at once: a number then, also where it follows from the processes
            self.config = self.config.change(micro_batch=self.config.at_once(self.ranks.world))
        if saved is not None:
            check_resume(saved, self.config, self.ranks.world if dealt else None)
        self._build(given)
        self.progress = Progress()
        mark = fingerprint(self.source)
        if found is not None and saved is not None:
            self.progress = self.checkpoints.load(self.tensors(), found)
            self.step.restore(self.progress)
            self._check_set(saved.data, mark)
        self.progress.pictures, self.progress.fingerprint = len(self.source), mark
        if self.ranks.first:  # only now, so that a start that fails leaves no folder
            run.mkdir(parents=True, exist_ok=True)
            self.config.save(run / "config.json")

    def train(self, after: Callable[[Trainer, Batch, Outcome], None] | None = None) -> str:
        """Train to the end; returns "done", or the name of the signal that ended it. Either way the state is saved.

        after: called after each step with the trainer, the batch and the outcome.
        Raises: NotFinite when the loss is not a number; OSError when the last state cannot be saved.
        """
        said = Records(self.run, self.progress.images, self.config.images, self.config.tensorboard, self.ranks.first)
        self.records, self._shown = said, (time.monotonic(), self.progress.images)
        reason = "done"
        try:
            with Interrupts() as interrupts:
                stream = self.loader.stream(self.progress.images)
                while self.progress.images < self.config.images:
                    batch = next(stream)
                    outcome = self._take(batch, interrupts)
                    if after is not None:
                        after(self, batch, outcome)
                    self._report(outcome)
                    if outcome.stop or (interrupts.name and self.ranks.world == 1):
                        reason = interrupts.name or "a signal to another process"
                        break
                stream.close()
                self.save(last=True)
        finally:
            try:
                self.checkpoints.finish(together=False)
            except OSError as error:
                self._failed_to_save(error)
            finally:
                said.close()
        return reason

    def tensors(self) -> dict[str, Tensor]:
        """All tensors a resume needs, by name: weights, averages, the optimizer's moments."""
        names = dict(self.net.named_parameters())
        return tensors_of(
            {
                "net": {name: parameter.detach() for name, parameter in names.items()},
                "ema": self.ema.averages,
                "optimizer": optimizer.state(self.optimizer, names),
            }
        )

    def save(self, last: bool = False) -> None:
        """Write a checkpoint and the weights. A failure on the way is said and does not end the run; `last` raises."""
        self.progress.updates = optimizer.steps(self.optimizer)
        try:
            self.checkpoints.save(self.tensors(), self.progress)
            if last:
                self.checkpoints.finish()
            self.previews.save_weights(self.progress.images)
        except OSError as error:
            if last:
                raise
            self._failed_to_save(error)

    def close(self) -> None:
        """Leave the process group."""
        self.ranks.close()

    def describe(self) -> list[str]:
        """Lines that say what will be trained on what."""
        size = sum(parameter.numel() for parameter in self.net.parameters())
        classes = f", {self.config.classes} classes" if self.config.classes else ""
        where = f"{self.ranks.device.type}, {self.ranks.world} process{'es' * (self.ranks.world > 1)}"
        resumed = f", going on after {self.progress.images:,}" if self.progress.images else ""
        how = f"{self.config.batch} a step, {self.config.precision}"
        begun = f", started from {self.config.init}" if self.config.init else ""
        return [
            f"data      {self.source.describe()}, trained at {self.config.size}x{self.config.size}{classes}",
            f"network   {size:,} parameters, {self.flops / 1e9:.2f} GFLOP for an image forward and back{begun}",
            f"objective {self.config.objective} on {self.objective.schedule!r}",
            f"run       {self.config.images:,} images, {how}, {where}{resumed}",
        ]

    @cached_property
    def flops(self) -> float:
        """Operations of a training step for one image."""
        shape = (self.config.channels or 3, self.config.size, self.config.size)
        with torch.random.fork_rng(devices=[]):
            net = with_head(build_network(self.config, self.objective), self.objective, self.config.seed)
        return flops.of_one_image(net, shape, without_head(net).class_embedding is not None)

    @cached_property
    def _peak(self) -> float:
        if self.config.peak_tflops is not None:
            return 1e12 * self.config.peak_tflops
        return flops.peak(self.ranks.device, self.config.precision)[0]

    def _build(self, given: Denoiser | None) -> None:
        """Network, optimizer, averages and what feeds them. given: whose weights a run with `init` begins with."""
        config, device = self.config, self.ranks.device
        net = with_head(build_network(config, self.objective), self.objective, config.seed).train()
        if given is not None:
            start_from(given, config, self.objective, without_head(net))
        if config.channels_last and config.parallel != "fsdp":  # which shards contiguous weights only
            net.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.net = net.to(device)
        if config.recompute:
            recompute(self.net, config.math_attention)
        wrapped = spread(self.net, self.ranks, config.parallel, config.precision, blocks(self.net))
        self.optimizer = optimizer.build(self.net, config, capturable=config.graph)
        self.ema = Ema(self.net, config.ema_halflife, config.ema_rampup, config.ema_profiles)
        if config.graph and (device.type != "cuda" or self.ranks.world > 1 or not self.objective.capturable):
            raise ValueError("graph=true needs one process on a GPU and an objective that asks the host nothing")
        kind = GraphedStep if config.graph else Step
        self.step = kind(
            config, self.net, wrapped, self.objective, self.optimizer, self.ema, self.ranks
        )  # fmt: skip
        self.loader = Loader(
            self.source, config.seed, config.batch, self.ranks.rank, self.ranks.world, config.scale, device
        )
        self.previews = Previews(config, self.objective, self.ema, self.ranks, self.run)
        other = replace(config, data=config.eval_data)
        self._eval_source = open_set(other) if config.eval_images and config.eval_data else self.source

    def _take(self, batch: Batch, interrupts: Interrupts) -> Outcome:
        skips = self.progress.skips
        began = time.monotonic()
        outcome = self.step.run(batch, self.progress, lambda: bool(interrupts.name))
        self.progress.seconds += time.monotonic() - began
        if self.progress.skips > skips:
            self._not_finite(batch, outcome)
        return outcome

    def _not_finite(self, batch: Batch, outcome: Outcome) -> None:
        """Keep what did it, and stop when it was once too often."""
        step, images = self.progress.step, self.progress.images
        out = self.run / f"not-finite-{images:012d}-{self.ranks.rank}.safetensors"
        tensors = {**batch.tensors(), "per_sample": outcome.per_sample, "level": outcome.level}
        stored = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        kept = f"the batch is in {out}"
        try:
            write_atomically(
                out, lambda temporary: save_file(stored, temporary, {"step": str(step), "images": str(images)})
            )
        except (OSError, SafetensorError) as error:
            kept = f"the batch could not be written to {out}: {error}"
        bad = ~torch.isfinite(outcome.per_sample)
        levels = ", ".join(f"{level:.6g}" for level in outcome.level[bad][:5].tolist())
        where = f"at model times {levels}"
        if not levels:
            finite = math.isfinite(outcome.loss)
            where = "with finite losses: the gradient overflowed" if finite else "here: another process has them"
        text = (
            f"loss {outcome.loss} and gradient norm {outcome.norm} in step {step} (after {images} images), "
            f"{int(bad.sum())} samples {where}; {kept}"
        )
        if self.progress.skips > self.config.max_skips:
            raise NotFinite(
                f"{text}. Study it, lower learning_rate or use precision=fp32 and start again with --resume auto; "
                "max_skips=N leaves out up to N such steps"
            )
        self.records.say(f"fastdiff: warning: left out a step: {text}")
        self.records.write("skipped", images, step=step, loss=str(outcome.loss))

    def _sample(self, images: int) -> None:
        """Draw the grid; a disk that is full does not end the run."""
        try:
            self.previews.sample(images)
        except OSError as error:
            self.records.say(f"fastdiff: warning: could not write the samples after {images} images: {error}")

    def _failed_to_save(self, error: OSError) -> None:
        self.records.say(f"fastdiff: warning: {error}")
        self.records.write("save_failed", self.progress.images, reason=str(error))

    def _report(self, outcome: Outcome) -> None:
        config, images = self.config, self.progress.images
        try:
            self.checkpoints.poll()
        except OSError as error:
            self._failed_to_save(error)
        self.records.advance(config.batch)
        if outcome.taken:
            self.progress.add(outcome.loss)
        if self._due(config.log_images) or images >= config.images:
            self._log(outcome)
        if self._due(config.eval_images):
            self.records.write("eval", images, **self.previews.evaluate(self._eval_source))
        if self._due(config.sample_images):
            self._sample(images)
        if self._due(config.save_images) and images < config.images:
            self.save()

    def _log(self, outcome: Outcome) -> None:
        (began, images), self._shown = self._shown, (time.monotonic(), self.progress.images)
        rate = (self.progress.images - images) / max(self._shown[0] - began, 1e-9)
        loss = self.progress.mean_loss()
        used = self.ranks.largest(records.memory(self.ranks.device))
        # a file is read by the process whose share it is in, and each of them must stop at the same one too many
        unreadable = self.ranks.share(self.source.faults.take())
        for name, why in dict(unreadable).items():
            self.records.say(f"fastdiff: warning: skipped {name}: {why}")
        self.source.faults.learn(unreadable)
        mfu = rate * self.flops / (self._peak * self.ranks.world)
        self.records.write(
            "train", self.progress.images, step=self.progress.step, loss=loss, gradient_norm=outcome.norm,
            learning_rate=outcome.rate, images_per_s=rate, memory_bytes=int(used), mfu=mfu,
            skips=self.progress.skips, unreadable_files=len(self.source.faults.reasons),
            seconds=self.progress.seconds,
        )  # fmt: skip
        self.records.show(
            loss=f"{loss:.4f}", images_s=f"{rate:.0f}", memory=f"{used / 2**30:.2f} GiB", mfu=f"{100 * mfu:.0f}%"
        )

    def _due(self, every: int) -> bool:
        """Whether the step just taken passed a multiple of `every`."""
        images = self.progress.images
        return every > 0 and images // every > (images - self.config.batch) // every

    def _found(self, resume: str) -> Path | None:
        """The checkpoint to go on from. Raises: ValueError where there is one and nobody said so."""
        latest = self.checkpoints.latest()
        if latest is not None and not resume:
            raise ValueError(
                f"{self.run} holds a run already, of {int(latest.name)} images: add --resume auto to go on, or choose "
                "another folder"
            )
        return latest

    def _check_set(self, was: str, mark: str) -> None:
        """Raises: ValueError where this is not the set of the run, whose path alone may have changed."""
        trained, now = self.progress, self.config.data
        if trained.pictures not in (0, len(self.source)):
            raise ValueError(
                f"{now} holds {len(self.source)} pictures, and the run was trained on {trained.pictures}, in an order "
                "that depends on their number: put the data back as they were, or train on these with --init into "
                "another folder"
            )
        if now != was and not trained.fingerprint:
            raise ValueError(
                f"the run was trained on {was}, and its checkpoint, of an earlier version, does not say what was in "
                f"it: give --data {was}"
            )
        if now != was and trained.fingerprint != mark:
            raise ValueError(
                f"{now} holds other pictures than {was}, which the run was trained on, or in another order: give "
                "--data the set of the run, or train on these with --init into another folder"
            )

    def _check_batch(self, config: TrainConfig) -> None:
        world = self.ranks.world
        if config.batch % world:
            raise ValueError(f"batch {config.batch} is not a multiple of the {world} processes; choose one that is")


def _sigma_data(saved: TrainConfig | None, given: Denoiser | None) -> float | None:
    """That of the weights a run begins with, which later starts of the run have in its configuration."""
    if saved is None:
        return None if given is None else given.sigma_data
    return saved.objective_options.get("sigma_data") if saved.init else None


def open_set(config: TrainConfig) -> Source:
    """The set of `config.data` at the size of the run. Raises: ValueError or OSError saying what is wrong with it."""
    if not config.data:
        raise ValueError("there is nothing to train on: give --data a folder of pictures, or a .npy, .npz or .tar file")
    source = open_data(
        config.data, size=config.size, resize=config.resize, channels=config.channels, classes=config.classes
    )
    if source.shape[1:] != (config.size, config.size):
        raise ValueError(
            f"{config.data} has pictures of {source.shape[1]}x{source.shape[2]}, expected {config.size}x{config.size}; "
            f"use resize=crop, or size={source.shape[1]}"
        )
    return source


def _source(config: TrainConfig, device: torch.device) -> Source:
    """The data set, kept on the device where it is small enough or asked for."""
    source = open_set(config)
    if hasattr(source, "workers"):
        source.workers = config.workers
    size = len(source) * source.shape[0] * source.shape[1] * source.shape[2]
    if config.resident == "yes" or (config.resident == "auto" and size <= RESIDENT_BYTES):
        return Resident(source, device)
    return source
