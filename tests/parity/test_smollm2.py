"""SmolLM2 (Q4_1) in the reference executor against llama.cpp on the same values in float32."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from attrs import frozen
from numpy.typing import NDArray

import mortice
from mortice.core.plugin.interfaces import StepPart
from tests.support.llamacpp import LlamaCpp, Row, difference

pytestmark = pytest.mark.xdist_group("smollm2")

GREEDY_TOKENS = 64
PROMPTS = (
    "The capital of France is",
    "<|im_start|>user\nWhy is the sky blue?<|im_end|>\n<|im_start|>assistant\n",
    "def fibonacci(n):\n    ",
    "1, 1, 2, 3, 5, 8, 13,",
    "Once upon a time, in a village by the sea,",
    "Der schnelle braune Fuchs springt über den",
    "東京は日本の",
    "SELECT name, COUNT(*) FROM orders WHERE",
    "🙂 means happy, 🙁 means",
    "Q: What is 17 + 25?\nA:",
)
LONG_TEXT = (
    "The mortice is the hole and the tenon is the tongue that fits it. A joiner cuts the one, planes the other, and "
    "tries them dry before any glue is near. In the year {n} there were {m} joiners in the county, and each of them "
    "knew that a joint which has to be forced will split, while one that falls together will never hold. "
)
LONG_LENGTHS = (1, 2, 31, 32, 33, 128, 255, 256, 257, 400, 511, 512, 513, 600, 640, 700)


@frozen
class Continuation:
    prompt: list[int]
    rows: list[Row]
    """One for each position from the first token of the prompt to the last but one of the whole."""

    @property
    def generated(self) -> list[int]:
        return [row.best for row in self.rows[len(self.prompt) - 1 :]]


@pytest.fixture(scope="module")
def continuations(smollm2: mortice.Pipeline, smollm2_f32: Path) -> list[Continuation]:
    prompts = [smollm2.encode(prompt) for prompt in PROMPTS]
    context = max(map(len, prompts)) + GREEDY_TOKENS + 1
    with LlamaCpp(smollm2_f32, context=context, slots=len(prompts)) as llama:
        answers = llama.greedy(prompts, GREEDY_TOKENS)
    return [Continuation(prompt, rows) for prompt, rows in zip(prompts, answers, strict=True)]


@pytest.fixture
def batch(smollm2: mortice.Pipeline, continuations: list[Continuation]) -> Iterator[list[list[int]]]:
    """Greedy continuations by mortice, all prompts decoded together, one token of each a step."""
    sessions = [smollm2.session() for _ in continuations]
    best = [
        int(session.feed(continuation.prompt)[-1].argmax())
        for session, continuation in zip(sessions, continuations, strict=True)
    ]
    texts = [[token] for token in best]
    for _ in range(GREEDY_TOKENS - 1):
        parts = [
            StepPart(sequence=session.sequence, token_ids=text[-1:])
            for session, text in zip(sessions, texts, strict=True)
        ]
        for text, logits in zip(texts, smollm2.runtime.step(parts), strict=True):
            text.append(int(logits.argmax()))
    yield texts
    for session in sessions:
        session.close()


def is_same(ours: list[int], continuation: Continuation) -> bool:
    """False where they part at two tokens that are equally good to llama.cpp; any other difference is an error."""
    theirs = continuation.generated
    assert len(ours) == len(theirs)
    for place, (our, their) in enumerate(zip(ours, theirs, strict=True)):
        if our != their:
            row = continuation.rows[len(continuation.prompt) - 1 + place]
            gap = row.logprobs[0] - row.logprobs[1]
            assert our == row.ids[1], f"token {place}: {our} is not among llama.cpp's two best"
            assert gap <= 1e-2, f"token {place}: {our} instead of {their}, which is better by {gap}"
            return False
    return True


def test_greedy_text_is_that_of_llamacpp(batch: list[list[int]], continuations: list[Continuation]) -> None:
    assert len(continuations) >= 10
    assert {len(ours) for ours in batch} == {GREEDY_TOKENS}
    same = [is_same(ours, continuation) for ours, continuation in zip(batch, continuations, strict=True)]
    print(f"\nSmolLM2: {sum(same)} of {len(same)} greedy texts identical")


def test_generate_yields_the_greedy_tokens_of_llamacpp(
    smollm2: mortice.Pipeline, continuations: list[Continuation]
) -> None:
    continuation = continuations[0]
    pieces = list(smollm2.generate(continuation.prompt, max_tokens=GREEDY_TOKENS, temperature=0.0))
    stop = smollm2.tokenizer.stop_ids
    wanted = continuation.generated
    end = next((place + 1 for place, token in enumerate(wanted) if token in stop), len(wanted))
    assert [piece.id for piece in pieces] == wanted[:end]


def test_top_20_log_probabilities_agree_over_prompts_and_continuations(
    smollm2: mortice.Pipeline, continuations: list[Continuation]
) -> None:
    found = []
    for continuation in continuations:
        ids = [*continuation.prompt, *continuation.generated[:-1]]
        assert len(ids) == len(continuation.rows)
        found.append(difference(continuation.rows, smollm2.logits(ids)))
    positions = sum(one.positions for one in found)
    mean = sum(one.mean * one.positions for one in found) / positions
    worst = max(one.worst for one in found)
    print(f"\nSmolLM2: {positions} positions, mean {mean:.1e}, worst {worst:.1e}")
    assert positions >= len(PROMPTS) * GREEDY_TOKENS
    assert mean <= 0.005
    assert worst <= 0.03


@pytest.fixture(scope="module")
def long_ids(smollm2: mortice.Pipeline) -> list[int]:
    ids = smollm2.encode("".join(LONG_TEXT.format(n=1700 + n, m=10 * n) for n in range(12)))
    assert len(ids) >= max(LONG_LENGTHS)
    return ids[: max(LONG_LENGTHS)]


@pytest.fixture(scope="module")
def long_logits(smollm2: mortice.Pipeline, long_ids: list[int]) -> NDArray[np.float32]:
    return smollm2.logits(long_ids)


def test_log_probabilities_agree_throughout_a_long_prompt(
    smollm2_f32: Path, long_ids: list[int], long_logits: NDArray[np.float32]
) -> None:
    with LlamaCpp(smollm2_f32, context=1024) as llama:
        rows = [llama.after(long_ids[:length]) for length in LONG_LENGTHS]
    found = difference(rows, long_logits[[length - 1 for length in LONG_LENGTHS]])
    print(f"\nSmolLM2, {len(long_ids)} tokens: mean {found.mean:.1e}, worst {found.worst:.1e}")
    assert found.mean <= 0.005
    assert found.worst <= 0.03


def test_a_long_prompt_in_chunks_of_any_size_gives_the_logits_of_one_pass(
    smollm2: mortice.Pipeline, long_ids: list[int], long_logits: NDArray[np.float32]
) -> None:
    sizes = [1, 1, 2, 7, 64, 1, 200, 31, 300, 1]
    sizes.append(len(long_ids) - sum(sizes))
    with smollm2.session() as session:
        start = 0
        for size in sizes:
            logits = session.feed(long_ids[start : start + size], logits="all")
            assert np.abs(logits - long_logits[start : start + size]).max() <= 2e-3
            start += size
    assert start == len(long_ids)


def test_decoding_token_by_token_gives_the_logits_of_prefill(
    smollm2: mortice.Pipeline, long_ids: list[int], long_logits: NDArray[np.float32]
) -> None:
    with smollm2.session() as session:
        for place, token in enumerate(long_ids[:48]):
            assert np.abs(session.feed([token])[0] - long_logits[place]).max() <= 2e-3
