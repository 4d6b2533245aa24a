"""The typed face of the hooks: what there is, by key, and which plugin gave it."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from types import MappingProxyType
from typing import Any, TypeVar

from attrs import define, evolve, field

from mortice.arch_contracts.schema import Contract
from mortice.core.counts import counted
from mortice.core.errors import ConfigError, ModelFileError, MorticeError, PluginError, UnknownArchitectureError
from mortice.core.model.findings import Finding
from mortice.core.model.qtypes import QType
from mortice.core.model.types import DeviceInfo, LoadOptions, ModelFile
from mortice.core.model.weight_plan import Kernel
from mortice.core.plugin import conformance
from mortice.core.plugin.events import Event
from mortice.core.plugin.interfaces import Emit, Executor, QuantizationType, UploadStrategy
from mortice.core.plugin.manager import PluginManager, PluginPolicy
from mortice.core.plugin.resolution import Conflict, Provided, conflict_of, resolve
from mortice.core.text_file import beginning

__all__ = ["Conflict", "Provided", "Registry", "make_registry", "survey"]

T = TypeVar("T")
_OPEN = "mortice_open_model"


@define(eq=False)
class Registry:
    """What the plugins of one run provide.

    Attributes:
        manager: the plugins.
        contracts: by ``general.architecture``.
        qtypes: by type name.
        uploads: by strategy name.
        executors: by executor name.
        qtype_table: every tensor type a loader may meet, by id.
        prefer: how the config decides conflicts.
        conflicts: keys that nothing decides; `make_registry` gives a registry that has none.
        woken: the executor whose device comes up already; nothing where none was to be woken.
        observers: the program's own, told before the plugins; what they raise is passed on as it is.

    """

    manager: PluginManager
    contracts: Mapping[str, Provided[Contract]]
    qtypes: Mapping[str, Provided[QuantizationType]]
    uploads: Mapping[str, Provided[UploadStrategy]]
    executors: Mapping[str, Provided[Executor]]
    qtype_table: Mapping[int, QType] = field(repr=False)
    prefer: Mapping[str, str] = field(factory=dict)
    conflicts: tuple[Conflict, ...] = ()
    woken: str = ""
    observers: list[Callable[[Event], None]] = field(factory=list)

    def open_model(self, path: Path) -> ModelFile:
        """Open a model with the loader that takes it.

        Every loader is asked, for the order must not matter; the plugin that ``[plugins.prefer]`` names for the file's
        suffix (``"loader:gguf"``) is asked first, and the others only if it declines.

        Raises:
            ModelFileError: when the path does not exist, is broken, or no loader takes it.
            PluginError: when two loaders take it, or one fails.

        """
        opened = self.try_open_model(path)
        if opened is None:
            loaders = ", ".join(plugin for plugin in self.manager.records if self.manager.has(plugin, _OPEN))
            found = beginning(path)
            raise ModelFileError(
                path, f"no loader takes it; asked: {loaders or 'none'}{self.manager.absent()}{found and f'; {found}'}"
            )
        return opened

    def try_open_model(self, path: Path) -> ModelFile | None:
        """Like `open_model`, but None for what no loader takes: a folder also holds files that are no models."""
        try:
            path.stat()
        except FileNotFoundError:
            raise ModelFileError(path, "no such file or folder") from None
        except (OSError, ValueError) as error:
            raise ModelFileError(path, f"cannot be read: {getattr(error, 'strerror', None) or error}") from None
        key = _loader_key(path)
        choice = self.prefer.get(key)
        opened = self._opened(path, choice) if choice else []
        opened = opened or self._opened(path)
        if len(opened) > 1:
            for model in opened:
                model.close()
            raise PluginError(f"{path}: {conflict_of(self.manager, key, [model.loader for model in opened]).message}")
        return opened[0] if opened else None

    def loader_conflict(self, path: Path) -> Conflict | None:
        """The conflict that `open_model` would refuse a path for; a loader that fails there takes it, too."""
        key, takers = _loader_key(path), []
        for plugin in self.manager.records:
            try:
                opened = self._opened(path, plugin)
            except MorticeError:
                takers.append(plugin)
                continue
            takers += [plugin] * len(opened)
            for model in opened:
                model.close()
        decided = self.prefer.get(key) in takers
        return None if len(takers) < 2 or decided else conflict_of(self.manager, key, takers)

    def _opened(self, path: Path, only: str | None = None) -> list[ModelFile]:
        """The file as every loader that takes it sees it; when one fails, none stays open."""
        opened: list[ModelFile] = []
        try:
            options = LoadOptions(qtypes=self.qtype_table)
            for plugin, model in self.manager.call(_OPEN, only=only, path=path, options=options):
                if model is not None:
                    if isinstance(model, ModelFile):
                        opened.append(model)
                    self.manager.require(plugin, _OPEN, conformance.model_faults(model))
                    model.loader = plugin
        except BaseException:
            for model in opened:
                model.close()
            raise
        return opened

    def contract_for(self, model: ModelFile) -> Contract:
        """The contract that serves the model's ``general.architecture``.

        Raises:
            UnknownArchitectureError: naming the nearest known ones and how to add one.

        """
        architecture = model.architecture
        provided = self.contracts.get(architecture)
        if provided is not None:
            return provided.value
        shown = architecture if len(architecture) <= 64 else architecture[:64] + "…"
        known = ", ".join(sorted(self.contracts))
        near = difflib.get_close_matches(shown, self.contracts, 3)
        nearest = f"nearest are {', '.join(near)}, " if near else ""
        found = f"unknown architecture {shown!r}" if architecture else "general.architecture is missing"
        raise UnknownArchitectureError(
            f"{model.path}: {found}; {nearest}known are {known}. A contract adds one: "
            f"give it with --contract FILE.toml, or install a plugin that has it{self.manager.absent()}"
        )

    def findings(self, model: ModelFile, contract: Contract) -> list[Finding]:
        """What plugins say about a model, with the plugin's name in each finding."""
        given = self.manager.gather("mortice_validate", conformance.finding_faults, model=model, contract=contract)
        return [evolve(finding, plugin=plugin) for plugin, finding in given]

    def kernels(self, executor: Executor, device: DeviceInfo) -> list[Kernel]:
        """The executor's kernels and those of plugins; a preferred plugin's come first.

        Raises:
            PluginError: when two plugins give kernels for an operator and a weight type that the executor does not
                serve itself, and `prefer` does not decide.

        """
        with self.naming(executor, "kernels"):
            own = list(executor.kernels(device, [provided.value for provided in self.qtypes.values()]))
        own = [evolve(kernel, plugin=self.provider(executor)) for kernel in own]
        served = {(kernel.operator, kernel.qtype) for kernel in own}
        offered: dict[tuple[str, str], dict[str, list[Kernel]]] = {}
        for plugin, kernel in self.manager.gather("mortice_kernels", conformance.kernel_faults, device=device):
            by_plugin = offered.setdefault((kernel.operator, kernel.qtype), {})
            by_plugin.setdefault(plugin, []).append(evolve(kernel, plugin=plugin))
        preferred: list[Kernel] = []
        added: list[Kernel] = []
        for pair, by_plugin in offered.items():
            key = f"kernel:{pair[0]}:{pair[1]}"
            choice = self.prefer.get(key)
            if choice in by_plugin:
                preferred += by_plugin[choice]
            elif pair not in served:
                if len(by_plugin) > 1:
                    raise PluginError(conflict_of(self.manager, key, list(by_plugin)).message)
                added += next(iter(by_plugin.values()))
        return preferred + own + added

    def executor(self, name: str) -> Executor:
        """An executor by name; ConfigError names those there are."""
        return self._pick(self.executors, name, "executor.name")

    def upload(self, name: str) -> UploadStrategy:
        """An upload strategy by name; ConfigError names those there are."""
        return self._pick(self.uploads, name, "upload.strategy")

    def _pick(self, table: Mapping[str, Provided[T]], name: str, key: str) -> T:
        if name not in table:
            have = ", ".join(sorted(table)) or "none"
            raise ConfigError(f"{key}: unknown {name!r}; have {have}{self.manager.absent()}")
        return table[name].value

    def provider(self, thing: Executor | UploadStrategy) -> str:
        """The plugin that gave an executor or an upload strategy."""
        tables: tuple[Mapping[str, Provided[Any]], ...] = (self.executors, self.uploads)
        for provided in (given for table in tables for given in table.values()):
            if provided.value is thing:
                return provided.plugin
        raise KeyError(f"{thing!r} is not of this registry")

    def naming(self, thing: Executor | UploadStrategy, doing: str) -> AbstractContextManager[None]:
        """Make whatever goes wrong inside name the plugin that gave `thing`."""
        return self.manager.naming(self.provider(thing), doing)

    def emit(self, event: Event) -> None:
        """Tell observers; a plugin that fails is an error that names it."""
        for observer in self.observers:
            observer(event)
        for _ in self.manager.call("mortice_on_event", event=event):
            pass

    def emitter(self, thing: Executor | UploadStrategy) -> Emit:
        """What `thing` is given to tell observers something: `emit` with its plugin's name in each event."""
        plugin = self.provider(thing)
        return lambda event: self.emit(evolve(event, plugin=plugin))


