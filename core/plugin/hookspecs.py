"""Every hook there is. A plugin is a module, an object or a class with some of these, each marked with `hookimpl`.

A package announces its plugin with an entry point in the group ``mortice``::

    [project.entry-points.mortice]
    my-plugin = "my_package.plugin"

Plugins are asked in no promised order. Two that give the same key are a conflict, which the config decides
(``[plugins.prefer]``). Importing a plugin must not touch a GPU or import a CUDA package; do that inside the function
that needs the device. A hook may leave out arguments that it does not use.
"""

# mypy: disable-error-code="empty-body"
# (pluggy reads these functions and calls none of them)

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import pluggy

from mortice.arch_contracts.schema import Contract
from mortice.core.model.findings import Finding
from mortice.core.model.types import DeviceInfo, LoadOptions, ModelFile
from mortice.core.model.weight_plan import Kernel
from mortice.core.plugin.events import Event
from mortice.core.plugin.interfaces import Executor, QuantizationType, UploadStrategy

__all__ = ["CONTRACT_VERSION", "PROJECT", "HookSpecs", "hookimpl"]

PROJECT = "mortice"

CONTRACT_VERSION = 1
"""Version of this file. A plugin may say which it was written for: ``mortice_contract_version = 1``."""

hookspec = pluggy.HookspecMarker(PROJECT)
hookimpl = pluggy.HookimplMarker(PROJECT)
"""Marks a function or method as the implementation of the hook of the same name."""


class HookSpecs:
    """The hooks."""

    @hookspec
    def mortice_open_model(self, path: Path, options: LoadOptions) -> ModelFile | None:
        """Open a model file, or decline.

        Called for each loader, whether or not another has taken the file: two that take it are a conflict. A plugin
        that ``[plugins.prefer]`` names for the file's suffix (``"loader:npz" = "my-plugin"``) is called first, and the
        others only when it declines. Decide from the name or the first bytes, and decline quickly.

        Args:
            path: an existing file or folder.
            options: the tensor types known in this run.

        Returns:
            The model, or None when the format is not this loader's.

        Raises:
            ModelFileError: when the format is this loader's and the file is broken. The run ends with that error, so
                raise it only for files that are surely this loader's.

        Example::

            @hookimpl
            def mortice_open_model(path, options):
                if path.suffix != ".npz":
                    return None
                return open_npz(path, options.qtypes)

        """

    @hookspec
    def mortice_arch_contracts(self) -> Iterable[Contract]:
        """Architecture contracts; the key is each value of ``general.architecture`` a contract serves.

        Called once when the registry is made.

        Returns:
            Contracts, commonly read with `mortice.arch_contracts.schema.parse_contract`.

        Example::

            @hookimpl
            def mortice_arch_contracts():
                text = resources.files("my_package").joinpath("acme.toml").read_text()
                return [parse_contract(text, "acme.toml")]

        """

    @hookspec
    def mortice_qtypes(self) -> Iterable[QuantizationType]:
        """Quantisation types; the key is the type's name.

        Called once when the registry is made.

        Returns:
            Types with a NumPy reference, and a CUDA traits header where there is one. Ids and names that GGML uses mean
            what they mean there; a type of one's own takes an id that no other plugin of the run uses.

        Example::

            @hookimpl
            def mortice_qtypes():
                return [QuantizationType(qtype=QType(200, "TERNARY", 64, 18), dequantize=ternary_to_float32)]

        """

    @hookspec
    def mortice_kernels(self, device: DeviceInfo) -> Iterable[Kernel]:
        """Operator kernels beyond the executor's own.

        Called when weights are planned.

        Args:
            device: where they would run.

        Returns:
            Kernels, for an executor that can read their layouts. One for an operator and weight type that the executor
            serves itself is used only when ``[plugins.prefer]`` names the plugin
            (``"kernel:linear:Q4_K" = "my-plugin"``).

        Example::

            @hookimpl
            def mortice_kernels(device):
                if device.kind != "cuda":
                    return []
                return [Kernel(operator="linear", qtype="TERNARY", layout=TernaryPlanes())]

        """

    @hookspec
    def mortice_upload_strategies(self) -> Iterable[UploadStrategy]:
        """Ways to make weights resident; the key is the strategy's name.

        Called once when the registry is made.

        Returns:
            Strategies, objects like `UploadStrategy`. Making one must not touch a device.

        Example::

            @hookimpl
            def mortice_upload_strategies():
                return [DirectStorageUpload()]

        """

    @hookspec
    def mortice_executors(self) -> Iterable[Executor]:
        """Executors; the key is the executor's name.

        Called once when the registry is made.

        Returns:
            Executors, objects like `Executor`. Making one must not touch a device.

        Example::

            @hookimpl
            def mortice_executors():
                return [TorchExecutor()]

        """

    @hookspec
    def mortice_validate(self, model: ModelFile, contract: Contract) -> Iterable[Finding]:
        """Findings beyond those of the core.

        Called once for each file and contract, before any tensor is read; an error among them keeps the model from
        going on.

        Args:
            model: the opened file.
            contract: what it is held against.

        Returns:
            Findings; their ``plugin`` is filled in.

        Example::

            @hookimpl
            def mortice_validate(model, contract):
                if "general.license" not in model.metadata:
                    yield Finding(rule="acme.license", severity="warning", subject="general.license",
                                  found="missing", wanted="a licence, before deployment")

        """

    @hookspec
    def mortice_on_event(self, event: Event) -> None:
        """Something happened: a file was opened, weights moved, a graph was captured, a step ended.

        Called often and on the thread that works, so be quick. An exception here fails the run and names the plugin.

        Args:
            event: one of `mortice.core.plugin.events`; its ``plugin`` says whose executor or upload strategy tells it.

        Returns:
            Nothing.

        Example::

            @hookimpl
            def mortice_on_event(event):
                if isinstance(event, StepDone):
                    metrics.observe(event.tokens, event.seconds)

        """
