"""The model that starts and uploads are timed with."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from mortice.core.synth.model import synth_model, write_model


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """8 billion parameters, 4.9 GB, just written and so in the page cache."""
    path = tmp_path_factory.mktemp("bench") / "model.gguf"
    with synth_model("Llama-3.1-8B", "Q4_K_M") as file:
        write_model(file, path)
    yield path
    path.unlink()
