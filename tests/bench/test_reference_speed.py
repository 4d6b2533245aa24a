"""Speed of the reference executor on SmolLM2. Run with `pytest tests/bench --benchmark-enable`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TypeVar

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

import mortice
from tests.support.models import smollm2_path

PROMPT = list(range(100, 612))
DECODE_TOKENS = 32

T = TypeVar("T")


@pytest.fixture(scope="module")
def pipeline() -> Iterator[mortice.Pipeline]:
    with mortice.load(smollm2_path(), executor="reference") as loaded:
        loaded.logits(PROMPT[:8])
        yield loaded


def timed(benchmark: BenchmarkFixture, work: Callable[[], T]) -> T:
    result: T = benchmark.pedantic(work, rounds=3, warmup_rounds=1)  # type: ignore[no-untyped-call]
    return result


def test_load_and_close(benchmark: BenchmarkFixture) -> None:
    def load() -> int:
        with mortice.load(smollm2_path(), executor="reference") as loaded:
            return loaded.plan.arena_bytes

    benchmark.extra_info["weights_mb"] = round(timed(benchmark, load) / 1e6)


def test_prefill(benchmark: BenchmarkFixture, pipeline: mortice.Pipeline) -> None:
    def prefill() -> None:
        with pipeline.session() as session:
            session.feed(PROMPT)

    timed(benchmark, prefill)
    if benchmark.stats:
        benchmark.extra_info["tokens_per_second"] = round(len(PROMPT) / benchmark.stats["min"], 1)


@pytest.mark.parametrize("context", [0, 512])
def test_decode(benchmark: BenchmarkFixture, pipeline: mortice.Pipeline, context: int) -> None:
    def decode() -> None:
        for token in PROMPT[:DECODE_TOKENS]:
            session.feed([token])

    with pipeline.session() as session:
        if context:
            session.feed(PROMPT[:context])
        timed(benchmark, decode)
    if benchmark.stats:
        benchmark.extra_info["tokens_per_second"] = round(DECODE_TOKENS / benchmark.stats["min"], 1)
