"""Arguments of the kernels of linear maps: mirrors of the structures in ``ops``."""

from __future__ import annotations

import ctypes

from mortice.plugins.executors.cuda.lowering.fusion import MAX_SEGMENTS

__all__ = ["FinishArgs", "GemvArgs", "InputArgs", "LeftArgs", "MatmulArgs", "PartArgs", "RingArgs", "SegmentArgs"]

Pointer, Int, Float = ctypes.c_uint64, ctypes.c_int32, ctypes.c_float


class SegmentArgs(ctypes.Structure):
    """``SegmentArgs`` in ``ops/gemv_parts.cuh`` and ``ops/matmul_ring.cu``."""

    _fields_ = [(name, Pointer) for name in ("weight", "bias", "residual", "out")]


class LeftArgs(ctypes.Structure):
    """``LeftArgs`` in ``ops/gemv_parts.cuh``."""

    _fields_ = [("partial", Pointer), ("position", Pointer), ("window", Int), ("splits", Int)]


class GemvArgs(ctypes.Structure):
    """``GemvArgs`` in ``ops/gemv_parts.cuh``."""

    _fields_ = [
        ("x", Pointer),
        ("norm_weight", Pointer),
        ("norm_bias", Pointer),
        ("norm_eps", Float),
        ("segments", SegmentArgs * MAX_SEGMENTS),
        ("left", LeftArgs),
    ]


class MatmulArgs(ctypes.Structure):
    """``MatmulArgs`` in ``ops/matmul_parts.cuh``."""

    _fields_ = [
        *((name, Pointer) for name in ("x", "scales", "products")),
        ("weights", Pointer * MAX_SEGMENTS),
        ("rows", Int),
    ]


class RingArgs(ctypes.Structure):
    """``MatmulRingArgs`` in ``ops/matmul_ring.cu``."""

    _fields_ = [
        ("x", Pointer),
        ("norm_weight", Pointer),
        ("products", Pointer),
        ("norm_eps", Float),
        ("rows", Int),
        ("segments", SegmentArgs * MAX_SEGMENTS),
    ]


class PartArgs(ctypes.Structure):
    """``Part`` in ``ops/finish.cuh``."""

    _fields_ = [("bias", Pointer), ("residual", Pointer), ("out", Pointer), ("columns", Int), ("stride", Int)]


class FinishArgs(ctypes.Structure):
    """``FinishArgs`` in ``ops/finish.cuh``."""

    _fields_ = [
        *((name, Pointer) for name in ("products", "scales", "squares")),
        ("norm_eps", Float),
        ("rows", Int),
        ("width", Int),
        ("parts", PartArgs * MAX_SEGMENTS),
    ]


class InputArgs(ctypes.Structure):
    """``InputArgs`` in ``ops/matmul_input.cu``."""

    _fields_ = [
        *((name, Pointer) for name in ("x", "norm_weight", "norm_bias", "out", "scales", "squares")),
        ("norm_eps", Float),
        ("rows", Int),
        ("products", FinishArgs),
    ]
