"""How long it takes to open a GGUF file. The goals: 150,000 tokens in 0.3 s, 5 GB of weights in 0.5 s."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from mortice.core.model.types import LoadOptions, ModelFile
from mortice.plugins.loaders.gguf.loader import open_gguf
from tests.support import gguf_bytes as raw
from tests.support.gguf_bytes import GgufBytes
from tests.support.resources import resident_bytes

VOCAB = 150_000
LAYERS, HIDDEN, FFN = 32, 4096, 14336
PROJECTIONS = {
    "attn_q": (HIDDEN, HIDDEN),
    "attn_k": (1024, HIDDEN),
    "attn_v": (1024, HIDDEN),
    "attn_output": (HIDDEN, HIDDEN),
    "ffn_gate": (FFN, HIDDEN),
    "ffn_up": (FFN, HIDDEN),
    "ffn_down": (HIDDEN, FFN),
}


def with_vocabulary() -> GgufBytes:
    """Tokens, scores, types and as many merges, a third of them beyond ASCII."""
    tokens = [f"{'Ġ' * (index % 3 == 0)}token{index:x}" for index in range(VOCAB)]
    merges = [f"{token[:4]} {token[4:]}" for token in tokens]
    made = GgufBytes().text("general.architecture", "llama").strings("tokenizer.ggml.tokens", tokens)
    made.numbers("tokenizer.ggml.scores", raw.FLOAT32, [-float(index) for index in range(VOCAB)])
    made.numbers("tokenizer.ggml.token_type", raw.INT32, [1] * VOCAB)
    return made.strings("tokenizer.ggml.merges", merges)


def add_weights(made: GgufBytes) -> int:
    """The table of an 8-billion-parameter llama in Q4_K, without the data; returns the bytes of those."""
    end = 0
    for layer in range(LAYERS):
        for name, (rows, columns) in PROJECTIONS.items():
            made.tensor(f"blk.{layer}.{name}.weight", [columns, rows], raw.Q4_K, b"", end)
            end += rows * columns // 256 * 144
    made.tensor("token_embd.weight", [HIDDEN, VOCAB], raw.Q8_0, b"", end)
    return end + VOCAB * HIDDEN // 32 * 34


@pytest.fixture(scope="module")
def vocabulary(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return with_vocabulary().write(tmp_path_factory.mktemp("open") / "vocabulary.gguf")


@pytest.fixture(scope="module")
def large_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Vocabulary and 4.6 GB of weights; the file is sparse and takes 8 MB on disk."""
    made = with_vocabulary()
    data_bytes = add_weights(made)
    path = made.write(tmp_path_factory.mktemp("open") / "large.gguf")
    os.truncate(path, path.stat().st_size + data_bytes)
    return path


def opened(path: Path) -> ModelFile:
    model = open_gguf(path, LoadOptions())
    assert model is not None
    return model


def test_open_a_vocabulary_of_150_000_tokens(benchmark: BenchmarkFixture, vocabulary: Path) -> None:
    model = benchmark(opened, vocabulary)
    tokens, merges = model.metadata["tokenizer.ggml.tokens"], model.metadata["tokenizer.ggml.merges"]
    assert len(tokens) == len(merges) == VOCAB
    assert tokens[VOCAB - 1] == f"Ġtoken{VOCAB - 1:x}" if (VOCAB - 1) % 3 == 0 else f"token{VOCAB - 1:x}"
    assert merges[3] == "Ġtok en3"
    np.testing.assert_array_equal(model.metadata["tokenizer.ggml.scores"], -np.arange(VOCAB, dtype=np.float32))


def test_open_a_model_of_5_gigabytes_without_reading_its_tensors(
    benchmark: BenchmarkFixture, large_model: Path
) -> None:
    model = benchmark(opened, large_model)
    assert model.tensor_bytes > 4.5e9
    assert len(model.tensors) == LAYERS * len(PROJECTIONS) + 1
    header_bytes = min(view.offset for view in model.tensors.values())
    around_bytes = 2**21  # the kernel maps some pages around those that are read
    assert resident_bytes(large_model) <= header_bytes + around_bytes

    weight = model.tensors["blk.31.ffn_down.weight"]
    assert not weight.data.any()
    assert resident_bytes(large_model) >= weight.nbytes


def test_decode_all_tokens_of_a_vocabulary(benchmark: BenchmarkFixture, vocabulary: Path) -> None:
    tokens = opened(vocabulary).metadata["tokenizer.ggml.tokens"]
    assert len(set(benchmark(list, tokens))) == VOCAB
