"""``mortice run``."""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
from pathlib import Path

import pytest

import mortice as package
from mortice.core.cli import answer as answers
from mortice.core.cli.render import json_text
from mortice.core.session import Session
from tests.support.models import smollm2_path
from tests.unit.cli.conftest import Mortice


def test_the_answer_is_all_there_is_on_standard_output(mortice: Mortice, tiny: Path) -> None:
    ran = mortice("run", "--model", tiny, "--prompt", "hello", "--max-tokens", 5)
    assert ran.code == 0
    with package.load(tiny) as pipe:
        text = "".join(piece.text for piece in pipe.generate("hello", max_tokens=5))
    assert ran.out == text + "\n"


def test_a_person_is_told_what_was_validated_whether_it_fits_and_how_fast_it_was(mortice: Mortice, tiny: Path) -> None:
    err = mortice("run", "-m", tiny, "-p", "hello", "-n", 5).err
    for part in ("valid against contract llama", "KV cache, 512 tokens", "executor reference (auto", "upload", "tok/s"):
        assert part in err
    assert "\x1b" not in err, "no terminal, no colours"


def test_one_token_is_not_called_tokens(mortice: Mortice, tiny: Path, tmp_path: Path) -> None:
    record = tmp_path / "run.json"
    told = [
        mortice("run", tiny, "-p", "h", "-n", 1, "-t", 0, "--executor", "reference", "--record", record).err,
        mortice("run", tiny, "--jsonl", "-", "-n", 1, "-t", 0, stdin=b'{"prompt": "h"}\n').err,
        mortice("run", tiny, "-p", "h", "--context", 1).err,
        mortice("tokenize", tiny, "h").out,
        mortice("replay", record).out,
    ]
    for text, said in zip(told, ("answer 1 token\n", "1 prompt; answers 1 token,", "1 token,", "", ""), strict=True):
        assert said in text
        assert not re.search(r"\b1 (tokens|prompts)\b", text)


def test_quiet_leaves_standard_error_empty(mortice: Mortice, tiny: Path) -> None:
    ran = mortice("run", "-m", tiny, "-p", "hello", "-n", 2, "--quiet")
    assert (ran.code, ran.err) == (0, "")


