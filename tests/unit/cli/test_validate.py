"""``mortice validate`` as it is used before deployment: folders, formats, ``--strict``, ``--deep``."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from xml.etree import ElementTree as ET

import numpy as np
import pytest

from mortice.core import stages
from mortice.core.cli.validate import validate
from mortice.core.errors import ConfigError
from mortice.core.model.types import ModelFile
from mortice.core.plugin.registry import make_registry
from mortice.core.testing.gguf_files import TensorData
from mortice.core.testing.tiny_models import write_tiny_model
from tests.support.registry import make_registry as registry_with
from tests.support.registry import plugin_of
from tests.support.tiny import CONTRACTS, rewritten
from tests.unit.cli.conftest import Mortice

ROOT = Path(__file__).resolve().parents[3]
BAD_TEMPLATE = {"tokenizer.chat_template": "{{ messages[0].content }}{{ messages.__class__ }}"}


@pytest.fixture
def suspicious(tmp_path: Path) -> Path:
    """A model whose template reaches for a class: warnings, no error."""
    return write_tiny_model(tmp_path / "suspicious.gguf", CONTRACTS["llama"], metadata=BAD_TEMPLATE)


def with_nan(path: Path) -> Path:
    """A copy with a NaN in one weight."""

    def change(tensor: TensorData) -> list[TensorData]:
        if tensor.name == "blk.1.ffn_up.weight":
            tensor.data[:4] = np.array([np.nan], "<f4").view(np.uint8)
        return [tensor]

    return rewritten(path, change)


def test_a_folder_is_validated_with_a_line_for_each_model(mortice: Mortice, tiny: Path, tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    for name in ("a/1.gguf", "2.gguf"):
        (tmp_path / name).write_bytes(tiny.read_bytes())
    (tmp_path / "notes.txt").write_text("no model")
    ran = mortice("validate", tmp_path)
    assert ran.code == 0
    assert [line for line in ran.out.splitlines() if not line.startswith(" ")] == [
        f"{tmp_path}/2.gguf: valid against contract llama, no findings",
        f"{tmp_path}/a/1.gguf: valid against contract llama, no findings",
        "2 models, none refused",
    ]


def test_a_folder_without_models_is_refused(mortice: Mortice, tmp_path: Path) -> None:
    ran = mortice("validate", tmp_path)
    assert (ran.code, ran.out) == (
        2,
        f"{tmp_path}: refused\n  {tmp_path}: no model in this folder, wanted at least one\n",
    )


def test_an_empty_path_is_a_finding_and_the_others_are_validated(mortice: Mortice, tiny: Path) -> None:
    ran = mortice("validate", "", tiny)
    assert ran.code == 2
    assert ran.out.startswith("'': refused\n  '': found no text, wanted a path\n")
    assert f"{tiny}: valid against contract llama" in ran.out
    found = mortice("validate", tiny, "", "--json").json
    assert [(result["path"], result["ok"]) for result in found] == [("''", False), (str(tiny), True)]


def test_a_truncated_download_is_named_with_the_bytes_missing(mortice: Mortice, tiny: Path, tmp_path: Path) -> None:
    cut = tmp_path / "cut.gguf"
    cut.write_bytes(tiny.read_bytes()[:-1000])
    ran = mortice("validate", cut)
    assert ran.code == 2
    found = re.search(r"(\d+) bytes are missing, (\d+) were expected in all", ran.out)
    assert found is not None
    assert 1000 - 32 <= int(found[1]) <= 1000
    assert int(found[2]) == len(tiny.read_bytes()) - 1000 + int(found[1])


def test_a_download_cut_short_in_its_header_says_how_many_bytes_it_lacks_at_least(
    mortice: Mortice, tiny: Path, tmp_path: Path
) -> None:
    cut = tmp_path / "cut.gguf"
    cut.write_bytes(tiny.read_bytes()[:2000])
    ran = mortice("validate", cut)
    assert (ran.code, "bytes are missing (an interrupted download?)" in ran.out) == (2, True)


def test_a_git_lfs_pointer_in_the_place_of_a_model_is_called_that(mortice: Mortice, tmp_path: Path) -> None:
    for name in ("model.gguf", "model.bin"):
        (tmp_path / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 7\n")
        ran = mortice("validate", tmp_path / name)
        assert (ran.code, "a Git LFS pointer" in ran.out) == (2, True)


def test_warnings_refuse_only_where_strict(mortice: Mortice, suspicious: Path) -> None:
    relaxed = mortice("validate", suspicious)
    assert relaxed.code == 0
    assert "template.suspicious" in relaxed.out
    assert "line 1: the attribute '__class__'" in relaxed.out
    strict = mortice("validate", suspicious, "--strict")
    assert strict.code == 2
    assert "refused by --strict" in strict.out


def test_notes_never_refuse(mortice: Mortice, tmp_path: Path) -> None:
    path = write_tiny_model(
        tmp_path / "m.gguf", CONTRACTS["llama"], metadata={"tokenizer.chat_template": "{{ messages[-1].content }}"}
    )
    ran = mortice("validate", path, "--strict")
    assert (ran.code, "template.prompt" in ran.out) == (0, True)


def test_the_template_is_named_by_hash_and_family(mortice: Mortice, tiny: Path) -> None:
    assert re.search(r"\n  chat template [0-9a-f]{12}: not among the known ones\n", mortice("validate", tiny).out)
    (found,) = mortice("validate", tiny, "--json").json
    assert found["template"]["known"] is None
    assert len(found["template"]["sha256"]) == 64


# data ------------------------------------------------------------------------------------------------------------


def test_data_are_read_only_when_asked_for(mortice: Mortice, tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from mortice.core.model.types import TensorView

    broken = with_nan(tiny)
    ran = mortice("validate", broken, "--deep")
    assert ran.code == 2
    assert re.search(r"data.not_finite +blk.1.ffn_up.weight \(byte \d+\) +1 of 128 rows, the first is row 0:", ran.out)
    assert re.search(r"of tensor data checked in [0-9.]+ s, [0-9.]+ GB/s\n", ran.err)

    def refuse(self: TensorView, *_: object) -> None:
        raise AssertionError("data were read")

    monkeypatch.setattr(TensorView, "read_into", refuse)
    assert mortice("validate", broken).code == 0
    assert mortice("validate", broken, "--deep").code == 1, "the trap works"


def test_a_deep_run_says_how_much_it_read(mortice: Mortice, tiny: Path) -> None:
    (found,) = mortice("validate", tiny, "--deep", "--json").json
    with make_registry().open_model(tiny) as file:
        assert found["data"]["bytes"] == file.tensor_bytes
    assert mortice("validate", tiny, "--json").json[0]["data"] is None


def test_data_are_checked_even_where_no_contract_serves(mortice: Mortice, tmp_path: Path, tiny: Path) -> None:
    broken = with_nan(tiny)
    data = broken.read_bytes().replace(b"llama", b"lhama", 1)
    broken.write_bytes(data)
    ran = mortice("validate", broken, "--deep")
    assert "unknown architecture 'lhama'" in ran.out
    assert "data.not_finite" in ran.out


# formats ---------------------------------------------------------------------------------------------------------


def test_every_format_is_one_document_with_the_same_exit_code(
    mortice: Mortice, suspicious: Path, tmp_path: Path
) -> None:
    (tmp_path / "cut.gguf").write_bytes(suspicious.read_bytes()[:500])
    runs = {form: mortice("validate", tmp_path, "--format", form) for form in ("text", "json", "sarif", "junit")}
    assert {ran.code for ran in runs.values()} == {2}
    assert len(runs["json"].json) == 2
    assert {result["level"] for result in runs["sarif"].json["runs"][0]["results"]} >= {"error", "warning"}
    assert len(ET.fromstring(runs["junit"].out)) == 2


def test_json_has_two_spellings_and_no_third(mortice: Mortice, tiny: Path) -> None:
    drop = r'"seconds": [0-9.e-]+'
    first, second = mortice("validate", tiny, "--json"), mortice("validate", tiny, "--json", "--format", "json")
    assert re.sub(drop, "", first.out) == re.sub(drop, "", second.out)
    ran = mortice("validate", tiny, "--json", "--format", "sarif")
    assert (ran.code, ran.json["error"]["message"]) == (2, "--json and --format sarif: found both, wanted one")


def test_a_wrong_contract_is_said_once_and_before_any_model(mortice: Mortice, tiny: Path, tmp_path: Path) -> None:
    (tmp_path / "my.toml").write_text("[contract]\n")
    ran = mortice("validate", tiny, tiny, "--contract", tmp_path / "my.toml")
    assert (ran.code, ran.out) == (2, "")
    assert ran.err.startswith(f"mortice: error: {tmp_path}/my.toml: ")


def test_a_contract_of_another_architecture_is_a_warning_for_it_was_asked_for(
    mortice: Mortice, tiny: Path, tmp_path: Path
) -> None:
    text = (ROOT / "arch_contracts" / "llama.toml").read_text(encoding="utf-8")
    own = tmp_path / "own.toml"
    own.write_text(re.sub(r"(?m)^architectures = .*$", 'architectures = ["qwen2"]', text), encoding="utf-8")
    ran = mortice("validate", tiny, "--contract", own)
    assert ran.code == 0
    assert "was made for qwen2" in ran.out
    assert ran.out.count("contract.architecture") == 1
    assert mortice("validate", tiny, "--contract", own, "--strict").code == 2


# plugins ---------------------------------------------------------------------------------------------------------


def fail_to_validate(model: object, contract: object) -> None:
    raise RuntimeError("boo")


def fail_on_event(event: object) -> None:
    raise RuntimeError("boo")


@pytest.mark.parametrize(
    ("hook", "function"), [("mortice_validate", fail_to_validate), ("mortice_on_event", fail_on_event)]
)
def test_a_plugin_that_fails_is_named_in_one_line_with_exit_code_2(
    mortice: Mortice, tiny: Path, monkeypatch: pytest.MonkeyPatch, hook: str, function: Callable[..., None]
) -> None:
    registry = registry_with({"acme": plugin_of(**{hook: function})})
    monkeypatch.setattr(stages, "registry_for", lambda _: registry)
    ran = mortice("validate", tiny)
    assert ran.code == 2
    assert [line for line in ran.out.splitlines() if "boo" in line] == [
        f"  plugin acme (given): {hook}: RuntimeError: boo"
    ]
    assert "Traceback" not in ran.out + ran.err
    assert ran.out.splitlines()[0] == f"{tiny}: not validated, a plugin is at fault"


def test_the_traceback_of_a_plugins_fault_is_shown_with_debug(
    mortice: Mortice, tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    registry = registry_with({"acme": plugin_of(mortice_validate=fail_to_validate)})
    monkeypatch.setattr(stages, "registry_for", lambda _: registry)
    ran = mortice("validate", tiny, "--debug")
    assert ran.code == 2
    assert "in fail_to_validate\n" in ran.err
    assert "in fail_to_validate\n" in mortice("validate", tiny, "--debug", "--json").err


def test_a_plugins_fault_is_not_counted_as_a_refused_model(
    mortice: Mortice, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def only_for_qwen3(model: ModelFile) -> object:
        return "abc" if model.architecture == "qwen3" else []

    registry = registry_with({"acme": plugin_of(mortice_validate=only_for_qwen3)})
    monkeypatch.setattr(stages, "registry_for", lambda _: registry)
    other = write_tiny_model(tmp_path / "qwen3.gguf", CONTRACTS["qwen3"])
    ran = mortice("validate", tiny, other, tmp_path / "none.gguf")
    assert ran.code == 2
    assert ran.out.splitlines()[-1] == "3 models, 1 refused, 1 not validated"


def test_an_error_of_ours_that_a_plugin_raises_names_the_plugin(
    mortice: Mortice, tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def validate_with(model: ModelFile) -> object:
        raise ConfigError("acme.rules: no such file")

    registry = registry_with({"acme": plugin_of(mortice_validate=validate_with)})
    monkeypatch.setattr(stages, "registry_for", lambda _: registry)
    lines = ["acme.rules: no such file", "raised by plugin acme (given) in mortice_validate"]
    assert mortice("validate", tiny).out.splitlines()[1:3] == [f"  {line}" for line in lines]
    assert mortice("validate", tiny, "--json").json[0]["error"]["message"].splitlines() == lines


# the hook of pre-commit ------------------------------------------------------------------------------------------


def test_the_hook_runs_a_command_that_exists_on_the_files_it_names() -> None:
    manifest = pytest.importorskip("yaml").safe_load((ROOT / ".pre-commit-hooks.yaml").read_text())
    (hook,) = manifest
    assert {"id", "name", "entry", "language", "files"} <= hook.keys()
    assert hook["entry"].split() == ["mortice", "validate", "--strict"]
    assert hook["entry"].split()[1] == validate.__name__
    assert re.search(hook["files"], "models/a.gguf")
    assert not re.search(hook["files"], "models/a.gguf.md")


def test_pre_commit_takes_the_manifest() -> None:
    client = pytest.importorskip("pre_commit.clientlib")
    assert [hook["id"] for hook in client.load_manifest(ROOT / ".pre-commit-hooks.yaml")] == ["mortice-validate"]


def test_the_results_of_two_runs_differ_in_nothing(mortice: Mortice, suspicious: Path) -> None:
    first, second = (mortice("validate", suspicious, "--format", "sarif").out for _ in range(2))
    assert json.loads(first) == json.loads(second)
