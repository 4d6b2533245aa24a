"""The kernel that chooses tokens: run on the CPU against the host's sampler, and compiled for every architecture."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from attrs import define, evolve, field
from numpy.typing import NDArray

from mortice.core.text.params import SamplingParams
from mortice.core.text.sampling import Sampler
from mortice.plugins.executors.cuda.compile.flatten import flatten
from mortice.plugins.executors.cuda.compile.nvrtc import Source, compile_cubin
from mortice.plugins.executors.cuda.lowering.choice_args import (
    RING,
    ChooseArgs,
    Chosen,
    choice_blocks,
    choice_defines,
    choice_params,
    choice_rows_at_once,
)
from mortice.plugins.executors.cuda.lowering.launches import MAX_SEQUENCES
from mortice.plugins.executors.cuda.lowering.placing import LOGIT_ROWS
from mortice.plugins.executors.cuda.lowering.sources import OPS
from tests.support.cuda import needs_nvrtc
from tests.support.cuda_on_cpu import compile_for_cpu, needs_cpu_compiler
from tests.support.draws import possible_tokens

VOCAB, BLOCKS, LEAST_BLOCKS, THREADS, CONTEXT = 1000, 3, 2, 64, 40
SLOTS = 5

LAUNCHES = """
extern "C" void run_choose(const ChooseArgs* args, unsigned blocks, unsigned rows) {
    launch({blocks, rows}, kThreads, [=] { choose(*args); });
}
extern "C" void run_count(const int* history, int* counts, int first, int last) {
    launch({kMostBlocks}, kThreads, [=] { count_tokens(history, counts, first, last); });
}
"""

Logits = NDArray[np.float32]


@define(eq=False)
class Card:
    """The kernel and its memory, on the CPU."""

    library: ctypes.CDLL
    memory: dict[str, NDArray[Any]] = field(init=False)
    step: int = field(default=0, init=False)

    def __attrs_post_init__(self) -> None:
        self.memory = {
            "logits": np.zeros((SLOTS, VOCAB), np.float32),
            "rows": np.zeros((SLOTS, 2), np.int32),
            "params": np.zeros((SLOTS, int(DEFINES["PARAMS_BYTES"])), np.uint8),
            "bias": np.zeros((SLOTS, VOCAB), np.float32),
            "counts": np.zeros((SLOTS, VOCAB), np.int32),
            "history": np.zeros((SLOTS, CONTEXT + 1), np.int32),
            "scratch": np.zeros((SLOTS, int(DEFINES["SCRATCH_BYTES"]) // 8), np.uint64),
            "token_ids": np.zeros(SLOTS, np.int32),
            "positions": np.zeros(SLOTS, np.int32),
            "chosen": np.zeros((RING, MAX_SEQUENCES, int(DEFINES["CHOSEN_BYTES"])), np.uint8),
        }

    def begin(
        self, params: SamplingParams, *, step: int = 0, top: int = 0, seen: Sequence[int] = (0,), slot: int = 0
    ) -> None:
        memory = self.memory
        filled = choice_params(params, VOCAB, step=step, top=top, position=len(seen) - 1)
        memory["params"][slot] = np.frombuffer(bytes(filled), np.uint8)
        memory["bias"][slot] = 0
        for token, bias in params.logit_bias.items():
            memory["bias"][slot, token] = bias
        memory["counts"][slot] = 0
        memory["history"][slot, : len(seen)] = seen
        first = max(0, len(seen) - (params.penalty_window or len(seen)))
        history, counts = (ctypes.c_void_p(memory[name][slot].ctypes.data) for name in ("history", "counts"))
        self.library.run_count(history, counts, first, len(seen))

    def choose(self, logits: Logits) -> Chosen:
        return self.choose_rows([logits], [0])[0]

    def choose_rows(
        self, logits: Sequence[Logits], slots: Sequence[int], first: int = 0, blocks: int = BLOCKS
    ) -> list[Chosen]:
        memory = self.memory
        for row, (values, slot) in enumerate(zip(logits, slots, strict=True), first):
            memory["logits"][row] = values
            memory["rows"][row] = slot, self.step
        addresses = {name: array.ctypes.data for name, array in memory.items()}
        args = ChooseArgs(**addresses, first=first, history_length=CONTEXT + 1)
        self.library.run_choose(ctypes.byref(args), blocks, len(logits))
        found = []
        for row in range(first, first + len(logits)):
            chosen = Chosen.from_buffer_copy(memory["chosen"][self.step % RING, row].tobytes())
            assert chosen.problem or memory["token_ids"][row] == chosen.id
            assert memory["rows"][row, 1] == self.step + 1
            found.append(chosen)
        self.step += 1
        return found


DEFINES = choice_defines(VOCAB, BLOCKS, LEAST_BLOCKS, THREADS)


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    folder = tmp_path_factory.mktemp("choose")
    text = flatten(OPS / "choose.cu", [OPS]) + LAUNCHES
    return compile_for_cpu(folder, text, DEFINES)


@pytest.fixture
def card(library: ctypes.CDLL) -> Card:
    return Card(library)


def rows(seed: int) -> list[Logits]:
    rng = np.random.default_rng(seed)
    normal = rng.normal(0, 3, VOCAB)
    peaked = normal.copy()
    peaked[rng.integers(VOCAB)] = 60
    banned = normal.copy()
    banned[rng.random(VOCAB) < 0.5] = -np.inf
    shapes = [normal, np.round(normal), np.zeros(VOCAB), peaked, banned, rng.normal(1e4, 1e-2, VOCAB), normal * 1e4]
    return [row.astype(np.float32) for row in shapes]


DRAWS: dict[str, dict[str, Any]] = {
    "temperature": {},
    "hot": {"temperature": 1e6},
    "cold": {"temperature": 1e-6},
    "top-k": {"top_k": 40},
    "large top-k": {"top_k": 700},
    "top-p": {"top_p": 0.9},
    "small top-p": {"top_p": 1e-9},
    "min-p": {"min_p": 0.05},
    "all": {"temperature": 0.7, "top_k": 300, "top_p": 0.95, "min_p": 0.001},
    "top-p after top-k": {"temperature": 3.0, "top_k": 50, "top_p": 0.5},
}


def check(found: int, logits: Logits, params: SamplingParams, seen: Sequence[int], step: int) -> bool:
    """Whether a token is the host's; one that is not has to be next to a threshold."""
    sampler = Sampler(params, logits.size)
    sampler.accept(seen)
    if sampler.sample(logits, step).id == found:
        return True
    assert not params.greedy
    assert found in possible_tokens(logits, params, seen, step, 1e-5)
    return False


