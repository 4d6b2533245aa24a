"""Every suite of a hook passes a right one, and fails the wrong ones for the reason."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from mortice.arch_contracts.schema import builtin_contracts
from mortice.core.model.findings import Finding
from mortice.core.model.types import ModelFile
from mortice.core.plugin.events import Event, GraphCaptured, ModelOpened, StepDone, UploadProgress, WaysMeasured
from mortice.core.testing.hook_suite import FindingsSuite, KernelsSuite, ObserverSuite
from tests.kit.running import run
from tests.support.registry import kernel, plugin_of


def test_an_observer_is_told_every_kind_of_event_there_is() -> None:
    told: list[Event] = []
    failed, counts = run(ObserverSuite.of(plugin=plugin_of(mortice_on_event=lambda event: told.append(event))))
    assert not failed
    assert counts["passed"] == 1
    assert {type(event) for event in told} == set(Event.__subclasses__())


@pytest.mark.parametrize("kind", [ModelOpened, UploadProgress, StepDone, GraphCaptured, WaysMeasured])
def test_an_observer_that_fails_for_an_event_is_told_which(kind: type[Event]) -> None:
    def observe(event: Event) -> None:
        if isinstance(event, kind):
            raise OSError("metrics server is gone")

    failed, _ = run(ObserverSuite.of(plugin=plugin_of(mortice_on_event=observe), name="acme"))
    message = f"{kind.__name__}: plugin acme (given): mortice_on_event: OSError: metrics server is gone"
    assert failed == {"it takes every event of a run": message}


def test_findings_of_every_family_pass() -> None:
    seen: set[str] = set()

    def validate(model: ModelFile) -> list[Finding]:
        seen.add(model.architecture)
        return [Finding(rule="acme.seen", severity="note", subject="a", found="b", wanted="c")]

    failed, counts = run(FindingsSuite.of(plugin=plugin_of(mortice_validate=validate)))
    assert not failed
    assert counts["passed"] == 2
    assert seen == {contract.architectures[0] for contract in builtin_contracts()}


def raising(model: ModelFile) -> list[Finding]:
    raise RuntimeError("out of anvils")


def only_for_qwen3(model: ModelFile) -> object:
    return "abc" if model.architecture == "qwen3" else []


@pytest.mark.parametrize(
    ("validate", "family", "message"),
    [
        (raising, "", "RuntimeError: out of anvils"),
        (only_for_qwen3, "a qwen3 model: ", "returned str, wanted Iterable[Finding]"),
        (lambda model: [None], "", "gave NoneType, wanted Finding"),
    ],
)
def test_what_gives_no_findings_fails_with_the_family(
    validate: Callable[[ModelFile], object], family: str, message: str
) -> None:
    failed, _ = run(FindingsSuite.of(plugin=plugin_of(mortice_validate=validate), name="acme"))
    assert len(failed) == 2
    for said in failed.values():
        assert said.startswith(family)
        assert said.endswith(f"plugin acme (given): mortice_validate: {message}")


def test_a_hook_that_takes_a_fitting_file_for_granted_fails() -> None:
    def validate(model: ModelFile) -> list[Finding]:
        assert model.tensors["token_embd.weight"].shape
        return []

    failed, _ = run(FindingsSuite.of(plugin=plugin_of(mortice_validate=validate)))
    assert list(failed) == ["it gives findings for a file that has next to nothing"]
    assert "KeyError: 'token_embd.weight'" in failed["it gives findings for a file that has next to nothing"]


def test_kernels_are_asked_for() -> None:
    assert not run(KernelsSuite.of(plugin=plugin_of(mortice_kernels=lambda device: [kernel()])))[0]
    failed, _ = run(KernelsSuite.of(plugin=plugin_of(mortice_kernels=lambda device: [kernel("liniar")])))
    assert "there is no operator 'liniar'" in failed["it gives kernels for a cpu"]
