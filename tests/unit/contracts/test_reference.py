"""The contract reference says everything that the vocabulary can say, and nothing else."""

from __future__ import annotations

from pathlib import Path

import pytest
from attrs import fields

from mortice.arch_contracts import schema
from mortice.arch_contracts.reference import attribute_texts, contract_reference

PAGE = Path(__file__).resolve().parents[3] / "docs" / "reference" / "contracts.md"
CLASSES = [getattr(schema, name) for name in schema.__all__ if hasattr(getattr(schema, name), "__attrs_attrs__")]


@pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: cls.__name__)
def test_every_field_of_the_vocabulary_is_described(cls: type) -> None:
    texts = attribute_texts(cls)
    assert list(texts) == [attribute.name for attribute in fields(cls)]
    assert all(len(text) > 5 for text in texts.values())


def test_the_vocabulary_has_the_classes_this_test_knows() -> None:
    assert len(CLASSES) == 14


def test_the_page_is_up_to_date() -> None:
    wanted = contract_reference()
    assert PAGE.read_text(encoding="utf-8") == wanted, "run: python -m mortice.arch_contracts.reference > the page"


def test_the_readme_lists_every_family_with_its_architectures() -> None:
    readme = (PAGE.parents[2] / "README.md").read_text(encoding="utf-8")
    for contract in schema.builtin_contracts():
        assert f"| {contract.name} | {', '.join(f'`{name}`' for name in contract.architectures)} |" in readme


def test_the_page_names_every_role_and_table() -> None:
    page = contract_reference()
    for name in (*schema.GLOBAL_ROLES, *schema.LAYER_ROLES, *schema.STANDARD_HYPERPARAMETERS):
        assert f"`{name}`" in page
    for table in ("contract", "norm", "attention", "rope", "ffn", "embedding", "residual", "output"):
        assert f"## `[{table}]`" in page
