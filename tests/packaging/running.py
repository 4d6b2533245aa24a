"""Run commands apart from this checkout and from the settings of whoever runs the tests."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
OFFLINE_PIP = {"PIP_NO_INDEX": "1", "PIP_NO_INPUT": "1", "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
SETTINGS = ("MAKE", "MORTICE_", "PIP_", "PYTEST_", "PYTHON")
NAMES = {"VENV", "CUDA", "PROMPT", "MODEL", "RUNFLAGS", "MFLAGS", "VIRTUAL_ENV"}


def clean_environment(changes: Mapping[str, str]) -> dict[str, str]:
    """The environment without settings that steer pip, Python, make or mortice, and with `changes`."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(SETTINGS) and k not in NAMES}
    return {**kept, **OFFLINE_PIP, **changes}


def attempt(command: Sequence[str | Path], cwd: Path, **changes: str) -> subprocess.CompletedProcess[str]:
    """Run `command` to its end, whatever that is; both output streams are in ``stdout``."""
    return subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env=clean_environment(changes),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )


def run(command: Sequence[str | Path], cwd: Path, **changes: str) -> str:
    """Run `command`, fail the test where it fails; returns what it printed."""
    done = attempt(command, cwd, **changes)
    assert done.returncode == 0, f"{command}: exit code {done.returncode}\n{done.stdout}"
    return done.stdout
