"""Writes GGUF files byte by byte, valid or broken, of any version and byte order.

The `gguf` package's writer refuses to make most of what a hostile file holds; this one does as told.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Self

import numpy as np
from attrs import define, field

UINT8, INT8, UINT16, INT16, UINT32, INT32, FLOAT32, BOOL, STRING, ARRAY, UINT64, INT64, FLOAT64 = range(13)
F32, F16, Q4_0, Q8_0, Q4_K = 0, 1, 2, 8, 12

CODES = {
    UINT8: "B",
    INT8: "b",
    UINT16: "H",
    INT16: "h",
    UINT32: "I",
    INT32: "i",
    FLOAT32: "f",
    BOOL: "?",
    UINT64: "Q",
    INT64: "q",
    FLOAT64: "d",
}


@define
class GgufBytes:
    """A GGUF file in the making; methods return the object so that calls chain.

    Attributes:
        order: ``<`` little-endian or ``>`` big-endian.
        version: written as it is.
        alignment: used for padding and offsets; add the key `general.alignment` apart where it is not 32.
        magic: the first bytes.

    """

    order: str = "<"
    version: int = 3
    alignment: int = 32
    magic: bytes = b"GGUF"
    _keys: list[bytes] = field(factory=list)
    _infos: list[bytes] = field(factory=list)
    _data: bytearray = field(factory=bytearray)

    def pack(self, letters: str, *values: int | float) -> bytes:
        """Numbers in this file's byte order."""
        return struct.pack(self.order + letters, *values)

    def string(self, text: str | bytes) -> bytes:
        """A length and the text."""
        raw = text.encode() if isinstance(text, str) else text
        return self.pack("Q", len(raw)) + raw

    def raw_key(self, name: str | bytes, type_id: int, value: bytes) -> Self:
        """A key whose value is written as it is."""
        self._keys.append(self.string(name) + self.pack("I", type_id) + value)
        return self

    def raw_item(self, data: bytes) -> Self:
        """Bytes in the place of a whole key, its name included."""
        self._keys.append(data)
        return self

    def number(self, name: str | bytes, type_id: int, value: float) -> Self:
        return self.raw_key(name, type_id, self.pack(CODES[type_id], value))

    def u32(self, name: str | bytes, value: int) -> Self:
        return self.number(name, UINT32, value)

    def text(self, name: str, value: str | bytes) -> Self:
        return self.raw_key(name, STRING, self.string(value))

    def numbers(self, name: str, type_id: int, values: Sequence[float]) -> Self:
        body = self.pack(f"{len(values)}{CODES[type_id]}", *values)
        return self.raw_key(name, ARRAY, self.pack("IQ", type_id, len(values)) + body)

    def strings(self, name: str, values: Sequence[str | bytes], count: int | None = None) -> Self:
        claimed = len(values) if count is None else count
        body = b"".join(self.string(value) for value in values)
        return self.raw_key(name, ARRAY, self.pack("IQ", STRING, claimed) + body)

    def tensor(
        self, name: str | bytes, extents: Sequence[int], type_id: int, data: bytes, offset: int | None = None
    ) -> Self:
        """A tensor; `extents` in the file's order (row length first).

        `data` are appended at the next aligned place, or, with an `offset` of one's own, as they are.
        """
        if offset is None:
            self._data += bytes(-len(self._data) % self.alignment)
            offset = len(self._data)
        dims = [extent % 2**64 for extent in extents]
        self._infos.append(self.string(name) + self.pack(f"I{len(dims)}QIQ", len(dims), *dims, type_id, offset))
        self._data += data
        return self

    def f32(self, name: str, values: Sequence[float]) -> Self:
        """A vector of F32."""
        return self.tensor(name, [len(values)], F32, np.array(values, self.order + "f4").tobytes())

    def raw_tensor(self, info: bytes) -> Self:
        """Bytes in the place of a whole tensor entry."""
        self._infos.append(info)
        return self

    def header(self, num_tensors: int | None = None, num_keys: int | None = None) -> bytes:
        """All but the data and the padding before them; the counts are the true ones unless given."""
        counts = (
            len(self._infos) if num_tensors is None else num_tensors,
            len(self._keys) if num_keys is None else num_keys,
        )
        start = self.magic + self.pack("IQQ", self.version, *counts)
        return start + b"".join(self._keys) + b"".join(self._infos)

    def build(self, num_tensors: int | None = None, num_keys: int | None = None, *, pad: bool = True) -> bytes:
        """The file; `pad` says whether the last tensor is padded."""
        header = self.header(num_tensors, num_keys)
        if not self._infos:
            return header
        data = bytes(self._data) + (bytes(-len(self._data) % self.alignment) if pad else b"")
        return header + bytes(-len(header) % self.alignment) + data

    def write(self, path: Path) -> Path:
        """Write the file and return its path."""
        path.write_bytes(self.build())
        return path


def shard(number: int, count: int, tensors: int, order: str = "<") -> GgufBytes:
    """The beginning of shard `number` (from 0) of `count`; the first also has an architecture."""
    made = GgufBytes(order=order)
    if number == 0:
        made.text("general.architecture", "llama")
    made.number("split.no", UINT16, number).number("split.count", UINT16, count)
    return made.number("split.tensors.count", INT32, tensors)
