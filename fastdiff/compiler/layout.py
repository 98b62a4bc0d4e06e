"""Column numbers of a packed plan: the one contract between the compiler and every executor.

`coef` is fp32 [rows, COEF_FIXED + 4 * terms], `ids` is int32 [rows, IDS_FIXED + 2 * terms].
The other copies are csrc/{affine,guide,measure,train}.h and kernels/layout.py; a test keeps them equal.
"""

from __future__ import annotations

MAX_OUTPUTS = 3
MAX_SLOTS = 6  # slot 0 is x, what the model was evaluated at

# coef columns
P, Q, GAIN, CLAMP_LO, CLAMP_HI, EMIT_SCALE, EMIT_TIME, PERTURB = range(8)
OUTPUT, OUTPUT_STRIDE = 8, 9  # output o: k, d, b, e, a_1 .. a_5
OUT_K, OUT_DELTA, OUT_B, OUT_E, OUT_A = range(5)
SPREAD_LOG, SPREAD_SLOPE = 35, 36  # of the noise, elementwise: exp(log + slope V), V the learned variance
NOISE, NOISE_STRIDE = 40, 4  # term t: its coefficient in output 0, 1, 2
COEF_FIXED = NOISE

# ids columns
SLOT, DEST, FLAGS, TERMS, SLOTS = 0, 6, 9, 10, 11
TERM_IDS, TERM_IDS_STRIDE = 16, 2  # term t: noise id, stream
IDS_FIXED = TERM_IDS

# bits of FLAGS: D is there; E is the unguided branch's estimate, else D before its clamp; the noise's spread is learned
READS_MODEL, E_UNGUIDED, SPREADS_NOISE = 1, 2, 4

# columns of `mix`, fp32 [B, MIX]: what a guidance rule found for each sample, and what leaves a row as it is
MIX_W, MIX_U, MIX_P, MIX_Q, MIX_M, MIX_BOUND, MIX_POST, MIX_S = range(8)
MIX = 8
PLAIN_MIX = (1.0, 1.0, 1.0, 1.0, 0.0, float("inf"), 1.0, 0.0)

# the guide op: its rules, the columns of its settings, fp32 [SETTINGS], and its scratch, fp32 [B, PARTS, SUMS]
PLAIN, RESCALE, APG, CFG_ZERO = range(4)
PHI, ETA, BETA, RADIUS, PERCENTILE, CEILING = range(6)
SETTINGS, PARTS, SUMS = 8, 64, 8

# the measure op: what it finds
ERROR, CHANGE = range(2)

# the training ops' table, fp32 [B, TRAIN_COLUMNS], one unused: factors of the image and of two unit noises in the
# network's input and in what it shall answer, and whether the image is mirrored; and the ids of the noises
INPUT_X0, INPUT_Z, INPUT_Y, TARGET_X0, TARGET_Z, TARGET_Y, FLIP = range(7)
TRAIN_COLUMNS = 8
NOISE_Z, NOISE_Y = range(2)

# noise streams
STREAM_LATENT, STREAM_STEP, STREAM_BROWNIAN, STREAM_TRAINING = range(4)
STREAM_SHARED = 4  # added to a stream: what all frames of a sample have in common
