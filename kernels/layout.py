"""Columns of a packed plan and of the tensors of the other ops; fastdiff/compiler/layout.py is the other copy.

May import: Triton.
"""

from __future__ import annotations

import triton.language as tl

# coef
P: tl.constexpr = tl.constexpr(0)
Q: tl.constexpr = tl.constexpr(1)
GAIN: tl.constexpr = tl.constexpr(2)
CLAMP_LO: tl.constexpr = tl.constexpr(3)
CLAMP_HI: tl.constexpr = tl.constexpr(4)
EMIT_SCALE: tl.constexpr = tl.constexpr(5)
EMIT_TIME: tl.constexpr = tl.constexpr(6)
PERTURB: tl.constexpr = tl.constexpr(7)
OUTPUT: tl.constexpr = tl.constexpr(8)
OUTPUT_STRIDE: tl.constexpr = tl.constexpr(9)
OUT_K: tl.constexpr = tl.constexpr(0)
OUT_DELTA: tl.constexpr = tl.constexpr(1)
OUT_B: tl.constexpr = tl.constexpr(2)
OUT_E: tl.constexpr = tl.constexpr(3)
OUT_A: tl.constexpr = tl.constexpr(4)
SPREAD_LOG: tl.constexpr = tl.constexpr(35)
SPREAD_SLOPE: tl.constexpr = tl.constexpr(36)
NOISE: tl.constexpr = tl.constexpr(40)
NOISE_STRIDE: tl.constexpr = tl.constexpr(4)

# ids
SLOT: tl.constexpr = tl.constexpr(0)
DEST: tl.constexpr = tl.constexpr(6)
FLAGS: tl.constexpr = tl.constexpr(9)
TERMS: tl.constexpr = tl.constexpr(10)
SLOTS: tl.constexpr = tl.constexpr(11)
TERM_IDS: tl.constexpr = tl.constexpr(16)
TERM_IDS_STRIDE: tl.constexpr = tl.constexpr(2)
READS_MODEL: tl.constexpr = tl.constexpr(1)
E_UNGUIDED: tl.constexpr = tl.constexpr(2)
SPREADS_NOISE: tl.constexpr = tl.constexpr(4)

# mix
MIX_W: tl.constexpr = tl.constexpr(0)
MIX_U: tl.constexpr = tl.constexpr(1)
MIX_P: tl.constexpr = tl.constexpr(2)
MIX_Q: tl.constexpr = tl.constexpr(3)
MIX_M: tl.constexpr = tl.constexpr(4)
MIX_BOUND: tl.constexpr = tl.constexpr(5)
MIX_POST: tl.constexpr = tl.constexpr(6)
MIX_S: tl.constexpr = tl.constexpr(7)
MIX: tl.constexpr = tl.constexpr(8)

# the guide op: its rules, its settings, and its scratch
PLAIN: tl.constexpr = tl.constexpr(0)
RESCALE: tl.constexpr = tl.constexpr(1)
APG: tl.constexpr = tl.constexpr(2)
CFG_ZERO: tl.constexpr = tl.constexpr(3)
PHI: tl.constexpr = tl.constexpr(0)
ETA: tl.constexpr = tl.constexpr(1)
BETA: tl.constexpr = tl.constexpr(2)
RADIUS: tl.constexpr = tl.constexpr(3)
PERCENTILE: tl.constexpr = tl.constexpr(4)
CEILING: tl.constexpr = tl.constexpr(5)
PARTS: tl.constexpr = tl.constexpr(64)
SUMS: tl.constexpr = tl.constexpr(8)

# the measure op
ERROR: tl.constexpr = tl.constexpr(0)
CHANGE: tl.constexpr = tl.constexpr(1)

# the training ops
INPUT_X0: tl.constexpr = tl.constexpr(0)
INPUT_Z: tl.constexpr = tl.constexpr(1)
INPUT_Y: tl.constexpr = tl.constexpr(2)
TARGET_X0: tl.constexpr = tl.constexpr(3)
TARGET_Z: tl.constexpr = tl.constexpr(4)
TARGET_Y: tl.constexpr = tl.constexpr(5)
FLIP: tl.constexpr = tl.constexpr(6)
TRAIN_COLUMNS: tl.constexpr = tl.constexpr(8)
NOISE_Z: tl.constexpr = tl.constexpr(0)
NOISE_Y: tl.constexpr = tl.constexpr(1)
STREAM_TRAINING: tl.constexpr = tl.constexpr(3)
