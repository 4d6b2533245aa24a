"""``mortice run --record`` and ``mortice replay``."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from attrs import evolve

from mortice.core.cli import run as running
from mortice.core.errors import ModelFileError
from mortice.core.record import read_record
from mortice.core.stages import open_file
from mortice.plugins.executors.reference.runtime import ReferenceRuntime
from tests.support.hf_folders import write_folder
from tests.support.tiny import REGISTRY
from tests.unit.cli.conftest import Mortice

ASKED = ("--prompt", "The joint is cut", "--max-tokens", 12, "--temperature", 1.1, "--no-stop-at-eos")


@pytest.fixture
def record(mortice: Mortice, tiny: Path, tmp_path: Path) -> Path:
    """The record of a sampled answer."""
    path = tmp_path / "run.json"
    assert mortice("run", "-m", tiny, *ASKED, "--record", path).code == 0
    return path


def changed(record: Path, change: Callable[[dict[str, Any]], Any]) -> Path:
    document = json.loads(record.read_text())
    change(document)
    path = record.with_name("changed.json")
    path.write_text(json.dumps(document))
    return path


def test_a_sampled_run_is_repeated_token_for_token(mortice: Mortice, record: Path) -> None:
    ran = mortice("replay", record, "--json", "--quiet")
    assert ran.code == 0
    found: dict[str, Any] = {"equal": True, "equal_tokens": 12, "difference": None, "logprob_drift": 0.0, "changes": []}
    assert ran.json == found


def test_a_person_is_told_that_it_was_equal(mortice: Mortice, record: Path) -> None:
    ran = mortice("replay", record, "--quiet")
    assert (ran.code, ran.err) == (0, "")
    assert ran.out.startswith("equal: ")
    assert "12 of the answer; log-probabilities differ by at most 0" in ran.out


def test_the_record_holds_what_was_run(mortice: Mortice, record: Path, tiny: Path) -> None:
    found = read_record(record)
    ran = mortice("run", "-m", tiny, *ASKED, "--seed", found.config.sampling.seed, "--json").json
    assert [token.id for token in found.tokens] == ran["ids"]
    assert [token.logprob for token in found.tokens] == ran["logprobs"]
    assert found.config.prompt.text == "The joint is cut"
    (file,) = found.files
    assert file.sha256 == hashlib.sha256(tiny.read_bytes()).hexdigest()
    assert found.environment.executor["executor"] == "reference"
    assert "ops.py" in found.environment.code
    assert found.environment.program["plugin loaders-gguf"].startswith("mortice ")


def test_the_first_token_that_differs_is_named_with_both_texts(mortice: Mortice, record: Path) -> None:
    tokens = read_record(record).tokens
    other = (tokens[7].id + 1) % 300
    path = changed(record, lambda it: it["tokens"][7].update(id=other, text="other"))
    ran = mortice("replay", path, "--quiet")
    assert ran.code == 1
    assert ran.out == (
        f"token 7 of the answer differs: recorded {other} 'other', now {tokens[7].id} {tokens[7].text!r}\n"
    )
    found = mortice("replay", path, "--json").json
    assert (found["equal"], found["equal_tokens"]) == (False, 7)
    assert found["difference"]["position"] == 7
    assert found["difference"]["now"]["id"] == tokens[7].id


def test_an_answer_that_ends_earlier_or_later_differs_at_its_end(mortice: Mortice, record: Path) -> None:
    tokens = read_record(record).tokens
    shorter = mortice("replay", changed(record, lambda it: it["tokens"].pop()), "-q")
    assert (shorter.code, "recorded the end, now " in shorter.out) == (1, True)
    longer = mortice("replay", changed(record, lambda it: it["tokens"].append(it["tokens"][0])), "-q")
    assert longer.code == 1
    assert longer.out == f"token 12 of the answer differs: recorded {tokens[0].id} {tokens[0].text!r}, now the end\n"


def test_a_prompt_that_is_tokenized_otherwise_is_a_difference_too(mortice: Mortice, record: Path) -> None:
    ran = mortice("replay", changed(record, lambda it: it["prompt"].append(7)), "--quiet")
    assert ran.code == 1
    assert "of the prompt differs: recorded 7" in ran.out


def test_another_seed_gives_another_answer(mortice: Mortice, record: Path) -> None:
    path = changed(record, lambda it: it["config"]["sampling"].update(seed=it["config"]["sampling"]["seed"] + 1))
    assert mortice("replay", path, "--quiet").code == 1


def test_a_model_that_was_changed_is_refused_by_its_hash(mortice: Mortice, record: Path, tiny: Path) -> None:
    data = bytearray(tiny.read_bytes())
    data[-1] ^= 1
    other = record.with_name("tiny.gguf")
    other.write_bytes(data)
    ran = mortice("replay", record, "--model", other)
    assert ran.code == 2
    assert f"{other}: SHA-256 is " in ran.err
    assert "it is not the model that was run" in ran.err


def test_a_model_of_another_size_is_refused(mortice: Mortice, record: Path, tiny: Path) -> None:
    other = record.with_name("tiny.gguf")
    other.write_bytes(tiny.read_bytes() + bytes(64))
    ran = mortice("replay", record, "--model", other)
    assert ran.code == 2
    assert f"has {other.stat().st_size} bytes, the record says {tiny.stat().st_size}" in ran.err


def test_a_model_that_was_moved_is_found_with_the_flag(mortice: Mortice, record: Path, tiny: Path) -> None:
    moved = record.with_name("tiny.gguf")
    moved.write_bytes(tiny.read_bytes())
    path = changed(record, lambda it: it["config"]["model"].update(path="/nowhere/tiny.gguf"))
    ran = mortice("replay", path)
    assert (ran.code, "/nowhere/tiny.gguf: no such file or folder; --model PATH says where" in ran.err) == (2, True)
    assert mortice("replay", path, "--model", moved).code == 0


def test_a_model_under_another_name_is_known_by_what_is_in_it(mortice: Mortice, record: Path, tiny: Path) -> None:
    renamed = record.with_name("renamed.gguf")
    renamed.write_bytes(tiny.read_bytes())
    assert mortice("replay", record, "--model", renamed).code == 0
    renamed.write_bytes(tiny.read_bytes() + bytes(64))
    ran = mortice("replay", record, "--model", renamed)
    assert (ran.code, f"{renamed}: has {renamed.stat().st_size} bytes, the record says" in ran.err) == (2, True)


def test_files_of_a_folder_may_have_other_names_but_none_may_differ_or_be_added(
    mortice: Mortice, tiny: Path, tmp_path: Path
) -> None:
    with open_file(REGISTRY, tiny) as file:
        folder = write_folder(tmp_path / "hf", file, "BF16")
    path = tmp_path / "run.json"
    assert mortice("run", folder, *ASKED, "--record", path).code == 0
    recorded = read_record(path)
    renamed = [evolve(file, name=f"other-{file.name}") for file in reversed(recorded.files)]
    recorded.require_files(renamed, folder)
    for found, message in (
        (renamed[1:], f"{folder}: has no file like {recorded.files[-1].name} of the record"),
        ([*renamed, evolve(renamed[0], name="more", nbytes=1)], "more: is not among the model's files in the record"),
        ([evolve(renamed[0], sha256="0" * 64), *renamed[1:]], "SHA-256 is 000000000000…, the record says "),
    ):
        with pytest.raises(ModelFileError, match=re.escape(message)):
            recorded.require_files(found, folder)


def test_a_contract_that_was_moved_is_found_with_the_flag(mortice: Mortice, tiny: Path, tmp_path: Path) -> None:
    own, moved, path = tmp_path / "own.toml", tmp_path / "moved.toml", tmp_path / "run.json"
    own.write_text((Path(__file__).parents[3] / "arch_contracts" / "llama.toml").read_text())
    assert mortice("run", "-m", tiny, *ASKED, "--contract", own, "--record", path).code == 0
    own.rename(moved)
    ran = mortice("replay", path)
    assert (ran.code, ran.err) == (
        2,
        f"mortice: error: {own}: no such file or folder; --contract PATH says where the contract of the run is now\n",
    )
    found = mortice("replay", path, "--contract", moved, "--json")
    assert (found.code, found.json["changes"]) == (0, [])
    moved.write_text(moved.read_text().replace('name = "llama"', 'name = "lama"'))
    changes = mortice("replay", path, "--contract", moved, "--json").json["changes"]
    assert any(change.startswith("contract lama: recorded with none, now ") for change in changes)


def test_another_choice_by_measurement_is_named(
    mortice: Mortice, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "run.json"
    for rows in (16, 8):
        choice = {"products by rings": f"to {rows} rows"}
        monkeypatch.setattr(ReferenceRuntime, "measured_choices", lambda _, choice=choice: choice, raising=False)
        if rows == 16:
            assert mortice("run", "-m", tiny, *ASKED, "--record", path).code == 0
            assert mortice("replay", path, "--json").json["changes"] == []
    ran = mortice("replay", path, "--json")
    assert ran.json["changes"] == ["products by rings: recorded with to 16 rows, now to 8 rows"]


def test_what_is_another_now_is_named(mortice: Mortice, record: Path) -> None:
    def older(document: dict[str, Any]) -> None:
        environment = document["environment"]
        environment["program"].update({"numpy": "1.0", "plugin acme": "acme 2.0"})
        environment["code"]["ops.py"] = "0" * 64
        environment["contract"]["llama"] = "1" * 64

    ran = mortice("replay", changed(record, older), "--json")
    assert ran.code == 0, "the tokens are the same"
    changes = ran.json["changes"]
    assert any(change.startswith("numpy: recorded with 1.0, now ") for change in changes)
    assert "plugin acme: recorded with acme 2.0, now none" in changes
    assert any(change.startswith("code of ops.py: recorded with 000000000000, now ") for change in changes)
    assert any(change.startswith("contract llama: recorded with 111111111111, now ") for change in changes)
    assert len(changes) == 4


def test_a_folder_quantised_at_load_is_recorded_with_all_its_files(
    mortice: Mortice, tiny: Path, tmp_path: Path
) -> None:
    with open_file(REGISTRY, tiny) as file:
        folder = write_folder(tmp_path / "hf", file, "BF16", shards=2)
    path = tmp_path / "run.json"
    assert mortice("run", folder, *ASKED, "--quantize", "Q8_0", "--record", path).code == 0
    assert {file.name for file in read_record(path).files} == {
        "config.json",
        "model.safetensors.index.json",
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    assert mortice("replay", path).code == 0
    (folder / "tokenizer_config.json").write_text((folder / "tokenizer_config.json").read_text() + " ")
    ran = mortice("replay", path)
    assert (ran.code, "tokenizer_config.json: has " in ran.err) == (2, True)


def test_a_prompt_from_standard_input_is_kept_as_text(mortice: Mortice, tiny: Path, tmp_path: Path) -> None:
    path = tmp_path / "run.json"
    assert mortice("run", "-m", tiny, "-p", "-", "-n", 3, "--record", path, stdin=b"hello\n").code == 0
    assert read_record(path).config.prompt.text == "hello"
    assert mortice("replay", path).code == 0


def test_biases_and_stops_survive_the_record(mortice: Mortice, tiny: Path, tmp_path: Path) -> None:
    path = tmp_path / "run.json"
    command = ("run", "-m", tiny, *ASKED, "--logit-bias", "9=-inf", "--logit-bias", "8=1.5", "--stop", "none", "--chat")
    assert mortice(*command, "--record", path).code == 0
    config = read_record(path).config
    assert config.sampling.logit_bias == {9: float("-inf"), 8: 1.5}
    assert (config.generation.stop, config.prompt.chat) == (("none",), True)
    assert mortice("replay", path).code == 0


@pytest.mark.parametrize("name", ["missing/run.json", "."])
def test_a_record_that_cannot_be_written_is_refused_before_the_run(
    name: str, mortice: Mortice, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(running, "planned", lambda *_: pytest.fail("the model was opened"))
    ran = mortice("run", "-m", tiny, *ASKED, "--record", tmp_path / name)
    assert (ran.code, "wanted the name of a file" in ran.err) == (2, True)


def test_an_interrupted_run_leaves_no_record(
    mortice: Mortice, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(running, "give_answer", interrupted)
    assert mortice("run", "-m", tiny, *ASKED, "--record", tmp_path / "run.json").code == 130
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("change", "wanted"),
    [
        (lambda it: it.pop("record"), "is no record of a run"),
        (lambda it: it.update(version=2), "found version 2 of the record, wanted 1"),
        (lambda it: it.pop("config"), "config: missing"),
        (lambda it: it["config"]["sampling"].update(temprature=1), "did you mean 'sampling.temperature'?"),
        (lambda it: it["config"]["sampling"].update(seed="7"), "sampling.seed"),
        (lambda it: it.pop("tokens"), "tokens: required, but not there"),
        (lambda it: it["tokens"][0].update(id="7"), "tokens.0.id: wanted an integer, found '7'"),
        (lambda it: it["files"][0].pop("sha256"), "files.0.sha256: required, but not there"),
        (lambda it: it.update(extra=1), "extra"),
    ],
)
def test_a_record_that_is_none_is_refused(
    change: Callable[[dict[str, Any]], Any], wanted: str, mortice: Mortice, record: Path
) -> None:
    ran = mortice("replay", changed(record, change))
    assert ran.code == 2
    assert wanted in ran.err
    assert "Traceback" not in ran.err


@pytest.mark.parametrize("data", [b"", b"\xff", b"[" * 100_000, b"[]"])
def test_a_file_that_is_no_json_is_refused(data: bytes, mortice: Mortice, tmp_path: Path) -> None:
    (tmp_path / "run.json").write_bytes(data)
    ran = mortice("replay", tmp_path / "run.json")
    assert (ran.code, ran.err.count("\n")) == (2, 1)


def test_a_record_is_never_written_over_the_model(mortice: Mortice, tiny: Path, tmp_path: Path) -> None:
    before = tiny.read_bytes()
    link = tmp_path / "link.json"
    link.symlink_to(tiny)
    for path, force in ((tiny, ()), (link, ()), (tiny, ("--force",))):
        ran = mortice("run", "-m", tiny, *ASKED, "--record", path, *force)
        assert ran.code == 2
        assert "is a file that this command reads" in ran.err
    assert tiny.read_bytes() == before


def test_a_record_is_never_written_over_a_file_of_a_models_folder(mortice: Mortice, tiny: Path, tmp_path: Path) -> None:
    with open_file(REGISTRY, tiny) as file:
        folder = write_folder(tmp_path / "hf", file, "BF16")
    ran = mortice("run", folder, *ASKED, "--record", folder / "config.json", "--force")
    assert (ran.code, "config.json: is a file that this command reads, wanted another" in ran.err) == (2, True)
    assert "model_type" in (folder / "config.json").read_text()


def test_a_record_is_overwritten_only_when_told(
    mortice: Mortice, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "run.json"
    path.write_text("mine")
    with monkeypatch.context() as patch:
        patch.setattr(running, "planned", lambda *_: pytest.fail("the model was opened"))
        ran = mortice("run", "-m", tiny, *ASKED, "--record", path)
    assert (ran.code, ran.err) == (
        2,
        f"mortice: error: --record: {path}: is there already; --force overwrites it\n",
    )
    assert path.read_text() == "mine"
    assert mortice("run", "-m", tiny, *ASKED, "--record", path, "--force").code == 0
    assert read_record(path).tokens


def test_what_is_no_file_is_not_replaced_by_a_record(mortice: Mortice, tiny: Path, tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    ran = mortice("run", "-m", tiny, *ASKED, "--record", pipe)
    assert (ran.code, pipe.is_fifo()) == (2, True)
    assert "a device, a pipe or a socket" in ran.err
    ran = mortice("run", "-m", tiny, *ASKED, "--record", tmp_path / ("n" * 300))
    assert ran.code == 2
    assert "File name too long" in ran.err


def test_a_record_that_cannot_be_written_leaves_the_old_one_alone(
    mortice: Mortice, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "run.json"
    path.write_text("mine")

    def full(self: Path, text: str, **_: object) -> None:
        self.write_bytes(text[:9].encode())
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Path, "write_text", full)
    ran = mortice("run", "-m", tiny, *ASKED, "--record", path, "--force", "-q")
    assert (ran.code, ran.err) == (1, f"mortice: error: {path}: cannot be written: No space left on device\n")
    assert path.read_text() == "mine"
    assert [found.name for found in tmp_path.iterdir()] == ["run.json"]


def test_a_folder_where_no_record_can_be_written_is_found_before_the_answer(
    mortice: Mortice, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "run.json"

    def read_only(*_: object, **__: object) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(Path, "touch", read_only)
    monkeypatch.setattr(running, "planned", lambda *_: pytest.fail("work was begun"))
    ran = mortice("run", "-m", tiny, *ASKED, "--record", path, "-q")
    assert (ran.code, ran.out, ran.err) == (
        1,
        "",
        f"mortice: error: {path}: cannot be written: Read-only file system\n",
    )


def test_a_link_to_a_record_stays_a_link_and_neighbours_stay(mortice: Mortice, tiny: Path, tmp_path: Path) -> None:
    target, link, neighbour = tmp_path / "kept.json", tmp_path / "link.json", tmp_path / ".link.json.part"
    link.symlink_to(target)
    neighbour.write_text("mine")
    assert mortice("run", "-m", tiny, *ASKED, "--record", link).code == 0
    assert link.is_symlink()
    assert read_record(target).tokens
    assert neighbour.read_text() == "mine"
    assert not list(tmp_path.glob(".mortice-*"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda it: it.update(version=True), "found version True"),
        (lambda it: it["config"].update(prompt={}), "config.prompt.text: missing"),
        (lambda it: it["tokens"][3].update(logprob=float("nan")), "found nan, wanted a finite number"),
    ],
    ids=["a version that is no number", "no prompt", "a logprob that is none"],
)
def test_an_edited_record_is_refused_and_not_called_different(
    mortice: Mortice, record: Path, change: Callable[[dict[str, Any]], Any], message: str
) -> None:
    ran = mortice("replay", changed(record, change))
    assert ran.code == 2
    assert message in ran.err


def test_what_is_no_file_is_refused_at_once(mortice: Mortice, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path, message in (
        (tmp_path / "pipe", "wanted a regular file, found a FIFO"),
        ("/dev/zero", "wanted a regular file, found a device"),
        (tmp_path, "Is a directory"),
        ("", "found '', wanted a path"),
    ):
        ran = mortice("replay", path)
        assert ran.code == 2
        assert message in ran.err


def test_a_record_with_a_key_twice_or_a_number_beyond_all_is_refused(mortice: Mortice, record: Path) -> None:
    text = record.read_text()
    for before, after, message in (
        ('"version": 1', '"version": 1, "version": 1', "stands there twice"),
        ('"logprob": -', '"logprob": 1e400, "was": -', "was"),
        ('"temperature": ', f'"temperature": 1{"0" * 400}, "was": ', "an integer has more than 64 bits"),
    ):
        record.write_text(text.replace(before, after, 1))
        ran = mortice("replay", record)
        assert ran.code == 2
        assert message in ran.err
