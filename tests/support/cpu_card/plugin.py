"""Makes the CUDA executor's kernels shared libraries of the CPU. A plugin of pytest, for a process that runs them."""

from __future__ import annotations

import re
import tempfile
from pathlib import Path

from mortice.plugins.executors.cuda.compile import nvrtc
from mortice.plugins.executors.cuda.compile.nvrtc import Compiled, Source
from mortice.plugins.executors.cuda.device import cublas
from mortice.plugins.executors.cuda.device.toolkit import Compiler
from mortice.plugins.executors.cuda.on_cpu import build_for_cpu
from tests.support.cuda_on_cpu import TENSOR, for_tensor_cores

_KERNEL = re.compile(r"(?:__global__\s+void|^PLAIN)\s+(\w+)\(", re.MULTILINE)

_ENTRIES = Path(__file__).with_name("kernels.h")


def kernel_names(text: str) -> list[str]:
    """The kernels of a source, as the driver finds them."""
    text = re.sub(r"__launch_bounds__\((?:[^()]|\([^()]*\))*\)", "", text)
    return list(dict.fromkeys(_KERNEL.findall(text)))


def compile_for_card(source: Source, arch: str, compiler: Compiler | None = None) -> Compiled:
    """What stands in for `compile_cubin`: a shared library instead of a cubin."""
    del arch, compiler
    table = ", ".join([*(f"ENTRY({name})" for name in kernel_names(source.text)), "{}"])
    entries = f'#include "{_ENTRIES}"\nextern "C" Entry cpu_card_kernels[] = {{{table}}};\n'
    text = f"{for_tensor_cores(source.text)}\n{entries}"
    with tempfile.TemporaryDirectory() as folder:
        return Compiled(
            cubin=build_for_cpu(Path(folder), text, dict(source.defines), TENSOR).read_bytes(), functions={}
        )


def pytest_configure() -> None:
    """Before the executor imports them. Ways to compute are not timed: here that would say nothing, and take long."""
    nvrtc.compile_cubin = compile_for_card
    cublas.find_cublas = lambda: None
    from mortice.plugins.executors.cuda.run import tuning

    timed = tuning.compile_tuned
    tuning.compile_tuned = lambda lowering, device, how: timed(lowering, device, "off" if how == "auto" else how)
