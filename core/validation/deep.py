"""The tensor data themselves: NaN and Inf, rows of zeros, scales out of range. The only validation that reads them.

Pieces of at most `PIECE_BYTES` are read into memory that each thread keeps, so what it takes does not grow with the
model; rows longer than that are judged in parts.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import suppress

import numpy as np
from attrs import define, field, frozen
from numpy.typing import NDArray

from mortice.core.counts import counted
from mortice.core.model.findings import Finding, Severity
from mortice.core.model.types import ModelFile, TensorView
from mortice.core.plugin.registry import Registry
from mortice.core.validation.magnitudes import FLOAT16_MAX, Rows, reads_scales, row_magnitudes

__all__ = ["PIECE_BYTES", "Progress", "data_findings"]

PIECE_BYTES = 2 << 20
"""What a thread reads at a time: it stays in a core's cache, and a thread has one such piece."""

_MOST_THREADS = 8
_INTEGERS = frozenset({"I8", "I16", "I32", "I64"})
_MAY_BE_ZERO = ("token_embd", "output", "position_embd")

Progress = Callable[[int, int], None]
"""Told the bytes checked so far, and those there are."""


def data_findings(file: ModelFile, registry: Registry, progress: Progress | None = None) -> list[Finding]:
    """Read every tensor once and say what is wrong in it, one finding for each tensor and rule.

    Args:
        file: the opened model; integer tensors, and types no plugin can read, are left out (the latter with a note).
        registry: for types whose blocks are not known here.
        progress: told after each piece, in the calling thread.

    Raises:
        ModelFileError: when a file cannot be read to its end any more.

    """
    check = _Check(registry=registry)
    work = [piece for tensor in file.tensors.values() for piece in check.pieces(tensor)]
    total, done = sum(piece.nbytes for piece in work), 0
    with _pool() as pool:
        for piece, rows in _in_parallel(pool, work, check.look):
            check.tally(piece, rows)
            done += piece.nbytes
            if progress is not None:
                progress(done, total)
    return check.findings(file)


@frozen(eq=False)
class _Piece:
    """Rows [start, stop) of a tensor, or of one long row the blocks [first, last)."""

    tensor: TensorView
    start: int
    stop: int
    first: int
    last: int

    @property
    def nbytes(self) -> int:
        return (self.stop - self.start) * (self.last - self.first)


@define(eq=False)
class _Tally:
    """What was found in a tensor so far; `zero_bytes` counts bytes of rows of which only zeros were seen."""

    broken: set[int] = field(factory=set)
    large: set[int] = field(factory=set)
    not_zero: NDArray[np.bool_] = field(factory=lambda: np.zeros(0, np.bool_))


@define(eq=False, kw_only=True)
class _Check:
    registry: Registry
    tallies: dict[str, _Tally] = field(factory=dict)
    skipped: list[TensorView] = field(factory=list)
    _memory: threading.local = field(factory=threading.local)

    def pieces(self, tensor: TensorView) -> Iterator[_Piece]:
        qtype = tensor.qtype
        if qtype.name in _INTEGERS:
            return
        if not reads_scales(qtype) and qtype.name not in self.registry.qtypes:
            self.skipped.append(tensor)
            return
        self.tallies[tensor.name] = _Tally(not_zero=np.zeros(tensor.rows, np.bool_))
        row_bytes = qtype.row_bytes(tensor.columns)
        rows = PIECE_BYTES // row_bytes
        if rows:
            for start in range(0, tensor.rows, rows):
                yield _Piece(tensor, start, min(start + rows, tensor.rows), 0, row_bytes)
            return
        part = PIECE_BYTES // qtype.block_bytes * qtype.block_bytes or qtype.block_bytes
        for row in range(tensor.rows):
            for first in range(0, row_bytes, part):
                yield _Piece(tensor, row, row + 1, first, min(first + part, row_bytes))

    def look(self, piece: _Piece) -> Rows:
        """Read a piece and judge its rows; called by several threads."""
        tensor = piece.tensor
        memory = self._buffer(piece.nbytes)
        tensor.read_into(memory, piece.start * tensor.qtype.row_bytes(tensor.columns) + piece.first)
        provided = self.registry.qtypes.get(tensor.qtype.name)
        rows = memory.reshape(piece.stop - piece.start, -1)
        return row_magnitudes(rows, tensor.qtype, provided.value.dequantize if provided is not None else None)

    def _buffer(self, nbytes: int) -> NDArray[np.uint8]:
        memory: NDArray[np.uint8] | None = getattr(self._memory, "piece", None)
        if memory is None or len(memory) < nbytes:
            memory = self._memory.piece = np.empty(max(nbytes, PIECE_BYTES), np.uint8)
        return memory[:nbytes]

    def tally(self, piece: _Piece, rows: Rows) -> None:
        found = self.tallies[piece.tensor.name]
        found.broken.update((np.flatnonzero(rows.broken) + piece.start).tolist())
        found.large.update((np.flatnonzero(rows.large) + piece.start).tolist())
        found.not_zero[piece.start : piece.stop] |= ~rows.zero

    def findings(self, file: ModelFile) -> list[Finding]:
        findings = [
            _finding(tensor, "data.unread", f"type {tensor.qtype.name}", "no plugin can read it", "note")
            for tensor in self.skipped
        ]
        for name, tally in self.tallies.items():
            findings += _of_tensor(file.tensors[name], tally)
        return findings


