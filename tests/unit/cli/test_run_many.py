"""``mortice run --jsonl``."""

from __future__ import annotations

import errno
import json
import os
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import mortice as package
from mortice.core.cli import run_many
from mortice.core.pipeline import Pipeline
from mortice.core.stages import open_file
from tests.support.hf_folders import write_folder
from tests.support.tiny import REGISTRY
from tests.unit.cli.conftest import Mortice, Ran


def results(ran: Ran) -> dict[Any, dict[str, Any]]:
    """The lines of standard output by id."""
    found = [json.loads(line) for line in ran.out.splitlines()]
    return {line["id"]: line for line in found}


def jsonl(*lines: dict[str, Any]) -> bytes:
    return "".join(json.dumps(line) + "\n" for line in lines).encode()


def test_each_line_of_a_file_gets_a_line_of_results(mortice: Mortice, tiny: Path, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_bytes(
        jsonl(
            {"prompt": "hello", "id": "first", "max_tokens": 4},
            {"prompt": [5, 6, 7], "temperature": 1.2, "seed": 7, "logprobs": 2, "logit_bias": {"3": -5}},
        )
        + b"\n"
    )
    ran = mortice("run", tiny, "--jsonl", prompts, "-n", 6, "--no-stop-at-eos")
    assert ran.code == 0
    found = results(ran)
    with package.load(tiny) as pipe:
        first = list(pipe.generate("hello", max_tokens=4, stop_at_eos=False))
        options: dict[str, Any] = {"temperature": 1.2, "seed": 7, "logit_bias": {3: -5.0}}
        second = list(pipe.generate([5, 6, 7], max_tokens=6, stop_at_eos=False, **options))
    assert found["first"]["text"] == "".join(piece.text for piece in first)
    assert found["first"]["tokens"] == [piece.id for piece in first]
    assert (found["first"]["finish_reason"], found["first"]["seed"]) == ("length", None)
    assert found[2]["tokens"] == [piece.id for piece in second]
    assert (found[2]["seed"], found[2]["prompt_tokens"]) == (7, 3)
    assert [len(top) for top in found[2]["top_logprobs"]] == [2] * 6
    assert "2 prompts; answers 10 tokens" in ran.err


def test_prompts_come_from_standard_input_and_what_is_finished_first_comes_first(mortice: Mortice, tiny: Path) -> None:
    lines = jsonl({"prompt": "a", "max_tokens": 9}, {"prompt": "b", "max_tokens": 2})
    ran = mortice("run", tiny, "--jsonl", "-", "--no-stop-at-eos", "-q", stdin=lines)
    assert (ran.code, ran.err) == (0, "")
    assert [json.loads(line)["id"] for line in ran.out.splitlines()] == [2, 1]


def test_results_go_to_a_file(mortice: Mortice, tiny: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    ran = mortice("run", tiny, "--jsonl", "-", "--output", out, "-n", 2, "-q", stdin=jsonl({"prompt": "a"}))
    assert (ran.code, ran.out) == (0, "")
    assert json.loads(out.read_text())["id"] == 1


def test_a_chat_sends_each_prompt_through_the_template(mortice: Mortice, tiny: Path) -> None:
    lines = jsonl({"prompt": "hi"}, {"prompt": "you"})
    found = results(mortice("run", tiny, "--jsonl", "-", "--chat", "--system", "be brief", "-n", 4, stdin=lines))
    alone = mortice("run", tiny, "-p", "you", "--chat", "--system", "be brief", "-n", 4, "--json").json
    assert (found[2]["tokens"], found[2]["prompt_tokens"]) == (alone["ids"], alone["prompt_tokens"])


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b"{", "not JSON"),
        (b"[" * 100_000, "not JSON: nested too deeply"),
        (b'{"prompt": "a", "temperature": 1' + b"0" * 400 + b"}", "not JSON: an integer has more than 64 bits"),
        (b"5", "found a number, wanted an object with a prompt"),
        (b"{}", "prompt: found nothing, wanted a string or a list of token ids"),
        (b'{"prompt": [1, "a"]}', "prompt: found a list, wanted a string or a list of token ids"),
        (b'{"prompt": [true]}', "prompt: found a list, wanted a string or a list of token ids"),
        (b'{"prompt": "a", "id": null}', "id: found nothing, wanted a string or an integer"),
        (b'{"prompt": "a", "prompt": "b"}', "not JSON: key 'prompt' stands there twice"),
        (b'{"prompt": "a", "logit_bias": {"x": 1}}', "logit_bias: found token id 'x', wanted an integer >= 0"),
        (b'{"prompt": "a", "seed": 0.5}', "seed: found 0.5, wanted an integer from 0"),
        (b'{"prompt": "a", "temperature": NaN}', "temperature: found nan, wanted 0 (greedy)"),
        (b'{"prompt": "a", "stop": "b"}', "stop: found 'b', wanted a list of strings"),
        (b'{"prompt": "a", "max_token": 1}', "generate: unknown key 'max_token', did you mean 'max_tokens'"),
        (b'{"prompt": []}', "prompt: found no tokens"),
        (b'{"prompt": [99999999]}', "prompt: token id 99999999 is outside the vocabulary"),
        (json.dumps({"prompt": [1] * 512}).encode(), "prompt: found 512 tokens, wanted fewer than the context's 512"),
        (b'{"prompt": "a", "id": "one"}', "id 'one' is that of line 1, too"),
    ],
)
def test_a_bad_line_is_refused_by_its_number_before_any_work(
    mortice: Mortice, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, line: bytes, message: str
) -> None:
    monkeypatch.setattr(Pipeline, "preload", lambda _: pytest.fail("work was begun"))
    out = tmp_path / "out.jsonl"
    lines = b'{"prompt": "a", "id": "one"}\n\n' + line + b"\n"
    ran = mortice("run", tiny, "--jsonl", "-", "--output", out, "-q", stdin=lines)
    assert ran.code == 2
    assert ran.err.startswith(f"mortice: error: standard input: line 3: {message}"), ran.err
    assert ran.err.count("\n") == 1
    assert not out.exists()


