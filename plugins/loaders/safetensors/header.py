"""The header of a safetensors file, checked: what tensors there are, and that their bytes fill the file exactly.

The format: eight bytes, a little-endian count; as many bytes of JSON; the data. The JSON is an object from tensor name
to ``dtype``, ``shape`` and ``data_offsets`` (begin and end, counted from the start of the data), and may have one more
key, ``__metadata__``. Source: the README of huggingface/safetensors. The library of that name is not used: it gives no
view of a BF16 tensor's bytes, and accepts keys that are there twice and a header that begins with blanks.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from mmap import mmap
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final

from attrs import field, frozen

from mortice.core.counts import counted
from mortice.core.errors import ModelFileError
from mortice.plugins.loaders.safetensors.files import parse_json, quoted

__all__ = ["DTYPE_BYTES", "MAX_HEADER_BYTES", "Entry", "Header", "read_header"]

MAX_HEADER_BYTES: Final = 32 << 20
"""The format allows 100 MB; the largest published models have some 100 kB in each file."""

DTYPE_BYTES: Final[Mapping[str, int]] = MappingProxyType(
    {
        **dict.fromkeys(("BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2", "F8_E8M0"), 1),
        **dict.fromkeys(("I16", "U16", "F16", "BF16"), 2),
        **dict.fromkeys(("I32", "U32", "F32"), 4),
        **dict.fromkeys(("I64", "U64", "F64", "C64"), 8),
    }
)
"""Bytes of an element."""

_PREFIX = 8
_MAX_DIMENSIONS = 4
_MAX_TENSORS = 1 << 16
_MAX_NAME_CHARS = 512
_LFS = b"version https://git-lfs"


@frozen(kw_only=True)
class Entry:
    """One tensor.

    Attributes:
        name: in the file.
        dtype: as the format spells it (``BF16``).
        shape: extents, rows first; never empty, a scalar has one element.
        start: of its data, from the start of the file.
        nbytes: of its data.

    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    nbytes: int


@frozen(eq=False)
class Header:
    """The tensors of a file, in the order of their data."""

    path: Path
    entries: Sequence[Entry] = field(repr=False)


def read_header(path: Path, data: bytes | mmap) -> Header:
    """Read and check the header of a file whose bytes are `data`.

    Raises:
        ModelFileError: naming what is wrong, the byte, and how many are missing where the file was cut short.

    """
    size = len(data)
    if data[: len(_LFS)] == _LFS:
        raise ModelFileError(path, "is a pointer of Git LFS, not the weights; `git lfs pull` brings them", 0)
    if size < _PREFIX:
        raise ModelFileError(
            path,
            f"file is truncated in the header's length: {_lost(_PREFIX - size)} missing",
            size,
        )
    (length,) = struct.unpack("<Q", data[:_PREFIX])
    if length > MAX_HEADER_BYTES:
        raise ModelFileError(path, f"a header of {length} bytes, at most {MAX_HEADER_BYTES} are read", 0)
    start = _PREFIX + length
    if start > size:
        raise ModelFileError(path, f"file is truncated in the header: {_lost(start - size)} missing", size)
    if data[_PREFIX : _PREFIX + 1] != b"{":
        raise ModelFileError(path, "the header does not begin with '{'", _PREFIX)
    try:
        text = bytes(data[_PREFIX:start]).decode("utf-8")
    except UnicodeDecodeError as error:
        raise ModelFileError(path, f"the header is not UTF-8: {error.reason}", _PREFIX + error.start) from None
    table = parse_json(path, text, _PREFIX)
    _check_metadata(path, table.pop("__metadata__", {}))
    if len(table) > _MAX_TENSORS:
        raise ModelFileError(path, f"{len(table)} tensors, at most {_MAX_TENSORS} are read", _PREFIX)
    entries = [_entry(path, name, value, start) for name, value in table.items()]
    entries.sort(key=lambda entry: entry.start)
    _check_layout(path, entries, start, size)
    return Header(path, tuple(entries))


def _lost(nbytes: int) -> str:
    return counted(nbytes, "byte is", "bytes are")


def _check_metadata(path: Path, value: Any) -> None:
    if not isinstance(value, dict) or not all(isinstance(text, str) for text in value.values()):
        raise ModelFileError(path, f"__metadata__: found {quoted(value)}, wanted an object of strings", _PREFIX)


def _entry(path: Path, name: str, value: Any, start: int) -> Entry:
    def wrong(message: str) -> ModelFileError:
        return ModelFileError(path, f"tensor {quoted(name)}: {message}", _PREFIX)

    if not name or len(name) > _MAX_NAME_CHARS:
        raise wrong(f"a name of {len(name)} characters, wanted 1 to {_MAX_NAME_CHARS}")
    if not isinstance(value, dict) or value.keys() != {"dtype", "shape", "data_offsets"}:
        raise wrong(f"found {quoted(value)}, wanted dtype, shape and data_offsets")
    dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPE_BYTES:
        raise wrong(f"dtype {quoted(dtype)} is unknown; known are {', '.join(DTYPE_BYTES)}")
    if not isinstance(shape, list) or len(shape) > _MAX_DIMENSIONS or not all(map(_is_count, shape)) or 0 in shape:
        raise wrong(f"shape is {quoted(shape)}, wanted at most {_MAX_DIMENSIONS} extents of 1 or more")
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(map(_is_count, offsets)):
        raise wrong(f"data_offsets is {quoted(offsets)}, wanted a begin and an end")
    begin, end = offsets
    nbytes = DTYPE_BYTES[dtype]
    for extent in shape:
        nbytes *= extent
    if end - begin != nbytes:
        raise wrong(f"data_offsets {offsets} are {end - begin} bytes, shape {shape} of {dtype} takes {nbytes}")
    return Entry(name=name, dtype=dtype, shape=tuple(shape) or (1,), start=start + begin, nbytes=nbytes)


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**63


def _check_layout(path: Path, entries: Sequence[Entry], start: int, size: int) -> None:
    """The format allows neither holes nor overlaps nor anything after the data."""
    at = start
    before = ""
    for entry in entries:
        if entry.start > at:
            message = f"a hole of {counted(entry.start - at, 'byte')} before tensor {quoted(entry.name)}"
            raise ModelFileError(path, message, at)
        if entry.start < at:
            both = f"{quoted(before)} and {quoted(entry.name)}"
            message = f"tensors {both} overlap by {counted(at - entry.start, 'byte')}"
            raise ModelFileError(path, message, entry.start)
        at, before = entry.start + entry.nbytes, entry.name
    if at > size:
        broken = next(entry for entry in entries if entry.start + entry.nbytes > size)
        raise ModelFileError(
            path,
            f"file is truncated in the data of tensor {quoted(broken.name)}: {_lost(at - size)} missing, "
            f"{at} were expected in all (an interrupted download?)",
            size,
        )
    if at < size:
        raise ModelFileError(path, f"{counted(size - at, 'byte')} after the last tensor, none were expected", at)
