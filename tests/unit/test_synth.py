"""Models of published shapes with random weights: types, sizes, what they are good for."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest

from mortice.core.cli.flags import OutputFlags
from mortice.core.cli.synth import synth
from mortice.core.config import ExecutorConfig, RunConfig
from mortice.core.errors import ConfigError
from mortice.core.model.types import ModelFile
from mortice.core.pipeline import prepare_opened
from mortice.core.plugin.registry import make_registry
from mortice.core.synth.model import is_shape_and_recipe, synth_model, write_model
from mortice.core.synth.recipes import RECIPES, Tensor
from mortice.core.synth.shapes import SHAPES, Llama3Rope
from mortice.core.text.vocabulary import Vocabulary
from tests.support.llamacpp import LlamaCpp, difference
from tests.support.models import smollm2_path

# Published parameter counts, as the sums of the tensors of the original files.
PARAMETERS = {
    "Llama-3.1-8B": 8_030_261_248,
    "Llama-3.2-1B": 1_235_814_400,
    "Qwen2.5-0.5B": 494_032_768,
    "Qwen2.5-1.5B": 1_543_714_304,
    "Qwen2.5-7B": 7_615_616_512,
    "Qwen3-0.6B": 596_049_920,
    "Qwen3-4B": 4_022_468_096,
    "Qwen3-8B": 8_190_735_360,
    "SmolLM2-135M": 134_515_008,
}

# Bits a weight of Llama-3.1-8B, from the table in llama.cpp's tools/quantize/README.md.
BITS = {
    "Q2_K": 3.1593,
    "Q3_K_M": 3.9960,
    "Q4_K_S": 4.6672,
    "Q4_K_M": 4.8944,
    "Q5_K_M": 5.7036,
    "Q6_K": 6.5633,
    "Q8_0": 8.5008,
    "F16": 16.0005,
    "IQ4_NL": 4.6818,
    "IQ4_XS": 4.4597,
}


def parameters(name: str) -> int:
    """Elements of a shape's matrices and vectors, by hand."""
    shape = SHAPES[name]
    q, kv = shape.num_heads * shape.head_dim, shape.num_kv_heads * shape.head_dim
    layer = shape.hidden_size * (2 * q + 2 * kv + 3 * shape.ffn_size + 2)
    layer += {"llama": 0, "qwen2": q + 2 * kv, "qwen3": 2 * shape.head_dim}[shape.architecture]
    heads = 1 if shape.tied else 2
    return shape.num_layers * layer + shape.hidden_size * (heads * shape.vocab_size + 1)


