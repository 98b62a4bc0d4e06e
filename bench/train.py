"""A whole training step: our trainer's against diffusers' unconditional training example's, same network and weights.

Theirs is the loop of that example without what it leaves to its launcher: randn, randint, add_noise, the network,
mse_loss, backward, clipping at 1, AdamW, EMAModel. Ours is what `fastdiff train` runs for a batch: draws from
counters, noising from uint8, the network in channels_last, loss, clipping, fused AdamW, average. fp32 on both sides on
a CPU, bf16 on a GPU. A second line is the optimizer and the average alone. Nothing is timed whose gradient is wrong.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench import measure, peers
from bench.measure import Task
from fastdiff.models.unet import UNet
from fastdiff.training import objectives, optimizer
from fastdiff.training.checkpoint import Progress
from fastdiff.training.config import TrainConfig
from fastdiff.training.data.loader import Batch
from fastdiff.training.ema import Ema
from fastdiff.training.heap import keep_heap
from fastdiff.training.ranks import Ranks
from fastdiff.training.step import Step

TOLERANCE = 2e-3  # of the largest entry of the gradient: fp32 sums in another order and memory format
SMALL = {
    "sample_size": 32, "block_out_channels": (64, 128), "layers_per_block": 1, "attention_head_dim": 8,
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D"), "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
}  # fmt: skip
# Ho et al. 2020, the network of its CIFAR-10 experiments
DDPM = {
    "sample_size": 32, "block_out_channels": (128, 256, 256, 256), "layers_per_block": 2, "attention_head_dim": None,
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"), "downsample_padding": 0,
}  # fmt: skip
TINY = SMALL | {"block_out_channels": (32, 32), "sample_size": 16}


def cases(device: torch.device, quick: bool) -> list[tuple[str, dict[str, Any], int]]:
    """(name, configuration of the UNet, batch)."""
    if quick:
        return [("tiny UNet", TINY, 4)]
    if device.type == "cpu":
        return [("small UNet", SMALL, 16), ("DDPM UNet", DDPM, 8)]
    return [("DDPM UNet", DDPM, 128), ("DDPM UNet", DDPM, 512)]


def run(device: torch.device, quick: bool) -> Iterator[dict[str, Any]]:
    """Measure every network, one line at a time."""
    if not peers.has_diffusers():
        print("diffusers is not installed and there is nothing to compare with: pip install diffusers")
        return
    if device.type == "cpu":
        keep_heap()  # as `fastdiff train` does, for both
    for name, unet, batch in cases(device, quick):
        yield from _case(name, unet, batch, device, quick)


class Peer:
    """The example's step around diffusers' own classes."""

    def __init__(self, net: nn.Module, device: torch.device, amp: bool) -> None:
        from diffusers import DDPMScheduler
        from diffusers.training_utils import EMAModel

        self.net, self.amp = net, amp
        self.scheduler = DDPMScheduler(num_train_timesteps=1000, beta_schedule="linear")
        self.optimizer = torch.optim.AdamW(net.parameters(), 1e-4, betas=(0.95, 0.999), weight_decay=1e-6, eps=1e-8)
        self.ema = EMAModel(net.parameters(), decay=0.9999, use_ema_warmup=True, inv_gamma=1.0, power=0.75)
        self.ema.to(device)

    def loss(self, images: Tensor, noise: Tensor, times: Tensor) -> Tensor:
        """Mean squared error of the predicted noise."""
        noisy = self.scheduler.add_noise(images, noise, times)
        with torch.autocast(images.device.type, torch.bfloat16, enabled=self.amp):
            answer = self.net(noisy, times).sample
        return F.mse_loss(answer.float(), noise)

    def step(self, pixels: Tensor) -> None:
        """One step, from the pixels its loader would give, normalised by its transforms."""
        images = pixels.float() / 127.5 - 1.0
        noise = torch.randn_like(images)
        times = torch.randint(0, 1000, (len(images),), device=images.device).long()
        self.loss(images, noise, times).backward()
        torch.nn.utils.clip_grad_norm_(self.net.parameters(), 1.0)
        self.update()

    def update(self) -> None:
        """AdamW and the average."""
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.ema.step(self.net.parameters())


def _case(name: str, unet: dict[str, Any], size: int, device: torch.device, quick: bool) -> Iterator[dict[str, Any]]:
    from diffusers import UNet2DModel

    watch = measure.Watch()
    torch.manual_seed(0)
    theirs = UNet2DModel(in_channels=3, out_channels=3, **unet).to(device)
    amp = device.type == "cuda"
    peer = Peer(theirs, device, amp)
    step = _ours(theirs, size, device, amp)
    edge = unet["sample_size"]
    pixels = torch.randint(0, 256, (size, 3, edge, edge), dtype=torch.uint8).to(device)
    batch = Batch(pixels, None, torch.arange(size))
    error = _gradient_error(step, peer, batch)
    line: dict[str, Any] = {
        "bench": "train", "network": name, "batch": size, "shape": "x".join(map(str, pixels.shape)),
        "elements": pixels.numel(), "model_dtype": "bfloat16" if amp else "float32", "solver": "step",
        "gate": "green" if error <= TOLERANCE else "red", "error": error, "tolerance": TOLERANCE,
    }  # fmt: skip
    if line["gate"] == "red":
        yield line
        return
    line["bytes_per_element"] = round(_kept(lambda: _forward(step, batch)) / pixels.numel(), 1)
    progress = Progress()
    tasks = {"seconds": Task(lambda: step.run(batch, progress)), "diffusers_seconds": Task(lambda: peer.step(pixels))}
    yield _timed(line, tasks, device, quick, size, watch)

    def update() -> None:
        step.optimizer.step()
        step.ema.update(10_000, size)

    for module in (step.wrapped, theirs):  # gradients to update with
        for parameter in module.parameters():
            parameter.grad = torch.zeros_like(parameter)
    step.optimizer.zero_grad = lambda set_to_none=True: None  # type: ignore[method-assign]
    peer.optimizer.zero_grad = lambda set_to_none=True: None  # type: ignore[method-assign]
    tasks = {"seconds": Task(update), "diffusers_seconds": Task(peer.update)}
    yield _timed(line | {"solver": "optimizer + EMA"}, tasks, device, quick, size, measure.Watch())


def _ours(theirs: nn.Module, size: int, device: torch.device, amp: bool) -> Step:
    """The trainer's step on a copy of the peer's network."""
    config = TrainConfig(
        batch=size, precision="bf16" if amp else "fp32", learning_rate=1e-4, beta1=0.95, weight_decay=1e-6,
        decay="constant", images=10**9, ema_halflife=500_000,
    )  # fmt: skip
    net = UNet.from_diffusers(theirs).train()
    net.to(device=device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    ema = Ema(net, config.ema_halflife)
    ranks = Ranks(0, 1, device)
    return Step(config, net, net, objectives.get("ddpm"), optimizer.build(net, config), ema, ranks)


def _forward(step: Step, batch: Batch) -> Any:
    return step.objective.loss(step.call, batch.pictures, None, batch.seeds, 0, dtype=step.dtype)


def _gradient_error(step: Step, peer: Peer, batch: Batch) -> float:
    """Largest difference of the two gradients for the same times and noises, over the largest entry."""
    seen: list[Tensor] = []

    def watched(x: Tensor, time: Tensor, cond: Any) -> Tensor:
        seen.extend((x.detach(), time.detach()))
        answer: Tensor = step.call(x, time, cond)
        return answer

    objective = step.objective
    objective.loss(watched, batch.pictures, None, batch.seeds, 0, dtype=step.dtype).mean.backward()
    images, times = batch.pictures.float() / 127.5 - 1.0, seen[1].long()
    alpha_bar = peer.scheduler.alphas_cumprod.to(images.device)[times].view(-1, 1, 1, 1)
    noise = (seen[0].float() - alpha_bar.sqrt() * images) / (1 - alpha_bar).sqrt()
    peer.loss(images, noise, times).backward()
    own = dict(step.wrapped.named_parameters())  # the names are diffusers', the order is not
    pairs = [(own[name], parameter) for name, parameter in peer.net.named_parameters()]
    largest = max(float(b.grad.abs().max()) for _, b in pairs if b.grad is not None)
    gaps = [float((a.grad - b.grad).abs().max()) for a, b in pairs if a.grad is not None and b.grad is not None]
    step.optimizer.zero_grad()
    peer.optimizer.zero_grad()
    return max(gaps) / largest


def _kept(forward: Callable[[], Any]) -> int:
    """Bytes that the forward pass keeps for the backward pass, each storage once, parameters included."""
    storages: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        kept = forward()
    del kept
    return sum(storages.values())


def _timed(
    line: dict[str, Any],
    tasks: dict[str, Task],
    device: torch.device,
    quick: bool,
    size: int,
    watch: measure.Watch,
) -> dict[str, Any]:
    timings = measure.interleave(tasks, device, 0.5 if quick else 20.0, least=2 if quick else 7, most=200, warm_up=1)
    line = dict(line)
    for key, timing in timings.items():
        line |= {key: timing.median / 1e6 / size}
        line |= {f"{key}_p20": timing.p20 / 1e6 / size, f"{key}_p80": timing.p80 / 1e6 / size}
    line["ratio_diffusers"] = timings["diffusers_seconds"].median / timings["seconds"].median
    line["repetitions"] = timings["seconds"].repetitions
    others = watch.others()
    return line | ({} if others is None else {"others": round(others, 3)})
