"""Ways to multiply, timed on a card."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
from numpy.typing import NDArray

from mortice.core.config import ExecutorConfig, RunConfig
from mortice.core.pipeline import Pipeline, prepare_opened
from mortice.core.plugin.events import Event, WaysMeasured
from mortice.core.record import Environment
from mortice.core.synth.model import synth_model
from mortice.plugins.executors.cuda.lowering.crossovers import GEMM_CANDIDATES, RING_CANDIDATES, RowCrossovers
from mortice.plugins.executors.cuda.run import tuned
from mortice.plugins.executors.cuda.run.runtime import CudaRuntime
from mortice.plugins.executors.cuda.run.tuned import TunedFile
from tests.gpu.test_executor import ROUNDED, error, prompt
from tests.support.cuda import needs_gpu
from tests.support.registry import make_registry

pytestmark = [pytest.mark.gpu, needs_gpu]


@pytest.fixture(autouse=True)
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """An empty folder for what is measured; compiled kernels stay where they are."""
    monkeypatch.setattr(tuned, "cache_folder", lambda: tmp_path)
    return tmp_path / "tuning"


def opened(events: list[Event], tuning: Literal["auto", "cached", "off"] = "auto") -> Pipeline:
    """A model of 144 MB, resident."""
    registry = make_registry()
    registry.observers.append(lambda event: events.append(event) if isinstance(event, WaysMeasured) else None)
    config = RunConfig(executor=ExecutorConfig(name="cuda", context=1024, prefix_cache=False, tuning=tuning))
    pipeline = prepare_opened(config, registry, synth_model("SmolLM2-135M", "Q8_0"))
    pipeline.preload()
    return pipeline


def crossovers(pipeline: Pipeline) -> RowCrossovers:
    runtime = pipeline.runtime
    assert isinstance(runtime, CudaRuntime)
    return runtime.lowering.crossovers


def test_the_first_start_measures_and_the_second_reads_what_it_kept(cache: Path) -> None:
    events: list[Event] = []
    with opened(events) as first:
        chosen, told = crossovers(first), Environment.of(first)
        assert first.runtime.device.allocated_bytes < first.fit.total_bytes  # type: ignore[attr-defined]
    (event,) = events
    assert isinstance(event, WaysMeasured)
    assert chosen.ring_rows in RING_CANDIDATES
    assert chosen.gemm_from_rows in GEMM_CANDIDATES
    document = json.loads(Path(event.kept).read_text())
    assert Path(event.kept).parent == cache
    assert document["crossovers"] == {"ring_rows": chosen.ring_rows, "gemm_from_rows": chosen.gemm_from_rows}
    assert all(0 < seconds < 1 for timing in document["timings"] for seconds in timing["seconds"].values())
    assert told.executor.items() >= event.choices.items()

    with opened(events) as second:
        assert crossovers(second) == chosen
        assert list(told.changes(Environment.of(second))) == []
    assert events == [event], "nothing is measured a second time"


@pytest.mark.parametrize("way", [RowCrossovers(ring_rows=0, gemm_from_rows=33), RowCrossovers(gemm_from_rows=257)])
def test_whatever_was_chosen_logits_are_the_same_but_for_rounding(
    way: RowCrossovers, monkeypatch: pytest.MonkeyPatch
) -> None:
    lengths = [5, 12, 40, 70, 140, 200, 300]

    def logits(pipeline: Pipeline) -> list[NDArray[np.float32]]:
        return [pipeline.logits(prompt(pipeline, length)) for length in lengths]

    with opened([], "off") as built_in:
        wanted = logits(built_in)
    monkeypatch.setattr(TunedFile, "read", lambda _: way)
    with opened([], "cached") as other:
        assert crossovers(other) == way
        found = logits(other)
    for length, ours, theirs in zip(lengths, found, wanted, strict=True):
        assert error(ours, theirs) < ROUNDED, length


def test_another_choice_is_named_where_a_run_is_repeated(monkeypatch: pytest.MonkeyPatch) -> None:
    with opened([], "off") as before:
        told = Environment.of(before)
    monkeypatch.setattr(TunedFile, "read", lambda _: RowCrossovers(gemm_from_rows=33))
    with opened([], "cached") as now:
        changes: list[Any] = list(told.changes(Environment.of(now)))
    assert "products by cuBLAS: recorded with from 129 rows, now from 33 rows" in changes