def _loader_key(path: Path) -> str:
    """What ``[plugins.prefer]`` calls the files that are named like this one."""
    return f"loader:{path.suffix.removeprefix('.').lower() or 'none'}"


def make_registry(
    policy: PluginPolicy | None = None,
    *,
    prefer: Mapping[str, str] | None = None,
    given: Iterable[tuple[str, object]] = (),
    waking: str = "",
) -> Registry:
    """A registry of the built-ins, the installed plugins and `given` ones.

    Args:
        policy: which plugins may take part.
        prefer: ``{"qtype:Q4_K": "plugin name"}`` decides a conflict; the keys are ``contract:ARCHITECTURE``,
            ``qtype:NAME``, ``upload:NAME``, ``executor:NAME``, ``loader:SUFFIX`` (``none`` for a path without one) and
            ``kernel:OPERATOR:QTYPE``.
        given: further plugins as (name, object).
        waking: the executor that will be asked for first: its device begins to come up meanwhile (`Wakes`).

    Raises:
        ConfigError: for a preference that cannot be met.
        PluginError: for a plugin that is broken and wanted, or gives what it should not, and for a conflict that
            `prefer` does not decide, naming both plugins and their distributions.

    """
    registry = _registry(PluginManager.create(policy, tuple(given)), prefer, waking)
    if registry.conflicts:
        first, *others = registry.conflicts
        more = f" (and {counted(len(others), 'more conflict')}, which `mortice plugins list` shows)" if others else ""
        raise PluginError(first.message + more)
    return registry


def survey(
    policy: PluginPolicy | None = None,
    *,
    prefer: Mapping[str, str] | None = None,
    given: Iterable[tuple[str, object]] = (),
    unfit: Mapping[str, str] = MappingProxyType({}),
) -> Registry:
    """Like `make_registry`, but what that would raise is kept: good to look at, not to run.

    Conflicts are in ``conflicts``, everything else in ``manager.refusals``; installed plugins that are `unfit`, by name
    with the reason, are not imported.
    """
    return _registry(PluginManager.create(policy, tuple(given), lenient=True, unfit=unfit), prefer)


def _registry(manager: PluginManager, prefer: Mapping[str, str] | None, waking: str = "") -> Registry:
    found = resolve(manager, prefer or {}, waking=waking)
    return Registry(
        manager=manager,
        contracts=found.contracts,
        qtypes=found.qtypes,
        uploads=found.uploads,
        executors=found.executors,
        qtype_table=found.qtype_table,
        prefer=dict(prefer or {}),
        conflicts=found.conflicts,
        woken=found.woken,
    )
