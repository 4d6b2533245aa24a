"""The traits headers themselves: run on the CPU against GGML's own reference, and compiled for every architecture."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from mortice.plugins.executors.cuda.nvrtc import Source, compile_cubin
from tests.plugins.qtypes.blocks import (
    NAMES,
    OPS,
    PROBE,
    TYPES,
    activations,
    aligned,
    check_products,
    check_values,
    defines,
    geometry_of,
    kernel_text,
    random_rows,
    shapes,
    stored,
)
from tests.support.cuda import needs_nvrtc

SHIM = Path(__file__).parents[2] / "support" / "cuda_shim.h"
COMPILER = shutil.which("g++") or shutil.which("clang++")
needs_compiler = pytest.mark.skipif(COMPILER is None, reason="no g++ or clang++ to run the CUDA headers on the CPU")


def build(folder: Path, name: str, rows: int, columns: int) -> ctypes.CDLL:
    """The probe and the repack kernel of a type as functions of this process."""
    (folder / "cuda_fp16.h").write_text(f'#include "{SHIM}"\n')
    (folder / "probe.cpp").write_text(kernel_text(TYPES[name], OPS / "repack.cu", PROBE))
    macros = defines(TYPES[name], rows, columns) | {"MEMORY": "SharedTile"}
    library = folder / "probe.so"
    flags = ["-std=c++17", "-O1", "-fno-strict-aliasing", "-ffp-contract=off", "-w", "-shared", "-fPIC"]
    flags += [f"-D{key}={value}" for key, value in macros.items()]
    command = [str(COMPILER), *flags, f"-I{folder}", "-o", str(library), str(folder / "probe.cpp")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[:4000]
    return ctypes.CDLL(str(library))


def pointer(array: NDArray[np.generic]) -> ctypes.c_void_p:
    return ctypes.c_void_p(array.ctypes.data)


@needs_compiler
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("shape", [0, 1, 2], ids=["several tiles a row", "several rows a tile", "odd rows"])
def test_header_on_the_cpu_equals_the_reference(name: str, shape: int, tmp_path: Path) -> None:
    rows, columns = shapes(name)[shape]
    type_, rng = TYPES[name], np.random.default_rng(shape)
    raw = aligned(rows * type_.qtype.row_bytes(columns)).reshape(rows, -1)
    raw[...] = random_rows(type_, rows, columns, rng)
    library = build(tmp_path, name, rows, columns)

    tiles = stored(type_, raw, columns)
    repacked = aligned(len(tiles))
    library.repack(pointer(raw), pointer(repacked), geometry_of(type_, rows, columns).row_groups)
    assert np.array_equal(repacked, tiles), "repack.cu and NumPy differ"

    q, scales = activations(columns, rng)
    values = np.full((rows, columns), np.nan, np.float32)
    products = np.full((rows, columns // 32), np.nan, np.float32)
    integers = aligned(columns).view(np.int8)
    integers[...] = q
    library.probe(pointer(tiles), pointer(integers), pointer(scales), pointer(values), pointer(products), rows)
    check_values(type_, raw, values)
    if not name.endswith(("F32", "F16")):
        check_products(type_, raw, q, scales, products)


@needs_nvrtc
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("arch", ["sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120"])
def test_every_kernel_of_a_type_compiles_without_local_memory(name: str, arch: str) -> None:
    rows, columns = shapes(name)[0]
    text = kernel_text(TYPES[name], OPS / "repack.cu", OPS / "dequantise.cu", PROBE)
    macros = defines(TYPES[name], rows, columns) | {"OUT": "__half"}
    compiled = compile_cubin(Source(name=f"{name}.cu", text=text, defines=macros), arch)
    assert set(compiled.functions) >= {"repack", "dequantise", "probe"}
    assert not compiled.spills
    assert not compiled.warnings
