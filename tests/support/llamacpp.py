"""llama.cpp as an oracle; whoever imports this is skipped where it is not installed."""

from __future__ import annotations

from pathlib import Path

import pytest

import mortice
from mortice.core.config import ExecutorConfig, ModelConfig, RunConfig
from mortice.core.testing.llamacpp import Difference, LlamaCpp, Row, difference

__all__ = ["Difference", "LlamaCpp", "Row", "difference", "open_reference"]

pytest.importorskip("xllamacpp", reason="xllamacpp, llama.cpp on the CPU, is not installed")


def open_reference(path: Path, context: int = 1024) -> mortice.Pipeline:
    """The model in mortice's reference executor: room for many sequences, and every one computed."""
    config = RunConfig(
        model=ModelConfig(path=path),
        executor=ExecutorConfig(name="reference", context=context, kv_tokens=16 * context, prefix_cache=False),
    )
    return mortice.load(config)
