"""A run reads the vocabulary of its file once: validation and the tokenizer share it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from mortice.core.config import ExecutorConfig, ModelConfig, RunConfig
from mortice.core.pipeline import prepare
from mortice.core.stages import open_file
from mortice.core.text.vocabulary import Vocabulary
from tests.support.tiny import REGISTRY, tiny


def test_a_run_reads_the_vocabulary_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tiny(tmp_path)
    read: list[Any] = []
    original = Vocabulary.from_metadata

    def watched(metadata: Any) -> Vocabulary:
        read.append(metadata)
        return original(metadata)

    monkeypatch.setattr(Vocabulary, "from_metadata", watched)
    config = RunConfig(model=ModelConfig(path=path), executor=ExecutorConfig(name="reference"))
    with prepare(config, REGISTRY) as pipeline:
        ids = pipeline.encode("hello")
        assert pipeline.tokenizer.decode(ids) == "hello"
    assert len(read) == 1


def test_two_files_have_two_vocabularies(tmp_path: Path) -> None:
    path = tiny(tmp_path)
    with open_file(REGISTRY, path) as one, open_file(REGISTRY, path) as other:
        assert Vocabulary.of(one) is Vocabulary.of(one)
        assert Vocabulary.of(one) is not Vocabulary.of(other)
