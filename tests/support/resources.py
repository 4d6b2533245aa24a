"""What this process holds: open files, and resident bytes of mapped files."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path


def open_files(folder: Path) -> int:
    """Number of descriptors of files in a folder; what other tests left open may be closed at any time."""
    found = 0
    for descriptor in Path("/proc/self/fd").iterdir():
        with suppress(FileNotFoundError):  # closed meanwhile
            found += descriptor.readlink().is_relative_to(folder)
    return found


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
