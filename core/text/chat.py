"""Chat messages to token ids, through the template that the model file carries."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from attrs import asdict, frozen

from mortice.core.errors import TemplateError
from mortice.core.model.types import MetadataValue
from mortice.core.text.template_process import TemplateLimits, TemplateProcess
from mortice.core.text.template_variables import check_variables, map_texts, texts_of, unused_variables
from mortice.core.text.tokenizer import Tokenizer

__all__ = ["ROLES", "ChatTemplate", "Message", "encode_chat"]

ROLES = ("system", "developer", "user", "assistant", "tool")
"""Who may speak."""

_KEY = "tokenizer.chat_template"
_PRIVATE_USE = range(0x100000, 0x10FFFE)


@frozen(kw_only=True)
class Message:
    """One turn of a conversation.

    Attributes:
        role: one of `ROLES`.
        content: what was said.

    """

    role: str
    content: str


class ChatTemplate:
    """The template a model file carries, rendered in a sandbox with limits on time, memory and output.

    Use `from_metadata`. The sandbox is a child process that starts on first use (some 0.1 s) and is kept until
    `close` or until the object is collected.

    Args:
        source: the template, in Jinja2.
        special: texts of special tokens that it may refer to, such as ``bos_token``.
        limits: what it may take.
        where: file and key, for messages.

    """

    def __init__(
        self,
        source: str,
        special: Mapping[str, str] | None = None,
        limits: TemplateLimits | None = None,
        *,
        where: str = _KEY,
    ) -> None:
        self.source = source
        self._special = dict(special or {})
        self._process = TemplateProcess(source, limits or TemplateLimits(), where)

    @classmethod
    def from_metadata(cls, metadata: Mapping[str, MetadataValue], tokenizer: Tokenizer) -> ChatTemplate:
        """The template under ``tokenizer.chat_template``.

        Raises:
            TemplateError: the file has none, or it is not a text, or it is too long.

        """
        where = f"{tokenizer.origin}: {_KEY}" if tokenizer.origin else _KEY
        source = metadata.get(_KEY)
        if source is None:
            raise TemplateError(f"{where}: missing, so this model cannot chat; run it with a plain prompt instead")
        if not isinstance(source, str):
            raise TemplateError(f"{where}: {type(source).__name__} found, wanted a string")
        ids = {
            "bos_token": tokenizer.bos_id,
            "eos_token": tokenizer.eos_id,
            "pad_token": tokenizer.pad_id,
            "unk_token": tokenizer.unk_id,
        }
        special = {key: tokenizer.piece(id_) for key, id_ in ids.items() if id_ is not None}
        return cls(source, {"bos_token": "", "eos_token": "", **special}, where=where)

    def warm_up(self) -> None:
        """Start the sandbox without waiting for it, so that the first rendering need not."""
        self._process.start()

    def render(
        self,
        messages: Sequence[Message],
        *,
        add_generation_prompt: bool = True,
        variables: Mapping[str, Any] | None = None,
    ) -> str:
        """The conversation as the text the model was trained on.

        Args:
            messages: the turns so far, at least one.
            add_generation_prompt: end with the opening of the assistant's turn.
            variables: more that the template may ask for, such as ``enable_thinking``; JSON values.

        Raises:
            TemplateError: a role is not one of `ROLES`, a variable has a name that the template is given anyway or a
                value that JSON has not, or the template is broken, raises, or exceeds a limit.

        """
        _check(messages, variables)
        return self._process.render(
            {
                "tools": None,
                "documents": None,
                **self._special,
                **(variables or {}),
                "messages": [asdict(message) for message in messages],
                "add_generation_prompt": add_generation_prompt,
            }
        )

    def unused(self, names: Iterable[str]) -> list[str]:
        """Those of `names` that stand nowhere in the template: variables of such names change nothing."""
        return unused_variables(names, self.source)

    def close(self) -> None:
        """End the sandbox's process. Calling twice is fine."""
        self._process.close()


def encode_chat(
    tokenizer: Tokenizer,
    template: ChatTemplate,
    messages: Sequence[Message],
    *,
    variables: Mapping[str, Any] | None = None,
) -> list[int]:
    """Token ids of a conversation, up to the opening of the assistant's turn.

    Control tokens are read only where the template writes them. The text of one inside a message or a variable is
    plain text, so that nobody who supplies one can end a turn or speak as another.

    Args:
        tokenizer: the model's.
        template: the model's.
        messages: the turns so far, at least one.
        variables: see `ChatTemplate.render`.

    Raises:
        TemplateError: see `ChatTemplate.render`.
        TokenizerError: see `Tokenizer.encode`.

    """
    _check(messages, variables)
    given = dict(variables or {})
    texts = [*(message.content for message in messages), *texts_of(list(given.values()))]
    shielded, literals = _shield(texts, tokenizer.control_texts(), template.source)
    rest = iter(shielded)
    turns = [Message(role=message.role, content=next(rest)) for message in messages]
    values = map_texts(list(given.values()), lambda _: next(rest))
    rendered = template.render(turns, variables=dict(zip(given, values, strict=True)))
    ids = tokenizer.encode(rendered, add_special=False, literals=literals or None)
    bos = tokenizer.bos_id
    if tokenizer.add_bos and bos is not None and ids[:1] != [bos]:
        ids.insert(0, bos)
    return ids


def _check(messages: Sequence[Message], variables: Mapping[str, Any] | None) -> None:
    try:
        check_variables({} if variables is None else variables)
    except (TypeError, ValueError) as error:
        raise TemplateError(f"variables: {error}") from None
    if not messages:
        raise TemplateError("messages: none, wanted at least one")
    for i, message in enumerate(messages):
        if message.role not in ROLES:
            raise TemplateError(f"messages[{i}].role: {message.role!r}, wanted one of {', '.join(ROLES)}")
        if not isinstance(message.content, str):
            raise TemplateError(f"messages[{i}].content: {type(message.content).__name__} found, wanted a string")


def _shield(texts: Sequence[str], control: frozenset[str], source: str) -> tuple[list[str], dict[int, str]]:
    """Put one private-use character in the place of each control text in the contents.

    Returns the texts to render, and what each such character stands for. A text that ends in the beginning of a
    control text is treated alike, so that what the template or the next text adds cannot complete it.
    """
    contents = list(texts)
    joined = "".join(contents)
    used = set(joined) | set(source)
    spare = (code for code in _PRIVATE_USE if chr(code) not in used)
    char_of: dict[str, str] = {}

    def stand_in(text: str) -> str:
        if text not in char_of:
            char_of[text] = chr(next(spare))
        return char_of[text]

    found = sorted((text for text in control if text in joined), key=len, reverse=True)
    if found:
        pattern = re.compile("|".join(map(re.escape, found)))
        contents = [pattern.sub(lambda match: stand_in(match[0]), content) for content in contents]
    beginnings = {text[:length] for text in control for length in range(1, len(text))}
    longest = max(map(len, beginnings), default=0)
    for i, content in enumerate(contents):
        body = content.rstrip()
        for length in range(min(longest, len(body)), 0, -1):
            end = len(body) - length
            if body[end:] in beginnings:
                contents[i] = content[:end] + stand_in(body[end:]) + content[len(body) :]
                break
    return contents, {ord(char): text for text, char in char_of.items()}
