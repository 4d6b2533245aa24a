"""``mortice validate``: hold files against their contracts."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from mortice.core.cli.findings import COLUMNS, counts_text, finding_rows
from mortice.core.cli.flags import (
    ConfigFile,
    ConfigFlags,
    ContractFlag,
    ModelPath,
    OutputFlags,
    PluginFlags,
    settings,
)
from mortice.core.cli.render import Screen, printable
from mortice.core.errors import MorticeError

if TYPE_CHECKING:
    from mortice.core.plugin.registry import Registry

__all__ = ["validate"]

_REFUSED = 2


def validate(
    file: ModelPath,
    /,
    *files: ModelPath,
    config: ConfigFile = None,
    contract: ContractFlag | None = None,
    plugins: PluginFlags | None = None,
    any_key: ConfigFlags | None = None,
    output: OutputFlags | None = None,
) -> int:
    """Hold model files against their contracts and report everything found.

    No tensor is read. Goes on after a broken file; the exit code is 2 when any file has an error.

    """
    from mortice.core.stages import registry_for

    output = output or OutputFlags()
    screen = Screen(json=output.json, quiet=output.quiet)
    chosen = settings(config, contract, plugins, any_key).config
    registry = registry_for(chosen)
    results = [_validate(screen, registry, path, chosen.model.contract) for path in (file, *files)]
    screen.result(results)
    return 0 if all(result["ok"] for result in results) else _REFUSED


def _validate(screen: Screen, registry: Registry, path: Path, contract: Path | None) -> dict[str, Any]:
    from mortice.core.stages import validate_file

    try:
        report = validate_file(path, contract=contract, registry=registry)
    except MorticeError as error:
        screen.say(f"{printable(str(path))}: refused")
        for line in str(error).splitlines():
            screen.say(f"  {printable(line)}")
        return {
            "path": path,
            "ok": False,
            "error": {"type": type(error).__name__, "message": str(error)},
            "contract": None,
            "findings": [],
        }
    found = report.findings.items
    state = "valid" if report.ok else "not valid"
    screen.say(f"{printable(str(path))}: {state} against contract {report.contract.name}, {counts_text(found)}")
    if found:
        screen.table(COLUMNS, finding_rows(found))
    return {
        "path": path,
        "ok": report.ok,
        "error": None,
        "contract": report.contract.name,
        "findings": [finding.as_dict() for finding in found],
    }
