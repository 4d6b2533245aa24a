"""Checks of the hooks that a run calls on every plugin that has them: what fails there fails every run.

::

    class TestMyRules(FindingsSuite):
        plugin = my_package.plugin
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from mortice.arch_contracts.schema import Contract, builtin_contracts
from mortice.core.config import ExecutorConfig, ModelConfig, RunConfig
from mortice.core.errors import MorticeError
from mortice.core.model.types import ModelFile
from mortice.core.pipeline import prepare
from mortice.core.plugin.conformance import describe, finding_faults, kernel_faults
from mortice.core.plugin.events import Event, GraphCaptured, WaysMeasured
from mortice.core.plugin.manager import PluginManager, PluginPolicy
from mortice.core.stages import open_file
from mortice.core.testing.events import EventRecorder
from mortice.core.testing.registries import registry_with
from mortice.core.testing.suite import Suite, fail
from mortice.core.testing.tiny_models import write_tiny_model

__all__ = ["FindingsSuite", "KernelsSuite", "ObserverSuite"]

_OF_A_GPU = (  # by hand: the run that is made here is one on the CPU
    GraphCaptured(plugin="executors-cuda", nodes=300, seconds=0.1),
    WaysMeasured(plugin="executors-cuda", choices={"decode": "rows"}, kept="", seconds=0.5),
)


class _HookSuite(Suite):
    """A suite that calls a hook of a plugin as a run does.

    Attributes:
        plugin: the module or object that the entry point names.
        name: what messages call it.

    """

    plugin: object
    name: str = "tested"

    def manager(self) -> PluginManager:
        """The built-ins and the plugin."""
        given = [(self.name, self.plugin)]
        return self.once("manager", lambda: PluginManager.create(PluginPolicy(entry_points=False), given))


class ObserverSuite(_HookSuite):
    """Holds ``mortice_on_event`` against the events there are; what it raises ends the run."""

    def test_it_takes_every_event_of_a_run(self, tmp_path: Path) -> None:
        """Those of a tiny model that is opened, validated and run, and those that only a GPU's executor tells."""
        for event in (*_events_of_a_run(tmp_path), *_OF_A_GPU):
            try:
                for _ in self.manager().call("mortice_on_event", only=self.name, event=event):
                    pass
            except MorticeError as error:
                fail(f"{type(event).__name__}: {describe(error)}")


class FindingsSuite(_HookSuite):
    """Holds ``mortice_validate`` against models of every family; what it raises keeps all models from being run.

    Attributes:
        contracts: architecture contracts beside the built-in ones.

    """

    contracts: Sequence[Contract] = ()

    def test_it_gives_findings_for_models_of_every_family(self, tmp_path: Path) -> None:
        """Tiny models, each opened by the loader and held against its contract."""
        registry = registry_with(contracts=self.contracts)
        for contract in (*builtin_contracts(), *self.contracts):
            path = write_tiny_model(tmp_path / f"{len(list(tmp_path.iterdir()))}.gguf", contract)
            with open_file(registry, path) as file:
                self._call(file, contract)

    def test_it_gives_findings_for_a_file_that_has_next_to_nothing(self, tmp_path: Path) -> None:
        """It is asked before anybody knows that the file fits: keys and tensors may be missing."""
        for contract in (*builtin_contracts(), *self.contracts):
            keys = {"general.architecture": contract.architectures[0]}
            path = tmp_path / "model.gguf"
            self._call(
                ModelFile(path=path, format="GGUF", version="3", metadata=keys, tensors={}, files=(path,)), contract
            )

    def _call(self, file: ModelFile, contract: Contract) -> None:
        given = self.manager().gather("mortice_validate", finding_faults, only=self.name, model=file, contract=contract)
        try:
            list(given)
        except MorticeError as error:
            fail(f"a {contract.name} model: {describe(error)}")


class KernelsSuite(_HookSuite):
    """Holds ``mortice_kernels`` against the device that every machine has; what it raises ends every run."""

    def test_it_gives_kernels_for_a_cpu(self) -> None:
        """None, or each one that names an operator and a layout."""
        device = registry_with().executor("reference").device()
        list(self.manager().gather("mortice_kernels", kernel_faults, only=self.name, device=device))


def _events_of_a_run(folder: Path) -> Iterator[Event]:
    """What observers are told of a tiny model on the reference executor: a prompt, and two tokens after it."""
    contract = next(contract for contract in builtin_contracts() if contract.name == "llama")
    path = write_tiny_model(folder / "model.gguf", contract)
    registry, told = registry_with(), EventRecorder()
    registry.observers.append(told)
    config = RunConfig(model=ModelConfig(path=path), executor=ExecutorConfig(name="reference"))
    with prepare(config, registry) as pipeline:
        list(pipeline.generate([1, 2, 3], max_tokens=2))
    return iter(told)
