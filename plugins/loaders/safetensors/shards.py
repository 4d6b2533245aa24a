"""Which safetensors files a folder's weights lie in: one, or those that an index names."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from mortice.core.errors import ModelFileError
from mortice.plugins.loaders.safetensors.files import quoted, read_json
from mortice.plugins.loaders.safetensors.folder import INDEX, SINGLE
from mortice.plugins.loaders.safetensors.header import Header

__all__ = ["check_index", "weight_files"]

_MAX_FILES = 4096


def weight_files(folder: Path) -> tuple[tuple[Path, ...], Mapping[str, str] | None]:
    """The files with the weights in the order the index names them, and its map from tensor to file name.

    The map is None when there is one file and so no index. Names of the index are those of files in the folder itself:
    nothing else is opened, whatever it says. (A file there may be a link, as in a hub's cache.)

    Raises:
        ModelFileError: when there are no weights, the index is broken, or a file it names is missing.

    """
    if (folder / SINGLE).exists():
        return (folder / SINGLE,), None
    index = folder / INDEX
    if not index.exists():
        raise ModelFileError(folder, f"has neither {SINGLE} nor {INDEX}")
    found = read_json(index).object("weight_map")
    if found is None:
        raise ModelFileError(index, "weight_map: missing or empty, wanted an object from tensor to file name")
    for tensor, name in found.values.items():
        if not isinstance(name, str) or not _is_plain(name):
            message = f"weight_map: {quoted(tensor)} is in {quoted(name)}, wanted the name of a .safetensors file"
            raise ModelFileError(index, f"{message} in the same folder")
    names = tuple(dict.fromkeys(found.values.values()))
    if len(names) > _MAX_FILES:
        raise ModelFileError(index, f"weight_map: {len(names)} files, at most {_MAX_FILES} are read")
    missing = [name for name in names if not (folder / name).exists()]
    if missing:
        more = f", and {len(missing) - 1} more of its {len(names)} files" if len(missing) > 1 else ""
        raise ModelFileError(folder / missing[0], f"is missing{more}; {INDEX} names it")
    return tuple(folder / name for name in names), found.values


def _is_plain(name: str) -> bool:
    return name.endswith(".safetensors") and not set(name) & set("/\\\0") and not name.startswith(".")


def check_index(folder: Path, headers: Sequence[Header], weight_map: Mapping[str, str]) -> None:
    """Hold the index against what is in the files.

    Raises:
        ModelFileError: naming the first tensor that is not where the index has it, or that it does not have.

    """
    owners: dict[str, str] = {}
    for header in headers:
        for entry in header.entries:
            other = owners.setdefault(entry.name, header.path.name)
            if other != header.path.name:
                raise ModelFileError(header.path, f"tensor {quoted(entry.name)} is in {other} too")
    for name, file in weight_map.items():
        found = owners.get(name)
        if found != file:
            where = "is in no file" if found is None else f"is in {found}"
            raise ModelFileError(folder / INDEX, f"weight_map: {quoted(name)} should be in {file}, it {where}")
    extra = next((name for name in owners if name not in weight_map), None)
    if extra is not None:
        raise ModelFileError(folder / owners[extra], f"tensor {quoted(extra)} is not in {INDEX}")
