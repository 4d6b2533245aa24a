"""The CUDA executor. Importing this touches no GPU."""

from __future__ import annotations

from collections.abc import Iterable

from mortice.core.plugin.hookspecs import hookimpl
from mortice.core.plugin.interfaces import Executor


@hookimpl
def mortice_executors() -> Iterable[Executor]:
    """The CUDA executor."""
    from mortice.plugins.executors.cuda.executor import CudaExecutor

    return [CudaExecutor()]
