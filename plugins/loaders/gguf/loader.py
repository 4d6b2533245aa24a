"""Opening a GGUF file: map it, read its header, and hand out views of its tensors."""

from __future__ import annotations

import stat
from contextlib import ExitStack
from mmap import mmap
from pathlib import Path
from types import MappingProxyType

import numpy as np
from attrs import frozen
from numpy.typing import NDArray

from mortice.core.errors import ModelFileError
from mortice.core.model.file_reader import FileReader
from mortice.core.model.mapped_file import map_file
from mortice.core.model.types import LoadOptions, ModelFile, TensorView
from mortice.plugins.loaders.gguf.byteorder import MAX_CONVERTED_BYTES, can_convert, to_little_endian
from mortice.plugins.loaders.gguf.format import MAGIC
from mortice.plugins.loaders.gguf.parser import Header, read_header
from mortice.plugins.loaders.gguf.reader import quoted
from mortice.plugins.loaders.gguf.shards import check_agreement, shard_paths

__all__ = ["open_gguf"]


@frozen
class _Part:
    """A file that is mapped and whose header has been read."""

    mapping: bytes | mmap
    header: Header
    reader: FileReader


def open_gguf(path: Path, options: LoadOptions) -> ModelFile | None:
    """Open a GGUF file, or all shards of a split model when `path` is any one of them.

    The header is read and checked; of tensor data nothing is read, except in a big-endian file, whose data
    are converted (see `byteorder`). Tensor views are views of the mapping. Metadata own their bytes, so they
    outlive `ModelFile.close`, which empties `ModelFile.tensors` and unmaps the files unless a view is still
    referenced.

    Returns:
        The model; or None when the file neither is named ``*.gguf`` nor begins with GGUF's magic.

    Raises:
        ModelFileError: when the file is a GGUF by either sign, and cannot be read or is broken.

    """
    if not _is_ours(path):
        return None
    with ExitStack() as stack:
        opened = _open_part(path, options, stack)
        paths = shard_paths(opened.header)
        parts = [opened if other == path else _open_part(other, options, stack) for other in paths]
        if len(parts) > 1:
            check_agreement([part.header for part in parts])
        tensors: dict[str, TensorView] = {}
        for part in parts:
            tensors.update(_views(part))
        # Views first: a mapping cannot be closed while they refer to it.
        stack.callback(tensors.clear)
        close = stack.pop_all().close
    first = parts[0].header
    return ModelFile(
        path=first.path,
        format="gguf",
        version=str(first.version) if first.order == "<" else f"{first.version} (big-endian)",
        metadata=MappingProxyType(first.metadata),
        metadata_offsets=MappingProxyType(first.offsets),
        tensors=MappingProxyType(tensors),
        files=paths,
        close=close,
    )


def _is_ours(path: Path) -> bool:
    if path.suffix.lower() == ".gguf":
        return True
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            return False
        with path.open("rb") as file:
            return file.read(len(MAGIC)) == MAGIC
    except OSError:
        return False


def _open_part(path: Path, options: LoadOptions, stack: ExitStack) -> _Part:
    """Map a file and read its header; the mapping is closed with `stack`."""
    mapped = map_file(path, "a GGUF file", stack)
    return _Part(mapped.data, read_header(path, mapped.data, options.qtypes), mapped.reader)


def _views(part: _Part) -> dict[str, TensorView]:
    """Views of the tensors of one file, by name, in file order."""
    header = part.header
    if header.order == ">":
        _check_convertible(header)
    whole: NDArray[np.uint8] = np.frombuffer(part.mapping, np.uint8)
    views: dict[str, TensorView] = {}
    for info in header.tensors:
        start = header.data_start + info.offset
        data = whole[start : start + info.nbytes]
        views[info.name] = TensorView(
            name=info.name,
            shape=info.shape,
            qtype=info.qtype,
            data=data if header.order == "<" else to_little_endian(data, info.qtype),
            offset=start,
            path=header.path,
            reader=part.reader.read_into if header.order == "<" else None,
        )
    return views


def _check_convertible(header: Header) -> None:
    total = 0
    for info in header.tensors:
        total += info.nbytes
        label = f"tensor {quoted(info.name)}"
        if not can_convert(info.qtype):
            found = f"{label} is {info.qtype.name} in a big-endian file, which cannot be converted"
            raise ModelFileError(header.path, found, info.info_offset)
        if total > MAX_CONVERTED_BYTES:
            found = (
                f"{label} brings this big-endian file to {total} bytes of data, at most "
                f"{MAX_CONVERTED_BYTES} are converted; gguf_convert_endian makes a little-endian file of it"
            )
            raise ModelFileError(header.path, found, info.info_offset)
