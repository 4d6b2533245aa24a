"""The contract reference has every field, role, hyperparameter and name that the vocabulary knows."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

import pytest
from attrs import fields, has

from mortice.arch_contracts import reference, schema
from mortice.arch_contracts.expressions import FUNCTIONS
from mortice.arch_contracts.structuring import toml_key

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "reference" / "contracts.md").read_text(encoding="utf-8")
SECTIONS = {
    "The tables": schema.ContractDocument,
    "`[contract]`": schema.ContractHead,
    "`[hyperparameters.NAME]`": schema.Hyperparameter,
    "`[norm]`": schema.NormSpec,
    "`[attention]`": schema.AttentionSpec,
    "`[rope]`": schema.RopeSpec,
    "`[ffn]`": schema.FfnSpec,
    "`[embedding]`": schema.EmbeddingSpec,
    "`[residual]`": schema.ResidualSpec,
    "`[output]`": schema.OutputSpec,
    "`[roles]`": schema.RoleTables,
    "`[roles.global.ROLE]` and `[roles.layer.ROLE]`": schema.RoleEntry,
}
RESULTS = {schema.Contract, schema.Role}
"""What a contract file is read into; nobody writes these."""
ROLES = {*schema.GLOBAL_ROLES, *schema.LAYER_ROLES}
EXPRESSION_NAMES = {*FUNCTIONS, "vocab_size", "layer", f"{schema.PRESENCE}ROLE"}


def sections(page: str) -> dict[str, str]:
    """The text under each heading."""
    _, *parts = re.split(r"^## ", page, flags=re.MULTILINE)
    return {heading: text for heading, _, text in (part.partition("\n") for part in parts)}


def faults(page: str) -> Iterator[str]:
    """What the vocabulary knows and the page does not say, or the other way round."""
    found = sections(page)
    for heading, cls in SECTIONS.items():
        told = dict(re.findall(r"^\| `(\w+)` \|(.+\| \S.{4,}) \|$", found.get(heading, ""), re.MULTILINE))
        hints = get_type_hints(cls)
        for attribute in fields(cls):
            key = toml_key(attribute.name)
            if key not in told:
                yield f"{heading}: {key}"
            else:
                yield from (
                    f"{heading}: {key} = {c}" for c in choices(hints[attribute.name]) if f"`{c}`" not in told[key]
                )
        yield from (f"{heading}: {key} is no field" for key in told.keys() - {toml_key(a.name) for a in fields(cls)})
    rows = re.findall(r"^\| `(\w+)` \|", found.get("Standard hyperparameters", ""), re.MULTILINE)
    yield from (f"hyperparameters: {name}" for name in schema.STANDARD_HYPERPARAMETERS if name not in rows)
    for heading, names in {"Expressions": EXPRESSION_NAMES, "Roles": ROLES}.items():
        yield from (f"{heading}: {name}" for name in sorted(names) if f"`{name}`" not in found.get(heading, ""))


def choices(kind: Any) -> Iterator[str]:
    """The words that a type allows, at any depth."""
    if get_origin(kind) is Literal:
        yield from get_args(kind)
    else:
        for inner in get_args(kind):
            yield from choices(inner)


def test_the_page_says_all_that_a_contract_can_say() -> None:
    assert list(faults(PAGE)) == []


def test_every_class_of_the_vocabulary_has_a_section() -> None:
    classes = {thing for name in schema.__all__ if isinstance(thing := getattr(schema, name), type) and has(thing)}
    assert classes == {*SECTIONS.values()} | RESULTS


def test_a_line_that_is_missing_is_noticed() -> None:
    rows = [line for line in PAGE.splitlines() if re.match(r"\| `\w+` \|", line)]
    assert len(rows) > 50
    assert [row for row in rows if not list(faults(PAGE.replace(f"{row}\n", "", 1)))] == []


@pytest.mark.parametrize("heading", ["Roles", "Expressions"])
def test_a_name_that_is_missing_is_noticed(heading: str) -> None:
    text = sections(PAGE)[heading]
    names = (ROLES if heading == "Roles" else EXPRESSION_NAMES) & set(re.findall(r"`(\w+)`", text))
    assert len(names) >= 9
    for name in names:
        assert list(faults(PAGE.replace(text, text.replace(f"`{name}`", "")))) == [f"{heading}: {name}"]


def test_a_choice_that_is_missing_is_noticed() -> None:
    page = PAGE.replace("`silu` or `gelu_tanh` or", "`silu` or")
    assert list(faults(page)) == ["`[ffn]`: activation = gelu_tanh"]


def test_the_page_cannot_be_made_while_a_field_has_no_text(monkeypatch: pytest.MonkeyPatch) -> None:
    text = schema.NormSpec.__doc__ or ""
    monkeypatch.setattr(schema.NormSpec, "__doc__", re.sub(r"^ +eps:.*\n", "", text, flags=re.MULTILINE))
    with pytest.raises(KeyError, match="eps"):
        reference.contract_reference()
