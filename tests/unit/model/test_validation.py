"""Every way in which a file may not fit its contract is reported, where it is and with what was wanted."""

from __future__ import annotations

import json
from importlib import resources
from typing import Any

import numpy as np
import pytest
from attrs import evolve
from numpy.typing import NDArray

from mortice.arch_contracts.schema import Contract, builtin_contracts, parse_contract
from mortice.core.errors import ContractError, ValidationError
from mortice.core.model.findings import Finding
from mortice.core.model.program import build_program
from mortice.core.model.types import ModelFile, TensorView
from mortice.core.model.validation import validate
from tests.support.in_memory import QTYPES, arrays_for, metadata_for, model_file, raw_view
from tests.unit.model.test_families import contract_of

CONTRACTS = {contract.name: contract for contract in builtin_contracts()}
LLAMA = CONTRACTS["llama"]
Arrays = dict[str, NDArray[Any]]


def good(contract: Contract = LLAMA, **keys: Any) -> tuple[dict[str, Any], Arrays]:
    metadata = metadata_for(contract, **keys)
    return metadata, arrays_for(contract, metadata)


def findings(contract: Contract, metadata: dict[str, Any], arrays: Arrays) -> list[Finding]:
    return list(validate(model_file(metadata, arrays), contract).findings.items)


def errors(contract: Contract, metadata: dict[str, Any], arrays: Arrays) -> list[str]:
    return [str(item) for item in findings(contract, metadata, arrays) if item.severity == "error"]


@pytest.mark.parametrize("name", CONTRACTS)
def test_a_good_file_has_no_errors_and_builds(name: str) -> None:
    metadata, arrays = good(CONTRACTS[name])
    report = validate(model_file(metadata, arrays), CONTRACTS[name])
    assert report.findings.errors == ()
    assert [item.rule for item in report.findings.warnings] == ["tokenizer.missing"]
    assert build_program(report.model()).num_layers == 2


# tensors -------------------------------------------------------------------------------------------------------------


def test_a_wrong_shape_is_reported_with_both_shapes_and_the_offset() -> None:
    metadata, arrays = good()
    arrays["blk.1.attn_q.weight"] = np.zeros((16, 32), np.float32)
    (finding,) = validate(model_file(metadata, arrays), LLAMA).findings.errors
    assert finding.offset is not None
    assert str(finding) == f"blk.1.attn_q.weight: shape (16, 32); llama wants (32, 32) (byte {finding.offset})"


@pytest.mark.parametrize("shape", [(32,), (1, 32), (32, 32, 1), (0, 32), (32, 0), (33, 32)])
def test_any_other_shape_is_refused(shape: tuple[int, ...]) -> None:
    metadata, arrays = good()
    arrays["blk.0.attn_output.weight"] = np.zeros(shape, np.float32)
    (finding,) = validate(model_file(metadata, arrays), LLAMA).findings.errors
    assert (finding.rule, finding.subject) == ("role.shape", "blk.0.attn_output.weight")


def test_missing_ffn_norm_is_an_error_and_never_replaced() -> None:
    metadata, arrays = good()
    del arrays["blk.0.ffn_norm.weight"]
    assert errors(LLAMA, metadata, arrays) == ["blk.0.ffn_norm.weight: missing; llama requires ffn_norm"]


def test_missing_q_norm_is_reported_for_qwen3() -> None:
    contract = CONTRACTS["qwen3"]
    metadata, arrays = good(contract)
    del arrays["blk.1.attn_q_norm.weight"]
    assert "blk.1.attn_q_norm.weight: missing; qwen3 requires attn_q_norm" in errors(contract, metadata, arrays)


def test_a_contract_that_was_made_for_another_architecture_is_warned_of_once() -> None:
    metadata, arrays = good()

    def warnings(*architectures: str) -> list[Finding]:
        found = findings(evolve(LLAMA, name="acme", architectures=architectures), metadata, arrays)
        return [finding for finding in found if finding.rule == "contract.architecture"]

    assert warnings("qwen2", "llama") == []
    (finding,) = warnings("qwen2", "qwen3")
    assert (finding.severity, finding.subject, finding.found) == ("warning", "general.architecture", "'llama'")
    assert finding.wanted == "contract acme was made for qwen2, qwen3; results are right only if both compute the same"


def test_a_bias_is_refused_where_the_family_has_none() -> None:
    contract = CONTRACTS["qwen3"]
    metadata, arrays = good(contract)
    arrays["blk.0.attn_q.bias"] = np.zeros(32, np.float32)
    (finding,) = validate(model_file(metadata, arrays), contract).findings.errors
    assert (finding.rule, finding.found, finding.wanted) == ("role.forbidden", "present", "qwen3 has no attn_q_bias")


def test_a_tensor_without_a_role_is_an_error() -> None:
    metadata, arrays = good()
    arrays["blk.0.attn_sinks.weight"] = np.zeros(4, np.float32)
    arrays["blk.2.attn_q.weight"] = arrays["blk.0.attn_q.weight"]  # a layer that does not exist
    found = [item.subject for item in findings(LLAMA, metadata, arrays) if item.rule == "tensor.unclaimed"]
    assert found == ["blk.0.attn_sinks.weight", "blk.2.attn_q.weight"]


