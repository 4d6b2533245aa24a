"""The hook of the safetensors loader."""

from __future__ import annotations

from pathlib import Path

from mortice.core.model.types import LoadOptions, ModelFile
from mortice.core.plugin.hookspecs import hookimpl
from mortice.plugins.loaders.safetensors.folder import model_folder


@hookimpl
def mortice_open_model(path: Path, options: LoadOptions) -> ModelFile | None:
    """A Hugging Face folder, or the ``.safetensors`` file in it."""
    if model_folder(path) is None:
        return None
    from mortice.plugins.loaders.safetensors.loader import open_folder

    return open_folder(path, options)
