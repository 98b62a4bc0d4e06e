"""Noising and loss of a training step, network excluded: `Objective.loss` against diffusers' `add_noise` and its loss.

Each contender does what a DDPM step does around the network: draw a time and a noise for each image, make the network's
input, and give the loss and its gradient in the network's output, a stored tensor. Ours is `objective.loss` as the
trainer calls it, the draw on the host included; all of them in a process that keeps freed memory, as `fastdiff train`
does. diffusers is its training example's four lines; compiled are the same formulas under torch.compile, noise and
backward included. All allocate their results, as training does.
Bytes per element: ours is what its kernels read and write; theirs what each operator of the eager lines does.
Nothing is timed whose result is wrong.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from bench import measure, ops, peers
from bench.measure import Task
from fastdiff.compiler import layout as at
from fastdiff.engine import backends, noise, train_ops
from fastdiff.training import objectives
from fastdiff.training.heap import keep_heap

SHAPES = ((64, 3, 32, 32), (64, 3, 64, 64), (64, 4, 128, 128))
BYTES = 16  # x0 read and x_in written, F read and its gradient written, fp32; the target of eps does not read x0
TOLERANCE = 4e-6  # of the largest element: fp32 tables and roundings
CHECKED = 1 << 16  # elements of the samples that are held against float64


class Traffic(TorchDispatchMode):
    """Counts the bytes of the tensors that operators read and write, views and metadata left out."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        moved = [leaf for leaf in tree_leaves((args, kwargs, out)) if isinstance(leaf, Tensor)]
        if not func.is_view and "empty" not in func.__name__:
            self.bytes += sum(leaf.numel() * leaf.element_size() for leaf in moved)
        return out


class Step:
    """The inputs of one case, and each contender as a function that returns the gradient."""

    def __init__(self, shape: tuple[int, ...], device: torch.device) -> None:
        generator = torch.Generator().manual_seed(0)
        self.images = torch.randn(shape, generator=generator).clamp(-1, 1).to(device)
        self.answer = torch.randn(shape, generator=generator).to(device).requires_grad_()
        self.seeds = torch.arange(shape[0])
        self.objective = objectives.get("ddpm")
        self.draws = 0
        alpha_bar = torch.from_numpy(self.objective.schedule.alpha_bar(np.arange(1000))).float().to(device)
        self._scales = alpha_bar.sqrt(), (1 - alpha_bar).sqrt()
        self._compiled: tuple[Callable[..., Any], ...] | None = None

    def ours(self) -> Tensor:
        """`objective.loss` and its gradient."""
        self.draws += 1
        loss = self.objective.loss(lambda x, time, cond: self.answer, self.images, None, self.seeds, self.draws)
        return torch.autograd.grad(loss.mean, self.answer)[0]

    def diffusers(self, scheduler: Any) -> Tensor:
        """The lines of diffusers' unconditional training example."""
        z = torch.randn_like(self.images)
        index = torch.randint(0, scheduler.config.num_train_timesteps, (len(z),), device=z.device)
        scheduler.add_noise(self.images, z, index)
        return torch.autograd.grad(F.mse_loss(self.answer, z), self.answer)[0]

    def compiled(self) -> Tensor:
        """Their formulas, compiled: noising with its draws, and the loss with its gradient."""
        if self._compiled is None:
            self._compiled = torch.compile(_noised), torch.compile(_mean_square)
        noised, mean_square = self._compiled
        _, z = noised(self.images, *self._scales)
        return torch.autograd.grad(mean_square(self.answer, z), self.answer)[0]


