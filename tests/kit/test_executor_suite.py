"""The executor suite: the reference executor passes, and executors that are wrong in one place are found out."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from mortice.core.errors import DeviceError
from mortice.core.model.types import DeviceInfo
from mortice.core.plugin.interfaces import StepPart
from mortice.core.testing.executor_suite import ExecutorSuite
from mortice.core.testing.fake_device import fake_device_info
from mortice.core.testing.operator_cases import OperatorCase
from mortice.core.testing.suite import outcomes
from mortice.core.text.sampling import Sampler
from mortice.plugins.executors.cuda.device.properties import list_devices
from mortice.plugins.executors.cuda.executor import CudaExecutor
from mortice.plugins.executors.reference import ops
from mortice.plugins.executors.reference.executor import ReferenceExecutor
from mortice.plugins.executors.reference.runtime import ReferenceRuntime
from mortice.plugins.uploads.host import HostUpload
from tests.kit.running import failures

CASE = "every operator equals the reference"


def test_the_reference_executor_passes() -> None:
    found = list(outcomes(ExecutorSuite.of(executor=ReferenceExecutor("mine"))))
    left_out = [outcome.message for outcome in found if outcome.status == "skipped"]
    assert left_out == ["the host chooses its tokens (ChoosesTokens)"]
    assert {outcome.status for outcome in found} == {"passed", "skipped"}


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


def test_an_upload_strategy_that_the_suite_does_not_know_is_asked_for() -> None:
    class Own(ReferenceExecutor):
        def default_upload(self) -> str:
            return "own"

    check = "its own upload strategy exists"
    told = "no strategy 'own'; one of the same plugin has to stand in the suite's `uploads`"
    assert failures(ExecutorSuite.of(executor=Own("mine")), check) == {check: told}
    assert failures(ExecutorSuite.of(executor=Own("mine"), uploads=[HostUpload("own")]), check) == {}


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


SHARED = "sequences that share tokens do not see each other"


def test_a_page_that_is_not_copied_is_reported() -> None:
    class CopiesNothing(ReferenceRuntime):
        def new_sequence(self) -> Any:
            sequence = super().new_sequence()
            sequence.copy_page = lambda source, destination: None
            return sequence

    failed = failures(ExecutorSuite.of(executor=wrong(CopiesNothing)), SHARED)[SHARED]
    # what a page holds that nobody wrote is anything, at times no number
    assert "a parent whose fork went on" in failed or "the logits hold NaN or infinity" in failed


def test_a_prefix_of_other_tokens_is_reported() -> None:
    class FirstPage(ReferenceRuntime):
        def adopt_prefix(self, sequence: Any, token_ids: Any) -> int:
            found = super().adopt_prefix(sequence, token_ids)
            sequence.pages[0] = 0 if sequence.pages[0] else 1
            return found

    failed = failures(ExecutorSuite.of(executor=wrong(FirstPage)), SHARED)
    assert "a prompt of which 64 tokens were known" in failed[SHARED]


CHOSEN = "tokens it chooses are those of the sampler"


class Chooses(ReferenceRuntime):
    """Chooses tokens with the host's sampler."""

    def token_choice(self, sequence: Any, sampling: Any, _: Any) -> Any:
        return SimpleNamespace(sequence=sequence, sampling=sampling)

    def choose_step(self, parts: Any, *, ahead: bool) -> Any:
        logits = self.step([StepPart(sequence=part.sequence, token_ids=part.token_ids) for part in parts])
        return [self.sampler(part).sample(row, part.index) for part, row in zip(parts, logits, strict=True)]

    def sampler(self, part: Any) -> Sampler:
        sampler = Sampler(part.choice.sampling, 512)
        sampler.accept(part.sequence.tokens)
        return sampler


def test_a_runtime_that_chooses_tokens_passes() -> None:
    found = list(outcomes(ExecutorSuite.of(executor=wrong(Chooses)), CHOSEN))
    assert [(outcome.status, outcome.message) for outcome in found] == [("passed", "")]


def test_tokens_chosen_without_what_came_before_are_reported() -> None:
    class Forgetful(Chooses):
        def sampler(self, part: Any) -> Sampler:
            sampler = Sampler(part.choice.sampling, 512)
            sampler.accept(part.sequence.tokens[-2:])  # penalties see too little
            return sampler

    assert "frequency_penalty=15.0" in failures(ExecutorSuite.of(executor=wrong(Forgetful)), CHOSEN)[CHOSEN]


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
