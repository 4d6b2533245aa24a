from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

import mortice
from tests.support.llamacpp import open_reference
from tests.support.models import smollm2_path
from tests.support.tiny import expanded


@pytest.fixture(scope="session")
def smollm2() -> Iterator[mortice.Pipeline]:
    with open_reference(smollm2_path(), context=1024) as pipeline:
        yield pipeline


@pytest.fixture(scope="session")
def smollm2_f32(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The same values as F32; 540 MB, so it is not left lying about."""
    path = expanded(smollm2_path(), tmp_path_factory.mktemp("smollm2") / "f32.gguf")
    yield path
    path.unlink()
