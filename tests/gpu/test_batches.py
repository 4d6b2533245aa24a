"""Steps of several sequences on a card: against the reference, against one by one, and what is refused."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from mortice.core.errors import ExecutionError, InputError
from mortice.core.pipeline import Pipeline
from mortice.core.plugin.events import Event, GraphCaptured
from mortice.core.plugin.interfaces import StepPart
from mortice.core.plugin.token_choice import ChoicePart, TokenChoice
from mortice.core.testing.tiny_models import write_tiny_model
from mortice.core.text.params import GenerationParams, SamplingParams
from mortice.core.text.sampling import Sampled
from mortice.plugins.executors.cuda.lowering.launches import MAX_SEQUENCES
from mortice.plugins.executors.cuda.run.kv_pool import CudaSequence
from mortice.plugins.executors.cuda.run.runtime import CudaRuntime
from tests.gpu.test_executor import EXACT, FAMILIES, ROUNDED, error, load, prompt
from tests.support.cuda import needs_gpu
from tests.support.tiny import CONTRACTS

pytestmark = [pytest.mark.gpu, needs_gpu]

LENGTHS = (1, 2, 63, 64, 65, 255, 256, 257)
"""Around a page, and around a tile of rows."""

MIXED = (1, 63, 64, 65, 200, 480)
"""Texts of very different lengths in one step."""

CLOSE = 2e-2
"""As `error` counts, between steps whose products round their input differently: int8 for one row, halves for more."""

Logits = NDArray[np.float32]


def loaded(path: Path, executor: str, **kinds: Any) -> Pipeline:
    return load(path, executor, kv_tokens=4096, prefix_cache=False, **kinds)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    folder = tmp_path_factory.mktemp("models")

    def write(family: str) -> Path:
        contract, qtype, sizes = FAMILIES[family]
        path = folder / f"{contract}.gguf"
        return path if path.exists() else write_tiny_model(path, CONTRACTS[contract], qtypes=qtype, sizes=sizes)

    return write


@pytest.fixture(scope="module", params=FAMILIES)
def pair(model: Callable[[str], Path], request: pytest.FixtureRequest) -> Iterator[tuple[Pipeline, Pipeline]]:
    """A model on both executors, float32 throughout."""
    path = model(request.param)
    with loaded(path, "reference") as reference, loaded(path, "cuda") as cuda:
        yield reference, cuda


@pytest.fixture(scope="module")
def cuda(model: Callable[[str], Path]) -> Iterator[Pipeline]:
    with loaded(model("qwen2, biases, 896 wide"), "cuda") as pipeline:
        yield pipeline


def runtime_of(pipeline: Pipeline) -> CudaRuntime:
    assert isinstance(pipeline.runtime, CudaRuntime)
    return pipeline.runtime


@contextmanager
def sequences_of(pipeline: Pipeline, count: int) -> Iterator[list[CudaSequence]]:
    with ExitStack() as stack:
        yield [stack.enter_context(closing(runtime_of(pipeline).new_sequence())) for _ in range(count)]


def fed(pipeline: Pipeline, given: Sequence[tuple[CudaSequence, Sequence[int]]], logits: str = "all") -> list[Logits]:
    """One step; the logits of each part."""
    parts = [StepPart(sequence=one, token_ids=ids, logits=logits) for one, ids in given]  # type: ignore[arg-type]
    rows = pipeline.runtime.step(parts)
    ends = np.cumsum([len(part.token_ids) if logits == "all" else 1 for part in parts])[:-1]
    return np.split(rows, ends)


# the same logits whichever way -------------------------------------------------------------------------------------


def test_prefill_decode_and_batch_give_the_references_logits_at_every_length(pair: tuple[Pipeline, Pipeline]) -> None:
    reference, cuda = pair
    ids = prompt(reference, max(LENGTHS) + 3)
    wanted = reference.logits(ids)
    with cuda.session() as session:
        for position, token in enumerate(ids):
            assert error(session.feed([token])[0], wanted[position]) < EXACT, position
    for length in LENGTHS:
        assert error(cuda.logits(ids[:length]), wanted[:length]) < EXACT, length
    with sequences_of(cuda, len(LENGTHS)) as sequences:
        starts = [ids[:length] for length in LENGTHS]
        for length, found in zip(LENGTHS, fed(cuda, list(zip(sequences, starts, strict=True))), strict=True):
            assert error(found, wanted[:length]) < EXACT, length
        for step in range(3):  # each at another position
            given = [(one, [ids[length + step]]) for one, length in zip(sequences, LENGTHS, strict=True)]
            for length, found in zip(LENGTHS, fed(cuda, given), strict=True):
                assert error(found[0], wanted[length + step]) < EXACT, (length, step)


def test_prompts_fed_in_chunks_beside_sequences_that_decode_give_the_references_logits(
    pair: tuple[Pipeline, Pipeline],
) -> None:
    reference, cuda = pair
    texts = [prompt(reference, 300)[start:] for start in (0, 20, 40, 60)]
    wanted = [reference.logits(ids) for ids in texts]
    with sequences_of(cuda, len(texts)) as sequences:
        for chunks in ([63, 2, 1, 0], [1, 100, 1, 5], [1, 1, 130, 1], [1, 1, 64, 90], [1, 1, 1, 1]):
            given = [
                (which, one, ids[one.length : one.length + count])
                for which, (one, ids, count) in enumerate(zip(sequences, texts, chunks, strict=True))
                if count
            ]
            starts = {which: one.length for which, one, _ in given}
            rows = fed(cuda, [(one, ids) for _, one, ids in given])
            for (which, _, ids), found in zip(given, rows, strict=True):
                expected = wanted[which][starts[which] : starts[which] + len(ids)]
                assert error(found, expected) < EXACT, (chunks, which)


@pytest.mark.parametrize(("kinds", "bound"), [({}, EXACT), ({"exact": False}, CLOSE)], ids=["float32", "rounded"])
def test_logits_do_not_depend_on_who_else_is_in_the_step(
    model: Callable[[str], Path], kinds: dict[str, Any], bound: float
) -> None:
    with loaded(model("qwen3, head norms, heads wider than the model"), "cuda", **kinds) as cuda:
        ids, others = prompt(cuda, 70), [prompt(cuda, 90)[start:] for start in range(MAX_SEQUENCES)]
        with cuda.session() as session:
            session.feed(ids[:-5])
            alone = [session.feed([token])[0] for token in ids[-5:]]
        for count in (2, 3, 8, 9, 17, MAX_SEQUENCES):
            with sequences_of(cuda, count) as sequences:
                texts = [ids, *others][:count]
                place = count // 2
                texts.insert(place, texts.pop(0))
                for one, text in zip(sequences, texts, strict=True):
                    fed(cuda, [(one, text[:-5])], "last")
                for step in range(5):
                    given = [(one, [text[step - 5]]) for one, text in zip(sequences, texts, strict=True)]
                    assert error(fed(cuda, given)[place][0], alone[step]) < bound, (count, step)


@pytest.mark.parametrize("family", FAMILIES)
def test_single_tokens_of_many_sequences_attend_in_one_launch_as_each_alone(
    model: Callable[[str], Path], family: str
) -> None:
    with load(model(family), "cuda", exact=False, kv_tokens=8192) as cuda:
        runtime, ids, alone = runtime_of(cuda), prompt(cuda, max(MIXED) + 3), {}
        assert [runtime.lowering.path(count, alone=True).alone for count in (2, 16, 17)] == [True, True, False]
        for length in MIXED:
            with cuda.session() as session:
                session.feed(ids[:length])
                alone[length] = [session.feed([token])[0] for token in ids[length : length + 3]]
        for count in (2, 3, 8, 9, 16, MAX_SEQUENCES):
            lengths = [MIXED[number % len(MIXED)] for number in range(count)]
            with sequences_of(cuda, count) as sequences:
                fed(cuda, [(one, ids[:length]) for one, length in zip(sequences, lengths, strict=True)], "last")
                for step in range(3):
                    given = [(one, [ids[length + step]]) for one, length in zip(sequences, lengths, strict=True)]
                    if step == 1 and runtime.lowering.path(count, alone=True).alone:
                        assert error(*both_ways(runtime, given)) < ROUNDED, count
                    for length, found in zip(lengths, fed(cuda, given), strict=True):
                        assert error(found[0], alone[length][step]) < CLOSE, (count, length, step)


def both_ways(runtime: CudaRuntime, given: Sequence[tuple[CudaSequence, Sequence[int]]]) -> list[Logits]:
    """Logits of single tokens, launched as if their sequences had more in the step, and as they are; not counted."""
    logits, count = runtime.lowering.plan.program.logits, len(given)
    parts = [StepPart(sequence=one, token_ids=ids, logits="all") for one, ids in given]
    runtime.rows.send(runtime.begin(parts), runtime.stream)
    found = []
    for alone in (False, True):
        labels = {spec.label for spec, _ in runtime.launches("body", count, alone=alone)}
        assert ("place" in labels) != alone
        runtime.run_part("body", count, alone=alone)
        runtime.run_part("head", count)
        found.append(runtime.read_buffer(logits, count))
    return found


# the same tokens as one by one -------------------------------------------------------------------------------------

WAYS: tuple[dict[str, Any], ...] = (
    {},
    {"temperature": 1.0, "seed": 5},
    {"temperature": 0.8, "top_k": 40, "top_p": 0.9, "min_p": 0.01, "seed": 6},
    {"temperature": 0.7, "repetition_penalty": 1.2, "frequency_penalty": 0.3, "penalty_window": 16, "seed": 7},
    {"repetition_penalty": 1.2, "presence_penalty": 0.5, "logprobs": 3},
    {"temperature": 1.0, "logit_bias": {7: 3.0, 9: -math.inf}, "seed": 8},
    {"temperature": 1.0, "seed": 9, "logprobs": 100},  # more than the card reports: the host samples
)


def requests(pipeline: Pipeline, count: int) -> list[dict[str, Any]]:
    """Prompts of many lengths, each with its own parameters and its own end."""
    ids = prompt(pipeline, 400)
    return [
        {
            "prompt": ids[7 * number : 7 * number + 1 + 13 * number % 140],
            "max_tokens": 5 + 11 * number % 90,
            "stop_at_eos": False,
            **WAYS[number % len(WAYS)],
        }
        for number in range(count)
    ]


@pytest.mark.parametrize("count", [2, 9, MAX_SEQUENCES + 8])
def test_many_at_once_give_the_tokens_that_one_by_one_gives(cuda: Pipeline, count: int) -> None:
    given = requests(cuda, count)
    results = cuda.complete_many(given)
    for number, (options, result) in enumerate(zip(given, results, strict=True)):
        alone = list(cuda.generate(**options))
        assert result.error is None
        assert result.token_ids == [piece.id for piece in alone], number
        assert np.allclose([p.logprob for p in result.pieces], [p.logprob for p in alone], atol=1e-3)
        for found, wanted in zip(result.pieces, alone, strict=True):  # those next to each other may change places
            ranked = [[logprob for _, logprob in piece.top_logprobs] for piece in (found, wanted)]
            assert np.allclose(*ranked, atol=1e-3), (number, found.index)


def test_greedy_texts_of_a_batch_are_the_references(pair: tuple[Pipeline, Pipeline]) -> None:
    reference, cuda = pair
    ids = prompt(reference, 120)
    given = [{"prompt": ids[start : start + 10 + 9 * start]} for start in range(5)]
    wanted = [[piece.id for piece in reference.generate(**one, max_tokens=30, stop_at_eos=False)] for one in given]
    results = cuda.complete_many(given, max_tokens=30, stop_at_eos=False)
    assert [result.token_ids for result in results] == wanted


def test_prompts_that_come_while_others_decode_change_nothing(model: Callable[[str], Path]) -> None:
    with loaded(model("qwen2, biases, 896 wide"), "cuda", step_tokens=48) as cuda:
        given = requests(cuda, 12)
        alone = [[piece.id for piece in cuda.generate(**options)] for options in given]
        assert [result.token_ids for result in cuda.complete_many(given)] == alone


def test_a_session_between_the_steps_of_a_batch_changes_neither(cuda: Pipeline) -> None:
    given = requests(cuda, 6)
    wanted = [result.token_ids for result in cuda.complete_many(given)]
    alone = [piece.id for piece in cuda.generate(**given[3])]
    found: list[list[int]] = [[] for _ in given]
    between: list[int] = []
    session = cuda.generate(**given[3])
    for number, (index, piece) in enumerate(cuda.generate_many(given)):
        found[index].append(piece.id)
        if number % 7 == 3:
            between += [piece.id for piece in [next(session, None)] if piece is not None]
    assert found == wanted
    assert between == alone[: len(between)]
    assert between


# the step-level interface ------------------------------------------------------------------------------------------


def chosen_ids(
    pipeline: Pipeline, choices: Sequence[TokenChoice], last: list[int], index: int, *, ahead: bool
) -> list[int]:
    parts = [
        ChoicePart(sequence=choice.sequence, token_ids=[token], choice=choice, index=index)
        for choice, token in zip(choices, last, strict=True)
    ]
    found = runtime_of(pipeline).choose_step(parts, ahead=ahead)
    return [one.id for one in found if isinstance(one, Sampled)]


@contextmanager
def begun(pipeline: Pipeline, count: int) -> Iterator[tuple[list[TokenChoice], list[int]]]:
    """Choices for sequences with prompts of their own, and the first token of each."""
    runtime, ids = runtime_of(pipeline), prompt(pipeline, 100)
    with sequences_of(pipeline, count) as sequences:
        choices = [
            runtime.token_choice(one, SamplingParams(temperature=1.0, seed=number), GenerationParams())
            for number, one in enumerate(sequences)
        ]
        made = [choice for choice in choices if choice is not None]
        parts = [
            ChoicePart(sequence=one, token_ids=ids[number : 2 * number + 3], choice=choice)
            for number, (one, choice) in enumerate(zip(sequences, made, strict=True))
        ]
        found = runtime.choose_step(parts, ahead=True)
        yield list(made), [one.id for one in found if isinstance(one, Sampled)]


def wanted_ids(pipeline: Pipeline, count: int, steps: int) -> list[list[int]]:
    """Each step's tokens, where nothing is launched ahead."""
    with begun(pipeline, count) as (choices, last):
        rows = [last]
        for index in range(1, steps):
            rows.append(chosen_ids(pipeline, choices, rows[-1], index, ahead=False))
    return rows


