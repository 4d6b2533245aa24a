"""Attention of single tokens with what lies before it, on the CPU, against the reference executor's operators."""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from mortice.core.model.operators import Attention, Buffer
from mortice.plugins.executors.cuda.compile.flatten import flatten
from mortice.plugins.executors.cuda.lowering.attend import _AttendArgs, attend_tensor, attend_threads
from mortice.plugins.executors.cuda.lowering.launches import StepRows
from mortice.plugins.executors.cuda.lowering.linear_args import GemvArgs, LeftArgs
from mortice.plugins.executors.cuda.lowering.sources import KV_NAMES, OPS
from mortice.plugins.executors.reference import ops
from mortice.plugins.executors.reference.kv_cache import through_kv_type
from tests.plugins.cuda.test_compiles_everywhere import TRAITS
from tests.plugins.cuda.test_kv_kernels import (
    CASES,
    FIRST_PAGE,
    KV_HEADS,
    TABLE,
    TOKENS,
    Cache,
    aligned,
    compiled,
    heads,
)
from tests.support.cuda_on_cpu import TENSOR, compile_for_cpu, for_tensor_cores, needs_cpu_compiler, pointer

SPLITS, LEFT_RUNS = 3, 2
LEFT = (96, 128)
"""Sizes of heads whose runs are joined where they are read; with others attention joins them."""

RUN = """
extern "C" void run(const AttendArgs* args, unsigned rows) {
    launch({static_cast<unsigned>(KV_HEADS * args->splits + 1), rows}, kThreads, [=] { attend(*args); });
}"""

READ = """
extern "C" void run(const GemvArgs* args, float* out) {
    launch({1}, THREADS, [=] {
        __shared__ float squares[kWarps];
        const Input input = carve(arena);
        Beforehand before;
        before.load(*args);
        read_input(*args, before, input, 0, squares);
        __syncthreads();
        for (int i = threadIdx.x; i < COLS; i += THREADS) {
            out[i] = reinterpret_cast<const float*>(&input.floats->part[i % 32 / 4][i / 32])[i % 4];
        }
    });
}"""
"""The input of a product, as it lies in shared memory."""

Array = NDArray[np.float32]


def attend_library(folder: Path, kv_type: str, **defines: int) -> ctypes.CDLL:
    folder.mkdir()
    group, head_dim = defines["GROUP"], defines["HEAD_DIM"]
    q, out = (Buffer(name, KV_HEADS * group * head_dim) for name in ("q", "out"))
    attention = Attention(
        name="attention",
        src=q,
        out=out,
        num_heads=KV_HEADS * group,
        num_kv_heads=KV_HEADS,
        head_dim=head_dim,
        scale=head_dim**-0.5,
        softcap=20.0 * defines["SOFTCAP"],
    )
    constants: dict[str, str | int] = {
        "KV": KV_NAMES[kv_type],
        "KV_HEADS": KV_HEADS,
        "RUN_PAGES": 1,
        "BLOCKS": 1 + (head_dim > 64),
        "TENSOR": int(attend_tensor(attention, kv_type)),
        "THREADS": attend_threads(attention, kv_type),
        **defines,
    }
    text = for_tensor_cores(flatten(OPS / "attend.cu", [OPS]))
    return compile_for_cpu(folder, text + RUN, constants, TENSOR)


def reading_library(folder: Path, columns: int, head_dim: int) -> ctypes.CDLL:
    """What reads the result of attention."""
    folder.mkdir()
    text = for_tensor_cores(flatten(OPS / "gemv_input.cuh", [OPS], before=[TRAITS["F32"]]))
    constants: dict[str, str | int] = {
        "COLS": columns,
        "TOKENS": 1,
        "THREADS": 128,
        "NORM": "kNoNorm",
        "GATED": 0,
        "QUANTIZE_ACTIVATIONS": 0,
        "SEGMENTS": f"Segment<F32,1,{columns},8>",
        "LEFT_RUNS": LEFT_RUNS,
        "RUN_PAGES": 1,
        "HEAD_DIM": head_dim,
    }
    return compile_for_cpu(folder, text + READ, constants, TENSOR)


