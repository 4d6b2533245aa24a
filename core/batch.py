"""Many sequences of one pipeline at once: who is in the next step, and what came of it (continuous batching).

Each step takes one token of every sequence that decodes, and fills what is left of ``step_tokens`` with prompts, a
chunk at a time, in the order they came in. A request starts as soon as the runtime has a sequence for it and the KV
cache has room for all it may come to hold, so none that has started ever has to be put back. What one request gets
depends on its own tokens, parameters and seed only, beyond rounding.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Generator, Sequence
from contextlib import closing

import numpy as np
from attrs import define, field, frozen
from numpy.typing import NDArray

from mortice.core.errors import ExecutionError, InputError, MorticeError
from mortice.core.plugin.interfaces import StepPart, TokenSequence
from mortice.core.session import Host
from mortice.core.text.generation import Piece, stream_pieces
from mortice.core.text.params import GenerationParams, SamplingParams
from mortice.core.text.sampling import Sampled, Sampler

__all__ = ["KV_PAGE_TOKENS", "Request", "Result", "finished_results", "stream_events", "stream_many"]

KV_PAGE_TOKENS = 64
"""What a sequence may hold is counted in pages of so many tokens, the largest an executor here gives out.

All sequences together get as many pages as one that fills the context, for that is the cache that was planned.
"""

Event = tuple[int, Piece | MorticeError]
"""A request's number, and the next piece of its answer or what ended it."""


def _seeded(sampling: SamplingParams) -> SamplingParams:
    return sampling.seeded()


