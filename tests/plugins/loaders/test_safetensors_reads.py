"""What a Hugging Face folder is read as: the keys and tensors that a GGUF file of the same model has."""

from __future__ import annotations

import gc
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mortice.core.model.types import LoadOptions, ModelFile
from mortice.core.stages import open_file, validate_file
from mortice.plugins.loaders.safetensors.loader import open_folder
from tests.support.hf_folders import safetensors_bytes, write_folder, write_json
from tests.support.resources import open_files
from tests.support.tiny import QTYPES, REGISTRY, tiny

FAMILIES = ("llama", "qwen2", "qwen3")


def opened(folder: Path) -> ModelFile:
    model = open_folder(folder, LoadOptions())
    assert model is not None
    return model


def both(tmp_path: Path, name: str = "llama", dtype: str = "F32", **options: Any) -> tuple[ModelFile, ModelFile]:
    """A tiny GGUF file and the same as a folder, both open."""
    sizes = options.pop("sizes", {})
    gguf = open_file(REGISTRY, tiny(tmp_path, name, tied=options.pop("tied", False), sizes=sizes))
    return gguf, opened(write_folder(tmp_path / "hf", gguf, dtype, **options))


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    gguf, hf = both(tmp_path)
    hf.close()
    gguf.close()
    yield tmp_path / "hf"
    gc.collect()


def change_config(folder: Path, **changes: Any) -> Path:
    path = folder / "config.json"
    values = {**json.loads(path.read_text()), **changes}
    write_json(path, {key: value for key, value in values.items() if value is not None})
    return folder


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("name", FAMILIES)
def test_tensors_are_byte_for_byte_those_of_the_gguf_file(name: str, shards: int, tmp_path: Path) -> None:
    gguf, hf = both(tmp_path, name, shards=shards)
    with gguf, hf:
        assert hf.tensors.keys() == gguf.tensors.keys()
        for tensor in gguf.tensors.values():
            found = hf.tensors[tensor.name]
            assert (found.shape, found.qtype) == (tensor.shape, tensor.qtype)
            assert np.array_equal(found.data, tensor.data), tensor.name


@pytest.mark.parametrize("name", FAMILIES)
def test_every_key_of_the_gguf_file_is_there_with_its_value(name: str, tmp_path: Path) -> None:
    gguf, hf = both(tmp_path, name)
    own = {"general.name", "tokenizer.ggml.eot_token_id"}  # the end of a turn is told by its text
    with gguf, hf:
        for key in gguf.metadata.keys() - own:
            wanted, found = gguf.metadata[key], hf.metadata[key]
            assert list(found) == list(wanted) if hasattr(wanted, "__len__") else found == wanted, key  # type: ignore[arg-type]


@pytest.mark.parametrize("name", FAMILIES)
def test_a_folder_is_valid_against_the_contract_without_findings(name: str, tmp_path: Path) -> None:
    for model in both(tmp_path, name):
        model.close()
    assert validate_file(tmp_path / "hf").findings.items == ()


def test_matrices_are_views_of_the_mapped_file_but_for_q_and_k_of_llama(tmp_path: Path) -> None:
    _, hf = both(tmp_path, "llama", "BF16")
    made = {name for name, tensor in hf.tensors.items() if tensor.make is not None and len(tensor.shape) > 1}
    assert made == {f"blk.{layer}.attn_{part}.weight" for layer in range(2) for part in "qk"}
    stored = hf.tensors["blk.0.ffn_up.weight"]
    assert not stored.data.flags.owndata
    assert np.shares_memory(stored.data, stored.row_bytes(3, 5))
    raw = stored.path.read_bytes()[stored.offset : stored.offset + stored.nbytes]
    assert stored.data.tobytes() == raw


def test_rows_are_made_in_pieces_as_they_are_made_whole(tmp_path: Path) -> None:
    _, hf = both(tmp_path, "llama", "F16")
    tensor = hf.tensors["blk.1.attn_k.weight"]
    whole = tensor.row_bytes(0, tensor.rows)
    for start in range(tensor.rows):
        assert np.array_equal(tensor.row_bytes(start, tensor.rows), whole[start:])
    out = np.empty(70, np.uint8)
    tensor.read_into(out, 33)
    assert np.array_equal(out, whole.reshape(-1)[33:103])


