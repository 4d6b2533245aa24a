"""Finds plugins and keeps their faults apart: one that cannot be imported is named and skipped, not fatal.

A manager is made for each run; there is no global one. Built-ins come first and through the same hooks.
"""

from __future__ import annotations

import importlib
import inspect
import time
from collections.abc import Iterable, Iterator, Sequence
from importlib import metadata
from types import ModuleType
from typing import Any, Literal

import pluggy
from attrs import define, field, frozen

from mortice.core.errors import InputError, PluginError
from mortice.core.plugin.hookspecs import CONTRACT_VERSION, PROJECT, HookSpecs

__all__ = ["BUILTIN_PLUGINS", "PluginManager", "PluginPolicy", "PluginRecord"]

BUILTIN_PLUGINS = (
    "mortice.plugins.loaders.gguf.plugin",
    "mortice.plugins.archs",
    "mortice.plugins.qtypes",
    "mortice.plugins.uploads.host",
    "mortice.plugins.executors.reference",
)
"""Modules with hooks, imported like those of third parties."""


@frozen(kw_only=True)
class PluginPolicy:
    """Which plugins may take part.

    Attributes:
        allow: if not empty, only these besides the built-ins; one that is missing or broken is an error.
        block: never these; a built-in may be blocked too.
        strict: let a broken plugin's exception through instead of skipping it.
        entry_points: whether installed packages are searched at all.

    """

    allow: tuple[str, ...] = ()
    block: tuple[str, ...] = ()
    strict: bool = False
    entry_points: bool = True


@define(kw_only=True)
class PluginRecord:
    """What became of a plugin.

    Attributes:
        name: its name: the entry point's, or the module's last part for a built-in.
        source: where it came from.
        distribution: the installed package and its version, ``mortice`` for built-ins.
        status: whether it takes part.
        error: why not.
        import_seconds: what importing it took.

    """

    name: str
    source: Literal["builtin", "entry point", "given"]
    distribution: str
    status: Literal["active", "blocked", "failed"] = "active"
    error: str = ""
    import_seconds: float = 0.0


@define(eq=False)
class PluginManager:
    """Registers plugins and calls their hooks, remembering which plugin said what."""

    policy: PluginPolicy = PluginPolicy()
    records: dict[str, PluginRecord] = field(factory=dict, init=False)
    _pm: pluggy.PluginManager = field(init=False)

    def __attrs_post_init__(self) -> None:
        self._pm = pluggy.PluginManager(PROJECT)
        self._pm.add_hookspecs(HookSpecs)

    @classmethod
    def create(
        cls, policy: PluginPolicy | None = None, given: Sequence[tuple[str, object]] = ()
    ) -> PluginManager:
        """A manager with the built-ins, the installed plugins the policy lets in, and `given` (name, plugin) pairs.

        Raises:
            PluginError: when a plugin the policy asks for is missing or broken, or any is broken and the policy is strict.

        """
        manager = cls(policy or PluginPolicy())
        for module in BUILTIN_PLUGINS:
            record = PluginRecord(name=_builtin_name(module), source="builtin", distribution="mortice")
            manager._admit(record, lambda module=module: importlib.import_module(module))
        if manager.policy.entry_points:
            manager._admit_entry_points()
        for name, plugin in given:
            record = PluginRecord(name=name, source="given", distribution="")
            manager._admit(record, lambda plugin=plugin: plugin)
        return manager

    def _admit_entry_points(self) -> None:
        allow = self.policy.allow
        points = sorted(metadata.entry_points(group=PROJECT), key=lambda point: point.name)
        for point in points:
            if allow and point.name not in allow:
                continue
            distribution = f"{point.dist.name} {point.dist.version}" if point.dist is not None else ""
            self._admit(
                PluginRecord(name=point.name, source="entry point", distribution=distribution), point.load
            )
        for name in allow:
            if name not in self.records:
                installed = ", ".join(point.name for point in points) or "none"
                raise PluginError(f"plugins.allow: no installed plugin {name!r}; installed are: {installed}")

    def _admit(self, record: PluginRecord, load: Any) -> None:
        if record.name in self.records:
            other = self.records[record.name]
            raise PluginError(
                f"two plugins are named {record.name!r}: {other.distribution or other.source} and "
                f"{record.distribution or record.source}; block one with plugins.block or uninstall it"
            )
        self.records[record.name] = record
        if record.name in self.policy.block:
            record.status = "blocked"
            return
        started = time.perf_counter()
        try:
            plugin = load()
            self._register(record.name, plugin() if inspect.isclass(plugin) else plugin)
        except Exception as error:
            record.status, record.error = "failed", f"{type(error).__name__}: {error}"
            if self.policy.strict or record.name in self.policy.allow or record.source != "entry point":
                raise PluginError(
                    f"plugin {record.name} ({record.distribution or record.source}): {record.error}"
                ) from error
        finally:
            record.import_seconds = time.perf_counter() - started

    def _register(self, name: str, plugin: object) -> None:
        version = getattr(plugin, "mortice_contract_version", CONTRACT_VERSION)
        if version != CONTRACT_VERSION:
            raise PluginError(f"written for hook contract {version}, this mortice has {CONTRACT_VERSION}")
        self._check_names(plugin)
        self._pm.register(plugin, name=name)
        try:
            for implementation in [caller for caller in self._pm.get_hookcallers(plugin) or []]:
                for impl in implementation.get_hookimpls():
                    if impl.plugin is plugin and (impl.hookwrapper or impl.wrapper):
                        raise PluginError(f"{implementation.name}: hook wrappers are not supported")
            self._pm.check_pending()
        except Exception:
            self._pm.unregister(plugin)
            raise

    def _check_names(self, plugin: object) -> None:
        """A function named like a hook but not marked as one would silently never be called."""
        names = plugin.__dict__ if isinstance(plugin, ModuleType) else dir(type(plugin))
        for name in names:
            if name.startswith(f"{PROJECT}_") and callable(getattr(plugin, name, None)):
                if self._pm.parse_hookimpl_opts(plugin, name) is None:
                    raise PluginError(f"{name} is not marked with @hookimpl")
                if not hasattr(HookSpecs, name):
                    known = ", ".join(hook for hook in dir(HookSpecs) if hook.startswith(PROJECT))
                    raise PluginError(f"there is no hook {name}; hooks are: {known}")

    def call(self, hook: str, **arguments: Any) -> Iterator[tuple[str, Any]]:
        """Call `hook` on every plugin that has it, first registered first.

        Yields:
            The plugin's name and what it returned.

        Raises:
            PluginError: naming the plugin, for any exception that is not an `InputError`.

        """
        caller: pluggy.HookCaller = getattr(self._pm.hook, hook)
        for implementation in caller.get_hookimpls():
            name = implementation.plugin_name
            values = [arguments[argument] for argument in implementation.argnames]
            try:
                result = implementation.function(*values)
                # a generator runs here, so that its exceptions are this plugin's
                yield name, list(result) if inspect.isgenerator(result) else result
            except (InputError, PluginError):
                raise
            except Exception as error:
                raise PluginError(f"plugin {name}: {hook}: {type(error).__name__}: {error}") from error

    def failed(self) -> Iterable[PluginRecord]:
        """Plugins that were skipped because they are broken."""
        return [record for record in self.records.values() if record.status == "failed"]


def _builtin_name(module: str) -> str:
    return module.removeprefix("mortice.plugins.").removesuffix(".plugin").replace(".", "-")