@needs_cpu_compiler
@pytest.mark.parametrize("name", DRAWS)
def test_a_draw_is_the_hosts(card: Card, name: str) -> None:
    equal = []
    for seed in range(3):
        for logits in rows(seed):
            params = evolve(SamplingParams(temperature=1.0, seed=2**63 + seed), **DRAWS[name])
            card.begin(params, step=2**32 + seed)
            equal += [check(card.choose(logits).id, logits, params, (0,), 2**32 + seed + i) for i in range(3)]
    assert sum(equal) >= 0.95 * len(equal)


@needs_cpu_compiler
@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("window", [0, 1, 3, 100])
def test_bias_and_penalties_follow_the_sequence(card: Card, temperature: float, window: int) -> None:
    params = SamplingParams(
        temperature=temperature,
        repetition_penalty=1.3,
        presence_penalty=0.5,
        frequency_penalty=0.7,
        penalty_window=window,
        logit_bias={3: 5.0, 5: -np.inf, 999: -2.5},
        seed=11,
    )
    (logits, rounded, *_), seen = rows(5), [4, 4, 3, 999, 12]
    card.begin(params, seen=seen)
    for step in range(20):
        row = logits if step % 3 else rounded
        found = card.choose(row).id
        check(found, row, params, seen, step)
        seen.append(found)


@needs_cpu_compiler
def test_log_probabilities_and_alternatives_are_of_the_raw_logits(card: Card) -> None:
    params = SamplingParams(temperature=2.0, logit_bias={1: 9.0}, repetition_penalty=2.0, seed=1)
    for logits in rows(9):
        for top in (1, 5, 64):
            card.begin(params, top=top)
            found = card.choose(logits)
            sampler = Sampler(params, VOCAB, top_logprobs=top)
            sampler.accept([0])
            wanted = sampler.sample(logits, 0)
            assert [item.id for item in found.top[:top]] == [token for token, _ in wanted.top]
            assert [item.logprob for item in found.top[:top]] == pytest.approx(
                [logprob for _, logprob in wanted.top], rel=1e-5, abs=1e-4
            )
            if found.id == wanted.id:
                assert found.logprob == pytest.approx(wanted.logprob, rel=1e-5, abs=1e-4)


