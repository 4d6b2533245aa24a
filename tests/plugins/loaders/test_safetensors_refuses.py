"""Broken and hostile Hugging Face folders: one line says which file and what, and nothing is kept open."""

from __future__ import annotations

import json
import os
import re
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mortice.core.errors import ModelFileError
from mortice.core.model.types import LoadOptions
from mortice.core.stages import open_file
from mortice.plugins.loaders.safetensors import header as limits
from mortice.plugins.loaders.safetensors.files import MAX_JSON_BYTES
from mortice.plugins.loaders.safetensors.header import read_header
from mortice.plugins.loaders.safetensors.loader import open_folder
from tests.support.hf_folders import safetensors_bytes, write_folder, write_json
from tests.support.resources import open_files
from tests.support.tiny import REGISTRY, tiny

WEIGHTS = Path("weights.safetensors")
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
TWO = {"a": ("F32", (2, 2), bytes(16)), "b": ("BF16", (4,), bytes(8))}


def header_bytes(header: Any, data: bytes = bytes(24)) -> bytes:
    """A file with this header, as text or as what JSON makes of it."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def entry(dtype: str = "F32", shape: Any = (2, 2), offsets: Any = (0, 16)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


def refusal(data: bytes) -> ModelFileError:
    with pytest.raises(ModelFileError) as caught:
        read_header(WEIGHTS, data)
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith("weights.safetensors: byte ")
    return caught.value


@pytest.mark.parametrize(
    ("data", "wanted"),
    [
        (b"", "truncated in the header's length: 8 bytes are missing"),
        (bytes(7), "truncated in the header's length: 1 byte is missing"),
        (b"\x10\0\0", "truncated in the header's length: 5 bytes are missing"),
        (struct.pack("<Q", 100) + b"{}", "truncated in the header: 98 bytes are missing"),
        (struct.pack("<Q", limits.MAX_HEADER_BYTES + 1) + b"{}", "at most 33554432 are read"),
        (struct.pack("<Q", 2**63) + b"{}", "at most 33554432 are read"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "a pointer of Git LFS"),
        (header_bytes(b"[]"), "does not begin with '{'"),
        (header_bytes(b" {}"), "does not begin with '{'"),
        (header_bytes(b"{"), "not JSON"),
        (header_bytes(b'{"a": \xff}'), "not UTF-8"),
        (header_bytes(b'{"a":' * 100_000), "nested too deep"),
        (header_bytes(b'{"a": ' + b"9" * 5000 + b"}"), "not JSON"),
        (header_bytes(b'{"a": NaN}'), "found NaN, which is no number in JSON"),
        (header_bytes(b'{"a": 1, "a": 2}'), "key 'a' is there twice"),
        (header_bytes({"a": 1}), "wanted dtype, shape and data_offsets"),
        (header_bytes({"a": {**entry(), "more": 1}}), "wanted dtype, shape and data_offsets"),
        (header_bytes({"__metadata__": {"n": 1}}), "__metadata__: found {'n': 1}, wanted an object of strings"),
        (header_bytes({"": entry()}), "a name of 0 characters"),
        (header_bytes({"n" * 600: entry()}), "a name of 600 characters"),
        (header_bytes({"a": entry("F33")}), "dtype 'F33' is unknown"),
        (header_bytes({"a": entry(["F32"])}), "is unknown"),  # type: ignore[arg-type]
        (header_bytes({"a": entry(shape=[2, -2])}), "shape is [2, -2]"),
        (header_bytes({"a": entry(shape=[0, 2], offsets=[0, 0])}), "wanted at most 4 extents of 1 or more"),
        (header_bytes({"a": entry(shape=[1, 1, 1, 2, 2])}), "wanted at most 4 extents"),
        (header_bytes({"a": entry(shape=[True, 4])}), "shape is [True, 4]"),
        (header_bytes({"a": entry(shape=[2**62, 2**62], offsets=[0, 16])}), "shape [4611686018427387904"),
        (header_bytes({"a": entry(offsets=[0, 12])}), "are 12 bytes, shape [2, 2] of F32 takes 16"),
        (header_bytes({"a": entry(offsets=[16, 0])}), "are -16 bytes"),
        (header_bytes({"a": entry(offsets=[0])}), "wanted a begin and an end"),
        (header_bytes({"a": entry(), "b": entry(offsets=[24, 40])}, bytes(40)), "a hole of 8 bytes before tensor 'b'"),
        (header_bytes({"a": entry(offsets=[8, 24])}), "a hole of 8 bytes before tensor 'a'"),
        (header_bytes({"a": entry(), "b": entry(offsets=[8, 24])}), "tensors 'a' and 'b' overlap by 8 bytes"),
        (header_bytes({"a": entry()}), "8 bytes after the last tensor"),
        (header_bytes({"a": entry()}, bytes(10)), "truncated in the data of tensor 'a': 6 bytes are missing"),
    ],
)
def test_a_broken_header_is_refused(data: bytes, wanted: str) -> None:
    assert wanted in str(refusal(data))


def test_a_scalar_has_one_element() -> None:
    (found,) = read_header(WEIGHTS, header_bytes({"a": entry(shape=[], offsets=[0, 4])}, bytes(4))).entries
    assert found.shape == (1,)


def test_blanks_after_the_header_are_accepted() -> None:
    text = json.dumps({"a": entry()}).encode()
    assert len(read_header(WEIGHTS, header_bytes(text + b"   ", bytes(16))).entries) == 1


@pytest.mark.parametrize("size", range(len(safetensors_bytes(TWO))))
def test_a_file_cut_short_anywhere_says_how_many_bytes_are_missing(size: int) -> None:
    data = safetensors_bytes(TWO)
    error = refusal(data[:size])
    assert error.offset == size
    missing = re.search(r"(\d+) bytes? (is|are) missing", str(error))
    assert missing is not None
    assert (missing[1] == "1") == (missing[2] == "is")
    if size >= len(data) - 24:
        assert int(missing[1]) == len(data) - size


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.data())
def test_whatever_is_changed_a_header_is_read_or_refused_with_one_line(data: st.DataObject) -> None:
    raw = bytearray(safetensors_bytes(TWO))
    for _ in range(data.draw(st.integers(1, 4))):
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    refusals: list[str] = []
    try:
        entries = read_header(WEIGHTS, bytes(raw)).entries
    except ModelFileError as error:
        entries = ()
        refusals.append(str(error))
    assert not any("\n" in text for text in refusals)
    assert all(found.start + found.nbytes <= len(raw) for found in entries)


# folders ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    with open_file(REGISTRY, tiny(tmp_path, "llama")) as file:
        return write_folder(tmp_path / "hf", file, shards=2)


def refused(folder: Path, file: str, *wanted: str) -> None:
    """Opening the folder fails in one line that names the file; no file stays open."""
    with pytest.raises(ModelFileError) as caught:
        open_folder(folder, LoadOptions())
    message = str(caught.value)
    assert open_files(folder) == 0
    assert "\n" not in message
    assert message.startswith(str(folder / file) if file else str(folder))
    for part in wanted:
        assert part in message, message


def changed(folder: Path, name: str, change: Callable[[dict[str, Any]], Any]) -> None:
    path = folder / name
    value = json.loads(path.read_text())
    change(value)
    write_json(path, value)


INDEX = "model.safetensors.index.json"
FIRST, SECOND = (f"model-{number:05d}-of-00002.safetensors" for number in (1, 2))


def test_an_index_that_names_a_missing_file_is_refused(folder: Path) -> None:
    (folder / SECOND).unlink()
    refused(folder, SECOND, "is missing", INDEX)


@pytest.mark.parametrize("name", ["../other.safetensors", "/etc/passwd", "a/b.safetensors", ".safetensors", "x.bin", 7])
def test_an_index_opens_nothing_outside_its_folder(name: Any, folder: Path) -> None:
    (folder.parent / "other.safetensors").write_bytes(safetensors_bytes(TWO))
    changed(folder, INDEX, lambda value: value["weight_map"].update({"model.norm.weight": name}))
    refused(folder, INDEX, "'model.norm.weight' is in", "in the same folder")


def test_an_index_that_has_a_tensor_elsewhere_is_refused(folder: Path) -> None:
    changed(folder, INDEX, lambda value: value["weight_map"].update({"model.norm.weight": FIRST, "other": SECOND}))
    refused(folder, INDEX, "should be in", "it is in")


def test_a_tensor_that_is_in_no_file_is_refused(folder: Path) -> None:
    changed(folder, INDEX, lambda value: value["weight_map"].update({"ghost": SECOND}))
    refused(folder, INDEX, "'ghost' should be in", "it is in no file")


def test_a_tensor_that_the_index_does_not_have_is_refused(folder: Path) -> None:
    changed(folder, INDEX, lambda value: value["weight_map"].pop("model.norm.weight"))
    refused(folder, "model-", "'model.norm.weight' is not in", INDEX)


def test_an_index_without_a_map_is_refused(folder: Path) -> None:
    write_json(folder / INDEX, {"metadata": {}})
    refused(folder, INDEX, "weight_map: missing or empty")


def test_a_folder_without_weights_is_refused(folder: Path) -> None:
    (folder / INDEX).unlink()
    refused(folder, "", "has neither model.safetensors nor model.safetensors.index.json")


def test_a_shard_cut_short_says_how_many_bytes_are_missing(folder: Path) -> None:
    path = folder / SECOND
    os.truncate(path, path.stat().st_size - 100)
    refused(folder, SECOND, "100 bytes are missing", "interrupted download")


def test_a_named_pipe_is_refused_and_not_waited_for(folder: Path) -> None:
    for name in (SECOND, "config.json"):
        kept = (folder / name).read_bytes()
        (folder / name).unlink()
        os.mkfifo(folder / name)
        refused(folder, name, "regular file")
        (folder / name).unlink()
        (folder / name).write_bytes(kept)


@pytest.mark.parametrize("name", ["e.safetensors", "model.safetensors"])
def test_weights_without_a_config_are_refused_by_saying_so(name: str, tmp_path: Path) -> None:
    (tmp_path / name).touch()
    with pytest.raises(ModelFileError) as caught:
        open_folder(tmp_path / name, LoadOptions())
    assert str(caught.value) == f"{tmp_path}: config.json is missing beside {name}"


@pytest.mark.parametrize("name", ["model.safetensors", "model.safetensors.index.json"])
def test_a_folder_of_weights_without_a_config_is_refused_by_saying_so(name: str, tmp_path: Path) -> None:
    (tmp_path / name).touch()
    refused(tmp_path, "", f"config.json is missing beside {name}")


@pytest.mark.parametrize(
    ("family", "key", "named"),
    [
        ("llama", "attention_bias", "self_attn.q_proj.bias"),
        ("llama", "mlp_bias", "mlp.gate_proj.bias"),
        ("qwen3", "attention_bias", "self_attn.q_proj.bias"),
    ],
)
def test_biases_that_the_config_has_and_no_file_are_refused_by_name(
    family: str, key: str, named: str, tmp_path: Path
) -> None:
    with open_file(REGISTRY, tiny(tmp_path, family)) as file:
        folder = write_folder(tmp_path / "hf", file)
    changed(folder, "config.json", lambda value: value.update({key: True}))
    refused(folder, "config.json", f"{key} is true, but these tensors are in no file: 'model.layers.0.{named}', ")


def test_one_lost_bias_is_the_only_one_named(folder: Path) -> None:
    vector = ("F32", (64,), bytes(256))
    biases = {f"model.layers.0.self_attn.{module}_proj.bias": vector for module in "qko"}
    (folder / "model.safetensors").write_bytes(safetensors_bytes({"lm_head.weight": vector} | biases))
    changed(folder, "config.json", lambda value: value.update(attention_bias=True, num_hidden_layers=1))
    refused(folder, "config.json", "in no file: 'model.layers.0.self_attn.v_proj.bias'")


def test_a_huge_number_of_layers_does_not_make_a_long_search_for_biases(folder: Path) -> None:
    changed(folder, "config.json", lambda value: value.update(attention_bias=True, num_hidden_layers=2**31 - 1))
    refused(folder, "config.json", "'model.layers.0.self_attn.o_proj.bias', …")


@pytest.mark.parametrize("dtype", ["I32", "F64", "F8_E4M3"])
def test_weights_of_another_type_are_refused(dtype: str, folder: Path) -> None:
    size = limits.DTYPE_BYTES[dtype]
    (folder / "model.safetensors").write_bytes(
        safetensors_bytes({"model.norm.weight": (dtype, (2, 2), bytes(4 * size))})
    )
    refused(folder, "model.safetensors", f"'model.norm.weight' is {dtype}, only F32, F16, BF16 weights are read")


def test_two_tensors_that_become_one_are_refused(folder: Path) -> None:
    norm = ("F32", (4,), bytes(16))
    data = safetensors_bytes({"model.norm.weight": norm, "output_norm.weight": norm})
    (folder / "model.safetensors").write_bytes(data)
    refused(folder, "model.safetensors", "and another are both output_norm.weight")


@pytest.mark.parametrize(
    ("change", "wanted"),
    [
        ({"architectures": ["GemmaForCausalLM"]}, "architectures: found 'GemmaForCausalLM', wanted one of LlamaFor"),
        ({"architectures": None}, "architectures: found []"),
        ({"architectures": "LlamaForCausalLM"}, "architectures: found 'LlamaForCausalLM', wanted an array"),
        ({"num_hidden_layers": None}, "num_hidden_layers: missing, wanted a whole number"),
        ({"num_hidden_layers": "2"}, "num_hidden_layers: found '2', wanted a whole number"),
        ({"num_hidden_layers": 2.5}, "num_hidden_layers: found 2.5"),
        ({"num_hidden_layers": True}, "num_hidden_layers: found True"),
        ({"hidden_size": -1}, "hidden_size: found -1, wanted 0 to 2**31 - 1"),
        ({"vocab_size": 2**30}, "vocab_size: found 1073741824, wanted at most 2097152"),
        ({"head_dim": 2**31 - 1}, "head_dim: found 2147483647, wanted at most 65536"),
        ({"head_dim": None, "hidden_size": 2**30, "num_attention_heads": 2}, "head_dim: found 536870912, wanted"),
        ({"rope_theta": -1.0, "rope_scaling": LLAMA3}, "8192 positions, base -1, heads of 16, wanted positive numbers"),
        ({"rms_norm_eps": 1e300}, "rms_norm_eps: found 1e+300"),
        ({"hidden_act": "gelu"}, "hidden_act: found 'gelu', wanted 'silu'"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor: found 0.5, wanted 1"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantization_config: found method 'gptq'"),
        ({"rope_scaling": 7}, "rope_scaling: found 7, wanted an object"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8}}, "rope_scaling.low_freq_factor: missing"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 2, "mscale": 1.0}}, "rope_scaling.mscale: found 1.0"),
        (
            {"rope_parameters": {"full_attention": {"rope_theta": 1}, "sliding_attention": {"rope_theta": 2}}},
            "rope_parameters: found {'rope_theta': 1} for 'full_attention', {'rope_theta': 2} for 'sliding_attention'",
        ),
        (
            {"rope_scaling": {"rope_theta": 1, "full_attention": {"rope_theta": 1}}},
            "for 'full_attention', wanted the same for all types of layers",
        ),
        (
            {"rope_theta": 1e4, "rope_parameters": {"rope_type": "default", "rope_theta": 5e5}},
            "rope_theta: found 10000.0, and 500000.0 in rope_parameters, wanted one base",
        ),
        (
            {"rope_theta": 1e4, "rope_parameters": {"full_attention": {"rope_theta": 5e5}}},
            "rope_theta: found 10000.0, and 500000.0 in rope_parameters.full_attention, wanted one base",
        ),
        (
            {"rope_scaling": {"type": "linear", "factor": 2}, "rope_parameters": {"rope_type": "default"}},
            "rope_scaling: found {'type': 'linear', 'factor': 2}, and {'rope_type': 'default'} in rope_parameters",
        ),
        ({"attention_bias": "yes"}, "attention_bias: found 'yes', wanted true or false"),
        ({"tie_word_embeddings": False}, "tie_word_embeddings is false, but no tensor 'lm_head.weight'"),
    ],
)
def test_a_config_that_cannot_be_translated_is_refused(change: dict[str, Any], wanted: str, folder: Path) -> None:
    changed(folder, "config.json", lambda value: value.update(change))
    refused(folder, "config.json", wanted)


@pytest.mark.parametrize(
    ("text", "wanted"),
    [("[]", "found an array, wanted an object"), ("{", "not JSON"), ('{"a":1,"a":1}', "key 'a' is there twice")],
)
@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "tokenizer_config.json", INDEX])
def test_a_broken_json_file_is_refused(name: str, text: str, wanted: str, folder: Path) -> None:
    (folder / name).write_text(text)
    refused(folder, name, wanted)


def test_a_huge_json_file_is_refused_unread(folder: Path) -> None:
    os.truncate(folder / "tokenizer.json", MAX_JSON_BYTES + 1)
    refused(folder, "tokenizer.json", f"found {MAX_JSON_BYTES + 1} bytes, wanted at most {MAX_JSON_BYTES}")


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.sampled_from(["config.json", "tokenizer.json", "tokenizer_config.json", INDEX]), st.data())
def test_whatever_is_changed_a_folder_opens_or_is_refused_with_one_line(
    folder: Path, name: str, data: st.DataObject
) -> None:
    path = folder / name
    original = path.read_bytes()
    raw = bytearray(original)
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, len(raw) - 1))
        raw[at : at + 1] = data.draw(st.sampled_from([b"", b"0", b"9", b"-", b'"', b"[", b"}", b",", b"\xff", b"null"]))
    path.write_bytes(raw)
    refusals: list[str] = []
    try:
        model = open_folder(folder, LoadOptions())
        assert model is not None
        model.close()
    except ModelFileError as error:
        refusals.append(str(error))
    finally:
        path.write_bytes(original)
    assert not any("\n" in text for text in refusals)


@pytest.mark.parametrize(
    ("change", "wanted"),
    [
        (lambda it: it["model"].update(type="Unigram"), "model.type: found 'Unigram', wanted 'BPE'"),
        (lambda it: it["model"].update(vocab={}), "model.vocab: missing or empty"),
        (lambda it: it["model"]["vocab"].update(x="7"), "model.vocab: found '7' for 'x', wanted a token id"),
        (lambda it: it["model"]["vocab"].update(xyz=3), "for token 3, wanted one text for each id"),
        (lambda it: it["model"]["vocab"].update(xyz=2**40), "model.vocab: found token ids 0 to 1099511627776"),
        (lambda it: it["model"]["vocab"].update(xyz=-1), "model.vocab: found token ids -1 to"),
        (lambda it: it["model"].update(merges=None), "model.merges: missing, wanted an array"),
        (lambda it: it["model"].pop("merges"), "model.merges: missing, wanted an array"),
        (lambda it: it["model"].update(merges=["a b", 3]), "model.merges[1]: found 3, wanted two texts"),
        (lambda it: it["model"].update(merges=["a b", ["a", "b"]]), "model.merges: found texts and pairs"),
        (lambda it: it["model"].update(merges=[["a b", "c"]]), "wanted two texts without a space"),
        (lambda it: it["added_tokens"].append({"id": 1, "content": "<|x|>"}), "found '\"' and '<|x|>' for token 1"),
        (lambda it: it["added_tokens"].append({"id": 1, "content": "a"}), "added_tokens[3].id: found 1, wanted"),
        (lambda it: it["added_tokens"].append(7), "added_tokens[3]: found 7, wanted an object"),
        (lambda it: it.update(normalizer={"type": "Lowercase"}), "normalizer: found 'Lowercase', wanted NFC"),
        (
            lambda it: it.update(pre_tokenizer={"type": "Whitespace"}),
            "pre_tokenizer: found Whitespace, wanted ByteLevel",
        ),
        (lambda it: it.update(pre_tokenizer=None), "pre_tokenizer: found none, wanted ByteLevel"),
        (
            lambda it: it["pre_tokenizer"]["pretokenizers"].insert(
                0, {"type": "Split", "pattern": {"Regex": "x+"}, "behavior": "Isolated", "invert": False}
            ),
            "pre_tokenizer: found expressions ('x+',",
        ),
    ],
)
def test_a_tokenizer_that_cannot_be_translated_is_refused(
    change: Callable[[dict[str, Any]], Any], wanted: str, folder: Path
) -> None:
    changed(folder, "tokenizer.json", change)
    refused(folder, "tokenizer.json", wanted)


@pytest.mark.parametrize(
    ("change", "wanted"),
    [
        ({"bos_token": "<none>"}, "bos_token: found '<none>', wanted the text of a token"),
        ({"add_bos_token": "yes"}, "add_bos_token: found 'yes', wanted true or false"),
        ({"chat_template": 7}, "chat_template: found 7, wanted a string or an array"),
        ({"chat_template": [{"name": "default"}]}, "chat_template[0].template: missing"),
    ],
)
def test_special_tokens_that_are_none_are_refused(change: dict[str, Any], wanted: str, folder: Path) -> None:
    changed(folder, "tokenizer_config.json", lambda value: value.update(change))
    refused(folder, "tokenizer_config.json", wanted)
