"""Many sequences of one pipeline at once: who is in the next step, and what came of it (continuous batching).

Each step takes one token of every sequence that decodes, and fills what is left of ``step_tokens`` with prompts, a
chunk at a time, in the order they came in. A request starts as soon as the runtime has a sequence for it and the KV
cache has room for all it may come to hold, so none that has started ever has to be put back. What one request gets
depends on its own tokens, parameters and seed only, beyond rounding.

Where the runtime can share its cache (`SharesCache`), a beginning that several prompts have is computed by the first
and taken over by the others, which wait for it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Generator, Sequence
from contextlib import closing
from functools import cached_property
from itertools import takewhile
from typing import Literal

import numpy as np
from attrs import define, field, frozen
from numpy.typing import NDArray

from mortice.core.errors import ExecutionError, InputError, MorticeError
from mortice.core.plugin.interfaces import StepPart, TokenSequence
from mortice.core.plugin.kv_pages import PAGE_TOKENS, SharesCache
from mortice.core.plugin.token_choice import ChoicePart, ChoosesTokens, TokenChoice
from mortice.core.session import Host
from mortice.core.text.generation import Piece, stream_pieces
from mortice.core.text.params import GenerationParams, SamplingParams
from mortice.core.text.sampling import Sampled, Sampler

__all__ = ["Request", "Result", "finished_results", "stream_events", "stream_many"]

Event = tuple[int, Piece | MorticeError]
"""A request's number, and the next piece of its answer or what ended it."""


def _fixed(prompt_ids: Sequence[int]) -> tuple[int, ...]:
    return tuple(prompt_ids)


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

    prompt_ids: Sequence[int] = field(converter=_fixed)
    sampling: SamplingParams = field(converter=_seeded)
    generation: GenerationParams

    def check(self, host: Host) -> None:
        """Refuse what could never run, before any work: a prompt that is empty or fills the context, a bad id.

        Raises:
            InputError: saying what was found and wanted.

        """
        _Stream(host, 0, self)

    def kv_tokens(self, context_length: int) -> int:
        """Tokens it holds in the KV cache at most; the last token generated is not fed."""
        return min(len(self.prompt_ids) + self.generation.max_tokens - 1, context_length)


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
        self.prompt_ids = request.prompt_ids
        self.to_feed = list(request.prompt_ids)
        self.kv_tokens = request.kv_tokens(host.settings.context_length)
        self.sequence: TokenSequence | None = None
        self.choice: TokenChoice | None = None
        self.chosen = 0
        self.most = min(request.generation.max_tokens, host.settings.context_length - len(request.prompt_ids))
        self._made: NDArray[np.float32] | Sampled | None = None
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
        assert self._made is not None, "the step comes before the piece"
        if isinstance(self._made, Sampled):
            return self._made
        self._sampler.accept(ids)
        return self._sampler.sample(self._made, index)

    def part(self, count: int) -> StepPart:
        """The next `count` tokens, as part of a step that gives logits."""
        assert self.sequence is not None, "it was admitted"
        logits: Literal["last", "none"] = "last" if count == len(self.to_feed) else "none"
        return StepPart(sequence=self.sequence, token_ids=self.to_feed[:count], logits=logits)

    def choice_part(self, count: int) -> ChoicePart:
        """The next `count` tokens, as part of a step that chooses."""
        assert self.sequence is not None, "it was admitted"
        choice = self.choice if count == len(self.to_feed) else None
        return ChoicePart(sequence=self.sequence, token_ids=self.to_feed[:count], choice=choice, index=self.chosen)

    def piece(self, made: NDArray[np.float32] | Sampled) -> Piece:
        """The next piece: of the token chosen, or of the last one's logits, (vocab_size,). Its token is fed next."""
        self._made = made
        piece = next(self._pieces)
        self.to_feed = [piece.id]
        self.chosen += 1
        return piece

    @property
    def length(self) -> int:
        """Tokens in the KV cache."""
        return 0 if self.sequence is None else self.sequence.length

    def close(self) -> None:
        """Give the sequence back."""
        if self.sequence is not None:
            self.sequence.close()


_Work = tuple[_Stream, int]
"""A stream, and how many of its tokens a step feeds."""

_Outcome = NDArray[np.float32] | Sampled | MorticeError | None
"""A stream's token, or the logits to choose it from; None while its prompt goes on; or what ends it."""


