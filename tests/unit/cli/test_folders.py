"""Every command that takes a model takes a Hugging Face folder, and can quantise it."""

from __future__ import annotations

from pathlib import Path

import pytest

from mortice.core.stages import open_file
from tests.support.hf_folders import write_folder
from tests.support.tiny import REGISTRY
from tests.unit.cli.conftest import Mortice


@pytest.fixture
def folder(tiny: Path, tmp_path: Path) -> Path:
    with open_file(REGISTRY, tiny) as file:
        return write_folder(tmp_path / "hf", file, "BF16")


@pytest.mark.parametrize("how", [("--model",), ()])
def test_run_answers_from_a_folder(how: tuple[str, ...], mortice: Mortice, folder: Path, tiny: Path) -> None:
    asked = ("--prompt", "The joint", "--max-tokens", 4, "--json")
    assert len(mortice("run", *how, folder, *asked).json["ids"]) == 4


def test_validate_finds_the_folder_among_others(mortice: Mortice, folder: Path) -> None:
    (ran,) = mortice("validate", folder.parent, "--json").json
    assert ran["ok"]
    assert ran["path"] == str(folder)


@pytest.mark.parametrize("command", ["validate", "inspect"])
def test_what_is_quantised_is_noted(command: str, mortice: Mortice, folder: Path) -> None:
    ran = mortice(command, folder, "--quantize", "Q8_0")
    assert ran.code == 0
    assert "Q8_0" in ran.out


def test_inspect_shows_the_types_that_would_be_uploaded(mortice: Mortice, folder: Path) -> None:
    types = {row["type"] for row in mortice("inspect", folder, "--quantize", "Q4_0", "--json").json["types"]}
    assert types == {"Q4_0", "F32"}


def test_fit_counts_the_quantised_weights(mortice: Mortice, folder: Path) -> None:
    found = mortice("fit", folder, "--quantize", "Q8_0", "--executor", "reference", "--json").json
    assert set(found["weights_by_type"]) == {"Q8_0", "F32"}


def test_tokenize_gives_the_ids_of_the_gguf_file(mortice: Mortice, folder: Path, tiny: Path) -> None:
    ids = [mortice("tokenize", model, "The joint is tight.", "--json").json["ids"] for model in (folder, tiny)]
    assert ids[0] == ids[1]


def test_a_type_that_is_none_is_refused_with_those_there_are(mortice: Mortice, folder: Path) -> None:
    for command in ("validate", "inspect", "fit"):
        ran = mortice(command, folder, "--quantize", "Q9")
        assert ran.code == 2
        assert "model.quantize: unknown 'Q9'; have none, Q4_0, Q8_0 (from flag --quantize)" in ran.err


def test_a_config_says_it_too(mortice: Mortice, folder: Path) -> None:
    config = folder.parent / "run.toml"
    config.write_text('[model]\npath = "hf"\nquantize = "Q8_0"\n[prompt]\ntext = "a"\n[generation]\nmax_tokens = 1\n')
    ran = mortice("run", config)
    assert ran.code == 0
    assert "15 matrices become Q8_0" in ran.err
