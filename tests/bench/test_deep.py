"""How fast tensor data are checked: gigabytes a second for a file in the page cache."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from mortice.core.model.types import ModelFile
from mortice.core.plugin.registry import make_registry
from mortice.core.synth.model import synth_model, write_model
from mortice.core.validation.deep import data_findings

REGISTRY = make_registry()


@pytest.fixture(scope="module", params=["Q4_0", "Q4_K_M", "Q8_0", "F16"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ModelFile]:
    """One layer of a published shape with random weights."""
    path = tmp_path_factory.mktemp("deep") / "model.gguf"
    write_model(synth_model("Qwen3-0.6B", request.param, layers=1), path)
    with REGISTRY.open_model(path) as file:
        yield file


def test_checking_tensor_data(model: ModelFile, benchmark: BenchmarkFixture) -> None:
    found = benchmark(data_findings, model, REGISTRY)
    assert found == []
    if benchmark.stats is not None:  # None where benchmarks are switched off
        benchmark.extra_info["gigabytes_per_second"] = model.tensor_bytes / benchmark.stats.stats.min / 1e9