@define(eq=False)
class _Scheduler:
    """Requests that wait, and streams that run."""

    host: Host
    waiting: deque[tuple[int, Request]]
    running: list[_Stream] = field(factory=list, init=False)
    full: bool = field(default=False, init=False)
    """Whether the next request found no sequence or no room; so it is until a stream leaves."""

    @cached_property
    def _choosing(self) -> ChoosesTokens | None:
        """The runtime, where it chooses tokens; found out once, for it takes a while."""
        return self.host.runtime if isinstance(self.host.runtime, ChoosesTokens) else None

    def step(self) -> list[Event]:
        """Admit what can start, run one step, and choose a token for each stream that is fed up to its end."""
        self._admit()
        events: list[Event] = []
        work = self._work()
        ahead = self._all_go_on(work)
        on_device = [item for item in work if item[0].choice is not None]
        on_host = [item for item in work if item[0].choice is None]
        for stream, outcome in [*self._run(on_device, ahead=ahead), *self._run(on_host)]:
            if outcome is None:
                continue
            made = outcome if isinstance(outcome, MorticeError) else _piece_or_error(stream, outcome)
            events.append((stream.index, made))
            if isinstance(made, MorticeError) or made.finish_reason is not None:
                self._leave(stream)
        return events

    def _admit(self) -> None:
        """Start requests in their order while there is room: none is overtaken, so none waits for ever."""
        while self.waiting and len(self.running) < self.host.settings.step_tokens and not self.full:
            index, request = self.waiting[0]
            if self._comes(request.prompt_ids):
                return
            try:
                sequence = self.host.runtime.new_sequence()
            except InputError:  # the runtime has no more of them
                if not self.running:
                    raise
                self.full = True
                return
            stream = _Stream(self.host, index, request)
            stream.sequence = sequence
            if self._choosing is not None:
                stream.choice = self._choosing.token_choice(sequence, request.sampling, request.generation)
            self.running.append(stream)
            with self.host.lock:
                if isinstance(self.host.runtime, SharesCache):
                    del stream.to_feed[: self.host.runtime.adopt_prefix(sequence, request.prompt_ids)]
                self.full = len(self.running) > 1 and self._spare_pages() < 0
            if self.full:
                self.running.pop().close()
                return
            self.waiting.popleft()

    def _comes(self, prompt_ids: Sequence[int]) -> bool:
        """Whether a stream is about to compute more of a prompt's beginning than is known now."""
        runtime = self.host.runtime
        if not isinstance(runtime, SharesCache) or not self.host.settings.prefix_cache:
            return False
        computing = [stream.prompt_ids for stream in self.running if stream.length < len(stream.prompt_ids)]
        size = runtime.page_tokens
        coming = max((_shared_pages(other, prompt_ids[:-1], size) for other in computing), default=0)
        return coming > 0 and coming * size > runtime.cached_prefix(prompt_ids)

    def _spare_pages(self) -> int:
        """Pages of the KV cache that no stream may come to need."""
        runtime, streams = self.host.runtime, self.running
        size = runtime.page_tokens if isinstance(runtime, SharesCache) else PAGE_TOKENS
        held = sum(-(-stream.length // size) for stream in streams)
        if isinstance(runtime, SharesCache):
            free = runtime.free_pages  # what several hold is counted once
        else:
            free = -(-self.host.settings.cache_tokens // size) - held
        return free - (sum(-(-stream.kv_tokens // size) for stream in streams) - held)

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

    def _all_go_on(self, work: list[_Work]) -> bool:
        """Whether the next step is likely to feed each stream the token that this one gives it, and nothing else."""
        decode = len(work) == len(self.running) and all(count == len(stream.to_feed) for stream, count in work)
        return decode and any(stream.chosen + 1 < stream.most for stream, _ in work)

    def _run(self, work: list[_Work], *, ahead: bool = False) -> list[tuple[_Stream, _Outcome]]:
        """What a step gives each stream; all of them have their tokens chosen on the device, or none has.

        A step that fails leaves all its sequences as they were. So each of its parts is tried by itself, and only
        those that fail again are at fault.
        """
        if not work:
            return []
        try:
            outcomes = self._feed(work, ahead=ahead)
        except (InputError, ExecutionError) as error:
            if len(work) == 1:
                return [(work[0][0], error)]
            return [answer for item in work for answer in self._run([item])]
        for stream, count in work:
            del stream.to_feed[:count]
        return [(stream, outcome) for (stream, _), outcome in zip(work, outcomes, strict=True)]

    def _feed(self, work: list[_Work], *, ahead: bool) -> Sequence[_Outcome]:
        with self.host.lock:
            if self._choosing is not None and work[0][0].choice is not None:
                return self._choosing.choose_step([stream.choice_part(count) for stream, count in work], ahead=ahead)
            rows = iter(self.host.runtime.step([stream.part(count) for stream, count in work]))
            return [next(rows) if count == len(stream.to_feed) else None for stream, count in work]

    def _leave(self, stream: _Stream) -> None:
        self.running.remove(stream)
        self.full = False
        stream.close()

    def close(self) -> None:
        """Give all sequences back."""
        self.waiting.clear()
        while self.running:
            self._leave(self.running[-1])


def _shared_pages(one: Sequence[int], other: Sequence[int], page_tokens: int) -> int:
    """Whole pages of tokens that two sequences begin with."""
    starts = range(0, min(len(one), len(other)) - page_tokens + 1, page_tokens)
    equal = (one[start : start + page_tokens] == other[start : start + page_tokens] for start in starts)
    return sum(takewhile(bool, equal))


def _piece_or_error(stream: _Stream, made: NDArray[np.float32] | Sampled) -> Piece | MorticeError:
    try:
        return stream.piece(made)
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
