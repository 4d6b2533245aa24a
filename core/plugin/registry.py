"""The typed face of the hooks: what there is, by key, and which plugin gave it."""

from __future__ import annotations

import difflib
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, redirect_stdout
from pathlib import Path
from typing import Any, Generic, TypeVar

from attrs import define, evolve, field, frozen

from mortice.arch_contracts.schema import Contract
from mortice.core.errors import ConfigError, ModelFileError, MorticeError, PluginError, UnknownArchitectureError
from mortice.core.model.findings import Finding
from mortice.core.model.qtypes import QType, qtype_table
from mortice.core.model.types import DeviceInfo, LoadOptions, ModelFile
from mortice.core.model.weight_plan import Kernel
from mortice.core.plugin import conformance
from mortice.core.plugin.events import Event
from mortice.core.plugin.interfaces import Emit, Executor, QuantizationType, UploadStrategy
from mortice.core.plugin.manager import PluginManager, PluginPolicy

__all__ = ["Conflict", "Provided", "Registry", "make_registry", "survey"]

T = TypeVar("T")


@frozen(eq=False)
class Provided(Generic[T]):
    """Something and the plugin that gave it."""

    value: T
    plugin: str


@frozen
class Conflict:
    """A key that several plugins give and no preference decides.

    Attributes:
        key: ``qtype:Q4_K``, or ``tensor type id 200``.
        plugins: who gives it.
        message: who they are and how to decide.

    """

    key: str
    plugins: tuple[str, ...]
    message: str


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
    observers: list[Callable[[Event], None]] = field(factory=list)

    def open_model(self, path: Path) -> ModelFile:
        """Open a model with the loader that takes it.

        Every loader is asked, for the order must not matter; the plugin that ``[plugins.prefer]`` names for the file's
        suffix (``"loader:gguf"``) is asked first, and the others only if it declines.

        Raises:
            ModelFileError: when the path does not exist, is broken, or no loader takes it.
            PluginError: when two loaders take it, or one fails.

        """
        try:
            path.stat()
        except FileNotFoundError:
            raise ModelFileError(path, "no such file or folder") from None
        except (OSError, ValueError) as error:
            raise ModelFileError(path, f"cannot be read: {getattr(error, 'strerror', None) or error}") from None
        key = f"loader:{path.suffix.removeprefix('.').lower() or 'none'}"
        choice = self.prefer.get(key)
        opened = self._opened(path, choice) if choice else []
        opened = opened or self._opened(path)
        if len(opened) == 1:
            return opened[0]
        for model in opened:
            model.close()
        if not opened:
            asked = ", ".join(
                plugin for plugin in self.manager.records if self.manager.has(plugin, "mortice_open_model")
            )
            raise ModelFileError(path, f"no loader takes it; asked: {asked or 'none'}{self.manager.absent()}")
        raise PluginError(f"{path}: {_conflict(self.manager, key, [model.loader for model in opened]).message}")

    def _opened(self, path: Path, only: str | None = None) -> list[ModelFile]:
        """The file as every loader that takes it sees it; when one fails, none stays open."""
        opened: list[ModelFile] = []
        hook = "mortice_open_model"
        try:
            options = LoadOptions(qtypes=self.qtype_table)
            for plugin, model in self.manager.call(hook, only=only, path=path, options=options):
                if model is not None:
                    if isinstance(model, ModelFile):
                        opened.append(model)
                    self.manager.require(plugin, hook, conformance.model_faults(model))
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
        found = f"unknown architecture {shown!r}" if architecture else "general.architecture is missing"
        raise UnknownArchitectureError(
            f"{model.path}: {found}; nearest are {', '.join(near) or 'none'}, known are {known}. A contract adds one: "
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
                    raise PluginError(_conflict(self.manager, key, list(by_plugin)).message)
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


@frozen
class _Kind:
    """A kind of thing that the registry keeps by key."""

    name: str
    hook: str
    faults: Callable[[object], Iterator[str]]
    keys: Callable[[Any], Iterable[str]]


_CONTRACT = _Kind("contract", "mortice_arch_contracts", conformance.contract_faults, lambda value: value.architectures)
_QTYPE = _Kind("qtype", "mortice_qtypes", conformance.qtype_faults, lambda value: (value.qtype.name,))
_UPLOAD = _Kind("upload", "mortice_upload_strategies", conformance.upload_faults, lambda value: (value.name,))
_EXECUTOR = _Kind("executor", "mortice_executors", conformance.executor_faults, lambda value: (value.name,))
_KINDS = (_CONTRACT, _QTYPE, _UPLOAD, _EXECUTOR)


def make_registry(
    policy: PluginPolicy | None = None,
    *,
    prefer: Mapping[str, str] | None = None,
    given: Iterable[tuple[str, object]] = (),
) -> Registry:
    """A registry of the built-ins, the installed plugins and `given` ones.

    Args:
        policy: which plugins may take part.
        prefer: ``{"qtype:Q4_K": "plugin name"}`` decides a conflict; the keys are ``contract:ARCHITECTURE``,
            ``qtype:NAME``, ``upload:NAME``, ``executor:NAME``, ``loader:SUFFIX`` (``none`` for a path without one) and
            ``kernel:OPERATOR:QTYPE``.
        given: further plugins as (name, object).

    Raises:
        ConfigError: for a preference that cannot be met.
        PluginError: for a plugin that is broken and wanted, or gives what it should not, and for a conflict that
            `prefer` does not decide, naming both plugins and their distributions.

    """
    registry = survey(policy, prefer=prefer, given=given)
    if registry.conflicts:
        first, *others = registry.conflicts
        more = f" (and {len(others)} more conflicts, which `mortice plugins list` shows)" if others else ""
        raise PluginError(first.message + more)
    return registry


def survey(
    policy: PluginPolicy | None = None,
    *,
    prefer: Mapping[str, str] | None = None,
    given: Iterable[tuple[str, object]] = (),
) -> Registry:
    """Like `make_registry`, but conflicts are kept in the registry instead of raised: good to look at, not to run."""
    manager = PluginManager.create(policy, tuple(given))
    chosen = dict(prefer or {})
    _check_preferences(chosen, manager)
    offers = _offers(manager, wanted=set(chosen.values()))
    conflicts: list[Conflict] = []
    contracts, qtypes, uploads, executors = (
        _decide(manager, kind, offers[kind.name], chosen, conflicts) for kind in _KINDS
    )
    qtypes = {name: _checked(manager, provided) for name, provided in qtypes.items()}
    return Registry(
        manager=manager,
        contracts=contracts,
        qtypes=qtypes,
        uploads=uploads,
        executors=executors,
        qtype_table=_ids(manager, qtypes, conflicts),
        prefer=chosen,
        conflicts=tuple(conflicts),
    )


def _check_preferences(prefer: Mapping[str, str], manager: PluginManager) -> None:
    hooks = {kind.name: kind.hook for kind in _KINDS} | {"loader": "mortice_open_model", "kernel": "mortice_kernels"}
    for key, plugin in prefer.items():
        kind, _, rest = key.partition(":")
        if kind not in hooks or not rest or (kind == "kernel" and rest.count(":") != 1):
            forms = ", ".join(f"{name}:{'OPERATOR:QTYPE' if name == 'kernel' else 'KEY'}" for name in hooks)
            raise ConfigError(f"plugins.prefer: {key!r}: wanted one of {forms}")
        record = manager.records.get(plugin)
        if record is None:
            have = ", ".join(sorted(manager.records))
            raise ConfigError(f"plugins.prefer: {key!r}: no plugin {plugin!r}; have {have}")
        if record.status != "active":
            raise PluginError(f"plugins.prefer: {key!r}: {record.origin} is {record.status}: {record.error}")
        if not manager.has(plugin, hooks[kind]):
            raise ConfigError(f"plugins.prefer: {key!r}: {record.origin} has no {hooks[kind]}")


_Offers = dict[str, dict[str, Any]]
"""Of one kind: key -> plugin -> what it gives."""


def _offers(manager: PluginManager, wanted: set[str]) -> dict[str, _Offers]:
    """What plugins give, by kind; an installed one with a fault in any of it takes no part, unless it is `wanted`."""
    offers: dict[str, _Offers] = {kind.name: {} for kind in _KINDS}
    for plugin in manager.records:
        own: list[tuple[_Kind, dict[str, Any]]] = []
        for kind in _KINDS:
            try:
                with redirect_stdout(sys.stderr):  # a hook may be what imports the rest of its package
                    own.append((kind, _given(manager, kind, plugin)))
            except MorticeError as fault:
                reason = conformance.describe(fault).removeprefix(f"{manager.origin(plugin)}: {kind.hook}: ")
                manager.exclude(plugin, f"{kind.hook}: {reason}", fault, wanted=plugin in wanted)
                break
        else:
            for kind, things in own:
                for key, value in things.items():
                    offers[kind.name].setdefault(key, {})[plugin] = value
    return offers


def _given(manager: PluginManager, kind: _Kind, plugin: str) -> dict[str, Any]:
    """What a plugin gives of a kind, by key."""
    things: dict[str, Any] = {}
    for _, value in manager.gather(kind.hook, kind.faults, only=plugin):
        for key in kind.keys(value):
            if key in things:
                raise PluginError(f"{manager.origin(plugin)}: {kind.hook}: gives {kind.name} {key!r} twice")
            things[key] = value
    return things


def _decide(
    manager: PluginManager, kind: _Kind, offers: _Offers, prefer: Mapping[str, str], conflicts: list[Conflict]
) -> dict[str, Provided[Any]]:
    """Who serves each key; what `prefer` leaves open is added to `conflicts` and served by nobody."""
    for key, choice in prefer.items():
        name, _, wanted = key.partition(":")
        if name == kind.name and choice not in offers.get(wanted, {}):
            have = " and ".join(map(manager.origin, offers.get(wanted, {}))) or "no plugin"
            raise ConfigError(f"plugins.prefer: {key!r}: {manager.origin(choice)} does not give it, {have} does")
    found: dict[str, Provided[Any]] = {}
    for key, by_plugin in offers.items():
        full = f"{kind.name}:{key}"
        if len(by_plugin) > 1 and full not in prefer:
            conflicts.append(_conflict(manager, full, list(by_plugin)))
            continue
        plugin = prefer.get(full) or next(iter(by_plugin))
        found[key] = Provided(by_plugin[plugin], plugin)
    return found


_BLOCK_ONE = "block one: --block-plugin NAME (plugins.block)"


def _conflict(manager: PluginManager, key: str, plugins: list[str]) -> Conflict:
    origins = " and by ".join(map(manager.origin, plugins))
    choices = " or ".join(f'"{plugin}"' for plugin in plugins)
    message = f'{key} is given by {origins}; choose one in the config: [plugins.prefer] "{key}" = {choices}'
    return Conflict(key, tuple(plugins), f"{message}; or {_BLOCK_ONE}")


def _checked(manager: PluginManager, provided: Provided[QuantizationType]) -> Provided[QuantizationType]:
    value = provided.value
    checked = conformance.CheckedDequantize(manager.origin(provided.plugin), value.qtype, value.dequantize)
    return Provided(evolve(value, dequantize=checked), provided.plugin)


def _ids(
    manager: PluginManager, qtypes: Mapping[str, Provided[QuantizationType]], conflicts: list[Conflict]
) -> Mapping[int, QType]:
    """The table of tensor types; an id that is used for two types is added to `conflicts`."""
    by_id: dict[int, Provided[QuantizationType]] = {}
    for provided in qtypes.values():
        qtype = provided.value.qtype
        other = by_id.setdefault(qtype.id, provided)
        if other is not provided:
            key = f"tensor type id {qtype.id}"
            first, second = (f"{manager.origin(it.plugin)} for {it.value.qtype.name}" for it in (other, provided))
            message = f"{key} is used by {first} and by {second}; {_BLOCK_ONE}"
            conflicts.append(Conflict(key, (other.plugin, provided.plugin), message))
    return qtype_table(provided.value.qtype for provided in by_id.values())
