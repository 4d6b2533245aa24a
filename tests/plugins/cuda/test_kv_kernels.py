"""The kernels that write and read the KV cache, in every type it is kept in: run on the CPU against NumPy."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from attrs import define, field
from numpy.typing import NDArray

from mortice.core.model.kv_types import KV_TYPES, kv_cache_bytes
from mortice.core.model.program import KvShape
from mortice.core.plugin.kv_pages import PAGE_TOKENS
from mortice.plugins.executors.cuda.compile.flatten import flatten
from mortice.plugins.executors.cuda.lowering.launches import StepRows
from mortice.plugins.executors.cuda.lowering.lowering import _AttentionArgs, _PlaceArgs
from mortice.plugins.executors.cuda.lowering.sources import KV_NAMES, OPS
from mortice.plugins.executors.cuda.run.kv_pool import page_bytes
from mortice.plugins.executors.reference import ops
from mortice.plugins.executors.reference.kv_cache import through_kv_type
from tests.support.cuda_on_cpu import compile_for_cpu, needs_cpu_compiler, pointer

KV_HEADS, TOKENS, PAGES = 2, 150, 5
FIRST_PAGE = 3
"""Where the sequence's page table starts among those of all sequences."""
TABLE = (4, 0, 2)
SPLITS = 4

LAUNCHES: Mapping[str, str] = {
    "kv_write": """
extern "C" void run(const float* k, const float* v, void* keys, void* values, const StepRows* rows, int head_dim,
                    unsigned count) {
    launch({KV_HEADS, count}, 64, [=] {
        kv_write(k, v, static_cast<KV*>(keys), static_cast<KV*>(values), *rows, head_dim);
    });
}""",
    "place": """
extern "C" void run(const PlaceArgs* args, unsigned count) {
    launch({Q_HEADS + KV_HEADS, count}, kThreads, [=] { place(*args); });
}""",
    "attention": """
extern "C" void run(const AttentionArgs* args, unsigned count) {
    launch({static_cast<unsigned>(args->splits), KV_HEADS, count}, kWarps * kWarp, [=] { attention(*args); });
}""",
    "load8": """
extern "C" void run(void* cache, float* out, uint16* halves, int head_dim) {
    for (int page = 0; page < PAGES; ++page)
        for (int head = 0; head < KV_HEADS; ++head)
            for (int token = 0; token < kPageTokens; ++token) {
                const size_t row = (static_cast<size_t>(page) * KV_HEADS + head) * kPageTokens + token;
                const KvRow<KV> from = kv_row(static_cast<KV*>(cache), page, token, head, KV_HEADS, head_dim);
                for (int part = 0; part < head_dim / 8; ++part) {
                    reinterpret_cast<Eight*>(out + row * head_dim)[part] = kv_load8(from, part);
                    reinterpret_cast<uint4*>(halves + row * head_dim)[part] = kv_load8_half(from, part);
                }
            }
}""",
}

Array = NDArray[np.float32]


def compiled(folder: Path, kernel: str, kv_type: str, **defines: int) -> ctypes.CDLL:
    file = "kv_cache.cuh" if kernel == "load8" else f"{kernel}.cu"
    text = flatten(OPS / file, [OPS]) + LAUNCHES[kernel]
    constants: dict[str, str | int] = {"KV": KV_NAMES[kv_type], "KV_HEADS": KV_HEADS, "PAGES": PAGES, **defines}
    return compile_for_cpu(folder, text, constants)


@define(eq=False)
class Cache:
    """K and V of a layer on the "card", poisoned, and the rows of a step of one sequence."""

    kv_type: str
    head_dim: int
    keys: NDArray[np.uint8] = field(init=False)
    values: NDArray[np.uint8] = field(init=False)
    pages: NDArray[np.int32] = field(init=False)

    def __attrs_post_init__(self) -> None:
        nbytes = PAGES * page_bytes(KvShape(num_kv_heads=KV_HEADS, head_dim=self.head_dim), self.kv_type)
        self.keys, self.values = (aligned(nbytes) for _ in range(2))
        self.keys[:] = self.values[:] = 0xFF
        self.pages = np.full(FIRST_PAGE + len(TABLE), -1, np.int32)
        self.pages[FIRST_PAGE:] = TABLE

    def rows(self, positions: NDArray[np.int32], tables: NDArray[np.int32]) -> StepRows:
        tables[:] = FIRST_PAGE
        return StepRows(positions=positions.ctypes.data, tables=tables.ctypes.data, pages=self.pages.ctypes.data)

    def write(self, library: ctypes.CDLL, k: Array, v: Array) -> None:
        """Store tokens (tokens, KV_HEADS * head_dim) from position 0 on, a few a step."""
        for start in range(0, len(k), 16):
            some_k, some_v = (np.ascontiguousarray(x[start : start + 16]) for x in (k, v))
            positions = np.arange(start, start + len(some_k), dtype=np.int32)
            rows = self.rows(positions, np.empty_like(positions))
            arrays = [pointer(array) for array in (some_k, some_v)] + [pointer(self.keys), pointer(self.values)]
            library.run(*arrays, ctypes.byref(rows), self.head_dim, ctypes.c_uint(len(some_k)))

    def read(self, library: ctypes.CDLL, cache: NDArray[np.uint8]) -> tuple[Array, Array]:
        """All tokens of the sequence, (tokens, KV_HEADS, head_dim), as `kv_load8` and `kv_load8_half` give them."""
        shape = (PAGES, KV_HEADS, PAGE_TOKENS, self.head_dim)
        out, halves = aligned(4 * int(np.prod(shape))), aligned(2 * int(np.prod(shape)))
        library.run(pointer(cache), pointer(out), pointer(halves), self.head_dim)
        tokens = (
            np.concatenate([x.reshape(shape)[page].transpose(1, 0, 2) for page in TABLE])[:TOKENS]
            for x in (out.view(np.float32), halves.view(np.float16).astype(np.float32))
        )
        first, second = tokens
        return first, second


