"""``mortice config init|schema|show``."""

from __future__ import annotations

import json
import re
import tomllib
from pathlib import Path

import pytest

from mortice.core.cli.config_text import commented_toml, json_schema, toml_text
from mortice.core.config import RunConfig
from mortice.core.config_keys import config_keys
from mortice.core.config_layers import read_config
from tests.unit.cli.conftest import Mortice


def test_init_writes_a_config_that_changes_nothing(mortice: Mortice, tmp_path: Path) -> None:
    path = tmp_path / "run.toml"
    ran = mortice("config", "init", path)
    assert (ran.code, "set model.path and prompt.text in it" in ran.err) == (0, True)
    assert read_config(path) == RunConfig()
    assert mortice("config", "init").out == path.read_text()


def test_what_init_writes_holds_every_key_and_is_right_without_its_comments(tmp_path: Path) -> None:
    path = tmp_path / "run.toml"
    path.write_text(re.sub(r"^# (\w+ = )", r"\1", commented_toml(), flags=re.MULTILINE))
    keys = {f"{table}.{key}" for table, content in tomllib.loads(path.read_text()).items() for key in content}
    assert keys == set(config_keys())
    assert read_config(path).model.path == tmp_path / "model.gguf"


def test_init_does_not_overwrite_unless_told_to(mortice: Mortice, tmp_path: Path) -> None:
    path = tmp_path / "run.toml"
    path.write_text("mine")
    ran = mortice("config", "init", path)
    assert (ran.code, ran.err) == (2, f"mortice: error: {path}: is there already; --force overwrites it\n")
    assert path.read_text() == "mine"
    assert mortice("config", "init", path, "--force").code == 0
    assert read_config(path) == RunConfig()


def test_init_into_a_folder_that_is_not_there_is_refused(mortice: Mortice, tmp_path: Path) -> None:
    assert mortice("config", "init", tmp_path / "no" / "run.toml").code == 2


def test_the_json_schema_has_every_key_with_type_and_description(mortice: Mortice) -> None:
    schema = json.loads(mortice("config", "schema", "--format", "json").out)
    assert schema == json_schema()
    properties = {
        f"{table}.{key}": content
        for table, tables in schema["properties"].items()
        for key, content in tables["properties"].items()
    }
    assert properties.keys() == config_keys().keys()
    assert all(content["description"] and ("type" in content or "enum" in content) for content in properties.values())


def test_the_reference_in_markdown_has_every_key(mortice: Mortice) -> None:
    out = mortice("config", "schema").out
    for key in config_keys().values():
        assert f"| `{key.name}` | {key.type_text} |" in out


def test_show_says_where_every_value_came_from(
    mortice: Mortice, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tmp_path / "run.toml"
    config.write_text("[sampling]\ntop_k = 5\ntemperature = 1.5\n")
    monkeypatch.setenv("MORTICE_SAMPLING_TEMPERATURE", "0.5")
    found = mortice("config", "show", config, "-m", tiny, "--set", "limits.memory_mib=100", "--json").json
    assert found.keys() == config_keys().keys()
    origins = {key: (entry["value"], entry["from"], entry["source"]) for key, entry in found.items()}
    assert origins["sampling.top_k"] == (5, "file", str(config))
    assert origins["sampling.temperature"] == (0.5, "environment", "MORTICE_SAMPLING_TEMPERATURE")
    assert origins["limits.memory_mib"] == (100, "flag", "--set limits.memory_mib")
    assert origins["model.path"] == (str(tiny), "flag", "--model")
    assert origins["sampling.min_p"] == (0.0, "default", None)


def test_show_says_which_plugin_serves_a_value(mortice: Mortice, tiny: Path) -> None:
    found = mortice("config", "show", "-m", tiny, "--executor", "reference", "--json").json
    served = {key: entry["served_by"] for key, entry in found.items() if entry["served_by"]}
    assert served == {
        "executor.name": "reference of plugin executors-reference (asked for)",
        "upload.strategy": "host of plugin uploads-host",
        "model.path": "loader of plugin loaders-gguf",
        "model.contract": "llama of plugin archs",
    }


def test_show_says_where_nobody_can_serve_a_value(mortice: Mortice, tmp_path: Path) -> None:
    ran = mortice("config", "show", "-m", tmp_path / "none.gguf", "--executor", "abacus", "--json")
    assert ran.code == 0
    assert "unknown 'abacus'" in ran.json["executor.name"]["served_by"]
    assert "no such file" in ran.json["model.path"]["served_by"]


def test_show_prints_one_line_a_key_for_a_person(mortice: Mortice) -> None:
    lines = mortice("config", "show").out.splitlines()
    assert [line.split()[0] for line in lines] == ["key", *config_keys()]


@pytest.mark.parametrize(
    "value", [True, 3, -0.5, float("-inf"), 'a"b\\c\n\x7f\x01ü', ("a", "b"), {"1": 2.0}, {}, (), {"a b": "c"}]
)
def test_toml_that_is_shown_reads_back_as_it_was(value: object) -> None:
    back = tomllib.loads(f"x = {toml_text(value)}")["x"]
    assert back == (list(value) if isinstance(value, tuple) else value)
