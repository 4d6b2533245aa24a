"""Contracts written as text, and compared."""

from __future__ import annotations

from pathlib import Path

import pytest
from attrs import evolve

from mortice.arch_contracts.differences import Difference, differences
from mortice.arch_contracts.expressions import Expression
from mortice.arch_contracts.schema import Contract, ContractFormatError, builtin_contracts, parse_contract
from mortice.arch_contracts.writing import contract_text

FAMILIES = sorted((Path(__file__).parent / "families").glob("*.toml"))
ALL = [*builtin_contracts(), *(parse_contract(path.read_text(), path.name) for path in FAMILIES)]
LLAMA = next(contract for contract in ALL if contract.name == "llama")


@pytest.mark.parametrize("contract", ALL, ids=lambda contract: contract.name)
def test_a_contract_that_is_written_and_read_again_says_the_same(contract: Contract) -> None:
    again = parse_contract(contract_text(contract), "again.toml")
    assert differences(contract, again) == []
    assert again == contract


def test_what_equals_a_default_is_not_written() -> None:
    text = contract_text(LLAMA)
    assert "softcap" not in text
    assert "block_count" not in text
    assert '\nattn_norm = ["hidden_size"]\n' in text


def test_an_unknown_value_is_written_so_that_nobody_reads_it() -> None:
    text = contract_text(LLAMA, unknown={"rope.style": "a file does not say"}, remarks=["a draft"])
    assert text.startswith("# a draft\n\n[contract]\n")
    assert 'style = "?"  # unknown: a file does not say\n' in text
    with pytest.raises(ContractFormatError) as caught:
        parse_contract(text, "draft.toml")
    assert str(caught.value) == "draft.toml: rope.style: wanted one of 'adjacent', 'halves', found '?'"


def test_a_note_ends_the_line_of_its_key_even_where_the_value_is_the_default() -> None:
    text = contract_text(LLAMA, notes={"ffn.activation": "looked up", "roles.layer.attn_q": "wide"})
    assert 'activation = "silu"  # looked up\n' in text
    assert '"hidden_size"]  # wide\n' in text
    assert differences(parse_contract(text, "x.toml"), LLAMA) == []


def test_texts_with_quotes_and_control_characters_survive() -> None:
    strange = evolve(LLAMA, description='a "b" \\ \t \x7f é \u202e \U000e0041', ignored=("x y",))
    text = contract_text(strange)
    assert parse_contract(text, "x.toml") == strange
    assert all(line.isprintable() for line in text.splitlines())


def test_contracts_differ_where_one_says_more_or_something_else() -> None:
    other = evolve(
        LLAMA,
        rope=None,
        ffn=evolve(LLAMA.ffn, activation="relu"),
        layer_roles={key: role for key, role in LLAMA.layer_roles.items() if key != "attn_q_norm"},
    )
    found = {difference.key: difference for difference in differences(LLAMA, other)}
    assert found["ffn.activation"] == Difference("ffn.activation", "silu", "relu")
    assert found["rope.style"] == Difference("rope.style", "adjacent", None)
    assert found["roles.layer.attn_q_norm"] == Difference("roles.layer.attn_q_norm", "{ forbidden = true }", None)
    assert differences(other, other) == []


def test_the_order_of_fused_parts_is_a_difference_and_that_of_roles_is_none() -> None:
    parts = {"attn_q": Expression("1"), "attn_k": Expression("2")}
    role = evolve(LLAMA.layer_roles["attn_q"], split=parts)
    turned = evolve(role, split=dict(reversed(list(parts.items()))))
    first, second = (evolve(LLAMA, layer_roles={**LLAMA.layer_roles, "attn_q": changed}) for changed in (role, turned))
    assert [found.key for found in differences(first, second)] == ["roles.layer.attn_q"]
    assert differences(LLAMA, evolve(LLAMA, layer_roles=dict(reversed(list(LLAMA.layer_roles.items()))))) == []
