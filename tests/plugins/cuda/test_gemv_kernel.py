"""Products of one row (``ops/gemv.cu``), run on the CPU against NumPy."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pytest

from mortice.plugins.executors.cuda.lowering.gemv import gemv_shape
from mortice.plugins.executors.cuda.lowering.layouts import tile_geometry
from mortice.plugins.executors.cuda.lowering.linear_args import GemvArgs
from tests.plugins.cuda.test_gemv_shape import planned
from tests.plugins.cuda.test_matmul_ring import aligned_copy
from tests.plugins.qtypes.blocks import NAMES, TYPES, stored
from tests.support.cuda_on_cpu import needs_cpu_compiler
from tests.support.int8 import through_int8
from tests.support.tensor_kernels import Array, compiled, inputs, run, tame

pytestmark = needs_cpu_compiler

FLOATS = {"F32", "F16", "BF16"}
BLOCKS = 3


def products(
    folder: Path,
    maps: Sequence[tuple[str, int]],
    columns: int,
    kinds: Mapping[str, str | int],
    slots: int | None = None,
    spoil: float | None = None,
    tokens: int = 1,
) -> tuple[Array, Array]:
    """What one launch finds for random weights and rows, and what NumPy finds with the rows as int8.

    A gate and up give one result; with a norm, its factor comes after the products.
    """
    rng = np.random.default_rng(5)
    gated, normed = bool(kinds.get("GATED", 0)), kinds.get("NORM", "kNoNorm") != "kNoNorm"
    tiles = [tile_geometry(TYPES[name].qtype, n, columns) for name, n in maps]
    int8 = bool(kinds.get("QUANTIZE_ACTIVATIONS", 1))
    shape = gemv_shape([planned(name, n, columns) for name, n in maps], bulk_copies=tokens == 1)
    raws = [tame(name, n, columns, rng) for name, n in maps]
    held = [aligned_copy(stored(TYPES[name], raw, columns)) for (name, _), raw in zip(maps, raws, strict=True)]
    weights = [TYPES[name].dequantize(raw).astype(np.float64) for (name, _), raw in zip(maps, raws, strict=True)]
    x, norm = rng.standard_normal((tokens, columns)).astype(np.float32), inputs(rng, 1, columns)[0]
    if spoil is not None:
        x[:, columns // 3] = spoil
    if gated or "ACTIVATION" in kinds:
        x /= 64 * np.abs(weights[0]).max()
    biases = [rng.standard_normal(n).astype(np.float32) for _, n in maps]
    residual = rng.standard_normal((tokens, maps[0][1])).astype(np.float32)
    outs = [np.full((tokens, n), np.nan, np.float32) for _, n in maps]
    args = GemvArgs(x=x.ctypes.data, norm_weight=norm.ctypes.data, norm_eps=1e-5)
    for segment, tile, bias, out in zip(args.segments, held, biases, outs, strict=False):
        segment.weight, segment.bias, segment.out = tile.ctypes.data, bias.ctypes.data, out.ctypes.data
    args.segments[0].residual = residual.ctypes.data
    segments = ",".join(
        f"Segment<{name},{tile.tile_rows},{tile.tile_columns},{n}>" for (name, n), tile in zip(maps, tiles, strict=True)
    )
    constants: dict[str, str | int] = {"NORM": "kNoNorm", "GATED": 0, "ACTIVATION": "kIdentity"}
    constants |= {"QUANTIZE_ACTIVATIONS": 1, "COLS": columns, "TOKENS": tokens, "SEGMENTS": segments, **kinds}
    constants |= {"THREADS": shape.threads, "BLOCKS": shape.blocks}
    constants |= {"RING_SLOTS": shape.slots if slots is None else slots}
    library = compiled(folder, "gemv", "GemvArgs", constants, sorted({name for name, _ in maps}))
    run(library, args, (BLOCKS, 1, 1), shape.threads)

    rows = x * norm if normed else x
    rows = (through_int8(rows) if int8 else rows).astype(np.float64)
    if normed:
        rows = rows / np.sqrt(np.square(x.astype(np.float64)).mean(axis=1, keepdims=True) + 1e-5)
    sums = [rows @ weight.T + bias for weight, bias in zip(weights, biases, strict=True)]
    if gated:
        sums = [sums[0] / (1 + np.exp(-sums[0])) * sums[1]]
    if kinds.get("ACTIVATION") == "kGeluTanh":
        sums[0] = 0.5 * sums[0] * (1 + np.tanh(0.7978845608 * (sums[0] + 0.044715 * sums[0] ** 3)))
    sums[0] = sums[0] + residual
    return np.concatenate(outs[: len(sums)], axis=1), np.concatenate(sums, axis=1)


def off(found: Array, wanted: Array) -> float:
    return float(np.linalg.norm(found - wanted) / np.linalg.norm(wanted))


@pytest.mark.parametrize("name", NAMES)
def test_every_type_gives_its_products(tmp_path: Path, name: str) -> None:
    kinds = {"QUANTIZE_ACTIVATIONS": int(name not in FLOATS)}
    found, wanted = products(tmp_path, [(name, 112), (name, 40)], 1024, kinds)
    assert off(found, wanted) < 2e-6


@pytest.mark.parametrize(
    ("maps", "columns", "kinds", "slots"),
    [
        ([("Q4_K", 64), ("Q4_K", 16), ("Q6_K", 33)], 1024, {"NORM": "kRmsNorm"}, 2),
        ([("Q4_K", 170)], 2560, {"ACTIVATION": "kGeluTanh"}, 2),
        ([("Q5_0", 170)], 224, {}, 3),
        ([("Q6_K", 80)], 8960, {}, 2),
        ([("Q4_K", 112), ("Q6_K", 112)], 1024, {"GATED": 1, "ACTIVATION": "kSilu", "NORM": "kRmsNorm"}, 2),
        ([("Q5_K", 96)], 1280, {}, 0),
        ([("Q3_K", 96), ("Q4_1", 32)], 512, {"QUANTIZE_ACTIVATIONS": 0, "NORM": "kRmsNorm"}, 2),
    ],
)
def test_rings_go_round_over_several_weights(
    tmp_path: Path,
    maps: Sequence[tuple[str, int]],
    columns: int,
    kinds: Mapping[str, str | int],
    slots: int | None,
) -> None:
    found, wanted = products(tmp_path, maps, columns, kinds, slots)
    assert off(found, wanted) < 2e-6


@pytest.mark.parametrize("columns", [512, 4096, 14336])
def test_however_many_columns_a_thread_rounds_the_result_is_the_same(tmp_path: Path, columns: int) -> None:
    found, wanted = products(tmp_path, [("Q8_0", 4)], columns, {})
    assert off(found, wanted) < 2e-6


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_value_that_is_no_number_is_not_lost_in_rounding(tmp_path: Path, bad: float) -> None:
    with np.errstate(invalid="ignore"):
        found, _ = products(tmp_path, [("Q4_K", 16)], 512, {}, spoil=bad)
    assert not np.isfinite(found).any()


def test_eight_tokens_in_float32_go_together(tmp_path: Path) -> None:
    kinds = {"NORM": "kRmsNorm", "QUANTIZE_ACTIVATIONS": 0}
    found, wanted = products(tmp_path, [("Q4_K", 64), ("Q6_K", 33)], 1024, kinds, tokens=8)
    assert off(found, wanted) < 2e-6
