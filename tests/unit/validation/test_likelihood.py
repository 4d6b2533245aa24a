"""Readings of a draft, measured: clear ones are taken, others stay open."""

from __future__ import annotations

from pathlib import Path

import pytest
from attrs import evolve

from mortice.arch_contracts.schema import Contract, parse_contract
from mortice.core.contracts.derive import Draft, derive_contract
from mortice.core.errors import UnsupportedError
from mortice.core.validation import likelihood
from mortice.core.validation.likelihood import measure_draft
from tests.support.models import smollm2_path
from tests.support.registry import make_registry
from tests.support.tiny import tiny

REGISTRY = make_registry()


def draft_of(path: Path) -> Draft:
    with REGISTRY.open_model(path) as file:
        return derive_contract(file)


@pytest.fixture
def draft(tmp_path: Path) -> Draft:
    """A draft in which RoPE's style and the activation are open."""
    return draft_of(tiny(tmp_path))


def pretend(monkeypatch: pytest.MonkeyPatch, nats: dict[tuple[str, str], float], other: float = 9.0) -> list[str]:
    """Measurements that give `nats` for (style, activation); what was measured."""
    asked: list[str] = []

    def measured(contract: Contract, path: Path, registry: object) -> tuple[float, float]:
        assert contract.rope is not None
        asked.append(f"{contract.rope.style} {contract.ffn.activation}")
        return nats.get((contract.rope.style, contract.ffn.activation), other), 10.0

    monkeypatch.setattr(likelihood, "_nats", measured)
    return asked


def test_a_clear_reading_is_taken_with_what_was_measured(monkeypatch: pytest.MonkeyPatch, draft: Draft) -> None:
    asked = pretend(monkeypatch, {("halves", "relu"): 3.0, ("halves", "silu"): 5.0, ("adjacent", "relu"): 5.5})
    told: list[str] = []
    found = measure_draft(draft, Path("m"), REGISTRY, told.append)
    assert found.unknown == {}
    contract = parse_contract(found.text("m"), "m.toml")
    assert contract.rope is not None
    assert (contract.rope.style, contract.ffn.activation) == ("halves", "relu")
    assert found.notes["rope.style"] == "measured: 3.00 nats a token, 5.50 with adjacent"
    assert len(told) == len(asked) == len(set(asked)), "each reading is run once"


def test_what_makes_no_clear_difference_stays_open(monkeypatch: pytest.MonkeyPatch, draft: Draft) -> None:
    pretend(monkeypatch, {("adjacent", "gelu_tanh"): 3.0, ("adjacent", "gelu_erf"): 3.01})
    found = measure_draft(draft, Path("m"), REGISTRY)
    assert found.unknown.keys() == {"ffn.activation"}
    assert found.unknown["ffn.activation"].endswith("3.00 nats a token, 3.01 with gelu_erf, no clear difference")
    assert found.contract.rope is not None
    assert found.contract.rope.style == "adjacent"


def test_weights_that_were_never_trained_decide_nothing(tmp_path: Path) -> None:
    path = tiny(tmp_path)
    found = measure_draft(draft_of(path), path, REGISTRY)
    assert found.unknown.keys() == {"rope.style", "ffn.activation"}
    assert "little better than chance" in found.unknown["rope.style"]


def test_other_open_keys_have_to_be_filled_in_first(draft: Draft) -> None:
    more = evolve(draft, unknown={**draft.unknown, "norm.eps": "the file has no epsilon"})
    with pytest.raises(UnsupportedError, match="cannot be measured"):
        measure_draft(more, Path("m"), REGISTRY)


def test_a_draft_without_gaps_is_left_as_it_is(draft: Draft) -> None:
    closed = evolve(draft, unknown={})
    assert measure_draft(closed, Path("m"), REGISTRY) == closed


@pytest.mark.slow
def test_the_weights_of_a_real_model_tell_style_and_activation() -> None:
    path = smollm2_path()
    found = measure_draft(draft_of(path), path, REGISTRY)
    assert found.unknown == {}
    assert found.contract.rope is not None
    assert (found.contract.rope.style, found.contract.ffn.activation) == ("adjacent", "silu")
