"""``mortice chat``."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from mortice.core.session import Session
from mortice.core.text import chat as chat_text
from mortice.core.text.chat import Message
from tests.unit.cli.conftest import Mortice

HELP = "/exit leaves"


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[list[tuple[str, str]]]:
    """The conversations that went to the model, one for each answer."""
    conversations: list[list[tuple[str, str]]] = []
    encode = chat_text.encode_chat

    def remember(tokenizer: object, template: object, messages: list[Message], **options: object) -> list[int]:
        conversations.append([(message.role, message.content) for message in messages])
        return encode(tokenizer, template, messages, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(chat_text, "encode_chat", remember)
    return conversations


def test_each_line_is_a_message_and_the_conversation_grows(
    mortice: Mortice, tiny: Path, asked: list[list[tuple[str, str]]]
) -> None:
    ran = mortice("chat", "-m", tiny, "-n", 3, "--system", "be kind", stdin=b"one\n\ntwo\n")
    assert ran.code == 0
    first, second = asked
    assert first == [("system", "be kind"), ("user", "one")]
    assert second[:2] == first
    assert [role for role, _ in second] == ["system", "user", "assistant", "user"]
    assert second[2][1] + "\n" in ran.out


def test_what_was_fed_is_not_fed_again(mortice: Mortice, tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fed: list[int] = []
    feed = Session.feed

    def count(self: Session, ids: list[int], logits: str = "last") -> object:
        fed.append(len(ids))
        return feed(self, ids, logits)

    monkeypatch.setattr(Session, "feed", count)
    question = "a long question about mortices and tenons"
    ran = mortice("chat", "-m", tiny, "-n", 1, stdin=f"{question}\n{question}\n".encode())
    assert "in the cache)" in ran.err
    first, second = fed
    assert second < first + 12, "only the new turn"


def test_reset_forgets_and_system_starts_anew(mortice: Mortice, tiny: Path, asked: list[list[tuple[str, str]]]) -> None:
    mortice("chat", "-m", tiny, "-n", 1, stdin=b"one\n/reset\ntwo\n/system be brief\nthree\n/exit\nfour\n")
    assert asked == [
        [("user", "one")],
        [("user", "two")],
        [("system", "be brief"), ("user", "three")],
    ]


def test_the_prompt_of_a_config_is_the_first_message(
    mortice: Mortice, tiny: Path, tmp_path: Path, asked: list[list[tuple[str, str]]]
) -> None:
    config = tmp_path / "chat.toml"
    config.write_text('[prompt]\ntext = "one"\n[generation]\nmax_tokens = 1\n')
    mortice("chat", config, "-m", tiny)
    assert asked == [[("user", "one")]]


def test_a_script_is_told_of_a_message_that_is_refused(mortice: Mortice, tiny: Path) -> None:
    ran = mortice("chat", "-m", tiny, "--context", 40, stdin=b"word " * 60 + b"\n")
    assert ran.code == 2
    assert "wanted fewer than the context's 40; /reset forgets the conversation" in ran.err
    assert mortice("chat", "-m", tiny, stdin=b"/nope\n").code == 2


@pytest.mark.parametrize("errors", ["strict", "surrogateescape"])  # the second is Python's choice in the C locale
def test_input_that_is_no_utf_8_is_named_by_byte(mortice: Mortice, tiny: Path, errors: str) -> None:
    ran = mortice("chat", "-m", tiny, "-q", stdin=b"ab\xff\n", errors=errors)
    assert (ran.code, ran.err) == (2, "mortice: error: standard input: not UTF-8 at byte 2\n")


@pytest.mark.parametrize("errors", ["strict", "surrogateescape"])
def test_a_person_goes_on_after_a_line_that_is_refused(
    mortice: Mortice, tiny: Path, asked: list[list[tuple[str, str]]], errors: str
) -> None:
    typed = b"one\n/nope\n" + b"word " * 60 + b"\ntwo\n"
    ran = mortice("chat", "-m", tiny, "-q", "-n", 1, "--context", 60, stdin=typed, terminal=True)
    assert (ran.code, ran.err.count("mortice: warning: ")) == (0, 2)
    assert [role for role, _ in asked[-1]] == ["user", "assistant", "user"]
    ran = mortice("chat", "-m", tiny, "-q", stdin=b"ab\xff\n", errors=errors, terminal=True)
    assert (ran.code, "standard input: not UTF-8 at byte 2" in ran.err) == (0, True)


def test_ctrl_c_stops_the_answer_and_keeps_the_chat(
    mortice: Mortice, tiny: Path, asked: list[list[tuple[str, str]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    feed = Session.feed
    calls = 0

    def interrupted(self: Session, ids: list[int], logits: str = "last") -> object:
        nonlocal calls
        calls += 1
        if calls in (3, 4):  # after two tokens of the first answer, and while the second prompt is fed
            raise KeyboardInterrupt
        return feed(self, ids, logits)

    monkeypatch.setattr(Session, "feed", interrupted)
    ran = mortice("chat", "-m", tiny, "-n", 9, stdin=b"one\ntwo\nthree\n")
    assert ran.code == 0
    assert ran.err.count("(stopped)") == 2
    assert [role for role, _ in asked[1]] == ["user", "assistant", "user"], "what was said stays"
    assert [text for role, text in asked[2] if role == "user"] == ["one", "three"], "what was not answered goes"


def test_a_model_may_stand_where_a_config_does(mortice: Mortice, tiny: Path) -> None:
    assert mortice("chat", tiny, stdin=b"/exit\n").code == 0


def test_a_model_without_a_template_is_refused(mortice: Mortice, tmp_path: Path) -> None:
    from mortice.core.plugin.registry import make_registry
    from mortice.core.testing.tiny_models import write_tiny_model

    path = write_tiny_model(tmp_path / "mute.gguf", make_registry().contracts["llama"].value)
    ran = mortice("chat", "-m", path, stdin=b"hi\n")
    assert ran.code == 2
    assert "tokenizer.chat_template: missing" in ran.err


def test_ctrl_c_at_the_prompt_leaves_with_130(tiny: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "mortice.core.cli", "chat", "-m", str(tiny)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    with process:
        assert process.stderr is not None
        while HELP not in process.stderr.readline():
            assert process.poll() is None
        process.send_signal(signal.SIGINT)
        rest = process.stderr.read()
    assert process.returncode == 130
    assert rest == "mortice: error: interrupted\n"


def test_an_answer_is_the_same_whether_or_not_the_cache_was_reused(
    mortice: Mortice, tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command, lines = ("chat", "-m", tiny, "-n", 8), b"one\ntwo\nthree\n"
    reused = mortice(*command, stdin=lines)
    rewind = Session.rewind_to
    monkeypatch.setattr(Session, "rewind_to", lambda self, ids: rewind(self, ids[:1]))
    fresh = mortice(*command, stdin=lines)
    assert "in the cache" in reused.err
    assert "in the cache" not in fresh.err
    assert reused.out == fresh.out
