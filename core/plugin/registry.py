"""The typed face of the hooks: what there is, by key, and which plugin gave it."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Generic, TypeVar

from attrs import define, evolve, field, frozen

from mortice.arch_contracts.schema import Contract
from mortice.core.errors import ConfigError, ModelFileError, PluginError, UnknownArchitectureError
from mortice.core.model.findings import Finding
from mortice.core.model.qtypes import QType, qtype_table
from mortice.core.model.types import DeviceInfo, LoadOptions, ModelFile
from mortice.core.model.weight_plan import Kernel
from mortice.core.plugin.events import Event
from mortice.core.plugin.interfaces import Executor, QuantizationType, UploadStrategy
from mortice.core.plugin.manager import PluginManager, PluginPolicy

__all__ = ["Provided", "Registry", "make_registry"]

T = TypeVar("T")


@frozen(eq=False)
class Provided(Generic[T]):
    """Something and the plugin that gave it."""

    value: T
    plugin: str


@define(eq=False)
class Registry:
    """What the plugins of one run provide.

    Attributes:
        manager: the plugins.
        contracts: by ``general.architecture``.
        qtypes: by type name.
        uploads: by strategy name.
        executors: by executor name.

    """

    manager: PluginManager
    contracts: Mapping[str, Provided[Contract]]
    qtypes: Mapping[str, Provided[QuantizationType]]
    uploads: Mapping[str, Provided[UploadStrategy]]
    executors: Mapping[str, Provided[Executor]]
    qtype_table: Mapping[int, QType] = field(repr=False)
    prefer: Mapping[str, str] = field(factory=dict)
    observers: list[Callable[[Event], None]] = field(factory=list)

    def open_model(self, path: Path) -> ModelFile:
        """Open a model with the first loader that takes it.

        Raises:
            ModelFileError: when the path does not exist, is broken, or no loader takes it.

        """
        if not path.exists():
            raise ModelFileError(path, "no such file or folder")
        options = LoadOptions(qtypes=self.qtype_table)
        declined = []
        for plugin, model in self.manager.call("mortice_open_model", path=path, options=options):
            if model is None:
                declined.append(plugin)
                continue
            if not isinstance(model, ModelFile):
                raise PluginError(
                    f"plugin {plugin}: mortice_open_model returned {type(model).__name__}, wanted ModelFile"
                )
            model.loader = plugin
            return model
        raise ModelFileError(path, f"no loader takes it; asked: {', '.join(declined) or 'none'}")

    def contract_for(self, model: ModelFile) -> Contract:
        """The contract that serves the model's ``general.architecture``.

        Raises:
            UnknownArchitectureError: naming the nearest known ones and how to add one.

        """
        architecture = model.architecture
        provided = self.contracts.get(architecture)
        if provided is not None:
            return provided.value
        known = ", ".join(sorted(self.contracts))
        near = difflib.get_close_matches(architecture, self.contracts, 3)
        found = (
            f"unknown architecture {architecture!r}" if architecture else "general.architecture is missing"
        )
        raise UnknownArchitectureError(
            f"{model.path}: {found}; nearest are {', '.join(near) or 'none'}, known are {known}. "
            "A contract adds one: give it with --contract FILE.toml, or install a plugin that has it"
        )

    def findings(self, model: ModelFile, contract: Contract) -> list[Finding]:
        """What plugins say about a model, with the plugin's name in each finding."""
        return [
            evolve(finding, plugin=plugin)
            for plugin, findings in self.manager.call("mortice_validate", model=model, contract=contract)
            for finding in findings or ()
        ]

    def kernels(self, executor: Executor, device: DeviceInfo) -> list[Kernel]:
        """The executor's kernels and those of plugins; a preferred plugin's come first."""
        qtypes = [provided.value for provided in self.qtypes.values()]
        own = list(executor.kernels(device, qtypes))
        served = {(kernel.operator, kernel.qtype) for kernel in own}
        preferred, added = [], []
        for plugin, kernels in self.manager.call("mortice_kernels", device=device):
            for kernel in kernels or ():
                kernel = evolve(kernel, plugin=plugin)
                if self.prefer.get(f"kernel:{kernel.operator}:{kernel.qtype}") == plugin:
                    preferred.append(kernel)
                elif (kernel.operator, kernel.qtype) not in served:
                    added.append(kernel)
        return preferred + own + added

    def executor(self, name: str) -> Executor:
        """An executor by name; ConfigError names those there are."""
        return _pick(self.executors, name, "executor.name").value

    def upload(self, name: str) -> UploadStrategy:
        """An upload strategy by name; ConfigError names those there are."""
        return _pick(self.uploads, name, "upload.strategy").value

    def emit(self, event: Event) -> None:
        """Tell observers; an observer that fails is an error that names it."""
        for observer in self.observers:
            observer(event)
        for _ in self.manager.call("mortice_on_event", event=event):
            pass


