"""A Hugging Face folder gives the logits and tokens of the GGUF file with the same weights."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from shutil import rmtree

import numpy as np
import pytest
from attrs import evolve
from numpy.typing import NDArray

from mortice.arch_contracts import schema
from mortice.core.config import ExecutorConfig, ModelConfig, RunConfig
from mortice.core.model.types import TensorView
from mortice.core.pipeline import Pipeline, prepare
from mortice.core.stages import open_file
from mortice.core.testing.gguf_files import TensorData, write_gguf
from tests.support.hf_folders import quantized_gguf, write_folder
from tests.support.models import smollm2_path
from tests.support.tiny import IDS, REGISTRY, tiny
from tests.support.tiny import logits as logits_with

FAMILIES = ("llama", "qwen2", "qwen3")
SIZES = {"hidden_size": 64, "ffn_size": 96}


def opened(path: Path, *, quantize: str = "none", layout: str = "auto") -> Pipeline:
    config = RunConfig(
        model=ModelConfig(path=path, quantize=quantize), executor=ExecutorConfig(name="reference", context=256)
    )
    return prepare(config, REGISTRY)


def logits(path: Path, quantize: str = "none") -> NDArray[np.float32]:
    with opened(path, quantize=quantize) as pipeline:
        return pipeline.logits(IDS)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("name", FAMILIES)
def test_a_folder_gives_the_logits_of_the_gguf_file(name: str, tied: bool, tmp_path: Path) -> None:
    gguf = tiny(tmp_path, name, tied=tied, sizes=SIZES)
    with open_file(REGISTRY, gguf) as file:
        folder = write_folder(tmp_path / "hf", file, shards=2)
    assert np.array_equal(logits(folder), logits(gguf))


@pytest.mark.parametrize("qtype", ["Q8_0", "Q4_0"])
@pytest.mark.parametrize("name", FAMILIES)
def test_quantised_at_load_it_gives_the_logits_of_a_quantised_gguf_file(name: str, qtype: str, tmp_path: Path) -> None:
    with open_file(REGISTRY, tiny(tmp_path, name, tied=False, sizes=SIZES)) as file:
        folder = write_folder(tmp_path / "hf", file, "BF16")
    quantised = logits(folder, qtype)
    assert np.array_equal(quantised, logits(quantized_gguf(folder, qtype, tmp_path / "q.gguf")))
    assert not np.array_equal(quantised, logits(folder))


def test_llama_with_rope_on_halves_of_the_rows_as_stored_is_llama(tmp_path: Path) -> None:
    """What transformers computes: no row changes place, and RoPE turns element i with element i + head_dim / 2."""
    with open_file(REGISTRY, tiny(tmp_path, tied=False, sizes=SIZES)) as file:
        folder = write_folder(tmp_path / "hf", file)
    text = (Path(schema.__file__).parent / "llama.toml").read_text(encoding="utf-8")
    text = text.replace('"llama"', '"as-stored"').replace('style = "adjacent"', 'style = "halves"')
    with open_file(REGISTRY, folder) as file:
        metadata = {key.replace("llama.", "as-stored."): value for key, value in file.metadata.items()}
        tensors = [
            TensorData(tensor.name, tensor.shape, tensor.qtype, _bytes_in_the_folder(tensor))
            for tensor in file.tensors.values()
        ]
        as_stored = write_gguf(tmp_path / "as-stored.gguf", "as-stored", metadata, tensors)
    found = logits_with(as_stored, schema.parse_contract(text, "as-stored.toml"))
    assert np.abs(found - logits(folder)).max() < 1e-4
    # and a row that changed place is seen
    assert np.abs(found - logits_with(as_stored, schema.parse_contract(_adjacent(text), "x.toml"))).max() > 1e-2


def _adjacent(text: str) -> str:
    return text.replace('style = "halves"', 'style = "adjacent"')


def _bytes_in_the_folder(tensor: TensorView) -> NDArray[np.uint8]:
    return np.fromfile(tensor.path, np.uint8, count=tensor.nbytes, offset=tensor.offset)


def test_weights_that_are_made_are_kept_where_the_smallest_layout_would_read_the_file(tmp_path: Path) -> None:
    with open_file(REGISTRY, tiny(tmp_path, sizes=SIZES)) as file:
        folder = write_folder(tmp_path / "hf", file)
    config = RunConfig(model=ModelConfig(path=folder), executor=ExecutorConfig(name="reference"))
    with prepare(config, REGISTRY) as whole:
        wanted = whole.logits(IDS)
    compact = evolve(config, kernels=evolve(config.kernels, layout="compact"))
    with prepare(compact, REGISTRY) as small:
        layouts = {planned.tensor.name: planned.layout.name for planned in small.plan.weights}
        assert layouts["blk.0.attn_q.weight"] == "f32"
        assert layouts["blk.0.attn_v.weight"] == "file"
        assert np.abs(small.logits(IDS) - wanted).max() < 1e-4


@pytest.fixture(scope="module")
def smollm2_folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """SmolLM2's values as F32; 540 MB, so it is not left lying about."""
    with open_file(REGISTRY, smollm2_path()) as file:
        folder = write_folder(tmp_path_factory.mktemp("smollm2") / "hf", file, shards=2)
    yield folder
    rmtree(folder)


@pytest.mark.slow
def test_smollm2_as_a_folder_gives_the_logits_and_the_answer_of_its_gguf_file(smollm2_folder: Path) -> None:
    question = [{"role": "user", "content": "Name three primary colours."}]
    found = []
    for path in (smollm2_path(), smollm2_folder):
        with opened(path) as pipeline:
            ids = pipeline.encode(question[0]["content"])
            pieces = list(pipeline.generate(ids, max_tokens=16))
            found.append((ids, pipeline.logits(ids), [piece.id for piece in pieces]))
    (ids, wanted, tokens), (other_ids, logits_of_folder, other_tokens) = found
    assert other_ids == ids
    assert np.array_equal(logits_of_folder, wanted)
    assert other_tokens == tokens
