"""How linear maps of many rows are cut up: rows a pass, slices of columns, pieces of weights, and memory for them.

Three ways to multiply, by the rows of a step (`RowPath`): ``ops/gemv.cu`` for one row, and where float32 must be
exact; kernels that expand weights in registers for tensor cores, for some: ``ops/matmul_ring.cu`` where card and shapes
allow (`ring_shape`), else ``ops/matmul.cu``; a weight expanded to halves in a bounded scratch and cuBLAS for many. How
much memory that takes does not depend on the types of weights, so `fit` can ask before any is read.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise
from typing import Literal

from attrs import frozen

from mortice.plugins.executors.cuda.fusion import LinearGroup

__all__ = [
    "GEMM_FROM_ROWS",
    "GEMV_PASS",
    "JOIN_COLUMNS",
    "LEAST_SLICE",
    "MATMUL_TILES",
    "AttentionTile",
    "MatmulScratch",
    "MatmulTile",
    "Piece",
    "RowPath",
    "Slices",
    "attention_tile",
    "input_threads",
    "joint_scratch",
    "matmul_scratch",
    "pieces_of",
    "row_path",
    "row_paths",
    "rows_at_once",
    "slices_of",
    "units_of",
]

GEMV_PASS = 8
"""Rows of a pass of ``ops/gemv.cu`` where it serves more than one."""

STEP = 128
"""Columns of a step of ``ops/matmul.cu``: a chunk of 32 for each lane of four."""

GEMM_FROM_ROWS = 129
"""Rows from which expanding weights to memory and cuBLAS is faster than ``ops/matmul.cu``: measured on an H100, see
docs/design/prefill-performance.md. `mortice.plugins.executors.cuda.crossovers` finds the card's own."""

JOIN_COLUMNS = 20480
"""Widest row whose products ``ops/matmul_input.cu`` can finish without running out of registers."""

WEIGHT_SCRATCH = 128 << 20
"""Bytes of expanded weights at a time, unless a single 128 outputs need more."""

_MATMUL_ROWS = 256
"""Rows that ``ops/matmul.cu`` is given at once where there is no cuBLAS."""

_SHARED_BYTES = 96 << 10
"""Of a block's input; all cards from compute capability 8.0 on have this much (CUDA C++ Programming Guide)."""

LEAST_SLICE = 1024
"""Columns of a tile, where rows are several tiles long."""

_GOOD_ENOUGH = 0.9
"""Of the card's warps with something to do; cutting further costs more than it gives."""

_ALIGNMENT = 256


@frozen(kw_only=True)
class MatmulTile:
    """A variant of ``ops/matmul.cu``.

    Attributes:
        rows: of the step served by one pass over the weights.
        height: times 16 rows of a weight that a warp takes at a time.
        threads: of a block.

    """

    rows: int
    height: int
    threads: int


MATMUL_TILES = (
    MatmulTile(rows=8, height=1, threads=512),
    MatmulTile(rows=16, height=1, threads=512),
    MatmulTile(rows=32, height=1, threads=512),
    MatmulTile(rows=64, height=2, threads=256),
)
"""By rows; a step takes the first that holds its rows, or several passes of the last."""


@frozen(kw_only=True)
class AttentionTile:
    """What a block of ``ops/attention_prefill.cu`` takes.

    Attributes:
        rows: of the step.
        heads: query heads of one KV head.

    """

    rows: int
    heads: int

    @property
    def threads(self) -> int:
        """A warp for each 16 pairs of a row and a head."""
        return 2 * self.rows * self.heads


def attention_tile(group: int) -> AttentionTile:
    """About 128 pairs of a row and a head, for `group` query heads that share a KV head."""
    heads = next(heads for heads in range(min(8, group), 0, -1) if group % heads == 0)
    return AttentionTile(rows=32 if heads <= 4 else 16, heads=heads)


@frozen(kw_only=True)
class RowPath:
    """How the linear maps of a step are multiplied.

    Attributes:
        kind: see the module.
        rows: rows of a pass of ``ops/gemv.cu`` or ``ops/matmul.cu``; for cuBLAS those of the passes of maps that need
            float32.
        least: the fewest rows of a step that goes this way.
        alone: whether each of them is the only one of its sequence, which is for attention to know.

    """

    kind: Literal["gemv", "matmul", "gemm"]
    rows: int
    least: int
    alone: bool = False

    @property
    def tile(self) -> MatmulTile:
        """The variant of ``ops/matmul.cu``."""
        return next(tile for tile in MATMUL_TILES if tile.rows == self.rows)


