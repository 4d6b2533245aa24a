"""Metadata arrays: strings decoded on first use, numbers as NumPy arrays."""

from __future__ import annotations

import codecs
import struct
from array import array
from collections.abc import Iterator, Sequence
from itertools import chain
from typing import Any, overload

import numpy as np
from numpy.typing import NDArray

from mortice.plugins.loaders.gguf.format import BOOL, MAX_ARRAY_STRINGS, NUMBER_TYPES
from mortice.plugins.loaders.gguf.reader import Reader

__all__ = ["StringArray", "read_numbers", "read_strings"]

_PREFIX = 8  # bytes of the length before each string
_TOGETHER = 1 << 14  # strings decoded at once by those who want all
_WINDOW = 1 << 18  # bytes looked through at once for the lengths of strings; what is made of them stays in the cache
_MOST_STEPS = 4096  # over runs of short strings, or single long ones


class StringArray(Sequence[str]):
    """Strings of a metadata array, kept as bytes and decoded one by one when asked for.

    Args:
        data: the array as it lies in the file: before each string eight bytes that hold its length.
        starts: ``int64``, one more than there are strings: where in `data` each string's text begins, and
            last where the text of one string more would begin.

    """

    __slots__ = ("_data", "_starts")

    def __init__(self, data: bytes, starts: NDArray[np.int64]) -> None:
        self._data = data
        self._starts = starts

    def __len__(self) -> int:
        return len(self._starts) - 1

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> list[str]: ...
    def __getitem__(self, index: int | slice) -> str | list[str]:
        if isinstance(index, slice):
            return [self[at] for at in range(*index.indices(len(self)))]
        at = range(len(self))[index]
        return self._data[int(self._starts[at]) : int(self._starts[at + 1]) - _PREFIX].decode()

    def __iter__(self) -> Iterator[str]:
        steps = range(0, len(self), _TOGETHER)
        return chain.from_iterable(self._decoded(first, min(first + _TOGETHER, len(self))) for first in steps)

    def _decoded(self, first: int, last: int) -> list[str]:
        """Strings [first, last), all with one call where no text has the zeros that then stand for the lengths."""
        starts = self._starts[first : last + 1]
        begin = int(starts[0]) - _PREFIX
        blank = np.frombuffer(self._data, np.uint8)[begin : int(starts[-1]) - _PREFIX].copy()
        for back in range(1, _PREFIX + 1):
            blank[starts[:-1] - back - begin] = 0
        if np.count_nonzero(blank) + _PREFIX * (last - first) == len(blank):
            return blank.tobytes().decode().split("\0" * _PREFIX)[1:]
        return self[first:last]

    def __repr__(self) -> str:
        return f"<{len(self)} strings>"


def read_strings(reader: Reader, key: str, count: int, allowed: int = MAX_ARRAY_STRINGS) -> StringArray:
    """Step over `count` strings, checking that each lies in the file and is UTF-8.

    Args:
        reader: stands at the first string's length.
        key: the metadata key, for messages.
        count: strings the file says there are; not trusted.
        allowed: most strings that may follow.

    Raises:
        ModelFileError: naming the first string that is broken.

    """
    base = reader.position
    if count * _PREFIX > reader.limit - base:
        raise reader.too_long(f"{key}: an array of {count} strings", count * _PREFIX, base)
    if count > allowed:
        raise reader.error(f"{key}: an array of {count} strings, at most {allowed} are allowed here")

    bounds = _bounds_of_short(reader, count)
    if bounds is None:
        bounds = _bounds(reader, key, count)
    at = reader.position = int(bounds[-1])

    strings = StringArray(reader.buffer[base:at], bounds + (_PREFIX - base))
    _check_utf8(reader, key, base, strings)
    return strings


def _bounds(reader: Reader, key: str, count: int) -> NDArray[np.int64]:
    """Where the length of each of the next strings lies, and where they end; one after the other."""
    # The only loop that runs once per token of a vocabulary: no method calls of ours in it.
    at = reader.position
    bounds = array("q", [at])
    append, buffer, limit = bounds.append, reader.buffer, reader.limit
    unpack = struct.Struct(reader.order + "Q").unpack_from
    try:
        for _ in range(count):
            at += _PREFIX + unpack(buffer, at)[0]
            if at > limit:
                break
            append(at)
    except struct.error:
        raise reader.too_long(f"{key}[{len(bounds) - 1}]: the length of a string", _PREFIX, at) from None
    if at > limit:
        start = bounds[-1] + _PREFIX
        raise reader.too_long(f"{key}[{len(bounds) - 1}]: a string", at - start, start)
    return np.frombuffer(bounds, np.int64)


