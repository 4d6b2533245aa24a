"""How linear maps of many rows are cut up: rows a pass, slices of columns, pieces of weights, and memory for them.

Three ways to multiply, by the rows of a step (`RowPath`): ``ops/gemv.cu`` for one row, and where float32 must be
exact; kernels that expand weights in registers for tensor cores, for some: ``ops/matmul_ring.cu`` where card and shapes
allow (`ring_shape`), else ``ops/matmul_wgmma.cu`` on compute capability 9.0 and ``ops/matmul.cu`` on all other cards; a
weight expanded to halves in a bounded scratch and cuBLAS for many. How much memory that takes does not depend on the
types of weights, so `fit` can ask before any is read.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise
from typing import Literal

from attrs import astuple, fields, frozen

from mortice.plugins.executors.cuda.lowering.fusion import LinearGroup

__all__ = [
    "GEMM_FROM_ROWS",
    "GEMV_PASS",
    "LEAST_SLICE",
    "MATMUL_TILES",
    "WGMMA_TILES",
    "AttentionTile",
    "MatmulScratch",
    "MatmulTile",
    "Piece",
    "RowPath",
    "Slices",
    "attention_tile",
    "joint_scratch",
    "matmul_scratch",
    "pieces_of",
    "row_path",
    "row_paths",
    "rows_at_once",
    "slices_of",
    "steps_of",
    "units_of",
]

GEMV_PASS = 8
"""Rows of a pass of ``ops/gemv.cu`` where it serves more than one."""

STEP = 128
"""Columns of a step of ``ops/matmul.cu``: a chunk of 32 for each lane of four."""

GEMM_FROM_ROWS = 129
"""Rows from which expanding weights to memory and cuBLAS is faster than passes of 64: measured on an H100 with
``ops/matmul.cu``, see docs/design/prefill-performance.md. `crossovers` finds the card's
own."""

WEIGHT_SCRATCH = 128 << 20
"""Bytes of expanded weights at a time, unless a single 128 outputs need more."""

_MATMUL_ROWS = 256
"""Rows given at once to the kernels that expand weights in registers where there is no cuBLAS."""

_SHARED_BYTES = 96 << 10
"""Of a block's input; all cards from compute capability 8.0 on have this much (CUDA C++ Programming Guide)."""

_WGMMA_SHARED_BYTES = 224 << 10
"""The same where warpgroups multiply, on compute capability 9.0."""

_SUM_BYTES_OF_STEP = 2_400_000
"""Of sums written and read again in the time that all warpgroups take for so many steps, 1.6 µs: fitted, as the next,
to an H100's times for 8B with 8 to 64 rows, see docs/design/prefill-performance.md."""

_CHAIN = 0.6
"""Of that time, what a warpgroup with nothing beside it takes for them."""

LEAST_SLICE = 1024
"""Columns of a tile, where rows are several tiles long."""

_GOOD_ENOUGH = 0.9
"""Of the card's warps with something to do; cutting further costs more than it gives."""

_ALIGNMENT = 256


@frozen(kw_only=True)
class MatmulTile:
    """A variant of ``ops/matmul.cu`` or ``ops/matmul_wgmma.cu``.

    Attributes:
        rows: of the step served by one pass over the weights.
        height: times 16 rows of a weight that are taken at a time.
        threads: of a block.
        warps: that take them together: one, or the four of a warpgroup by ``ops/matmul_wgmma.cu``.

    """

    rows: int
    height: int
    threads: int
    warps: int = 1

    @property
    def by_warpgroups(self) -> bool:
        """Whether it is one of ``ops/matmul_wgmma.cu``."""
        return self.warps > 1

    @property
    def together(self) -> int:
        """Steps that a slice is whole lots of: what the kernel loads at once."""
        return 2 if self.by_warpgroups else 1

    @property
    def takers(self) -> int:
        """Warps or warpgroups of a block, which take units by turns."""
        return self.threads // (32 * self.warps)


MATMUL_TILES = (
    MatmulTile(rows=8, height=1, threads=512),
    MatmulTile(rows=16, height=1, threads=512),
    MatmulTile(rows=32, height=1, threads=512),
    MatmulTile(rows=64, height=2, threads=256),
)
"""By rows; a step takes the first that holds its rows, or several passes of the last."""

