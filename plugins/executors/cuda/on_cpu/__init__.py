"""Runs kernels on the CPU: their text compiled as C++, with headers that stand in for CUDA's."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path

from mortice.core.errors import DeviceError
from mortice.plugins.executors.cuda.device.errors import CompileError

__all__ = ["HEADERS", "ONE_THREAD", "build_for_cpu", "compile_for_cpu", "find_cpu_compiler"]

HEADERS = Path(__file__).parent
"""Folder of the stand-ins."""
ONE_THREAD = HEADERS / "cuda_shim.h"
"""For code whose threads do not work together: one of them does all the work."""

_FLAGS = ("-std=c++17", "-O1", "-fno-strict-aliasing", "-ffp-contract=off", "-w", "-shared", "-fPIC", "-pthread")
_NOT_SHARED = "-fno-gnu-unique"
"""g++ makes variables in templates and inline functions one for all libraries of a process, where each kernel has its
own; clang++ does not, and does not know the option."""


def find_cpu_compiler() -> str:
    """A C++ compiler.

    Raises:
        DeviceError: when there is none.

    """
    found = shutil.which("g++") or shutil.which("clang++")
    if found is None:
        raise DeviceError("no g++ or clang++ to run device code on the CPU")
    return found


def compile_for_cpu(
    folder: Path, text: str, defines: Mapping[str, str | int], stand_in: Path = ONE_THREAD
) -> ctypes.CDLL:
    """`build_for_cpu`, as functions of this process; nothing in the folder is needed afterwards."""
    return ctypes.CDLL(str(build_for_cpu(folder, text, defines, stand_in)))


def build_for_cpu(folder: Path, text: str, defines: Mapping[str, str | int], stand_in: Path = ONE_THREAD) -> Path:
    """Flattened kernels, as a shared library.

    Args:
        folder: where to build.
        text: kernels, and what calls them.
        defines: preprocessor macros.
        stand_in: the header that takes the place of ``cuda_fp16.h``.

    Raises:
        DeviceError: when there is no compiler.
        CompileError: what the compiler says.

    """
    compiler = find_cpu_compiler()
    (folder / "cuda_fp16.h").write_text(f'#include "{stand_in}"\n', encoding="utf-8")
    source, library = folder / "kernels.cpp", folder / "kernels.so"
    source.write_text(text, encoding="utf-8")
    macros = [f"-D{name}={value}" for name, value in defines.items()]
    flags = _FLAGS if Path(compiler).name.startswith("clang") else (*_FLAGS, _NOT_SHARED)
    command = [compiler, *flags, *macros, f"-I{folder}", f"-I{HEADERS}", "-o", str(library), str(source)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603 (no shell, no input)
    if done.returncode:
        errors = [line for line in done.stderr.splitlines() if "error" in line][:12]
        raise CompileError("\n".join([f"{compiler} refuses device code:", *(errors or [done.stderr[:1000]])]))
    return library
