"""A card that is the CPU: the tests of ``tests/gpu`` on a machine without a GPU.

``driver.cpp`` stands in for ``libcuda.so.1``, and kernels are compiled as C++ with the headers that tests of single
kernels use. All else is what runs on a card: loading, upload, lowering, graphs, the runtime.

What it cannot tell: anything about speed; races, since threads of a block take turns and what is queued is done at
once; what NVRTC and a real driver refuse; products by cuBLAS, which is not there.

    python -m tests.support.cpu_card --capability 8.0 tests/gpu/test_graphs.py -k llama

Arguments it does not know are pytest's. With ``CPU_CARD_TRACE=1`` and ``-s`` each launch is printed with its time.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from mortice.plugins.executors.cuda.on_cpu import HEADERS, find_cpu_compiler

__all__ = ["CAPABILITY", "card_environment", "run_tests"]

CAPABILITY = "CPU_CARD_CAPABILITY"
"""Environment variable: the compute capability the card says it has."""

_HERE = Path(__file__).parent
_ROOT = _HERE.parents[2]
_FLAGS = ("-std=c++17", "-O1", "-shared", "-fPIC", "-pthread", "-Wl,-soname,libcuda.so.1")


def card_environment(folder: Path, capability: str) -> Mapping[str, str]:
    """The environment of a process that finds such a card.

    Args:
        folder: where driver and kernels are built; kernels that are there already are not built again, unless
            something here has changed.
        capability: for instance ``9.0``.

    """
    folder.mkdir(parents=True, exist_ok=True)
    source, library = _HERE / "driver.cpp", folder / "libcuda.so.1"
    subprocess.run([find_cpu_compiler(), *_FLAGS, "-o", library, source, "-ldl"], check=True)
    return {
        **os.environ,
        "LD_LIBRARY_PATH": str(folder),
        "MORTICE_CACHE": str(folder / f"kernels-{_hash_of_stand_ins()}"),
        CAPABILITY: capability,
    }


def _hash_of_stand_ins() -> str:
    """Of all that takes the place of CUDA: kernels in the cache are known by their own text alone."""
    headers = [*HEADERS.glob("*.h"), *_HERE.parent.glob("*.h"), *_HERE.glob("*.h"), *_HERE.glob("*.py")]
    return hashlib.sha256(b"".join(header.read_bytes() for header in sorted(headers))).hexdigest()[:16]


def run_tests(
    arguments: Sequence[str], folder: Path, capability: str, *, capture: bool = False
) -> subprocess.CompletedProcess[str]:
    """Run pytest where that card is, in a process of its own."""
    command = [sys.executable, "-m", "pytest", "-p", "tests.support.cpu_card.plugin", *arguments]
    environment = card_environment(folder, capability)
    return subprocess.run(command, env=environment, cwd=_ROOT, text=True, check=False, capture_output=capture)