WGMMA_TILES = tuple(MatmulTile(rows=tile.rows, height=4, threads=512, warps=4) for tile in MATMUL_TILES)
"""What stands in for each where warpgroups multiply."""


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
        rows: rows of a pass of ``ops/gemv.cu`` or of what expands weights in registers; for cuBLAS those of the passes
            of maps that need float32.
        least: the fewest rows of a step that goes this way.
        alone: whether each of them is the only one of its sequence, which is for attention to know.

    """

    kind: Literal["gemv", "matmul", "gemm"]
    rows: int
    least: int
    alone: bool = False

    def tile(self, *, wgmma: bool) -> MatmulTile:
        """The variant of ``ops/matmul.cu``, or with `wgmma` of ``ops/matmul_wgmma.cu``."""
        return next(tile for tile in (WGMMA_TILES if wgmma else MATMUL_TILES) if tile.rows == self.rows)


@frozen
class Slices:
    """How the columns of the input are shared: `count` slices of `steps` steps, the last perhaps shorter."""

    count: int
    steps: int


def steps_of(columns: int, tile: MatmulTile) -> int:
    """Steps of a row of so many columns."""
    return -(-columns // (STEP * tile.together)) * tile.together


def slices_of(columns: int, units: int, tile: MatmulTile, sm_count: int) -> Slices:
    """Enough slices that the input of one fits a block and that the card's warps all get units; not more.

    Args:
        columns: of the input.
        units: what a warp takes at a time of all weights of the group.
        tile: the variant of the kernel.
        sm_count: multiprocessors of the card.

    """
    if tile.by_warpgroups:
        return _wgmma_slices(columns, units, tile, sm_count)
    steps = -(-columns // STEP)
    most_steps = max(1, _SHARED_BYTES // (2 * STEP * tile.rows))
    warps = sm_count * tile.threads // 32
    wanted = max(-(-steps // most_steps), round(_GOOD_ENOUGH * warps / units), 1)
    each = -(-steps // min(steps, wanted))
    return Slices(count=-(-steps // each), steps=each)


def _wgmma_slices(columns: int, units: int, tile: MatmulTile, sm_count: int) -> Slices:
    """The slices with which the busiest block is done first, what the sums take counted as well.

    Where all warpgroups of a block have units, memory sets the pace, and what counts is the block's steps; the chain of
    a single one's steps is longer where they have not.
    """
    lot = STEP * tile.together
    whole, most = -(-columns // lot), _WGMMA_SHARED_BYTES // (2 * lot * tile.rows)
    sums = 4 * tile.rows * units * 16 * tile.height / _SUM_BYTES_OF_STEP

    def cost(each: int) -> float:
        count = -(-whole // each)
        of_block = -(-units // max(1, sm_count // count))
        chain = -(-of_block // tile.takers)
        return each * max(of_block / tile.takers, _CHAIN * chain) + count * sums

    each = min(range(1, min(whole, most) + 1), key=cost)
    return Slices(count=-(-whole // each), steps=each * tile.together)


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
        scales: of its rows, or of each slice of them.
        squares: sums of the squares of the same.
        products: float32 sums.
        weights: expanded weights.
        blas: what cuBLAS works in.
        nbytes: of all.

    """

    inputs: int
    scales: int
    squares: int
    products: int
    weights: int
    blas: int
    nbytes: int


def rows_at_once(step_tokens: int, *, exact: bool, cublas: bool) -> int:
    """Rows of a step at most; longer ones are run in parts.

    Several passes of what expands weights in registers leave several slices of sums, and gain nothing from more rows.
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
    """What warps or warpgroups take at a time, of all maps of a group."""
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
    inputs = scales = products = weights = 0
    for group, rows in _different(groups):
        last = row_path(paths, rows)
        by_gemm = last.kind == "gemm"
        most = min(rows, last.least - 1) if by_gemm else rows
        scales = max(scales, 4 * rows)
        columns = group.linears[0].weight.columns
        outputs = [linear.weight.rows for linear in group.linears]
        ways = [path for path in paths if path.kind == "matmul"]
        for i, path in enumerate(ways):
            if i and most <= ways[i - 1].rows:
                break
            served = most if path.rows == MATMUL_TILES[-1].rows else min(most, path.rows)
            tiles = [path.tile(wgmma=wgmma) for wgmma in (False, True)]
            width = max(STEP * steps_of(columns, tile) for tile in tiles)
            inputs = max(inputs, 2 * -(-served // path.rows) * path.rows * width)
            counts = [slices_of(columns, units_of(outputs, tile), tile, sm_count).count for tile in tiles]
            most_slices = max(*counts, columns // LEAST_SLICE)  # of any kernel
            scales = max(scales, 4 * most_slices * served)
            products = max(products, 4 * most_slices * served * sum(outputs))
        if by_gemm:
            inputs = max(inputs, 2 * rows * columns)
            largest = max(sum(piece.rows for piece in lot) for lot in pieces_of(group))
            weights = max(weights, 2 * largest * columns)
            products = max(products, 4 * rows * largest)
    scales = scales if inputs else 0
    return _scratch((inputs, scales, scales, products, weights, cublas_bytes if weights else 0))


def _different(groups: Sequence[tuple[LinearGroup, int]]) -> Iterable[tuple[LinearGroup, int]]:
    """Of groups whose products take equal memory the first; layers are alike."""
    first: dict[tuple[int, bool, tuple[tuple[int, int], ...]], tuple[LinearGroup, int]] = {}
    for group, rows in groups:
        weights = tuple((linear.weight.rows, linear.weight.columns) for linear in group.linears)
        first.setdefault((rows, group.gated is not None, weights), (group, rows))
    return first.values()


def joint_scratch(scratches: Sequence[MatmulScratch]) -> MatmulScratch:
    """One that serves wherever any of those does."""
    starts = [astuple(each) for each in scratches]
    sizes = [[stop - start for start, stop in pairwise(each)] for each in starts]
    return _scratch([max(each) for each in zip(*sizes, strict=True)])


def _scratch(sizes: Sequence[int]) -> MatmulScratch:
    """Inputs, scales, squares, products, weights and cuBLAS's own, one after the other."""
    starts = [0]
    for size in sizes:
        starts.append(-(-(starts[-1] + size) // _ALIGNMENT) * _ALIGNMENT)
    return MatmulScratch(**dict(zip((field.name for field in fields(MatmulScratch)), starts, strict=True)))
