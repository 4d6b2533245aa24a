"""What a Hugging Face folder costs: its vocabulary, rows that change places, and quantising on the way."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from mortice.core.file_hash import FileHashes
from mortice.core.model.quantize_at_load import quantized
from mortice.core.model.types import ModelFile, TensorView
from mortice.plugins.loaders.safetensors.files import read_json
from mortice.plugins.loaders.safetensors.tensors import PairedRows
from mortice.plugins.loaders.safetensors.tokenizer import read_tokenizer
from tests.support.hf_folders import tokenizer_json, write_json
from tests.support.tiny import QTYPES
from tests.support.vocab import read_metadata, vocab_files

ROWS, COLUMNS = 4096, 4096


@pytest.mark.skipif(not vocab_files(), reason="no folder of vocabularies: set MORTICE_TEST_DATA")
@pytest.mark.parametrize("vocab", vocab_files(), ids=lambda path: path.stem)
def test_reading_a_tokenizer(vocab: Path, benchmark: BenchmarkFixture, tmp_path: Path) -> None:
    path = write_json(tmp_path / "tokenizer.json", tokenizer_json(read_metadata(vocab)))
    found = benchmark(lambda: read_tokenizer(read_json(path), 0))
    assert len(found.ids) > 100_000


@pytest.mark.parametrize("name", ["Q8_0", "Q4_0"])
def test_quantising_bf16_on_one_core(name: str, benchmark: BenchmarkFixture) -> None:
    values = np.random.default_rng(1).standard_normal((ROWS, COLUMNS)).astype(np.float32)
    data = (values.view(np.uint32) >> 16).astype(np.uint16).view(np.uint8).reshape(-1)
    view = TensorView(
        name="a.weight", shape=(ROWS, COLUMNS), qtype=QTYPES["BF16"].qtype, data=data, offset=0, path=Path("m")
    )
    file = ModelFile(path=Path("m"), format="memory", version="1", metadata={}, tensors={"a.weight": view}, files=())
    quantize = QTYPES[name].quantize
    assert quantize is not None
    made = quantized(file, QTYPES[name].qtype, quantize, {"BF16": QTYPES["BF16"].dequantize}).tensors["a.weight"]
    benchmark.extra_info["elements"] = ROWS * COLUMNS
    assert benchmark(lambda: made.row_bytes(0, ROWS)).shape[0] == ROWS


def test_rows_of_q_change_places(benchmark: BenchmarkFixture) -> None:
    rows = np.ones((ROWS, 2 * COLUMNS), np.uint8)
    assert benchmark(lambda: PairedRows(rows, 128)(0, ROWS)).shape == rows.shape


def test_hashing_a_model(benchmark: BenchmarkFixture, tmp_path: Path) -> None:
    path = tmp_path / "model"
    path.write_bytes(bytes(256 << 20))

    def hashed() -> int:
        with FileHashes([path]) as hashes:
            return hashes.result()[0].nbytes

    assert benchmark(hashed) == 256 << 20
