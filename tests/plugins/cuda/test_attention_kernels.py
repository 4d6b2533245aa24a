"""Attention on tensor cores, run on the CPU with what those do spelled out, against NumPy."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from mortice.plugins.executors.cuda.lowering.attend_runs import RunsArgs
from mortice.plugins.executors.cuda.lowering.launches import StepRows
from mortice.plugins.executors.cuda.lowering.lowering import _AttentionArgs
from mortice.plugins.executors.cuda.lowering.matmul import attention_tile
from tests.support.cuda_on_cpu import needs_cpu_compiler
from tests.support.tensor_kernels import Array, Wide, compiled, run

pytestmark = needs_cpu_compiler

PAGE = 64
Runs = Sequence[tuple[int, int]]
"""For each sequence its tokens before the step, and those of the step."""


def attended(q: Array, k: Array, v: Array, positions: NDArray[np.int32], cap: float, window: int) -> Wide:
    """Causal attention in float64; q (tokens, heads, dim), k and v (length, KV heads, dim)."""
    group, out = q.shape[1] // k.shape[1], np.empty(q.shape)
    keys = np.arange(len(k))[None]
    for head in range(q.shape[1]):
        scores = q[:, head].astype(np.float64) @ k[:, head // group].T.astype(np.float64) * q.shape[2] ** -0.5
        scores = cap * np.tanh(scores / cap) if cap else scores
        hidden = keys > positions[:, None]
        if window:
            hidden |= keys <= positions[:, None] - window
        scores[hidden] = -np.inf
        weights = np.exp(scores - scores.max(axis=1, keepdims=True))
        out[:, head] = weights / weights.sum(axis=1, keepdims=True) @ v[:, head // group].astype(np.float64)
    return out


@pytest.mark.slow
@pytest.mark.parametrize(
    ("head_dim", "group", "cap", "window", "runs"),
    [
        (64, 2, 0.0, 0, [(0, 70)]),
        (64, 3, 0.0, 0, [(100, 37), (0, 4), (63, 3), (5, 9), (200, 1)]),
        (96, 1, 50.0, 0, [(130, 40)]),
        (64, 5, 0.0, 50, [(120, 33), (20, 2)]),
        (160, 2, 30.0, 40, [(30, 40)]),
        (64, 1, 0.0, 0, [(7, 1)] * 3 + [(64, 3), (64, 5)]),
    ],
)
def test_runs_and_single_rows_attend_each_by_their_own_kernel(
    tmp_path: Path, head_dim: int, group: int, cap: float, window: int, runs: Runs
) -> None:
    rng, kv_heads, tile = np.random.default_rng(head_dim), 2, attention_tile(group)
    count = sum(-(-(past + now) // PAGE) for past, now in runs)
    order = rng.permutation(count + 2)[:count].tolist()
    # what no token was written to is no number
    keys = np.full((count + 2, kv_heads, PAGE, head_dim), np.nan, np.float16)
    values = keys.copy()
    pages: list[int] = []
    tables: list[int] = []
    queries, positions, wanted = [], [], []
    for past, now in runs:
        length = past + now
        k, v = (rng.standard_normal((length, kv_heads, head_dim)).astype(np.float16) for _ in range(2))
        q = 3 * rng.standard_normal((now, group * kv_heads, head_dim)).astype(np.float32)
        at = np.arange(past, length, dtype=np.int32)
        tables += [len(pages)] * now
        for start in range(0, length, PAGE):
            pages.append(order.pop())
            for cache, tokens in ((keys, k), (values, v)):
                some = tokens[start : start + PAGE].transpose(1, 0, 2)
                cache[pages[-1], :, : some.shape[1]] = some
        queries.append(q)
        positions.append(at)
        wanted.append(attended(q, k.astype(np.float32), v.astype(np.float32), at, cap, window))
    q, at = np.concatenate(queries), np.concatenate(positions)
    table, page = np.array(tables, np.int32), np.array(pages, np.int32)
    rows = StepRows(positions=at.ctypes.data, tables=table.ctypes.data, pages=page.ctypes.data)
    shared = {"q": q.ctypes.data, "keys": keys.ctypes.data, "values": values.ctypes.data, "rows": rows}
    shared |= {"scale": head_dim**-0.5, "softcap": cap, "window": window}
    constants: dict[str, str | int] = {"HEAD_DIM": head_dim, "GROUP": group, "KV": "__half", "RUN_TILE": tile.rows}
    constants |= {"SOFTCAP": int(cap > 0), "WINDOWED": int(window > 0), "KV_HEADS": kv_heads, "HEADS": tile.heads}

    out = np.full(q.shape, np.nan, np.float32)
    args = RunsArgs(**shared, out=out.ctypes.data, count=len(q))
    library = compiled(tmp_path / "runs", "attention_prefill", "AttentionArgs", constants)
    run(library, args, (-(-len(q) // tile.rows), kv_heads * group // tile.heads, 1), tile.threads)
    together = np.array([bool(np.isfinite(row).all()) for row in out])
    assert np.isnan(out[~together]).all()
    assert together.tolist() == in_runs(table, at, tile.rows)

    single = np.full(q.shape, np.nan, np.float32)
    arrivals = np.zeros((len(q), kv_heads), np.int32)
    each = _AttentionArgs(**shared, out=single.ctypes.data, arrivals=arrivals.ctypes.data, splits=1)
    kernel = "attention_rows" if head_dim % 64 == 0 else "attention"
    library = compiled(tmp_path / "rows", kernel, "AttentionArgs", constants | {"WARPS": 4})
    run(library, each, (1, kv_heads, len(q)), 128)
    assert np.isnan(single[together]).all(), "no row is attended twice"
    found, exact = np.where(together[:, None, None], out, single), np.concatenate(wanted)
    assert np.linalg.norm(found - exact) < 1e-3 * np.linalg.norm(exact)


@pytest.mark.parametrize("kv", ["__half", "Q8"])
@pytest.mark.parametrize(("head_dim", "group", "window"), [(64, 7, 0), (128, 4, 40), (256, 8, 0), (128, 1, 100)])
def test_splits_of_single_rows_on_tensor_cores_are_joined(
    tmp_path: Path, kv: str, head_dim: int, group: int, window: int
) -> None:
    rng, kv_heads, splits, warps = np.random.default_rng(head_dim), 2, 3, 4 if group > 1 else 2
    lengths = [1, 16, 17, 150, 600, 900]
    each = -(-max(lengths) // PAGE)
    page = rng.permutation(each * len(lengths)).astype(np.int32)
    shape = (len(page), kv_heads, PAGE, head_dim)
    caches, halves = [], []
    for _ in range(2):
        if kv == "Q8":
            values, scales = rng.integers(-127, 128, shape), rng.uniform(0.005, 0.02, (*shape[:3], head_dim // 32))
            caches.append(_q8_pages(values.astype(np.int8), scales.astype(np.float16)))
            halves.append(values * np.repeat(scales.astype(np.float16).astype(np.float32), 32, axis=3))
        else:
            caches.append(rng.standard_normal(shape).astype(np.float16))
            halves.append(caches[-1].astype(np.float32))
    q = 3 * rng.standard_normal((len(lengths), group * kv_heads, head_dim)).astype(np.float32)
    table, at = np.arange(len(lengths), dtype=np.int32) * each, np.array(lengths, np.int32) - 1
    rows = StepRows(positions=at.ctypes.data, tables=table.ctypes.data, pages=page.ctypes.data)
    out, arrivals = np.full(q.shape, np.nan, np.float32), np.zeros((len(q), kv_heads), np.int32)
    partial = np.full((len(q), kv_heads, splits, group, head_dim + 2), np.nan, np.float32)
    args = _AttentionArgs(
        q=q.ctypes.data,
        keys=caches[0].ctypes.data,
        values=caches[1].ctypes.data,
        out=out.ctypes.data,
        partial=partial.ctypes.data,
        arrivals=arrivals.ctypes.data,
        rows=rows,
        scale=head_dim**-0.5,
        window=window,
        splits=splits,
    )
    constants: dict[str, str | int] = {"HEAD_DIM": head_dim, "GROUP": group, "KV": kv, "RUN_TILE": 0, "SOFTCAP": 0}
    constants |= {"WINDOWED": int(window > 0), "WARPS": warps}
    library = compiled(tmp_path / "k", "attention_rows", "AttentionArgs", constants)
    run(library, args, (splits, kv_heads, len(q)), 32 * warps)
    assert not arrivals.any()
    for i, length in enumerate(lengths):
        own = page[table[i] : table[i] + each]
        k, v = (np.concatenate(x[own].transpose(0, 2, 1, 3))[:length].astype(np.float32) for x in halves)
        exact = attended(q[i : i + 1], k, v, at[i : i + 1], 0.0, window)[0]
        assert np.linalg.norm(out[i] - exact) < 2e-3 * np.linalg.norm(exact), length


def _q8_pages(values: NDArray[np.int8], scales: NDArray[np.float16]) -> NDArray[np.uint8]:
    """As ``ops/kv_cache.cuh`` lays them out: the bytes of a page and head, then their scales."""
    lots = values.shape[0] * values.shape[1]
    parts = values.reshape(lots, -1).view(np.uint8), scales.reshape(lots, -1).view(np.uint8)
    return np.ascontiguousarray(np.concatenate(parts, axis=1))


def in_runs(tables: NDArray[np.int32], positions: NDArray[np.int32], tile: int) -> list[bool]:
    """Which rows have three others of their sequence beside them in their tile."""
    result = [False] * len(tables)
    for start in range(0, len(tables), tile):
        end = min(start + tile, len(tables))
        first = start
        for row in range(start + 1, end + 1):
            if row < end and tables[row] == tables[row - 1] and positions[row] == positions[row - 1] + 1:
                continue
            result[first:row] = [row - first >= 4] * (row - first)
            first = row
    return result
