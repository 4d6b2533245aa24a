"""From a prompt to a stream of text: choose a token, detokenise, look for a reason to stop."""

from __future__ import annotations

from collections.abc import Callable, Collection, Generator, Sequence
from typing import Literal, Protocol

import numpy as np
from attrs import frozen
from numpy.typing import NDArray

from mortice.core.counts import counted
from mortice.core.errors import ConfigError, TokenizerError
from mortice.core.text.params import GenerationParams, SamplingParams
from mortice.core.text.sampling import Sampled, Sampler
from mortice.core.text.stopping import StopMatcher

__all__ = [
    "ChooseToken",
    "Detokenizer",
    "FinishReason",
    "GenerationParams",
    "Piece",
    "StepModel",
    "TokenizerInfo",
    "generate",
    "stream_pieces",
]

FinishReason = Literal["stop", "length"]
"""``stop``: an end token or a stop string was met. ``length``: `max_tokens` or the context is used up."""

StepModel = Callable[[Sequence[int]], NDArray[np.float32]]
"""Feeds tokens after those fed before and returns the last one's logits: ``float32``, shape (vocab_size,).

The array may be reused by the next call.
"""

ChooseToken = Callable[[Sequence[int], int], Sampled]
"""Feeds tokens and returns the token chosen next; the second argument counts the tokens generated before.

An executor that samples on its device offers this; elsewhere `generate` makes it of a `StepModel` and a
`Sampler`.
"""


class TokenizerInfo(Protocol):
    """The part of a tokenizer that generation needs."""

    @property
    def vocab_size(self) -> int:
        """Number of token ids."""

    @property
    def stop_ids(self) -> Collection[int]:
        """The ids that end a text, from the model file."""


class Detokenizer(Protocol):
    """Turns the tokens of one text into characters, never half a character."""

    def push(self, token: int, /) -> str:
        """The characters that are complete with this token; may be empty."""

    def finish(self) -> str:
        """What remains when no token follows, bytes that are no character replaced."""


@frozen(kw_only=True)
class Piece:
    """What one generated token adds. The texts of all pieces, joined, are the text generated.

    Attributes:
        text: text that can be shown now; empty while a character, or what may be a stop string, is
            incomplete.
        id: the token, an end token included.
        logprob: its natural log-probability, see `Sampled`.
        top_logprobs: the most likely tokens as (id, log-probability), best first.
        index: 0 for the first token generated.
        finish_reason: set on the last piece only.
        stop_reason: where `finish_reason` is ``stop``: the stop string found, or the id of the end token.

    """

    text: str
    id: int
    logprob: float
    top_logprobs: tuple[tuple[int, float], ...]
    index: int
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = None


def generate(
    step: StepModel,
    prompt_ids: Sequence[int],
    *,
    tokenizer: TokenizerInfo,
    detokenizer: Detokenizer,
    sampling: SamplingParams,
    generation: GenerationParams,
    context_length: int,
) -> Generator[Piece, None, None]:
    """Generate text after a prompt, one piece per token.

    Arguments are checked now; the prompt is fed when the first piece is asked for, and each token only when
    the piece after it is. So a caller who stops asking, or closes the generator, causes no further work.

    Args:
        step: the model, with nothing fed yet.
        prompt_ids: the prompt, at least one token.
        tokenizer: gives the end tokens and the vocabulary's size.
        detokenizer: a fresh one for this text.
        sampling: how to choose tokens. To know a drawn seed, pass ``sampling.seeded()``.
        generation: when to end.
        context_length: how many tokens prompt and generated text may have together.

    Raises:
        TokenizerError: the prompt is empty or holds an id outside the vocabulary.
        ConfigError: the prompt leaves no room in the context, or a parameter does not fit the vocabulary.
        ExecutionError: while iterating: the logits cannot be sampled.

    """
    sampler = Sampler(sampling, tokenizer.vocab_size, top_logprobs=generation.logprobs)

    def choose(ids: Sequence[int], index: int) -> Sampled:
        sampler.accept(ids)
        return sampler.sample(step(ids), index)

    return stream_pieces(
        choose,
        prompt_ids,
        tokenizer=tokenizer,
        detokenizer=detokenizer,
        generation=generation,
        context_length=context_length,
    )


def stream_pieces(
    choose: ChooseToken,
    prompt_ids: Sequence[int],
    *,
    tokenizer: TokenizerInfo,
    detokenizer: Detokenizer,
    generation: GenerationParams,
    context_length: int,
) -> Generator[Piece, None, None]:
    """`generate` with the choice of tokens left to `choose`, which has to honour ``generation.logprobs``."""
    if not len(prompt_ids):
        raise TokenizerError("prompt: found no tokens, wanted at least one")
    for token in prompt_ids:
        if not 0 <= token < tokenizer.vocab_size:
            raise TokenizerError(f"prompt: token id {token} is outside the vocabulary of {tokenizer.vocab_size} tokens")
    room = context_length - len(prompt_ids)
    if room < 1:
        raise ConfigError(
            f"prompt: found {counted(len(prompt_ids), 'token')}, wanted fewer than the context's {context_length}"
        )
    return _pieces(
        choose,
        prompt_ids,
        detokenizer=detokenizer,
        matcher=StopMatcher(generation.stop),
        end_ids=frozenset(tokenizer.stop_ids) if generation.stop_at_eos else frozenset(),
        limit=min(generation.max_tokens, room),
    )


def _pieces(
    choose: ChooseToken,
    prompt_ids: Sequence[int],
    *,
    detokenizer: Detokenizer,
    matcher: StopMatcher,
    end_ids: frozenset[int],
    limit: int,
) -> Generator[Piece, None, None]:
    ids = prompt_ids
    for index in range(limit):
        sampled = choose(ids, index)
        is_end = sampled.id in end_ids
        is_last = is_end or index == limit - 1
        text = "" if is_end else detokenizer.push(sampled.id)
        if is_last:
            text += detokenizer.finish()
        text, stop = matcher.push(text)
        if is_last and stop is None:
            text += matcher.finish()
        stop_reason = stop if stop is not None else sampled.id if is_end else None
        finish_reason: FinishReason | None = "stop" if stop_reason is not None else "length" if is_last else None
        yield Piece(
            text=text,
            id=sampled.id,
            logprob=sampled.logprob,
            top_logprobs=sampled.top,
            index=index,
            finish_reason=finish_reason,
            stop_reason=stop_reason,
        )
        if finish_reason is not None:
            return
        ids = (sampled.id,)
