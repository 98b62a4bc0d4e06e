"""The argument blocks of the compiled extension's C functions, field by field as the headers of csrc have them.

May import: ctypes alone. engine.native compares their sizes with the extension's when it loads it.
"""

from __future__ import annotations

import ctypes

_BRANCHES = ("model_out", "unguided", "perturbed")
AFFINE_POINTERS = (
    "state", *_BRANCHES, "variance", "mix", "momentum", "model_in", "model_time", "coef", "ids", "row",
    "seed", "guidance", "noise", "denoised", "status", "ticket",
)  # fmt: skip
GUIDE_POINTERS = (
    "state", *_BRANCHES, "coef", "ids", "row", "guidance", "settings", "mix", "partial", "momentum", "ticket",
)  # fmt: skip
MEASURE_POINTERS = ("value", "before", "after", "status", "found", "partial", "ticket")
_NORM_POINTERS = (
    "x", "residual", "skip", "before", "scale", "shift", "weight", "bias", "y", "total", "stats",
    "grad", "sums",
)  # fmt: skip
_ATTENTION_POINTERS = ("q", "k", "v", "out", "stats", "grad", "dq", "dk", "dv")


class AffineArgs(ctypes.Structure):
    """Mirror of struct AffineArgs in csrc/affine.h, which says what each field is."""

    _fields_ = (
        [(name, ctypes.c_void_p) for name in AFFINE_POINTERS]
        + [(name, ctypes.c_int64) for name in ("B", "N", "K", "R")]
        + [(name, ctypes.c_int64) for name in ("coef_width", "ids_width", "channels", "noise_count")]
        + [(name, ctypes.c_int32) for name in ("model_out_dtype", "model_in_dtype")]
        + [(name, ctypes.c_int32) for name in ("model_in_batch", "model_time_batch")]
    )


class GuideArgs(ctypes.Structure):
    """Mirror of struct GuideArgs in csrc/guide.h, which says what each field is."""

    _fields_ = (
        [(name, ctypes.c_void_p) for name in GUIDE_POINTERS]
        + [(name, ctypes.c_int64) for name in ("B", "N", "K", "R", "coef_width", "ids_width")]
        + [(name, ctypes.c_int32) for name in ("model_out_dtype", "rule", "threshold", "reserved")]
    )


class MeasureArgs(ctypes.Structure):
    """Mirror of struct MeasureArgs in csrc/measure.h, which says what each field is."""

    _fields_ = (
        [(name, ctypes.c_void_p) for name in MEASURE_POINTERS]
        + [(name, ctypes.c_int64) for name in ("B", "N")]
        + [(name, ctypes.c_float) for name in ("rtol", "atol")]
        + [(name, ctypes.c_int32) for name in ("quantity", "reserved")]
    )


class TrainArgs(ctypes.Structure):
    """Mirror of struct TrainArgs in csrc/train.h, which says what each field is."""

    _fields_ = (
        [(name, ctypes.c_void_p) for name in ("images", "table", "key", "model_out", "weight", "partial", "out")]
        + [(name, ctypes.c_int64) for name in ("B", "N", "width", "channels")]
        + [(name, ctypes.c_int32) for name in ("image_dtype", "model_dtype")]
        + [("factor", ctypes.c_float)]
        + [("reserved", ctypes.c_int32)]
    )


class NormArgs(ctypes.Structure):
    """Mirror of struct NormArgs in csrc/norm.h, which says what each field is."""

    _fields_ = (
        [(name, ctypes.c_void_p) for name in _NORM_POINTERS]
        + [(name, ctypes.c_int64) for name in ("B", "C", "C1", "P", "groups")]
        + [(f"{name}_stride", ctypes.c_int64) for name in ("residual", "before", "scale", "shift")]
        + [("eps", ctypes.c_float)]
        + [(name, ctypes.c_int32) for name in ("act", "dtype", "channels_last")]
    )


class AttentionArgs(ctypes.Structure):
    """Mirror of struct AttentionArgs in csrc/attention.h, which says what each field is."""

    _fields_ = (
        [(name, ctypes.c_void_p) for name in _ATTENTION_POINTERS]
        + [(name, ctypes.c_int64) for name in ("B", "T", "H", "d")]
        + [("scale", ctypes.c_float)]
        + [("reserved", ctypes.c_int32)]
    )


class WinogradArgs(ctypes.Structure):
    """Mirror of struct WinogradArgs in csrc/winograd.h, which says what each field is."""

    _fields_ = [(name, ctypes.c_void_p) for name in ("x", "v", "products", "bias", "y")] + [
        (name, ctypes.c_int64) for name in ("B", "C", "H", "W", "first", "count", "size")
    ]


class WinogradTrainArgs(ctypes.Structure):
    """Mirror of struct WinogradTrainArgs in csrc/winograd.h, which says what each field is."""

    _fields_ = [(name, ctypes.c_void_p) for name in ("x", "y", "weight", "bias")] + [
        (name, ctypes.c_int64) for name in ("B", "C", "N", "H", "W", "row", "column", "tap", "block")
    ]
