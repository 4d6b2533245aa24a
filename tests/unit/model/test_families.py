"""Families, built in and as drafts: each is sayable in TOML, and runs as its papers say, with no core change."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from attrs import field, frozen

from mortice.arch_contracts.schema import Contract, builtin_contracts, parse_contract
from mortice.core.model.validation import validate
from mortice.core.plugin.interfaces import StepPart
from tests.support.in_memory import SIZES, arrays_for, metadata_for, model_file, runtime_of
from tests.support.naive_forward import Family, NaiveModel

FOLDER = Path(__file__).parents[1] / "contracts" / "families"
TOKENS = [3, 17, 5, 5, 39, 0, 22, 11, 8, 30, 2, 19]


BUILT_IN = {contract.name: contract for contract in builtin_contracts()}


def contract_of(name: str) -> Contract:
    """A built-in contract, or a draft of a family that is not."""
    if name in BUILT_IN:
        return BUILT_IN[name]
    path = FOLDER / f"{name}.toml"
    return parse_contract(path.read_text(encoding="utf-8"), path.name)


@frozen(kw_only=True)
class Case:
    """A tiny model of a family: what its file says, and the same choices as plain maths."""

    contract: str
    maths: Mapping[str, Any]
    keys: Mapping[str, Any] = field(factory=dict)
    leave_out: tuple[str, ...] = ()
    head_dim: int = 8


def sliding(layer: int) -> int:
    return 4


def full_rope(layer: int) -> int:
    return 8


LLAMA = {"rope": "adjacent", "rope_dims": full_rope}
LAYER_NORM = {"norm": "layer"}
PLAIN_GELU = {"gated": False, "activation": "gelu_tanh"}
STABLELM = {
    **LAYER_NORM,
    "rope": "halves",
    "rope_dims": lambda layer: 4,
    "qk_norm": "per_head",
    "qk_norm_type": "layer",
}
LONGROPE = {
    "rope": "halves",
    "rope_dims": full_rope,
    "rope_divisors": "rope_factors_short",
    "fused_qkv": True,
    "fused_gate_up": "ffn_up",
}
OLMO2 = {"pre_norm": False, "post_norm": True, "qk_norm": "per_row", "rope": "halves", "rope_dims": full_rope}
GEMMA = {"pre_norm": True, "post_norm": True, "activation": "gelu_tanh", "rope": "halves", "rope_dims": full_rope}

CASES = {
    "llama": Case(contract="llama", maths=LLAMA),
    "mistral": Case(contract="mistral", maths={**LLAMA, "window": sliding}, keys={"attention__sliding_window": 4}),
    "mistral, temperature": Case(
        contract="mistral",
        maths={**LLAMA, "temperature": lambda position: 1 + 0.7 * math.log(1 + position // 4)},
        keys={"attention__temperature_scale": 0.7, "rope__scaling__original_context_length": 4},
    ),
    "phi3": Case(
        contract="phi3",
        maths={
            "rope": "halves",
            "rope_dims": lambda layer: 6,
            "window": sliding,
            "fused_qkv": True,
            "fused_gate_up": "ffn_up",
        },
        keys={"attention__sliding_window": 4, "rope__dimension_count": 6},
        leave_out=("rope_factors_short", "rope_factors_long"),
    ),
    "phi3, short": Case(contract="phi3", maths=LONGROPE, keys={"rope__scaling__original_context_length": 64}),
    "phi3, long": Case(
        contract="phi3",
        maths={**LONGROPE, "rope_divisors": "rope_factors_long", "rope_magnitude": 1.25},
        keys={"rope__scaling__original_context_length": 63, "rope__scaling__attn_factor": 1.25},
    ),
    "olmo2": Case(
        contract="olmo2",
        maths=OLMO2,
    ),
    "olmo3": Case(
        contract="olmo2",
        maths={
            **OLMO2,
            "layers": 4,
            "window": lambda layer: 0 if layer == 3 else 4,
            "rope_factor": lambda layer: 8.0 if layer == 3 else 1.0,
        },
        keys={
            "block_count": 4,
            "attention__sliding_window": 4,
            "rope__scaling__type": "linear",
            "rope__scaling__factor": 8.0,
        },
    ),
    "olmo2, a pattern of its own": Case(
        contract="olmo2",
        maths={**OLMO2, "window": lambda layer: 4 if layer == 1 else 0},
        keys={"attention__sliding_window": 4, "attention__sliding_window_pattern": [False, True]},
    ),
    "granite": Case(
        contract="granite",
        maths={
            **LLAMA,
            "embedding_scale": 3.0,
            "residual_scale": 0.25,
            "attention_scale": 0.11,
            "logit_scale": 1 / 7.0,
        },
        keys={"embedding_scale": 3.0, "residual_scale": 0.25, "attention__scale": 0.11, "logit_scale": 7.0},
    ),
    "granite, no positions, scales of 0": Case(
        contract="granite",
        maths={"logit_scale": 0.5},
        keys={
            "rope__scaling__finetuned": False,
            "embedding_scale": 0.0,
            "residual_scale": 0.0,
            "attention__scale": 0.0,
            "logit_scale": 2.0,
        },
        leave_out=("rope_freqs",),
    ),
    "starcoder2": Case(
        contract="starcoder2", maths={**LAYER_NORM, **PLAIN_GELU, "rope": "halves", "rope_dims": full_rope}
    ),
    "stablelm, serial": Case(
        contract="stablelm", maths=STABLELM, keys={"rope__dimension_count": 4, "use_parallel_residual": True}
    ),
    "stablelm, parallel": Case(
        contract="stablelm",
        maths={**STABLELM, "parallel": True, "qk_norm": "none"},
        keys={"rope__dimension_count": 4, "use_parallel_residual": True},
        leave_out=("attn_q_norm", "attn_k_norm", "ffn_norm", "ffn_norm_bias"),
    ),
    "gptneox, two norms side by side": Case(
        contract="gptneox",
        maths={
            **LAYER_NORM,
            **PLAIN_GELU,
            "rope": "halves",
            "rope_dims": lambda layer: 4,
            "parallel": True,
            "fused_qkv": True,
            "kv_heads": 4,
        },
        keys={"rope__dimension_count": 4, "attention__head_count_kv": None},
    ),
    "gemma2": Case(
        contract="gemma2",
        maths={
            **GEMMA,
            "window": lambda layer: 0 if layer % 2 else 4,
            "attention_scale": 0.5,
            "attention_cap": 2.0,
            "logit_cap": 3.0,
            "embedding_scale": math.sqrt(32),
        },
        keys={
            "attention__sliding_window": 4,
            "attention__scale": 0.5,
            "attn_logit_softcapping": 2.0,
            "final_logit_softcapping": 3.0,
        },
    ),
    "gemma3": Case(
        contract="gemma3",
        maths={
            **GEMMA,
            "layers": 6,
            "head_dim": 12,
            "qk_norm": "per_head",
            "rope_dims": lambda layer: 12,
            "rope_base": lambda layer: 1e6 if layer == 5 else 1e4,
            "rope_factor": lambda layer: 8.0 if layer == 5 else 1.0,
            "window": lambda layer: 0 if layer == 5 else 4,
            "embedding_scale": math.sqrt(32),
        },
        keys={
            "block_count": 6,
            "attention__key_length": 12,
            "attention__sliding_window": 4,
            "rope__scaling__type": "linear",
            "rope__scaling__factor": 8.0,
        },
    ),
    "gpt2": Case(
        contract="gpt2",
        maths={**LAYER_NORM, **PLAIN_GELU, "fused_qkv": True, "kv_heads": 4},
        keys={"attention__head_count_kv": None},
    ),
    "smollm3": Case(
        contract="smollm3",
        maths={**LLAMA, "layers": 4, "rope_dims": lambda layer: 0 if layer == 3 else 8},
        keys={"block_count": 4},
    ),
    "command-r": Case(
        contract="command-r",
        maths={
            **LAYER_NORM,
            "parallel": True,
            "rope": "adjacent",
            "rope_dims": full_rope,
            "qk_norm": "per_head",
            "qk_norm_type": "layer",
            "logit_scale": 0.0625,
        },
        keys={"logit_scale": 0.0625},
    ),
}


@pytest.fixture(params=CASES.values(), ids=CASES.keys())
def case(request: pytest.FixtureRequest) -> Case:
    found: Case = request.param
    return found


def build(case: Case) -> tuple[Contract, dict[str, Any], dict[str, np.ndarray[Any, Any]]]:
    contract = contract_of(case.contract)
    metadata = metadata_for(contract, **case.keys)
    return contract, metadata, arrays_for(contract, metadata, leave_out=case.leave_out)


def family(case: Case) -> Family:
    usual = {"layers": SIZES["block_count"], "heads": 4, "kv_heads": 2, "head_dim": 8, "eps": 1e-5}
    return Family(**{**usual, **case.maths})


def expected(case: Case, arrays: Mapping[str, np.ndarray[Any, Any]]) -> np.ndarray[Any, Any]:
    return NaiveModel(family(case), arrays).logits(TOKENS)


def test_prompt_in_one_step_agrees_with_the_plain_formulas(case: Case) -> None:
    contract, metadata, arrays = build(case)
    runtime = runtime_of(model_file(metadata, arrays), contract)
    logits = runtime.step([StepPart(sequence=runtime.new_sequence(), token_ids=TOKENS, logits="all")])
    np.testing.assert_allclose(logits, expected(case, arrays), rtol=2e-4, atol=2e-4)


def test_token_by_token_agrees_with_the_plain_formulas(case: Case) -> None:
    contract, metadata, arrays = build(case)
    runtime = runtime_of(model_file(metadata, arrays), contract)
    sequence = runtime.new_sequence()
    rows = [runtime.step([StepPart(sequence=sequence, token_ids=[token])])[0] for token in TOKENS]
    np.testing.assert_allclose(np.stack(rows), expected(case, arrays), rtol=2e-4, atol=2e-4)


def test_a_file_without_one_of_its_weights_is_refused(case: Case) -> None:
    contract, metadata, arrays = build(case)
    del arrays["blk.1.attn_output.weight"]
    report = validate(model_file(metadata, arrays), contract)
    assert [(item.rule, item.subject) for item in report.findings.errors] == [
        ("role.missing", "blk.1.attn_output.weight")
    ]


def test_one_of_longropes_two_tables_is_not_enough() -> None:
    contract, metadata, arrays = build(CASES["phi3, long"])
    del arrays["rope_factors_long.weight"]
    (error,) = validate(model_file(metadata, arrays), contract).findings.errors
    assert error.rule == "role.missing"
    assert "only one of rope_factors_short and rope_factors_long" in str(error)


def test_longrope_without_its_tables_is_refused() -> None:
    contract, metadata, arrays = build(CASES["phi3"])
    metadata["phi3.rope.scaling.type"] = "longrope"
    (error,) = validate(model_file(metadata, arrays), contract).findings.errors
    assert (error.rule, error.subject) == ("rope.scaling", "phi3.rope.scaling.type")
    assert "rope_factors_short.weight and rope_factors_long.weight" in str(error)


def test_a_norm_that_one_layer_lacks_is_no_parallel_block() -> None:
    contract, metadata, arrays = build(CASES["stablelm, serial"])
    del arrays["blk.1.ffn_norm.weight"], arrays["blk.1.ffn_norm.bias"]
    (error,) = validate(model_file(metadata, arrays), contract).findings.errors
    assert (error.rule, error.subject) == ("role.uneven", "blk.1.ffn_norm.weight")


def test_a_window_pattern_that_is_no_list_of_layers_is_refused() -> None:
    contract, metadata, arrays = build(CASES["olmo3"])
    metadata["olmo2.attention.sliding_window_pattern"] = 4
    (error,) = validate(model_file(metadata, arrays), contract).findings.errors
    assert (error.rule, error.subject) == ("hyperparameter.type", "olmo2.attention.sliding_window_pattern")


def test_gemma2_refuses_a_head_of_its_own() -> None:
    contract, metadata, arrays = build(CASES["gemma2"])
    arrays["output.weight"] = np.ones((40, 32), np.float32)
    (error,) = validate(model_file(metadata, arrays), contract).findings.errors
    assert (error.rule, error.subject) == ("role.forbidden", "output.weight")


def test_every_draft_is_run() -> None:
    drafts = {path.stem for path in FOLDER.glob("*.toml")}
    assert drafts == {case.contract for case in CASES.values()} - set(BUILT_IN)


def test_every_family_that_is_built_in_is_run() -> None:
    assert set(BUILT_IN) - {"qwen2", "qwen3"} <= {case.contract for case in CASES.values()}
