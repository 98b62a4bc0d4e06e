"""Trains the shipped Fashion-MNIST network: class-conditional EDM with dropped labels.

    torchrun --nproc-per-node 2 recipes/fashion.py --out runs/fashion --minutes 77

One process per core is faster than one process with as many threads, and far faster on a machine with other work;
plain `python recipes/fashion.py` works too. Every process draws the whole batch and takes its share, so their
number does not change the run.

Objective (Karras et al. 2022, Table 1 and eq. 8), with y an image in [-1, 1] and n = sigma z:
    ln sigma ~ N(-0.7, 1.3^2), stratified over the batch
    loss = | F(c_in (y + n), ln(sigma)/4, class) - (y - c_skip (y + n)) / c_out |^2
which is the paper's weighting lambda = 1/c_out^2. Labels are dropped to class 10 with probability 0.1
(Ho & Salimans 2022, Alg. 1). No horizontal flips: shoes in this data all point left, and so should samples.

The learning rate follows the fraction of the budget that is spent: `--minutes` of wall time (a paused process
still spends it) or `--images`, the choice to repeat a run. Start again with `--resume` to go on.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import os
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.parallel import DistributedDataParallel

from fastdiff.models.unet import UNet
from fastdiff.models.unet_config import UNetConfig
from fastdiff.training.data import FASHION_CLASSES, FASHION_FOLDER, load_idx

NULL_CLASS = 10
DROP_LABEL = 0.1
LOG_SIGMA_MEAN, LOG_SIGMA_STD = -0.7, 1.3
LEARNING_RATE, WARMUP_STEPS, WEIGHT_DECAY, CLIP_NORM = 1e-3, 300, 0.01, 1.0
EMA_DECAY = 0.999
SAVE_SECONDS, LOG_STEPS = 240.0, 50

CONFIG = UNetConfig(
    sample_size=32,
    in_channels=1,
    out_channels=1,
    patch_size=2,
    down_block_types=("DownBlock2D", "DownBlock2D"),
    up_block_types=("UpBlock2D", "UpBlock2D"),
    block_out_channels=(64, 96),
    layers_per_block=1,
    attention_head_dim=32,
    norm_num_groups=8,
    resnet_time_scale_shift="scale_shift",
    attn_norm_num_groups=8,
    num_class_embeds=NULL_CLASS + 1,
    time_scale=16.0,
)


@dataclass
class Progress:
    """How much of the budget is spent; survives a resume."""

    step: int = 0
    images: int = 0
    seconds: float = 0.0


def draw_sigma(batch: int, generator: torch.Generator) -> Tensor:
    """[B] log-normal levels, one per equal slice of probability, in random order."""
    order = torch.randperm(batch, generator=generator)
    quantile = (order + torch.rand(batch, generator=generator)) / batch
    normal = torch.special.ndtri(quantile.double().clamp(1e-6, 1 - 1e-6)).float()
    return torch.exp(LOG_SIGMA_MEAN + LOG_SIGMA_STD * normal)


def draw_batch(pixels: Tensor, classes: Tensor, batch: int, generator: torch.Generator) -> tuple[Tensor, ...]:
    """Images [B, 1, H, W] in [-1, 1], labels [B], some dropped, sigma [B, 1, 1, 1], unit noise like the images."""
    index = torch.randint(len(pixels), (batch,), generator=generator)
    images = pixels[index].float() / 127.5 - 1.0
    dropped = torch.rand(batch, generator=generator) < DROP_LABEL
    labels = classes[index].masked_fill(dropped, NULL_CLASS)
    sigma = draw_sigma(batch, generator)[:, None, None, None]
    return images, labels, sigma, torch.randn(images.shape, generator=generator)


def edm_loss(net: nn.Module, images: Tensor, labels: Tensor, sigma: Tensor, noise: Tensor, sigma_data: float) -> Tensor:
    """Mean squared error of the raw output, the network in bf16 autocast; shapes as `draw_batch` returns."""
    noisy = (images + sigma * noise).to(memory_format=torch.channels_last)
    total = sigma.square() + sigma_data**2
    c_skip, c_out, c_in = sigma_data**2 / total, sigma * sigma_data / total.sqrt(), total.rsqrt()
    # With 64 tokens the plain attention formula trains faster on a CPU than the fused one.
    with torch.autocast("cpu", torch.bfloat16), sdpa_kernel(SDPBackend.MATH):
        raw = net(c_in * noisy, sigma.flatten().log() / 4, labels)
    return F.mse_loss(raw.float(), (images - c_skip * noisy) / c_out)


def learning_rate(progress: Progress, fraction: float) -> float:
    """Linear warm-up over steps, then half a cosine to zero at the end of the budget."""
    warmup = min(1.0, (progress.step + 1) / WARMUP_STEPS)
    return LEARNING_RATE * warmup * 0.5 * (1 + math.cos(math.pi * min(1.0, fraction)))


def update_ema(ema: UNet, net: UNet, step: int) -> None:
    """Exponential average of the weights, shorter at the start."""
    decay = min(EMA_DECAY, (1 + step) / (10 + step))
    torch._foreach_lerp_(list(ema.parameters()), [p.detach() for p in net.parameters()], 1 - decay)


def save_checkpoint(
    path: Path, net: UNet, ema: UNet, optimizer: torch.optim.Optimizer, generator: torch.Generator, progress: Progress
) -> None:
    """Everything a resume needs, under a temporary name first."""
    state = {
        "net": net.state_dict(), "ema": ema.state_dict(), "optimizer": optimizer.state_dict(),
        "generator": generator.get_state(), "progress": vars(progress),
    }  # fmt: skip
    temporary = path.with_suffix(".tmp")
    torch.save(state, temporary)
    os.replace(temporary, path)


def save_weights(path: Path, ema: UNet, sigma_data: float, progress: Progress) -> None:
    """The averaged weights as fp16 safetensors, with what a Denoiser needs in the metadata."""
    metadata = {
        "prediction": "edm",
        "sigma_data": repr(sigma_data),
        "class_names": json.dumps(FASHION_CLASSES),
        "null_class": str(NULL_CLASS),
        "value_range": "[-1, 1]",
        "images_seen": str(progress.images),
        "data": "Fashion-MNIST (MIT licence)",
    }
    ema.save(path, torch.float16, metadata)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=FASHION_FOLDER, help="folder of IDX files")
    parser.add_argument("--out", type=Path, required=True, help="folder for checkpoint, weights and log")
    budget = parser.add_mutually_exclusive_group(required=True)
    budget.add_argument("--minutes", type=float, help="budget in wall time")
    budget.add_argument("--images", type=int, help="budget in images seen")
    parser.add_argument("--batch", type=int, default=128, help="over all processes, a multiple of their number")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, help="of each process (default: the cores, shared out)")
    parser.add_argument("--resume", action="store_true", help="go on from the checkpoint in --out")
    return parser.parse_args()


def fraction_spent(progress: Progress, args: argparse.Namespace) -> float:
    """Fraction of the budget; wall time is the first process's, so that all stop at the same step."""
    seconds = torch.tensor(progress.seconds, dtype=torch.float64)
    if dist.is_initialized():
        dist.broadcast(seconds, 0)
    progress.seconds = seconds.item()
    return progress.seconds / (60 * args.minutes) if args.minutes else progress.images / args.images


