"""Kernels of operators that nothing fuses, run on the CPU against the reference, and what the lowering tells them."""

from __future__ import annotations

import ctypes
from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from mortice.core.model.program import build_program
from mortice.core.model.types import DeviceInfo
from mortice.core.model.validation import validate
from mortice.core.model.weight_plan import plan_weights
from mortice.core.stages import open_file
from mortice.plugins.executors.cuda.compile.flatten import flatten
from mortice.plugins.executors.cuda.executor import CudaExecutor
from mortice.plugins.executors.cuda.lowering.launches import LaunchSpec
from mortice.plugins.executors.cuda.lowering.lowering import Lowering
from mortice.plugins.executors.cuda.lowering.sources import OPS, KernelSources
from mortice.plugins.executors.reference import ops
from tests.support.cuda_on_cpu import compile_for_cpu, needs_cpu_compiler, pointer
from tests.support.tiny import CONTRACTS, REGISTRY, tiny

LAUNCHES = """
extern "C" void position_scale(const float* x, const int* positions, float* out, float strength, int period, int width,
                               unsigned rows) {
    launch({static_cast<unsigned>(width + 255) / 256, rows}, 256, [=] {
        op_position_scale(x, positions, out, strength, period, width);
    });
}
extern "C" void norm(const float* x, const float* weight, const float* bias, float* out, float eps, int width,
                     int is_layer_norm, int per_row, unsigned groups, unsigned rows) {
    launch({groups, rows}, 256, [=] { op_norm(x, weight, bias, out, eps, width, is_layer_norm, per_row); });
}
extern "C" void rope(const float* x, const double* frequencies, const int* positions, float* out, float magnitude,
                     int head_dim, int dims, int is_halves, unsigned heads, unsigned rows) {
    launch({heads, rows}, 64, [=] {
        op_rope(x, frequencies, positions, out, magnitude, head_dim, dims, is_halves);
    });
}
"""
ROWS = 5
NO_DEVICE = DeviceInfo(kind="cuda", name="none", total_bytes=0, free_bytes=0)

Array = NDArray[np.float32]


@pytest.fixture(scope="module")
def kernels(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    return compile_for_cpu(tmp_path_factory.mktemp("plain"), flatten(OPS / "plain.cu", [OPS]) + LAUNCHES, {})


def some(*shape: int) -> Array:
    return np.random.default_rng(shape).normal(size=shape).astype(np.float32)


@needs_cpu_compiler
def test_a_position_scale_is_the_references(kernels: ctypes.CDLL) -> None:
    x, out = some(ROWS, 300), np.empty((ROWS, 300), np.float32)
    positions = np.array([0, 15, 16, 17, 100_000], np.int32)
    arrays = [pointer(array) for array in (x, positions, out)]
    kernels.position_scale(*arrays, ctypes.c_float(0.5), 16, 300, ctypes.c_uint(ROWS))
    wanted = x * ops.position_scale(positions.astype(np.int64), 0.5, 16)[:, None]
    np.testing.assert_allclose(out, wanted, rtol=1e-6)


@needs_cpu_compiler
@pytest.mark.parametrize("kind", ["rms", "layer"])
@pytest.mark.parametrize("groups", [1, 4])
@pytest.mark.parametrize("per_row", [False, True])
@pytest.mark.parametrize("biased", [False, True])
def test_a_norm_is_the_references(kernels: ctypes.CDLL, kind: Any, groups: int, per_row: bool, biased: bool) -> None:
    part = 96
    x, out = some(ROWS, groups * part), np.empty((ROWS, groups * part), np.float32)
    weight = some(groups * part if per_row else part)
    bias = some(weight.size) if biased else None
    shift = pointer(bias) if bias is not None else None
    scalars = (ctypes.c_float(1e-5), part, int(kind == "layer"), int(per_row), ctypes.c_uint(groups))
    kernels.norm(pointer(x), pointer(weight), shift, pointer(out), *scalars, ctypes.c_uint(ROWS))
    np.testing.assert_allclose(out, ops.normalize(x, kind, 1e-5, groups, weight, bias), rtol=1e-4, atol=1e-5)


@needs_cpu_compiler
@pytest.mark.parametrize("style", ["halves", "adjacent"])
@pytest.mark.parametrize("dims", [64, 24])
def test_a_rope_is_the_references(kernels: ctypes.CDLL, style: str, dims: int) -> None:
    x, out = some(ROWS, 3 * 64), np.empty((ROWS, 3 * 64), np.float32)
    positions, frequencies = (
        np.array([0, 1, 77, 4095, 100_000], np.int32),
        10000.0 ** (-2 * np.arange(dims // 2) / dims),
    )
    arrays = [pointer(array) for array in (x, frequencies, positions, out)]
    shape = (64, dims, int(style == "halves"), ctypes.c_uint(3), ctypes.c_uint(ROWS))
    kernels.rope(*arrays, ctypes.c_float(1.25), *shape)
    angles = positions[:, None] * frequencies
    turns = [(1.25 * turn(angles)).astype(np.float32) for turn in (np.cos, np.sin)]
    np.testing.assert_allclose(out, ops.rotate(x, *turns, 64, style), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("heads", [4, 16])
def test_a_weight_for_each_head_is_never_taken_for_one_of_all(heads: int, tmp_path: Path) -> None:
    """Its shape is (heads, head_dim), also where the two are equal."""
    sizes = {"hidden_size": 16 * heads, "num_heads": heads, "num_kv_heads": heads}
    path = tiny(tmp_path, "stablelm", sizes=sizes, include=["attn_q_norm", "attn_k_norm"])
    types = [provided.value for provided in REGISTRY.qtypes.values()]
    executor = CudaExecutor()
    with open_file(REGISTRY, path) as file:
        model = validate(file, CONTRACTS["stablelm"]).model()
        plan = plan_weights(model, build_program(model), executor.kernels(NO_DEVICE, types))
    traits = {item.qtype.name: item.traits for item in types if item.traits is not None}
    lowering = Lowering(plan=plan, sources=KernelSources(traits), rows=16, kv_type="f16", sm_count=8)
    at: Any = SimpleNamespace(workspace=0, weights=defaultdict(int))
    norms = [
        spec
        for spec in lowering.launches(lowering.paths[0])[0]
        if isinstance(spec, LaunchSpec)
        and spec.entry == "op_norm"
        and spec.name.endswith(("attn_q_norm", "attn_k_norm"))
    ]
    assert len(norms) == 4
    for spec in norms:
        *_, width, is_layer_norm, per_row = spec.args(at, 1)
        assert (width.value, is_layer_norm.value, per_row.value) == (16, 1, 1)
