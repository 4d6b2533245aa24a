"""A prompt and its answer: read, checked, made token ids; streamed, timed and kept."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from itertools import chain, islice
from typing import TYPE_CHECKING, Any

from attrs import define, field

from mortice.core.cli.render import Screen
from mortice.core.counts import counted
from mortice.core.errors import ConfigError, InputError

if TYPE_CHECKING:
    from mortice.core.config import PromptConfig
    from mortice.core.pipeline import Pipeline
    from mortice.core.session import Session
    from mortice.core.text.chat import ChatTemplate
    from mortice.core.text.generation import Piece
    from mortice.core.text.params import GenerationParams, SamplingParams

__all__ = [
    "Answer",
    "check_prompt",
    "give_answer",
    "prompt_encoder",
    "read_stdin",
    "require_chat",
    "require_stdin",
    "warn_unused",
]


@define(kw_only=True)
class Answer:
    """What was generated and how long it took.

    Attributes:
        pieces: one a token.
        prompt_tokens: length of the prompt.
        reused_tokens: how many of them were in the KV cache already.
        prefill_seconds: from the start to the first token.
        decode_seconds: from the first token to the last.

    """

    pieces: list[Piece] = field(factory=list, repr=False)
    prompt_tokens: int
    reused_tokens: int = 0
    prefill_seconds: float = 0.0
    decode_seconds: float = 0.0

    @property
    def text(self) -> str:
        """All of it."""
        return "".join(piece.text for piece in self.pieces)

    @property
    def prefill_speed(self) -> float | None:
        """Tokens a second."""
        fed = self.prompt_tokens - self.reused_tokens
        return fed / self.prefill_seconds if self.pieces and self.prefill_seconds else None

    @property
    def decode_speed(self) -> float | None:
        """Tokens a second, the first one not counted; None for fewer than two tokens."""
        return (len(self.pieces) - 1) / self.decode_seconds if len(self.pieces) > 1 and self.decode_seconds else None

    def speed_text(self) -> str:
        """Both speeds, for a person."""
        parts = [f"prompt {counted(self.prompt_tokens, 'token')}"]
        if self.reused_tokens:
            parts[0] += f" ({self.reused_tokens} in the cache)"
        if self.prefill_speed is not None:
            parts[0] += f", prefill {self.prefill_speed:.1f} tok/s"
        parts.append(f"answer {counted(len(self.pieces), 'token')}")
        if self.decode_speed is not None:
            parts[1] += f", decode {self.decode_speed:.1f} tok/s"
        return "; ".join(parts)

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        last = self.pieces[-1] if self.pieces else None
        found: dict[str, Any] = {
            "text": self.text,
            "ids": [piece.id for piece in self.pieces],
            "logprobs": [piece.logprob for piece in self.pieces],
            "finish_reason": last.finish_reason if last else None,
            "stop_reason": last.stop_reason if last else None,
            "prompt_tokens": self.prompt_tokens,
            "timings": {
                "prefill_seconds": self.prefill_seconds,
                "prefill_tokens_per_second": self.prefill_speed,
                "decode_seconds": self.decode_seconds,
                "decode_tokens_per_second": self.decode_speed,
            },
        }
        if any(piece.top_logprobs for piece in self.pieces):
            found["top_logprobs"] = [
                [{"id": token, "logprob": logprob} for token, logprob in piece.top_logprobs] for piece in self.pieces
            ]
        return found


def give_answer(
    screen: Screen,
    pipeline: Pipeline,
    session: Session,
    prompt_ids: Sequence[int],
    sampling: SamplingParams,
    generation: GenerationParams,
    answer: Answer,
) -> None:
    """Generate, show each piece at once, and fill `answer`, which holds what there is when this is interrupted.

    How far a prompt of several steps is fed is shown until the first piece comes.
    """
    started = time.perf_counter()
    pieces = session.generate(prompt_ids, sampling, generation)
    answer.reused_tokens = session.rewind_to(prompt_ids)
    new = len(prompt_ids) - answer.reused_tokens
    try:
        with screen.prompt_progress(pipeline.registry.observers, new, pipeline.settings.step_tokens):
            begun = list(islice(pieces, 1))
            first = time.perf_counter()
        for piece in chain(begun, pieces):
            if not answer.pieces:
                answer.prefill_seconds = first - started
            answer.pieces.append(piece)
            screen.stream(piece.text)
            answer.decode_seconds = time.perf_counter() - first
    finally:
        screen.end_stream()


_LONGER = "--context makes it longer where the model allows it"


def check_prompt(pipeline: Pipeline, prompt_ids: Sequence[int], advice: str = _LONGER) -> None:
    """Refuse a prompt that is empty or fills the context, before anything is done for it; `advice` says what helps."""
    if not prompt_ids:
        raise InputError("prompt: found no tokens, wanted at least one")
    context = pipeline.settings.context_length
    if len(prompt_ids) >= context:
        raise ConfigError(
            f"prompt: found {counted(len(prompt_ids), 'token')}, wanted fewer than the context's {context}; {advice}"
        )


def require_chat(prompt: PromptConfig) -> None:
    """Refuse what only a chat has where there is none."""
    if prompt.chat:
        return
    if prompt.system is not None:
        raise ConfigError("prompt.system: only a chat has a system message; pass --chat too, or leave it out")
    if prompt.chat_variables:
        raise ConfigError("prompt.chat_variables: only a chat has a template; pass --chat too, or leave them out")


def warn_unused(screen: Screen, template: ChatTemplate, prompt: PromptConfig) -> None:
    """Tell of variables that the template cannot read, such as one that is misspelt."""
    for name in template.unused(prompt.chat_variables):
        screen.warn(f"prompt.chat_variables: {name}: the model's chat template has no such name, so it changes nothing")


@contextmanager
def prompt_encoder(screen: Screen, pipeline: Pipeline, prompt: PromptConfig) -> Iterator[Callable[[str], list[int]]]:
    """What turns a text into token ids, through the chat template where `prompt` is one of a chat."""
    tokenizer = pipeline.tokenizer
    if not prompt.chat:
        yield tokenizer.encode
        return
    from mortice.core.text.chat import ChatTemplate, Message, encode_chat

    before = [] if prompt.system is None else [Message(role="system", content=prompt.system)]
    with closing(ChatTemplate.from_metadata(pipeline.model.file.metadata, tokenizer)) as template:
        warn_unused(screen, template, prompt)
        yield lambda text: encode_chat(
            tokenizer, template, [*before, Message(role="user", content=text)], variables=prompt.chat_variables
        )


def require_stdin() -> None:
    """Refuse to go on without standard input.

    Raises:
        InputError: when the process was started with it closed.

    """
    if sys.stdin is None:
        raise InputError("standard input: is closed, wanted text to read")


def read_stdin() -> str:
    """Standard input as text.

    Raises:
        InputError: when it is closed, or not UTF-8, naming the byte.

    """
    require_stdin()
    data = sys.stdin.buffer.read()
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"standard input: byte {error.start}: not UTF-8") from None
