"""The NumPy interpreter."""

from __future__ import annotations

from collections.abc import Iterable

from mortice.core.plugin.hookspecs import hookimpl
from mortice.core.plugin.interfaces import Executor
from mortice.plugins.executors.reference.executor import ReferenceExecutor


@hookimpl
def mortice_executors() -> Iterable[Executor]:
    """The reference executor."""
    return [ReferenceExecutor()]
