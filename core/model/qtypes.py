"""The one table of GGML tensor types: id, name, block shape.

Ids and block sizes are those of ggml's ``ggml.h`` / ``ggml-common.h``; a test compares the table with the one in
the ``gguf`` package. A plugin may add types; nothing here ever guesses one (TRAPS: no default, no size heuristics).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from types import MappingProxyType

from attrs import field, frozen, validators

from mortice.core.errors import InputError

__all__ = ["GGML_TYPES", "QType", "qtype_table"]


@frozen
class QType:
    """How the elements of a tensor row are stored.

    Attributes:
        id: the type id in the file (GGML's numbering).
        name: GGML's name, upper case, for instance ``Q4_K``.
        block_elements: elements per block; a row is a whole number of blocks.
        block_bytes: bytes per block.

    """

    id: int = field(validator=validators.ge(0))
    name: str
    block_elements: int = field(validator=validators.ge(1))
    block_bytes: int = field(validator=validators.ge(1))

    @property
    def bits_per_weight(self) -> float:
        """Bits a stored element takes, scales included."""
        return 8 * self.block_bytes / self.block_elements

    @property
    def is_quantized(self) -> bool:
        """Whether elements share a block (false for F32, F16, BF16 and the integer types)."""
        return self.block_elements > 1

    def row_bytes(self, columns: int) -> int:
        """Bytes of one row of `columns` elements.

        Raises:
            ValueError: when `columns` is not a whole number of blocks.

        """
        blocks, rest = divmod(columns, self.block_elements)
        if rest:
            raise ValueError(f"{self.name} rows are whole blocks of {self.block_elements}; {columns} is not a multiple")
        return blocks * self.block_bytes

    def nbytes(self, shape: tuple[int, ...]) -> int:
        """Bytes of a tensor of `shape` (rows first, the last axis is the row)."""
        if not shape:
            return 0
        rows = 1
        for extent in shape[:-1]:
            rows *= extent
        return rows * self.row_bytes(shape[-1])


_TABLE = (
    QType(0, "F32", 1, 4),
    QType(1, "F16", 1, 2),
    QType(2, "Q4_0", 32, 18),
    QType(3, "Q4_1", 32, 20),
    QType(6, "Q5_0", 32, 22),
    QType(7, "Q5_1", 32, 24),
    QType(8, "Q8_0", 32, 34),
    QType(9, "Q8_1", 32, 40),
    QType(10, "Q2_K", 256, 84),
    QType(11, "Q3_K", 256, 110),
    QType(12, "Q4_K", 256, 144),
    QType(13, "Q5_K", 256, 176),
    QType(14, "Q6_K", 256, 210),
    QType(15, "Q8_K", 256, 292),
    QType(16, "IQ2_XXS", 256, 66),
    QType(17, "IQ2_XS", 256, 74),
    QType(18, "IQ3_XXS", 256, 98),
    QType(19, "IQ1_S", 256, 50),
    QType(20, "IQ4_NL", 32, 18),
    QType(21, "IQ3_S", 256, 110),
    QType(22, "IQ2_S", 256, 82),
    QType(23, "IQ4_XS", 256, 136),
    QType(24, "I8", 1, 1),
    QType(25, "I16", 1, 2),
    QType(26, "I32", 1, 4),
    QType(27, "I64", 1, 8),
    QType(28, "F64", 1, 8),
    QType(29, "IQ1_M", 256, 56),
    QType(30, "BF16", 1, 2),
    QType(34, "TQ1_0", 256, 54),
    QType(35, "TQ2_0", 256, 66),
    QType(39, "MXFP4", 32, 17),
    QType(40, "NVFP4", 64, 36),
)

GGML_TYPES: Mapping[int, QType] = MappingProxyType({qtype.id: qtype for qtype in _TABLE})
"""GGML's own types by id. What can be *parsed*; what can be *run* is what the registered plugins provide."""


def qtype_table(extra: Iterable[QType] = ()) -> Mapping[int, QType]:
    """GGML's table with `extra` types from plugins added.

    Raises:
        InputError: when an extra type takes an id of the table with another meaning.

    """
    table = dict(GGML_TYPES)
    for qtype in extra:
        known = table.setdefault(qtype.id, qtype)
        if known != qtype:
            raise InputError(f"tensor type id {qtype.id} is {known}, cannot also be {qtype}")
    return MappingProxyType(table)