def test_a_terminal_sees_a_long_prompt_being_fed_and_the_answer_stays_the_same(
    mortice: Mortice, tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = ("-m", tiny, "-n", 3, "--executor", "reference", "--step-tokens", 5)
    plain = mortice("run", *asked, "-p", "hello " * 20)
    assert "/" not in plain.err.rpartition("upload: ")[2].replace("tok/s", ""), "no bar"
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    watched = mortice("run", *asked, "-p", "hello " * 20)
    assert watched.out == plain.out
    tokens = re.search(r"prompt ([0-9]+) tokens", plain.err)
    assert tokens is not None
    assert f"{tokens[1]}/{tokens[1]}" in re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", watched.err)
    talked = mortice("chat", *asked, stdin=b"hello hello hello\n")
    assert re.search(r"([0-9]+)/\1 tokens", re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", talked.err))
    assert mortice("run", *asked, "-p", "hello " * 20, "--quiet").err == ""


def test_json_holds_text_ids_logprobs_and_timings(mortice: Mortice, tiny: Path) -> None:
    ran = mortice("run", "-m", tiny, "-p", "hello", "-n", 4, "-t", 1, "-s", 7, "--logprobs", 2, "--json")
    found = ran.json
    assert found["seed"] == 7
    assert len(found["ids"]) == len(found["logprobs"]) == len(found["top_logprobs"]) == 4
    assert all(logprob <= 0 for logprob in found["logprobs"])
    assert (found["finish_reason"], found["stop_reason"]) == ("length", None)
    assert found["executor"] == "reference"
    assert found["timings"]["decode_tokens_per_second"] > 0
    assert found["prompt_tokens"] > 0


def test_a_drawn_seed_repeats_the_run(mortice: Mortice, tiny: Path) -> None:
    command = ("run", "-m", tiny, "-p", "hello", "-n", 12, "-t", 1.5, "--json")
    first = mortice(*command).json
    assert isinstance(first["seed"], int)
    assert mortice(*command, "--seed", first["seed"]).json["ids"] == first["ids"]


def test_numbers_that_json_lacks_become_words() -> None:
    assert json_text({"a": [math.nan, math.inf, -math.inf, 1.5]}) == '{"a": ["nan", "inf", "-inf", 1.5]}'


def test_a_config_file_runs_and_flags_override_it(mortice: Mortice, tiny: Path, tmp_path: Path) -> None:
    (tmp_path / "model.gguf").symlink_to(tiny)
    config = tmp_path / "run.toml"
    config.write_text('[model]\npath = "model.gguf"\n[prompt]\ntext = "hello"\n[generation]\nmax_tokens = 3\n')
    assert len(mortice("run", config, "--json").json["ids"]) == 3
    assert len(mortice("run", config, "--json", "--max-tokens", 2).json["ids"]) == 2
    assert len(mortice("run", config, "--json", "--set", "generation.max_tokens=1").json["ids"]) == 1


def test_a_model_may_stand_where_a_config_does(mortice: Mortice, tiny: Path) -> None:
    assert mortice("run", tiny, "-p", "a", "-n", 1, "-q").code == 0
    found = mortice("config", "show", tiny, "--json").json["model.path"]
    assert (found["value"], found["source"]) == (str(tiny), "--model")
    ran = mortice("run", tiny, "-m", "other.gguf", "-p", "a")
    assert (ran.code, ran.err) == (
        2,
        f"mortice: error: {tiny}: is a model, and so is --model other.gguf; wanted one\n",
    )


@pytest.mark.parametrize("name", ["m.gguf", "M.GGUF", "m.safetensors"])
@pytest.mark.parametrize("data", [b"", b"[prompt]\ntext = 1\n", b"GGUF"])
def test_a_file_named_like_a_model_is_none_of_the_configs_however_broken(
    mortice: Mortice, tmp_path: Path, name: str, data: bytes
) -> None:
    (tmp_path / name).write_bytes(data)
    given = mortice("run", tmp_path / name, "-p", "a")
    assert given.code == 2
    assert given.err == mortice("run", "-m", tmp_path / name, "-p", "a").err


def test_a_model_that_is_not_there_is_missed_as_a_model(mortice: Mortice, tmp_path: Path) -> None:
    ran = mortice("run", tmp_path / "none.gguf", "-p", "a")
    assert (ran.code, ran.err) == (2, f"mortice: error: {tmp_path / 'none.gguf'}: no such file or folder\n")


def test_the_environment_overrides_the_file(
    mortice: Mortice, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tmp_path / "run.toml"
    config.write_text("[generation]\nmax_tokens = 3\n")
    monkeypatch.setenv("MORTICE_GENERATION_MAX_TOKENS", "2")
    assert len(mortice("run", config, "-m", tiny, "-p", "a", "--json").json["ids"]) == 2


def test_a_prompt_can_come_from_standard_input_without_its_line_end(mortice: Mortice, tiny: Path) -> None:
    typed = mortice("run", "-m", tiny, "-p", "-", "-n", 1, "--json", stdin="grüße\n".encode())
    given = mortice("run", "-m", tiny, "-p", "grüße", "-n", 1, "--json")
    assert typed.json["prompt_tokens"] == given.json["prompt_tokens"]
    assert typed.json["logprobs"] == given.json["logprobs"]


def test_standard_input_that_is_no_text_is_refused(mortice: Mortice, tiny: Path) -> None:
    ran = mortice("run", "-m", tiny, "-p", "-", stdin=b"ab\xff")
    assert (ran.code, ran.err) == (2, "mortice: error: standard input: byte 2: not UTF-8\n")


@pytest.mark.parametrize("prompt", ["--json", "-x", '{"a": 1}', "[1]", "a=b"])
def test_a_prompt_may_look_like_anything(mortice: Mortice, tiny: Path, prompt: str) -> None:
    ran = mortice("run", "-m", tiny, f"--prompt={prompt}", "-n", 1, "-q")
    assert (ran.code, ran.err) == (0, "")


def test_a_prompt_without_tokens_is_refused(mortice: Mortice) -> None:
    ran = mortice("run", "-m", smollm2_path(), "-p", "", "-q")
    assert (ran.code, ran.err) == (2, "mortice: error: prompt: found no tokens, wanted at least one\n")


def test_chat_sends_the_prompt_through_the_files_template(mortice: Mortice, tiny: Path) -> None:
    chat = mortice("run", "-m", tiny, "-p", "hi", "--chat", "--system", "be kind", "-n", 1, "--json").json
    plain = mortice("run", "-m", tiny, "-p", "[system] be kind\n[user] hi\n[assistant] ", "-n", 1, "--json").json
    assert chat["logprobs"] == plain["logprobs"]


def test_a_system_message_without_chat_is_refused(mortice: Mortice, tiny: Path) -> None:
    ran = mortice("run", "-m", tiny, "-p", "hi", "--system", "be kind")
    assert ran.code == 2
    assert "prompt.system: only a chat has a system message" in ran.err


def test_what_does_not_fit_is_refused_before_the_upload(mortice: Mortice, tiny: Path) -> None:
    ran = mortice("run", "-m", tiny, "-p", "hi", "--memory-mib", 1)
    assert ran.code == 2
    assert ran.out == ""
    assert ", 1.0 MiB may be used" in ran.err.splitlines()[-1]
    assert "upload:" not in ran.err


def test_a_prompt_that_fills_the_context_is_refused_before_the_upload(mortice: Mortice, tiny: Path) -> None:
    ran = mortice("run", "-m", tiny, "-p", "hello " * 25, "--context", 16)
    assert ran.code == 2
    assert "wanted fewer than the context's 16" in ran.err
    assert "upload:" not in ran.err


def test_ctrl_c_while_generating_keeps_what_was_said_and_returns_130(
    mortice: Mortice, tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    feed = Session.feed
    calls = 0

    def interrupted(self: Session, ids: list[int], logits: str = "last") -> object:
        nonlocal calls
        calls += 1
        if calls == 4:
            raise KeyboardInterrupt
        return feed(self, ids, logits)

    monkeypatch.setattr(Session, "feed", interrupted)
    ran = mortice("run", "-m", tiny, "-p", "hello", "-n", 50)
    assert ran.code == 130
    assert ran.out.endswith("\n")
    assert len(ran.out) > 1
    assert ran.err.splitlines()[-1] == "mortice: error: interrupted"


def test_ctrl_c_during_the_upload_frees_everything_and_returns_130(
    mortice: Mortice, tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mortice.core.model.residency import ResidentWeights

    closed: list[ResidentWeights] = []
    close = ResidentWeights.close

    def mark(self: ResidentWeights, index: int) -> None:
        raise KeyboardInterrupt

    def remember(self: ResidentWeights) -> None:
        closed.append(self)
        close(self)

    monkeypatch.setattr(ResidentWeights, "mark", mark)
    monkeypatch.setattr(ResidentWeights, "close", remember)
    ran = mortice("run", "-m", tiny, "-p", "hello", "--json")
    assert ran.code == 130
    assert ran.json["error"]["type"] == "KeyboardInterrupt"
    assert len(closed) == 1


def test_a_fault_of_ours_is_one_line_and_a_traceback_only_on_demand(
    mortice: Mortice, tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object, **__: object) -> None:
        raise RuntimeError("lost it")

    monkeypatch.setattr(answers.Answer, "as_dict", broken)
    ran = mortice("run", "-m", tiny, "-p", "hello", "-n", 1, "-q")
    assert ran.code == 1
    assert ran.err.startswith("mortice: error: RuntimeError: lost it\n")
    assert "Traceback" not in ran.err
    assert "Traceback" in mortice("run", "-m", tiny, "-p", "hello", "-n", 1, "-q", "--debug").err


def command(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "mortice.core.cli", *map(str, arguments)]


def test_a_real_model_answers_as_json_in_a_process_of_its_own() -> None:
    ran = subprocess.run(
        command("run", "-m", smollm2_path(), "-p", "-", "--chat", "-n", 12, "--json", "--executor", "reference"),
        input="What is the capital of France?\n",
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr
    found = json.loads(ran.stdout)
    assert "Paris" in found["text"]
    assert found["executor_reason"] == "asked for"
    assert "valid against contract llama" in ran.stderr


def test_a_real_model_answers_a_person(mortice: Mortice) -> None:
    ran = mortice("run", "-m", smollm2_path(), "-p", "The capital of France is", "-n", 2)
    assert ran.code == 0
    assert "Paris" in ran.out
    assert "decode" in ran.err
