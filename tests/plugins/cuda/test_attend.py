"""Attention of one token with what lies before it, run on the CPU against the reference executor's operators."""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from mortice.plugins.executors.cuda.attend import _AttendArgs
from mortice.plugins.executors.cuda.flatten import flatten
from mortice.plugins.executors.cuda.sources import KV_NAMES, OPS
from mortice.plugins.executors.reference import ops
from mortice.plugins.executors.reference.kv_cache import through_kv_type
from tests.plugins.cuda.test_kv_kernels import CASES, KV_HEADS, TOKENS, Cache, compiled, heads
from tests.support.cuda_on_cpu import compile_for_cpu, needs_cpu_compiler

SPLITS = 3

RUN = """
extern "C" void run(const AttendArgs* args) {
    launch({static_cast<unsigned>(KV_HEADS * args->splits + 1)}, kThreads, [=] { attend(*args); });
}"""

Array = NDArray[np.float32]


def attend_library(folder: Path, kv_type: str, **defines: int) -> ctypes.CDLL:
    folder.mkdir()
    constants: dict[str, str | int] = {
        "KV": KV_NAMES[kv_type],
        "KV_HEADS": KV_HEADS,
        "SPLITS": SPLITS,
        "RUN_PAGES": 1,
        "THREADS": 512 if defines["HEAD_DIM"] == 96 else 256,
        **defines,
    }
    text = flatten(OPS / "attend.cu", [OPS]).replace(
        "extern __shared__ __align__(128) uint8 memory[];", "__shared__ uint8 memory[shared_bytes];"
    )
    return compile_for_cpu(folder, text + RUN, constants)


@needs_cpu_compiler
@pytest.mark.parametrize(("kv_type", "head_dim"), CASES)
def test_a_token_is_normed_turned_stored_and_attends(kv_type: str, head_dim: int, tmp_path: Path) -> None:
    group, norm, style = {64: (3, 0, "halves"), 80: (1, 1, "adjacent"), 96: (7, 2, "halves")}[head_dim]
    options: dict[str, Any] = {"cap": 20.0 if head_dim == 96 else 0.0, "window": 70 if head_dim == 64 else 0}
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
    arrivals = np.zeros(KV_HEADS, np.int32)
    for position in (0, 1, 63, 64, 148):
        q, new_k, new_v = (
            rng.normal(size=(1, count * head_dim)).astype(np.float32)
            for count in (KV_HEADS * group, KV_HEADS, KV_HEADS)
        )
        out, positions = np.full_like(q, np.nan), np.array([position], np.int32)
        partial = np.full((KV_HEADS, SPLITS, group, head_dim + 2), np.nan, np.float32)
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
        )
        library.run(ctypes.byref(args))

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
