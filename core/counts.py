"""Numbers of things in messages: ``1 token``, ``2 tokens``."""

from __future__ import annotations

__all__ = ["counted"]


def counted(count: int, one: str, more: str = "") -> str:
    """A number with what it counts; `more` is for what has no plural in -s: ``counted(n, "byte is", "bytes are")``."""
    return f"{count} {one if count == 1 else more or f'{one}s'}"
