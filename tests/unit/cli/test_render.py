"""What reaches a terminal, and what reaches a file or a pipe."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from mortice.core.cli.render import Screen, json_text, printable, size_text
from mortice.core.plugin.events import Event, StepDone, UploadProgress, WaysMeasured
from tests.support.models import smollm2_path
from tests.unit.cli.conftest import Mortice


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1.0 KiB"),
        (5 << 20, "5.0 MiB"),
        (3 << 29, "1.5 GiB"),
        (1 << 60, "1048576.0 TiB"),
    ],
)
def test_sizes_are_written_with_binary_units(count: int, text: str) -> None:
    assert size_text(count) == text


def test_text_from_a_file_is_made_safe_and_cut() -> None:
    assert printable("a\x1b[31m\nü\ud800") == r"a\x1b[31m\nü\ud800"
    assert printable("abcdef", 4) == "abc…"


def test_json_is_ascii_and_paths_are_text() -> None:
    assert json_text({Path("a"): Path("ü"), "t": ("x", None, True)}) == r'{"a": "\u00fc", "t": ["x", null, true]}'


def test_a_table_is_plain_and_uncut_where_no_terminal_is(capsys: pytest.CaptureFixture[str]) -> None:
    Screen().table(("name", ">n"), [("x" * 300, "1"), ("[red]y[/red]", "12")])
    lines = capsys.readouterr().out.splitlines()
    assert lines[1] == "x" * 300 + "   1"
    assert lines[2].split() == ["[red]y[/red]", "12"]
    assert all(line == line.rstrip() for line in lines)


def test_nothing_for_people_is_printed_where_json_is_wanted(capsys: pytest.CaptureFixture[str]) -> None:
    screen = Screen(json=True)
    screen.say("a")
    screen.table(("a",), [("b",)])
    screen.stream("c")
    screen.end_stream()
    screen.result(["d"])
    assert capsys.readouterr().out == '["d"]\n'


def test_a_terminal_sees_a_bar_while_weights_move(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    observers: list[Callable[[Event], None]] = []
    with Screen().upload_progress(observers):
        (show,) = observers
        show(UploadProgress(strategy="host", done_bytes=50 << 20, total_bytes=100 << 20))
    assert observers == []
    assert "50.0/100.0 MiB" in re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", capsys.readouterr().err)


def test_a_terminal_sees_how_much_of_a_long_prompt_is_fed_until_it_is(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    observers: list[Callable[[Event], None]] = []
    with Screen().prompt_progress(observers, 2500, 1000):
        (show,) = observers
        show(StepDone(tokens=1000, seconds=30.0))
        show(UploadProgress(strategy="host", done_bytes=1, total_bytes=2))
        show(StepDone(tokens=1000, seconds=30.0))
    assert observers == []
    shown, bar, after = capsys.readouterr().err.rpartition("tokens")
    assert re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", shown).endswith("2000/2500 ")
    assert bar
    assert "\x1b[2K" in after, "the bar's line is erased"


def test_no_bar_is_drawn_for_a_prompt_of_one_step_when_quiet_or_without_a_terminal(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    observers: list[Callable[[Event], None]] = []
    monkeypatch.setenv("TERM", "xterm")
    with Screen().prompt_progress(observers, 9, 8):
        assert observers == []
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    for screen, tokens in ((Screen(), 8), (Screen(quiet=True), 9)):
        with screen.prompt_progress(observers, tokens, 8):
            assert observers == []
    assert capsys.readouterr().err == ""


def test_a_person_is_told_what_was_measured_and_where_it_is_kept(capsys: pytest.CaptureFixture[str]) -> None:
    observers: list[Callable[[Event], None]] = []
    choices = {"products by rings": "to 8 rows", "products by cuBLAS": "from 129 rows"}
    for screen in (Screen(), Screen(quiet=True)):
        with screen.upload_progress(observers):
            for show in observers:
                show(WaysMeasured(choices=choices, kept="/cache/x.json", seconds=0.25))
    assert capsys.readouterr().err == (
        "measured in 0.25 s: products by rings to 8 rows, products by cuBLAS from 129 rows; kept in /cache/x.json\n"
    )


def test_no_terminal_sees_one_line_after_the_upload(mortice: Mortice, tiny: Path) -> None:
    lines = [line for line in mortice("run", "-m", tiny, "-p", "a", "-n", 1).err.splitlines() if "upload:" in line]
    assert len(lines) == 1


def test_control_characters_in_an_answer_reach_a_file_but_no_terminal(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    Screen().stream("a\x1b[2Jü\n")
    assert capsys.readouterr().out == "a\x1b[2Jü\n"
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    Screen().stream("a\x1b[2Jü\n")
    assert capsys.readouterr().out == "a\\x1b[2Jü\n"


def test_an_answer_ends_its_line_once(capsys: pytest.CaptureFixture[str]) -> None:
    screen = Screen()
    for text in ("a", "", "b\n"):
        screen.stream(text)
    screen.end_stream()
    screen.stream("c")
    screen.end_stream()
    screen.end_stream()
    assert capsys.readouterr().out == "ab\nc\n"


def test_an_ascii_terminal_does_not_end_a_command() -> None:
    ran = subprocess.run(
        [sys.executable, "-m", "mortice.core.cli", "tokenize", str(smollm2_path()), "ü 中"],
        env={**os.environ, "PYTHONIOENCODING": "ascii"},
        capture_output=True,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr
    assert b"\\u0120" in ran.stdout or b"\\xc3" in ran.stdout
