"""Choose the CUDA extra that suits this machine's NVIDIA driver, if there is one."""

from __future__ import annotations

import ctypes
import re
import shutil
import subprocess
from pathlib import Path
from typing import NamedTuple

# The oldest Linux driver for each CUDA family: CUDA release notes, table "minor version compatibility".
OLDEST_DRIVER = {"cuda13": 580, "cuda12": 525}
NO_GPU = "no NVIDIA GPU found, so the CPU is used"


class Choice(NamedTuple):
    """An extra of the package, or none, and the reason to show."""

    extra: str | None
    reason: str


def choose(setting: str) -> Choice:
    """Answer for `setting`: auto, none, 12 or 13.

    Raises:
        ValueError: `setting` is none of these.

    """
    if setting == "none":
        return Choice(None, "CUDA=none, so the CPU is used")
    if setting in {"12", "13"}:
        return Choice(f"cuda{setting}", f"CUDA={setting} asks for it")
    if setting != "auto":
        raise ValueError(f"CUDA={setting}: must be auto, none, 12 or 13")
    return _from_nvidia_smi() or _from_libcuda() or _without_driver()


def for_driver(version: str) -> Choice:
    """Answer for a driver whose version reads like ``580.65.06``."""
    release = int(version.split(".", maxsplit=1)[0])
    for extra, oldest in OLDEST_DRIVER.items():
        if release >= oldest:
            return Choice(extra, f"NVIDIA driver {version} (CUDA {extra[-2:]} needs {oldest} or newer)")
    oldest = min(OLDEST_DRIVER.values())
    return Choice(None, f"NVIDIA driver {version} is older than {oldest}, so the CPU is used")


def for_cuda_version(version: int) -> Choice:
    """Answer for what ``cuDriverGetVersion`` gives: 1000 * major + 10 * minor."""
    major, minor = version // 1000, version % 1000 // 10
    for extra in OLDEST_DRIVER:
        if major >= int(extra[-2:]):
            return Choice(extra, f"the NVIDIA driver serves CUDA {major}.{minor}")
    return Choice(None, f"the NVIDIA driver serves only CUDA {major}.{minor}, so the CPU is used")


def _from_nvidia_smi() -> Choice | None:
    command = shutil.which("nvidia-smi")
    if command is None:
        return None
    query = [command, "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        answer = subprocess.run(query, capture_output=True, text=True, timeout=60, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    version = answer.stdout.strip().split("\n")[0].strip()
    if answer.returncode != 0 or not re.fullmatch(r"\d+(\.\d+)+", version):
        return None
    return for_driver(version)


def _from_libcuda() -> Choice | None:
    try:
        libcuda = ctypes.CDLL("libcuda.so.1")
        version, count = ctypes.c_int(), ctypes.c_int()
        failed = (
            libcuda.cuInit(0)
            or libcuda.cuDeviceGetCount(ctypes.byref(count))
            or libcuda.cuDriverGetVersion(ctypes.byref(version))
        )
    except (OSError, AttributeError):
        return None
    return None if failed or count.value == 0 else for_cuda_version(version.value)


def _without_driver() -> Choice:
    if Path("/dev/nvidiactl").exists():
        return Choice(None, "/dev/nvidiactl exists but no NVIDIA driver answers, so the CPU is used")
    return Choice(None, NO_GPU)
