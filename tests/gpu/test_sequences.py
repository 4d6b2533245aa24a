"""Sequences that share pages of the KV cache on a card: forks, cuts, equal beginnings, and what is left at the end."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from mortice.core.errors import InputError
from mortice.core.pipeline import Pipeline
from mortice.core.plugin.events import Event, StepDone
from mortice.core.plugin.interfaces import StepPart
from mortice.core.plugin.kv_pages import PAGE_TOKENS, page_count
from mortice.core.session import Session
from mortice.core.testing.tiny_models import write_tiny_model
from mortice.plugins.executors.cuda.lowering.launches import MAX_SEQUENCES
from mortice.plugins.executors.cuda.run.kv_pool import CudaSequence
from mortice.plugins.executors.cuda.run.runtime import CudaRuntime
from mortice.plugins.executors.cuda.run.runtime_memory import CODE_BYTES
from tests.gpu.test_executor import EXACT, ROUNDED, error, load, prompt
from tests.support.cuda import needs_gpu
from tests.support.tiny import CONTRACTS

pytestmark = [pytest.mark.gpu, needs_gpu]

CONTEXT = 2048
SIZES = {"hidden_size": 256, "num_heads": 4, "num_kv_heads": 2, "ffn_size": 512, "context_length": CONTEXT}
LENGTHS = (1, 63, 64, 65, 130)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    folder = tmp_path_factory.mktemp("models")

    def write(family: str) -> Path:
        path = folder / f"{family}.gguf"
        return path if path.exists() else write_tiny_model(path, CONTRACTS[family], qtypes="Q8_0", sizes=SIZES)

    return write


def opened(path: Path, *, exact: bool = True, **kinds: Any) -> Pipeline:
    return load(path, "cuda", exact=exact, context=CONTEXT, **{"prefix_cache": True, "kv_tokens": 32 * 640, **kinds})


@pytest.fixture(scope="module", params=["f32", "f16", "q8_0"])
def each_kv(model: Callable[[str], Path], request: pytest.FixtureRequest) -> Iterator[Pipeline]:
    with opened(model("llama"), kv=request.param) as pipeline:
        yield pipeline
        assert pages_in_use(pipeline) == 0


@pytest.fixture(scope="module")
def cuda(model: Callable[[str], Path]) -> Iterator[Pipeline]:
    """With int8 activations and half precision, as it runs by default."""
    with opened(model("llama"), exact=False) as pipeline:
        yield pipeline
        assert pages_in_use(pipeline) == 0


def pages_in_use(pipeline: Pipeline) -> int:
    runtime = pipeline.runtime
    assert isinstance(runtime, CudaRuntime)
    assert len(runtime._slots) == MAX_SEQUENCES, "all sequences came back"
    return runtime.pool.pages - runtime.free_pages


def feeds(session: Session, ids: list[int], wanted: list[Any]) -> None:
    """The tokens one by one, each with the logits that another session had."""
    for token, rows in zip(ids, wanted, strict=True):
        assert error(session.feed([token]), rows) < EXACT


def recomputed(pipeline: Pipeline, start: list[int], ids: list[int]) -> list[Any]:
    with pipeline.session() as session:
        session.feed(start)
        return [session.feed([token]) for token in ids]


# forks ---------------------------------------------------------------------------------------------------------------


def test_a_fork_and_its_parent_each_go_on_as_if_alone(each_kv: Pipeline) -> None:
    ids = prompt(each_kv, 140)
    for length in LENGTHS:
        start, one, other = ids[:length], ids[-3:], ids[-6:-3]
        wanted = [recomputed(each_kv, start, tokens) for tokens in (one, other)]
        with each_kv.session() as parent:
            parent.feed(start)
            with parent.fork() as child:
                for step in range(3):  # turn about, the parent first
                    feeds(parent, one[step : step + 1], wanted[0][step : step + 1])
                    feeds(child, other[step : step + 1], wanted[1][step : step + 1])


def test_what_is_written_after_a_cut_leaves_the_other_owner_alone(each_kv: Pipeline) -> None:
    ids = prompt(each_kv, 140)
    wanted = recomputed(each_kv, ids, ids[:3])
    for length in (3, 64, 100):
        other = ids[-70:]
        again = recomputed(each_kv, [*ids[:length], *other], ids[:2])
        for first in ("parent", "child"):
            with each_kv.session() as parent:
                parent.feed(ids)
                with parent.fork() as child:
                    kept, cut = (child, parent) if first == "parent" else (parent, child)
                    cut.sequence.truncate(length)
                    del cut.fed[length:]
                    cut.feed(other)
                    feeds(kept, ids[:3], wanted)
                    for token, rows in zip(ids[:2], again, strict=True):
                        assert error(cut.feed([token]), rows) < ROUNDED, "its prompt came in other steps"


def test_a_fork_outlives_its_parent(each_kv: Pipeline) -> None:
    ids = prompt(each_kv, 100)
    wanted = recomputed(each_kv, ids, ids[:5])
    parent = each_kv.session()
    parent.feed(ids)
    child = parent.fork()
    parent.close()
    with each_kv.session() as other:
        other.feed(ids[::-1])
        feeds(child, ids[:5], wanted)
    child.close()


def test_a_fork_in_the_middle_of_a_text_changes_neither_text(cuda: Pipeline) -> None:
    """A step is launched ahead of the one waited for: what it writes belongs to one of the two."""
    ids = prompt(cuda, 50)
    sampling, generation = cuda.parameters({"max_tokens": 60, "stop_at_eos": False})
    with cuda.session() as session:
        wanted = [piece.id for piece in session.generate(ids, sampling, generation)]
    for count in (1, 14, 15, 30):
        with cuda.session() as parent:
            pieces = parent.generate(ids, sampling, generation)
            found = [next(pieces).id for _ in range(count)]
            with parent.fork() as child:
                assert child.fed == [*ids, *wanted[: count - 1]]
                other = list(child.generate([*child.fed, 7], sampling, generation))
                found += [piece.id for piece in pieces]
            assert found == wanted, count
        with cuda.session() as lone:
            lone.feed([*ids, *wanted[: count - 1]])
            alone = list(lone.generate([*ids, *wanted[: count - 1], 7], sampling, generation))
        assert abs(other[0].logprob - alone[0].logprob) < 0.1, "but for the rounding of a prompt in other steps"


def test_many_forks_of_one_prompt_decode_together(cuda: Pipeline) -> None:
    ids = prompt(cuda, 100)
    tokens = ids[:16]
    with cuda.session() as parent:
        parent.feed(ids)
        wanted = []
        for token in tokens:
            with parent.fork() as lone:
                wanted.append(lone.feed([token])[0])
        forks = [parent.fork() for _ in tokens]
        runtime = cuda.runtime
        assert isinstance(runtime, CudaRuntime)
        assert runtime.pool.pages - runtime.free_pages == 2, "they take nothing before they write"
        parts = [StepPart(sequence=fork.sequence, token_ids=[token]) for fork, token in zip(forks, tokens, strict=True)]
        for found, rows in zip(cuda.runtime.step(parts), wanted, strict=True):
            assert error(found, rows) < ROUNDED
        for fork in forks:
            fork.close()


# equal beginnings ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_a_prefix_that_was_known_gives_what_computing_it_gives(family: str, model: Callable[[str], Path]) -> None:
    with opened(model(family)) as cuda:
        ids = prompt(cuda, 300)
        wanted = cuda.logits(ids)
        runtime = cuda.runtime
        assert isinstance(runtime, CudaRuntime)
        for length in (65, 128, 129, 300):
            sequence = runtime.new_sequence()
            assert isinstance(sequence, CudaSequence)
            with Session(cuda, sequence) as session:
                known = session.rewind_to(ids[:length])
                assert known == (length - 1) // PAGE_TOKENS * PAGE_TOKENS
                found = session.feed(ids[known:length], logits="all")
                assert error(found, wanted[known:length]) < EXACT
        assert pages_in_use(cuda) == 0


def test_prompts_that_begin_alike_are_computed_once_and_answered_as_alone(model: Callable[[str], Path]) -> None:
    options: dict[str, Any] = {"max_tokens": 20, "stop_at_eos": False}
    with opened(model("llama"), prefix_cache=False) as plain, opened(model("llama")) as cuda:
        shared = prompt(cuda, 200)
        prompts = [[*shared, number, 3] for number in range(10, 18)]
        wanted = [[piece.id for piece in plain.generate(ids, **options)] for ids in prompts]
        steps: list[int] = []

        def count(event: Event) -> None:
            if isinstance(event, StepDone):
                steps.append(event.tokens)

        cuda.registry.observers.append(count)
        results = cuda.complete_many(prompts, **options)
        assert [result.token_ids for result in results] == wanted
        assert steps[:2] == [202, 7 * 10 + 1], "the first one's prompt, then the rest of the others'"
        assert sum(steps) == 192 + 8 * 10 + 8 * 19
        assert pages_in_use(cuda) == 0
        again = cuda.complete_many(prompts, **options)
        assert [result.token_ids for result in again] == wanted


def test_as_many_sequences_as_there_are_hold_more_than_a_context_together(cuda: Pipeline) -> None:
    """32 of 512 tokens and more, where one may have 2048."""
    ids = prompt(cuda, 520)
    prompts = [[number, *ids] for number in range(MAX_SEQUENCES)]
    results = cuda.complete_many(prompts, max_tokens=8, stop_at_eos=False)
    assert [len(result.pieces) for result in results] == [8] * MAX_SEQUENCES
    for number in (0, 31):
        alone = next(iter(cuda.generate(prompts[number], max_tokens=1)))
        assert abs(alone.logprob - results[number].pieces[0].logprob) < 0.1


# its size ------------------------------------------------------------------------------------------------------------


def test_the_pool_takes_the_memory_that_fit_said(model: Callable[[str], Path]) -> None:
    with opened(model("llama"), kv_tokens=100_000) as cuda:
        runtime = cuda.runtime
        assert isinstance(runtime, CudaRuntime)
        assert runtime.pool.pages == page_count(100_000)
        assert cuda.fit.kv_bytes > 50 << 20
        assert runtime.device.allocated_bytes + CODE_BYTES == pytest.approx(cuda.fit.total_bytes, rel=1e-2)


def test_more_than_the_cache_holds_is_refused_and_the_others_go_on(model: Callable[[str], Path]) -> None:
    with opened(model("llama"), kv_tokens=CONTEXT) as cuda:
        ids = prompt(cuda, 2000)
        with cuda.session() as first, cuda.session() as second:
            first.feed(ids[:1900])
            with pytest.raises(InputError, match=r"4 more pages of KV cache are needed, 2 are free"):
                second.feed(ids[:200])
            assert second.sequence.length == 0
            first.feed(ids[1900:])
        assert pages_in_use(cuda) == 0
