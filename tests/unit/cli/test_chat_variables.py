"""What a chat template is given besides the conversation: by flag, by config, for one prompt and for many."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from mortice.core.plugin.registry import make_registry
from mortice.core.testing.tiny_models import write_tiny_model
from tests.unit.cli.conftest import TEMPLATE, Mortice

THINKING = "{% if enable_thinking is defined and enable_thinking is false %}do not think {% endif %}"
GREEDY = ("--executor", "reference", "-t", 0, "-n", 1)


@pytest.fixture(scope="module")
def thinker(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose template says more when it is told not to think."""
    contract = make_registry().contracts["llama"].value
    path = tmp_path_factory.mktemp("thinker") / "thinker.gguf"
    return write_tiny_model(path, contract, metadata={"tokenizer.chat_template": TEMPLATE + THINKING})


def prompt_tokens(mortice: Mortice, *arguments: object) -> int:
    ran = mortice("run", *arguments, "-p", "hello", "--chat", "--json", *GREEDY)
    assert (ran.code, "warning" in ran.err) == (0, False)
    tokens: int = ran.json["prompt_tokens"]
    return tokens


def test_a_flag_gives_the_template_a_variable(mortice: Mortice, thinker: Path) -> None:
    plain = prompt_tokens(mortice, thinker)
    assert prompt_tokens(mortice, thinker, "--chat-variable", "enable_thinking=true") == plain
    assert prompt_tokens(mortice, thinker, "--chat-variable", "enable_thinking='false'") == plain, "that is a text"
    assert prompt_tokens(mortice, thinker, "--chat-variable", "enable_thinking=false") > plain


def test_a_config_and_the_environment_give_the_template_variables(
    mortice: Mortice, thinker: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tmp_path / "run.toml"
    config.write_text("[prompt.chat_variables]\nenable_thinking = false\n")
    plain = prompt_tokens(mortice, thinker)
    told = prompt_tokens(mortice, config, "-m", thinker)
    assert told > plain
    assert prompt_tokens(mortice, config, "-m", thinker, "--chat-variable", "enable_thinking=true") == plain
    monkeypatch.setenv("MORTICE_PROMPT_CHAT_VARIABLES", "{ enable_thinking = false }")
    assert prompt_tokens(mortice, thinker) == told


def test_every_prompt_of_many_gets_the_variables(mortice: Mortice, thinker: Path) -> None:
    lines = b'{"prompt": "hello"}\n{"prompt": "hello"}\n'
    many = ("run", thinker, "--jsonl", "-", "--chat", *GREEDY)
    found = []
    for more in ((), ("--chat-variable", "enable_thinking=false")):
        ran = mortice(*many, *more, stdin=lines)
        assert ran.code == 0
        found.append([json.loads(line)["prompt_tokens"] for line in ran.out.splitlines()])
    plain, told = found
    assert plain[0] == plain[1] < told[0] == told[1]


def test_a_conversation_gets_the_variables(mortice: Mortice, thinker: Path) -> None:
    talk = ("chat", thinker, *GREEDY)
    lengths = []
    for more in ((), ("--chat-variable", "enable_thinking=false")):
        found = re.search(r"^prompt ([0-9]+) tokens", mortice(*talk, *more, stdin=b"hi\n").err, re.MULTILINE)
        assert found is not None
        lengths.append(int(found[1]))
    plain, told = lengths
    assert plain < told


def test_a_record_keeps_the_variables(mortice: Mortice, thinker: Path, tmp_path: Path) -> None:
    record = tmp_path / "run.json"
    variables = ("--chat-variable", "enable_thinking=false", "--chat-variable", "more=[null, {}]")
    assert mortice("run", thinker, "-p", "hi", "--chat", *variables, *GREEDY, "--record", record).code == 0
    assert mortice("replay", record).code == 0
    kept = json.loads(record.read_text())
    assert kept["config"]["prompt"]["chat_variables"] == {"enable_thinking": False, "more": [None, {}]}
    kept["config"]["prompt"]["chat_variables"] = {}
    record.write_text(json.dumps(kept))
    assert "of the prompt differs" in mortice("replay", record).out


def test_a_name_the_template_does_not_know_is_warned_of_even_when_quiet(mortice: Mortice, thinker: Path) -> None:
    given = ("--chat-variable", "enable_thinkng=false", "--quiet", *GREEDY)
    warning = (
        "mortice: warning: prompt.chat_variables: enable_thinkng: the model's chat template has no such name, "
        "so it changes nothing\n"
    )
    assert mortice("run", thinker, "-p", "hi", "--chat", *given).err == warning
    assert mortice("chat", thinker, *given, stdin=b"hi\n").err == warning
    many = mortice("run", thinker, "--chat", "--jsonl", "-", *given, stdin=b'{"prompt": "a"}\n{"prompt": "b"}\n')
    assert many.err == warning, "once for all prompts"


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("messages=[]", "found 'messages', which every template is given anyway, wanted another name"),
        ("tools=[]", "found 'tools', which every template is given anyway, wanted another name"),
        ("bos_token=x", "found 'bos_token', which every template is given anyway, wanted another name"),
        ("enable-thinking=false", "found 'enable-thinking', wanted a name of letters, digits and _"),
        ("=1", "found '', wanted a name of letters, digits and _"),
        ("enable_thinking", "found 'enable_thinking', wanted NAME=VALUE"),
        ("a=False", """a: found False, wanted false, or '"False"' for the text"""),
        ("a=None", """a: found None, wanted null, or '"None"' for the text"""),
        ("a=1e999", "a: found inf, wanted a finite number"),
        ('a={"b": 1, "b": 2}', "a: key 'b' stands there twice"),
        ("a=" + "[" * 40 + "]" * 40, "a: found values nested deeper than 32"),
    ],
)
def test_a_variable_that_cannot_be_given_is_refused(mortice: Mortice, thinker: Path, given: str, said: str) -> None:
    ran = mortice("run", thinker, "-p", "hi", "--chat", "--chat-variable", given)
    assert (ran.code, ran.err) == (2, f"mortice: error: --chat-variable: {said}\n")


def test_variables_without_a_chat_are_refused(mortice: Mortice, thinker: Path) -> None:
    ran = mortice("run", thinker, "-p", "hi", "--chat-variable", "enable_thinking=false")
    assert ran.code == 2
    assert ran.err == (
        "mortice: error: prompt.chat_variables: only a chat has a template; pass --chat too, or leave them out "
        "(from flag --chat-variable)\n"
    )


def test_the_config_is_shown_with_its_variables(mortice: Mortice) -> None:
    flags = ("--chat-variable", 'a={"b": [1, null]}', "--chat-variable", "c=NaN", "--chat-variable", "d=x=y")
    shown = mortice("config", "show", *flags)
    assert '{ "a" = { "b" = [1, null] }, "c" = "NaN", "d" = "x=y" }' in shown.out
    found = mortice("config", "show", *flags, "--json").json["prompt.chat_variables"]
    assert found["value"] == {"a": {"b": [1, None]}, "c": "NaN", "d": "x=y"}
