"""Trains a network like the one that comes with the package: the preset fashion32 on Fashion-MNIST's photographs.

    python recipes/fashion.py --out runs/fashion
    torchrun --nproc-per-node 2 recipes/fashion.py --out runs/fashion --threads 1

The second is faster on a CPU: one process a core. It is `fastdiff train --preset fashion32 --data FOLDER` and takes the
options of that command; `--resume auto` goes on. The preset: class-conditional EDM (Karras et al. 2022) with
ln sigma ~ N(-0.7, 1.3^2), labels dropped with probability 0.1 (Ho & Salimans 2022, Alg. 1), 830,848 images, the rate
half a cosine. The card of the one in the package, fastdiff/models/weights/fashion.md, says how it was trained on from
there (`--init`). No flips: shoes in this data all point left, and so should samples.
"""

from __future__ import annotations

import sys

from fastdiff.cli import main
from fastdiff.training.data.idx import FASHION_FOLDER

if __name__ == "__main__":
    sys.exit(main(["train", "--preset", "fashion32", "--data", str(FASHION_FOLDER), *sys.argv[1:]]))
