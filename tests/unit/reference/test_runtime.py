"""Steps, sequences and their errors in the reference runtime."""

from __future__ import annotations

import tracemalloc
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal

import numpy as np
import pytest
from numpy.typing import NDArray

from mortice.arch_contracts.schema import Contract, builtin_contracts
from mortice.core.errors import ExecutionError, InputError
from mortice.core.plugin.interfaces import RuntimeSettings, StepPart, TokenSequence
from mortice.plugins.executors.reference.executor import ReferenceExecutor
from mortice.plugins.executors.reference.runtime import ReferenceRuntime
from tests.support.in_memory import SIZES, arrays_for, metadata_for, model_file, runtime_of
from tests.unit.model.test_families import CASES, TOKENS, build

LLAMA: Contract = next(contract for contract in builtin_contracts() if contract.name == "llama")


def runtime(layout: str = "fastest", context_length: int | None = None, **keys: Any) -> ReferenceRuntime:
    metadata = metadata_for(LLAMA, **keys)
    return runtime_of(
        model_file(metadata, arrays_for(LLAMA, metadata)), LLAMA, layout=layout, context_length=context_length
    )


@pytest.fixture
def llama() -> ReferenceRuntime:
    return runtime()


def feed(
    runtime: ReferenceRuntime,
    sequence: TokenSequence,
    ids: list[int],
    logits: Literal["last", "all", "none"] = "all",
) -> NDArray[np.float32]:
    return runtime.step([StepPart(sequence=sequence, token_ids=ids, logits=logits)])


def alone(runtime: ReferenceRuntime, ids: list[int]) -> NDArray[np.float32]:
    return feed(runtime, runtime.new_sequence(), ids)


def close(a: NDArray[np.float32], b: NDArray[np.float32]) -> None:
    np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("kv_type", "off"), [("f16", 1e-6), ("q8_0", 1e-3)])
def test_a_cache_of_a_smaller_type_costs_a_little(kv_type: str, off: float) -> None:
    metadata = metadata_for(LLAMA, attention__key_length=32, attention__value_length=32)
    file = model_file(metadata, arrays_for(LLAMA, metadata))
    exact, rounded = (alone(runtime_of(file, LLAMA, kv_type=kind), [1, 2, 3, 4, 5, 6, 7]) for kind in ("auto", kv_type))
    error = np.square(rounded - exact).sum() / np.square(exact).sum()
    assert 0 < error < off


def test_a_cache_of_q8_0_wants_heads_of_whole_blocks(llama: ReferenceRuntime) -> None:
    settings = RuntimeSettings(context_length=8, kv_type="q8_0")
    (reason,) = ReferenceExecutor().unsupported(llama.model.plan.program, settings)
    assert reason == "executor.kv = 'q8_0': found head_dim 8, wanted a multiple of 32"


# the same tokens, fed in other ways ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "mistral", "gemma3", "gpt2", "stablelm, parallel"])
@pytest.mark.parametrize("chunk", [1, 3, 5])
def test_chunks_give_what_one_step_gives(name: str, chunk: int) -> None:
    contract, metadata, arrays = build(CASES[name])
    built = runtime_of(model_file(metadata, arrays), contract)
    whole = alone(built, TOKENS)
    sequence = built.new_sequence()
    rows = [feed(built, sequence, TOKENS[start : start + chunk]) for start in range(0, len(TOKENS), chunk)]
    close(np.concatenate(rows), whole)


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt2"])
def test_sequences_in_one_step_do_not_see_each_other(name: str) -> None:
    contract, metadata, arrays = build(CASES[name])
    built = runtime_of(model_file(metadata, arrays), contract)
    first, second, third = (built.new_sequence() for _ in range(3))
    feed(built, first, TOKENS[:4])
    feed(built, third, TOKENS[:7])
    parts = [
        StepPart(sequence=first, token_ids=TOKENS[4:9], logits="all"),
        StepPart(sequence=second, token_ids=TOKENS[::-1], logits="last"),
        StepPart(sequence=third, token_ids=[TOKENS[7]], logits="none"),
    ]
    logits = built.step(parts)
    assert logits.shape == (6, 40)
    close(logits[:5], alone(built, TOKENS[:9])[4:])
    close(logits[5:], alone(built, TOKENS[::-1])[-1:])
    assert [sequence.length for sequence in (first, second, third)] == [9, 12, 8]
    close(feed(built, third, TOKENS[8:10]), alone(built, TOKENS[:10])[8:])


def test_no_logits_are_computed_where_none_are_asked_for(llama: ReferenceRuntime) -> None:
    sequence = llama.new_sequence()
    assert feed(llama, sequence, TOKENS[:5], "none").shape == (0, 40)
    close(feed(llama, sequence, TOKENS[5:]), alone(llama, TOKENS)[5:])


def test_a_truncated_sequence_goes_on_as_if_nothing_had_followed(llama: ReferenceRuntime) -> None:
    sequence = llama.new_sequence()
    feed(llama, sequence, TOKENS)
    sequence.truncate(3)
    close(feed(llama, sequence, [9, 9, 1]), alone(llama, [*TOKENS[:3], 9, 9, 1])[3:])


@pytest.mark.parametrize("length", [-1, 4])
def test_a_sequence_is_truncated_only_to_what_it_has(llama: ReferenceRuntime, length: int) -> None:
    sequence = llama.new_sequence()
    feed(llama, sequence, [1, 2, 3])
    with pytest.raises(InputError, match=f"a sequence of 3 tokens to {length}"):
        sequence.truncate(length)