def test_steps_launched_ahead_give_the_same_tokens_whoever_leaves_or_comes_back(cuda: Pipeline) -> None:
    wanted = wanted_ids(cuda, 5, 80)  # over a page
    with begun(cuda, 5) as (choices, last):
        rows = [list(last)]
        for index in range(1, 80):
            row = list(rows[-1])
            if index % 9 < 6:
                row = chosen_ids(cuda, choices, rows[-1], index, ahead=index % 13 > 0)
            else:  # some first, then the rest in another order
                for places in ((3, 1), (4, 0, 2)):
                    found = chosen_ids(
                        cuda, [choices[i] for i in places], [rows[-1][i] for i in places], index, ahead=True
                    )
                    for place, token in zip(places, found, strict=True):
                        row[place] = token
            rows.append(row)
    assert rows == wanted


def test_a_sequence_that_was_cut_is_fed_again(cuda: Pipeline) -> None:
    wanted = wanted_ids(cuda, 3, 12)
    with begun(cuda, 3) as (choices, last):
        rows = [list(last)]
        for index in range(1, 12):
            rows.append(chosen_ids(cuda, choices, rows[-1], index, ahead=True))
        sequence = choices[1].sequence
        sequence.truncate(sequence.length - 4)
        for index in range(8, 12):
            alone = chosen_ids(cuda, [choices[1]], [wanted[index - 1][1]], index, ahead=True)
            assert alone == [wanted[index][1]]
    assert rows == wanted


