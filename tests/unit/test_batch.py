"""Many sequences at once: equal to one by one, on the reference executor with a tiny model."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from attrs import define, evolve, field
from numpy.typing import NDArray

from mortice.core.batch import finished_results, stream_many
from mortice.core.config import ExecutorConfig, ModelConfig, RunConfig
from mortice.core.errors import ConfigError, DeviceError, ExecutionError, InputError
from mortice.core.pipeline import Pipeline, load
from mortice.core.plugin.interfaces import Runtime, StepPart, TokenSequence
from mortice.core.plugin.kv_pages import PAGE_TOKENS, SharesCache
from mortice.core.text.generation import Piece
from tests.support.tiny import tiny

PROMPTS: list[str | list[int]] = ["hello", "a much longer prompt than the others have, in many tokens", [5, 6, 7], "x"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny(tmp_path_factory.mktemp("models"))


@pytest.fixture
def pipe(model: Path) -> Iterator[Pipeline]:
    with opened(model) as pipeline:
        yield pipeline


def opened(model: Path, *, context: int = 512, step_tokens: int = 16) -> Pipeline:
    executor = ExecutorConfig(name="reference", context=context, step_tokens=step_tokens)
    return load(RunConfig(model=ModelConfig(path=model), executor=executor))


@define(eq=False)
class WatchedSequence:
    """A sequence that its runtime can see closed."""

    inner: TokenSequence
    among: list[WatchedSequence]

    @property
    def length(self) -> int:
        return self.inner.length

    def truncate(self, length: int) -> None:
        self.inner.truncate(length)

    def close(self) -> None:
        self.among.remove(self)
        self.inner.close()


@define(eq=False)
class Watched:
    """A runtime that notes its steps and open sequences, and may have few of these or fail."""

    inner: Runtime
    most: int = 1000
    fails: Callable[[Sequence[StepPart]], Exception | None] = lambda _: None
    steps: list[list[tuple[TokenSequence, int]]] = field(factory=list)
    open: list[WatchedSequence] = field(factory=list)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    def new_sequence(self) -> WatchedSequence:
        if len(self.open) >= self.most:
            raise InputError(f"{self.most} sequences are open")
        self.open.append(WatchedSequence(self.inner.new_sequence(), self.open))
        return self.open[-1]

    def step(self, parts: Sequence[StepPart]) -> NDArray[np.float32]:
        self.steps.append([(part.sequence, len(part.token_ids)) for part in parts])
        error = self.fails(parts)
        if error is not None:
            raise error
        return self.inner.step([evolve(part, sequence=inner_of(part.sequence)) for part in parts])

    # `SharesCache` -------------------------------------------------------------------------------------------------

    @property
    def shares(self) -> SharesCache:
        assert isinstance(self.inner, SharesCache)
        return self.inner

    @property
    def page_tokens(self) -> int:
        return self.shares.page_tokens

    @property
    def free_pages(self) -> int:
        return self.shares.free_pages

    def cached_prefix(self, token_ids: Sequence[int]) -> int:
        return self.shares.cached_prefix(token_ids)

    def adopt_prefix(self, sequence: TokenSequence, token_ids: Sequence[int]) -> int:
        return self.shares.adopt_prefix(inner_of(sequence), token_ids)

    def fork(self, sequence: TokenSequence) -> WatchedSequence:
        self.open.append(WatchedSequence(self.shares.fork(inner_of(sequence)), self.open))
        return self.open[-1]


def inner_of(sequence: TokenSequence) -> TokenSequence:
    assert isinstance(sequence, WatchedSequence)
    return sequence.inner


def watch(pipe: Pipeline, **options: Any) -> Watched:
    watched = Watched(pipe.runtime, **options)
    pipe._runtime = watched
    return watched


def one_by_one(pipe: Pipeline, prompts: Sequence[Any], **options: Any) -> list[list[Piece]]:
    return [list(pipe.generate(prompt, **options)) for prompt in prompts]


def same(one: Sequence[Piece], other: Sequence[Piece]) -> None:
    """Equal but for rounding of the log-probabilities."""
    plain = [[evolve(piece, logprob=0.0, top_logprobs=()) for piece in pieces] for pieces in (one, other)]
    assert plain[0] == plain[1]
    np.testing.assert_allclose([p.logprob for p in one], [p.logprob for p in other], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"temperature": 1.0, "seed": 7},
        {"temperature": 1.5, "seed": 3, "top_k": 50, "top_p": 0.9, "repetition_penalty": 1.3, "logprobs": 3},
    ],
    ids=["greedy", "sampled", "filtered and penalised"],
)
def test_many_at_once_give_what_one_by_one_gives(pipe: Pipeline, options: dict[str, Any]) -> None:
    options = {"max_tokens": 20, "stop_at_eos": False, **options}
    results = pipe.complete_many(PROMPTS, **options)
    for result, alone in zip(results, one_by_one(pipe, PROMPTS, **options), strict=True):
        same(result.pieces, alone)


def test_each_prompt_has_its_own_parameters(pipe: Pipeline) -> None:
    given: list[dict[str, Any]] = [
        {"prompt": "hello", "temperature": 1.2, "seed": 1, "max_tokens": 9},
        {"prompt": "hello", "temperature": 1.2, "seed": 2, "max_tokens": 6},
        {"prompt": [5, 6, 7], "max_tokens": 3},
    ]
    results = pipe.complete_many(given, stop_at_eos=False)
    assert [len(result.pieces) for result in results] == [9, 6, 3]
    assert results[0].token_ids[:6] != results[1].token_ids
    for options, result in zip(given, results, strict=True):
        same(result.pieces, list(pipe.generate(**options, stop_at_eos=False)))


def test_a_drawn_seed_is_in_the_result_and_repeats_it(pipe: Pipeline) -> None:
    first = pipe.complete_many(["hello", "hello"], temperature=1.5, max_tokens=12)
    seeds = [result.request.sampling.seed for result in first]
    assert seeds[0] != seeds[1]
    again = pipe.complete_many([{"prompt": "hello", "seed": seed} for seed in seeds], temperature=1.5, max_tokens=12)
    assert [result.token_ids for result in again] == [result.token_ids for result in first]


def test_one_that_stops_early_leaves_the_others_going(pipe: Pipeline) -> None:
    alone = one_by_one(pipe, PROMPTS[:2], max_tokens=12, stop_at_eos=False)
    stop = next(piece.text for piece in alone[0][3:] if piece.text)
    first, second = pipe.complete_many([{"prompt": PROMPTS[0], "stop": (stop,)}, PROMPTS[1]], max_tokens=12)
    assert first.pieces[-1].stop_reason == stop
    assert len(first.pieces) < 12
    same(second.pieces, list(pipe.generate(PROMPTS[1], max_tokens=12)))


def test_pieces_come_as_they_are_made(pipe: Pipeline) -> None:
    order = [index for index, _ in pipe.generate_many([[1, 2], [3, 4]], max_tokens=3, stop_at_eos=False)]
    assert order == [0, 1] * 3


def test_a_prompt_is_fed_in_chunks_while_others_decode(model: Path) -> None:
    with opened(model, step_tokens=4) as pipe:
        runtime = watch(pipe)
        short, long = [1, 2], list(range(1, 12))
        pieces = pipe.generate_many([short, long], max_tokens=5, stop_at_eos=False)
        alone = one_by_one(pipe, [short, long], max_tokens=5, stop_at_eos=False)
        runtime.steps.clear()
        got: list[list[Piece]] = [[], []]
        for index, piece in pieces:
            got[index].append(piece)
        same(got[0], alone[0])
        same(got[1], alone[1])
        assert [[count for _, count in step] for step in runtime.steps[:4]] == [[2, 2], [1, 3], [1, 3], [1, 3]]
        assert all(sum(count for _, count in step) <= 4 for step in runtime.steps)


def test_more_than_the_runtime_has_sequences_wait_their_turn(pipe: Pipeline) -> None:
    prompts = [[number + 1] for number in range(7)]
    alone = one_by_one(pipe, prompts, max_tokens=4, stop_at_eos=False)
    runtime = watch(pipe, most=3)
    results = pipe.complete_many(prompts, max_tokens=4, stop_at_eos=False)
    for result, pieces in zip(results, alone, strict=True):
        same(result.pieces, pieces)
    assert max(len(step) for step in runtime.steps) == 3
    assert runtime.open == []


def test_no_more_start_than_the_kv_cache_has_pages_for(model: Path) -> None:
    with opened(model, context=4 * PAGE_TOKENS, step_tokens=64) as pipe:
        runtime = watch(pipe)
        # two pages each by what they may come to hold
        prompts = [[number + 1] for number in range(5)]
        options = {"max_tokens": 2 * PAGE_TOKENS, "stop": ("\x00",)}
        for index, piece in (pieces := pipe.generate_many(prompts, **options)):
            assert index in (0, 1)
            if piece.index == 5:
                break
        pieces.close()  # type: ignore[attr-defined]
        assert max(len(step) for step in runtime.steps) == 2


def test_fewer_tokens_a_step_than_sequences_still_finish_all(model: Path) -> None:
    with opened(model, step_tokens=2) as pipe:
        results = pipe.complete_many([[1], [2, 3, 4], [5], [6, 7]], max_tokens=4, stop_at_eos=False)
        for result, alone in zip(
            results, one_by_one(pipe, [[1], [2, 3, 4], [5], [6, 7]], max_tokens=4, stop_at_eos=False), strict=True
        ):
            same(result.pieces, alone)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([1] * 512, "prompt 1: prompt: found 512 tokens, wanted fewer than the context's 512"),
        ([], "prompt 1: prompt: found no tokens"),
        ({"max_tokens": 3}, "prompt 1: prompt: found no tokens"),
        ([1, 10**6], "prompt 1: prompt: token id 1000000 is outside the vocabulary"),
        ({"prompt": "a", "temprature": 1}, "prompt 1: generate: unknown key 'temprature', did you mean 'temperature'"),
        ({"prompt": "a", "max_tokens": 0}, "prompt 1: max_tokens: found 0, wanted an integer >= 1"),
        ({"prompt": "a", "logit_bias": {10**6: 1.0}}, "prompt 1: logit_bias: found token id 1000000"),
    ],
)
def test_a_prompt_that_can_never_run_is_refused_before_any_work(pipe: Pipeline, given: Any, message: str) -> None:
    runtime = watch(pipe)
    with pytest.raises(InputError, match=f"^{message}"):
        pipe.generate_many(["hello", given])
    assert (runtime.steps, runtime.open) == ([], [])


def test_a_request_made_by_hand_is_checked_too(pipe: Pipeline) -> None:
    good = pipe.request("hello", {})
    with pytest.raises(InputError, match=r"^prompt 1: prompt: found no tokens"):
        stream_many(pipe, [good, evolve(good, prompt_ids=[])])


def test_one_whose_tokens_cannot_be_chosen_ends_alone(pipe: Pipeline) -> None:
    banned = {"prompt": "hello", "logit_bias": dict.fromkeys(range(pipe.program.vocab_size), -math.inf)}
    runtime = watch(pipe)
    bad, good = pipe.complete_many([banned, "hello"], max_tokens=5, stop_at_eos=False)
    assert isinstance(bad.error, ExecutionError)
    assert bad.pieces == []
    assert good.error is None
    same(good.pieces, list(pipe.generate("hello", max_tokens=5, stop_at_eos=False)))
    assert runtime.open == []


def test_pieces_end_with_an_error_that_names_those_that_failed(pipe: Pipeline) -> None:
    banned = {"prompt": "hello", "logit_bias": dict.fromkeys(range(pipe.program.vocab_size), -math.inf)}
    pieces = pipe.generate_many(["hello", banned], max_tokens=5, stop_at_eos=False)
    assert [next(pieces)[0] for _ in range(5)] == [0] * 5
    with pytest.raises(ExecutionError, match=r"^prompt 1: step 0: logit_bias and penalties leave no best token"):
        next(pieces)


def test_a_step_that_fails_for_one_sequence_is_repeated_for_the_others(pipe: Pipeline) -> None:
    alone = one_by_one(pipe, PROMPTS, max_tokens=6, stop_at_eos=False)
    runtime = watch(pipe)

    def fails(parts: Sequence[StepPart]) -> ExecutionError | None:
        longest = runtime.steps[0][3][0]  # the longest prompt stands last in the first step
        broken = any(part.sequence is longest and longest.length >= 4 for part in parts)
        return ExecutionError("the logits hold NaN") if broken else None

    runtime.fails = fails
    results = pipe.complete_many([[1], [2], [5, 6, 7], [3]], max_tokens=6, stop_at_eos=False)
    assert [str(result.error) for result in results if result.error] == ["the logits hold NaN"]
    assert [len(result.pieces) for result in results] == [6, 6, 2, 6]
    same(results[2].pieces, alone[2][:2])
    assert runtime.open == []


def test_a_device_that_fails_ends_all_and_frees_their_sequences(pipe: Pipeline) -> None:
    runtime = watch(pipe)
    pieces = pipe.generate_many(["hello", "x"], max_tokens=50, stop_at_eos=False)
    next(pieces)
    runtime.fails = lambda parts: DeviceError("the card is gone")
    with pytest.raises(DeviceError, match="the card is gone"):
        list(pieces)
    assert runtime.open == []


@pytest.mark.parametrize("end", ["closed", "dropped"])
def test_an_iterator_that_is_left_early_frees_all_sequences(pipe: Pipeline, end: str) -> None:
    runtime = watch(pipe)
    pieces = pipe.generate_many(PROMPTS, max_tokens=50, stop_at_eos=False)
    next(pieces)
    assert len(runtime.open) == len(PROMPTS)
    if end == "closed":
        pieces.close()  # type: ignore[attr-defined]
    else:
        del pieces
    assert runtime.open == []


def test_ctrl_c_in_a_step_frees_all_sequences(pipe: Pipeline) -> None:
    runtime = watch(pipe)

    def interrupt(_: Sequence[StepPart]) -> None:
        if len(runtime.steps) == 4:
            raise KeyboardInterrupt

    runtime.fails = interrupt
    with pytest.raises(KeyboardInterrupt):
        pipe.complete_many(PROMPTS, max_tokens=50, stop_at_eos=False)
    assert runtime.open == []


def test_results_come_in_the_order_they_are_finished(pipe: Pipeline) -> None:
    requests = [pipe.request([1], {"max_tokens": count, "stop_at_eos": False}) for count in (9, 2, 5)]
    assert [result.index for result in finished_results(pipe, requests)] == [1, 2, 0]


def test_no_sequence_because_others_hold_them_all_is_said(pipe: Pipeline) -> None:
    watch(pipe, most=1)
    with pipe.session(), pytest.raises(InputError, match="1 sequences are open"):
        pipe.complete_many(["hello"])


def test_one_string_is_not_taken_for_many_prompts(pipe: Pipeline) -> None:
    with pytest.raises(InputError, match="prompts: found 'hello', wanted a list of them"):
        pipe.generate_many("hello")


def test_no_prompts_give_no_results(pipe: Pipeline) -> None:
    assert pipe.complete_many([]) == []


def test_a_bad_option_for_all_is_refused(pipe: Pipeline) -> None:
    with pytest.raises(InputError, match="seed: found -1"):
        pipe.generate_many(["a"], seed=-1)
    with pytest.raises(ConfigError):
        pipe.parameters({"seed": -1})
