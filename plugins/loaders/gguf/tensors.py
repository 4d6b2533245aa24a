"""The tensor table of a GGUF file: what each entry says, and whether the data it points to can be there."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from operator import attrgetter

from attrs import frozen

from mortice.core.counts import counted
from mortice.core.errors import ModelFileError
from mortice.core.model.qtypes import QType
from mortice.plugins.loaders.gguf.format import INT64_MAX, MAX_DIMENSIONS, MAX_TENSOR_NAME_BYTES
from mortice.plugins.loaders.gguf.reader import Reader, quoted

__all__ = ["TensorInfo", "aligned", "check_layout", "read_tensor"]


@frozen(kw_only=True)
class TensorInfo:
    """One entry of the tensor table.

    Attributes:
        name: the name in the file.
        shape: extents, rows first (the file has them the other way round).
        qtype: how rows are stored.
        nbytes: bytes as stored, ``qtype.nbytes(shape)``.
        offset: of the data, from the start of the data section.
        info_offset: of this entry, from the start of the file.

    """

    name: str
    shape: tuple[int, ...]
    qtype: QType
    nbytes: int
    offset: int
    info_offset: int


def aligned(offset: int, alignment: int) -> int:
    """The first multiple of `alignment` that is not below `offset`."""
    return -(-offset // alignment) * alignment


def read_tensor(reader: Reader, index: int, alignment: int, qtypes: Mapping[int, QType]) -> TensorInfo:
    """Read and check one entry of the tensor table.

    Raises:
        ModelFileError: naming the tensor, what it says and what was expected.

    """
    info_offset = reader.position
    name = reader.string(f"name of tensor {index}", MAX_TENSOR_NAME_BYTES)
    if not name:
        raise reader.error(f"tensor {index} has an empty name", info_offset)
    label = f"tensor {quoted(name)}"
    shape = _read_shape(reader, label)

    type_offset = reader.position
    type_id = reader.number("u4", f"type of {label}")
    qtype = qtypes.get(type_id)
    if qtype is None:
        known = ", ".join(f"{number} {known.name}" for number, known in sorted(qtypes.items()))
        raise reader.error(
            f"{label} has unknown type id {type_id}; known are {known}; others need a plugin", type_offset
        )
    if shape[-1] % qtype.block_elements:
        raise reader.error(
            f"{label} has rows of {counted(shape[-1], 'element')}, a multiple of {qtype.name}'s block of "
            f"{qtype.block_elements} was expected",
            info_offset,
        )
    nbytes = qtype.nbytes(shape)
    if nbytes > INT64_MAX:
        raise reader.error(f"{label} of shape {shape} has {nbytes} bytes, more than 64 bits can count", info_offset)

    at = reader.position
    offset = reader.number("u8", f"offset of {label}")
    if offset % alignment:
        raise reader.error(f"{label} has offset {offset}, a multiple of the alignment {alignment} was expected", at)
    if offset + nbytes > INT64_MAX:
        raise reader.error(f"{label} has offset {offset}, which lies beyond any file", at)
    return TensorInfo(name=name, shape=shape, qtype=qtype, nbytes=nbytes, offset=offset, info_offset=info_offset)


def _read_shape(reader: Reader, label: str) -> tuple[int, ...]:
    at = reader.position
    num_dims = reader.number("u4", f"number of dimensions of {label}")
    if not 1 <= num_dims <= MAX_DIMENSIONS:
        raise reader.error(f"{label} has {num_dims} dimensions, 1 to {MAX_DIMENSIONS} were expected", at)
    extents: list[int] = []
    elements = 1
    for axis in range(num_dims):
        at = reader.position
        extent = reader.number("u8", f"extents of {label}")
        if not 1 <= extent <= INT64_MAX:
            signed = extent - 2**64 if extent > INT64_MAX else extent
            raise reader.error(f"{label} has extent {signed} on axis {axis}, at least 1 was expected", at)
        extents.append(extent)
        elements *= extent
        if elements > INT64_MAX:
            raise reader.error(f"{label} has more elements than 64 bits can count, extents {extents}", at)
    return tuple(reversed(extents))


def check_layout(reader: Reader, tensors: Sequence[TensorInfo], alignment: int) -> int:
    """Check that the data of all tensors lie in the file and apart; return where the data section starts.

    Gaps between tensors are accepted. The padding after the last tensor may be missing, since some writers
    pad before each tensor instead of after it; a part of it is a sign of a download cut short.

    Raises:
        ModelFileError: naming two tensors that overlap, or the first that is not whole and the bytes missing.

    """
    start = aligned(reader.position, alignment)
    if not tensors:
        return start
    in_order = sorted(tensors, key=attrgetter("offset"))
    for before, after in pairwise(in_order):
        if before.offset + before.nbytes > after.offset:
            raise reader.error(
                f"tensors {quoted(before.name)} and {quoted(after.name)} overlap: data of the first end at "
                f"{before.offset + before.nbytes} of the data section, the second begins at {after.offset}",
                after.info_offset,
            )
    end = start + in_order[-1].offset + in_order[-1].nbytes
    if end > reader.size:
        broken = next(t for t in in_order if start + t.offset + t.nbytes > reader.size)
        raise _cut_short(reader, f"the data of tensor {quoted(broken.name)}", end)
    if end < reader.size < aligned(end, alignment):
        raise _cut_short(reader, "the padding after the last tensor", aligned(end, alignment))
    return start


def _cut_short(reader: Reader, what: str, wanted: int) -> ModelFileError:
    missing = wanted - reader.size
    lost = counted(missing, "byte is", "bytes are")
    return reader.error(
        f"file is truncated in {what}: {lost} missing, {wanted} were expected in all (an interrupted download?)",
        reader.size,
    )
