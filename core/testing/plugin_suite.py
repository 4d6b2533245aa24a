"""Checks of a whole plugin, and which suites apply to what it gives."""

from __future__ import annotations

import inspect
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mortice.core.plugin.hookspecs import CONTRACT_VERSION
from mortice.core.plugin.registry import Registry
from mortice.core.testing.contract_suite import ContractSuite
from mortice.core.testing.executor_suite import ExecutorSuite
from mortice.core.testing.hook_suite import FindingsSuite, KernelsSuite, ObserverSuite
from mortice.core.testing.loader_suite import LoaderSuite
from mortice.core.testing.qtype_suite import QTypeSuite
from mortice.core.testing.suite import Suite, require, skip
from mortice.core.testing.upload_suite import UploadSuite

__all__ = ["PluginSuite", "suites_of"]

_GPU_PACKAGES = ("cuda", "cupy", "pycuda", "pynvml", "torch", "triton")


class PluginSuite(Suite):
    """Holds a plugin against what is expected of all of them.

    Attributes:
        plugin: the module or object that the entry point names.
        builtin: whether it comes with mortice, and so is of its version.

    """

    plugin: object
    builtin: bool = False

    def test_it_says_which_hooks_it_was_written_for(self) -> None:
        """``mortice_contract_version`` lets a later mortice refuse it with a clear word."""
        if self.builtin:
            skip("a built-in plugin is of mortice's own version")
        version = getattr(self.plugin, "mortice_contract_version", None)
        wanted = f"wanted mortice_contract_version = {CONTRACT_VERSION}"
        require(version == CONTRACT_VERSION, f"mortice_contract_version is {version!r}, {wanted}")

    def test_importing_it_loads_no_gpu_package(self) -> None:
        """Every command imports every plugin; a GPU is touched where one is needed."""
        module = self.plugin if inspect.ismodule(self.plugin) else inspect.getmodule(type(self.plugin))
        name = getattr(module, "__name__", "")
        if not name or name == "__main__":
            skip("the plugin is no module that could be imported")
        before = "sys.path[:] = " + repr(sys.path)
        code = f"import sys; {before}; import {name}; print(*sys.modules)"
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)  # noqa: S603 (no shell)
        require(done.returncode == 0, f"import {name}: {done.stderr.strip().splitlines()[-1:]}")
        loaded = {module.partition(".")[0] for module in done.stdout.split()}
        wrong = sorted(loaded.intersection(_GPU_PACKAGES))
        require(not wrong, f"import {name} imports {', '.join(wrong)}; do that where the device is needed")


def suites_of(registry: Registry, name: str, sample: Path | None = None) -> Iterator[tuple[str, Suite]]:
    """The suites that apply to a plugin, each with what it is about.

    Args:
        registry: has the plugin, active.
        name: of the plugin.
        sample: a good file of its format, for a loader.

    """
    manager = registry.manager
    plugin = manager.plugin(name)

    def given(hook: str) -> list[Any]:
        return [thing for _, things in manager.call(hook, only=name) for thing in things or ()]

    yield "plugin", PluginSuite.of(plugin=plugin, builtin=manager.records[name].source == "builtin")
    contracts = given("mortice_arch_contracts")
    for contract in contracts:
        yield f"contract {contract.name}", ContractSuite.of(contract=contract)
    qtypes = given("mortice_qtypes")
    for type_ in qtypes:
        yield f"qtype {type_.qtype.name}", QTypeSuite.of(type=type_)
    uploads = given("mortice_upload_strategies")
    for strategy in uploads:
        yield f"upload {strategy.name}", UploadSuite.of(strategy=strategy)
    for executor in given("mortice_executors"):
        yield f"executor {executor.name}", ExecutorSuite.of(executor=executor, uploads=uploads)
    if manager.has(name, "mortice_open_model"):
        yield f"loader {name}", LoaderSuite.of(plugin=plugin, sample_path=sample, qtypes=qtypes)
    if manager.has(name, "mortice_validate"):
        yield "hook mortice_validate", FindingsSuite.of(plugin=plugin, name=name, contracts=contracts)
    if manager.has(name, "mortice_kernels"):
        yield "hook mortice_kernels", KernelsSuite.of(plugin=plugin, name=name)
    if manager.has(name, "mortice_on_event"):
        yield "hook mortice_on_event", ObserverSuite.of(plugin=plugin, name=name)
