"""Column numbers of a packed plan: the one contract between the compiler and every executor.

`coef` is fp32 [rows, COEF_FIXED + 4 * terms], `ids` is int32 [rows, IDS_FIXED + 2 * terms].
The other copies are csrc/affine.h and kernels/affine.py; a test keeps the three equal.
"""

from __future__ import annotations

MAX_OUTPUTS = 3
MAX_SLOTS = 6  # slot 0 is x, what the model was evaluated at

# coef columns
P, Q, GAIN, CLAMP_LO, CLAMP_HI, EMIT_SCALE, EMIT_TIME = range(7)
OUTPUT, OUTPUT_STRIDE = 8, 8  # output o: k, d, b, a_1 .. a_5
OUT_K, OUT_DELTA, OUT_B, OUT_A = 0, 1, 2, 3
NOISE, NOISE_STRIDE = 32, 4  # term t: its coefficient in output 0, 1, 2
COEF_FIXED = NOISE

# ids columns
SLOT, DEST, FLAGS, TERMS, SLOTS = 0, 6, 9, 10, 11
TERM_IDS, TERM_IDS_STRIDE = 16, 2  # term t: noise id, stream
IDS_FIXED = TERM_IDS

READS_MODEL = 1  # bit of FLAGS

# noise streams
STREAM_LATENT, STREAM_STEP, STREAM_BROWNIAN, STREAM_TRAINING = range(4)
STREAM_SHARED = 4  # added to a stream: what all frames of a sample have in common
