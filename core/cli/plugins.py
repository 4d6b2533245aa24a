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
    """List every plugin: what it gives, where it comes from, whether it takes part, how long importing it took."""
    from mortice.core.stages import registry_for

    output = output or OutputFlags()
    screen = Screen(json=output.json, quiet=output.quiet)
    registry = registry_for(settings(config, plugins, any_key).config)
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
                printable(plugin["error"]) or _gives_text(plugin["gives"]),
            )
            for plugin in found
        ],
    )
    return 0


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
    }


def _gives_text(gives: dict[str, list[str]]) -> str:
    return "; ".join(f"{kind}: {', '.join(keys)}" for kind, keys in gives.items())