@pytest.mark.parametrize("name", ["qwen2", "qwen3"])
def test_matrices_of_qwen_are_all_views(name: str, tmp_path: Path) -> None:
    _, hf = both(tmp_path, name, "BF16")
    assert all(tensor.make is None for tensor in hf.tensors.values() if len(tensor.shape) > 1)


@pytest.mark.parametrize("dtype", ["F16", "BF16"])
def test_vectors_become_f32_with_the_values_they_had(dtype: str, tmp_path: Path) -> None:
    gguf, hf = both(tmp_path, "qwen2", dtype)
    for name, tensor in hf.tensors.items():
        if len(tensor.shape) == 1:
            assert tensor.qtype.name == "F32"
            exact = gguf.tensors[name].data.view(np.float32)
            found = tensor.data.view(np.float32)
            assert np.abs(found - exact).max() <= np.abs(exact).max() / 128
            assert np.array_equal(found, found.astype(np.float16 if dtype == "F16" else np.float32))


def test_the_biases_of_llama_change_places_with_their_rows(tmp_path: Path) -> None:
    _, hf = both(tmp_path)
    hf.close()
    folder = tmp_path / "hf"
    bias = np.arange(64, dtype=np.float32)
    with_bias = {"model.layers.0.self_attn.q_proj.bias": ("F32", (64,), bias.tobytes())}
    (folder / "model.safetensors").write_bytes(safetensors_bytes(with_bias))
    change_config(folder, tie_word_embeddings=True)
    found = opened(folder).tensors["blk.0.attn_q.bias"].data.view(np.float32)
    assert found[:16].tolist() == [0, 8, 1, 9, 2, 10, 3, 11, 4, 12, 5, 13, 6, 14, 7, 15]
    assert sorted(found.tolist()) == bias.tolist()


def test_biases_that_the_config_has_are_read(tmp_path: Path) -> None:
    _, hf = both(tmp_path)
    hf.close()
    folder = tmp_path / "hf"
    biases = {f"model.layers.0.self_attn.{module}_proj.bias": ("F32", (64,), bytes(256)) for module in "qkvo"}
    (folder / "model.safetensors").write_bytes(safetensors_bytes(biases))
    with opened(change_config(folder, tie_word_embeddings=True, attention_bias=True, num_hidden_layers=1)) as model:
        assert {f"blk.0.attn_{role}.bias" for role in ("q", "k", "v", "output")} <= model.tensors.keys()


@pytest.mark.parametrize("bias", [None, True])
def test_qwen2_has_the_biases_of_its_class_whatever_the_config_says(bias: bool | None, tmp_path: Path) -> None:
    gguf, hf = both(tmp_path, "qwen2")
    hf.close()
    with gguf, opened(change_config(tmp_path / "hf", attention_bias=bias)) as model:
        assert "blk.0.attn_v.bias" in model.tensors
        assert model.tensors.keys() == gguf.tensors.keys()


@pytest.mark.parametrize("name", ["model.safetensors", "model-00002-of-00002.safetensors"])
def test_a_file_of_the_folder_opens_the_whole(name: str, tmp_path: Path) -> None:
    gguf, hf = both(tmp_path, shards=1 if name == "model.safetensors" else 2)
    with opened(tmp_path / "hf" / name) as again:
        assert again.path == hf.path
        assert again.tensors.keys() == gguf.tensors.keys()


def test_links_are_followed_as_in_the_cache_of_a_hub(folder: Path, tmp_path: Path) -> None:
    snapshot = tmp_path / "snapshot"
    snapshot.mkdir()
    for file in folder.iterdir():
        (snapshot / file.name).symlink_to(file)
    with opened(snapshot) as model:
        assert model.tensors


def test_other_folders_and_files_are_declined(tmp_path: Path) -> None:
    assert open_folder(tmp_path, LoadOptions()) is None
    (tmp_path / "notes.txt").write_text("hello")
    assert open_folder(tmp_path / "notes.txt", LoadOptions()) is None


def test_closing_lets_go_of_every_file(folder: Path) -> None:
    model = opened(folder)
    assert open_files(folder) > 0
    model.close()
    model.close()
    assert model.tensors == {}
    assert open_files(folder) == 0


def test_files_are_all_that_was_read(folder: Path) -> None:
    with opened(folder) as model:
        names = {path.name for path in model.files}
    assert names == {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}