@frozen(kw_only=True)
class Request:
    """One prompt and how to answer it.

    Attributes:
        prompt_ids: token ids of the whole prompt.
        sampling: how to choose tokens; the seed is drawn now where none is given.
        generation: when to end.

    """

    prompt_ids: Sequence[int]
    sampling: SamplingParams = field(converter=_seeded)
    generation: GenerationParams

    def check(self, host: Host) -> None:
        """Refuse what could never run, before any work: a prompt that is empty or fills the context, a bad id.

        Raises:
            InputError: saying what was found and wanted.

        """
        _Stream(host, 0, self)

    def pages(self, context_length: int) -> int:
        """Pages of the KV cache it holds at most; the last token generated is not fed."""
        tokens = min(len(self.prompt_ids) + self.generation.max_tokens - 1, context_length)
        return -(-tokens // KV_PAGE_TOKENS)


@define(kw_only=True)
class Result:
    """What became of a request.

    Attributes:
        index: its number, from 0.
        request: what was asked; its seed repeats the answer.
        pieces: the answer, one piece a token; up to the error where there is one.
        error: why it ended early; None when it did not.

    """

    index: int
    request: Request = field(repr=False)
    pieces: list[Piece] = field(factory=list, repr=False)
    error: MorticeError | None = None

    @property
    def text(self) -> str:
        """All of the answer."""
        return "".join(piece.text for piece in self.pieces)

    @property
    def token_ids(self) -> list[int]:
        """The tokens generated, an end token included."""
        return [piece.id for piece in self.pieces]


class _Stream:
    """A request while it is answered; `check` of a request makes one to see what its parts refuse."""

    def __init__(self, host: Host, index: int, request: Request) -> None:
        from mortice.core.text.detokenizer import IncrementalDetokenizer

        tokenizer = host.tokenizer
        self.index = index
        self.to_feed = list(request.prompt_ids)
        self.pages = request.pages(host.settings.context_length)
        self.sequence: TokenSequence | None = None
        self._logits: NDArray[np.float32] | None = None
        self._sampler = Sampler(request.sampling, tokenizer.vocab_size, top_logprobs=request.generation.logprobs)
        self._pieces = stream_pieces(
            self._choose,
            request.prompt_ids,
            tokenizer=tokenizer,
            detokenizer=IncrementalDetokenizer(tokenizer),
            generation=request.generation,
            context_length=host.settings.context_length,
        )

    def _choose(self, ids: Sequence[int], index: int) -> Sampled:
        assert self._logits is not None, "the step comes before the piece"
        self._sampler.accept(ids)
        return self._sampler.sample(self._logits, index)

    def part(self, count: int) -> StepPart:
        """The next `count` tokens, as part of a step."""
        assert self.sequence is not None, "it was admitted"
        logits = "last" if count == len(self.to_feed) else "none"
        return StepPart(sequence=self.sequence, token_ids=self.to_feed[:count], logits=logits)  # type: ignore[arg-type]  # one of two literals

    def piece(self, logits: NDArray[np.float32]) -> Piece:
        """Choose the next token from the last one's logits, (vocab_size,); it is what is fed next."""
        self._logits = logits
        piece = next(self._pieces)
        self.to_feed = [piece.id]
        return piece

    def close(self) -> None:
        """Give the sequence back."""
        if self.sequence is not None:
            self.sequence.close()


_Work = tuple[_Stream, int]
"""A stream, and how many of its tokens a step feeds."""


@define(eq=False)
class _Scheduler:
    """Requests that wait, and streams that run."""

    host: Host
    waiting: deque[tuple[int, Request]]
    running: list[_Stream] = field(factory=list, init=False)
    free_pages: int = field(init=False)

    def __attrs_post_init__(self) -> None:
        self.free_pages = -(-self.host.settings.context_length // KV_PAGE_TOKENS)

    def step(self) -> list[Event]:
        """Admit what can start, run one step, and choose a token for each stream that is fed up to its end."""
        self._admit()
        events: list[Event] = []
        for stream, outcome in self._run(self._work()):
            if outcome is None:
                continue
            made = outcome if isinstance(outcome, MorticeError) else _piece_or_error(stream, outcome)
            events.append((stream.index, made))
            if isinstance(made, MorticeError) or made.finish_reason is not None:
                self._leave(stream)
        return events

    def _admit(self) -> None:
        """Start requests in their order while there is room: none is overtaken, so none waits for ever."""
        settings = self.host.settings
        while self.waiting and len(self.running) < settings.step_tokens:
            index, request = self.waiting[0]
            if request.pages(settings.context_length) > self.free_pages:
                return
            try:
                sequence = self.host.runtime.new_sequence()
            except InputError:  # the runtime has no more of them
                if not self.running:
                    raise
                return
            stream = _Stream(self.host, index, request)
            stream.sequence = sequence
            self.free_pages -= stream.pages
            self.running.append(stream)
            self.waiting.popleft()

    def _work(self) -> list[_Work]:
        """What the next step feeds: streams with one token left first, then prompts with what room remains."""
        room = self.host.settings.step_tokens
        work: list[_Work] = []
        for stream in sorted(self.running, key=lambda stream: len(stream.to_feed) > 1):
            count = min(len(stream.to_feed), room)
            if count:
                work.append((stream, count))
                room -= count
        return work

    def _run(self, work: list[_Work]) -> list[tuple[_Stream, NDArray[np.float32] | MorticeError | None]]:
        """Each stream's logits of its last token, None while its prompt goes on, or the error that ends it.

        A step that fails leaves all its sequences as they were. So each of its parts is tried by itself, and only
        those that fail again are at fault.
        """
        try:
            rows = iter(self._feed(work))
        except (InputError, ExecutionError) as error:
            if len(work) == 1:
                return [(work[0][0], error)]
            return [answer for item in work for answer in self._run([item])]
        found = []
        for stream, count in work:
            del stream.to_feed[:count]
            found.append((stream, None if stream.to_feed else next(rows)))
        return found

    def _feed(self, work: list[_Work]) -> NDArray[np.float32]:
        parts = [stream.part(count) for stream, count in work]
        with self.host.lock:
            return self.host.runtime.step(parts)

    def _leave(self, stream: _Stream) -> None:
        self.running.remove(stream)
        self.free_pages += stream.pages
        stream.close()

    def close(self) -> None:
        """Give all sequences back."""
        self.waiting.clear()
        while self.running:
            self._leave(self.running[-1])


def _piece_or_error(stream: _Stream, logits: NDArray[np.float32]) -> Piece | MorticeError:
    try:
        return stream.piece(logits)
    except MorticeError as error:
        return error


def stream_events(host: Host, requests: Sequence[Request]) -> Generator[Event, None, None]:
    """Answer all requests; what comes of each as it is made. Closing the generator early frees all sequences.

    An error that belongs to one request is given as its last event, and the others go on.

    Args:
        host: the pipeline.
        requests: each one's number is its place here.

    Raises:
        InputError: before any work, for a request that could never run, naming it; while iterating, when the runtime
            has no sequence left because others hold them all.
        DeviceError: while iterating: the device failed.

    """
    for index, request in enumerate(requests):
        try:
            request.check(host)
        except InputError as error:
            raise InputError(f"prompt {index}: {error}") from error
    return _events(_Scheduler(host, deque(enumerate(requests))))


def _events(scheduler: _Scheduler) -> Generator[Event, None, None]:
    with closing(scheduler):
        while scheduler.waiting or scheduler.running:
            yield from scheduler.step()


def stream_many(host: Host, requests: Sequence[Request]) -> Generator[tuple[int, Piece], None, None]:
    """`stream_events` as pieces only.

    Raises:
        InputError: as `stream_events` does.
        DeviceError: as `stream_events` does.
        ExecutionError: when all others are finished: naming each request that failed, and why.

    """
    return _pieces(stream_events(host, requests))


def _pieces(events: Generator[Event, None, None]) -> Generator[tuple[int, Piece], None, None]:
    failed = []
    with closing(events):
        for index, event in events:
            if isinstance(event, MorticeError):
                failed.append(f"prompt {index}: {event}")
            else:
                yield index, event
    if failed:
        raise ExecutionError("; ".join(failed))


def finished_results(host: Host, requests: Sequence[Request]) -> Generator[Result, None, None]:
    """`stream_events` as whole results, each as soon as it is there; errors are in them.

    Raises:
        InputError: as `stream_events` does.
        DeviceError: as `stream_events` does.

    """
    return _results(stream_events(host, requests), requests)


def _results(events: Generator[Event, None, None], requests: Sequence[Request]) -> Generator[Result, None, None]:
    unfinished: dict[int, Result] = {}
    with closing(events):
        for index, event in events:
            result = unfinished.setdefault(index, Result(index=index, request=requests[index]))
            if isinstance(event, MorticeError):
                result.error = event
            else:
                result.pieces.append(event)
            if isinstance(event, MorticeError) or event.finish_reason is not None:
                yield unfinished.pop(index)
