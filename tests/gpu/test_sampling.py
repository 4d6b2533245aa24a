"""Tokens chosen on a card against those the host chooses."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from attrs import define, evolve, field
from numpy.typing import NDArray

import mortice
from mortice.core.config import ExecutorConfig, ModelConfig, RunConfig
from mortice.core.errors import ConfigError, ExecutionError
from mortice.core.pipeline import Pipeline
from mortice.core.testing.tiny_models import write_tiny_model
from mortice.core.text.params import GenerationParams, SamplingParams
from mortice.core.text.sampling import Sampled, Sampler
from mortice.plugins.executors.cuda.compile.nvrtc import compile_cubin
from mortice.plugins.executors.cuda.device.device import Device, open_device
from mortice.plugins.executors.cuda.device.module import Launch
from mortice.plugins.executors.cuda.lowering.choice_args import THREADS, choice_blocks
from mortice.plugins.executors.cuda.lowering.launches import MAX_SEQUENCES
from mortice.plugins.executors.cuda.lowering.sources import KernelSources
from mortice.plugins.executors.cuda.run.choosing import TokenChooser
from tests.support.cuda import needs_gpu
from tests.support.draws import possible_tokens
from tests.support.tiny import CONTRACTS

pytestmark = [pytest.mark.gpu, needs_gpu]

CONTEXT = 64

Logits = NDArray[np.float32]


@define(eq=False)
class Card:
    """The kernel alone, fed with logits from the host."""

    device: Device
    vocab_size: int
    chooser: TokenChooser = field(init=False)

    def __attrs_post_init__(self) -> None:
        module = self.device.load(compile_cubin(KernelSources({}).choose(self.vocab_size), self.device.arch).cubin)
        self.stream = self.device.new_stream()
        self.chooser = TokenChooser(self.device, self.stream, module, self.vocab_size, CONTEXT)
        self.logits = self.device.allocate(4 * self.vocab_size * MAX_SEQUENCES)
        self.rows = self.device.allocate(8 * MAX_SEQUENCES)

    stream: Any = field(init=False)
    logits: Any = field(init=False)
    rows: Any = field(init=False)

    def launches(self, rows: int) -> list[Launch]:
        table = self.rows.address
        return self.chooser.launches(
            rows, logits=self.logits.address, token_ids=table, positions=table + 4 * MAX_SEQUENCES
        )

    def begin(
        self, params: SamplingParams, *, step: int = 0, top: int = 0, seen: Sequence[int] = (0,), slot: int = 0
    ) -> None:
        self.chooser.begin(self, slot, params, step=step, top=top, position=len(seen) - 1, seen=seen)

    def choose_rows(self, logits: Sequence[Logits], slots: Sequence[int]) -> int:
        """Let each row choose for a slot; the place of the results."""
        self.stream.write(self.logits.address, np.stack(logits))
        self.chooser.place(slots)
        for launch in self.launches(len(logits)):
            launch(self.stream)
        place = self.chooser.queued()
        self.chooser.event(place).synchronize()
        return place

    def choose(self, logits: Logits, *, step: int = 0, top: int = 0) -> Sampled:
        return self.chooser.take(self.choose_rows([logits], [0]), step=step, top=top)


@pytest.fixture(scope="module")
def device() -> Iterator[Device]:
    device = open_device()
    yield device
    device.close()


@pytest.fixture(scope="module", params=[300, 32000, 151936, 262144])
def card(device: Device, request: pytest.FixtureRequest) -> Card:
    return Card(device, request.param)


def rows(vocab_size: int, seed: int) -> list[Logits]:
    rng = np.random.default_rng(seed)
    normal = rng.normal(0, 3, vocab_size)
    peaked = normal.copy()
    peaked[rng.integers(vocab_size)] = 60
    banned = normal.copy()
    banned[rng.random(vocab_size) < 0.5] = -np.inf
    shapes = [normal, np.round(normal), np.zeros(vocab_size), peaked, banned, rng.normal(1e4, 1e-2, vocab_size)]
    return [row.astype(np.float32) for row in shapes]


DRAWS: dict[str, dict[str, Any]] = {
    "temperature": {},
    "hot": {"temperature": 1e6},
    "cold": {"temperature": 1e-6},
    "top-k": {"top_k": 40},
    "large top-k": {"top_k": 20000},
    "top-p": {"top_p": 0.9},
    "min-p": {"min_p": 0.05},
    "all": {"temperature": 0.7, "top_k": 300, "top_p": 0.95, "min_p": 0.001},
    "top-p after top-k": {"temperature": 3.0, "top_k": 50, "top_p": 0.5},
}


@pytest.mark.parametrize("name", DRAWS)
def test_a_draw_is_the_hosts(card: Card, name: str) -> None:
    equal = []
    for seed in range(4):
        params = evolve(SamplingParams(temperature=1.0, seed=2**63 + seed), **DRAWS[name])
        sampler = Sampler(params, card.vocab_size)
        for logits in rows(card.vocab_size, seed):
            card.begin(params)
            for step in range(4):
                found = card.choose(logits).id
                equal.append(found == sampler.sample(logits, step).id)
                assert equal[-1] or found in possible_tokens(logits, params, (), step, 1e-5)
    assert sum(equal) >= 0.95 * len(equal)


def test_the_same_draw_gives_the_same_token_always(card: Card) -> None:
    logits = rows(card.vocab_size, 3)[0]
    found = []
    for _ in range(50):
        card.begin(SamplingParams(temperature=5.0, top_p=0.99, seed=8))
        found.append([card.choose(logits).id for _ in range(3)])
    assert all(ids == found[0] for ids in found)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("window", [0, 1, 7, 1000])
def test_bias_and_penalties_follow_the_sequence(card: Card, temperature: float, window: int) -> None:
    params = SamplingParams(
        temperature=temperature,
        repetition_penalty=1.3,
        presence_penalty=0.5,
        frequency_penalty=0.7,
        penalty_window=window,
        logit_bias={3: 5.0, 5: -math.inf, 299: -2.5},
        seed=11,
    )
    (normal, rounded, *_), seen = rows(card.vocab_size, 5), [4, 4, 3, 299, 12]
    card.begin(params, seen=seen)
    for step in range(30):
        logits = normal if step % 3 else rounded
        sampler = Sampler(params, card.vocab_size)
        sampler.accept(seen)
        found = card.choose(logits).id
        if found != sampler.sample(logits, step).id:
            assert temperature > 0
            assert found in possible_tokens(logits, params, seen, step, 1e-5)
        seen.append(found)


@pytest.mark.parametrize("top", [1, 5, 64])
def test_log_probabilities_and_alternatives_are_of_the_raw_logits(card: Card, top: int) -> None:
    params = SamplingParams(logit_bias={1: 9.0}, repetition_penalty=2.0, seed=1)
    sampler = Sampler(params, card.vocab_size, top_logprobs=top)
    sampler.accept([0])
    for logits in rows(card.vocab_size, 9):
        card.begin(params, top=top)
        found, wanted = card.choose(logits, top=top), sampler.sample(logits, 0)
        assert found.id == wanted.id
        assert found.logprob == pytest.approx(wanted.logprob, rel=1e-5, abs=2e-3)
        assert [token for token, _ in found.top] == [token for token, _ in wanted.top]
        assert [p for _, p in found.top] == pytest.approx([p for _, p in wanted.top], rel=1e-5, abs=2e-3)


def test_logits_that_cannot_be_sampled_are_refused(card: Card) -> None:
    fine = rows(card.vocab_size, 0)[0]
    for bad, text in ((math.nan, "NaN"), (math.inf, "plus infinity")):
        logits = fine.copy()
        logits[277] = bad
        card.begin(SamplingParams(temperature=1.0, seed=0))
        with pytest.raises(ExecutionError, match=f"step 4: the logits hold {text}"):
            card.choose(logits, step=4)
    card.begin(SamplingParams(seed=0))
    assert card.choose(fine).id == fine.argmax()


@pytest.mark.parametrize("count", [2, 7, 32])
def test_rows_of_a_step_choose_what_each_chooses_alone(card: Card, count: int) -> None:
    names = list(DRAWS)
    params = [
        evolve(SamplingParams(temperature=1.0, seed=row), **DRAWS[names[row % len(names)]]) for row in range(count)
    ]
    params[1] = SamplingParams(repetition_penalty=1.3, frequency_penalty=0.2, penalty_window=3, seed=1)
    logits = [rows(card.vocab_size, row)[0] for row in range(4)]
    alone: list[list[Sampled]] = []
    for row in range(count):
        card.begin(params[row], seen=[3, 4, 5])
        alone.append([card.choose(values) for values in logits])
    slots = [(row + 5) % MAX_SEQUENCES for row in range(count)]
    for row in range(count):
        card.begin(params[row], seen=[3, 4, 5], slot=slots[row])
    for step, values in enumerate(logits):
        present = range(count) if step < 2 else range(count)[::-1]  # rows may change
        place = card.choose_rows([values] * count, [slots[row] for row in present])
        for place_row, row in enumerate(present):
            found = card.chooser.take(place, place_row, step=step, top=0)
            assert found.id == alone[row][step].id
            assert found.logprob == pytest.approx(alone[row][step].logprob, rel=1e-5, abs=1e-4)


def test_a_row_that_cannot_be_sampled_is_refused_alone(card: Card) -> None:
    fine = rows(card.vocab_size, 0)[0]
    for slot in range(3):
        card.begin(SamplingParams(temperature=1.0, seed=slot), slot=slot)
    place = card.choose_rows([fine, np.full_like(fine, np.nan), fine], [0, 1, 2])
    with pytest.raises(ExecutionError, match="step 4: the logits hold NaN"):
        card.chooser.take(place, 1, step=4, top=0)
    for row in (0, 2):
        sampler = Sampler(SamplingParams(temperature=1.0, seed=row), card.vocab_size)
        assert card.chooser.take(place, row, step=0, top=0).id == sampler.sample(fine, 0).id


def test_blocks_all_find_a_multiprocessor(card: Card) -> None:
    sm_count = card.device.properties.sm_count
    assert all(rows * choice_blocks(sm_count, rows) <= sm_count for rows in range(1, sm_count // 4))
    assert card.chooser.module.function("choose").blocks_per_sm(THREADS) >= 1


# whole pipelines ---------------------------------------------------------------------------------------------------

SAMPLED: dict[str, dict[str, Any]] = {
    "temperature": {"temperature": 1.0},
    "filters": {"temperature": 0.8, "top_k": 40, "top_p": 0.9, "min_p": 0.01},
    "penalties": {"temperature": 0.7, "repetition_penalty": 1.2, "frequency_penalty": 0.3, "penalty_window": 16},
    "greedy with penalties": {"temperature": 0.0, "repetition_penalty": 1.2, "presence_penalty": 0.5},
    "bias": {"temperature": 1.0, "logit_bias": {7: 3.0, 9: -math.inf}},
}


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("models") / "tiny.gguf", CONTRACTS["llama"], qtypes="Q8_0")


@pytest.fixture
def load(path: Path) -> Callable[[str], Pipeline]:
    def load(executor: str) -> Pipeline:
        chosen = ExecutorConfig(name=executor, context=256, kv="f32", activations="f32")
        return mortice.load(RunConfig(model=ModelConfig(path=path), executor=chosen))

    return load


def prompt(pipeline: Pipeline, length: int) -> list[int]:
    return [int(token) for token in np.random.default_rng(7).integers(0, pipeline.program.vocab_size, length)]


def text(pipeline: Pipeline, ids: Sequence[int], name: str, length: int = 100) -> list[int]:
    params: dict[str, Any] = {"seed": 5, "max_tokens": length, "stop_at_eos": False, **SAMPLED[name]}
    return [piece.id for piece in pipeline.generate(ids, **params)]


@pytest.mark.parametrize("name", SAMPLED)
def test_seeded_text_is_the_references(load: Callable[[str], Pipeline], name: str) -> None:
    with load("reference") as reference, load("cuda") as cuda:
        ids = prompt(reference, 20)
        assert text(cuda, ids, name) == text(reference, ids, name)
        assert text(cuda, ids, name) == text(cuda, ids, name)


def test_interleaved_sessions_give_the_text_they_give_alone(load: Callable[[str], Pipeline]) -> None:
    with load("cuda") as cuda:
        generation = GenerationParams(max_tokens=40, stop_at_eos=False, logprobs=2)
        jobs = [
            (prompt(cuda, 10 + 25 * i), SamplingParams(seed=3, **SAMPLED[name]))
            for i, name in enumerate(("penalties", "filters"))
        ]
        alone = []
        for ids, params in jobs:
            with cuda.session() as session:
                alone.append([piece.id for piece in session.generate(ids, params, generation)])
        with cuda.session() as one, cuda.session() as other:
            pieces = [session.generate(*job, generation) for session, job in zip((one, other), jobs, strict=True)]
            together: list[list[int]] = [[], []]
            for turn in range(80):
                which = (turn // 3) % 2 if turn < 60 else turn % 2  # sometimes several in a row
                piece = next(pieces[which], None)
                if piece is not None:
                    together[which].append(piece.id)
            for found, rest in zip(together, pieces, strict=True):
                found += [piece.id for piece in rest]
        assert together == alone


def test_a_session_taken_up_again_gives_the_same_text(load: Callable[[str], Pipeline]) -> None:
    params = SamplingParams(seed=4, **SAMPLED["penalties"])
    generation = GenerationParams(max_tokens=30, stop_at_eos=False)
    with load("cuda") as cuda, cuda.session() as session:
        ids = prompt(cuda, 70)
        first = [piece.id for piece in session.generate(ids, params, generation)]
        partly = session.generate(ids, params, generation)
        for _ in range(5):
            next(partly)  # left with a step ahead
        assert [piece.id for piece in session.generate(ids, params, generation)] == first
        session.rewind_to(ids[:40])
        assert [piece.id for piece in session.generate(ids, params, generation)] == first


def test_text_ends_where_the_context_does(load: Callable[[str], Pipeline]) -> None:
    with load("reference") as reference, load("cuda") as cuda:
        ids = prompt(reference, 190)
        assert len(text(cuda, ids, "penalties", 1000)) == 66
        assert text(cuda, ids, "penalties", 1000) == text(reference, ids, "penalties", 1000)


def test_a_pipeline_can_be_closed_with_a_step_ahead(load: Callable[[str], Pipeline]) -> None:
    cuda = load("cuda")
    device = cuda.runtime.device  # type: ignore[attr-defined]  # the CUDA runtime's own
    pieces = cuda.generate(prompt(cuda, 5), temperature=1.0, seed=1, max_tokens=50, stop_at_eos=False)
    next(pieces)
    cuda.close()
    assert device.allocated_bytes == 0


@pytest.mark.parametrize("name", SAMPLED)
def test_nothing_is_allocated_per_token(load: Callable[[str], Pipeline], name: str) -> None:
    with load("cuda") as cuda:
        device = cuda.runtime.device  # type: ignore[attr-defined]
        pieces = cuda.generate(prompt(cuda, 8), seed=1, max_tokens=110, stop_at_eos=False, logprobs=3, **SAMPLED[name])
        for _ in range(5):
            next(pieces)
        before = device.allocations
        for _ in range(100):
            next(pieces)
        assert device.allocations == before


def test_a_bias_outside_the_vocabulary_is_refused(load: Callable[[str], Pipeline]) -> None:
    with load("cuda") as cuda, pytest.raises(ConfigError, match="logit_bias"):
        list(cuda.generate([1], logit_bias={10**6: 1.0}, max_tokens=1))
