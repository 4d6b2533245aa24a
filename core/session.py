"""One sequence of a pipeline: tokens fed, text generated, and what was fed before not computed again."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from operator import index
from types import TracebackType
from typing import TYPE_CHECKING, Protocol, Self

import numpy as np
from attrs import define, field
from numpy.typing import NDArray

from mortice.core.errors import InputError, UnsupportedError
from mortice.core.plugin.interfaces import Runtime, RuntimeSettings, StepPart, TokenSequence
from mortice.core.plugin.kv_pages import SharesCache
from mortice.core.text.generation import Piece, stream_pieces
from mortice.core.text.params import GenerationParams, SamplingParams
from mortice.core.text.sampling import Sampled, Sampler

if TYPE_CHECKING:  # the tokenizer library is imported when text is first needed
    from mortice.core.text.tokenizer import Tokenizer

__all__ = ["Host", "Session", "token_ids_of"]


class Host(Protocol):
    """What a session needs of its pipeline."""

    settings: RuntimeSettings
    lock: threading.RLock
    """Held around a step: steps of one pipeline run one at a time."""

    @property
    def runtime(self) -> Runtime:
        """Runs the steps."""
        ...

    @property
    def tokenizer(self) -> Tokenizer:
        """The file's own."""
        ...


def token_ids_of(found: object, wanted: str = "token ids") -> list[int]:
    """A list of the token ids in a list, tuple, array or other iterable.

    Raises:
        InputError: for what is none, or holds something else than integers.

    """
    if isinstance(found, Iterable) and not isinstance(found, str | bytes | Mapping):
        try:
            return [index(token) for token in found]
        except TypeError:
            pass
    raise InputError(f"prompt: found {found!r:.40}, wanted {wanted}")


@define(eq=False)
class Session:
    """One sequence of a pipeline. A prompt that begins like what was fed before is not computed again.

    What other sequences of the pipeline were fed counts, too, as far as the runtime still has it (`SharesCache`).
    """

    pipeline: Host
    sequence: TokenSequence
    fed: list[int] = field(factory=list, init=False)

    def feed(self, token_ids: Sequence[int], logits: str = "last") -> NDArray[np.float32]:
        """Feed tokens after those fed before; float32 logits of the last one, or of all, (rows, vocab_size)."""
        ids = token_ids_of(token_ids)
        room = self.pipeline.settings.context_length - self.sequence.length
        if not ids:
            raise InputError("no tokens to feed")
        if len(ids) > room:
            raise InputError(
                f"{self.sequence.length} + {len(ids)} tokens do not fit the context of "
                f"{self.pipeline.settings.context_length}"
            )
        size = self.pipeline.settings.step_tokens
        rows = []
        for start in range(0, len(ids), size):
            chunk = ids[start : start + size]
            wanted = logits if logits == "all" or start + size >= len(ids) else "none"
            part = StepPart(sequence=self.sequence, token_ids=chunk, logits=wanted)  # type: ignore[arg-type]
            with self.pipeline.lock:
                rows.append(self.pipeline.runtime.step([part]))
            self.fed += chunk
        return np.concatenate(rows) if len(rows) > 1 else rows[0]

    def rewind_to(self, token_ids: Sequence[int]) -> int:
        """Forget what differs from `token_ids`; returns how many of them are fed already, at least one left to feed.

        Where other sequences were fed more of them, this one takes that over.
        """
        shared = 0
        for ours, theirs in zip(self.fed, token_ids[:-1], strict=False):
            if ours != theirs:
                break
            shared += 1
        runtime = self.pipeline.runtime
        with self.pipeline.lock:  # no step takes the pages in between
            if isinstance(runtime, SharesCache) and runtime.cached_prefix(token_ids) > shared:
                self.sequence.truncate(0)
                shared = runtime.adopt_prefix(self.sequence, token_ids)
                self.fed[:] = token_ids[:shared]
            else:
                self.sequence.truncate(shared)
                del self.fed[shared:]
        return shared

    def fork(self) -> Session:
        """Another session that was fed the same: nothing is computed, and each goes its own way from here.

        Both share what they have in common; close them both.

        Raises:
            UnsupportedError: for an executor whose sequences cannot share their cache.
            InputError: when the runtime has no more sequences.

        """
        runtime = self.pipeline.runtime
        if not isinstance(runtime, SharesCache):
            raise UnsupportedError("fork: the executor's sequences cannot share a KV cache (SharesCache)")
        with self.pipeline.lock:
            other = Session(self.pipeline, runtime.fork(self.sequence))
        other.fed += self.fed
        return other

    def generate(
        self, prompt_ids: Sequence[int], sampling: SamplingParams, generation: GenerationParams
    ) -> Iterator[Piece]:
        """Generate after a whole prompt, feeding only what was not fed before."""
        from mortice.core.text.detokenizer import IncrementalDetokenizer

        pipeline = self.pipeline
        sampler = Sampler(sampling, pipeline.tokenizer.vocab_size, top_logprobs=generation.logprobs)
        on_device = pipeline.runtime.device_chooser(self.sequence, sampling, generation, self.fed)

        def choose(ids: Sequence[int], index: int) -> Sampled:
            new = list(ids)[self.rewind_to(ids) :] if index == 0 else list(ids)
            if on_device is None:
                sampler.accept(ids)
                return sampler.sample(self.feed(new)[-1], index)
            with pipeline.lock:
                chosen = on_device(new, index)
            self.fed += new
            return chosen

        return stream_pieces(
            choose,
            prompt_ids,
            tokenizer=pipeline.tokenizer,
            detokenizer=IncrementalDetokenizer(pipeline.tokenizer),
            generation=generation,
            context_length=pipeline.settings.context_length,
        )

    def close(self) -> None:
        """Give the sequence's memory back."""
        self.sequence.close()
        self.fed.clear()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
