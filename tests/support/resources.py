"""What this process holds: open files, and resident bytes of mapped files."""

from __future__ import annotations

from pathlib import Path


def open_files() -> int:
    """Number of open file descriptors."""
    return sum(1 for _ in Path("/proc/self/fd").iterdir())


def resident_bytes(path: Path) -> int:
    """Bytes of the mappings of `path` that have been brought into memory."""
    total, inside = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        first = line.split(maxsplit=1)[0]
        if not first.endswith(":"):
            inside = line.endswith(str(path))
        elif inside and first == "Rss:":
            total += int(line.split()[1]) * 1024
    return total


def mapped(path: Path) -> bool:
    """Whether `path` is mapped into memory."""
    return any(line.endswith(str(path)) for line in Path("/proc/self/maps").read_text().splitlines())