def test_all_bad_lines_are_named_at_once(mortice: Mortice, tiny: Path) -> None:
    ran = mortice("run", tiny, "--jsonl", "-", "-q", stdin=b'{"prompt": 1}\n{"prompt": "a"}\n{}\n')
    assert ran.code == 2
    assert ran.err.splitlines() == [
        "mortice: error: standard input: 2 lines are refused",
        "  line 1: prompt: found a number, wanted a string or a list of token ids",
        "  line 3: prompt: found nothing, wanted a string or a list of token ids",
    ]
    assert "  and 10 more" in mortice("run", tiny, "--jsonl", "-", "-q", stdin=b"{}\n" * 30).err


def test_lines_that_are_no_prompts_hide_no_lines_with_wrong_options(mortice: Mortice, tiny: Path) -> None:
    lines = [
        b'{"prompt": "a"}',
        b'{"prompt": "a", "temperature": "x"}',
        b"[1]",
        b'{"prompt": "a", "max_token": 1}',
        b'{"prompt": "a", "id": 1}',
        b'{"prompt": "a", "max_tokens": 0}',
        b'{"prompt": [99999999]}',
    ]
    ran = mortice("run", tiny, "--jsonl", "-", "-q", stdin=b"\n".join(lines))
    assert ran.code == 2
    assert [line.partition(", ")[0] for line in ran.err.splitlines()] == [
        "mortice: error: standard input: 6 lines are refused",
        "  line 2: temperature: found 'x'",
        "  line 3: found a list",
        "  line 4: generate: unknown key 'max_token'",
        "  line 5: id 1 is that of line 1",
        "  line 6: max_tokens: found 0",
        "  line 7: prompt: token id 99999999 is outside the vocabulary of 512 tokens",
    ]


