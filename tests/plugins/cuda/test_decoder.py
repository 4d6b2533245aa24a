"""When a decoder uses the step it launched ahead, and when it begins anew."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest
from attrs import define, field

from mortice.core.errors import ConfigError
from mortice.core.plugin.interfaces import StepPart
from mortice.core.plugin.kv_pages import PagePool
from mortice.core.text.params import SamplingParams
from mortice.core.text.sampling import Sampled
from mortice.plugins.executors.cuda.run.decoder import Decoder
from mortice.plugins.executors.cuda.run.kv_pool import CudaSequence

PENALTIES = SamplingParams(repetition_penalty=1.5, seed=1)


@define(eq=False)
class Pretence:
    """A runtime and its chooser in one; the token after position p is 100 + p."""

    epoch: int = 0
    vocab_size: int = 1000
    calls: list[tuple[Any, ...]] = field(factory=list)
    device: Any = field(factory=lambda: SimpleNamespace(make_current=lambda: None))
    _queued: list[int] = field(factory=list)

    @property
    def chooser(self) -> Any:
        return self

    def step(self, parts: Sequence[StepPart]) -> None:
        self.epoch += 1
        self.calls.append(("step", list(parts[0].token_ids)))
        sequence = parts[0].sequence
        assert isinstance(sequence, CudaSequence)
        sequence.reserve(sequence.length + len(parts[0].token_ids))
        sequence.advance(parts[0].token_ids)

    def decode(self, sequence: CudaSequence, token: int | None) -> None:
        sequence.reserve(sequence.length + 1)
        if token is not None:
            self.epoch += 1
        self.calls.append(("ahead",) if token is None else ("feed", token))
        self._queued.append(100 + sequence.length)

    def begin(
        self,
        owner: object,
        slot: int,
        sampling: SamplingParams,
        *,
        step: int,
        top: int,
        position: int,
        seen: Sequence[int],
    ) -> None:
        self.calls.append(("begin", step, list(seen)))

    def place(self, slots: Sequence[int]) -> None:
        assert slots == [0]

    def queued(self) -> int:
        return len(self._queued) - 1

    def event(self, place: int) -> int:
        return place

    def wait(self, work: Any) -> None:
        self.calls.append(("wait", work))

    def take(self, place: int, *, step: int, top: int) -> Sampled:
        return Sampled(id=self._queued[place], logprob=0.0)


@pytest.fixture
def runtime() -> Pretence:
    return Pretence()


@pytest.fixture
def sequence() -> CudaSequence:
    return new_sequence(PagePool(2), 128)


def new_sequence(pool: PagePool, context_length: int) -> CudaSequence:
    return CudaSequence(pool, context_length, lambda *_: None, 0, None)


def test_each_step_is_launched_before_the_one_waited_for_ends(runtime: Pretence, sequence: CudaSequence) -> None:
    decoder = Decoder(runtime, sequence, PENALTIES, 0, [])
    assert [decoder([5, 6, 7], 0).id, decoder([102], 1).id, decoder([103], 2).id] == [102, 103, 104]
    assert runtime.calls == [
        *[("step", [5, 6]), ("begin", 0, [5, 6, 7]), ("feed", 7), ("ahead",), ("wait", 0)],
        *[("ahead",), ("wait", 1)],
        *[("ahead",), ("wait", 2)],
    ]
    assert sequence.length == 5


def test_other_work_on_the_card_makes_a_decoder_write_all_of_its_state_again(
    runtime: Pretence, sequence: CudaSequence
) -> None:
    fed: list[int] = []
    decoder = Decoder(runtime, sequence, PENALTIES, 0, fed)
    decoder([7], 0)
    fed += [7]
    runtime.epoch += 1
    del runtime.calls[:]
    assert decoder([100], 1).id == 101
    assert runtime.calls[:2] == [("begin", 1, [7, 100]), ("feed", 100)]


def test_a_step_ahead_of_a_sequence_that_was_cut_is_not_used(runtime: Pretence, sequence: CudaSequence) -> None:
    decoder = Decoder(runtime, sequence, PENALTIES, 0, [])
    decoder([5, 6, 7], 0)
    sequence.truncate(1)
    assert decoder([102], 1).id == 101
    assert ("feed", 102) in runtime.calls


def test_another_token_or_step_than_the_one_launched_begins_anew(runtime: Pretence, sequence: CudaSequence) -> None:
    for ids, index in (([9], 1), ([100], 5), ([100, 3], 1)):
        decoder = Decoder(runtime, sequence, SamplingParams(seed=0), 0, ())
        sequence.truncate(0)
        decoder([7], 0)
        del runtime.calls[:]
        decoder(ids, index)
        assert ("begin", index, []) in runtime.calls


def test_no_step_is_launched_beyond_the_context_or_the_free_pages(runtime: Pretence) -> None:
    pool = PagePool(1)
    for context, most in ((3, 3), (1000, 64)):
        sequence = new_sequence(pool, context)
        decoder = Decoder(runtime, sequence, SamplingParams(seed=0), 0, ())
        token = 1
        for index in range(most):
            token = decoder([token], index).id
        assert sequence.length == most
        assert runtime.calls[-2:] == [("wait", runtime.queued() - 1), ("wait", runtime.queued())]
        sequence.close()


def test_a_bias_outside_the_vocabulary_is_refused(runtime: Pretence, sequence: CudaSequence) -> None:
    with pytest.raises(ConfigError, match="logit_bias: found token id 1000, wanted one below 1000"):
        Decoder(runtime, sequence, SamplingParams(logit_bias={1000: 1.0}), 0, ())
