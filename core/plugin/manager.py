"""Finds plugins and keeps their faults apart: an installed one that is broken is named and skipped, not fatal.

A manager is made for each run; there is no global one. Built-ins come first and through the same hooks, but no result
depends on the order: where two plugins could answer, the registry asks all of them.
"""

from __future__ import annotations

import difflib
import importlib
import inspect
import logging
import shlex
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, redirect_stdout
from functools import partial
from importlib import metadata
from itertools import groupby
from types import MappingProxyType
from typing import Any, Literal

import pluggy
from attrs import define, field, frozen

from mortice.core.errors import ConfigError, MorticeError, PluginError
from mortice.core.plugin.conformance import describe, elements, hook_faults, naming
from mortice.core.plugin.hookspecs import CONTRACT_VERSION, PROJECT, HookSpecs
from mortice.core.version import __version__

__all__ = ["BUILTIN_PLUGINS", "PluginManager", "PluginPolicy", "PluginRecord", "builtin_name"]

BUILTIN_PLUGINS = (
    "mortice.plugins.loaders.gguf.plugin",
    "mortice.plugins.loaders.safetensors.plugin",
    "mortice.plugins.archs",
    "mortice.plugins.qtypes",
    "mortice.plugins.uploads.device",
    "mortice.plugins.uploads.host",
    "mortice.plugins.executors.cuda",
    "mortice.plugins.executors.reference",
)
"""Modules with hooks, imported like those of third parties."""


_LOG = logging.getLogger("mortice.plugins")
"""Says which plugins were skipped. Unless the program configures logging, Python prints that to standard error."""


@frozen(kw_only=True)
class PluginPolicy:
    """Which plugins may take part.

    Attributes:
        allow: if not empty, only these besides the built-ins; one that is missing or broken is an error.
        block: never these; a built-in may be blocked too. A name that is not installed is logged, not refused, so that
            one config serves several machines.
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
        distribution: the installed package and its version, ``mortice`` for built-ins, empty for a given object.
        version: of the package; of mortice for built-ins, empty for a given object.
        contract_version: the version of the hooks it says it was written for; None where it does not say.
        status: whether it takes part.
        error: why not, in one line.
        import_seconds: what importing it took.

    """

    name: str
    source: Literal["builtin", "entry point", "given"]
    distribution: str
    version: str = ""
    contract_version: int | None = None
    status: Literal["active", "blocked", "failed"] = "active"
    error: str = ""
    import_seconds: float = 0.0

    @property
    def origin(self) -> str:
        """The plugin and where it came from, as errors name it."""
        return f"plugin {self.name} ({self.distribution or self.source})"


