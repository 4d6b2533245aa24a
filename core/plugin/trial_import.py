"""Finds plugins that end the process when they are imported or asked what they give, by doing so in another one."""

from __future__ import annotations

import signal
import subprocess
import sys
from importlib import metadata

from mortice.core.plugin.hookspecs import PROJECT
from mortice.core.plugin.manager import PluginPolicy

__all__ = ["fatal_plugins"]

_CHILD = """
import os, sys
from importlib import metadata
group, path, names = {group!r}, {path!r}, {names!r}
sys.path[:] = path
say = os.dup(1)
os.dup2(2, 1)
from mortice.core.plugin.manager import PluginPolicy
from mortice.core.plugin.registry import survey
points = {{point.name: point for point in metadata.entry_points(group=group)}}
for name in names:
    os.write(say, name.encode() + b"\\n")
    try:
        points[name].load()
        os.write(say, name.encode() + b"\\t\\n")
        survey(PluginPolicy(allow=(name,)))
    except BaseException:
        pass
os.write(say, b"\\n")
os._exit(0)
"""
"""Says the name of each plugin before it imports it, the name and a tab before it asks what it gives, and an empty line
in the end."""


def fatal_plugins(policy: PluginPolicy) -> dict[str, str]:
    """Installed plugins that end the process when they are imported or asked what they give, each with how.

    ``os._exit`` and a crash of a compiled extension cannot be caught where they happen, and whoever is there then can
    name nobody. Takes the time of importing the plugins that the policy lets in once more; nothing where none is
    installed.
    """
    names = sorted({point.name for point in metadata.entry_points(group=PROJECT)})
    names = [name for name in names if name not in policy.block and (not policy.allow or name in policy.allow)]
    fatal: dict[str, str] = {}
    while names:
        code = _CHILD.format(group=PROJECT, path=sys.path, names=names)
        child = subprocess.run([sys.executable, "-c", code], stdin=subprocess.DEVNULL, capture_output=True, check=False)  # noqa: S603 (no shell)
        last = child.stdout.decode(errors="replace").splitlines()[-1:]
        if last == [""] or not last:  # it went through, or could not even begin
            break
        name, asked, _ = last[0].partition("\t")
        doing = "asking what it gives" if asked else "importing it"
        fatal[name] = f"{doing} ends the process ({_how(child.returncode)})"
        names = names[names.index(name) + 1 :]
    return fatal


def _how(returncode: int) -> str:
    if returncode >= 0:
        return f"exit code {returncode}"
    try:
        return signal.Signals(-returncode).name
    except ValueError:
        return f"signal {-returncode}"