def test_one_that_is_refused_leaves_the_step_and_the_others_as_they_were(cuda: Pipeline) -> None:
    runtime, wanted = runtime_of(cuda), wanted_ids(cuda, 4, 6)
    with begun(cuda, 4) as (choices, last), sequences_of(cuda, 1) as (other,):
        lengths = [choice.sequence.length for choice in choices]
        good = [
            ChoicePart(sequence=choice.sequence, token_ids=[token], choice=choice, index=1)
            for choice, token in zip(choices, last, strict=True)
        ]
        for bad, message in (
            (ChoicePart(sequence=other, token_ids=[cuda.program.vocab_size]), "outside the vocabulary"),
            (ChoicePart(sequence=other, token_ids=[1] * 513), "do not fit the context of 512"),
            (good[0], "a sequence can stand in a step only once"),
            (ChoicePart(sequence=other, token_ids=[1], choice=choices[0]), "not one of this sequence's"),
        ):
            with pytest.raises(InputError, match=message):
                runtime.choose_step([*good, bad], ahead=True)
        assert [choice.sequence.length for choice in choices] == lengths
        assert other.length == 0
        rows = [list(last)]
        for index in range(1, 6):
            rows.append(chosen_ids(cuda, choices, rows[-1], index, ahead=True))
    assert rows == wanted