def append_log(path: Path, progress: Progress, loss: float, rate: float, learning_rate: float) -> None:
    line = f"{progress.seconds:.1f},{progress.step},{progress.images},{loss:.5f},{rate:.1f},{learning_rate:.3e}\n"
    with path.open("a", encoding="utf-8") as file:
        file.write(line)


def main() -> None:
    args = parse_arguments()
    if "WORLD_SIZE" in os.environ:
        dist.init_process_group("gloo")
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    torch.set_num_threads(args.threads or max(1, (os.cpu_count() or 1) // world))
    torch.manual_seed(args.seed)
    generator = torch.Generator().manual_seed(args.seed)
    args.out.mkdir(parents=True, exist_ok=True)
    checkpoint, weights, log = (args.out / name for name in ("checkpoint.pt", "fashion.safetensors", "log.csv"))

    pixels, classes = (torch.from_numpy(array) for array in load_idx(args.data, "train"))
    classes = classes.long()
    # The data are not centred, so the root mean square is what makes the network's input and target unit.
    sigma_data = round(float((pixels.double() / 127.5 - 1).square().mean().sqrt()), 4)

    net = UNet(CONFIG).train()
    net.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    ema = copy.deepcopy(net).eval().requires_grad_(False)
    optimizer = torch.optim.AdamW(net.parameters(), LEARNING_RATE, betas=(0.9, 0.99), weight_decay=WEIGHT_DECAY)
    progress = Progress()
    if args.resume:
        state = torch.load(checkpoint, weights_only=True)
        net.load_state_dict(state["net"])
        ema.load_state_dict(state["ema"])
        optimizer.load_state_dict(state["optimizer"])
        generator.set_state(state["generator"])
        progress = Progress(**state["progress"])
    model = DistributedDataParallel(net) if world > 1 else net

    if rank == 0:
        count = sum(p.numel() for p in net.parameters())
        print(f"{count} parameters, sigma_data {sigma_data}, {len(pixels)} images, {world} processes", flush=True)
        if not args.resume:
            log.write_text("seconds,step,images,loss,images_per_s,learning_rate\n", encoding="utf-8")

    began, spent_before = time.monotonic(), progress.seconds
    saved, window, losses = began, (began, progress.images), []
    while True:
        now = time.monotonic()
        progress.seconds = spent_before + now - began
        fraction = fraction_spent(progress, args)
        done = fraction >= 1
        if rank == 0 and (done or now - saved > SAVE_SECONDS):
            save_checkpoint(checkpoint, net, ema, optimizer, generator, progress)
            save_weights(weights, ema, sigma_data, progress)
            saved = now
        if done:
            break
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(progress, fraction)
        share = [part[rank::world] for part in draw_batch(pixels, classes, args.batch, generator)]
        loss = edm_loss(model, *share, sigma_data=sigma_data)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), CLIP_NORM)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        update_ema(ema, net, progress.step)
        progress.step += 1
        progress.images += args.batch
        losses.append(loss.item())
        if not math.isfinite(losses[-1]):
            raise SystemExit(f"loss is {losses[-1]} at step {progress.step}; see the checkpoint in {args.out}")
        if rank == 0 and progress.step % LOG_STEPS == 0:
            rate = (progress.images - window[1]) / (time.monotonic() - window[0])
            append_log(log, progress, sum(losses) / len(losses), rate, optimizer.param_groups[0]["lr"])
            window, losses = (time.monotonic(), progress.images), []

    if rank == 0:
        print(f"done: {progress.images} images, {progress.step} steps, {progress.seconds:.0f} s", flush=True)
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
