"""Measures the shipped Fashion-MNIST network with the classifier of `fashion_classifier.py`.

    python recipes/fashion_eval.py --samples 10000 --guidance 2 --steps 20

Two numbers, for samples and beside them for real photographs:
agreement: how often the classifier sees the class that was asked for (for photographs: its test accuracy);
distance:  squared Fréchet distance of the classifier's 128 features to those of the 10,000 test images (for
           photographs: of as many training images, equally many of each class, in the order of the file).
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import torch
from torch import Tensor

import fastdiff as fd
from fastdiff import images as pictures
from fastdiff.models.classifier import FashionClassifier, classify, load_classifier
from fastdiff.training.data.idx import FASHION_FOLDER, load_idx
from fastdiff.training.evaluation.metrics import class_agreement, fit_gaussian, frechet_distance

CLASSES = 10
WEIGHTS = Path(fd.models.__file__).parent / "weights"


def draw_part(args: argparse.Namespace, asked: Tensor, first: int) -> Tensor:
    """uint8 samples [N, 1, 32, 32] of the given classes; sample i has seed args.seed + first + i."""
    torch.set_num_threads(args.threads)
    model = fd.load(args.weights)
    plan = fd.plan(args.solver, schedule=model.schedule, steps=args.steps, grid=args.grid)
    with torch.autocast("cpu", torch.bfloat16, enabled=args.bf16):
        x = fd.Sampler(plan, model).sample(
            (len(asked), *model.shape),
            seed=range(args.seed + first, args.seed + first + len(asked)),
            cond=asked,
            uncond=torch.full_like(asked, model.null_label),
            guidance=args.guidance,
        )
    return torch.from_numpy(pictures.to_pixels(x)).permute(0, 3, 1, 2)


def draw(args: argparse.Namespace, asked: Tensor) -> Tensor:
    """Samples of all classes asked for, drawn in parts by several processes; their number does not change a sample."""
    began, drawn = time.monotonic(), []
    parts, firsts = asked.split(args.batch), range(0, len(asked), args.batch)
    with ProcessPoolExecutor(args.processes, get_context("spawn")) as pool:
        for part in pool.map(draw_part, [args] * len(parts), parts, firsts):
            drawn.append(part)
            done = sum(map(len, drawn))
            rate = done / (time.monotonic() - began)
            print(f"\r{done} of {len(asked)}, {rate:.1f} images/s", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    return torch.cat(drawn)


def balanced(labels: Tensor, each: int) -> Tensor:
    """Indices of the first `each` images of every class."""
    return torch.cat([(labels == c).nonzero()[:each, 0] for c in range(CLASSES)])


def report(name: str, net: FashionClassifier, images: Tensor, labels: Tensor, reference: Tensor) -> None:
    """Prints agreement and distance of one set of images, and the agreement of each class."""
    predicted, features = classify(net, images)
    overall, each = class_agreement(predicted.numpy(), labels.numpy(), CLASSES)
    distance = frechet_distance(fit_gaussian(features.numpy()), fit_gaussian(reference.numpy()))
    by_class = " ".join(f"{100 * value:.1f}" for value in each)
    print(
        f"{name}: {len(images)} images, agreement {100 * overall:.2f} %, distance {distance:.4f}, by class {by_class}"
    )


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=FASHION_FOLDER, help="folder of IDX files")
    parser.add_argument("--weights", type=Path, default=WEIGHTS / "fashion.safetensors")
    parser.add_argument("--classifier", type=Path, default=WEIGHTS / "fashion_classifier.safetensors")
    parser.add_argument("--samples", type=int, default=10_000, help="equally many of each class")
    parser.add_argument("--solver", default="dpmpp_2m")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--grid", default="karras")
    parser.add_argument("--guidance", type=float, default=2.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--batch", type=int, default=200)
    parser.add_argument("--bf16", action="store_true", help="run the network in bf16 autocast")
    parser.add_argument("--processes", type=int, default=os.cpu_count())
    parser.add_argument("--threads", type=int, default=1, help="of each process")
    parser.add_argument("--save", type=Path, help="also write the samples, uint8, to this .npy file")
    return parser.parse_args()


def main() -> None:
    args = parse_arguments()
    torch.set_num_threads(args.threads)
    net = load_classifier(args.classifier)
    train_images, train_labels = (torch.from_numpy(array) for array in load_idx(args.data, "train"))
    test_images, test_labels = (torch.from_numpy(array) for array in load_idx(args.data, "test"))
    _, reference = classify(net, test_images)

    report("test photographs", net, test_images, test_labels, reference)
    chosen = balanced(train_labels, 1000)
    report("training photographs", net, train_images[chosen], train_labels[chosen], reference)
    asked = torch.arange(CLASSES).repeat_interleave(args.samples // CLASSES)
    drawn = draw(args, asked)
    if args.save:
        pictures.save(args.save, drawn.permute(0, 2, 3, 1).contiguous().numpy(), [], 10)
    how = f"{args.solver}, {args.steps} steps, {args.grid} grid, guidance {args.guidance:g}"
    report(f"samples ({how})", net, drawn, asked, reference)


if __name__ == "__main__":
    main()
