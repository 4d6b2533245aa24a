"""``mortice plugins``: what is installed and what it gives."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from mortice.core.cli.flags import ConfigFile, ConfigFlags, OutputFlags, PluginFlags, settings
from mortice.core.cli.render import Screen, printable

if TYPE_CHECKING:
    from mortice.core.plugin.manager import PluginRecord
    from mortice.core.plugin.registry import Registry

__all__ = ["list_plugins"]


def list_plugins(
    config: ConfigFile = None,
    plugins: PluginFlags | None = None,
    any_key: ConfigFlags | None = None,
    output: OutputFlags | None = None,
) -> int:
    """List every plugin: what it gives, where it comes from, whether it takes part, how long importing it took.

    Broken plugins and conflicts are listed too; ``--strict-plugins`` makes them a refusal after the list.
    """
    from mortice.core.plugin.manager import PluginPolicy
    from mortice.core.plugin.registry import survey

    output = output or OutputFlags()
    screen = Screen(json=output.json, quiet=output.quiet)
    wanted = settings(config, plugins, any_key).config.plugins
    registry = survey(PluginPolicy(allow=wanted.allow, block=wanted.block), prefer=wanted.prefer)
    found = [_describe(registry, record) for record in registry.manager.records.values()]
    screen.result(found)
    screen.table(
        ("plugin", "from", "status", ">import", "gives"),
        [
            (
                plugin["name"],
                plugin["distribution"] or plugin["source"],
                plugin["status"],
                f"{plugin['import_ms']:.0f} ms",
                printable(plugin["error"]) or printable(_gives_text(plugin)),
            )
            for plugin in found
        ],
    )
    for conflict in registry.conflicts:
        screen.warn(printable(conflict.message))
    return 2 if wanted.strict and (registry.conflicts or registry.manager.failed()) else 0


def _describe(registry: Registry, record: PluginRecord) -> dict[str, Any]:
    from mortice.core.plugin.hookspecs import HookSpecs

    hooks = [name for name in dir(HookSpecs) if name.startswith("mortice_") and registry.manager.has(record.name, name)]
    gives: dict[str, list[str]] = {
        kind: [key for key, provided in table.items() if provided.plugin == record.name]
        for kind, table in (
            ("contracts", registry.contracts),
            ("qtypes", registry.qtypes),
            ("uploads", registry.uploads),
            ("executors", registry.executors),
        )
    }
    if "mortice_open_model" in hooks:
        gives["loaders"] = [record.name]
    return {
        "name": record.name,
        "source": record.source,
        "distribution": record.distribution,
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


def _gives_text(plugin: dict[str, Any]) -> str:
    gives = [f"{kind}: {', '.join(keys)}" for kind, keys in plugin["gives"].items()]
    conflicts = [f"conflict: {key} with {', '.join(others)}" for key, others in plugin["conflicts"].items()]
    return "; ".join(gives + conflicts)
