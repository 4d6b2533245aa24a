"""A chat template held against what a chat needs, without trusting it: hash, constructs, dry runs in the sandbox."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from mortice.core.errors import TemplateError
from mortice.core.model.findings import Finding, Severity
from mortice.core.model.types import ModelFile
from mortice.core.text.known_templates import known_template, template_hash
from mortice.core.text.template_process import TemplateLimits, TemplateProcess

__all__ = ["template_findings", "template_summary"]

_KEY = "tokenizer.chat_template"
_FOUND_CHARS = 300
"""Texts from the file stand in messages; a hostile one has megabytes."""

_ASKED, _TOLD = "Is this kept word for word?", "Speak plainly."
_USER = {"role": "user", "content": _ASKED}
_CONVERSATIONS: Mapping[str, list[dict[str, str]]] = {
    "a system message": [{"role": "system", "content": _TOLD}, _USER],
    "a second turn": [_USER, {"role": "assistant", "content": "It is."}, _USER],
}
_SPECIAL = {"bos_token": "bos", "eos_token": "eos", "pad_token": "padding", "unk_token": "unknown"}


def template_summary(file: ModelFile) -> dict[str, str | None] | None:
    """Hash of the chat template and the known good family it belongs to; None for a file without one."""
    source = file.metadata.get(_KEY)
    if not isinstance(source, str):
        return None
    return {"sha256": template_hash(source), "known": known_template(source)}


def template_findings(file: ModelFile, limits: TemplateLimits | None = None) -> list[Finding]:
    """What is wrong with the chat templates of a file; warnings at most, since only a chat needs them.

    A template that is known to be good is not looked at further. Any other is compiled, searched for suspicious
    constructs and rendered for small conversations, all in the process that renders it for a chat.
    """
    found: list[Finding] = []
    for key, source in file.metadata.items():
        if key == _KEY or key.startswith(f"{_KEY}."):
            audit = _Audit(file, key, limits or TemplateLimits())
            found += audit.findings(source)
    return found


class _Audit:
    def __init__(self, file: ModelFile, key: str, limits: TemplateLimits) -> None:
        self.file, self.key, self.limits = file, key, limits

    def finding(self, rule: str, found: str, wanted: str, severity: Severity = "warning") -> Finding:
        offset = self.file.metadata_offsets.get(self.key)
        return Finding(
            rule=f"template.{rule}",
            severity=severity,
            subject=self.key,
            found=found[:_FOUND_CHARS],
            wanted=wanted,
            offset=offset,
        )

    def findings(self, source: object) -> Iterator[Finding]:
        no_chat = "this model cannot chat"
        if not isinstance(source, str):
            yield self.finding("type", type(source).__name__, f"wanted a string; {no_chat}")
        elif known_template(source) is None:
            try:
                process = TemplateProcess(source, self.limits, self.key)
                try:
                    process.check()
                    yield from self.constructs(process)
                    yield from self.dry_runs(process)
                finally:
                    process.close()
            except TemplateError as error:
                yield self.finding("broken", self.reason(error), no_chat)

    def constructs(self, process: TemplateProcess) -> Iterator[Finding]:
        for line, reason in process.audit():
            wanted = "no chat needs it; read that line before you trust the file"
            yield self.finding("suspicious", f"line {line}: {reason}", wanted)

    def dry_runs(self, process: TemplateProcess) -> Iterator[Finding]:
        """Render small conversations: one must work, with the user's words in it; the others are worth knowing."""
        try:
            text = process.render(self.variables([_USER]))
            bare = process.render(self.variables([_USER], add_generation_prompt=False))
        except TemplateError as error:
            yield self.finding("fails", self.reason(error), "a message of a user alone must render; it cannot chat")
            return
        if _ASKED not in text:
            yield self.finding("drops", "what the user says is not in the text", "the model would not see it")
        if text == bare:
            found = "add_generation_prompt makes no difference"
            yield self.finding("prompt", found, "the model itself has to open its turn", "note")
        for what, messages in _CONVERSATIONS.items():
            try:
                process.render(self.variables(messages))
            except TemplateError as error:
                yield self.finding("refuses", f"{what}: {self.reason(error)}", "chats with one are refused", "note")

    def variables(self, messages: list[dict[str, str]], *, add_generation_prompt: bool = True) -> dict[str, Any]:
        return {
            "tools": None,
            "documents": None,
            **{name: self.token(key) for name, key in _SPECIAL.items()},
            "messages": messages,
            "add_generation_prompt": add_generation_prompt,
        }

    def token(self, name: str) -> str:
        tokens = self.file.metadata.get("tokenizer.ggml.tokens")
        number = self.file.metadata.get(f"tokenizer.ggml.{name}_token_id")
        if not isinstance(number, int) or not isinstance(tokens, Sequence) or not 0 <= number < len(tokens):
            return ""
        return str(tokens[number])

    def reason(self, error: TemplateError) -> str:
        return str(error).removeprefix(f"{self.key}: ")