def test_the_head_of_tied_embeddings_is_left_out_with_a_note(tmp_path: Path) -> None:
    for model in both(tmp_path, tied=False):
        model.close()
    with opened(change_config(tmp_path / "hf", tie_word_embeddings=True)) as model:
        assert "output.weight" not in model.tensors
        (note,) = model.notes
    assert (note.subject, note.severity) == ("lm_head.weight", "note")


def test_rope_tables_of_old_versions_are_left_out_with_a_note(folder: Path) -> None:
    path = folder / "model.safetensors"
    (folder / "model-00001-of-00001.safetensors").write_bytes(path.read_bytes())
    extra = {"model.layers.0.self_attn.rotary_emb.inv_freq": ("F32", (8,), bytes(32))}
    (folder / "model-00002-of-00002.safetensors").write_bytes(safetensors_bytes(extra))
    with opened(folder) as model:
        weight_map = dict.fromkeys(_stored_names(model.files), "model-00001-of-00001.safetensors")
    path.unlink()
    weight_map["model.layers.0.self_attn.rotary_emb.inv_freq"] = "model-00002-of-00002.safetensors"
    write_json(folder / "model.safetensors.index.json", {"weight_map": weight_map})
    with opened(folder) as model:
        assert [note.subject for note in model.notes] == ["model.layers.0.self_attn.rotary_emb.inv_freq"]


def _stored_names(files: tuple[Path, ...]) -> list[str]:
    data = next(path for path in files if path.suffix == ".safetensors").read_bytes()
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    return [name for name in header if name != "__metadata__"]


def test_a_tensor_no_role_has_is_shown_under_its_own_name(folder: Path) -> None:
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data.replace(b"mlp.up_proj", b"mlp.up_pro2", 1))
    rules = {finding.subject: finding.rule for finding in validate_file(folder).findings.errors}
    assert "blk.0.ffn_up.weight" in rules
    assert any(
        finding.subject == "model.layers.0.mlp.up_pro2.weight" for finding in validate_file(folder).findings.items
    )


# config.json ------------------------------------------------------------------------------------------------------


def test_what_a_config_leaves_out_has_the_defaults_of_the_class(folder: Path) -> None:
    change_config(folder, num_key_value_heads=None, rms_norm_eps=None, rope_theta=None, head_dim=None)
    with opened(folder) as model:
        keys = model.metadata
    assert keys["llama.attention.head_count_kv"] == keys["llama.attention.head_count"]
    assert keys["llama.attention.layer_norm_rms_epsilon"] == float(np.float32(1e-6))
    assert keys["llama.rope.freq_base"] == 10000.0
    assert keys["llama.attention.key_length"] == 16


def test_a_qwen3_without_head_dim_has_128(tmp_path: Path) -> None:
    for model in both(tmp_path, "qwen3"):
        model.close()
    with opened(change_config(tmp_path / "hf", head_dim=None)) as model:
        assert model.metadata["qwen3.attention.key_length"] == 128


@pytest.mark.parametrize(
    "changes",
    [
        {"rope_theta": 5e5, "rope_scaling": {"type": "linear", "factor": 4.0}},
        {"rope_theta": None, "rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 5e5}},
        {
            "rope_theta": None,
            "rope_parameters": {
                kind: {"rope_type": "linear", "factor": 4.0, "rope_theta": 5e5}
                for kind in ("full_attention", "sliding_attention")
            },
        },
        {
            "rope_theta": None,
            "rope_parameters": {"full_attention": {"rope_type": "linear", "factor": 4.0, "rope_theta": 5e5}},
        },
    ],
    ids=["version 4", "version 5", "version 5, two types of layers", "version 5, one type of layers"],
)
def test_linear_scaling_is_read_as_either_version_of_transformers_writes_it(
    changes: dict[str, Any], folder: Path
) -> None:
    with opened(change_config(folder, **changes)) as model:
        keys = model.metadata
    assert (keys["llama.rope.freq_base"], keys["llama.rope.scaling.type"]) == (5e5, "linear")
    assert keys["llama.rope.scaling.factor"] == 4.0
    assert validate_file(folder).ok


def test_yarn_scaling_is_read_with_its_original_context(folder: Path) -> None:
    scaling = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128}
    with opened(change_config(folder, rope_scaling=scaling)) as model:
        keys = model.metadata
    assert keys["llama.rope.scaling.original_context_length"] == 128
    assert validate_file(folder).ok