def _bounds_of_short(reader: Reader, count: int) -> NDArray[np.int64] | None:
    """`_bounds`, many at once: lengths below 256 are known by the seven zeros behind them.

    Strings that are longer, or have such zeros themselves, are stepped over one by one. None where those are many, or
    where anything is not as it should be.
    """
    if reader.order != "<":
        return None
    at, end, left, patience = reader.position, reader.limit, count, _MOST_STEPS
    found: list[NDArray[np.int64]] = []
    while left:
        window = np.frombuffer(reader.buffer[at : min(at + _WINDOW, end)], np.uint8)
        if len(window) < _PREFIX:
            return None
        heads = _short_lengths(window)
        after = heads + _PREFIX + window[heads]
        breaks = np.flatnonzero(after[:-1] != heads[1:])
        here = 0
        while left and here <= len(window) - _PREFIX:
            first = int(np.searchsorted(heads, here))
            if first < len(heads) and heads[first] == here:
                run = int(np.searchsorted(breaks, first))
                last = min(int(breaks[run]) if run < len(breaks) else len(heads) - 1, first + left - 1)
                found.append(heads[first : last + 1] + at)
                here, left = int(after[last]), left - (last + 1 - first)
            else:
                found.append(np.array([at + here], np.int64))
                here, left = here + _PREFIX + int(window[here : here + _PREFIX].view("<u8")[0]), left - 1
            patience -= 1
            if not patience or at + here > end:
                return None
        at += here
    return np.concatenate([*found, np.array([at], np.int64)])


def _short_lengths(window: NDArray[np.uint8]) -> NDArray[np.int64]:
    """Places of bytes that seven zeros follow."""
    zero = window == 0
    run = zero[1 : len(window) - _PREFIX + 2].copy()
    for ahead in range(2, _PREFIX):
        run &= zero[ahead : ahead + len(run)]
    return np.flatnonzero(run)


def _check_utf8(reader: Reader, key: str, base: int, strings: StringArray) -> None:
    """Check all strings at once.

    With ASCII bytes where the lengths lie, a string that ends inside a character, or has any other fault,
    makes the whole invalid. Lengths below 128 are such bytes already.
    """
    data, starts = strings._data, strings._starts[:-1]  # noqa: SLF001 - one module
    blank: NDArray[np.uint8] = np.frombuffer(data, np.uint8)
    if (np.diff(strings._starts) >= 128 + _PREFIX).any():  # noqa: SLF001
        blank = blank.copy()
        for back in range(1, _PREFIX + 1):
            blank[starts - back] = 0
    good_bytes = _utf8_bytes(blank)
    if good_bytes == len(data):
        return
    suspect = max(0, int(np.searchsorted(starts, good_bytes, "right")) - 1)
    for index in range(suspect, len(strings)):
        try:
            strings[index]
        except UnicodeDecodeError as error:
            found = f"{key}[{index}] is not UTF-8: {error.reason}"
            raise reader.error(found, base + int(starts[index]) + error.start) from None
    raise AssertionError("the whole is invalid UTF-8 but no string is")


def _utf8_bytes(data: NDArray[np.uint8], chunk_bytes: int = 2**20) -> int:
    """How many bytes at the start of `data` are UTF-8 for certain: all, or up to the chunk with a fault.

    Looking at chunks keeps the decoded text from ever existing as a whole.
    """
    decoder = codecs.getincrementaldecoder("utf-8")()
    at = 0
    try:
        for at in range(0, len(data), chunk_bytes):
            decoder.decode(data[at : at + chunk_bytes].data)
        at = len(data)
        decoder.decode(b"", final=True)
    except UnicodeDecodeError:
        return max(0, at - 3)  # up to three bytes of a character may lie before the chunk
    return at


def read_numbers(reader: Reader, key: str, type_id: int, count: int) -> NDArray[Any]:
    """The next `count` numbers as a read-only array, shape (count,), in this machine's byte order.

    Raises:
        ModelFileError: when the file is shorter, or a truth value is neither 0 nor 1.

    """
    stored = np.dtype(reader.order + NUMBER_TYPES[type_id])
    nbytes = count * stored.itemsize
    start = reader.take(nbytes, f"{key}: an array of {count} numbers")
    values: NDArray[Any] = np.frombuffer(reader.buffer[start : start + nbytes], stored)
    if type_id == BOOL:
        if values.max(initial=0) > 1:
            index = int(np.argmax(values > 1))
            found = f"{key}[{index}] is a truth value of {values[index]}, 0 or 1 was expected"
            raise reader.error(found, start + index)
        return values.view(np.bool_)
    if not stored.isnative:
        values = values.astype(stored.newbyteorder("="))
        values.flags.writeable = False
    return values
