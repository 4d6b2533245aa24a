"""How fast a card multiplies with weights of each type. The goal: 75 % of its read bandwidth for gate and up of 8B.

`mortice bench --products` prints the same as a table.
"""

from __future__ import annotations

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from mortice.core.bench.products import ProductReport, bench_products, models_of_shape
from mortice.core.config import ExecutorConfig, RunConfig
from mortice.plugins.executors.cuda.executor import CudaExecutor
from tests.support.cuda import needs_gpu, needs_nvrtc
from tests.support.tiny import QTYPES, REGISTRY

pytestmark = [pytest.mark.gpu, needs_gpu, needs_nvrtc]

CONFIG = RunConfig(executor=ExecutorConfig(name="cuda", context=64, step_tokens=1))
TYPES = sorted(name for name, type_ in QTYPES.items() if type_.traits is not None)
REPEATS = 10


@pytest.mark.parametrize("name", TYPES)
def test_products_of_one_row(benchmark: BenchmarkFixture, name: str) -> None:
    executor = REGISTRY.executor("cuda")
    assert isinstance(executor, CudaExecutor)

    def measured() -> ProductReport:
        models = models_of_shape(CONFIG, REGISTRY, executor, "Llama-3.1-8B", [name])
        return bench_products(models, executor, (1,), REPEATS, lambda note: None)

    report = benchmark.pedantic(measured, rounds=1)  # type: ignore[no-untyped-call]
    assert [row.product for row in report.rows] == [
        "attn_q+attn_k+attn_v",
        "attn_output",
        "ffn_gate+ffn_up",
        "ffn_down",
        "output",
    ]
    for row in report.rows:
        assert row.bandwidth_share is not None
        assert 0 < row.bandwidth_share < 1.1, "more than the card can read: weights came from a cache"
        benchmark.extra_info[row.product] = f"{1e6 * row.median:.1f} us, {100 * row.bandwidth_share:.0f} % of read"