def test_the_scaling_of_llama_3_becomes_the_tensor_a_gguf_file_has(folder: Path) -> None:
    scaling = {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    }
    with opened(change_config(folder, rope_scaling=scaling, rope_theta=10000.0)) as model:
        factors = model.tensors["rope_freqs.weight"].data.view(np.float32)
        assert "llama.rope.scaling.type" not in model.metadata
    # by hand: wavelengths 2 pi 10000^(i/8); below 16 they stay, above 64 they are stretched by 8
    smooth = [(64 / (2 * np.pi * 10000 ** (i / 8)) - 1) / 3 for i in (1, 2)]
    between = [1 / ((1 - part) / 8 + part) for part in smooth]
    assert factors.tolist() == pytest.approx([1, *between, 8, 8, 8, 8, 8])
    assert validate_file(folder).ok


def test_a_scaling_that_no_contract_allows_is_refused_by_validation(folder: Path) -> None:
    change_config(folder, rope_scaling={"rope_type": "dynamic", "factor": 2.0})
    (error,) = validate_file(folder).findings.errors
    assert "dynamic" in error.found


def test_a_window_that_the_contract_cannot_say_is_refused_by_validation(tmp_path: Path) -> None:
    for model in both(tmp_path, "qwen2"):
        model.close()
    change_config(tmp_path / "hf", use_sliding_window=True, sliding_window=16)
    (error,) = validate_file(tmp_path / "hf").findings.errors
    assert error.subject == "qwen2.attention.sliding_window"
    assert validate_file(change_config(tmp_path / "hf", use_sliding_window=False)).ok


# chat templates and special tokens --------------------------------------------------------------------------------


def change_tokenizer_config(folder: Path, **changes: Any) -> Path:
    path = folder / "tokenizer_config.json"
    write_json(path, {**json.loads(path.read_text()), **changes})
    return folder


def test_the_template_of_its_own_file_wins_over_the_one_in_the_config(folder: Path) -> None:
    change_tokenizer_config(folder, chat_template="old")
    with opened(folder) as model:
        assert model.metadata["tokenizer.chat_template"] == "old"
    (folder / "chat_template.jinja").write_text("new")
    with opened(folder) as model:
        assert model.metadata["tokenizer.chat_template"] == "new"
        assert model.files[-1].name == "chat_template.jinja"


def test_named_templates_keep_their_names(folder: Path) -> None:
    named = [{"name": "default", "template": "a"}, {"name": "tool_use", "template": "b"}]
    with opened(change_tokenizer_config(folder, chat_template=named)) as model:
        assert model.metadata["tokenizer.chat_template"] == "a"
        assert model.metadata["tokenizer.chat_template.tool_use"] == "b"


def test_further_end_tokens_of_the_generation_config_end_a_text_too(folder: Path) -> None:
    write_json(folder / "generation_config.json", {"eos_token_id": [510, 7, 8]})
    with opened(folder) as model:
        keys = model.metadata
    assert keys["tokenizer.ggml.eos_token_id"] == 510
    assert (keys["tokenizer.ggml.eot_token_id"], keys["tokenizer.ggml.eom_token_id"]) == (7, 8)


def test_ids_of_the_config_hold_where_no_text_is_given(folder: Path) -> None:
    (folder / "tokenizer_config.json").unlink()
    with opened(change_config(folder, bos_token_id=3, eos_token_id=[4, 5])) as model:
        keys = model.metadata
    assert (keys["tokenizer.ggml.bos_token_id"], keys["tokenizer.ggml.eos_token_id"]) == (3, 4)


def test_a_folder_without_a_tokenizer_runs_on_ids_and_validation_says_so(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()
    report = validate_file(folder)
    assert report.ok
    assert [finding.rule for finding in report.findings.items] == ["tokenizer.missing"]


def test_the_same_weights_give_the_same_values_in_each_type(tmp_path: Path) -> None:
    gguf, _ = both(tmp_path)
    for dtype in ("F16", "BF16"):
        shutil.rmtree(tmp_path / "hf")
        with opened(write_folder(tmp_path / "hf", gguf, dtype)) as hf:
            for name, tensor in gguf.tensors.items():
                other = hf.tensors[name]
                values = QTYPES[other.qtype.name].dequantize(other.row_bytes(0, other.rows)).reshape(-1)
                assert np.abs(values - tensor.data.view(np.float32)).max() <= 2**-7 * np.abs(values).max()
