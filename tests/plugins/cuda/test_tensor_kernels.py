"""The kernels for tensor cores, run on the CPU with what those do spelled out, against NumPy."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from mortice.plugins.executors.cuda.layouts import tile_geometry
from mortice.plugins.executors.cuda.linear_args import FinishArgs, InputArgs, MatmulArgs
from tests.plugins.qtypes.blocks import NAMES, TYPES, stored
from tests.support.cuda_on_cpu import needs_cpu_compiler
from tests.support.tensor_kernels import Array, Wide, compiled, inputs, run, tame

pytestmark = needs_cpu_compiler


def laid_out(x: Array, passed: int) -> NDArray[np.float16]:
    """(passes, steps, pairs of groups, tiles, lanes, 8) halves, as ``ops/matmul.cu`` reads rows."""
    rows, columns = x.shape
    passes, steps = -(-rows // passed), -(-columns // 128)
    padded = np.zeros((passes * passed, steps * 128), np.float16)
    padded[:rows, :columns] = x
    # pass, tile, lane's group | step, lane's place | pair, of pair, element
    axes = padded.reshape(passes, passed // 8, 8, steps, 4, 4, 2, 4)
    return np.ascontiguousarray(axes.transpose(0, 3, 5, 1, 2, 4, 6, 7)).reshape(passes, steps, 4, passed // 8, 32, 8)


@pytest.mark.parametrize("passed", [0, 8, 32])
@pytest.mark.parametrize("norm", ["kNoNorm", "kRmsNorm", "kLayerNorm"])
def test_input_is_normed_and_scaled_into_halves(tmp_path: Path, norm: str, passed: int) -> None:
    rng, rows, columns = np.random.default_rng(1), 11, 288
    x, weight, bias = inputs(rng, rows, columns), inputs(rng, 1, columns)[0], inputs(rng, 1, columns)[0]
    x[4] = 0
    halves = -(-rows // max(passed, 1)) * passed * 384 if passed else rows * columns
    out, scales = np.full(halves, np.nan, np.float16), np.full(rows, np.nan, np.float32)
    args = InputArgs(
        x=x.ctypes.data,
        norm_weight=weight.ctypes.data,
        norm_bias=bias.ctypes.data if norm == "kLayerNorm" else 0,
        out=out.ctypes.data,
        scales=scales.ctypes.data,
        norm_eps=1e-5,
        rows=rows,
    )
    constants: dict[str, str | int] = {"COLS": columns, "THREADS": 64, "NORM": norm, "PASS": passed}
    library = compiled(tmp_path, "matmul_input", "InputArgs", constants | {"JOIN": 0, "GATED": 0, "ACTIVATION": 0})
    run(library, args, (-(-rows // passed) * passed if passed else rows, 1, 1), 64)

    wanted = x.astype(np.float64)
    if norm == "kLayerNorm":
        wanted = wanted - wanted.mean(axis=1, keepdims=True)
    if norm != "kNoNorm":
        wanted = wanted / np.sqrt(np.square(wanted).mean(axis=1, keepdims=True) + 1e-5) * weight
    if norm == "kLayerNorm":
        wanted += bias
    assert (np.frexp(scales)[0] == 0.5).all(), "powers of two: they round nothing"
    scaled = (wanted / scales[:, None]).astype(np.float32)
    largest = np.abs(scaled).max(axis=1)
    assert ((largest == 0) | ((largest > 511) & (largest < 1025))).all()
    expected = laid_out(scaled, passed).reshape(-1) if passed else scaled.astype(np.float16).reshape(-1)
    np.testing.assert_allclose(out.astype(np.float32), expected.astype(np.float32), rtol=2e-3, atol=1e-2)


@pytest.mark.parametrize("name", [name for name in NAMES if name != "F32"])
def test_products_of_every_type(tmp_path: Path, name: str) -> None:
    rng, outputs = np.random.default_rng(2), (24, 5)
    columns = 512 if TYPES[name].qtype.block_elements == 256 else 416  # not whole steps
    check_products(tmp_path, rng, [(name, outputs[0]), (name, outputs[1])], columns, rows=7, passed=8, height=1)


@pytest.mark.parametrize(("rows", "passed", "height"), [(20, 32, 1), (13, 8, 1), (37, 32, 2), (9, 64, 2)])
def test_products_of_several_types_and_passes(tmp_path: Path, rows: int, passed: int, height: int) -> None:
    maps = [("Q4_K", 40), ("Q6_K", 16), ("Q8_0", 33)]
    check_products(tmp_path, np.random.default_rng(rows), maps, 768, rows=rows, passed=passed, height=height)


def check_products(
    folder: Path,
    rng: np.random.Generator,
    maps: Sequence[tuple[str, int]],
    columns: int,
    *,
    rows: int,
    passed: int,
    height: int,
) -> None:
    x = rng.standard_normal((rows, columns)).astype(np.float16).astype(np.float32)
    raws = [tame(name, outputs, columns, rng) for name, outputs in maps]
    tiles = [stored(TYPES[name], raw, columns) for (name, _), raw in zip(maps, raws, strict=True)]
    steps = -(-columns // 128)
    slices, each = 2, -(-steps // 2)
    total = sum(outputs for _, outputs in maps)
    laid, products = laid_out(x, passed), np.full((slices, rows, total), np.nan, np.float32)
    args = MatmulArgs(x=laid.ctypes.data, products=products.ctypes.data, rows=rows)
    segments = []
    for i, ((name, outputs), stored_tiles) in enumerate(zip(maps, tiles, strict=True)):
        args.weights[i] = stored_tiles.ctypes.data
        geometry = tile_geometry(TYPES[name].qtype, outputs, columns)
        segments.append(f"Segment<{name},{geometry.tile_rows},{geometry.tile_columns},{outputs}>")
    constants: dict[str, str | int] = {"COLS": columns, "PASS": passed, "THREADS": 64, "HEIGHT": height}
    constants |= {"SLICES": slices, "SLICE_STEPS": each, "SEGMENTS": ",".join(segments)}
    library = compiled(folder, "matmul", "MatmulArgs", constants, sorted({name for name, _ in maps}))
    run(library, args, (slices * 2, -(-rows // passed), 1), 64)

    weights = [TYPES[name].dequantize(raw).astype(np.float64) for (name, _), raw in zip(maps, raws, strict=True)]
    weight = np.concatenate(weights)
    wanted, size = x @ weight.T, np.abs(x) @ np.abs(weight).T
    found = products.astype(np.float64).sum(axis=0)
    assert np.isfinite(found).all(), "every product is written"
    assert (np.abs(found - wanted) <= 3e-3 * size).all()
    assert np.linalg.norm(found - wanted) < 1e-3 * np.linalg.norm(wanted)


def finish_args(
    products: Array, scales: Array, parts: Sequence[tuple[int, Array | None, Array | None, Array]]
) -> FinishArgs:
    slices, rows, width = products.shape
    args = FinishArgs(products=products.ctypes.data, scales=scales.ctypes.data, slices=slices, rows=rows, width=width)
    for part, (columns, bias, residual, out) in zip(args.parts, parts, strict=False):
        part.columns, part.stride, part.out = columns, out.shape[1], out.ctypes.data
        part.bias = bias.ctypes.data if bias is not None else 0
        part.residual = residual.ctypes.data if residual is not None else 0
    return args


@pytest.mark.parametrize("vector", [1, 4])
def test_finish_adds_slices_scales_biases_and_residuals(tmp_path: Path, vector: int) -> None:
    rng, rows, widths = np.random.default_rng(3), 5, (12, 4, 20) if vector == 4 else (7, 3, 20)
    products = rng.standard_normal((3, rows, sum(widths))).astype(np.float32)
    scales = (2.0 ** rng.integers(-3, 4, rows)).astype(np.float32)
    biases = [rng.standard_normal(width).astype(np.float32) if i else None for i, width in enumerate(widths)]
    residuals = [rng.standard_normal((rows, w)).astype(np.float32) if i == 2 else None for i, w in enumerate(widths)]
    outs = [np.full((rows, width), np.nan, np.float32) for width in widths]
    args = finish_args(products, scales, list(zip(widths, biases, residuals, outs, strict=True)))
    constants: dict[str, str | int] = {"GATED": 0, "ACTIVATION": 0, "VECTOR": vector}
    run(compiled(tmp_path, "matmul_finish", "FinishArgs", constants), args, (1, rows, 1), 64)
    whole = products.sum(axis=0) * scales[:, None]
    for out, bias, residual, start in zip(outs, biases, residuals, np.cumsum([0, *widths]), strict=False):
        wanted = whole[:, start : start + out.shape[1]] + (0 if bias is None else bias)
        np.testing.assert_allclose(out, wanted + (0 if residual is None else residual), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("passed", [0, 8])
def test_products_are_finished_on_the_way_to_the_next_ones(tmp_path: Path, gated: bool, passed: int) -> None:
    rng, rows, columns = np.random.default_rng(4), 9, 544
    width = 2 * columns if gated else columns
    products = rng.standard_normal((3, rows, width)).astype(np.float32)
    scales = (2.0 ** rng.integers(-3, 4, rows)).astype(np.float32)
    given = scales.copy()
    residual, weight = rng.standard_normal((rows, columns)).astype(np.float32), inputs(rng, 1, columns)[0]
    biases = [rng.standard_normal(columns).astype(np.float32) for _ in range(2)]
    result = np.full((rows, columns), np.nan, np.float32)
    halves = -(-rows // max(passed, 1)) * passed * 640 if passed else rows * columns
    out = np.full(halves, np.nan, np.float16)
    parts = [(columns, biases[0], None if gated else residual, result), (columns, biases[1], None, result)]
    args = InputArgs(
        norm_weight=weight.ctypes.data,
        out=out.ctypes.data,
        scales=scales.ctypes.data,
        norm_eps=1e-6,
        rows=rows,
        products=finish_args(products, scales, parts[: 1 + gated]),
    )
    constants: dict[str, str | int] = {"COLS": columns, "THREADS": 64, "NORM": "kRmsNorm", "PASS": passed, "JOIN": 1}
    constants |= {"GATED": int(gated), "ACTIVATION": "kSilu" if gated else "kIdentity"}
    library = compiled(tmp_path, "matmul_input", "InputArgs", constants)
    run(library, args, (-(-rows // passed) * passed if passed else rows, 1, 1), 64)

    whole: Wide = products.astype(np.float64).sum(axis=0) * given[:, None]
    if gated:
        gate, up = whole[:, :columns] + biases[0], whole[:, columns:] + biases[1]
        wanted = gate / (1 + np.exp(-gate)) * up
    else:
        wanted = whole + biases[0] + residual
    np.testing.assert_allclose(result, wanted, rtol=1e-4, atol=1e-4)
    normed = wanted / np.sqrt(np.square(wanted).mean(axis=1, keepdims=True) + 1e-6) * weight
    scaled = (normed / scales[:, None]).astype(np.float32)
    expected = laid_out(scaled, passed).reshape(-1) if passed else scaled.astype(np.float16).reshape(-1)
    np.testing.assert_allclose(out.astype(np.float32), expected.astype(np.float32), rtol=3e-3, atol=2e-2)