def _of_tensor(tensor: TensorView, tally: _Tally) -> Iterator[Finding]:
    unit = "scale" if tensor.qtype.is_quantized else "value"
    if tally.broken:
        yield _finding(tensor, "data.not_finite", _where(tally.broken, tensor), f"a NaN or infinite {unit}", "error")
    if tally.large - tally.broken:
        wanted = f"values beyond {FLOAT16_MAX:g}, as no weight has them; a damaged file?"
        yield _finding(tensor, "data.range", _where(tally.large - tally.broken, tensor), wanted, "warning")
    zeros = np.flatnonzero(~tally.not_zero).tolist()
    if not zeros:
        return
    if len(zeros) == tensor.rows and not tensor.name.endswith(".bias"):
        yield _finding(tensor, "data.zero", "all values are zero", "a weight; a hole in the file?", "warning")
    elif tensor.name.endswith(".bias") or tensor.name.partition(".")[0] in _MAY_BE_ZERO:
        yield _finding(tensor, "data.zero_rows", f"{_where(zeros, tensor)} zero", "of unused tokens, perhaps", "note")
    else:
        yield _finding(tensor, "data.zero_rows", f"{_where(zeros, tensor)} zero", "a hole in the file?", "warning")


def _where(rows: Mapping[int, object] | set[int] | list[int], tensor: TensorView) -> str:
    count, first = len(rows), min(rows)
    of = f"{count} of {counted(tensor.rows, 'row')}"
    return f"{of}, the first is row {first}:" if tensor.rows > 1 else f"{of}:"


def _finding(tensor: TensorView, rule: str, found: str, wanted: str, severity: Severity) -> Finding:
    return Finding(rule=rule, severity=severity, subject=tensor.name, found=found, wanted=wanted, offset=tensor.offset)


def _pool() -> ThreadPoolExecutor:
    cores = os.cpu_count() or 1
    with suppress(AttributeError):
        cores = len(os.sched_getaffinity(0))
    return ThreadPoolExecutor(min(cores, _MOST_THREADS), "mortice-deep")


def _in_parallel(
    pool: ThreadPoolExecutor, work: list[_Piece], look: Callable[[_Piece], Rows]
) -> Iterator[tuple[_Piece, Rows]]:
    """Results as they come; few pieces wait at a time, so that Ctrl-C and an error end it soon."""
    waiting: dict[Future[Rows], _Piece] = {}
    pending = iter(work)
    try:
        while True:
            for piece in pending:
                waiting[pool.submit(look, piece)] = piece
                if len(waiting) >= 4 * _MOST_THREADS:
                    break
            if not waiting:
                return
            finished, _ = wait(waiting, return_when=FIRST_COMPLETED)
            for future in finished:
                yield waiting.pop(future), future.result()
    finally:
        pool.shutdown(cancel_futures=True)