def aligned(nbytes: int) -> NDArray[np.uint8]:
    pages = np.empty(nbytes + 16, np.uint8)
    start = -pages.ctypes.data % 16
    return pages[start : start + nbytes]


def heads(x: Array) -> Array:
    """(tokens, heads * head_dim) as (tokens, heads, head_dim)."""
    return x.reshape(len(x), KV_HEADS, -1)


def some(rng: np.random.Generator, *shape: int) -> Array:
    """Numbers of many magnitudes."""
    return (rng.normal(size=shape) * 10 ** rng.uniform(-2, 1, shape)).astype(np.float32)


CASES = [
    (kv_type, head_dim) for kv_type in KV_TYPES for head_dim in (64, 80, 96) if kv_type != "q8_0" or head_dim != 80
]
every_cache = pytest.mark.parametrize(("kv_type", "head_dim"), CASES)


@needs_cpu_compiler
@every_cache
def test_what_is_written_is_read_as_the_type_holds_it(kv_type: str, head_dim: int, tmp_path: Path) -> None:
    rng, cache = np.random.default_rng(head_dim), Cache(kv_type, head_dim)
    k, v = (some(rng, TOKENS, KV_HEADS * head_dim) for _ in range(2))
    k[3, :32] = 0
    (tmp_path / "load").mkdir()
    cache.write(compiled(tmp_path, "kv_write", kv_type), k, v)
    load = compiled(tmp_path / "load", "load8", kv_type)
    for memory, written in ((cache.keys, k), (cache.values, v)):
        found, found_halves = cache.read(load, memory)
        wanted = through_kv_type(heads(written), kv_type)
        np.testing.assert_array_equal(found, wanted)
        np.testing.assert_array_equal(found_halves, wanted.astype(np.float16).astype(np.float32))


@needs_cpu_compiler
@pytest.mark.parametrize("kv_type", ["f16", "q8_0"])
def test_what_the_type_cannot_hold_is_not_hidden(kv_type: str, tmp_path: Path) -> None:
    cache = Cache(kv_type, 64)
    k = np.ones((TOKENS, KV_HEADS * 64), np.float32)
    k[1, 5], k[2, 6], k[3, 7] = np.nan, np.inf, 1e30
    (tmp_path / "load").mkdir()
    cache.write(compiled(tmp_path, "kv_write", kv_type), k, k)
    found, _ = cache.read(compiled(tmp_path / "load", "load8", kv_type), cache.keys)
    with np.errstate(over="ignore", invalid="ignore"):
        wanted = through_kv_type(heads(k), kv_type)
    np.testing.assert_array_equal(np.isfinite(found), np.isfinite(wanted))
    assert not np.isfinite(found[[1, 2, 3], 0, [5, 6, 7]]).any()
    assert np.isfinite(found[4:]).all()