def test_more_sequences_or_tokens_than_fit_are_refused_and_the_open_ones_go_on(model: Callable[[str], Path]) -> None:
    with load(model("llama, grouped heads, 576 wide"), "cuda", kv_tokens=1024, prefix_cache=False) as cuda:
        ids = prompt(cuda, 512)
        wanted = cuda.logits(ids[:12])
        with sequences_of(cuda, MAX_SEQUENCES) as sequences:
            with pytest.raises(InputError, match=f"{MAX_SEQUENCES} sequences are open"):
                cuda.runtime.new_sequence()
            fed(cuda, [(sequences[0], ids[:11])])
            with pytest.raises(InputError, match="more pages of KV cache are needed"):
                fed(cuda, [(one, ids) for one in sequences[1:3]], "last")
            assert [one.length for one in sequences[:3]] == [11, 0, 0]
            assert error(fed(cuda, [(sequences[0], [ids[11]])])[0][0], wanted[11]) < EXACT


def test_a_row_whose_logits_cannot_be_sampled_ends_alone(cuda: Pipeline) -> None:
    banned = {"prompt": [1, 2, 3], "logit_bias": dict.fromkeys(range(cuda.program.vocab_size), -math.inf)}
    good = requests(cuda, 3)
    results = cuda.complete_many([good[0], banned, *good[1:]])
    assert [type(result.error) for result in results] == [type(None), ExecutionError, type(None), type(None)]
    found = [result.token_ids for result in results if result.error is None]
    assert found == [[piece.id for piece in cuda.generate(**options)] for options in good]


