"""Places buffers in one block of memory by when they live; made once, before anything runs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from attrs import frozen

from mortice.core.model.operators import Buffer

__all__ = ["Workspace", "place_buffers"]

_ALIGNMENT = 256


@frozen
class Workspace:
    """Offsets in bytes in a block of `nbytes`."""

    offsets: Mapping[Buffer, int]
    nbytes: int


def place_buffers(
    uses: Sequence[tuple[Sequence[Buffer], Sequence[Buffer]]],
    rows: Callable[[Buffer], int],
    keep: Sequence[Buffer] = (),
) -> Workspace:
    """Place every buffer so that no two that live at the same time overlap.

    Args:
        uses: for each group in order, the buffers it reads and those it writes.
        rows: tokens a buffer has room for.
        keep: buffers that live on after the last group.

    """
    born: dict[Buffer, int] = {}
    dies: dict[Buffer, int] = {}
    for place, (inputs, outputs) in enumerate(uses):
        for buffer in outputs:
            born.setdefault(buffer, place)
        for buffer in (*inputs, *outputs):
            assert buffer in born, f"{buffer.name} is read before it is written"
            dies[buffer] = place
    dies.update(dict.fromkeys(keep, len(uses)))
    placed: list[tuple[int, int, int, int]] = []  # offset, end, born, dies
    offsets: dict[Buffer, int] = {}
    # the largest first: the small ones then fill the gaps
    for buffer in sorted(born, key=lambda item: (-item.width * rows(item), born[item])):
        size = -(-4 * buffer.width * rows(buffer) // _ALIGNMENT) * _ALIGNMENT
        first, last = born[buffer], dies[buffer]
        taken = sorted((start, end) for start, end, since, until in placed if since <= last and first <= until)
        offset = 0
        for start, end in taken:
            if offset + size <= start:
                break
            offset = max(offset, end)
        placed.append((offset, offset + size, first, last))
        offsets[buffer] = offset
    return Workspace(offsets=offsets, nbytes=max((end for _, end, _, _ in placed), default=0))