def bits(name: str, recipe: str) -> float:
    """Bits a weight of a whole model, by its mix alone: no weights are made."""
    shape, mix = SHAPES[name], RECIPES[recipe]
    q, kv = shape.num_heads * shape.head_dim, shape.num_kv_heads * shape.head_dim
    hidden, ffn = shape.hidden_size, shape.ffn_size
    layer = {
        "attn_norm": (hidden,),
        "ffn_norm": (hidden,),
        "attn_q": (q, hidden),
        "attn_k": (kv, hidden),
        "attn_v": (kv, hidden),
        "attn_output": (hidden, q),
        "ffn_gate": (ffn, hidden),
        "ffn_up": (ffn, hidden),
        "ffn_down": (hidden, ffn),
    }
    tensors: list[tuple[str, int | None, tuple[int, ...]]] = [
        ("token_embd", None, (shape.vocab_size, hidden)),
        ("output_norm", None, (hidden,)),
        ("rope_freqs", None, (shape.head_dim // 2,)),
    ]
    tensors += [] if shape.tied else [("output", None, (shape.vocab_size, hidden))]
    tensors += [(role, i, extents) for i in range(shape.num_layers) for role, extents in layer.items()]
    nbytes = elements = 0
    for role, number, extents in tensors:
        tensor = Tensor(
            role=role,
            layer=number,
            num_layers=shape.num_layers,
            shape=extents,
            tied=shape.tied,
            heads_per_kv_head=shape.num_heads // shape.num_kv_heads,
        )
        nbytes += mix.qtype(tensor).nbytes(extents)
        elements += int(np.prod(extents))
    return 8 * nbytes / elements


def types_of(file: ModelFile) -> Mapping[str, str]:
    return {name: tensor.qtype.name for name, tensor in file.tensors.items()}


@pytest.mark.parametrize("name", SHAPES)
def test_each_shape_has_the_published_number_of_parameters(name: str) -> None:
    assert parameters(name) == PARAMETERS[name]


@pytest.mark.parametrize("recipe", BITS)
def test_each_mix_has_the_bits_a_weight_that_llama_quantize_gives(recipe: str) -> None:
    assert round(bits("Llama-3.1-8B", recipe), 4) == BITS[recipe]


def test_a_q4_1_model_has_the_types_of_the_published_file() -> None:
    with make_registry().open_model(smollm2_path()) as published:
        assert types_of(synth_model("SmolLM2-135M", "Q4_1")) == types_of(published)


def test_rows_that_are_no_whole_blocks_of_256_fall_back_to_smaller_blocks() -> None:
    types = types_of(synth_model("Qwen2.5-0.5B", "Q4_K_M", layers=8))
    assert types["token_embd.weight"] == "Q8_0"  # the head: Q6_K is wanted, rows of 896
    assert types["blk.1.attn_q.weight"] == "Q5_0"  # Q4_K is wanted
    assert types["blk.0.attn_v.weight"] == "Q8_0"  # Q6_K is wanted in the first eighth
    assert types["blk.1.attn_v.weight"] == "Q5_0"
    assert types["blk.0.ffn_down.weight"] == "Q6_K"  # rows of 4864 are 19 blocks
    assert types["blk.1.ffn_down.weight"] == "Q4_K"
    assert types["blk.0.attn_q.bias"] == types["output_norm.weight"] == "F32"


@pytest.mark.parametrize(
    ("recipe", "fallback"), [("IQ4_XS", "IQ4_NL"), ("Q2_K", "Q4_0"), ("Q3_K_M", "Q4_0"), ("Q5_K_M", "Q5_1")]
)
def test_each_base_type_has_its_own_fallback(recipe: str, fallback: str) -> None:
    assert types_of(synth_model("SmolLM2-135M", recipe, layers=1))["blk.0.attn_q.weight"] == fallback


@pytest.mark.parametrize("name", ["SmolLM2-135M", "Qwen2.5-0.5B", "Qwen3-0.6B"])
def test_a_model_of_each_family_fits_its_contract_and_gives_finite_logits(name: str) -> None:
    registry = make_registry()
    config = RunConfig(executor=ExecutorConfig(name="reference", context=16))
    with prepare_opened(config, registry, synth_model(name, "Q4_K_M", layers=1)) as pipeline:
        logits = pipeline.logits([1, 2, 3])
        findings = pipeline.model.findings
        assert not findings.errors
        assert not findings.warnings
        assert np.isfinite(logits).all()
        assert 0.3 < logits.std() < 10
        assert len({row.tobytes() for row in logits}) == 3


def test_rows_of_a_matrix_differ() -> None:
    embedding = synth_model("SmolLM2-135M", "F16", layers=1).tensors["token_embd.weight"]
    rows = embedding.row_bytes(0, embedding.rows)
    assert len(np.unique(rows[:, :64].copy().view("V64"))) > 0.99 * min(embedding.rows, 1 << 11)
    assert len({row.tobytes() for row in rows}) == embedding.rows


def test_the_same_seed_gives_the_same_model_and_another_another() -> None:
    first, again, other = (synth_model("SmolLM2-135M", "Q8_0", seed=seed, layers=1) for seed in (1, 1, 2))
    for name, tensor in first.tensors.items():
        np.testing.assert_array_equal(tensor.data, again.tensors[name].data)
    assert (first.tensors["token_embd.weight"].data != other.tensors["token_embd.weight"].data).any()


def test_a_written_model_is_the_one_in_memory(tmp_path: Path) -> None:
    made = synth_model("Llama-3.2-1B", "Q2_K", layers=1)
    with make_registry().open_model(write_model(made, tmp_path / "model.gguf")) as read:
        assert list(read.tensors) == list(made.tensors)
        for name, tensor in made.tensors.items():
            assert (read.tensors[name].shape, read.tensors[name].qtype) == (tensor.shape, tensor.qtype)
            np.testing.assert_array_equal(read.tensors[name].data, tensor.data)
        assert read.metadata["general.file_type"] == 10
        assert "random weights" in str(read.metadata["general.name"])


def test_the_vocabulary_has_the_real_size_and_its_control_tokens_last() -> None:
    vocabulary = Vocabulary.from_metadata(synth_model("SmolLM2-135M", "F16", layers=1).metadata)
    assert len(vocabulary.tokens) == 49152
    assert vocabulary.bos_id == 49149
    assert vocabulary.stop_ids == {49150, 49151}
    assert Counter(vocabulary.types) == {1: 49149, 3: 3}


def test_slow_pairs_of_llama_3_are_slowed_by_the_factor_and_fast_ones_left_alone() -> None:
    factors = Llama3Rope(factor=8.0).factors(128, 500000.0)
    assert factors[0] == 1.0
    assert factors[-1] == 8.0
    assert (np.diff(factors) >= 0).all()
    # pair 32: a wavelength of 2 pi sqrt(500000) = 4442.9 tokens, so smooth = (8192 / 4442.9 - 1) / 3 = 0.28128
    assert factors[32] == pytest.approx(1 / ((1 - 0.28128) / 8 + 0.28128), rel=1e-4)


def test_names_may_be_written_in_lower_case() -> None:
    assert synth_model("smollm2-135m", "q8_0", layers=1).path.name == "SmolLM2-135M:Q8_0"


@pytest.mark.parametrize(
    ("shape", "recipe", "message"),
    [
        ("Llama-3.1-7B", "Q4_K_M", r"shape: unknown 'Llama-3.1-7B', did you mean 'Llama-3.1-8B'\?"),
        ("SmolLM2-135M", "Q4_K_L", r"recipe: unknown 'Q4_K_L', did you mean 'Q4_K_S'\?"),
        ("SmolLM2-135M", "zz", r"recipe: unknown 'zz'; have F32, F16"),
    ],
)
def test_an_unknown_name_is_refused_with_the_nearest(shape: str, recipe: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        synth_model(shape, recipe)


def test_fewer_than_one_layer_is_refused() -> None:
    with pytest.raises(ConfigError, match="layers: found 0"):
        synth_model("SmolLM2-135M", "F16", layers=0)


def test_more_layers_than_any_model_has_are_refused() -> None:
    with pytest.raises(ConfigError, match="layers: found 99999999999, wanted 1 to 1024"):
        synth_model("SmolLM2-135M", "F16", layers=99_999_999_999)


def test_what_is_no_regular_file_is_never_overwritten(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    for out, reason in ((pipe, "found a device, a pipe or a socket"), (tmp_path, "found a folder")):
        with pytest.raises(ConfigError, match=reason):
            synth("SmolLM2-135M", "F16", out, force=True)
    assert pipe.is_fifo()


def test_a_link_to_a_file_is_followed(tmp_path: Path) -> None:
    target, link = tmp_path / "model.gguf", tmp_path / "link"
    target.write_bytes(b"old")
    link.symlink_to(target)
    with pytest.raises(ConfigError, match="is there already"):
        synth("SmolLM2-135M", "Q4_0", link, layers=1)
    assert synth("SmolLM2-135M", "Q4_0", link, layers=1, force=True, output=OutputFlags(quiet=True)) == 0
    assert link.is_symlink()
    assert target.read_bytes()[:4] == b"GGUF"


def test_a_file_with_a_colon_in_its_name_is_a_file(tmp_path: Path) -> None:
    path = tmp_path / "a:b"
    assert is_shape_and_recipe(str(path))
    path.touch()
    assert not is_shape_and_recipe(str(path))


def test_llama_cpp_loads_a_written_model_and_computes_the_same(tmp_path: Path) -> None:
    made = synth_model("SmolLM2-135M", "F16", layers=2)
    path = write_model(made, tmp_path / "model.gguf")
    prompt = [17, 3000, 41000, 5]
    config = RunConfig(executor=ExecutorConfig(name="reference", context=16))
    with prepare_opened(config, make_registry(), made) as pipeline:
        logits = pipeline.logits(prompt)[-1:]
    with LlamaCpp(path, context=64) as llama:
        row = llama.after(prompt)
    assert difference([row], logits).mean < 0.01
