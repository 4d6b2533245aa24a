"""How fast weights reach a card from a file in the page cache. The goal on an H100: 40 GB/s by the default way."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from mortice.core.config import ExecutorConfig, ModelConfig, RunConfig, UploadConfig
from mortice.core.errors import UnsupportedError
from mortice.core.model.residency import ResidentWeights
from mortice.core.pipeline import Pipeline, prepare
from mortice.core.plugin.interfaces import Prepares
from mortice.plugins.uploads.device import mortice_upload_strategies
from tests.support.cuda import needs_gpu, needs_nvrtc

pytestmark = [pytest.mark.gpu, needs_gpu, needs_nvrtc]


def once(pipeline: Pipeline, resident: ResidentWeights) -> int:
    return pipeline.upload.upload(resident, lambda event: None)


@pytest.mark.parametrize("name", [strategy.name for strategy in mortice_upload_strategies()])
def test_upload_of_a_file_in_the_page_cache(benchmark: BenchmarkFixture, name: str, model: Path) -> None:
    config = RunConfig(
        model=ModelConfig(path=model),
        executor=ExecutorConfig(name="cuda", context=512),
        upload=UploadConfig(strategy=name),
    )
    with ExitStack() as stack:

        def fresh() -> tuple[tuple[Pipeline, ResidentWeights], dict[str, object]]:
            """What a new process has when an upload begins: the file newly mapped, kernels and pinned memory ready."""
            stack.close()
            pipeline = stack.enter_context(prepare(config))
            assert isinstance(pipeline.executor, Prepares)
            pipeline.executor.prepare(pipeline.plan, pipeline.settings)
            arena = pipeline.executor.allocate(pipeline.plan.arena_bytes)
            stack.callback(arena.close)
            return (pipeline, ResidentWeights(plan=pipeline.plan, arena=arena)), {}

        (pipeline, _), _ = fresh()
        expected, file_bytes = sum(planned.nbytes for planned in pipeline.plan.weights), pipeline.plan.file_bytes
        try:  # the first round compiles
            moved = benchmark.pedantic(once, setup=fresh, rounds=5, warmup_rounds=1)  # type: ignore[no-untyped-call]
        except UnsupportedError as refusal:
            pytest.skip(str(refusal))
        assert moved == expected
        assert benchmark.stats is not None
        rate = file_bytes / benchmark.stats.stats.median / 1e9
        benchmark.extra_info["GB/s"] = round(rate, 1)
        print(f"{name}: {rate:.1f} GB/s")
