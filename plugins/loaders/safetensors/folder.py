"""Which paths stand for a Hugging Face folder: told by names alone, since every loader is asked about every path."""

from __future__ import annotations

from pathlib import Path

__all__ = ["CONFIG", "INDEX", "SINGLE", "model_folder"]

CONFIG = "config.json"
SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"


def model_folder(path: Path) -> Path | None:
    """The folder that a path stands for; None for a path of another kind."""
    if path.is_dir():
        return path if any((path / name).exists() for name in (CONFIG, SINGLE, INDEX)) else None
    return path.parent if path.suffix.lower() == ".safetensors" or path.name == INDEX else None
