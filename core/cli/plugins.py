"""``mortice plugins list`` and ``show``: what is installed and what it gives."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter

from mortice.core.cli.flags import CommonFlags
from mortice.core.cli.render import Screen, printable
from mortice.core.counts import counted
from mortice.core.errors import ConfigError

if TYPE_CHECKING:
    from mortice.core.plugin.manager import PluginRecord
    from mortice.core.plugin.registry import Conflict, Registry

__all__ = ["PluginName", "list_plugins", "record_of", "refusals", "show_plugin", "surveyed"]

PluginName = Annotated[str, Parameter(help="A plugin, as `mortice plugins list` names it.")]

_MOST_SHOWN = 64
"""Characters of a name that no plugin has."""


def list_plugins(*, common: CommonFlags | None = None) -> int:
    """List every plugin: what it gives, its version and that of the hooks it was written for, how long importing took.

    Broken plugins and conflicts are listed too; the exit code is 2 when a broken one was asked for, or with
    ``--strict-plugins``.
    """
    common = common or CommonFlags()
    screen = common.screen()
    registry, strict = surveyed(common)
    found = [_describe(registry, record) for record in registry.manager.records.values()]
    names = {architecture: given.value.name for architecture, given in registry.contracts.items()}
    screen.result(found)
    screen.table(
        ("plugin", "from", "status", ">hooks", ">import", "gives"),
        [
            (
                plugin["name"],
                _origin(plugin),
                plugin["status"],
                _contract_version(plugin),
                f"{plugin['import_ms']:.0f} ms",
                printable(plugin["error"]) or printable(_gives_text(plugin, names)),
            )
            for plugin in found
        ],
    )
    return refusals(registry, screen, strict=strict)


def show_plugin(
    name: PluginName,
    /,
    *,
    common: CommonFlags | None = None,
) -> int:
    """Show one plugin: every thing it gives with its details, its hooks, and where it conflicts with others."""
    common = common or CommonFlags()
    screen = common.screen()
    registry, _ = surveyed(common)
    record = record_of(registry, name)
    found = {**_describe(registry, record), "details": _details(registry, name), "file": _file(registry, name)}
    screen.result(found)
    for what, text in (
        ("plugin", name),
        ("from", _origin(found)),
        ("version", found["version"] or "none"),
        ("file", found["file"] or "not imported"),
        ("status", f"{found['status']}: {found['error']}" if found["error"] else found["status"]),
        ("hooks version", _contract_version(found)),
        ("import", f"{found['import_ms']:.1f} ms"),
        ("hooks", ", ".join(found["hooks"]) or "none"),
    ):
        screen.say(f"{what:<14}{printable(text)}")
    if found["details"]:
        screen.say()
        rows = [(kind, key, text) for kind, things in found["details"].items() for key, text in things.items()]
        screen.table(("kind", "key", "what"), [tuple(map(printable, row)) for row in rows])
    for key, others in found["conflicts"].items():
        screen.warn(f"conflict: {key} is given by {', '.join(others)} too")
    return 2 if record.status == "failed" else 0


def surveyed(common: CommonFlags) -> tuple[Registry, bool]:
    """All plugins, broken and conflicting ones included, and whether the config is strict."""
    from mortice.core.plugin.manager import PluginPolicy
    from mortice.core.plugin.registry import survey
    from mortice.core.plugin.trial_import import fatal_plugins

    wanted = common.settings().config.plugins
    policy = PluginPolicy(allow=wanted.allow, block=wanted.block)
    registry = survey(policy, prefer=wanted.prefer, unfit=fatal_plugins(policy))
    with TemporaryDirectory(prefix="mortice-probe-", ignore_cleanup_errors=True) as folder:
        registry.conflicts += tuple(_loader_conflicts(registry, Path(folder)))
    return registry, wanted.strict


def _loader_conflicts(registry: Registry, folder: Path) -> Iterator[Conflict]:
    """Which loaders take the same, as far as small files tell."""
    loaders = [name for name in registry.manager.records if registry.manager.has(name, "mortice_open_model")]
    if all(registry.manager.records[name].source == "builtin" for name in loaders):
        return  # they leave each other's files alone
    from mortice.core.testing.probe_files import probe_files

    for path in probe_files(folder):
        conflict = registry.loader_conflict(path)
        if conflict is not None:
            yield conflict


def refusals(registry: Registry, screen: Screen, *, strict: bool) -> int:
    """Say what a run with this config would be refused for; the exit code."""
    for conflict in registry.conflicts:
        screen.warn(printable(conflict.message))
    for refusal in registry.manager.refusals:
        screen.warn(printable(str(refusal)))
    refused = registry.manager.refusals or (strict and (registry.conflicts or registry.manager.failed()))
    return 2 if refused else 0


def record_of(registry: Registry, name: str) -> PluginRecord:
    """A plugin's record; ConfigError names those there are."""
    record = registry.manager.records.get(name)
    if record is None:
        shown = name if len(name) <= _MOST_SHOWN else name[:_MOST_SHOWN] + "…"
        raise ConfigError(f"plugins: no plugin {shown!r}; have {', '.join(sorted(registry.manager.records))}")
    return record