def test_a_tensor_known_to_play_no_part_is_a_note() -> None:
    metadata, arrays = good()
    arrays["blk.1.attn_rot_embd.weight"] = np.zeros(4, np.float32)
    assert validate(model_file(metadata, arrays), LLAMA).ok
    assert [item.severity for item in findings(LLAMA, metadata, arrays) if item.rule == "tensor.ignored"] == ["note"]


def test_integers_are_no_weights() -> None:
    metadata, arrays = good()
    arrays["blk.0.attn_norm.weight"] = np.ones(32, np.int32)
    (line,) = errors(LLAMA, metadata, arrays)
    assert line.startswith("blk.0.attn_norm.weight: type I32; weights are no integers")


def test_names_are_exact() -> None:
    """An attn_output.weight is not the head because its name ends like the head's."""
    metadata, arrays = good()
    del arrays["output.weight"]
    model = validate(model_file(metadata, arrays), LLAMA).model()
    assert model.weights["output", None].tensor == "token_embd.weight"


def test_a_head_of_its_own_is_used_where_the_file_has_one() -> None:
    model = validate(model_file(*good()), LLAMA).model()
    assert model.weights["output", None].tensor == "output.weight"


def test_a_broken_head_is_not_replaced_by_the_embedding() -> None:
    metadata, arrays = good()
    arrays["output.weight"] = np.zeros((39, 32), np.float32)
    (line,) = errors(LLAMA, metadata, arrays)
    assert line.startswith("output.weight: shape (39, 32)")


def test_without_head_and_embedding_only_the_embedding_is_missing_for_llama() -> None:
    metadata, arrays = good()
    del arrays["output.weight"], arrays["token_embd.weight"]
    found = errors(LLAMA, metadata, arrays)
    assert found[0] == "token_embd.weight: missing; llama requires token_embd"
    assert found[1:] == ["output.weight: missing; llama requires output (every model)"]


def test_a_broken_embedding_does_not_make_the_tied_head_missing() -> None:
    metadata, arrays = good()
    del arrays["output.weight"]
    arrays["token_embd.weight"] = np.zeros((40, 31), np.float32)
    (line,) = errors(LLAMA, metadata, arrays)
    assert line.startswith("token_embd.weight: shape (40, 31)")


def test_everything_wrong_is_reported_at_once() -> None:
    metadata, arrays = good()
    del metadata["llama.attention.layer_norm_rms_epsilon"]
    metadata["llama.rope.freq_base"] = -1.0
    metadata["llama.logit_scale"] = 0.5
    metadata["tokenizer.ggml.tokens"] = ["a"] * 40
    metadata["tokenizer.ggml.token_type"] = np.ones(39, np.int32)
    del arrays["blk.0.ffn_up.weight"]
    arrays["extra"] = np.zeros(1, np.float32)
    arrays["blk.1.attn_k.weight"] = np.zeros((1, 32), np.float32)
    rules = {item.rule for item in findings(LLAMA, metadata, arrays) if item.severity == "error"}
    assert rules == {
        "hyperparameter.missing",
        "rope.base.range",
        "key.unread",
        "tokenizer.length",
        "role.missing",
        "tensor.unclaimed",
        "role.shape",
    }


def test_the_error_lists_every_finding_once_for_all_layers_and_names_the_file() -> None:
    metadata, arrays = good()
    del arrays["blk.0.ffn_up.weight"], arrays["blk.1.ffn_up.weight"]
    with pytest.raises(ValidationError) as caught:
        validate(model_file(metadata, arrays), LLAMA).model()
    assert str(caught.value).splitlines() == [
        "memory.gguf: 2 errors against contract llama",
        "  blk.{0..1}.ffn_up.weight: missing; llama requires ffn_up",
    ]


def test_a_plugins_error_counts_and_keeps_its_name() -> None:
    extra = Finding(rule="x.y", severity="error", subject="s", found="f", wanted="w", plugin="their-plugin")
    report = validate(model_file(*good()), LLAMA, [extra])
    assert not report.ok
    assert report.findings.errors == (extra,)


def test_findings_are_data_for_json() -> None:
    metadata, arrays = good()
    del arrays["blk.0.ffn_up.weight"]
    (finding,) = validate(model_file(metadata, arrays), LLAMA).findings.errors
    assert json.loads(json.dumps(finding.as_dict())) == {
        "rule": "role.missing",
        "severity": "error",
        "subject": "blk.0.ffn_up.weight",
        "found": "missing",
        "wanted": "llama requires ffn_up",
        "offset": None,
        "plugin": "mortice",
    }


# fused tensors -------------------------------------------------------------------------------------------------------


