"""Tensors of safetensors files as a GGUF file of the same model would have them.

Matrices of F32, F16 and BF16 stay where they are: a view of the mapped file. Two things are made row by row instead:

* Q and K of a family with RoPE on adjacent pairs. Hugging Face stores the rows of a head as the first halves of all
  pairs, then the second halves; GGUF files of these families have the two rows of a pair side by side (llama.cpp's
  converter, ``LlamaModel.permute``). Rows change places, nothing inside a row does.
* Vectors (norms, biases), which GGUF files have as F32. They are expanded where they are shorter.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

import numpy as np
from attrs import frozen
from numpy.typing import NDArray

from mortice.core.errors import ModelFileError
from mortice.core.model.mapped_file import MappedFile
from mortice.core.model.qtypes import GGML_TYPES, QType
from mortice.core.model.types import TensorView
from mortice.plugins.loaders.safetensors.files import quoted
from mortice.plugins.loaders.safetensors.header import Entry

__all__ = ["PairedRows", "require_weights", "tensor_view"]

_BY_NAME = {qtype.name: qtype for qtype in GGML_TYPES.values()}
_F32 = _BY_NAME["F32"]
_QTYPES: Mapping[str, QType] = MappingProxyType({name: _BY_NAME[name] for name in ("F32", "F16", "BF16")})


def require_weights(entry: Entry, path: Path, qtypes: Mapping[int, QType]) -> None:
    """Refuse an element type that holds no weights, or that is not among `qtypes`.

    Raises:
        ModelFileError: naming tensor and type.

    """
    known = [name for name, qtype in _QTYPES.items() if qtype.id in qtypes]
    if entry.dtype not in known:
        found = f"tensor {quoted(entry.name)} is {entry.dtype}, only {', '.join(known)} weights are read"
        raise ModelFileError(path, found, entry.start)


def tensor_view(entry: Entry, name: str, path: Path, mapped: MappedFile, *, heads: int = 0) -> TensorView:
    """The tensor `entry` of a file under a GGUF name.

    Args:
        entry: what the header says; of a type that `require_weights` accepts.
        name: to show it under.
        path: the file.
        mapped: its bytes.
        heads: put the two rows of a pair side by side in each of so many heads; 0 leaves rows where they are.

    """
    qtype = _QTYPES[entry.dtype]
    stored: NDArray[np.uint8] = np.frombuffer(mapped.data, np.uint8)[entry.start : entry.start + entry.nbytes]
    vector = len(entry.shape) == 1
    if heads and entry.shape[0] % (2 * heads):
        heads = 0  # validation names the shape
    if not heads and (not vector or qtype is _F32):
        return TensorView(
            name=name,
            shape=entry.shape,
            qtype=qtype,
            data=stored,
            offset=entry.start,
            path=path,
            reader=mapped.reader.read_into,
        )
    rows = stored.reshape(entry.shape[0], -1)
    head_rows = entry.shape[0] // heads if heads else 0
    return TensorView(
        name=name,
        shape=entry.shape,
        qtype=_F32 if vector else qtype,
        make=_Vector(rows, head_rows, qtype) if vector else PairedRows(rows, head_rows),
        offset=entry.start,
        path=path,
    )


@frozen(eq=False)
class PairedRows:
    """Makes rows [start, stop) of a matrix whose heads have the two rows of each pair side by side.

    Attributes:
        rows: as stored, shape (rows, bytes of a row).
        head_rows: rows of a head.

    """

    rows: NDArray[np.uint8]
    head_rows: int

    def __call__(self, start: int, stop: int) -> NDArray[np.uint8]:
        head, place = np.divmod(np.arange(start, stop), self.head_rows)
        pair, second = np.divmod(place, 2)
        taken: NDArray[np.uint8] = self.rows[head * self.head_rows + second * (self.head_rows // 2) + pair]
        return taken


@frozen(eq=False)
class _Vector:
    """Makes the one row of a vector: elements paired where `head_rows` is not 0, as float32."""

    elements: NDArray[np.uint8]
    head_rows: int
    qtype: QType

    def __call__(self, start: int, stop: int) -> NDArray[np.uint8]:
        taken = self.elements
        if self.head_rows:
            taken = PairedRows(taken, self.head_rows)(0, len(taken))
        taken = np.ascontiguousarray(taken)
        if self.qtype.name == "F16":
            taken = taken.view("<f2").astype("<f4").view(np.uint8)
        elif self.qtype.name == "BF16":  # the upper half of a float32
            taken = (taken.view("<u2").astype("<u4") << 16).view(np.uint8)
        return taken.reshape(1, -1)[start:stop]
