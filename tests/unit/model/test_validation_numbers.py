"""Numbers and keys that make no sense, or that a contract leaves unread, are reported where they are."""

from __future__ import annotations

import math
import time
from typing import Any

import numpy as np
import pytest
from attrs import evolve

from mortice.arch_contracts.schema import Contract, parse_contract
from mortice.core.model.findings import Finding
from mortice.core.model.validation import validate
from tests.support.in_memory import model_file
from tests.unit.model.test_validation import LLAMA, contract_text, errors, findings, good


def with_key(key: str, value: Any, contract: Contract = LLAMA) -> list[Finding]:
    """Errors after one key of a good file was set to `value` (None takes it away)."""
    metadata, arrays = good(contract)
    full = key if key.startswith("tokenizer.") else f"{contract.architectures[0]}.{key}"
    metadata = {name: item for name, item in metadata.items() if name != full}
    if value is not None:
        metadata[full] = value
    return [item for item in findings(contract, metadata, arrays) if item.severity == "error"]


@pytest.mark.parametrize(
    ("key", "value", "wanted"),
    [
        ("attention.head_count", 0, "llama.attention.head_count: 0; wanted a finite number from 1"),
        ("attention.head_count_kv", 0, "llama.attention.head_count_kv: 0; wanted a finite number from 1"),
        ("attention.head_count_kv", 3, "llama.attention.head_count_kv: 3 (layer 0); wanted a divisor of 4 query heads"),
        ("attention.head_count", 5, "llama.attention.key_length: missing; its default hidden_size / num_heads is 6.4"),
        ("attention.key_length", 0, "llama.attention.key_length: 0; wanted a finite number from 1"),
        ("attention.key_length", 7, "rope.dims: rope_dim = 7 (layer 0); wanted an even number, at most head_dim = 7"),
        ("rope.dimension_count", 10, "llama.rope.dimension_count: 10 (layer 0); wanted an even number, at most"),
        ("rope.dimension_count", 3, "llama.rope.dimension_count: 3 (layer 0); wanted an even number"),
        ("vocab_size", 41, "token_embd.weight: shape (40, 32); llama wants (41, 32)"),
        ("vocab_size", 0, "llama.vocab_size: 0; wanted a positive int"),
        ("attention.layer_norm_rms_epsilon", None, "llama.attention.layer_norm_rms_epsilon: missing; llama needs it"),
        ("attention.layer_norm_rms_epsilon", math.nan, "llama.attention.layer_norm_rms_epsilon: nan; wanted a finite"),
        ("attention.layer_norm_rms_epsilon", math.inf, "llama.attention.layer_norm_rms_epsilon: inf; wanted a finite"),
        ("attention.layer_norm_rms_epsilon", -1e-5, "llama.attention.layer_norm_rms_epsilon: -1e-05 (layer 0); wanted"),
        ("rope.freq_base", 0.0, "llama.rope.freq_base: 0.0 (layer 0); wanted more than 0"),
        ("rope.freq_base", -10000.0, "llama.rope.freq_base: -10000.0 (layer 0); wanted more than 0"),
        ("rope.freq_base", math.inf, "llama.rope.freq_base: inf; wanted a finite number"),
        ("context_length", 0, "llama.context_length: 0; wanted a finite number from 1"),
        (
            "context_length",
            2**60,
            "llama.context_length: 1152921504606846976; wanted a finite number from 1 to 2147483",
        ),
        ("block_count", 0, "llama.block_count: 0; wanted a finite number from 1"),
        ("block_count", 10**5, "llama.block_count: 100000; the file has"),
        ("block_count", -1, "llama.block_count: -1; wanted"),
        ("block_count", "2", "llama.block_count: str '2'; wanted int"),
        ("block_count", 2.0, "llama.block_count: float 2.0; wanted int"),
        ("block_count", True, "llama.block_count: bool True; wanted int"),
        ("block_count", np.array([2, 2]), "llama.block_count: an array of 2; wanted int"),
        ("embedding_length", "x" * 1000, "llama.embedding_length: str 'xxx"),
        ("attention.head_count", ["4", "4"], "llama.attention.head_count: str '4'; wanted int"),
        ("attention.head_count", np.array([4, 4, 4]), "llama.attention.head_count: 3 values; wanted one for each of 2"),
        ("attention.head_count", np.array([4, 2]), "llama.attention.head_count: values that differ from layer to"),
        ("rope.freq_base", 10**400, "llama.rope.freq_base: 1000"),
        ("tokenizer.ggml.tokens", 7, "tokenizer.ggml.tokens: int; wanted an array of strings"),
        ("tokenizer.ggml.tokens", ["a"] * 39, "llama.vocab_size: 40; tokenizer.ggml.tokens has 39 entries"),
        ("rope.scaling.type", "longrope", "llama.rope.scaling.type: 'longrope'; llama allows none, linear, yarn"),
        ("rope.scaling.type", np.array([1, 2]), "llama.rope.scaling.type: array([1, 2]); llama allows"),
        ("rope.scaling.type", "linear", "llama.rope.scaling.factor: missing; wanted a positive number"),
        ("rope.scaling.factor", 0.0, "llama.rope.scaling.factor: 0.0; wanted a positive number"),
        ("rope.scaling.factor", 5e-324, "llama.rope.scaling.factor: 5e-324; wanted a number of at least 4.65661e-10"),
        ("rope.scale_linear", math.nan, "llama.rope.scale_linear: nan; wanted a positive number"),
    ],
)
def test_semantic_nonsense_is_refused(key: str, value: Any, wanted: str) -> None:
    found = with_key(key, value)
    assert any(str(item).startswith(wanted) for item in found), "\n".join(map(str, found))


