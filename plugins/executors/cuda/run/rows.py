"""What a step says of its tokens, on both sides: pinned host memory that is filled, and device memory that is read."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from attrs import define, field
from numpy.typing import NDArray

from mortice.plugins.executors.cuda.device.device import Device
from mortice.plugins.executors.cuda.device.stream import Stream
from mortice.plugins.executors.cuda.lowering.launches import MAX_SEQUENCES, StepRows
from mortice.plugins.executors.cuda.run.kv_pool import CudaSequence

__all__ = ["Row", "RowTable", "one_row_each"]

Row = tuple[CudaSequence, int, int, bool]
"""(sequence, token id, position, whether logits are wanted)"""


def one_row_each(rows: Sequence[Row]) -> bool:
    """Whether each row is the only one of its sequence."""
    return len(rows) <= MAX_SEQUENCES and len({row[0].slot for row in rows}) == len(rows)


_TOKEN_IDS, _POSITIONS, _TABLES, _SELECTED, _PAGES = range(5)


@define(eq=False)
class RowTable:
    """int32 arrays behind one copy: token ids, positions, page tables, selected rows, pages.

    Attributes:
        device: where.
        rows: rows of a step at most.
        sequences: sequences at most.
        pages_a_sequence: pages of a full sequence.

    """

    device: Device
    rows: int
    sequences: int
    pages_a_sequence: int
    _host: Any = field(init=False, repr=False)
    _memory: Any = field(init=False, repr=False)
    _parts: list[NDArray[np.int32]] = field(init=False, repr=False)
    _starts: list[int] = field(init=False, repr=False)

    def __attrs_post_init__(self) -> None:
        counts = (self.rows, self.rows, self.rows, self.rows, self.sequences * self.pages_a_sequence)
        self._starts = [sum(counts[:part]) for part in range(len(counts))]
        self._host = self.device.allocate_host(4 * sum(counts))
        self._memory = self.device.allocate(4 * sum(counts))
        numbers = self._host.array.view(np.int32)
        numbers[:] = 0
        self._parts = [numbers[start : start + count] for start, count in zip(self._starts, counts, strict=True)]

    @staticmethod
    def nbytes(rows: int, sequences: int, pages_a_sequence: int) -> int:
        """Bytes on the device."""
        return 4 * (4 * rows + sequences * pages_a_sequence)

    def _address(self, part: int) -> int:
        return int(self._memory.address) + 4 * self._starts[part]

    @property
    def selected(self) -> int:
        """Device address of the selected rows."""
        return self._address(_SELECTED)

    @property
    def token_ids(self) -> int:
        """Device address of the token ids."""
        return self._address(_TOKEN_IDS)

    @property
    def positions(self) -> int:
        """Device address of the positions."""
        return self._address(_POSITIONS)

    def structure(self) -> StepRows:
        """What kernels are handed."""
        return StepRows(
            token_ids=self.token_ids,
            positions=self.positions,
            tables=self._address(_TABLES),
            pages=self._address(_PAGES),
        )

    def enter_pages(self, sequence: CudaSequence) -> None:
        """Note a sequence's pages on the host."""
        start = sequence.slot * self.pages_a_sequence
        self._parts[_PAGES][start : start + len(sequence.pages)] = sequence.pages

    def send_pages(self, sequence: CudaSequence, stream: Stream) -> None:
        """Bring a sequence's pages to the device, and nothing else."""
        start = 4 * (self._starts[_PAGES] + sequence.slot * self.pages_a_sequence)
        stream.copy_from_host(self._memory.address + start, self._host.address + start, 4 * len(sequence.pages))

    def send(self, rows: list[Row], stream: Stream) -> list[int]:
        """Bring the rows of a step to the device; the numbers of those whose logits are wanted."""
        stream.synchronize()  # the copy before may still read the pinned memory
        for i, (sequence, token, position, _) in enumerate(rows):
            self._parts[_TOKEN_IDS][i] = token
            self._parts[_POSITIONS][i] = position
            self._parts[_TABLES][i] = sequence.slot * self.pages_a_sequence
        wanted = [i for i, row in enumerate(rows) if row[3]]
        self._parts[_SELECTED][: len(wanted)] = wanted
        stream.copy_from_host(self._memory.address, self._host.address, self._memory.nbytes)
        return wanted

    def select(self, rows: list[int], stream: Stream) -> None:
        """Bring other selected rows to the device."""
        stream.synchronize()
        self._parts[_SELECTED][: len(rows)] = rows
        start = 4 * self._starts[_SELECTED]
        stream.copy_from_host(self._memory.address + start, self._host.address + start, 4 * len(rows))

    def close(self) -> None:
        """Give the memory back."""
        self._memory.close()
        self._host.close()
