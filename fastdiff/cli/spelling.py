"""Options as a command spells them: those that other programs call otherwise, and those that an error names.

May import: nothing of the package.
"""

from __future__ import annotations

import argparse
import difflib
import re
from collections.abc import Sequence
from typing import NoReturn

_ELSEWHERE = {  # what other programs call our options; a command has some of them
    "--batch": "bs batch-size train-batch-size",
    "--clip-norm": "max-grad-norm grad-clip gradient-clip-val",
    "--count": "n num num-samples n-samples num-images-per-prompt",
    "--data": "train-data-dir data-dir dataset dataset-name dataset-path",
    "--decay": "lr-scheduler lr-schedule scheduler",
    "--ema-halflife": "ema ema-decay ema-rate",
    "--flip": "random-flip xflip mirror",
    "--guidance": "cfg cfg-scale guidance-scale",
    "--images": "epochs num-epochs num-train-epochs max-train-steps train-steps steps iterations kimg duration",
    "--init": "pretrained pretrained-model-name-or-path transfer finetune",
    "--learning-rate": "lr",
    "--micro-batch": "gradient-accumulation-steps grad-accum batch-gpu",
    "--model": "ckpt checkpoint network model-path",
    "--objective": "loss prediction-type prediction",
    "--out": "o output output-dir outdir logdir",
    "--precision": "mixed-precision amp fp16 bf16",
    "--recompute": "gradient-checkpointing",
    "--resume": "resume-from-checkpoint resume-checkpoint",
    "--samples": "count n num num-samples n-samples num-images",
    "--save-images": "checkpointing-steps save-interval save-every snap",
    "--seed": "s seeds",
    "--size": "resolution image-size img-size",
    "--solver": "sampler scheduler method",
    "--steps": "num-inference-steps num-steps nfe",
    "--warmup-images": "warmup warmup-steps lr-warmup-steps lr-warmup",
    "--workers": "num-workers dataloader-num-workers",
}


def refuse_unknown(parser: argparse.ArgumentParser, unknown: Sequence[str]) -> NoReturn:
    """End with the command's own usage and, for each option that it does not have, the one that may be meant."""
    hints = [_meant(parser, name.partition("=")[0]) for name in unknown if name.startswith("-")]
    parser.error(f"unrecognized arguments: {' '.join(unknown)}{''.join(hints)}")


def _meant(parser: argparse.ArgumentParser, name: str) -> str:
    ours = [option for option in parser._option_string_actions if option.startswith("--")]
    plain = name.lstrip("-").replace("_", "-").lower()
    named = [option for option in ours if plain in _ELSEWHERE.get(option, "").split()]
    close = named or [f"--{found}" for found in difflib.get_close_matches(plain, [name[2:] for name in ours], n=1)]
    about = " (lengths are in images: epochs times the pictures of the set, or steps times --batch)"
    return f"; {name}: did you mean {' or '.join(close)}?{about * (named == ['--images'])}" if close else ""


def spelt(text: str, parser: argparse.ArgumentParser) -> str:
    """An error of the library with NAME=VALUE of the command's options as --NAME VALUE, and other text as it is."""
    names = "|".join(option[2:].replace("-", "_") for option in parser._option_string_actions if option[:2] == "--")

    def option(found: re.Match[str]) -> str:
        return f"--{found[1].replace('_', '-')} {found[2].strip(chr(39))}"

    return re.sub(rf"(?<![\w.(/-])({names})=('[^']*'|[\w./-]*\w)(?=[.,;:?)]*(?:\s|$))", option, text)
