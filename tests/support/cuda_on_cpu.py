"""Runs kernels on the CPU in tests, also such whose threads work together."""

from __future__ import annotations

import ctypes
import re
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from mortice.core.errors import DeviceError
from mortice.plugins.executors.cuda import on_cpu
from mortice.plugins.executors.cuda.on_cpu import ONE_THREAD, find_cpu_compiler

__all__ = ["ONE_THREAD", "TENSOR", "THREADS", "compile_for_cpu", "for_tensor_cores", "needs_cpu_compiler", "pointer"]

THREADS = Path(__file__).with_name("cuda_threads.h")
"""For kernels whose threads work together."""

TENSOR = Path(__file__).with_name("cuda_tensor.h")
"""For kernels that use tensor cores too; their text goes through `for_tensor_cores`."""


def _missing() -> str:
    try:
        find_cpu_compiler()
    except DeviceError as error:
        return str(error)
    return ""


needs_cpu_compiler = pytest.mark.skipif(bool(_missing()), reason=_missing() or "a compiler is there")


def compile_for_cpu(folder: Path, text: str, defines: Mapping[str, str | int], stand_in: Path = THREADS) -> ctypes.CDLL:
    """Flattened kernels and what calls them, as functions of this process."""
    return on_cpu.compile_for_cpu(folder, text, defines, stand_in)


def for_tensor_cores(text: str) -> str:
    """Flattened kernels without what `TENSOR` stands in for: headers and loads in assembler, dynamic memory."""
    for name in ("mma.cuh", "shared_address.cuh", "bulk_copy.cuh", "wgmma.cuh"):
        text = re.sub(rf'#line \d+ "{name}"\n.*?(?=#line)', "", text, flags=re.DOTALL)
    text = re.sub(
        r"extern __shared__ __align__\(\d+\) (\w+) (\w+)\[\];", r"\1* \2 = reinterpret_cast<\1*>(arena);", text
    )
    return text.replace("<GlobalStream", "<SharedTile")


def pointer(array: NDArray[np.generic]) -> ctypes.c_void_p:
    """Where an array lies."""
    return ctypes.c_void_p(array.ctypes.data)