@frozen
class Slices:
    """How the columns of the input are shared: `count` slices of `steps` steps, the last perhaps shorter."""

    count: int
    steps: int


def slices_of(columns: int, units: int, tile: MatmulTile, sm_count: int) -> Slices:
    """Enough slices that the input of one fits a block and that the card's warps all get units; not more.

    Args:
        columns: of the input.
        units: what a warp takes at a time of all weights of the group.
        tile: the variant of the kernel.
        sm_count: multiprocessors of the card.

    """
    steps = -(-columns // STEP)
    most_steps = max(1, _SHARED_BYTES // (2 * STEP * tile.rows))
    warps = sm_count * tile.threads // 32
    wanted = max(-(-steps // most_steps), round(_GOOD_ENOUGH * warps / units), 1)
    each = -(-steps // min(steps, wanted))
    return Slices(count=-(-steps // each), steps=each)


@frozen(kw_only=True)
class Piece:
    """Outputs of a group's maps that are multiplied at once: rows `start` to `stop` of map `linear`."""

    linear: int
    start: int
    stop: int

    @property
    def rows(self) -> int:
        """How many."""
        return self.stop - self.start


def pieces_of(group: LinearGroup) -> Iterator[tuple[Piece, ...]]:
    """The outputs of a group in lots whose expanded weights fit the scratch; all starts are multiples of 128 rows.

    Of a gate and its up a lot holds the same rows of both.
    """
    outputs = [linear.weight.rows for linear in group.linears]
    most = max(STEP, WEIGHT_SCRATCH // (2 * group.linears[0].weight.columns) // STEP * STEP)
    if group.gated is not None:
        each = _even(outputs[0], max(STEP, most // 2 // STEP * STEP))
        for start in range(0, outputs[0], each):
            stop = min(start + each, outputs[0])
            yield tuple(Piece(linear=i, start=start, stop=stop) for i in range(2))
        return
    lot: list[Piece] = []
    room = most
    for linear, rows in enumerate(outputs):
        each = _even(rows, most)
        for start in range(0, rows, each):
            piece = Piece(linear=linear, start=start, stop=min(start + each, rows))
            if lot and piece.rows > room:
                yield tuple(lot)
                lot, room = [], most
            lot.append(piece)
            room -= piece.rows
    yield tuple(lot)


def _even(rows: int, most: int) -> int:
    """Multiples of 128 rows, about equal, at most `most`."""
    parts = -(-rows // most)
    return -(-rows // parts // STEP) * STEP


@frozen(kw_only=True)
class MatmulScratch:
    """Offsets in bytes in one block of memory that all groups use one after the other.

    Attributes:
        inputs: the input as halves.
        scales: of its rows.
        products: float32 sums.
        weights: expanded weights.
        blas: what cuBLAS works in.
        nbytes: of all.

    """

    inputs: int
    scales: int
    products: int
    weights: int
    blas: int
    nbytes: int


def rows_at_once(step_tokens: int, *, exact: bool, cublas: bool) -> int:
    """Rows of a step at most; longer ones are run in parts.

    Several passes of ``ops/matmul.cu`` leave several slices of sums, and gain nothing from more rows.
    """
    return step_tokens if cublas or exact else min(step_tokens, _MATMUL_ROWS)


def row_paths(rows: int, *, exact: bool, cublas: bool, gemm_from_rows: int = GEMM_FROM_ROWS) -> tuple[RowPath, ...]:
    """The ways that steps of up to `rows` rows go; by rising numbers of rows."""
    paths = [RowPath(kind="gemv", rows=1, least=1)]
    if exact:
        return (*paths, RowPath(kind="gemv", rows=GEMV_PASS, least=2))
    least = 2
    for tile in MATMUL_TILES:
        paths.append(RowPath(kind="matmul", rows=tile.rows, least=least))
        least = tile.rows + 1
    if cublas:
        paths = [path for path in paths if path.least < gemm_from_rows]
        paths.append(RowPath(kind="gemm", rows=GEMV_PASS, least=gemm_from_rows))
    return tuple(path for path in paths if path.least <= rows)


def row_path(paths: Sequence[RowPath], rows: int, *, alone: bool = False) -> RowPath:
    """The way that a step of `rows` rows goes; `alone` where each is the only one of its sequence."""
    open_to = (path for path in paths if path.least <= rows and path.alone <= alone)
    return max(open_to, key=lambda path: (path.least, path.alone))


def units_of(outputs: Sequence[int], tile: MatmulTile) -> int:
    """What warps of ``ops/matmul.cu`` take at a time, of all maps of a group."""
    return sum(-(-rows // (16 * tile.height)) for rows in outputs)


def matmul_scratch(
    groups: Sequence[tuple[LinearGroup, int]], paths: Sequence[RowPath], sm_count: int, cublas_bytes: int
) -> MatmulScratch:
    """Memory that serves each group at up to its number of rows.

    Args:
        groups: with the most rows each is given.
        paths: the ways they may go.
        sm_count: multiprocessors of the card.
        cublas_bytes: what cuBLAS wants for itself.

    """
    inputs = products = weights = most_rows = 0
    for group, rows in _different(groups):
        last = row_path(paths, rows)
        by_gemm = last.kind == "gemm"
        most = min(rows, last.least - 1) if by_gemm else rows
        most_rows = max(most_rows, rows)
        columns = group.linears[0].weight.columns
        outputs = [linear.weight.rows for linear in group.linears]
        tiles = [path.tile for path in paths if path.kind == "matmul"]
        for i, tile in enumerate(tiles):
            if i and most <= tiles[i - 1].rows:
                break
            served = most if tile == MATMUL_TILES[-1] else min(most, tile.rows)
            passes = -(-served // tile.rows)
            slices = slices_of(columns, units_of(outputs, tile), tile, sm_count)
            inputs = max(inputs, 2 * passes * tile.rows * -(-columns // STEP) * STEP)
            most_slices = max(slices.count, columns // LEAST_SLICE)  # of either kernel
            products = max(products, 4 * most_slices * served * sum(outputs))
        if by_gemm:
            inputs = max(inputs, 2 * rows * columns)
            largest = max(sum(piece.rows for piece in lot) for lot in pieces_of(group))
            weights = max(weights, 2 * largest * columns)
            products = max(products, 4 * rows * largest)
    return _scratch((inputs, 4 * most_rows if inputs else 0, products, weights, cublas_bytes if weights else 0))


def _different(groups: Sequence[tuple[LinearGroup, int]]) -> Iterable[tuple[LinearGroup, int]]:
    """Of groups whose products take equal memory the first; layers are alike."""
    first: dict[tuple[int, bool, tuple[tuple[int, int], ...]], tuple[LinearGroup, int]] = {}
    for group, rows in groups:
        weights = tuple((linear.weight.rows, linear.weight.columns) for linear in group.linears)
        first.setdefault((rows, group.gated is not None, weights), (group, rows))
    return first.values()


def joint_scratch(scratches: Sequence[MatmulScratch]) -> MatmulScratch:
    """One that serves wherever any of those does."""
    starts = [(each.inputs, each.scales, each.products, each.weights, each.blas, each.nbytes) for each in scratches]
    sizes = [[stop - start for start, stop in pairwise(each)] for each in starts]
    return _scratch([max(each) for each in zip(*sizes, strict=True)])


def _scratch(sizes: Sequence[int]) -> MatmulScratch:
    """Inputs, scales, products, weights and cuBLAS's own, one after the other."""
    starts = [0]
    for size in sizes:
        starts.append(-(-(starts[-1] + size) // _ALIGNMENT) * _ALIGNMENT)
    return MatmulScratch(
        inputs=starts[0], scales=starts[1], products=starts[2], weights=starts[3], blas=starts[4], nbytes=starts[5]
    )


def input_threads(columns: int) -> int:
    """Threads of a block of ``ops/matmul_input.cu``, which holds a row in registers."""
    return 256 if columns <= 2048 else 512 if columns <= 32768 else 1024