def test_a_finding_on_a_key_says_at_which_byte() -> None:
    (finding,) = [item for item in with_key("rope.freq_base", 0.0) if item.rule == "rope.base.range"]
    assert finding.offset is not None
    assert str(finding).endswith(f"(byte {finding.offset})")


def test_rope_factor_without_a_type_is_linear_scaling() -> None:
    metadata, arrays = good()
    metadata["llama.rope.scaling.factor"] = 4.0
    scaling = validate(model_file(metadata, arrays), LLAMA).model().rope_scaling
    assert scaling is not None
    assert (scaling.type, scaling.factor) == ("linear", 4.0)


def test_an_attention_factor_holds_without_a_type_too() -> None:
    metadata, arrays = good()
    metadata["llama.rope.scaling.attn_factor"] = 1.25
    scaling = validate(model_file(metadata, arrays), LLAMA).model().rope_scaling
    assert scaling is not None
    assert (scaling.type, scaling.factor, scaling.attn_factor) == ("linear", 1.0, 1.25)


@pytest.mark.parametrize(("stated", "refused"), [(1.0, False), (0.1 * math.log(4.0) + 1.0, False), (1.3, True)])
def test_yarns_magnitude_may_be_stated_but_not_changed(stated: float, refused: bool) -> None:
    metadata, arrays = good()
    metadata |= {
        "llama.rope.scaling.type": "yarn",
        "llama.rope.scaling.factor": 4.0,
        "llama.rope.scaling.yarn_attn_factor": stated,
    }
    found = errors(LLAMA, metadata, arrays)
    assert ["llama.rope.scaling.yarn_attn_factor: 1.3; only 1 and 1.13863" in line for line in found] == [
        True
    ] * refused


@pytest.mark.parametrize("value", [-0.5, "1", math.nan])
def test_a_log_multiplier_is_a_number_of_at_least_0(value: Any) -> None:
    metadata, arrays = good()
    metadata |= {"llama.rope.scaling.type": "yarn", "llama.rope.scaling.factor": 4.0}
    metadata["llama.rope.scaling.yarn_log_multiplier"] = value
    assert any("wanted a number of at least 0" in line for line in errors(LLAMA, metadata, arrays))


def test_a_base_that_yarn_cannot_use_is_refused() -> None:
    metadata, arrays = good()
    metadata |= {"llama.rope.scaling.type": "yarn", "llama.rope.scaling.factor": 4.0, "llama.rope.freq_base": 1.0}
    assert any("wanted more than 1" in line for line in errors(LLAMA, metadata, arrays))


@pytest.mark.parametrize("blocks", [2**31 - 1, 2**60, 2**63])
def test_a_huge_block_count_takes_no_time(blocks: int) -> None:
    began = time.process_time()
    assert with_key("block_count", blocks)
    assert time.process_time() - began < 1


@pytest.mark.parametrize("name", ["token_type", "scores"])
def test_lists_beside_the_tokens_have_their_length(name: str) -> None:
    metadata, arrays = good()
    metadata["tokenizer.ggml.tokens"] = ["a"] * 40
    metadata[f"tokenizer.ggml.{name}"] = np.zeros(41)
    assert [line.partition(" (byte")[0] for line in errors(LLAMA, metadata, arrays)] == [
        f"tokenizer.ggml.{name}: 41 entries; wanted one for each of 40 tokens"
    ]


@pytest.mark.parametrize("value", [40, -1, "1", True])
def test_special_tokens_are_in_the_vocabulary(value: Any) -> None:
    metadata, arrays = good()
    metadata |= {"tokenizer.ggml.tokens": ["a"] * 40, "tokenizer.ggml.eos_token_id": value}
    (line,) = errors(LLAMA, metadata, arrays)
    assert line.startswith("tokenizer.ggml.eos_token_id: ")


# values that differ from layer to layer ------------------------------------------------------------------------------


