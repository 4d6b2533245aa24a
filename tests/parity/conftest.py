from __future__ import annotations

from collections.abc import Iterator

import pytest

import mortice
from tests.support.llamacpp import LlamaCpp, open_reference
from tests.support.models import smollm2_path
from tests.support.tiny import expanded


@pytest.fixture(scope="session")
def smollm2() -> Iterator[mortice.Pipeline]:
    with open_reference(smollm2_path(), context=1024) as pipeline:
        yield pipeline


@pytest.fixture(scope="session")
def llama_smollm2(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LlamaCpp]:
    """llama.cpp on the same values as F32."""
    path = expanded(smollm2_path(), tmp_path_factory.mktemp("smollm2") / "f32.gguf")
    with LlamaCpp(path, context=1024) as llama:
        yield llama
    path.unlink()
