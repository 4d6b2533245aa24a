"""The kernels for tensor cores, run on the CPU with what those do spelled out, against NumPy."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from mortice.plugins.executors.cuda.lowering.layouts import tile_geometry
from mortice.plugins.executors.cuda.lowering.linear_args import FinishArgs, InputArgs, MatmulArgs
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


def laid_out_for_warpgroups(x: Array, passed: int) -> NDArray[np.float16]:
    """(passes, steps, groups, pairs, tiles, rows, chunks, 2) halves, as ``ops/matmul_wgmma.cu`` reads rows."""
    rows, columns = x.shape
    passes, steps = -(-rows // passed), -(-columns // 256) * 2
    padded = np.zeros((passes * passed, steps * 128), np.float16)
    padded[:rows, :columns] = x
    # pass, tile, row | step, chunk | group, pair, element
    axes = padded.reshape(passes, passed // 8, 8, steps, 4, 8, 2, 2)
    return np.ascontiguousarray(axes.transpose(0, 3, 5, 6, 1, 2, 4, 7))


def laid(x: Array, passed: int, *, wgmma: bool) -> NDArray[np.float16]:
    """Rows of halves for either kernel, or in order without a pass."""
    if not passed:
        return x.astype(np.float16).reshape(-1)
    return (laid_out_for_warpgroups if wgmma else laid_out)(x, passed).reshape(-1)


WAYS = [(0, False), (8, False), (32, False), (8, True), (32, True)]
"""Rows of a pass, and whether for warpgroups."""


def cut_into(parts: int, columns: int, *, wgmma: bool) -> int:
    """Steps of 128 columns of each of so many parts of a row."""
    together = 2 if wgmma else 1
    return -(-columns // (128 * together * parts)) * together


def spread_out(scales: Array, columns: int, part_steps: int) -> Array:
    """(rows, columns): the scale of each element, of (parts, rows)."""
    return np.repeat(scales, 128 * part_steps, axis=0).T[:, :columns]


@pytest.mark.parametrize(("passed", "wgmma"), WAYS)
@pytest.mark.parametrize("norm", ["kNoNorm", "kRmsNorm", "kLayerNorm"])
def test_input_is_normed_and_scaled_into_halves(tmp_path: Path, norm: str, passed: int, wgmma: bool) -> None:
    """By blocks that take a whole row each; its scale is there for every slice."""
    rng, rows, columns = np.random.default_rng(1), 11, 288
    x, weight, bias = inputs(rng, rows, columns), inputs(rng, 1, columns)[0], inputs(rng, 1, columns)[0]
    x[4] = 0
    out, scales = np.full_like(laid(np.zeros_like(x), passed, wgmma=wgmma), np.nan), poison(3, rows)
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
    constants |= {"WGMMA": int(wgmma), "FACTOR_LATER": 0, "SCALES": 3, "PART_STEPS": cut_into(1, columns, wgmma=wgmma)}
    constants |= NOTHING_FINISHED
    library = compiled(tmp_path, "matmul_input", "InputArgs", constants)
    run(library, args, (-(-rows // passed) * passed if passed else rows, 1, 1), 64)

    wanted = x.astype(np.float64)
    if norm == "kLayerNorm":
        wanted = wanted - wanted.mean(axis=1, keepdims=True)
    if norm != "kNoNorm":
        wanted = wanted / np.sqrt(np.square(wanted).mean(axis=1, keepdims=True) + 1e-5) * weight
    if norm == "kLayerNorm":
        wanted += bias
    assert (np.frexp(scales)[0] == 0.5).all(), "powers of two: they round nothing"
    assert (scales == scales[0]).all()
    scaled = (wanted / scales[0, :, None]).astype(np.float32)
    largest = np.abs(scaled).max(axis=1)
    assert ((largest == 0) | ((largest > 511) & (largest < 1025))).all()
    expected = laid(scaled, passed, wgmma=wgmma)
    np.testing.assert_allclose(out.astype(np.float32), expected.astype(np.float32), rtol=2e-3, atol=1e-2)


@pytest.mark.parametrize(("passed", "wgmma"), WAYS[1:])
@pytest.mark.parametrize("norm", ["kNoNorm", "kRmsNorm"])
def test_parts_of_rows_have_scales_and_squares_of_their_own(
    tmp_path: Path, norm: str, passed: int, wgmma: bool
) -> None:
    rng, rows, columns = np.random.default_rng(6), 11, 928  # four parts, the last of them shorter and not a whole step
    x, weight = inputs(rng, rows, columns), inputs(rng, 1, columns)[0]
    x[:, 256:512] *= 1e3
    x[4], x[5, :300] = 0, 0
    out = np.full_like(laid(np.zeros_like(x), passed, wgmma=wgmma), np.nan)
    scales, squares = poison(4, rows), poison(4, rows)
    args = InputArgs(
        x=x.ctypes.data,
        norm_weight=weight.ctypes.data,
        out=out.ctypes.data,
        scales=scales.ctypes.data,
        squares=squares.ctypes.data,
        norm_eps=1e-6,
        rows=rows,
    )
    constants: dict[str, str | int] = {"COLS": columns, "THREADS": 64, "NORM": norm, "PASS": passed}
    constants |= {"WGMMA": int(wgmma), "FACTOR_LATER": int(norm == "kRmsNorm"), "SCALES": 4, "PART_STEPS": 2}
    library = compiled(tmp_path, "matmul_input", "InputArgs", constants | NOTHING_FINISHED)
    run(library, args, (-(-rows // passed) * passed, 4, 1), 64)

    wanted = x.astype(np.float64) * (weight if norm == "kRmsNorm" else 1)
    scaled = (wanted / spread_out(scales, columns, 2)).astype(np.float32)
    largest = np.stack([np.abs(scaled[:, at : at + 256]).max(axis=1) for at in range(0, columns, 256)])
    assert ((largest == 0) | ((largest > 511) & (largest < 1025))).all()
    expected = laid(scaled, passed, wgmma=wgmma)
    np.testing.assert_allclose(out.astype(np.float32), expected.astype(np.float32), rtol=2e-3, atol=1e-2)
    if norm == "kRmsNorm":
        sums = [np.square(x[:, at : at + 256].astype(np.float64)).sum(axis=1) for at in range(0, columns, 256)]
        np.testing.assert_allclose(squares, np.stack(sums), rtol=1e-5)
    else:
        assert np.isnan(squares).all()


@pytest.mark.parametrize("wgmma", [False, True])
@pytest.mark.parametrize("name", [name for name in NAMES if name != "F32"])
def test_products_of_every_type(tmp_path: Path, name: str, wgmma: bool) -> None:
    rng, maps = np.random.default_rng(2), [(name, 24), (name, 5)]
    columns = 512 if TYPES[name].qtype.block_elements == 256 else 416  # not whole steps
    check_products(tmp_path, rng, maps, columns, rows=7, passed=8, height=4 if wgmma else 1, wgmma=wgmma)


@pytest.mark.parametrize(("rows", "passed", "height"), [(20, 32, 1), (13, 8, 1), (37, 32, 2), (9, 64, 2)])
def test_products_of_several_types_and_passes(tmp_path: Path, rows: int, passed: int, height: int) -> None:
    maps = [("Q4_K", 40), ("Q6_K", 16), ("Q8_0", 33)]
    check_products(tmp_path, np.random.default_rng(rows), maps, 768, rows=rows, passed=passed, height=height)


@pytest.mark.parametrize(("rows", "passed"), [(13, 16), (17, 32), (31, 32), (33, 64), (37, 32), (9, 8)])
def test_products_of_several_types_and_passes_by_warpgroups(tmp_path: Path, rows: int, passed: int) -> None:
    maps = [("Q4_K", 200), ("Q6_K", 16), ("Q8_0", 65)]  # several units a warpgroup, and units that are not whole
    check_products(tmp_path, np.random.default_rng(rows), maps, 1280, rows=rows, passed=passed, height=4, wgmma=True)


def check_products(
    folder: Path,
    rng: np.random.Generator,
    maps: Sequence[tuple[str, int]],
    columns: int,
    *,
    rows: int,
    passed: int,
    height: int,
    wgmma: bool = False,
) -> None:
    x = rng.standard_normal((rows, columns)).astype(np.float16).astype(np.float32)
    raws = [tame(name, outputs, columns, rng) for name, outputs in maps]
    tiles = [stored(TYPES[name], raw, columns) for (name, _), raw in zip(maps, raws, strict=True)]
    together = 2 if wgmma else 1
    steps = -(-columns // (128 * together))
    slices, each, threads = 2, -(-steps // 2) * together, 256 if wgmma else 64
    total = sum(outputs for _, outputs in maps)
    halves, products = laid(x, passed, wgmma=wgmma), np.full((slices, rows, total), np.nan, np.float32)
    scales = (2.0 ** rng.integers(-3, 4, (slices, rows))).astype(np.float32)
    args = MatmulArgs(x=halves.ctypes.data, scales=scales.ctypes.data, products=products.ctypes.data, rows=rows)
    segments = []
    for i, ((name, outputs), stored_tiles) in enumerate(zip(maps, tiles, strict=True)):
        args.weights[i] = stored_tiles.ctypes.data
        geometry = tile_geometry(TYPES[name].qtype, outputs, columns)
        segments.append(f"Segment<{name},{geometry.tile_rows},{geometry.tile_columns},{outputs}>")
    constants: dict[str, str | int] = {"COLS": columns, "PASS": passed, "THREADS": threads, "HEIGHT": height}
    constants |= {"SLICES": slices, "SLICE_STEPS": each, "SEGMENTS": ",".join(segments)}
    kernel = "matmul_wgmma" if wgmma else "matmul"
    library = compiled(folder, kernel, "MatmulArgs", constants, sorted({name for name, _ in maps}))
    run(library, args, (slices * 2, -(-rows // passed), 1), threads)

    weights = [TYPES[name].dequantize(raw).astype(np.float64) for (name, _), raw in zip(maps, raws, strict=True)]
    weight = np.concatenate(weights)
    x = x * spread_out(scales, columns, each)
    wanted, size = x @ weight.T, np.abs(x) @ np.abs(weight).T
    found = products.astype(np.float64).sum(axis=0)
    assert np.isfinite(found).all(), "every product is written"
    assert (np.abs(found - wanted) <= 3e-3 * size).all()
    assert np.linalg.norm(found - wanted) < 1e-3 * np.linalg.norm(wanted)


def poison(*shape: int) -> Array:
    return np.full(shape, np.nan, np.float32)


NOTHING_FINISHED: dict[str, str | int] = {"JOIN": 0, "SLICES": 1, "NORM_COLS": 0, "GATED": 0, "ACTIVATION": 0}


def finish_args(
    products: Array, scales: Array | None, parts: Sequence[tuple[int, Array | None, Array | None, Array]]
) -> FinishArgs:
    _, rows, width = products.shape
    args = FinishArgs(products=products.ctypes.data, rows=rows, width=width)
    args.scales = scales.ctypes.data if scales is not None else 0
    for part, (columns, bias, residual, out) in zip(args.parts, parts, strict=False):
        part.columns, part.stride, part.out = columns, out.shape[1], out.ctypes.data
        part.bias = bias.ctypes.data if bias is not None else 0
        part.residual = residual.ctypes.data if residual is not None else 0
    return args


@pytest.mark.parametrize("normed", [False, True])
@pytest.mark.parametrize("vector", [1, 4])
def test_finish_adds_slices_scales_or_norms_biases_and_residuals(tmp_path: Path, vector: int, normed: bool) -> None:
    rng, rows, widths = np.random.default_rng(3), 5, (12, 4, 20) if vector == 4 else (7, 3, 20)
    products = rng.standard_normal((3, rows, sum(widths))).astype(np.float32)
    scales = (2.0 ** rng.integers(-3, 4, rows)).astype(np.float32)
    biases = [rng.standard_normal(width).astype(np.float32) if i else None for i, width in enumerate(widths)]
    residuals = [rng.standard_normal((rows, w)).astype(np.float32) if i == 2 else None for i, w in enumerate(widths)]
    outs = [np.full((rows, width), np.nan, np.float32) for width in widths]
    args = finish_args(products, scales, list(zip(widths, biases, residuals, outs, strict=True)))
    constants: dict[str, str | int] = {"SLICES": 3, "NORM_COLS": 100 if normed else 0, "GATED": 0, "ACTIVATION": 0}
    squares, factors = rng.random((3, rows), np.float32), scales
    if normed:
        args.squares, args.norm_eps = squares.ctypes.data, 0.01
        factors = 1 / np.sqrt(squares.sum(axis=0) / 100 + np.float32(0.01))
    run(compiled(tmp_path, "matmul_finish", "FinishArgs", constants | {"VECTOR": vector}), args, (1, rows, 1), 64)
    whole = products.sum(axis=0) * factors[:, None]
    for out, bias, residual, start in zip(outs, biases, residuals, np.cumsum([0, *widths]), strict=False):
        wanted = whole[:, start : start + out.shape[1]] + (0 if bias is None else bias)
        np.testing.assert_allclose(out, wanted + (0 if residual is None else residual), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize(("passed", "wgmma", "parts"), [(0, False, 1), (8, False, 3), (8, True, 3)])
def test_products_are_finished_on_the_way_to_the_next_ones(
    tmp_path: Path, gated: bool, passed: int, wgmma: bool, parts: int
) -> None:
    rng, rows, columns = np.random.default_rng(4), 9, 544
    width = 2 * columns if gated else columns
    products = rng.standard_normal((3, rows, width)).astype(np.float32)
    scales, squares = (2.0 ** rng.integers(-3, 4, (parts, rows))).astype(np.float32), poison(parts, rows)
    given = scales[0].copy() if parts == 1 else np.ones(rows)  # with parts, other blocks have been at them before
    residual, weight = rng.standard_normal((rows, columns)).astype(np.float32), inputs(rng, 1, columns)[0]
    biases = [rng.standard_normal(columns).astype(np.float32) for _ in range(2)]
    result = np.full((rows, columns), np.nan, np.float32)
    out = np.full_like(laid(residual, passed, wgmma=wgmma), np.nan)
    maps = [(columns, biases[0], None if gated else residual, result), (columns, biases[1], None, result)]
    args = InputArgs(
        norm_weight=weight.ctypes.data,
        out=out.ctypes.data,
        scales=scales.ctypes.data,
        squares=squares.ctypes.data,
        norm_eps=1e-6,
        rows=rows,
        products=finish_args(products, scales if parts == 1 else None, maps[: 1 + gated]),
    )
    steps = cut_into(parts, columns, wgmma=wgmma)
    constants: dict[str, str | int] = {"COLS": columns, "THREADS": 64, "NORM": "kRmsNorm", "PASS": passed, "JOIN": 1}
    constants |= {
        "GATED": int(gated),
        "ACTIVATION": "kSilu" if gated else "kIdentity",
        "SLICES": 3,
        "NORM_COLS": 0,
        "WGMMA": int(wgmma),
        "FACTOR_LATER": int(parts > 1),
        "PART_STEPS": steps,
        "SCALES": parts,
    }
    library = compiled(tmp_path, "matmul_input", "InputArgs", constants)
    run(library, args, (-(-rows // passed) * passed if passed else rows, parts, 1), 64)

    whole: Wide = products.astype(np.float64).sum(axis=0) * given[:, None]
    if gated:
        gate, up = whole[:, :columns] + biases[0], whole[:, columns:] + biases[1]
        wanted = gate / (1 + np.exp(-gate)) * up
    else:
        wanted = whole + biases[0] + residual
    np.testing.assert_allclose(result, wanted, rtol=1e-4, atol=1e-4)
    normed = wanted * weight
    if parts == 1:
        normed /= np.sqrt(np.square(wanted).mean(axis=1, keepdims=True) + 1e-6)
    else:
        np.testing.assert_allclose(squares.sum(axis=0), np.square(wanted).sum(axis=1), rtol=1e-4)
    scaled = (normed / spread_out(scales, columns, steps)).astype(np.float32)
    expected = laid(scaled, passed, wgmma=wgmma)
    np.testing.assert_allclose(out.astype(np.float32), expected.astype(np.float32), rtol=3e-3, atol=2e-2)
