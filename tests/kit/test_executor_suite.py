"""The executor suite: the reference executor passes, and executors that are wrong in one place are found out."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from mortice.core.errors import DeviceError
from mortice.core.model.types import DeviceInfo
from mortice.core.testing.executor_suite import ExecutorSuite
from mortice.core.testing.fake_device import fake_device_info
from mortice.core.testing.operator_cases import OperatorCase
from mortice.core.testing.suite import outcomes
from mortice.plugins.executors.cuda.executor import CudaExecutor
from mortice.plugins.executors.cuda.properties import list_devices
from mortice.plugins.executors.reference import ops
from mortice.plugins.executors.reference.executor import ReferenceExecutor
from mortice.plugins.executors.reference.runtime import ReferenceRuntime
from tests.kit.running import failures, run

CASE = "every operator equals the reference"


def test_the_reference_executor_passes() -> None:
    failed, counts = run(ExecutorSuite.of(executor=ReferenceExecutor("mine")))
    assert failed == {}
    assert set(counts) == {"passed"}


def test_an_executor_without_its_device_is_skipped_with_the_reason() -> None:
    try:
        list_devices()
        pytest.skip("a GPU is there")
    except DeviceError as error:
        reason = str(error)
    found = list(outcomes(ExecutorSuite.of(executor=CudaExecutor()), CASE))
    assert {outcome.status for outcome in found} == {"skipped"}
    assert {outcome.message for outcome in found} == {reason}


@pytest.mark.parametrize(
    "check", ["it is what the core", "its kernels are", "its own upload strategy", "what it does not know"]
)
def test_the_cuda_executor_passes_what_needs_no_card(check: str) -> None:
    class Cardless(CudaExecutor):
        def device(self) -> DeviceInfo:
            return fake_device_info()

    found = list(outcomes(ExecutorSuite.of(executor=Cardless()), check))
    assert [(outcome.status, outcome.message) for outcome in found] == [("passed", "")]


class LlamaOnly(ExecutorSuite):
    """The suite with one model, to be quick."""

    def cases(self) -> list[OperatorCase]:
        return [case for case in super().cases() if case.label == "llama"]


class Wrong(ReferenceExecutor):
    """A reference executor whose runtime is another."""

    runtime: type[ReferenceRuntime] = ReferenceRuntime

    def open(self, model: Any, settings: Any, emit: Any) -> ReferenceRuntime:
        return self.runtime(model, settings, emit)


def wrong(runtime: type[ReferenceRuntime]) -> Wrong:
    made = type("WrongExecutor", (Wrong,), {"runtime": runtime})("mine")
    assert isinstance(made, Wrong)
    return made


def test_a_step_that_forgets_the_cache_is_reported() -> None:
    class Forgets(ReferenceRuntime):
        def step(self, parts: Any) -> Any:
            logits = super().step(parts)
            for part in parts:
                if len(part.token_ids) == 1 and part.sequence.length > 3:
                    part.sequence.truncate(part.sequence.length - 1)
            return logits

    assert f"{CASE} [llama]" in failures(LlamaOnly.of(executor=wrong(Forgets)), CASE)


def test_tokens_that_are_not_checked_are_reported() -> None:
    class Trusts(ReferenceRuntime):
        def step(self, parts: Any) -> Any:
            for part in parts:
                object.__setattr__(part, "token_ids", [abs(token) % 512 for token in part.token_ids])
            return super().step(parts)

    found = failures(ExecutorSuite.of(executor=wrong(Trusts)), "wrong tokens are refused")
    assert "token -1 was accepted" in found["wrong tokens are refused before any work"]


def test_logits_in_another_order_are_reported() -> None:
    class Reversed(ReferenceRuntime):
        def step(self, parts: Any) -> Any:
            return super().step(parts)[::-1]

    assert f"{CASE} [llama]" in failures(LlamaOnly.of(executor=wrong(Reversed)), CASE)


def test_settings_that_are_passed_over_are_reported() -> None:
    executor = type("Obliging", (ReferenceExecutor,), {"unsupported": lambda self, program, settings: []})("mine")
    found = failures(ExecutorSuite.of(executor=executor), "what it does not know")
    assert list(found) == ["what it does not know is refused"]


@pytest.mark.parametrize(
    ("function", "change", "operator"),
    [
        ("rotate", lambda real: lambda *args, **more: real(*args, **more) * np.float32(1.001), "layers.0.rope_q (rope"),
        ("activate", lambda real: lambda *args, **more: args[0], "layers.0.ffn_act (gated_act"),
    ],
    ids=["rope", "activation"],
)
def test_a_wrong_operator_is_named(
    function: str, change: Callable[[Any], Any], operator: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = getattr(ops, function)
    inside: list[bool] = []

    class Changed(ReferenceRuntime):
        def step(self, parts: Any) -> Any:
            inside.append(True)
            try:
                return super().step(parts)
            finally:
                inside.pop()

        def trace(self, parts: Any, see: Any) -> Any:
            inside.append(True)
            try:
                return super().trace(parts, see)
            finally:
                inside.pop()

    def sometimes(*args: Any, **more: Any) -> Any:
        return change(real)(*args, **more) if inside else real(*args, **more)

    monkeypatch.setattr(ops, function, sometimes)
    message = failures(LlamaOnly.of(executor=wrong(Changed)), CASE)[f"{CASE} [llama]"]
    assert message.startswith(f"first wrong operator: {operator}")
