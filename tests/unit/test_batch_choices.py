"""A batch on a runtime that chooses tokens itself: whose it chooses, and what it is told of the next step."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
import pytest
from attrs import define, field
from numpy.typing import NDArray

from mortice.core.config import ExecutorConfig, ModelConfig, RunConfig
from mortice.core.errors import ExecutionError, InputError
from mortice.core.pipeline import Pipeline, load
from mortice.core.plugin.interfaces import Runtime, RuntimeSettings, StepPart, TokenSequence
from mortice.core.plugin.token_choice import ChoicePart, ChoosesTokens
from mortice.core.text.params import GenerationParams, SamplingParams
from mortice.core.text.sampling import Sampled, Sampler
from tests.support.tiny import tiny

MOST_LOGPROBS = 4


@define(eq=False)
class HostChoice:
    """How tokens are chosen by a sampler, and what was fed."""

    sequence: TokenSequence
    sampler: Sampler
    accepted: int = 0

    def choose(self, fed: Sequence[int], logits: NDArray[np.float32], index: int) -> Sampled | ExecutionError:
        self.sampler.accept(fed[self.accepted :])
        self.accepted = len(fed)
        try:
            return self.sampler.sample(logits, index)
        except ExecutionError as error:
            return error


@define(eq=False)
class ChoosingRuntime:
    """A runtime that chooses tokens with samplers of its own."""

    inner: Runtime
    vocab_size: int
    chosen: list[tuple[list[int], bool]] = field(factory=list)
    """Of each step that chooses: the tokens fed for each part, and whether the next step was to be begun ahead."""
    stepped: list[int] = field(factory=list)
    """Parts of each step that gives logits."""
    refused: int | None = None
    """A token that is refused."""
    _fed: dict[TokenSequence, list[int]] = field(factory=dict)

    @property
    def settings(self) -> RuntimeSettings:
        return self.inner.settings

    def new_sequence(self) -> TokenSequence:
        return self.inner.new_sequence()

    def step(self, parts: Sequence[StepPart]) -> NDArray[np.float32]:
        self.stepped.append(len(parts))
        return self.inner.step(parts)

    def device_chooser(self, *_: Any) -> None:
        """None: sessions sample on the host."""

    def token_choice(
        self, sequence: TokenSequence, sampling: SamplingParams, generation: GenerationParams
    ) -> HostChoice | None:
        if generation.logprobs > MOST_LOGPROBS:
            return None
        return HostChoice(sequence, Sampler(sampling, self.vocab_size, top_logprobs=generation.logprobs))

    def choose_step(self, parts: Sequence[ChoicePart], *, ahead: bool) -> list[Sampled | ExecutionError | None]:
        if any(self.refused in part.token_ids for part in parts):
            raise InputError("a token is refused")
        self.chosen.append(([len(part.token_ids) for part in parts], ahead))
        rows = iter(self.inner.step([_step_part(part) for part in parts]))
        made: list[Sampled | ExecutionError | None] = []
        for part in parts:
            fed = self._fed.setdefault(part.sequence, [])
            fed += part.token_ids
            assert part.choice is None or isinstance(part.choice, HostChoice)
            made.append(None if part.choice is None else part.choice.choose(fed, next(rows), part.index))
        return made

    def close(self) -> None:
        self.inner.close()


def _step_part(part: ChoicePart) -> StepPart:
    logits: Literal["last", "none"] = "none" if part.choice is None else "last"
    return StepPart(sequence=part.sequence, token_ids=part.token_ids, logits=logits)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny(tmp_path_factory.mktemp("models"))


@pytest.fixture
def pipe(model: Path) -> Iterator[Pipeline]:
    executor = ExecutorConfig(name="reference", context=512, step_tokens=16)
    with load(RunConfig(model=ModelConfig(path=model), executor=executor)) as pipeline:
        yield pipeline


@pytest.fixture
def runtime(pipe: Pipeline) -> ChoosingRuntime:
    runtime = ChoosingRuntime(pipe.runtime, pipe.program.vocab_size)
    pipe._runtime = cast(Any, runtime)
    assert isinstance(runtime, ChoosesTokens)
    return runtime


WAYS: tuple[dict[str, Any], ...] = (
    {"prompt": "hello"},
    {"prompt": "a much longer prompt than the others have, in many tokens", "temperature": 1.2, "seed": 3},
    {"prompt": [5, 6, 7], "repetition_penalty": 1.5, "frequency_penalty": 0.5, "logprobs": 2},
    {"prompt": "x", "temperature": 1.0, "seed": 4, "max_tokens": 5},
)


def alone(pipe: Pipeline, options: dict[str, Any], **common: Any) -> list[int]:
    return [piece.id for piece in pipe.generate(**{**common, **options})]


def test_tokens_the_runtime_chooses_are_those_of_one_by_one(pipe: Pipeline, runtime: ChoosingRuntime) -> None:
    common: dict[str, Any] = {"max_tokens": 12, "stop_at_eos": False}
    wanted = [alone(pipe, options, **common) for options in WAYS]
    del runtime.stepped[:]
    results = pipe.complete_many(WAYS, **common)
    assert [result.token_ids for result in results] == wanted
    assert [len(piece.top_logprobs) for piece in results[2].pieces] == [2] * 12
    assert runtime.stepped == []


def test_what_the_runtime_cannot_choose_is_chosen_from_logits_beside_it(
    pipe: Pipeline, runtime: ChoosingRuntime
) -> None:
    common: dict[str, Any] = {"max_tokens": 6, "stop_at_eos": False}
    given = [WAYS[0], {**WAYS[1], "logprobs": MOST_LOGPROBS + 1}, WAYS[2]]
    wanted = [alone(pipe, options, **common) for options in given]
    del runtime.stepped[:]
    results = pipe.complete_many(given, **common)
    assert [result.token_ids for result in results] == wanted
    assert len(results[1].pieces[0].top_logprobs) == MOST_LOGPROBS + 1
    assert set(runtime.stepped) == {1}
    assert max(len(counts) for counts, _ in runtime.chosen) == 2


def test_a_step_is_begun_ahead_where_all_sequences_go_on(pipe: Pipeline, runtime: ChoosingRuntime) -> None:
    pipe.complete_many([[1], {"prompt": list(range(1, 20)), "max_tokens": 2}], max_tokens=4, stop_at_eos=False)
    assert runtime.chosen == [
        ([1, 15], False),  # the prompt goes on
        ([1, 4], True),
        ([1, 1], True),  # one ends for certain, the other goes on
        ([1], False),  # the last token of all
    ]


def test_a_step_that_is_refused_is_tried_part_by_part(pipe: Pipeline, runtime: ChoosingRuntime) -> None:
    runtime.refused = 7
    bad, good = pipe.complete_many([[5, 6, 7], "hello"], max_tokens=5, stop_at_eos=False)
    assert str(bad.error) == "a token is refused"
    runtime.refused = None
    assert good.token_ids == alone(pipe, {"prompt": "hello"}, max_tokens=5, stop_at_eos=False)


def test_one_whose_tokens_cannot_be_chosen_ends_alone(pipe: Pipeline, runtime: ChoosingRuntime) -> None:
    banned = {"prompt": "hello", "logit_bias": dict.fromkeys(range(pipe.program.vocab_size), -math.inf)}
    bad, good = pipe.complete_many([banned, "hello"], max_tokens=5, stop_at_eos=False)
    assert isinstance(bad.error, ExecutionError)
    assert bad.pieces == []
    assert good.token_ids == alone(pipe, {"prompt": "hello"}, max_tokens=5, stop_at_eos=False)
    assert runtime.stepped