def test_what_holds_no_lines_of_prompts_is_refused(mortice: Mortice, tiny: Path, tmp_path: Path) -> None:
    for stdin, message in (
        (b"\n \n", "found no line with a prompt"),
        (b"\xff", "byte 0: not UTF-8"),
    ):
        ran = mortice("run", tiny, "--jsonl", "-", "-q", stdin=stdin)
        assert (ran.code, ran.err) == (2, f"mortice: error: standard input: {message}\n")
    ran = mortice("run", tiny, "--jsonl", tmp_path / "none", "-q")
    assert (ran.code, ran.err) == (
        2,
        f"mortice: error: {tmp_path / 'none'}: cannot be read: No such file or directory\n",
    )


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--prompt", "b"), "--prompt: --jsonl gives the prompts"),
        (("--record", "r.json"), "--record: keeps the run of one prompt"),
        (("--json",), "--json: the results of --jsonl are JSON already"),
        (("--system", "b"), "prompt.system: only a chat has a system message"),
        (("--output", "no/such/file"), "--output: no/such/file: found no folder to write it in"),
        (("--output", "prompts.jsonl"), "--output: prompts.jsonl: is a file that this command reads, wanted another"),
    ],
)
def test_flags_that_make_no_sense_beside_jsonl_are_refused(
    mortice: Mortice,
    tiny: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    flags: tuple[str, ...],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("prompts.jsonl").write_bytes(jsonl({"prompt": "a"}))
    ran = mortice("run", tiny, "--jsonl", "prompts.jsonl", *flags)
    assert ran.code == 2
    assert ran.err.startswith(f"mortice: error: {message}")


def test_results_are_written_over_a_file_only_when_told(mortice: Mortice, tiny: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    out.write_text("mine")
    asked = ("run", tiny, "--jsonl", "-", "--output", out, "-n", 1, "-q")
    ran = mortice(*asked, stdin=jsonl({"prompt": "a"}))
    assert (ran.code, ran.err) == (2, f"mortice: error: --output: {out}: is there already; --force overwrites it\n")
    assert out.read_text() == "mine"
    assert mortice(*asked, "--force", stdin=jsonl({"prompt": "a"})).code == 0
    assert "mine" not in out.read_text()


def test_results_are_never_written_over_what_is_read(mortice: Mortice, tiny: Path, tmp_path: Path) -> None:
    model, contract = tmp_path / "model.gguf", tmp_path / "llama.toml"
    model.write_bytes(tiny.read_bytes())
    contract.write_bytes((Path(__file__).parents[3] / "arch_contracts" / "llama.toml").read_bytes())
    config = tmp_path / "run.toml"
    config.write_text('[model]\npath = "model.gguf"\ncontract = "llama.toml"\n')
    before = {path: path.read_bytes() for path in (model, contract, config)}
    for path in before:
        ran = mortice("run", config, "--jsonl", "-", "--output", path, "--force", stdin=jsonl({"prompt": "a"}))
        assert ran.code == 2
        assert f"--output: {path}: is a file that this command reads, wanted another" in ran.err
    assert {path: path.read_bytes() for path in before} == before


def test_results_are_never_written_over_a_file_of_a_models_folder(mortice: Mortice, tiny: Path, tmp_path: Path) -> None:
    with open_file(REGISTRY, tiny) as file:
        folder = write_folder(tmp_path / "hf", file, "BF16")
    weights = folder / "model.safetensors"
    before = weights.read_bytes()
    ran = mortice("run", folder, "--jsonl", "-", "--output", weights, "--force", stdin=jsonl({"prompt": "a"}))
    assert (ran.code, "is a file that this command reads" in ran.err) == (2, True)
    assert weights.read_bytes() == before


def test_a_file_of_prompts_may_begin_with_a_byte_order_mark(mortice: Mortice, tiny: Path, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_bytes(b"\xef\xbb\xbf" + jsonl({"prompt": "a", "max_tokens": 1}))
    assert mortice("run", tiny, "--jsonl", prompts, "-q").code == 0


def test_a_device_of_prompts_is_refused_and_not_read_for_ever(mortice: Mortice, tiny: Path) -> None:
    ran = mortice("run", tiny, "--jsonl", "/dev/zero", "-q")
    assert (ran.code, ran.err) == (
        2,
        "mortice: error: /dev/zero: cannot be read: found a device, wanted a file or a pipe\n",
    )


def test_an_output_without_jsonl_and_prompts_without_a_model_are_refused(mortice: Mortice, tiny: Path) -> None:
    ran = mortice("run", tiny, "-p", "a", "--output", "x")
    assert (ran.code, "--output: only the results of --jsonl go to a file" in ran.err) == (2, True)
    ran = mortice("run", "--jsonl", "-")
    assert (ran.code, ran.err.startswith("mortice: error: model.path: no model given;")) == (2, True)


def test_one_that_fails_has_an_error_in_its_line_and_the_others_go_on(mortice: Mortice, tiny: Path) -> None:
    with package.load(tiny) as pipe:
        banned = {str(token): -float("inf") for token in range(pipe.program.vocab_size)}
    lines = jsonl({"prompt": "a", "logit_bias": banned}, {"prompt": "b", "max_tokens": 2})
    ran = mortice("run", tiny, "--jsonl", "-", stdin=lines)
    found = results(ran)
    assert ran.code == 1
    assert found[1]["error"]["type"] == "ExecutionError"
    assert "error" not in found[2]
    assert "2 prompts, 1 failed" in ran.err


def test_a_full_disk_is_said_with_the_files_name(mortice: Mortice, tiny: Path) -> None:
    if not Path("/dev/full").exists():
        pytest.skip("there is no /dev/full here")
    lines = jsonl({"prompt": "a", "max_tokens": 1})
    ran = mortice("run", tiny, "--jsonl", "-", "--output", "/dev/full", "-q", stdin=lines)
    assert (ran.code, ran.err) == (1, "mortice: error: /dev/full: cannot be written: No space left on device\n")


def limited_to(nbytes: int, *arguments: object) -> subprocess.CompletedProcess[str]:
    """A command that can write no file of more than so many bytes, as on a disk that is almost full."""
    return subprocess.run(
        [sys.executable, "-m", "mortice.core.cli", *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (nbytes, nbytes)),
    )


def test_whole_lines_stay_when_the_disk_fills_up_and_a_half_one_does_not(tiny: Path, tmp_path: Path) -> None:
    prompts, out = tmp_path / "prompts.jsonl", tmp_path / "out.jsonl"
    prompts.write_bytes(jsonl(*({"prompt": "a", "max_tokens": 1} for _ in range(20))))
    ran = limited_to(700, "run", tiny, "--jsonl", prompts, "--output", out, "-q")
    assert (ran.returncode, ran.stderr) == (1, f"mortice: error: {out}: cannot be written: File too large\n")
    assert out.read_bytes().endswith(b"}\n")
    assert len([json.loads(line) for line in out.read_text().splitlines()]) > 1


def test_a_file_of_results_without_a_whole_line_is_in_nobodys_way(tiny: Path, tmp_path: Path) -> None:
    prompts, out = tmp_path / "prompts.jsonl", tmp_path / "out.jsonl"
    prompts.write_bytes(jsonl({"prompt": "a", "max_tokens": 1}))
    assert limited_to(20, "run", tiny, "--jsonl", prompts, "--output", out, "-q").returncode == 1
    assert not out.exists()


def test_an_output_that_cannot_be_opened_is_a_failure_as_of_other_files(
    mortice: Mortice, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, out = Path.open, tmp_path / "out.jsonl"

    def read_only(self: Path, *arguments: Any, **options: Any) -> Any:
        if self == out:
            raise OSError(errno.EROFS, os.strerror(errno.EROFS))
        return plain(self, *arguments, **options)

    monkeypatch.setattr(Path, "open", read_only)
    ran = mortice("run", tiny, "--jsonl", "-", "--output", out, "-q", stdin=jsonl({"prompt": "a"}))
    assert (ran.code, ran.err) == (1, f"mortice: error: {out}: cannot be written: Read-only file system\n")


def test_ctrl_c_ends_with_130_and_keeps_what_was_finished(
    mortice: Mortice, tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = run_many._write

    def interrupted(*arguments: Any) -> None:
        plain(*arguments)
        raise KeyboardInterrupt

    monkeypatch.setattr(run_many, "_write", interrupted)
    lines = jsonl({"prompt": "a", "max_tokens": 1}, {"prompt": "b", "max_tokens": 50})
    ran = mortice("run", tiny, "--jsonl", "-", "--no-stop-at-eos", stdin=lines)
    assert ran.code == 130
    assert list(results(ran)) == [1]