@needs_cpu_compiler
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_that_cannot_be_sampled_are_told(card: Card, temperature: float) -> None:
    fine = np.arange(VOCAB, dtype=np.float32) % 7
    for bad, bit in ((np.nan, 1), (np.inf, 2)):
        logits = fine.copy()
        logits[777] = bad
        card.begin(SamplingParams(temperature=temperature, seed=0))
        assert card.choose(logits).problem & bit
        assert card.memory["token_ids"][0] == 0
    card.begin(SamplingParams(temperature=temperature, seed=0))
    assert card.choose(np.full(VOCAB, -np.inf, np.float32)).problem == 4
    card.begin(SamplingParams(temperature=temperature, seed=0, logit_bias=dict.fromkeys(range(VOCAB), -np.inf)))
    assert card.choose(fine).problem == 8
    card.begin(SamplingParams(temperature=temperature, seed=0))
    assert card.choose(fine).problem == 0, "the counters are zero again"


ROWS = (
    (SamplingParams(seed=0), (0,), 0),
    (SamplingParams(temperature=1.0, top_p=0.9, seed=4), (3,), 0),
    (SamplingParams(temperature=0.7, repetition_penalty=1.5, penalty_window=3, seed=2**40), (7, 8, 9, 9), 0),
    (SamplingParams(presence_penalty=4.0, logit_bias={12: 3.0, 7: -np.inf}, seed=1), (12, 12), 2),
)
"""How to choose, the tokens before, and how many alternatives to tell; all of it different."""


def alone(library: ctypes.CDLL, which: int, logits: Sequence[Logits]) -> list[Chosen]:
    card = Card(library)
    params, seen, top = ROWS[which]
    card.begin(params, seen=seen, top=top)
    return [card.choose(row) for row in logits]


@needs_cpu_compiler
@pytest.mark.parametrize("blocks", [BLOCKS, LEAST_BLOCKS])
def test_rows_of_a_step_choose_as_they_do_alone_whichever_row_they_are(library: ctypes.CDLL, blocks: int) -> None:
    logits = [rows(seed)[0] for seed in range(6)]
    wanted = {which: alone(library, which, logits) for which in range(len(ROWS))}
    card, slots = Card(library), (4, 0, 2, 1)
    for which, (params, seen, top) in enumerate(ROWS):
        card.begin(params, seen=seen, top=top, slot=slots[which])
    members = ([0, 1, 2, 3], [0, 1, 2, 3], [3, 1, 0], [1, 3], [3, 1], [1])  # some leave, others change rows
    for step, (present, row) in enumerate(zip(members, logits, strict=True)):
        found = card.choose_rows([row] * len(present), [slots[which] for which in present], 1, blocks)
        for which, chosen in zip(present, found, strict=True):
            same = wanted[which][step]
            assert (chosen.id, chosen.problem) == (same.id, 0)
            assert chosen.logprob == pytest.approx(same.logprob, rel=1e-5, abs=1e-5)
            top = ROWS[which][2]
            assert [item.id for item in chosen.top[:top]] == [item.id for item in same.top[:top]]


@needs_cpu_compiler
def test_a_row_that_cannot_be_sampled_leaves_the_others_alone(card: Card) -> None:
    fine = rows(1)[0]
    broken = np.full(VOCAB, np.nan, np.float32)
    for slot in range(3):
        card.begin(SamplingParams(temperature=1.0, seed=slot), slot=slot)
    one, bad, other = card.choose_rows([fine, broken, fine], [0, 1, 2])
    assert (one.problem, bad.problem & 1, other.problem) == (0, 1, 0)
    for chosen, slot in ((one, 0), (other, 2)):
        check(chosen.id, fine, SamplingParams(temperature=1.0, seed=slot), (0,), 0)


def test_all_blocks_of_a_launch_find_a_multiprocessor() -> None:
    for sm_count in (4, 14, 20, 80, 132, 148, 200):
        for rows in range(1, choice_rows_at_once(sm_count) + 1):
            assert rows * choice_blocks(sm_count, rows) <= sm_count
    assert choice_blocks(132, 1) == 64
    assert choice_rows_at_once(132) == 32


@needs_nvrtc
@pytest.mark.parametrize("arch", ["sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120"])
@pytest.mark.parametrize("vocab_size", [300, 151936, 262144])
def test_the_kernel_compiles_without_spills(arch: str, vocab_size: int) -> None:
    source = Source(name="choose", text=flatten(OPS / "choose.cu", [OPS]), defines=choice_defines(vocab_size))
    compiled = compile_cubin(source, arch)
    assert not compiled.spills
    assert set(compiled.functions) == {"choose", "count_tokens"}


def test_the_head_has_logits_for_every_sequence_that_may_choose_in_a_step() -> None:
    assert LOGIT_ROWS >= MAX_SEQUENCES
