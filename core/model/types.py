"""Descriptors that cross plugin hooks: what a loader returns and what a device is.

Everything here is data. A loader fills it, validation reads it; no field is an unchecked number from a file.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
from attrs import define, evolve, field, frozen
from numpy.typing import NDArray

from mortice.core.errors import InputError
from mortice.core.model.findings import Finding
from mortice.core.model.qtypes import GGML_TYPES, QType

__all__ = ["DeviceInfo", "LoadOptions", "MakeRows", "MetadataValue", "ModelFile", "ReadInto", "TensorView"]

MetadataValue = bool | int | float | str | NDArray[Any] | Sequence[str]
"""A metadata value: a scalar, a one-dimensional numeric array, or a sequence of strings (decoded on first use)."""

ReadInto = Callable[[NDArray[np.uint8], int], None]
"""Fills an array of one dimension with the bytes of a file from an offset on; threads may call it side by side."""

MakeRows = Callable[[int, int], NDArray[np.uint8]]
"""Makes the rows [start, stop) of a tensor: ``uint8``, shape (stop - start, bytes of a row). Threads may share it.

What it takes in passing is to grow with the rows asked for, not with the tensor.
"""


@frozen(eq=False, kw_only=True)
class TensorView:
    """One tensor of a model file: a view of its bytes there, or a way to make them row by row.

    Attributes:
        name: the exact name in the file.
        shape: extents, rows first (NumPy order; GGUF stores them reversed). The last axis is the row.
        qtype: how rows are stored.
        data: ``uint8``, one dimension, exactly ``qtype.nbytes(shape)`` long, read-only: a view of the mapped file.
            Of a tensor that is made, a new array at each use; `row_bytes` takes less memory.
        make: makes rows that no file holds as they are wanted, quantised at load for instance; given instead of `data`.
        offset: byte offset of the data in `path`.
        path: the file the data lies in (split models have several).
        reader: reads `path` into memory of the caller's, usable until the model is closed (`FileReader` is one); None
            where `data` are not the bytes of a file as they are. Uploads are faster with it.

    """

    name: str
    shape: tuple[int, ...]
    qtype: QType
    _stored: NDArray[np.uint8] | None = field(default=None, alias="data", repr=False)
    offset: int
    path: Path
    make: MakeRows | None = field(default=None, repr=False)
    reader: ReadInto | None = field(default=None, repr=False)

    def __attrs_post_init__(self) -> None:
        stored = self._stored
        assert (stored is None) != (self.make is None), f"{self.name}: has either bytes or a way to make them"
        assert stored is None or stored.nbytes == self.nbytes, f"{self.name}: shape, type and bytes disagree"

    @property
    def data(self) -> NDArray[np.uint8]:
        """All bytes, see the attributes."""
        return self.row_bytes(0, self.rows).reshape(-1) if self._stored is None else self._stored

    @property
    def nbytes(self) -> int:
        """Bytes as `qtype` stores them."""
        return self.qtype.nbytes(self.shape)

    @property
    def elements(self) -> int:
        """Number of elements."""
        count = 1
        for extent in self.shape:
            count *= extent
        return count

    @property
    def columns(self) -> int:
        """Length of a row."""
        return self.shape[-1]

    @property
    def rows(self) -> int:
        """Number of rows (1 for a vector)."""
        return self.elements // self.columns

    def row_bytes(self, start: int, stop: int) -> NDArray[np.uint8]:
        """The bytes of rows [start, stop), shape (stop - start, bytes of a row); a view where there are bytes."""
        if self.make is not None:
            return self.make(start, stop)
        return self.data.reshape(self.rows, -1)[start:stop]

    def without_bytes(self) -> TensorView:
        """The same name, shape and type without what refers to the file; its bytes are refused with `InputError`."""
        return evolve(self, data=None, reader=None, make=partial(_refuse_rows, self.name))

    def read_into(self, out: NDArray[np.uint8], start: int) -> None:
        """Fill `out`, one dimension, with the tensor's bytes from `start` on, by `reader` where there is one.

        Raises:
            ModelFileError: when the file cannot be read to there any more.

        """
        assert 0 <= start <= self.nbytes - out.nbytes, f"{self.name}: bytes beyond the tensor's"
        if self.make is not None:
            row_bytes = self.qtype.row_bytes(self.columns)
            first, last = start // row_bytes, -(-(start + out.nbytes) // row_bytes)
            skipped = start - first * row_bytes
            out[...] = self.make(first, last).reshape(-1)[skipped : skipped + out.nbytes]
        elif self.reader is None:
            out[...] = self.data[start : start + out.nbytes]
        else:
            self.reader(out, self.offset + start)


def _refuse_rows(name: str, start: int, stop: int) -> NDArray[np.uint8]:
    raise InputError(f"{name}: rows {start} to {stop} cannot be read: the model is closed")


@define(eq=False, kw_only=True)
class ModelFile:
    """An opened model file: metadata and lazy tensor views. Close it, or use it as a context manager.

    Attributes:
        path: what was opened (the first shard of a split model).
        format: the loader's format name, for instance ``gguf``.
        version: the format's version as text.
        metadata: keys and values in file order. GGUF's key names are used whatever the format.
        metadata_offsets: byte offset of each key in `path`, where the format has such a thing.
        tensors: views by exact name, in file order.
        files: every file the model consists of.
        notes: what a person should know of how it was opened; validation passes them on.
        memo: what later stages worked out and need not work out again, by a name of theirs.
        loader: the name of the plugin that opened it (filled in by the registry).

    """

    path: Path
    format: str
    version: str
    metadata: Mapping[str, MetadataValue] = field(repr=False)
    tensors: Mapping[str, TensorView] = field(repr=False)
    files: tuple[Path, ...]
    metadata_offsets: Mapping[str, int] = field(factory=dict, repr=False)
    loader: str = ""
    notes: tuple[Finding, ...] = ()
    memo: dict[str, Any] = field(factory=dict, init=False, repr=False)
    _close: Callable[[], None] | None = field(default=None, repr=False)

    @property
    def architecture(self) -> str:
        """``general.architecture``, or an empty string when the file does not say."""
        value = self.metadata.get("general.architecture")
        return value if isinstance(value, str) else ""

    @property
    def tensor_bytes(self) -> int:
        """Bytes of all tensors as stored."""
        return sum(tensor.nbytes for tensor in self.tensors.values())

    @property
    def parameters(self) -> int:
        """Number of elements of all tensors."""
        return sum(tensor.elements for tensor in self.tensors.values())

    def close(self) -> None:
        """Let go of the file. Views that are still referenced keep their mapping alive; calling twice is fine."""
        close, self._close = self._close, None
        if close is not None:
            close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


@frozen(kw_only=True)
class LoadOptions:
    """What `mortice_open_model` is told besides the path.

    Attributes:
        qtypes: every tensor type known in this run, by id (GGML's and those of plugins).

    """

    qtypes: Mapping[int, QType] = field(default=GGML_TYPES, repr=False)


@frozen(kw_only=True)
class DeviceInfo:
    """Where a program runs.

    Attributes:
        kind: ``cpu`` or ``cuda``.
        name: the device's own name, for instance ``NVIDIA H100 80GB HBM3``.
        index: ordinal among devices of that kind.
        total_bytes: memory of the device.
        free_bytes: memory free when asked.
        compute_capability: (major, minor) on CUDA, None elsewhere.

    """

    kind: str
    name: str
    index: int = 0
    total_bytes: int
    free_bytes: int
    compute_capability: tuple[int, int] | None = None
