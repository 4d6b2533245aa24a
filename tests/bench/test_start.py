"""How long a new process takes to have a model ready. The goals on an H100: 10 s without kernels, 0.5 s with them.

The upload, which `test_upload.py` measures, is not counted.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from tests.support.cuda import needs_gpu, needs_nvrtc

pytestmark = [pytest.mark.gpu, needs_gpu, needs_nvrtc]

OPEN = """
import sys, time
from pathlib import Path
from mortice.core.config import ExecutorConfig, ModelConfig, RunConfig
from mortice.core.pipeline import prepare

config = RunConfig(model=ModelConfig(path=Path(sys.argv[1])), executor=ExecutorConfig(name="cuda", context=4096))
started = time.perf_counter()
with prepare(config) as pipeline:
    pipeline.preload()
    print(time.perf_counter() - started - pipeline.upload_seconds)
"""


def seconds(model: Path, cache: Path) -> float:
    """What a process that has imported mortice needs, the plugins included."""
    environment = {**os.environ, "MORTICE_CACHE": str(cache)}
    command = [sys.executable, "-c", OPEN, str(model)]
    return float(subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout)


@pytest.mark.parametrize("kernels", ["compiled", "kept"])
def test_a_new_process_has_a_model_ready(
    benchmark: BenchmarkFixture, kernels: str, model: Path, tmp_path: Path
) -> None:
    caches = [tmp_path / "kept"] * 3 if kernels == "kept" else [tmp_path / str(number) for number in range(3)]
    if kernels == "kept":
        seconds(model, caches[0])
    found: list[float] = []
    left = iter(caches)
    benchmark.pedantic(lambda: found.append(seconds(model, next(left))), rounds=3)  # type: ignore[no-untyped-call]
    assert min(found) > 0
    benchmark.extra_info["seconds_without_imports_and_upload"] = [round(each, 3) for each in found]