@needs_cpu_compiler
@pytest.mark.parametrize("style", ["halves", "adjacent"])
@pytest.mark.parametrize("kv_type", KV_TYPES)
def test_place_norms_turns_and_stores(kv_type: str, style: str, tmp_path: Path) -> None:
    head_dim, dims, q_heads, positions = 96, 64, 4, np.array([7, 70, 149], np.int32)
    rng, cache = np.random.default_rng(5), Cache(kv_type, head_dim)
    q, k, v = (some(rng, len(positions), count * head_dim) for count in (q_heads, KV_HEADS, KV_HEADS))
    q_norm, k_norm = (some(rng, head_dim) for _ in range(2))
    frequencies = 10000.0 ** (-np.arange(dims // 2) / (dims // 2))
    q_out, tables = np.full_like(q, np.nan), np.empty_like(positions)
    args = _PlaceArgs(
        **{name: array.ctypes.data for name, array in {"q": q, "k": k, "v": v, "q_out": q_out}.items()},
        keys=cache.keys.ctypes.data,
        values=cache.values.ctypes.data,
        q_norm=q_norm.ctypes.data,
        k_norm=k_norm.ctypes.data,
        frequencies=frequencies.ctypes.data,
        rows=cache.rows(positions, tables),
        q_eps=1e-5,
        k_eps=1e-6,
        magnitude=1.25,
    )
    shape = {"HEAD_DIM": head_dim, "Q_HEADS": q_heads, "DIMS": dims, "HALVES": int(style == "halves"), "HEAD_NORM": 1}
    compiled(tmp_path, "place", kv_type, **shape).run(ctypes.byref(args), ctypes.c_uint(len(positions)))

    angles = positions[:, None] * frequencies
    cos, sin = ((1.25 * turn(angles)).astype(np.float32) for turn in (np.cos, np.sin))
    wanted_q = ops.rotate(ops.normalize(q, "rms", 1e-5, q_heads, q_norm, None), cos, sin, head_dim, style)
    wanted_k = ops.rotate(ops.normalize(k, "rms", 1e-6, KV_HEADS, k_norm, None), cos, sin, head_dim, style)
    np.testing.assert_allclose(q_out, wanted_q, rtol=1e-4, atol=1e-4)
    (tmp_path / "load").mkdir()
    load = compiled(tmp_path / "load", "load8", kv_type)
    stored_v, _ = cache.read(load, cache.values)
    np.testing.assert_array_equal(stored_v[positions], through_kv_type(heads(v), kv_type))
    stored_k, _ = cache.read(load, cache.keys)
    largest = np.abs(wanted_k).max()
    steps = {"f32": 1e-6, "f16": 1e-3, "q8_0": 1 / 120}  # a last bit may turn the rounding
    np.testing.assert_allclose(stored_k[positions], heads(wanted_k), atol=steps[kv_type] * largest)


@needs_cpu_compiler
@every_cache
def test_attention_over_the_cache_equals_the_reference(kv_type: str, head_dim: int, tmp_path: Path) -> None:
    group = {64: 3, 80: 1, 96: 2}[head_dim]
    options: dict[str, Any] = {"cap": 20.0 if head_dim == 96 else 0.0, "window": 70 if head_dim == 64 else 0}
    rng, cache = np.random.default_rng(1), Cache(kv_type, head_dim)
    k, v = (rng.normal(size=(TOKENS, KV_HEADS * head_dim)).astype(np.float32) for _ in range(2))
    cache.write(compiled(tmp_path, "kv_write", kv_type), k, v)
    count = 3
    positions = np.arange(TOKENS - count, TOKENS, dtype=np.int32)
    q = rng.normal(size=(count, KV_HEADS * group, head_dim)).astype(np.float32)
    out, tables = np.full_like(q, np.nan), np.empty_like(positions)
    partial = np.full((count, KV_HEADS, SPLITS, group, head_dim + 2), np.nan, np.float32)
    arrivals = np.zeros((count, KV_HEADS), np.int32)
    args = _AttentionArgs(
        q=q.ctypes.data,
        keys=cache.keys.ctypes.data,
        values=cache.values.ctypes.data,
        out=out.ctypes.data,
        partial=partial.ctypes.data,
        arrivals=arrivals.ctypes.data,
        rows=cache.rows(positions, tables),
        scale=head_dim**-0.5,
        softcap=options["cap"],
        window=options["window"],
        splits=SPLITS,
    )
    shape = {"HEAD_DIM": head_dim, "GROUP": group, "WARPS": 4}
    shape |= {"SOFTCAP": int(options["cap"] > 0), "WINDOWED": int(options["window"] > 0)}
    (tmp_path / "attention").mkdir()
    library = compiled(tmp_path / "attention", "attention", kv_type, **shape)
    library.run(ctypes.byref(args), ctypes.c_uint(count))

    keys, values = (through_kv_type(heads(x), kv_type).transpose(1, 0, 2) for x in (k, v))
    wanted = ops.attend(q, keys, values, start=TOKENS - count, scale=head_dim**-0.5, **options)
    np.testing.assert_allclose(out.reshape(count, -1), wanted, rtol=1e-4, atol=1e-5)
    assert not arrivals.any(), "the counters are zero again"


def test_a_page_of_q8_0_holds_an_eighth_and_a_thirty_second_of_a_float_each() -> None:
    shape = KvShape(num_kv_heads=KV_HEADS, head_dim=128)
    sizes = {kv_type: kv_cache_bytes(shape, kv_type, PAGE_TOKENS) for kv_type in KV_TYPES}
    assert sizes == {"f32": 131072, "f16": 65536, "q8_0": 34816}
    assert all(page_bytes(shape, kv_type) * 2 == nbytes for kv_type, nbytes in sizes.items())