PER_LAYER = """
heads_per_kv = { key = "heads_per_kv", kind = "int", default = "2" }
num_heads = { key = "attention.head_count", kind = "int", min = 1, per_layer = true }
head_dim = { key = "attention.key_length", kind = "int", min = 1, default = "32 / num_heads", per_layer = true }
num_kv_heads = { key = "attention.head_count_kv", kind = "int", default = "num_heads / heads_per_kv", per_layer = true }
window = { key = "w", kind = "int", default = "layer * 4", per_layer = true }
"""


def per_layer_contract() -> Contract:
    return parse_contract(contract_text("smollm3").replace("[norm]", PER_LAYER + "[norm]", 1), "smollm3.toml")


def test_defaults_follow_their_inputs_from_layer_to_layer() -> None:
    contract = per_layer_contract()
    metadata, arrays = good(contract, attention__head_count=np.array([4, 8], np.int32), attention__head_count_kv=None)
    values = validate(model_file(metadata, arrays), contract).model().hyperparameters
    assert [values.values[name] for name in ("num_heads", "head_dim", "num_kv_heads", "window")] == [
        (4, 8),
        (8, 4),
        (2, 4),
        (0, 4),
    ]
    with pytest.raises(TypeError, match="num_heads differs from layer to layer"):
        values["num_heads"]


def test_heads_that_do_not_divide_are_found_in_the_layer_that_has_them() -> None:
    contract = per_layer_contract()
    metadata, arrays = good(contract)
    metadata["smollm3.attention.head_count_kv"] = np.array([2, 3], np.int32)
    assert any(
        "head_count_kv: 3 (layer 1); wanted a divisor of 4" in line for line in errors(contract, metadata, arrays)
    )


def test_one_value_for_every_layer_may_be_written_as_an_array() -> None:
    metadata, arrays = good()
    metadata["llama.attention.head_count_kv"] = np.array([2, 2], np.int32)
    assert validate(model_file(metadata, arrays), LLAMA).model().hyperparameters["num_kv_heads"] == 2


# keys that the contract does not read --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("expert_count", 8),
        ("attention.sliding_window", 16),
        ("attn_logit_softcapping", 50.0),
        ("final_logit_softcapping", 30.0),
        ("logit_scale", 0.25),
        ("residual_scale", 0.25),
        ("embedding_scale", 12.0),
        ("attention.scale", 0.5),
        ("attention.value_length", 16),
        ("attention.clamp_kqv", 8.0),
        ("attention.max_alibi_bias", 8.0),
        ("attention.causal", False),
        ("use_parallel_residual", True),
        ("rope.dimension_sections", np.array([16, 24, 24, 0])),
        ("rope.freq_base_swa", 10000.0),
        ("attention.sliding_window_pattern", np.array([True, False])),
        ("pooling_type", 1),
        ("ssm.state_size", 16),
    ],
)
def test_a_key_that_changes_the_maths_is_never_left_unread(key: str, value: Any) -> None:
    (finding,) = with_key(key, value)
    assert (finding.rule, finding.subject) == ("key.unread", f"llama.{key}")
    assert finding.wanted.endswith("leaving it out would change the result")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("expert_count", 0),
        ("attention.sliding_window", 64),
        ("attention.sliding_window", 0),
        ("attn_logit_softcapping", 0.0),
        ("logit_scale", 1.0),
        ("attention.scale", 1 / math.sqrt(8)),
        ("attention.value_length", 8),
        ("attention.causal", True),
        ("use_parallel_residual", False),
        ("attention.layer_norm_epsilon", 1e-5),
        ("tensor_data_layout", "reference"),
        ("attention.sliding_window_pattern", np.array([0, 0])),
    ],
)
def test_a_value_that_changes_nothing_is_a_note(key: str, value: Any) -> None:
    metadata, arrays = good()
    metadata[f"llama.{key}"] = value
    assert [item.severity for item in findings(LLAMA, metadata, arrays) if item.rule == "key.unread"] == ["note"]


def test_an_unknown_key_is_a_warning() -> None:
    metadata, arrays = good()
    metadata["llama.attention.brand_new"] = 1
    (finding,) = [item for item in findings(LLAMA, metadata, arrays) if item.rule == "key.unread"]
    assert (finding.severity, finding.subject) == ("warning", "llama.attention.brand_new")


def test_a_contract_can_say_that_a_key_plays_no_part() -> None:
    metadata, arrays = good()
    metadata["llama.attention.sliding_window"] = 16
    contract = evolve(LLAMA, ignored_keys=("attention.sliding_window",))
    assert validate(model_file(metadata, arrays), contract).ok


def test_keys_of_other_prefixes_are_not_ours_to_judge() -> None:
    metadata, arrays = good()
    metadata |= {"general.name": "x", "llama2.expert_count": 8, "split.count": 1}
    assert [item for item in findings(LLAMA, metadata, arrays) if item.rule == "key.unread"] == []
