"""The contract suite: every built-in family passes, and a planted fault is reported by the check that is for it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from attrs import evolve

from mortice.arch_contracts.expressions import Expression
from mortice.arch_contracts.schema import Contract, builtin_contracts, parse_contract
from mortice.core.testing.contract_suite import ContractSuite
from tests.kit.running import failures, run

CONTRACTS = {contract.name: contract for contract in builtin_contracts()}
LLAMA = CONTRACTS["llama"]


def changed(text_of: str = "llama", **replace: str) -> Contract:
    """A built-in contract whose text has other words."""
    text = (Path(__file__).parents[2] / "arch_contracts" / f"{text_of}.toml").read_text(encoding="utf-8")
    for old, new in replace.items():
        text = text.replace(old, new)
    return parse_contract(text, f"{text_of}.toml")


@pytest.mark.parametrize("name", sorted(CONTRACTS))
def test_every_built_in_family_passes(name: str) -> None:
    failed, counts = run(ContractSuite.of(contract=CONTRACTS[name]))
    assert failed == {}
    assert counts["passed"] > 30


def test_a_contract_without_a_description_is_reported() -> None:
    found = failures(ContractSuite.of(contract=evolve(LLAMA, description="")), "the contract does not")
    assert found == {
        "the contract does not contradict itself": "contract llama has no description, which listings show"
    }


def with_role(**changes: Any) -> Contract:
    """A llama with one role of a layer changed."""
    roles: Mapping[str, Any] = LLAMA.layer_roles
    return evolve(LLAMA, layer_roles={**roles, **{key: evolve(roles[key], **value) for key, value in changes.items()}})


def test_a_shape_that_takes_head_dim_for_hidden_over_heads_is_reported() -> None:
    wrong = with_role(attn_output={"shape": (Expression("hidden_size"), Expression("hidden_size"))})
    check = "heads may have a size of their own"
    assert "layers.0.attn_output: columns of the weight: 64 and 128 do not fit" in failures(
        ContractSuite.of(contract=wrong)
    ).pop(check)
    assert failures(ContractSuite.of(contract=wrong, own_head_dim=False), check) == {}


def test_a_shape_that_forgets_grouped_query_attention_is_reported() -> None:
    wrong = with_role(attn_k={"shape": (Expression("num_heads * head_dim"), Expression("hidden_size"))})
    found = failures(ContractSuite.of(contract=wrong), "the program builds")
    assert "heads: 32 and 64 do not fit" in found["the program builds [plain]"]


def test_a_required_weight_that_nothing_uses_is_reported() -> None:
    extra = evolve(LLAMA.layer_roles["attn_norm"], name="blk.{i}.post_attention_norm.weight")
    wrong = evolve(LLAMA, layer_roles={**LLAMA.layer_roles, "post_attention_norm": extra})
    assert failures(ContractSuite.of(contract=wrong), "the contract does not contradict itself")


def test_a_weight_without_effect_is_reported() -> None:
    """A residual factor of next to nothing makes all of a layer idle."""
    wrong = evolve(LLAMA, residual=evolve(LLAMA.residual, scale=Expression("0.000000000000000000001")))
    found = failures(ContractSuite.of(contract=wrong), "a weight has an effect")
    assert found["a weight has an effect [ffn_down]"] == "blk.0.ffn_down.weight: other values give the same logits"


def test_a_default_that_the_file_cannot_state_is_reported() -> None:
    """A float where the default is a float, read as an int."""
    number = evolve(LLAMA.hyperparameters["rope_freq_base"], kind="int", default=Expression("10000.5"))
    wrong = evolve(LLAMA, hyperparameters={**LLAMA.hyperparameters, "rope_freq_base": number})
    found = failures(ContractSuite.of(contract=wrong), "a default is")
    assert any("no whole number" in message for message in found.values())


def test_another_implementation_that_disagrees_is_reported(tmp_path: Path) -> None:
    class Family(ContractSuite):
        contract = LLAMA

    def neighbour(path: Path, ids: Any) -> Any:
        """The same model with RoPE on the other pairs."""
        suite = ContractSuite.of(contract=changed(adjacent="halves"))
        return suite.logits(path)

    Family.oracle = staticmethod(neighbour)
    found = failures(Family(), "logits are those of the oracle")
    assert "NMSE" in found["logits are those of the oracle [plain]"]


def test_another_implementation_that_agrees_is_no_fault() -> None:
    class Family(ContractSuite):
        contract = LLAMA

    Family.oracle = staticmethod(lambda path, ids: ContractSuite.of(contract=LLAMA).logits(path).astype(np.float32))
    assert failures(Family(), "logits are those of the oracle") == {}