def test_parts_of_a_fused_tensor_are_its_rows_in_order() -> None:
    contract = contract_of("gpt2")
    keys = {"attention__head_count_kv": 2}
    metadata, arrays = good(contract, **keys)
    model = validate(model_file(metadata, arrays), contract).model()
    parts = [model.weights[f"attn_{part}", 1] for part in "qkv"]
    assert [(part.row_start, part.row_stop) for part in parts] == [(0, 32), (32, 48), (48, 64)]
    biases = [model.weights[f"attn_{part}_bias", 1] for part in "qkv"]
    assert [(bias.row_start, bias.row_stop) for bias in biases] == [(0, 32), (32, 48), (48, 64)]
    assert {part.tensor for part in parts} == {"blk.1.attn_qkv.weight"}


def test_a_missing_fused_tensor_is_reported_once() -> None:
    contract = contract_of("phi3")
    metadata, arrays = good(contract)
    del arrays["blk.0.attn_qkv.weight"]
    subjects = [item.subject for item in findings(contract, metadata, arrays) if item.severity == "error"]
    assert subjects == ["blk.0.attn_qkv.weight"]


def test_a_broken_fused_tensor_is_reported_alone() -> None:
    contract = contract_of("phi3")
    metadata, arrays = good(contract)
    arrays["blk.0.attn_qkv.weight"] = np.zeros((63, 32), np.float32)
    (line,) = errors(contract, metadata, arrays)
    assert line.startswith("blk.0.attn_qkv.weight: shape (63, 32); phi3 wants (64, 32)")


def test_parts_that_are_not_the_whole_are_refused() -> None:
    text = (contract_text("phi3")).replace('attn_v = "num_kv_heads * head_dim"', 'attn_v = "head_dim"')
    contract = parse_contract(text, "phi3.toml")
    metadata, arrays = good(contract)
    found = errors(contract, metadata, arrays)
    assert found[0].startswith("blk.0.attn_qkv.weight: 64 rows; its parts have 56")


def contract_text(name: str) -> str:
    from tests.unit.model.test_families import BUILT_IN, FOLDER

    folder = resources.files("mortice.arch_contracts") if name in BUILT_IN else FOLDER
    return (folder / f"{name}.toml").read_text(encoding="utf-8")


def test_a_fused_bias_is_not_split_within_a_block() -> None:
    contract = contract_of("gpt2")
    metadata, arrays = good(contract, attention__head_count_kv=2)
    file = model_file(metadata, arrays)
    tensors: dict[str, TensorView] = dict(file.tensors)
    tensors["blk.0.attn_qkv.bias"] = raw_view("blk.0.attn_qkv.bias", (64,), QTYPES["Q8_0"])
    file = evolve_file(file, tensors)
    (finding,) = validate(file, contract).findings.errors
    assert (finding.rule, finding.found) == ("role.split", "attn_k_bias ends at element 48")


def evolve_file(file: ModelFile, tensors: dict[str, TensorView]) -> ModelFile:
    return ModelFile(
        path=file.path,
        format=file.format,
        version=file.version,
        metadata=file.metadata,
        metadata_offsets=file.metadata_offsets,
        tensors=tensors,
        files=file.files,
    )


def test_a_role_given_whole_and_in_a_fused_tensor_is_refused() -> None:
    text = contract_text("phi3").replace(
        "[roles.layer]",
        '[roles.layer]\nattn_q = { shape = ["num_heads * head_dim", "hidden_size"], optional = true }',
    )
    contract = parse_contract(text, "phi3.toml")
    metadata, arrays = good(contract)
    assert any("holds attn_q" in line for line in errors(contract, metadata, arrays))
    for layer in range(2):
        del arrays[f"blk.{layer}.attn_q.weight"]
    assert errors(contract, metadata, arrays) == []


def test_norms_on_q_alone_are_refused() -> None:
    contract = contract_of("command-r")
    metadata, arrays = good(contract, logit_scale=0.1)
    del arrays["blk.1.attn_k_norm.weight"]
    assert errors(contract, metadata, arrays) == [
        "layer 1: only one of attn_q_norm and attn_k_norm; wanted both or none"
    ]


def test_a_parallel_family_needs_its_ffn_norm_where_a_file_is_serial() -> None:
    contract = contract_of("gptneox")
    keys = {"rope__dimension_count": 4, "use_parallel_residual": False}
    metadata, arrays = good(contract, **keys)
    del arrays["blk.0.ffn_norm.weight"]
    found = errors(contract, metadata, arrays)
    assert found[0].startswith("blk.0.ffn_norm.weight: missing; gptneox requires ffn_norm (norm.placement = 'pre')")


def test_shapes_that_contradict_the_settings_are_the_contracts_fault() -> None:
    text = contract_text("mistral").replace(
        'attn_k = ["num_kv_heads * head_dim", "hidden_size"]', 'attn_k = ["num_heads * head_dim", "hidden_size"]'
    )
    contract = parse_contract(text, "mistral.toml")
    metadata, arrays = good(contract)
    model = validate(model_file(metadata, arrays), contract).model()
    with pytest.raises(ContractError, match=r"contract mistral: layers\.0\.rope_k: heads: 16 and 32 do not fit"):
        build_program(model)