def test_the_cache_grows_past_its_first_size() -> None:
    metadata = metadata_for(LLAMA, {**SIZES, "context_length": 600})
    built = runtime_of(model_file(metadata, arrays_for(LLAMA, metadata)), LLAMA)
    ids = [number % 40 for number in range(600)]
    sequence = built.new_sequence()
    rows = [feed(built, sequence, ids[start : start + 100]) for start in range(0, 600, 100)]
    close(np.concatenate(rows)[590:], alone(built, ids)[590:])


def test_file_layout_gives_what_the_expanded_one_gives(llama: ReferenceRuntime) -> None:
    from_file = runtime(layout="file")
    assert from_file.model.plan.arena_bytes == 0
    close(alone(from_file, TOKENS), alone(llama, TOKENS))


# errors leave everything as it was -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        ([1, 40], "token id 40 is outside the vocabulary of 40"),
        ([-1], "token id -1 is outside"),
        ([2**70], "whole numbers"),
        ([1.5], "whole numbers"),
        (["1"], "whole numbers"),
        (list(range(10)) * 7, r"3 \+ 70 tokens do not fit the context of 64"),
    ],
)
def test_a_refused_step_changes_no_sequence(llama: ReferenceRuntime, ids: list[Any], message: str) -> None:
    good, bad = llama.new_sequence(), llama.new_sequence()
    feed(llama, bad, TOKENS[:3])
    with pytest.raises(InputError, match=message):
        llama.step([StepPart(sequence=good, token_ids=[1]), StepPart(sequence=bad, token_ids=ids)])
    assert (good.length, bad.length) == (0, 3)
    close(feed(llama, bad, TOKENS[3:]), alone(llama, TOKENS)[3:])


def test_a_sequence_stands_in_a_step_once(llama: ReferenceRuntime) -> None:
    sequence = llama.new_sequence()
    with pytest.raises(InputError, match="only once"):
        llama.step([StepPart(sequence=sequence, token_ids=[1]), StepPart(sequence=sequence, token_ids=[2])])


def test_a_step_without_parts_is_refused(llama: ReferenceRuntime) -> None:
    with pytest.raises(InputError, match="at least one part"):
        llama.step([])


def test_a_sequence_of_another_runtime_is_refused(llama: ReferenceRuntime) -> None:
    with pytest.raises(InputError, match="not one of this runtime"):
        feed(llama, runtime().new_sequence(), [1])


def test_a_closed_runtime_is_refused(llama: ReferenceRuntime) -> None:
    sequence = llama.new_sequence()
    llama.close()
    llama.close()
    with pytest.raises(InputError, match="closed"):
        feed(llama, sequence, [1])


def test_weights_that_are_not_numbers_are_named_as_the_cause() -> None:
    metadata = metadata_for(LLAMA)
    arrays = arrays_for(LLAMA, metadata)
    arrays["blk.1.ffn_norm.weight"][3] = np.nan
    built = runtime_of(model_file(metadata, arrays), LLAMA)
    sequence = built.new_sequence()
    with pytest.raises(ExecutionError, match="NaN or infinity"):
        feed(built, sequence, [1, 2])
    assert sequence.length == 0


@pytest.mark.parametrize("factor", [0.0, -1.0, float("nan")])
def test_rope_factors_that_are_not_positive_are_refused(factor: float) -> None:
    metadata = metadata_for(LLAMA)
    arrays = arrays_for(LLAMA, metadata)
    arrays["rope_freqs.weight"][1] = factor
    with pytest.raises(InputError, match=r"rope_freqs\.weight: factor 1 is "):
        runtime_of(model_file(metadata, arrays), LLAMA)


# threads -------------------------------------------------------------------------------------------------------------


def test_threads_on_one_runtime_and_on_two_agree(llama: ReferenceRuntime) -> None:
    other = runtime()
    wanted = alone(llama, TOKENS)

    def decode(built: ReferenceRuntime) -> NDArray[np.float32]:
        sequence = built.new_sequence()
        return np.concatenate([feed(built, sequence, [token]) for token in TOKENS])

    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(decode, [llama, other] * 6))
    for result in results:
        close(result, wanted)


# what a run takes ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "gemma2", "starcoder2"])
@pytest.mark.parametrize("layout", ["fastest", "file"])
def test_the_workspace_estimate_bounds_what_a_step_allocates(name: str, layout: str) -> None:
    contract, metadata, arrays = build(CASES[name])
    prefix = contract.architectures[0]
    metadata |= {f"{prefix}.context_length": 1024, f"{prefix}.feed_forward_length": 512}
    arrays = arrays_for(contract, metadata)
    built = runtime_of(model_file(metadata, arrays), contract, layout=layout)
    settings = RuntimeSettings(context_length=1024)
    executor = ReferenceExecutor()
    program = built.model.plan.program
    estimate = executor.workspace_bytes(program, settings)
    sequence = built.new_sequence()
    tracemalloc.start()
    try:
        for _ in range(2):
            feed(built, sequence, [number % 40 for number in range(512)], "last")
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    kv = executor.kv_bytes(program, settings)
    assert peak <= estimate + 1.5 * kv  # a cache that grows is there twice for a moment
    assert peak > estimate / 4, "an estimate far from what is used refuses runs that would fit"