def make_registry(
    policy: PluginPolicy | None = None,
    *,
    prefer: Mapping[str, str] | None = None,
    given: Iterable[tuple[str, object]] = (),
) -> Registry:
    """A registry of the built-ins, the installed plugins and `given` ones.

    Args:
        policy: which plugins may take part.
        prefer: ``{"qtype:Q4_K": "plugin name"}`` decides a conflict; kinds are contract, qtype, upload, executor, kernel.
        given: further plugins as (name, object).

    Raises:
        PluginError: for a conflict that `prefer` does not decide, naming both plugins.

    """
    manager = PluginManager.create(policy, tuple(given))
    chosen = dict(prefer or {})
    _check_preferences(chosen, manager)

    def collect(kind: str, hook: str, keys: Callable[[Any], Iterable[str]]) -> dict[str, Provided[Any]]:
        return _collect(manager, kind, hook, keys, chosen)

    qtypes = collect("qtype", "mortice_qtypes", lambda value: (value.qtype.name,))
    return Registry(
        manager=manager,
        contracts=collect("contract", "mortice_arch_contracts", lambda value: value.architectures),
        qtypes=qtypes,
        uploads=collect("upload", "mortice_upload_strategies", lambda value: (value.name,)),
        executors=collect("executor", "mortice_executors", lambda value: (value.name,)),
        qtype_table=qtype_table(provided.value.qtype for provided in qtypes.values()),
        prefer=chosen,
    )


def _check_preferences(prefer: Mapping[str, str], manager: PluginManager) -> None:
    kinds = ("contract", "qtype", "upload", "executor", "kernel")
    for key, plugin in prefer.items():
        kind, colon, _ = key.partition(":")
        if kind not in kinds or not colon:
            raise ConfigError(f"plugins.prefer: {key!r}: wanted KIND:KEY with KIND one of {', '.join(kinds)}")
        if plugin not in manager.records:
            raise ConfigError(
                f"plugins.prefer: {key!r}: no plugin {plugin!r}; have {', '.join(sorted(manager.records))}"
            )


def _collect(
    manager: PluginManager,
    kind: str,
    hook: str,
    keys: Callable[[Any], Iterable[str]],
    prefer: Mapping[str, str],
) -> dict[str, Provided[Any]]:
    found: dict[str, Provided[Any]] = {}
    for plugin, values in manager.call(hook):
        for value in values or ():
            for key in keys(value):
                other = found.get(key)
                choice = prefer.get(f"{kind}:{key}")
                if other is not None and choice not in (plugin, other.plugin):
                    raise PluginError(
                        f"{kind} {key!r} is given by {_origin(manager, other.plugin)} and by {_origin(manager, plugin)}; "
                        f'choose one: [plugins.prefer] "{kind}:{key}" = "{plugin}"'
                    )
                if other is None or choice == plugin:
                    found[key] = Provided(value, plugin)
    return found


def _origin(manager: PluginManager, plugin: str) -> str:
    distribution = manager.records[plugin].distribution
    return f"plugin {plugin} ({distribution})" if distribution else f"plugin {plugin}"


def _pick(table: Mapping[str, Provided[T]], name: str, key: str) -> Provided[T]:
    if name not in table:
        raise ConfigError(f"{key}: unknown {name!r}; have {', '.join(sorted(table))}")
    return table[name]
