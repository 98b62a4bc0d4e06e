"""Trains the small classifier that judges samples of the Fashion-MNIST network.

    python recipes/fashion_classifier.py --out fastdiff/models/weights/fashion_classifier.safetensors

Four 3x3 convolutions with batch norm, a global average (the 128 features of the Fréchet distance) and a linear
layer; trained on the 60,000 training images with shifts of up to two pixels, on AdamW with a cosine rate.
"""

from __future__ import annotations

import argparse
import math
import os
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

from fastdiff.models.classifier import FashionClassifier, classify, scaled
from fastdiff.training.data.idx import FASHION_FOLDER, load_idx

LEARNING_RATE, WEIGHT_DECAY, SHIFT = 3e-3, 0.05, 2


def shifted(images: Tensor) -> Tensor:
    """Each image moved by up to SHIFT pixels, black coming in. [B, 1, H, W] uint8."""
    batch, _, height, width = images.shape
    padded = F.pad(images, (SHIFT,) * 4)[:, 0]
    top, left = torch.randint(2 * SHIFT + 1, (2, batch))
    rows = (top[:, None] + torch.arange(height))[:, :, None]
    columns = (left[:, None] + torch.arange(width))[:, None, :]
    return padded[torch.arange(batch)[:, None, None], rows, columns][:, None]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=FASHION_FOLDER, help="folder of IDX files")
    parser.add_argument("--out", type=Path, required=True, help="safetensors file to write")
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--batch", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)

    images, labels = (torch.from_numpy(array) for array in load_idx(args.data, "train"))
    test_images, test_labels = (torch.from_numpy(array) for array in load_idx(args.data, "test"))
    labels = labels.long()
    net = FashionClassifier().to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(net.parameters(), LEARNING_RATE, weight_decay=WEIGHT_DECAY)
    steps = args.epochs * (len(images) // args.batch)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=steps, pct_start=0.1)

    began = time.monotonic()
    for epoch in range(args.epochs):
        net.train()
        total, order = 0.0, torch.randperm(len(images))
        for index in order[: len(order) // args.batch * args.batch].split(args.batch):
            with torch.autocast("cpu", torch.bfloat16):
                logits, _ = net(scaled(shifted(images[index])))
            loss = F.cross_entropy(logits.float(), labels[index])
            loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            schedule.step()
            total += loss.item()
        if not math.isfinite(total):
            raise SystemExit(f"loss is not finite in epoch {epoch}")
        predicted, _ = classify(net.eval(), test_images)
        accuracy = (predicted == test_labels).float().mean().item()
        mean_loss = total / (len(images) // args.batch)
        print(
            f"epoch {epoch + 1}: loss {mean_loss:.4f}, test accuracy {accuracy:.4f}, {time.monotonic() - began:.0f} s"
        )

    temporary = args.out.with_suffix(".tmp")
    tensors = {name: tensor.contiguous() for name, tensor in net.state_dict().items()}
    save_file(tensors, temporary, {"test_accuracy": f"{accuracy:.4f}", "data": "Fashion-MNIST (MIT licence)"})
    os.chmod(temporary, 0o644)
    os.replace(temporary, args.out)


if __name__ == "__main__":
    main()
