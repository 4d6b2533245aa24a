"""The hook of the GGUF loader."""

from __future__ import annotations

from pathlib import Path

from mortice.core.model.types import LoadOptions, ModelFile
from mortice.core.plugin.hookspecs import hookimpl


@hookimpl
def mortice_open_model(path: Path, options: LoadOptions) -> ModelFile | None:
    """GGUF, versions 2 and 3, of either byte order, whole or split."""
    from mortice.plugins.loaders.gguf.loader import open_gguf

    return open_gguf(path, options)
