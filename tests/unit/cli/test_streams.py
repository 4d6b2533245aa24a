"""Standard streams that are full, closed or interrupted; each command in a process of its own."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

COMMAND = (sys.executable, "-m", "mortice.core.cli")
FULL = Path("/dev/full")
needs_full = pytest.mark.skipif(not FULL.is_char_device(), reason="no /dev/full on this system")


def shell(redirection: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    """A command as a shell runs it with `redirection`."""
    return subprocess.run(
        ["sh", "-c", f'exec "$@" {redirection}', "sh", *COMMAND, *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
        env={name: value for name, value in os.environ.items() if not name.startswith("MORTICE_")},
    )


@needs_full
@pytest.mark.parametrize("arguments", [["inspect", "--json"], ["inspect"], ["run", "-q", "-n", "2", "-p", "a", "-m"]])
def test_a_full_disk_on_standard_output_is_one_line(tiny: Path, arguments: list[str]) -> None:
    ran = shell(">/dev/full", *arguments, tiny)
    assert (ran.returncode, ran.stderr) == (1, "mortice: error: standard output: No space left on device\n")


@needs_full
def test_help_and_errors_end_quietly_on_a_full_disk() -> None:
    assert shell(">/dev/full", "--help").stderr == "mortice: error: standard output: No space left on device\n"
    refused = shell(">/dev/full", "run", "--json")
    assert refused.returncode == 2
    assert len(refused.stderr.splitlines()) == 1
    assert shell("2>/dev/full", "run").returncode == 2


@pytest.mark.parametrize(
    "arguments", [["--help"], ["validate", "--help"], ["contract", "show", "llama"], ["config", "schema"]]
)
def test_a_reader_who_leaves_is_no_failure_of_ours(arguments: list[str]) -> None:
    reader, writer = os.pipe()
    os.close(reader)  # before the command writes: how much a pipe takes at once does not matter
    with os.fdopen(writer, "wb") as out:
        ran = subprocess.run([*COMMAND, *arguments], stdout=out, stderr=subprocess.PIPE, text=True, check=False)
    assert (ran.returncode, ran.stderr) == (141, "")


CLOSED = (1, "mortice: error: standard output: is closed\n")


@pytest.mark.parametrize("arguments", [["validate"], ["inspect", "--json"], ["run", "-q", "-n", "1", "-p", "a", "-m"]])
def test_closed_standard_output_is_an_error_of_what_writes_there(tiny: Path, arguments: list[str]) -> None:
    ran = shell(">&-", *arguments, tiny)
    assert (ran.returncode, ran.stderr) == CLOSED


def test_closed_streams_are_no_error_where_nothing_is_written_or_only_messages_are(tiny: Path) -> None:
    prompts, out = tiny.parent / "closed.jsonl", tiny.parent / "closed-out.jsonl"
    prompts.write_text('{"prompt": "a", "max_tokens": 1}')
    ran = shell(">&-", "run", tiny, "--jsonl", prompts, "--output", out, "-q")
    assert (ran.returncode, ran.stderr) == (0, "")
    assert out.read_text()
    assert shell(">&-", "run", "-p", "a", "-m", tiny.parent / "none.gguf").returncode == 2
    assert shell("2>&-", "validate", tiny).returncode == 0
    ran = shell(">&-", "--help")
    assert (ran.returncode, ran.stderr) == CLOSED


@pytest.mark.parametrize("arguments", [["run", "-p", "-", "-m"], ["chat", "-m"]])
def test_closed_standard_input_is_refused_where_it_is_read(tiny: Path, arguments: list[str]) -> None:
    ran = shell("<&-", *arguments, tiny)
    assert (ran.returncode, ran.stderr) == (2, "mortice: error: standard input: is closed, wanted text to read\n")


def test_ctrl_c_while_modules_are_imported_is_no_traceback(tmp_path: Path) -> None:
    (tmp_path / "cyclopts.py").write_text(f"import os, signal\nos.kill(os.getpid(), {signal.SIGINT:d})\n")
    code = (
        "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler);"
        "from mortice.core.cli.__main__ import main; sys.exit(main())"
    )
    ran = subprocess.run(
        [
            sys.executable,
            "-c",
            code,
        ],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
    )
    assert (ran.returncode, ran.stderr) == (130, "mortice: error: interrupted\n")