def _describe(registry: Registry, record: PluginRecord) -> dict[str, Any]:
    from mortice.core.plugin.hookspecs import CONTRACT_VERSION, HookSpecs

    hooks = [name for name in dir(HookSpecs) if name.startswith("mortice_") and registry.manager.has(record.name, name)]
    gives: dict[str, list[str]] = {
        kind: [key for key, provided in table.items() if provided.plugin == record.name]
        for kind, table in _tables(registry).items()
    }
    if "mortice_open_model" in hooks:
        gives["loaders"] = [record.name]
    return {
        "name": record.name,
        "source": record.source,
        "distribution": record.distribution,
        "version": record.version,
        "contract_version": CONTRACT_VERSION if record.source == "builtin" else record.contract_version,
        "status": record.status,
        "error": record.error,
        "import_ms": round(1000 * record.import_seconds, 3),
        "hooks": hooks,
        "gives": {kind: keys for kind, keys in gives.items() if keys},
        "conflicts": {
            conflict.key: [name for name in conflict.plugins if name != record.name]
            for conflict in registry.conflicts
            if record.name in conflict.plugins
        },
    }


def _tables(registry: Registry) -> dict[str, Any]:
    return {
        "contracts": registry.contracts,
        "qtypes": registry.qtypes,
        "uploads": registry.uploads,
        "executors": registry.executors,
    }


def _details(registry: Registry, plugin: str) -> dict[str, dict[str, str]]:
    """What a plugin gives, by kind and key, each in a few words."""
    texts: dict[str, Callable[[Any], str]] = {
        "contracts": lambda value: f"{value.name}: {value.description or 'no description'}",
        "qtypes": _qtype_text,
        "uploads": lambda value: f"fills {value.device_kind} memory",
        "executors": lambda value: f"uploads with {value.default_upload()}",
    }
    found = {
        kind: {key: texts[kind](provided.value) for key, provided in table.items() if provided.plugin == plugin}
        for kind, table in _tables(registry).items()
    }
    return {kind: things for kind, things in found.items() if things}


def _qtype_text(value: Any) -> str:
    qtype = value.qtype
    parts = [f"id {qtype.id}", f"{counted(qtype.block_elements, 'element')} in {counted(qtype.block_bytes, 'byte')}"]
    parts += [f"{qtype.bits_per_weight:.2f} bits a weight", "CUDA header" if value.traits else "reference only"]
    return ", ".join([*parts, *(["quantises"] if value.quantize else [])])


def _file(registry: Registry, plugin: str) -> str:
    found = registry.manager.plugin(plugin)
    if found is None:
        return ""
    try:
        return inspect.getfile(found if inspect.ismodule(found) else type(found))
    except (TypeError, OSError):
        return ""


def _origin(plugin: dict[str, Any]) -> str:
    """The distribution with its version; a package's record has both already."""
    if plugin["source"] == "builtin":
        return f"{plugin['distribution']} {plugin['version']}"
    return plugin["distribution"] or str(plugin["source"])


def _contract_version(plugin: dict[str, Any]) -> str:
    version = plugin["contract_version"]
    return "not said" if version is None else str(version)


def _gives_text(plugin: dict[str, Any], names: Mapping[str, str]) -> str:
    """What it gives, and with whom it conflicts; `names` are those of the contracts, by architecture."""
    gives = [
        f"{kind}: "
        + ", ".join(key if kind != "contracts" or names[key] == key else f"{names[key]} ({key})" for key in keys)
        for kind, keys in plugin["gives"].items()
    ]
    conflicts = [f"conflict: {key} with {', '.join(others)}" for key, others in plugin["conflicts"].items()]
    return "; ".join(gives + conflicts)
