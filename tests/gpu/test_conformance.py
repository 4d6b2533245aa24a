"""The executor suite on a card: every operator against the reference executor, and what callers rely on."""

from __future__ import annotations

import pytest

from mortice.core.testing.executor_suite import ExecutorSuite
from mortice.plugins.executors.cuda.executor import CudaExecutor
from tests.support.cuda import needs_gpu, needs_nvrtc

pytestmark = [pytest.mark.gpu, needs_gpu, needs_nvrtc]


class TestCuda(ExecutorSuite):
    executor = CudaExecutor()
