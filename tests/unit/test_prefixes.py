"""Equal beginnings are computed and stored once: sessions and many prompts, on the reference executor."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from attrs import define, evolve
from numpy.typing import NDArray

from mortice.core.config import ExecutorConfig, LimitsConfig, ModelConfig, RunConfig
from mortice.core.errors import ConfigError, DoesNotFitError, ExecutionError, InputError, UnsupportedError
from mortice.core.pipeline import Pipeline, load, prepare
from mortice.core.plugin.events import Event, StepDone
from mortice.core.plugin.interfaces import Runtime, RuntimeSettings, StepPart, TokenSequence
from mortice.core.plugin.kv_pages import PAGE_TOKENS, SharesCache
from mortice.core.text.generation import Piece
from mortice.plugins.executors.reference.runtime import ReferenceRuntime
from tests.support.tiny import tiny

SHARED = [3 + number % 50 for number in range(2 * PAGE_TOKENS + 20)]
PROMPTS = [[*SHARED, 60 + number, 61] for number in range(6)]
OPTIONS: dict[str, Any] = {"max_tokens": 12, "stop_at_eos": False}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny(tmp_path_factory.mktemp("models"))


@pytest.fixture
def pipe(model: Path) -> Iterator[Pipeline]:
    with opened(model) as pipeline:
        yield pipeline
        assert pages_in_use(pipeline) == 0


def config(model: Path, **executor: Any) -> RunConfig:
    chosen = {"name": "reference", "context": 256, "kv_tokens": 2048, "step_tokens": 2048, **executor}
    return RunConfig(model=ModelConfig(path=model), executor=ExecutorConfig(**chosen))


def opened(model: Path, **executor: Any) -> Pipeline:
    return load(config(model, **executor))


def pages_in_use(pipe: Pipeline) -> int:
    runtime = pipe.runtime
    assert isinstance(runtime, ReferenceRuntime)
    return runtime.pool.pages - runtime.free_pages


@define(eq=False)
class Computed:
    """Counts tokens that went through the program."""

    tokens: int = 0
    steps: int = 0

    def __call__(self, event: Event) -> None:
        if isinstance(event, StepDone):
            self.tokens += event.tokens
            self.steps += 1


def computed(pipe: Pipeline) -> Computed:
    count = Computed()
    pipe.registry.observers.append(count)
    return count


def same(one: Sequence[Piece], other: Sequence[Piece]) -> None:
    """Equal but for rounding: products of other numbers of rows."""
    assert [piece.id for piece in one] == [piece.id for piece in other]
    np.testing.assert_allclose([p.logprob for p in one], [p.logprob for p in other], rtol=1e-4, atol=1e-5)


def equal(found: NDArray[np.float32], wanted: NDArray[np.float32]) -> None:
    np.testing.assert_array_equal(found, wanted)


# forks ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kv", ["f32", "f16", "q8_0"])
@pytest.mark.parametrize("length", [1, 63, 64, 65, 128, 140])
def test_a_fork_goes_on_as_if_it_had_been_fed_everything_itself(kv: str, length: int, tmp_path: Path) -> None:
    ids = SHARED[:length]
    with opened(tiny(tmp_path, sizes={"head_dim": 32}), kv=kv) as pipe:
        with pipe.session() as fresh:
            fresh.feed(ids)
            wanted = [fresh.feed([token]) for token in (7, 8, 9)]
        with pipe.session() as parent:
            parent.feed(ids)
            with parent.fork() as child:
                assert child.fed == ids
                for token, rows in zip((7, 8, 9), wanted, strict=True):
                    parent.feed([70])  # both write, turn about
                    equal(child.feed([token]), rows)


def test_neither_of_two_sees_what_the_other_is_fed(pipe: Pipeline) -> None:
    with pipe.session() as lone:
        lone.feed(SHARED)
        wanted = [lone.feed([token]) for token in (7, 8, 9)]
    for first in ("parent", "child"):
        with pipe.session() as parent:
            parent.feed(SHARED)
            with parent.fork() as child:
                kept, changed = (child, parent) if first == "parent" else (parent, child)
                changed.feed([1] * PAGE_TOKENS)
                changed.rewind_to([*SHARED[:70], 5])
                changed.feed([2] * PAGE_TOKENS)
                for token, rows in zip((7, 8, 9), wanted, strict=True):
                    equal(kept.feed([token]), rows)


def test_a_fork_outlives_its_parent(pipe: Pipeline) -> None:
    with pipe.session() as lone:
        lone.feed(SHARED)
        wanted = lone.feed([7])
    parent = pipe.session()
    parent.feed(SHARED)
    child = parent.fork()
    parent.close()
    with pipe.session() as other:  # which would take the parent's pages if they were free
        other.feed([1] * 200)
        equal(child.feed([7]), wanted)
    child.close()


def test_many_forks_cost_a_page_each(pipe: Pipeline) -> None:
    with pipe.session() as parent:
        parent.feed(SHARED)
        forks = [parent.fork() for _ in range(8)]
        assert pages_in_use(pipe) == 3
        for fork in forks:
            fork.feed([5])
        assert pages_in_use(pipe) == 3 + 8
        for fork in forks:
            fork.close()


def test_an_executor_that_shares_nothing_refuses_to_fork(pipe: Pipeline) -> None:
    inner = pipe.runtime
    pipe._runtime = Plain(inner, inner.settings)
    with pipe.session() as session:
        session.feed([1, 2, 3])
        with pytest.raises(UnsupportedError, match="fork: the executor's sequences cannot share a KV cache"):
            session.fork()
    pipe._runtime = inner


@define(eq=False)
class Plain:
    """A runtime with nothing but what `Runtime` asks for."""

    inner: Runtime
    settings: RuntimeSettings

    def new_sequence(self) -> TokenSequence:
        return self.inner.new_sequence()

    def step(self, parts: Sequence[StepPart]) -> NDArray[np.float32]:
        return self.inner.step(parts)

    def device_chooser(self, *_: object, **__: object) -> None:
        """None: the host samples."""

    def close(self) -> None:
        self.inner.close()


# sessions ------------------------------------------------------------------------------------------------------------


def test_a_prompt_that_another_session_was_fed_is_not_computed_again(pipe: Pipeline) -> None:
    wanted = list(pipe.generate(PROMPTS[0], **OPTIONS))
    count = computed(pipe)
    same(list(pipe.generate(PROMPTS[0], **OPTIONS)), wanted)
    assert count.tokens == len(PROMPTS[0]) - 2 * PAGE_TOKENS + OPTIONS["max_tokens"] - 1


def test_a_session_takes_over_more_than_it_has_itself(pipe: Pipeline) -> None:
    with pipe.session() as first, pipe.session() as second:
        first.feed(SHARED)
        second.feed(SHARED[:70])
        assert second.rewind_to(PROMPTS[0]) == 2 * PAGE_TOKENS
        assert second.fed == SHARED[: 2 * PAGE_TOKENS]
        assert first.rewind_to(PROMPTS[0]) == len(SHARED), "its own, to the token"


def test_nothing_is_taken_over_where_it_is_switched_off(model: Path) -> None:
    with opened(model, prefix_cache=False) as pipe:
        list(pipe.generate(PROMPTS[0], **OPTIONS))
        count = computed(pipe)
        list(pipe.generate(PROMPTS[0], **OPTIONS))
        assert count.tokens == len(PROMPTS[0]) + OPTIONS["max_tokens"] - 1


def test_logits_of_a_whole_prompt_are_all_computed(pipe: Pipeline) -> None:
    wanted = pipe.logits(SHARED)
    equal(pipe.logits(SHARED), wanted)
    assert len(wanted) == len(SHARED)


@pytest.mark.parametrize(
    "options",
    [
        {"repetition_penalty": 1.8},
        {"presence_penalty": 2.0, "penalty_window": 100},
        {"temperature": 1.2, "seed": 5, "frequency_penalty": 0.7},
    ],
    ids=lambda options: " ".join(options),
)
def test_penalties_see_the_whole_prompt(model: Path, options: dict[str, Any]) -> None:
    with opened(model, prefix_cache=False) as pipe:
        wanted = list(pipe.generate(PROMPTS[0], **OPTIONS, **options))
        drawn = {name: value for name, value in options.items() if name in ("temperature", "seed")}
        plain = list(pipe.generate(PROMPTS[0], **OPTIONS, **drawn))
    assert [piece.id for piece in plain] != [piece.id for piece in wanted], "the penalties matter here"
    with opened(model) as pipe:
        for _ in range(2):
            same(list(pipe.generate(PROMPTS[0], **OPTIONS, **options)), wanted)
        for result in pipe.complete_many(PROMPTS[:1] * 2, **OPTIONS, **options):
            same(result.pieces, wanted)


# many prompts --------------------------------------------------------------------------------------------------------


def alone(model: Path, prompts: Sequence[Any] = PROMPTS, **options: Any) -> list[list[Piece]]:
    with opened(model, prefix_cache=False) as pipe:
        given = [one if isinstance(one, dict) else {"prompt": one} for one in prompts]
        return [list(pipe.generate(**{**OPTIONS, **options, **one})) for one in given]


@pytest.mark.parametrize("step_tokens", [32, 100, 2048])
def test_prompts_that_begin_alike_are_computed_once(model: Path, step_tokens: int) -> None:
    wanted = alone(model)
    with opened(model, step_tokens=step_tokens) as pipe:
        count = computed(pipe)
        for result, pieces in zip(pipe.complete_many(PROMPTS, **OPTIONS), wanted, strict=True):
            same(result.pieces, pieces)
        own = len(PROMPTS[0]) - 2 * PAGE_TOKENS
        assert count.tokens == 2 * PAGE_TOKENS + len(PROMPTS) * (own + OPTIONS["max_tokens"] - 1)
        assert pages_in_use(pipe) == 0


def test_they_are_stored_once(model: Path) -> None:
    """All six have three pages each, two of which they share: eight in all."""
    with opened(model, context=256, kv_tokens=8 * PAGE_TOKENS) as pipe:
        count = computed(pipe)
        results = pipe.complete_many(PROMPTS, **OPTIONS)
        assert [len(result.pieces) for result in results] == [OPTIONS["max_tokens"]] * 6
        assert count.steps == OPTIONS["max_tokens"] + 1, "the first one a step before the others, these all together"


def test_no_more_start_than_the_pages_they_do_not_share_allow(model: Path) -> None:
    with opened(model, context=256, kv_tokens=7 * PAGE_TOKENS) as pipe:
        pieces = pipe.generate_many(PROMPTS, **OPTIONS)
        first = [index for index, _ in (next(pieces) for _ in range(20))]
        assert set(first) == {0, 1, 2, 3, 4}
        assert {index for index, _ in pieces} == {0, 1, 2, 3, 4, 5}


def test_prompts_that_share_nothing_do_not_wait_for_each_other(pipe: Pipeline) -> None:
    count = computed(pipe)
    list(pipe.generate_many([[number] * 100 for number in range(1, 6)], **OPTIONS))
    assert count.steps == OPTIONS["max_tokens"]


def test_a_second_batch_finds_what_the_first_one_left(pipe: Pipeline) -> None:
    first = pipe.complete_many(PROMPTS, **OPTIONS)
    count = computed(pipe)
    for result, before in zip(pipe.complete_many(PROMPTS, **OPTIONS), first, strict=True):
        same(result.pieces, before.pieces)
    own = len(PROMPTS[0]) - 2 * PAGE_TOKENS
    assert count.tokens == len(PROMPTS) * (own + OPTIONS["max_tokens"] - 1)


@pytest.mark.parametrize("seed", range(4))
def test_a_tree_of_prompts_in_a_small_cache_gives_what_each_gives_alone(model: Path, seed: int) -> None:
    random = np.random.default_rng(seed)
    trunk = random.integers(3, 60, 230).tolist()
    prompts = []
    for _ in range(14):
        start = trunk[: random.integers(0, 230)]
        branch = [int(random.integers(60, 63))] * int(random.integers(0, 230 - len(start)))
        prompts.append({"prompt": [*start, *branch, 5], "max_tokens": int(random.integers(1, 20))})
    wanted = alone(model, prompts)
    with opened(
        model, kv_tokens=256 + 64 * int(random.integers(0, 8)), step_tokens=int(random.integers(16, 400))
    ) as pipe:
        for result, pieces in zip(pipe.complete_many(prompts, **OPTIONS), wanted, strict=True):
            assert result.error is None
            same(result.pieces, pieces)
        assert pages_in_use(pipe) == 0


def test_one_that_fails_takes_nothing_from_those_it_shares_with(model: Path) -> None:
    wanted = alone(model)
    with opened(model) as pipe:
        banned = dict.fromkeys(range(pipe.program.vocab_size), -math.inf)
        given: list[Any] = [*PROMPTS[:3], {"prompt": PROMPTS[3], "logit_bias": banned}, *PROMPTS[4:]]
        results = pipe.complete_many(given, **OPTIONS)
        assert isinstance(results.pop(3).error, ExecutionError)
        for result, pieces in zip(results, wanted[:3] + wanted[4:], strict=True):
            same(result.pieces, pieces)
        assert pages_in_use(pipe) == 0


def test_when_the_one_that_computes_for_all_fails_the_next_one_does_it(
    pipe: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = [list(pipe.generate(prompt, **OPTIONS)) for prompt in PROMPTS[1:]]
    step = ReferenceRuntime.step
    failed: list[int] = []

    def failing(self: ReferenceRuntime, parts: Sequence[StepPart]) -> NDArray[np.float32]:
        if not failed:
            failed.append(len(parts))
            raise ExecutionError("the first one breaks")
        return step(self, parts)

    monkeypatch.setattr(ReferenceRuntime, "step", failing)
    results = pipe.complete_many([[9, *PROMPTS[0]], *([9, *prompt] for prompt in PROMPTS[1:])], **OPTIONS)
    assert failed == [1], "the others wait"
    assert [result.error is None for result in results] == [False, *[True] * 5]
    monkeypatch.undo()
    same(list(pipe.generate(PROMPTS[1], **OPTIONS)), wanted[0])


def test_a_runtime_that_shares_nothing_serves_many_prompts_as_well(model: Path) -> None:
    wanted = alone(model)
    with opened(model, context=256, kv_tokens=6 * PAGE_TOKENS) as pipe:
        pipe._runtime = Plain(pipe.runtime, pipe.settings)
        assert not isinstance(pipe.runtime, SharesCache)
        count = computed(pipe)
        for result, pieces in zip(pipe.complete_many(PROMPTS, **OPTIONS), wanted, strict=True):
            same(result.pieces, pieces)
        assert count.tokens == sum(len(prompt) + OPTIONS["max_tokens"] - 1 for prompt in PROMPTS)
        assert count.steps == 3 * OPTIONS["max_tokens"], "two at a time, three pages each"


def test_pages_that_others_hold_are_counted(model: Path) -> None:
    with opened(model, context=256, kv_tokens=6 * PAGE_TOKENS) as pipe, pipe.session() as session:
        session.feed([1] * (3 * PAGE_TOKENS))
        count = computed(pipe)
        results = pipe.complete_many([[number] * 150 for number in (2, 3)], **OPTIONS)
        assert [result.error for result in results] == [None, None]
        assert count.steps == 2 * OPTIONS["max_tokens"], "one after the other"


# its size ------------------------------------------------------------------------------------------------------------


def test_the_cache_may_be_larger_than_a_context(model: Path) -> None:
    with opened(model, context=128, kv_tokens=32 * 128, prefix_cache=False) as pipe:
        assert pipe.fit.kv_tokens == 32 * 128
        count = computed(pipe)
        results = pipe.complete_many([[number] * 60 for number in range(1, 33)], max_tokens=20, stop_at_eos=False)
        assert [len(result.pieces) for result in results] == [20] * 32
        assert count.steps == 20, "all at once"


def test_a_cache_smaller_than_a_context_is_refused(model: Path) -> None:
    with pytest.raises(ConfigError, match=r"^executor\.kv_tokens: found 100, wanted at least the 256 of executor\.co"):
        prepare(config(model, kv_tokens=100))


def test_fit_counts_the_whole_cache_and_says_what_would_fit(model: Path) -> None:
    with prepare(config(model)) as small, prepare(config(model, kv_tokens=4096)) as large:
        assert large.fit.kv_bytes == 2 * small.fit.kv_bytes
        assert large.fit.workspace_bytes == small.fit.workspace_bytes
    asked = evolve(config(model, kv_tokens=1 << 24), limits=LimitsConfig(memory_mib=64))
    said = r"KV cache for 16777216 tokens .*a KV cache of \d+ tokens would fit \(executor\.kv_tokens\)"
    with pytest.raises(DoesNotFitError, match=said) as refused:
        prepare(asked)
    tokens = int(str(refused.value).rsplit("a KV cache of ", 1)[1].split()[0])
    with prepare(evolve(asked, executor=evolve(asked.executor, kv_tokens=tokens))) as fitting:
        assert fitting.fit.fits


def test_more_tokens_than_the_cache_holds_are_refused_and_the_others_go_on(model: Path) -> None:
    said = r"2 more pages of KV cache are needed, 1 is free.*executor\.kv_tokens"
    with opened(model, kv_tokens=256) as pipe, pipe.session() as first, pipe.session() as second:
        first.feed([1] * 190)
        with pytest.raises(InputError, match=said):
            second.feed([2] * 100)
        assert (second.sequence.length, second.fed) == (0, [])
        first.feed([1] * 60)
