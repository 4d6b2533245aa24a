"""Ways to damage a file, and what is of no format at all."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np

__all__ = ["DAMAGES", "FOREIGN", "WRONG_CONTENT", "open_files", "spread"]

DAMAGES: Mapping[str, bytes] = {
    "zero": b"\0",
    "ones": b"\xff",
    "a quote": b'"',
    "2^62": (1 << 62).to_bytes(8, "little"),
    "2^40": (1 << 40).to_bytes(8, "little"),
    "-1": b"\xff" * 8,
    "digits": b"99999999",
}
"""What is written over some bytes, by what it is."""

WRONG_CONTENT: Mapping[str, bytes] = {
    "empty": b"",
    "a web page": b"<!DOCTYPE html><html><body>503 Service Unavailable</body></html>\n",
    "zeros": bytes(5000),
    "every byte": bytes(range(256)),
}
"""What a download that went wrong leaves under the right name."""

FOREIGN: Mapping[str, bytes] = {
    "an empty file": b"",
    "a text": b"once upon a time\n" * 20,
    "a page of zeros": bytes(4096),
    "random bytes": np.random.default_rng(1).bytes(4096),
    "a JSON document": b'{"weights": [1, 2, 3]}',
    "a zip archive": b"PK\x03\x04" + bytes(200),
}
"""Content that no loader should take."""


def spread(count: int, most: int, *, dense: int) -> list[int]:
    """Up to about twice `most` places below `count`, ascending; closer together below `dense`, always with the last."""
    near = np.linspace(0, max(min(dense, count) - 1, 0), most).astype(int)
    far = np.linspace(0, max(count - 1, 0), most).astype(int)
    return sorted({*near.tolist(), *far.tolist()}) if count else []


def open_files() -> int:
    """File descriptors of this process; 0 where the system does not tell."""
    folder = Path("/proc/self/fd")
    return sum(1 for _ in folder.iterdir()) if folder.is_dir() else 0
