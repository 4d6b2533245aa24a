"""``mortice plugins check``: holds a plugin against the conformance suites that apply to what it gives."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter

from mortice.core.cli.flags import CommonFlags
from mortice.core.cli.plugins import PluginName, record_of, surveyed
from mortice.core.cli.render import Screen, printable
from mortice.core.errors import ConfigError
from mortice.core.text_file import oddity

if TYPE_CHECKING:
    from mortice.core.plugin.registry import Registry

__all__ = ["check_plugin"]


def check_plugin(
    name: PluginName,
    /,
    *,
    sample: Annotated[
        Path | None, Parameter(help="A good file of the format, for a loader; copies of it are damaged.")
    ] = None,
    common: CommonFlags | None = None,
) -> int:
    """Check that what a plugin gives keeps its promises: the suites of mortice.core.testing, without pytest.

    The exit code is 2 when a check fails. What cannot be checked here (no GPU, no compiler, no sample) is said.
    """
    common = common or CommonFlags()
    screen = common.screen()
    if sample is not None:
        sample = sample.resolve()  # its name, which the copies get, is then one
        if not sample.exists():
            raise ConfigError(f"--sample: {sample}: no such file or folder")
        if not (sample.is_file() or sample.is_dir()):  # a device would be copied without end
            raise ConfigError(f"--sample: {sample}: wanted a regular file or a folder{oddity(sample)}")
    registry, _ = surveyed(common)
    record = record_of(registry, name)
    if record.status != "active":
        found: list[dict[str, Any]] = [
            {"about": "plugin", "check": "it takes part", "status": "failed", "message": record.error, "seconds": 0.0}
        ]
    else:
        found = [*_conflicts(registry, name), *_checked(registry, name, sample, screen)]
    counts = Counter(check["status"] for check in found)
    screen.result({"plugin": name, "passed": not counts["failed"], "checks": found})
    for status in ("skipped", "failed"):
        for line in _lines([check for check in found if check["status"] == status]):
            screen.say(f"{status}: {line}")
    screen.say(f"{name}: {counts['passed']} passed, {counts['failed']} failed, {counts['skipped']} skipped")
    return 2 if counts["failed"] else 0


def _checked(registry: Registry, name: str, sample: Path | None, screen: Screen) -> list[dict[str, Any]]:
    from mortice.core.testing.plugin_suite import suites_of
    from mortice.core.testing.suite import outcomes

    found: list[dict[str, Any]] = []
    for about, suite in suites_of(registry, name, sample):
        screen.note(f"checking {about}")
        found += [
            {
                "about": about,
                "check": outcome.check,
                "status": outcome.status,
                "message": outcome.message,
                "seconds": round(outcome.seconds, 3),
            }
            for outcome in outcomes(suite)
        ]
    return found


def _conflicts(registry: Registry, name: str) -> list[dict[str, Any]]:
    """A failed check for each thing that another plugin gives, too: every run is refused until one is chosen."""
    return [
        {
            "about": "plugin",
            "check": "no other plugin gives the same",
            "status": "failed",
            "message": conflict.message,
            "seconds": 0.0,
        }
        for conflict in registry.conflicts
        if name in conflict.plugins
    ]


def _lines(checks: list[dict[str, Any]]) -> list[str]:
    """One line for each message of a thing: what several checks say is said once."""
    together: dict[tuple[str, str], list[str]] = {}
    for check in checks:
        together.setdefault((check["about"], check["message"]), []).append(check["check"])
    return [
        printable(f"{about}: {names[0]}" + (f" (and {len(names) - 1} more)" if len(names) > 1 else "") + f": {message}")
        for (about, message), names in together.items()
    ]
