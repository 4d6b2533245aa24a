"""GGUF header to data: metadata, and where each tensor lies. No tensor byte is read.

Layout (all numbers in the file's byte order): magic, version u32, number of tensors u64, number of keys
u64; per key a string, a type u32 and a value; per tensor a string, number of dimensions u32, extents u64
(fastest first), type u32, offset u64 from the start of the data section, which begins at the next
multiple of the alignment.
"""

from __future__ import annotations

from collections.abc import Mapping
from mmap import mmap
from pathlib import Path

from attrs import frozen

from mortice.core.model.qtypes import QType
from mortice.core.model.types import MetadataValue
from mortice.core.text_file import beginning
from mortice.plugins.loaders.gguf import format as gguf
from mortice.plugins.loaders.gguf.arrays import StringArray, read_numbers, read_strings
from mortice.plugins.loaders.gguf.reader import Reader, quoted
from mortice.plugins.loaders.gguf.tensors import TensorInfo, check_layout, read_tensor

__all__ = ["Header", "read_header"]


@frozen(kw_only=True)
class Header:
    """All that a GGUF file says before its data, checked.

    Attributes:
        path: the file.
        version: 2 or 3.
        order: ``<`` for a little-endian file, ``>`` for a big-endian one.
        metadata: values by key, in file order. Independent of the file: nothing in it refers to the mapping.
        offsets: byte offset of each key.
        tensors: in file order.
        data_start: offset of the data section, from which the tensors' offsets count.

    """

    path: Path
    version: int
    order: str
    metadata: Mapping[str, MetadataValue]
    offsets: Mapping[str, int]
    tensors: tuple[TensorInfo, ...]
    data_start: int


def read_header(path: Path, buffer: bytes | mmap, qtypes: Mapping[int, QType]) -> Header:
    """Parse and check a GGUF header.

    Args:
        path: for messages.
        buffer: the whole file.
        qtypes: tensor types known in this run, by id.

    Raises:
        ModelFileError: at the first thing that is wrong, with its byte offset.

    """
    reader = Reader(path, buffer)
    version = _read_version(reader)
    num_tensors = _read_count(reader, "tensors", gguf.MAX_TENSORS)
    num_keys = _read_count(reader, "keys", gguf.MAX_KEYS)

    metadata: dict[str, MetadataValue] = {}
    offsets: dict[str, int] = {}
    alignment = gguf.DEFAULT_ALIGNMENT
    strings_left = gguf.MAX_ARRAY_STRINGS
    for _ in range(num_keys):
        at = reader.position
        key = reader.string("a key", gguf.MAX_KEY_BYTES)
        if not key:
            raise reader.error("a key is empty, every key has a name", at)
        if key in metadata:
            raise reader.error(f"key {quoted(key)} is there twice, first at byte {offsets[key]}", at)
        value_type = _read_type(reader, key)
        metadata[key] = value = _read_value(reader, key, value_type, strings_left)
        offsets[key] = at
        if isinstance(value, StringArray):
            strings_left -= len(value)
        if key == "general.alignment":
            alignment = _checked_alignment(reader, at, value_type, value)

    tensors = tuple(_read_tensors(reader, num_tensors, alignment, qtypes))
    return Header(
        path=path,
        version=version,
        order=reader.order,
        metadata=metadata,
        offsets=offsets,
        tensors=tensors,
        data_start=check_layout(reader, tensors, alignment),
    )


def _read_version(reader: Reader) -> int:
    """Check magic and version; the version, small when read the right way round, tells the byte order."""
    if not reader.size:
        raise reader.error("file is empty, a GGUF file was expected")
    magic = bytes(reader.buffer[: len(gguf.MAGIC)])
    if magic != gguf.MAGIC[: len(magic)]:
        found = beginning(reader.path) or f"it begins with {magic!r}"
        raise reader.error(f"not a GGUF file: {found}; {gguf.MAGIC!r} was expected")
    if reader.size < gguf.HEADER_BYTES:
        raise reader.too_long("a GGUF header", gguf.HEADER_BYTES, 0)
    reader.position = at = len(magic)
    little = reader.number("u4", "version")
    big = int.from_bytes(little.to_bytes(4, "little"), "big")
    if little in gguf.VERSIONS:
        return int(little)
    if big in gguf.VERSIONS:
        reader.order = ">"
        return big
    raise reader.error(f"GGUF version {min(little, big)} is not supported, 2 or 3 was expected", at)


def _read_count(reader: Reader, what: str, most: int) -> int:
    at = reader.position
    count: int = reader.number("u8", f"number of {what}")
    if count > most:
        raise reader.error(f"file claims {count} {what}, at most {most} are allowed", at)
    return count


def _read_type(reader: Reader, key: str) -> int:
    at = reader.position
    type_id: int = reader.number("u4", f"type of {quoted(key)}")
    if type_id >= len(gguf.TYPE_NAMES):
        known = len(gguf.TYPE_NAMES) - 1
        raise reader.error(f"key {quoted(key)} has value type {type_id}, 0 to {known} are known", at)
    return type_id


def _read_value(reader: Reader, key: str, type_id: int, strings_left: int) -> MetadataValue:
    if type_id == gguf.STRING:
        return reader.string(f"value of {quoted(key)}", gguf.MAX_STRING_BYTES)
    if type_id == gguf.ARRAY:
        at = reader.position
        item_type = _read_type(reader, key)
        if item_type == gguf.ARRAY:
            raise reader.error(f"key {quoted(key)} is an array of arrays, numbers or strings were expected", at)
        count = reader.number("u8", f"length of {quoted(key)}")
        if item_type == gguf.STRING:
            return read_strings(reader, quoted(key), count, strings_left)
        return read_numbers(reader, quoted(key), item_type, count)
    at = reader.position
    value: int | float = reader.number(gguf.NUMBER_TYPES[type_id], f"value of {quoted(key)}")
    if type_id == gguf.BOOL:
        if value not in (0, 1):
            raise reader.error(f"{quoted(key)} is a truth value of {value}, 0 or 1 was expected", at)
        return bool(value)
    return value


def _checked_alignment(reader: Reader, at: int, type_id: int, value: MetadataValue) -> int:
    if type_id != gguf.UINT32 or not isinstance(value, int):
        found = gguf.TYPE_NAMES[type_id]
        raise reader.error(f"general.alignment is of type {found}, UINT32 was expected", at)
    if value == 0 or value & (value - 1):
        raise reader.error(f"general.alignment is {value}, a power of two was expected", at)
    return value


def _read_tensors(reader: Reader, count: int, alignment: int, qtypes: Mapping[int, QType]) -> list[TensorInfo]:
    tensors: dict[str, TensorInfo] = {}
    for index in range(count):
        tensor = read_tensor(reader, index, alignment, qtypes)
        if tensor.name in tensors:
            first = tensors[tensor.name].info_offset
            raise reader.error(
                f"tensor {quoted(tensor.name)} is there twice, first at byte {first}", tensor.info_offset
            )
        tensors[tensor.name] = tensor
    return list(tensors.values())
