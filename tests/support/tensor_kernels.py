"""Kernels for tensor cores as functions of this process, and what they are given."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mortice.core.testing.random_rows import random_rows
from mortice.plugins.executors.cuda.compile.flatten import flatten
from mortice.plugins.executors.cuda.lowering.sources import OPS
from tests.plugins.qtypes.blocks import TYPES
from tests.support.cuda_on_cpu import TENSOR, compile_for_cpu, for_tensor_cores

Array = NDArray[np.float32]
Wide = NDArray[np.float64]

_RUN = """
extern "C" void run(const {args}* args, unsigned x, unsigned y, unsigned z, int threads) {{
    launch({{x, y, z}}, threads, [=] {{ {kernel}(*args); }});
}}"""


def compiled(folder: Path, kernel: str, args: str, constants: dict[str, str | int], types: Sequence[str] = ()) -> Any:
    """A kernel as a function; its own header of tensor cores and its dynamic shared memory are stood in for."""
    traits = [path for name in types if (path := TYPES[name].traits) is not None]
    text = flatten(OPS / f"{kernel}.cu", [OPS], before=traits)
    folder.mkdir(exist_ok=True)
    return compile_for_cpu(folder, for_tensor_cores(text) + _RUN.format(args=args, kernel=kernel), constants, TENSOR)


def run(library: Any, args: ctypes.Structure, grid: tuple[int, int, int], threads: int) -> None:
    library.run(ctypes.byref(args), *map(ctypes.c_uint, grid), threads)


def inputs(rng: np.random.Generator, rows: int, columns: int) -> Array:
    """Rows of very different sizes: halves alone would overflow and underflow."""
    sizes = 10.0 ** rng.integers(-6, 8, (rows, 1))
    return (rng.standard_normal((rows, columns)) * sizes).astype(np.float32)


def tame(name: str, rows: int, columns: int, rng: np.random.Generator) -> NDArray[np.uint8]:
    """Random rows of a type, of blocks whose values a half can hold."""
    type_ = TYPES[name]
    piece = max(32, type_.qtype.block_elements)
    pool = random_rows(type_, 2000, piece, rng)
    pool = pool[np.abs(type_.dequantize(pool)).max(axis=1) < 60000]
    chosen: NDArray[np.uint8] = pool[rng.integers(0, len(pool), rows * columns // piece)]
    return chosen.reshape(rows, -1)