# graphs and memory -------------------------------------------------------------------------------------------------


def test_a_graph_serves_all_steps_of_as_many_sequences_until_it_is_cleared(model: Callable[[str], Path]) -> None:
    with loaded(model("llama, grouped heads, 576 wide"), "cuda", exact=False) as cuda:
        captured: list[Event] = []
        cuda.registry.observers.append(
            lambda event: captured.append(event) if isinstance(event, GraphCaptured) else None
        )
        given = [{"prompt": [5 + number], "max_tokens": 140} for number in range(4)]
        first = [result.token_ids for result in cuda.complete_many(given, stop_at_eos=False)]
        assert len(captured) == 1
        again = [result.token_ids for result in cuda.complete_many(given, stop_at_eos=False)]
        assert len(captured) == 1
        runtime_of(cuda).clear_decode_graph()
        cleared = [result.token_ids for result in cuda.complete_many(given, stop_at_eos=False)]
        assert len(captured) == 2
        assert first == again == cleared


def test_nothing_is_allocated_per_step_of_a_batch(cuda: Pipeline) -> None:
    device = runtime_of(cuda).device
    given = [{"prompt": [5 + number], **WAYS[number % 6]} for number in range(6)]
    pieces = cuda.generate_many(given, max_tokens=100, stop_at_eos=False)
    for _ in range(24):
        next(pieces)
    before = device.allocations
    assert len(list(pieces)) == 600 - 24
    assert device.allocations == before


def test_a_pipeline_can_be_closed_with_a_step_of_a_batch_ahead(model: Callable[[str], Path]) -> None:
    cuda = loaded(model("llama, grouped heads, 576 wide"), "cuda", exact=False)
    device = runtime_of(cuda).device
    pieces = cuda.generate_many([[1], [2], [3]], max_tokens=50, stop_at_eos=False)
    for _ in range(7):
        next(pieces)
    cuda.close()
    assert device.allocated_bytes == 0
