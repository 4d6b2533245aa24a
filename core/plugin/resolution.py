"""Who serves what: gathers all that plugins give, by kind and key, and decides where several give the same."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import redirect_stdout
from typing import Any, Generic, TypeVar

from attrs import evolve, field, frozen

from mortice.arch_contracts.schema import Contract
from mortice.core.errors import ConfigError, MorticeError, PluginError
from mortice.core.model.qtypes import QType, qtype_table
from mortice.core.plugin import conformance
from mortice.core.plugin.interfaces import Executor, QuantizationType, UploadStrategy, Wakes
from mortice.core.plugin.manager import PluginManager

__all__ = ["Conflict", "Provided", "Resolution", "conflict_of", "resolve"]

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


@frozen(eq=False, kw_only=True)
class Resolution:
    """What a registry is made of; see `Registry` for the tables."""

    contracts: Mapping[str, Provided[Contract]]
    qtypes: Mapping[str, Provided[QuantizationType]]
    uploads: Mapping[str, Provided[UploadStrategy]]
    executors: Mapping[str, Provided[Executor]]
    qtype_table: Mapping[int, QType] = field(repr=False)
    conflicts: tuple[Conflict, ...]
    woken: str


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


def resolve(manager: PluginManager, prefer: Mapping[str, str], *, waking: str = "") -> Resolution:
    """Ask every plugin what it gives and decide who serves each key.

    Args:
        manager: the plugins; one with a fault in what it gives takes no part in the end.
        prefer: how the config decides conflicts.
        waking: the executor that a run will ask for first: it is woken before plugins are asked for all else.

    Raises:
        ConfigError: for a preference that cannot be met.
        PluginError: for a plugin that is broken and wanted. A lenient manager keeps both instead.

    """
    met = _preferences_that_can_be_met(prefer, manager)
    given = _given_by_plugins(manager, wanted=set(met.values()), kinds=(_EXECUTOR,))
    woken = _wake(manager, _by_key(manager, given, _EXECUTOR).get(waking, {}), met.get(f"executor:{waking}"))
    given += _given_by_plugins(manager, wanted=set(met.values()), kinds=(_CONTRACT, _QTYPE, _UPLOAD))
    offers = {kind.name: _by_key(manager, given, kind) for kind in _KINDS}
    conflicts: list[Conflict] = []
    contracts, qtypes, uploads, executors = (
        _decide(manager, kind, offers[kind.name], met, conflicts) for kind in _KINDS
    )
    qtypes = {name: _checked(manager, provided) for name, provided in qtypes.items()}
    uploads = {name: _checked_upload(manager, provided) for name, provided in uploads.items()}
    table = _ids(manager, qtypes, conflicts)
    return Resolution(
        contracts=contracts,
        qtypes=qtypes,
        uploads=uploads,
        executors=executors,
        qtype_table=table,
        conflicts=tuple(conflicts),
        woken=waking if woken else "",
    )


def _preferences_that_can_be_met(prefer: Mapping[str, str], manager: PluginManager) -> dict[str, str]:
    met = {}
    for key, plugin in prefer.items():
        fault = _fault_of_preference(key, plugin, manager)
        if fault is None:
            met[key] = plugin
        else:
            manager.refuse(fault)
    return met


def _fault_of_preference(key: str, plugin: str, manager: PluginManager) -> MorticeError | None:
    hooks = {kind.name: kind.hook for kind in _KINDS} | {"loader": "mortice_open_model", "kernel": "mortice_kernels"}
    kind, _, rest = key.partition(":")
    if kind not in hooks or not rest or (kind == "kernel" and rest.count(":") != 1):
        forms = ", ".join(f"{name}:{'OPERATOR:QTYPE' if name == 'kernel' else 'KEY'}" for name in hooks)
        return ConfigError(f"plugins.prefer: {key!r}: wanted one of {forms}")
    record = manager.records.get(plugin)
    if record is None:
        have = ", ".join(sorted(manager.records))
        return ConfigError(f"plugins.prefer: {key!r}: no plugin {plugin!r}; have {have}")
    if record.status != "active":
        return PluginError(f"plugins.prefer: {key!r}: {record.origin} is {record.status}: {record.error}")
    if not manager.has(plugin, hooks[kind]):
        return ConfigError(f"plugins.prefer: {key!r}: {record.origin} has no {hooks[kind]}")
    return None


_Offers = dict[str, dict[str, Any]]
"""Of one kind: key -> plugin -> what it gives."""

_Given = list[tuple[str, _Kind, dict[str, Any]]]
"""Who gave what: plugin, kind, things by key."""


def _given_by_plugins(manager: PluginManager, wanted: set[str], kinds: Iterable[_Kind]) -> _Given:
    """What plugins give of some kinds; an installed one with a fault in it takes no part, unless it is `wanted`."""
    given: _Given = []
    for plugin, record in manager.records.items():
        for kind in kinds if record.status == "active" else ():
            try:
                with redirect_stdout(sys.stderr):  # a hook may be what imports the rest of its package
                    given.append((plugin, kind, _given(manager, kind, plugin)))
            except MorticeError as fault:
                reason = conformance.describe(fault).removeprefix(f"{manager.origin(plugin)}: {kind.hook}: ")
                manager.exclude(plugin, f"{kind.hook}: {reason}", fault, wanted=plugin in wanted)
                break
    return given


def _by_key(manager: PluginManager, given: _Given, kind: _Kind) -> _Offers:
    """What the plugins that take part give of a kind."""
    offers: _Offers = {}
    for plugin, own, things in given:
        if own is kind and manager.records[plugin].status == "active":
            for key, value in things.items():
                offers.setdefault(key, {})[plugin] = value
    return offers


def _wake(manager: PluginManager, executors: Mapping[str, Executor], preferred: str | None) -> bool:
    """Wake the one of `executors`, by plugin, that will serve their name; False where none is to be woken."""
    plugin = next(iter(executors)) if len(executors) == 1 else preferred
    executor = executors.get(plugin) if plugin is not None else None
    if plugin is None or not isinstance(executor, Wakes):
        return False
    with manager.naming(plugin, "wake"):
        executor.wake()
    return True


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
        if name == kind.name and choice not in offers.get(wanted, {}) and manager.records[choice].status == "active":
            have = " and ".join(map(manager.origin, offers.get(wanted, {}))) or "no plugin"
            manager.refuse(
                ConfigError(f"plugins.prefer: {key!r}: {manager.origin(choice)} does not give it, {have} does")
            )
    found: dict[str, Provided[Any]] = {}
    for key, by_plugin in offers.items():
        full = f"{kind.name}:{key}"
        if len(by_plugin) > 1 and prefer.get(full) not in by_plugin:
            conflicts.append(conflict_of(manager, full, list(by_plugin)))
            continue
        plugin = prefer[full] if prefer.get(full) in by_plugin else next(iter(by_plugin))
        found[key] = Provided(by_plugin[plugin], plugin)
    return found


_BLOCK_ONE = "block one: --block-plugin NAME (plugins.block)"


def conflict_of(manager: PluginManager, key: str, plugins: list[str]) -> Conflict:
    """The conflict of a key that all of `plugins` give."""
    origins = " and by ".join(map(manager.origin, plugins))
    choices = " or ".join(f'"{plugin}"' for plugin in plugins)
    message = f'{key} is given by {origins}; choose one in the config: [plugins.prefer] "{key}" = {choices}'
    return Conflict(key, tuple(plugins), f"{message}; or {_BLOCK_ONE}")


def _checked(manager: PluginManager, provided: Provided[QuantizationType]) -> Provided[QuantizationType]:
    value = provided.value
    checked = conformance.CheckedDequantize(manager.origin(provided.plugin), value.qtype, value.dequantize)
    return Provided(evolve(value, dequantize=checked), provided.plugin)


def _checked_upload(manager: PluginManager, provided: Provided[UploadStrategy]) -> Provided[UploadStrategy]:
    checked = conformance.CheckedUpload(manager.origin(provided.plugin), provided.value)
    return Provided(checked, provided.plugin)


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