@needs_cpu_compiler
@pytest.mark.parametrize(("kv_type", "head_dim"), [*CASES, ("f16", 128), ("f16", 256)])
def test_a_token_is_normed_turned_stored_and_attends(kv_type: str, head_dim: int, tmp_path: Path) -> None:
    group, norm, style = {
        64: (3, 0, "halves"),
        80: (1, 1, "adjacent"),
        96: (7, 2, "halves"),
        128: (7, 1, "halves"),
        256: (8, 0, "adjacent"),
    }[head_dim]
    options: dict[str, Any] = {"cap": 20.0 if head_dim in (96, 256) else 0.0, "window": 70 if head_dim == 64 else 0}
    dims = head_dim - 16 if norm else head_dim
    rng, cache = np.random.default_rng(head_dim), Cache(kv_type, head_dim)
    k, v = (rng.normal(size=(TOKENS, KV_HEADS * head_dim)).astype(np.float32) for _ in range(2))
    q_norm, k_norm = (rng.uniform(0.5, 2, head_dim).astype(np.float32) for _ in range(2))
    frequencies = 10000.0 ** (-np.arange(dims // 2) / (dims // 2))
    cache.write(compiled(tmp_path, "kv_write", kv_type), k, v)
    library = attend_library(
        tmp_path / "attend",
        kv_type,
        HEAD_DIM=head_dim,
        GROUP=group,
        DIMS=dims,
        HALVES=int(style == "halves"),
        HEAD_NORM=norm,
        SOFTCAP=int(options["cap"] > 0),
        WINDOWED=int(options["window"] > 0),
    )
    columns = KV_HEADS * group * head_dim
    reading = reading_library(tmp_path / "read", columns, head_dim) if head_dim in LEFT else None
    arrivals = np.zeros(KV_HEADS, np.int32)
    for position in (0, 1, 63, 64, 148):
        q, new_k, new_v = (
            rng.normal(size=(1, count * head_dim)).astype(np.float32)
            for count in (KV_HEADS * group, KV_HEADS, KV_HEADS)
        )
        out, positions = np.full_like(q, np.nan), np.array([position], np.int32)
        partial = np.full((SPLITS, KV_HEADS, group, head_dim + 2), np.nan, np.float32)
        tables = np.empty_like(positions)
        named = {"q": q, "k": new_k, "v": new_v, "out": out, "partial": partial, "arrivals": arrivals}
        named |= {"keys": cache.keys, "values": cache.values, "q_norm": q_norm, "k_norm": k_norm}
        args = _AttendArgs(
            **{name: array.ctypes.data for name, array in named.items()},
            frequencies=frequencies.ctypes.data,
            rows=cache.rows(positions, tables),
            q_eps=1e-5,
            k_eps=1e-6,
            magnitude=1.25,
            scale=head_dim**-0.5,
            softcap=options["cap"],
            window=options["window"],
            splits=SPLITS,
            left_runs=LEFT_RUNS if reading is not None else 0,
        )
        library.run(ctypes.byref(args), ctypes.c_uint(1))
        if reading is not None:
            runs = LeftArgs(
                partial=partial.ctypes.data, position=positions.ctypes.data, window=options["window"], splits=SPLITS
            )
            read = np.full_like(q, np.nan)
            reading.run(ctypes.byref(GemvArgs(x=out.ctypes.data, left=runs)), pointer(read))
            assert np.isnan(out).all() == (position >= 64), "several runs are left to the reader"
            out = read

        turned_q, turned_k = q, new_k
        if norm:
            kind = "rms" if norm == 1 else "layer"
            turned_q = ops.normalize(q, kind, 1e-5, KV_HEADS * group, q_norm, None)
            turned_k = ops.normalize(new_k, kind, 1e-6, KV_HEADS, k_norm, None)
        cos, sin = ((1.25 * turn(position * frequencies[None])).astype(np.float32) for turn in (np.cos, np.sin))
        turned_q, turned_k = (ops.rotate(x, cos, sin, head_dim, style) for x in (turned_q, turned_k))
        all_k, all_v = (np.concatenate([x[:position], new]) for x, new in ((k, turned_k), (v, new_v)))
        keys, values = (through_kv_type(heads(x), kv_type).transpose(1, 0, 2) for x in (all_k, all_v))
        wanted = ops.attend(
            turned_q.reshape(1, -1, head_dim), keys, values, start=position, scale=head_dim**-0.5, **options
        )
        # a last bit of K may turn the rounding of a whole block of 32
        np.testing.assert_allclose(
            out, wanted, rtol=0, atol=0.02 if kv_type == "q8_0" else 2e-3 if kv_type == "f16" else 1e-5
        )
        assert not arrivals.any(), "the counters are zero again"
        k[position], v[position] = turned_k, new_v


@needs_cpu_compiler
@pytest.mark.parametrize(("kv_type", "head_dim"), [("f16", 64), ("q8_0", 64), ("f32", 80)])
def test_each_row_of_a_step_attends_as_if_it_were_alone(kv_type: str, head_dim: int, tmp_path: Path) -> None:
    group, positions = 3, np.array([148, 128, 0], np.int32)
    tables = np.array([0, 3, 6], np.int32)
    pages = np.array([*TABLE, *TABLE[:2], 3, 1], np.int32)  # the first two sequences are forks
    rng, cache = np.random.default_rng(head_dim), Cache(kv_type, head_dim)
    writing = compiled(tmp_path, "kv_write", kv_type)
    k, v = (rng.normal(size=(TOKENS, KV_HEADS * head_dim)).astype(np.float32) for _ in range(2))
    for position, table in zip(positions[:2], tables, strict=False):
        cache.pages[FIRST_PAGE:] = pages[table : table + len(TABLE)]
        cache.write(writing, k[:position], v[:position])
    shape = {"HEAD_DIM": head_dim, "GROUP": group, "DIMS": head_dim, "HALVES": 1, "HEAD_NORM": 0}
    library = attend_library(tmp_path / "attend", kv_type, **shape, SOFTCAP=0, WINDOWED=0)
    given = {
        name: rng.normal(size=(len(positions), count * head_dim)).astype(np.float32)
        for name, count in (("q", KV_HEADS * group), ("k", KV_HEADS), ("v", KV_HEADS))
    }
    frequencies = 10000.0 ** (-np.arange(head_dim // 2) / (head_dim // 2))

    def attended(rows: slice, keys: NDArray[np.uint8], values: NDArray[np.uint8]) -> Array:
        count = len(positions[rows])
        out = np.full_like(given["q"][rows], np.nan)
        partial = np.full((count, SPLITS, KV_HEADS, group, head_dim + 2), np.nan, np.float32)
        arrivals = np.zeros((count, KV_HEADS), np.int32)
        own = {name: array[rows].copy() for name, array in given.items()}
        arrays = {**own, "out": out, "partial": partial, "arrivals": arrivals, "keys": keys, "values": values}
        step = positions[rows].copy(), tables[rows].copy()
        args = _AttendArgs(
            **{name: array.ctypes.data for name, array in arrays.items()},
            frequencies=frequencies.ctypes.data,
            rows=StepRows(positions=step[0].ctypes.data, tables=step[1].ctypes.data, pages=pages.ctypes.data),
            magnitude=1.0,
            scale=head_dim**-0.5,
            splits=SPLITS,
        )
        library.run(ctypes.byref(args), ctypes.c_uint(count))
        assert not arrivals.any(), "the counters are zero again"
        return out

    caches = [aligned(cache.keys.nbytes) for _ in range(2)]
    for copy, original in zip(caches, (cache.keys, cache.values), strict=True):
        copy[:] = original
    together = attended(slice(None), cache.keys, cache.values)
    alone = [attended(slice(row, row + 1), *caches) for row in range(len(positions))]
    assert np.isfinite(together).all()
    np.testing.assert_array_equal(together, np.concatenate(alone))
    np.testing.assert_array_equal(cache.keys, caches[0])
    np.testing.assert_array_equal(cache.values, caches[1])
