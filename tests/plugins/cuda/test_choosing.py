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
from mortice.plugins.executors.cuda.choosing import RING, ChooseArgs, Chosen, choice_defines, choice_params
from mortice.plugins.executors.cuda.flatten import flatten
from mortice.plugins.executors.cuda.nvrtc import Source, compile_cubin
from mortice.plugins.executors.cuda.sources import OPS
from tests.support.cuda import needs_nvrtc
from tests.support.cuda_on_cpu import compile_for_cpu, needs_cpu_compiler
from tests.support.draws import possible_tokens

VOCAB, BLOCKS, THREADS, CONTEXT = 1000, 3, 64, 40

LAUNCHES = """
extern "C" void run_choose(const ChooseArgs* args) { launch({kBlocks}, kThreads, [=] { choose(*args); }); }
extern "C" void run_count(const int* history, int* counts, int first, int last) {
    launch({kBlocks}, kThreads, [=] { count_tokens(history, counts, first, last); });
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
        defines = choice_defines(VOCAB, BLOCKS, THREADS)
        self.memory = {
            "logits": np.zeros(VOCAB, np.float32),
            "params": np.zeros(int(defines["PARAMS_BYTES"]), np.uint8),
            "bias": np.zeros(VOCAB, np.float32),
            "counts": np.zeros(VOCAB, np.int32),
            "history": np.zeros(CONTEXT + 1, np.int32),
            "scratch": np.zeros(int(defines["SCRATCH_BYTES"]) // 8, np.uint64),
            "token_ids": np.zeros(1, np.int32),
            "positions": np.zeros(1, np.int32),
            "chosen": np.zeros(int(defines["CHOSEN_BYTES"]) * RING, np.uint8),
        }

    def begin(self, params: SamplingParams, *, step: int = 0, top: int = 0, seen: Sequence[int] = (0,)) -> None:
        memory, self.step = self.memory, 0
        memory["params"][:] = np.frombuffer(bytes(choice_params(params, VOCAB, step=step, top=top)), np.uint8)
        memory["bias"][:] = 0
        for token, bias in params.logit_bias.items():
            memory["bias"][token] = bias
        memory["counts"][:] = 0
        memory["history"][: len(seen)] = seen
        memory["positions"][0] = len(seen) - 1
        first = max(0, len(seen) - (params.penalty_window or len(seen)))
        history, counts = (ctypes.c_void_p(memory[name].ctypes.data) for name in ("history", "counts"))
        self.library.run_count(history, counts, first, len(seen))

    def choose(self, logits: Logits) -> Chosen:
        self.memory["logits"][:] = logits
        args = ChooseArgs(**{name: array.ctypes.data for name, array in self.memory.items()})
        self.library.run_choose(ctypes.byref(args))
        chosen = Chosen.from_buffer_copy(self.memory["chosen"].data, ctypes.sizeof(Chosen) * (self.step % RING))
        self.step += 1
        assert chosen.problem or self.memory["token_ids"][0] == chosen.id
        return chosen


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    folder = tmp_path_factory.mktemp("choose")
    text = flatten(OPS / "choose.cu", [OPS]) + LAUNCHES
    return compile_for_cpu(folder, text, choice_defines(VOCAB, BLOCKS, THREADS))


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


@needs_nvrtc
@pytest.mark.parametrize("arch", ["sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120"])
@pytest.mark.parametrize(("vocab_size", "blocks"), [(151936, 64), (262144, 20)])
def test_the_kernel_compiles_without_spills(arch: str, vocab_size: int, blocks: int) -> None:
    source = Source(name="choose", text=flatten(OPS / "choose.cu", [OPS]), defines=choice_defines(vocab_size, blocks))
    compiled = compile_cubin(source, arch)
    assert not compiled.spills
    assert set(compiled.functions) == {"choose", "count_tokens"}