def _noised(images: Tensor, alpha: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
    index = torch.randint(0, len(alpha), (len(images),), device=images.device)
    index = index.reshape(-1, *(1 for _ in images.shape[1:]))
    z = torch.randn_like(images)
    return alpha[index] * images + sigma[index] * z, z


def _mean_square(answer: Tensor, z: Tensor) -> Tensor:
    return (answer - z).square().mean()


def gate(step: Step) -> dict[str, Any]:
    """Our input, loss and gradient against float64, and against diffusers' own on our times and noise."""
    draw = step.objective.draw(step.seeds, 1)
    size = step.images[0].numel()
    few = range(max(1, min(len(step.images), CHECKED // size)))
    rows = draw.table.double().numpy()
    z = torch.stack(
        [torch.from_numpy(noise.normal(int(draw.key[b]), size, at.NOISE_Z, at.STREAM_TRAINING)) for b in few]
    ).view(-1, *step.images.shape[1:])
    scales = [torch.from_numpy(rows[: len(few), c]).view(-1, 1, 1, 1) for c in (at.INPUT_X0, at.INPUT_Z)]
    images, answer = step.images.detach()[: len(few)], step.answer.detach()[: len(few)]
    want_x = scales[0] * images.cpu().double() + scales[1] * z.double()
    want_g = 2 / step.answer.numel() * (answer.cpu().double() - z.double())

    seen: list[Tensor] = []

    def network(x: Tensor, time: Tensor, cond: object) -> Tensor:
        seen.append(x)
        return step.answer

    loss = step.objective.loss(network, step.images, None, step.seeds, 1)
    gradient = torch.autograd.grad(loss.mean, step.answer)[0]
    pairs = [(seen[0][: len(few)], want_x), (gradient[: len(few)], want_g)]
    pairs.append((loss.per_sample[: len(few)], (answer.cpu() - z).double().square().flatten(1).mean(1)))
    line = {"error": _apart(pairs), "tolerance": TOLERANCE, "diffusers_error": 0.0, "diffusers_tolerance": TOLERANCE}
    if peers.has_diffusers():
        scheduler, there = _scheduler(), z.to(step.images.device)
        leaf = answer.clone().requires_grad_()
        theirs = scheduler.add_noise(images, there, draw.time[: len(few)].long().to(images.device))
        slope = torch.autograd.grad(F.mse_loss(leaf, there), leaf)[0] * (len(few) / len(step.images))
        line["diffusers_error"] = _apart([(seen[0][: len(few)], theirs), (gradient[: len(few)], slope)])
    right = line["error"] <= TOLERANCE and line["diffusers_error"] <= TOLERANCE
    return {"gate": "green" if right else "red"} | line


def _apart(pairs: list[tuple[Tensor, Tensor]]) -> float:
    return max(
        float((got.detach().cpu().double() - want.cpu().double()).abs().max() / want.abs().max().cpu())
        for got, want in pairs
    )


def _scheduler() -> Any:
    from diffusers import DDPMScheduler

    return DDPMScheduler()


def run(device: torch.device, quick: bool) -> Iterator[dict[str, Any]]:
    """Measure every shape, one line at a time."""
    torch.manual_seed(0)
    if device.type == "cpu":
        keep_heap()
    for shape in SHAPES[:1] if quick else SHAPES:
        started = time.perf_counter()
        line = _case(shape, device, 0.1 if quick else 4.0, 3 if quick else 8)
        yield line | {"took": round(time.perf_counter() - started, 1)}


def _case(shape: tuple[int, ...], device: torch.device, budget: float, least: int) -> dict[str, Any]:
    watch, step = measure.Watch(), Step(shape, device)
    line: dict[str, Any] = {
        "bench": "train-ops",
        "shape": "x".join(map(str, shape)),
        "elements": math.prod(shape),
        "model_dtype": "float32",
        "executor": backends.choose(device),
        **gate(step),
    }
    if line["gate"] == "red":
        return line
    ready = step.objective.draw(step.seeds, 0).to(device)

    def kernels() -> None:
        train_ops.noised(step.images, ready.table, ready.key)
        train_ops.squared_error(step.answer, ready.weight, step.images, ready.table, ready.key)

    # emit_us: our kernels alone, without the draw and without autograd
    tasks = {"us": Task(step.ours), "emit_us": Task(kernels), "compiled_us": Task(step.compiled)}
    line["bytes_per_element"] = str(BYTES)
    if peers.has_diffusers():
        scheduler = _scheduler()
        step.diffusers(scheduler)
        with Traffic() as traffic:
            step.diffusers(scheduler)
        line["bytes_per_element"] = f"{BYTES} / {traffic.bytes / math.prod(shape):.0f}"
        tasks["diffusers_us"] = Task(lambda: step.diffusers(scheduler))
    timings = measure.interleave(tasks, device, budget, least)
    for name, timing in timings.items():
        line |= ops.spread(name, timing)
    us = timings["us"].median
    line["gbs"] = BYTES * math.prod(shape) / timings["emit_us"].median / 1e3
    line["ratio_compiled"] = timings["compiled_us"].median / us
    if "diffusers_us" in timings:
        line["ratio_diffusers"] = timings["diffusers_us"].median / us
        line["diffusers_page_faults"] = round(measure.page_faults(tasks["diffusers_us"]))
    line["repetitions"] = timings["us"].repetitions
    others = watch.others()
    return line | ({} if others is None else {"others": round(others, 3)})
