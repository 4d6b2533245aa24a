"""Matrices quantised as they are read: the file as one with smaller weights, each piece made when it is asked for."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Final

import numpy as np
from attrs import evolve, frozen
from numpy.typing import NDArray

from mortice.core.counts import counted
from mortice.core.errors import ModelFileError, PluginError
from mortice.core.model.findings import Finding
from mortice.core.model.qtypes import QType
from mortice.core.model.types import ModelFile, TensorView

__all__ = ["FLOATS", "Dequantize", "Quantize", "quantized"]

Dequantize = Callable[[NDArray[np.uint8]], NDArray[np.float32]]
Quantize = Callable[[NDArray[np.float32]], NDArray[np.uint8]]

FLOATS: Final = ("F32", "F16", "BF16")
"""Types that are quantised; what is quantised already stays as it is."""

_KEPT: Final = ("_norm.weight", "ffn_gate_inp.weight", "position_embd.weight", "token_types.weight")
"""Ends of names of matrices that llama-quantize leaves alone, too."""

_PIECE = 1 << 20
"""Elements expanded at a time, 4 MiB of float32."""


def quantized(file: ModelFile, qtype: QType, quantize: Quantize, dequantize: Mapping[str, Dequantize]) -> ModelFile:
    """A file whose matrices have another type; it takes `file` over and is closed instead of it.

    Quantised is what ``llama-quantize --pure`` would: matrices named ``*.weight``, but no norms, routers and position
    tables. A matrix whose rows are not whole blocks stays as it is; a note says so.

    Args:
        file: an opened model.
        qtype: the type wanted.
        quantize: float32 of shape (rows, columns) to bytes of rows; FloatingPointError for values it cannot hold.
        dequantize: for each type of `FLOATS`, bytes of rows to float32.

    """
    tensors: dict[str, TensorView] = {}
    notes: list[Finding] = []
    before = after = count = 0
    for name, tensor in file.tensors.items():
        tensors[name] = tensor
        if not _is_matrix_of_floats(tensor):
            continue
        if tensor.columns % qtype.block_elements:
            notes.append(_kept(tensor, qtype))
            continue
        made = evolve(
            tensor,
            data=None,
            reader=None,
            qtype=qtype,
            make=_QuantizedRows(tensor, qtype, quantize, dequantize[tensor.qtype.name]),
        )
        tensors[name] = made
        before, after, count = before + tensor.nbytes, after + made.nbytes, count + 1

    def close() -> None:
        tensors.clear()  # what refers to the mapping goes before the mapping
        file.close()

    notes.insert(0, _summary(qtype, count, before, after))
    return evolve(file, tensors=MappingProxyType(tensors), notes=(*file.notes, *notes), close=close)


def _is_matrix_of_floats(tensor: TensorView) -> bool:
    name = tensor.name
    return (
        len(tensor.shape) > 1 and tensor.qtype.name in FLOATS and name.endswith(".weight") and not name.endswith(_KEPT)
    )


def _kept(tensor: TensorView, qtype: QType) -> Finding:
    return Finding(
        rule="quantize.kept",
        severity="note",
        subject=tensor.name,
        found=f"rows of {counted(tensor.columns, 'element')}, stays {tensor.qtype.name}",
        wanted=f"{qtype.name} takes rows of whole blocks of {qtype.block_elements}",
    )


def _summary(qtype: QType, count: int, before: int, after: int) -> Finding:
    become = counted(count, "matrix becomes", "matrices become")
    found = f"{become} {qtype.name}, {before / 1e6:.1f} MB become {after / 1e6:.1f} MB"
    return Finding(
        rule="quantize.done",
        severity="note" if count else "warning",
        subject="model.quantize",
        found=found if count else f"no matrix of {', '.join(FLOATS)} with rows for {qtype.name} is there",
        wanted="quantised while they are uploaded; the file stays as it is" if count else "nothing is quantised",
    )


@frozen(eq=False)
class _QuantizedRows:
    """Makes rows [start, stop) of a tensor in another type."""

    source: TensorView
    qtype: QType
    quantize: Quantize
    dequantize: Dequantize

    def __call__(self, start: int, stop: int) -> NDArray[np.uint8]:
        columns = self.source.columns
        out = np.empty((stop - start, self.qtype.row_bytes(columns)), np.uint8)
        piece = max(1, _PIECE // columns)
        for at in range(start, stop, piece):
            end = min(at + piece, stop)
            values = self.dequantize(np.ascontiguousarray(self.source.row_bytes(at, end)))
            try:
                rows = self.quantize(values)
            except FloatingPointError as error:
                where = f"tensor {self.source.name}, rows {at} to {end - 1}"
                raise ModelFileError(self.source.path, f"{where}: {error}; {self.qtype.name} cannot hold it") from None
            if rows.dtype != np.uint8 or rows.shape != out[at - start : end - start].shape:
                found, wanted = f"{rows.dtype} {rows.shape}", f"uint8 {out[at - start : end - start].shape}"
                raise PluginError(f"{self.qtype.name}: its quantize gave {found}, wanted {wanted}")
            out[at - start : end - start] = rows
        return out