@define(eq=False)
class PluginManager:
    """Registers plugins and calls their hooks, remembering which plugin said what.

    Attributes:
        policy: which plugins may take part.
        lenient: keep in `refusals` what would otherwise be raised, to look at what there is.
        unfit: installed plugins that must not be imported, by name, with the reason.
        records: what became of each plugin.
        refusals: what a manager that is not lenient would have raised.

    """

    policy: PluginPolicy = PluginPolicy()
    lenient: bool = False
    unfit: Mapping[str, str] = MappingProxyType({})
    records: dict[str, PluginRecord] = field(factory=dict, init=False)
    refusals: list[MorticeError] = field(factory=list, init=False)
    _pm: pluggy.PluginManager = field(init=False)

    def __attrs_post_init__(self) -> None:
        self._pm = pluggy.PluginManager(PROJECT)
        self._pm.add_hookspecs(HookSpecs)

    @classmethod
    def create(
        cls,
        policy: PluginPolicy | None = None,
        given: Sequence[tuple[str, object]] = (),
        *,
        lenient: bool = False,
        unfit: Mapping[str, str] = MappingProxyType({}),
    ) -> PluginManager:
        """A manager with the built-ins, the installed plugins the policy lets in, and `given` (name, plugin) pairs.

        A lenient one keeps in `refusals` what is listed here; `unfit` is as in the attributes.

        Raises:
            ConfigError: when the policy allows and blocks the same plugin.
            PluginError: when a plugin the policy asks for is missing or broken, any is broken and the policy is strict,
                or a given one is broken or has a name that is taken.

        """
        manager = cls(policy or PluginPolicy(), lenient, unfit)
        for module in BUILTIN_PLUGINS:
            record = PluginRecord(
                name=builtin_name(module), source="builtin", distribution="mortice", version=__version__
            )
            manager._admit(record, partial(importlib.import_module, module))
        if manager.policy.entry_points:
            manager._admit_entry_points()
        for name, plugin in given:
            if name in manager.records:
                raise PluginError(f"a plugin is given as {name!r}, which {manager.origin(name)} is named already")
            manager._admit(PluginRecord(name=name, source="given", distribution=""), partial(_itself, plugin))
        manager._check_policy()
        return manager

    def _admit_entry_points(self) -> None:
        points = sorted(metadata.entry_points(group=PROJECT), key=lambda point: point.name)
        for name, same in groupby(points, key=lambda point: point.name):
            group = list(same)
            distributions = " and ".join(sorted(map(_distribution, group)))
            load: Callable[[], object] = group[0].load
            if name in self.unfit:
                load = partial(_refuse, self.unfit[name])
            if name in self.records:
                load = partial(_refuse, f"a built-in plugin is named {name!r}; the package has to choose another name")
                name = f"{name} of {distributions}"
            elif len(group) > 1:
                load = partial(_refuse, f"each of them announces a plugin {name!r}; uninstall one")
            version = group[0].dist.version if len(group) == 1 and group[0].dist is not None else ""
            record = PluginRecord(name=name, source="entry point", distribution=distributions, version=version)
            self._admit(record, load)

    def _admit(self, record: PluginRecord, load: Callable[[], object]) -> None:
        name, policy = record.name, self.policy
        self.records[name] = record
        if name in policy.block:
            record.status, record.error = "blocked", "in plugins.block"
            return
        if record.source == "entry point" and policy.allow and name not in policy.allow:
            record.status, record.error = "blocked", "not in plugins.allow"
            return
        started = time.perf_counter()
        try:
            with redirect_stdout(sys.stderr):  # standard output is for results; what a package prints is none
                self._register(name, load())
        except KeyboardInterrupt as error:
            if record.source != "builtin":
                error.add_note(f"while {record.origin} was imported")
            raise
        except BaseException as error:  # noqa: BLE001 (SystemExit or a compiled extension's panic is no Exception)
            fault = PluginError(f"{record.origin}: {describe(error)}")
            fault.__cause__ = error
            self.exclude(name, describe(error), fault)
        finally:
            record.import_seconds = time.perf_counter() - started

    def _register(self, name: str, plugin: object) -> None:
        """Check a plugin and let it in, or raise and leave the manager as it was."""
        if inspect.isclass(plugin):
            plugin = plugin()
        version = getattr(plugin, "mortice_contract_version", None)
        if name in self.records:
            self.records[name].contract_version = version if isinstance(version, int) else None
        if version not in (None, CONTRACT_VERSION):
            raise PluginError(f"written for hook contract {version!r}, this mortice has {CONTRACT_VERSION}")
        twin = self._pm.get_name(plugin)
        if twin is not None:
            raise PluginError(f"the same object is {self.origin(twin)} already")
        faults = list(hook_faults(plugin, partial(self._pm.parse_hookimpl_opts, plugin)))
        if faults:
            raise PluginError("; ".join(faults))
        self._pm.register(plugin, name=name)
        try:
            self._pm.check_pending()  # hook_faults has said it better; this is pluggy's own word
        except Exception:
            self._pm.unregister(plugin)
            raise

    def exclude(self, plugin: str, reason: str, fault: MorticeError, *, wanted: bool = False) -> None:
        """Take a broken plugin out as a whole and log it, or raise `fault` when it has to be there.

        Args:
            plugin: its name.
            reason: what is wrong, in one line.
            fault: raised for a built-in or given plugin, one that the policy allows by name, or under a strict policy.
            wanted: whether the run asks for it in another way.

        """
        record = self.records[plugin]
        record.status, record.error = "failed", reason
        if self._pm.has_plugin(plugin):
            self._pm.unregister(name=plugin)
        if wanted or record.source != "entry point" or plugin in self.policy.allow:
            self.refuse(fault)
            return
        advice = f"--block-plugin {shlex.quote(plugin)} (plugins.block) leaves it out"
        if self.policy.strict:
            fault.add_note(advice)
            self.refuse(fault)
            return
        _LOG.warning("%s is skipped: %s; %s", record.origin, reason, advice)

    def refuse(self, fault: MorticeError) -> None:
        """Raise `fault`, or keep it where the manager is lenient."""
        if not self.lenient:
            raise fault
        self.refusals.append(fault)

    def _check_policy(self) -> None:
        installed = [record.name for record in self.records.values() if record.source != "builtin"]
        for name in self.policy.allow:
            if name in self.policy.block:
                self.refuse(ConfigError(f"plugins.allow and plugins.block both name {name!r}"))
            if name not in self.records:
                have = ", ".join(installed) or "none"
                self.refuse(PluginError(f"plugins.allow: no installed plugin {name!r}; installed are: {have}"))
        for name in self.policy.block:
            if name not in self.records:
                near = difflib.get_close_matches(name, self.records, 1)
                hint = f"; the nearest is {near[0]!r}, which is not blocked" if near else ""
                _LOG.warning("plugins.block: no plugin %r%s", name, hint)

    def origin(self, plugin: str) -> str:
        """A plugin and the distribution it came with, as errors name them."""
        return self.records[plugin].origin

    def naming(self, plugin: str, doing: str) -> AbstractContextManager[None]:
        """Make whatever goes wrong inside name the plugin; see `conformance.naming`."""
        record = self.records[plugin]
        return naming(record.origin, doing, note=record.source != "builtin")

    def plugin(self, name: str) -> object:
        """An active plugin itself: a module or an object; None for any other name."""
        return self._pm.get_plugin(name)

    def has(self, plugin: str, hook: str) -> bool:
        """Whether an active plugin implements a hook."""
        return any(implementation.plugin_name == plugin for implementation in self._implementations(hook))

    def call(self, hook: str, *, only: str | None = None, **arguments: Any) -> Iterator[tuple[str, Any]]:
        """Call `hook` on every plugin that has it, or on the plugin `only`.

        Yields:
            The plugin's name and what it returned; an iterator is gone through first, so that what it raises is the
            plugin's.

        Raises:
            MorticeError: as a plugin raised it, with a note that names the plugin unless it is a built-in.
            PluginError: naming the plugin, for any other exception.

        """
        for implementation in self._implementations(hook):
            name = implementation.plugin_name
            if only is not None and name != only:
                continue
            values = [arguments[argument] for argument in implementation.argnames]
            with self.naming(name, hook):
                result = implementation.function(*values)
                if isinstance(result, Iterator):
                    result = list(result)
            yield name, result

    def gather(
        self, hook: str, faults: Callable[[object], Iterator[str]], *, only: str | None = None, **arguments: Any
    ) -> Iterator[tuple[str, Any]]:
        """Call a hook that gives several things, and check each.

        Yields:
            The plugin's name and one thing it gave.

        Raises:
            PluginError: naming the plugin, for a result that is not a collection or has `faults`.

        """
        for plugin, result in self.call(hook, only=only, **arguments):
            with self.naming(plugin, hook):
                values = elements(result)
            if values is None:
                wanted = inspect.signature(getattr(HookSpecs, hook)).return_annotation
                raise PluginError(f"{self.origin(plugin)}: {hook}: returned {type(result).__name__}, wanted {wanted}")
            for value in values:
                self.require(plugin, hook, faults(value))
                yield plugin, value

    def require(self, plugin: str, hook: str, faults: Iterator[str]) -> None:
        """Raise a PluginError that names the plugin and lists `faults`, if there are any."""
        with self.naming(plugin, hook):  # a check looks into the plugin's objects, which may raise
            found = list(faults)
        if found:
            raise PluginError(f"{self.origin(plugin)}: {hook}: {'; '.join(found)}")

    def failed(self) -> list[PluginRecord]:
        """Plugins that were skipped because they are broken."""
        return [record for record in self.records.values() if record.status == "failed"]

    def absent(self) -> str:
        """What to add to "there is no such thing": the plugins that could not give it, or nothing."""
        gone = [record for record in self.records.values() if record.status != "active"]
        return "".join(f"; {record.origin} is {record.status}: {record.error}" for record in gone)

    def _implementations(self, hook: str) -> list[pluggy.HookImpl]:
        caller: pluggy.HookCaller = getattr(self._pm.hook, hook)
        return caller.get_hookimpls()


def builtin_name(module: str) -> str:
    """The name of a built-in plugin: its module's last parts."""
    return module.removeprefix("mortice.plugins.").removesuffix(".plugin").replace(".", "-")


def _itself(plugin: object) -> object:
    return plugin


def _refuse(message: str) -> object:
    raise PluginError(message)


def _distribution(point: metadata.EntryPoint) -> str:
    return f"{point.dist.name} {point.dist.version}" if point.dist is not None else "unknown distribution"
