"""Checks of a quantisation type: its reference, its planes, and its CUDA header, most of them without a GPU.

::

    class TestTernary(QTypeSuite):
        type = TERNARY
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from mortice.core.counts import counted
from mortice.core.errors import DeviceError
from mortice.core.model.qtypes import GGML_TYPES, QType
from mortice.core.plugin.conformance import CheckedDequantize, describe, qtype_faults
from mortice.core.plugin.interfaces import QuantizationType, TriesTypes, TypeTrial
from mortice.core.plugin.registry import Registry
from mortice.core.testing.gguf_files import TensorData, write_gguf
from mortice.core.testing.random_rows import random_rows
from mortice.core.testing.registries import registry_with
from mortice.core.testing.suite import Suite, each, fail, needs_gpu, require, skip

__all__ = ["ARCHS", "QTypeSuite"]

ARCHS = ("sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120")
"""Every architecture that a header has to compile for."""

_CHUNK = 32
_ULP = 1  # of float32, that device code may be off the reference
_ROUNDING = 1e-5  # of the sum of sizes, that a product may be off

Bytes = NDArray[np.uint8]


class QTypeSuite(Suite):
    """Holds a type's parts against each other.

    Attributes:
        type: what is checked.
        executor: whose device code its traits are; it has to be `TriesTypes`.
        archs: what the traits have to compile for.

    """

    type: QuantizationType
    executor: str = "cuda"
    archs: tuple[str, ...] = ARCHS

    @property
    def qtype(self) -> QType:
        """Id, name and block shape."""
        return self.type.qtype

    def rows(self, count: int, columns: int, seed: int = 1) -> Bytes:
        """Random rows of the type; override for a type most of whose blocks are invalid."""
        return random_rows(self.type, count, columns, np.random.default_rng(seed))

    def columns(self) -> int:
        """A width of several blocks."""
        return 6 * max(_CHUNK, self.qtype.block_elements)

    def dequantized(self, rows: Bytes) -> NDArray[np.float32]:
        """Through the check that the registry puts around a plugin's function."""
        return CheckedDequantize("the type", self.qtype, self.type.dequantize)(rows)

    # the reference ----------------------------------------------------------------------------------------------

    def test_it_is_what_the_core_will_use(self) -> None:
        """Its parts are of the right kind, and it does not take GGML's names or ids for something else."""
        faults = list(qtype_faults(self.type))
        require(not faults, "; ".join(faults))

    def test_dequantise_gives_finite_float32_of_the_right_shape(self) -> None:
        """For a matrix, for one row and for none."""
        for count in (7, 1, 0):
            try:
                values = self.dequantized(self.rows(count, self.columns()))
            except Exception as error:  # noqa: BLE001 (the type under test may raise anything)
                shape = (count, self.qtype.row_bytes(self.columns()))
                fail(f"{counted(count, 'row')}, uint8 of shape {shape}: {describe(error)}")
            require(np.isfinite(values).all(), f"{counted(count, 'row')}: values are not finite")

    def test_a_block_means_the_same_wherever_it_stands(self) -> None:
        """Blocks are decoded by themselves: rows, and parts of rows, may be asked for in any order."""
        rows = self.rows(5, self.columns())
        whole = self.dequantized(rows)
        by_row = np.vstack([self.dequantized(row[None]) for row in rows])
        require(np.array_equal(whole, by_row), "a row by itself gives other values than among others")
        reversed_rows = self.dequantized(rows[::-1])
        require(np.array_equal(whole[::-1], reversed_rows), "rows in another order (not contiguous) give other values")
        blocks = rows.reshape(-1, self.qtype.block_bytes)
        by_block = self.dequantized(blocks).reshape(whole.shape)
        require(np.array_equal(whole, by_block), "a block by itself gives other values than within its row")

    def test_dequantise_leaves_its_input_alone(self) -> None:
        """Rows are views of a mapped file: they cannot be written, and nothing of them may be given away."""
        rows = self.rows(3, self.columns())
        before = rows.copy()
        rows.flags.writeable = False
        values = self.dequantized(rows)
        require(np.array_equal(rows, before), "the rows were written to")
        shared = np.shares_memory(values, rows) and values.flags.writeable
        require(not shared, "the result is a writable view of the rows")

    def test_every_bit_counts(self) -> None:
        """Flipping any bit of a block changes some value, at least in some block; otherwise bytes are wasted."""
        rows = self.rows(64, self.qtype.block_elements, seed=2)
        before = self.type.dequantize(rows)
        idle = []
        for bit in range(8 * self.qtype.block_bytes):
            changed = rows.copy()
            changed[:, bit // 8] ^= np.uint8(1 << bit % 8)
            with np.errstate(all="ignore"):
                if np.array_equal(self.type.dequantize(changed), before, equal_nan=True):
                    idle.append(bit)
        require(not idle, f"bits {idle[:8]} of a block have no effect on any value")

    # quantise ---------------------------------------------------------------------------------------------------

    def test_quantise_is_the_way_back(self) -> None:
        """Values come back nearly; values that the type can hold come back as they are."""
        quantize = self._quantize()
        values = np.random.default_rng(3).standard_normal((16, self.columns())).astype(np.float32)
        rows = quantize(values)
        wanted = (16, self.qtype.row_bytes(self.columns()))
        found = f"{rows.dtype} {rows.shape}" if isinstance(rows, np.ndarray) else type(rows).__name__
        require(found == f"uint8 {wanted}", f"quantize gave {found}, wanted uint8 {wanted}")
        once = self.dequantized(rows)
        error = float(np.sqrt(np.square(once - values).mean() / np.square(values).mean()))
        most = self.type.largest_error
        said = f"wanted at most {most:g}, the type's largest_error"
        require(error <= most, f"normal random values are {error:.2g} off after rounding, {said}")
        twice = self.dequantized(quantize(once))
        more = float(np.sqrt(np.square(twice - once).mean() / np.square(once).mean()))
        require(more <= error / 4, f"what was rounded before is rounded again, by {more:.2g}")

    def test_quantise_takes_zeros(self) -> None:
        """A block of zeros is zeros: its scale must not be divided by."""
        with np.errstate(all="raise"):
            rows = self._quantize()(np.zeros((2, self.columns()), np.float32))
        require(not self.dequantized(rows).any(), "zeros do not come back as zeros")

    def _quantize(self) -> Callable[[NDArray[np.float32]], Bytes]:
        if self.type.quantize is None:
            skip(f"{self.qtype.name} has no `quantize`")
        return self.type.quantize

    def test_a_file_of_it_is_read_as_written(self, tmp_path: Path) -> None:
        """The id and the block shape are enough for the GGUF loader."""
        registry = self._registry()
        rows = self.rows(4, self.columns())
        data = TensorData("w", (4, self.columns()), self.qtype, rows.reshape(-1))
        path = write_gguf(tmp_path / "model.gguf", "none", {}, [data])
        with registry.open_model(path) as file:
            view = file.tensors["w"]
            require(view.qtype == self.qtype, f"the loader calls it {view.qtype}")
            require(np.array_equal(view.row_bytes(0, 4), rows), "the loader shows other bytes than were written")

    # planes -----------------------------------------------------------------------------------------------------

    def test_planes_keep_every_bit_once(self) -> None:
        """Planes only move bits, the same way in every block."""
        planes = self.type.planes
        if planes is None:
            skip(f"{self.qtype.name} has no planes")
        piece_bytes = self.qtype.row_bytes(max(_CHUNK, self.qtype.block_elements))
        # piece k spells bit k of the number of each bit: what stands in a place over all pieces is where it came from
        numbers = np.arange(8 * piece_bytes)
        digits = range(int(numbers[-1]).bit_length())
        bits = np.stack([numbers >> digit & 1 for digit in digits]).astype(np.uint8)
        parts = planes(np.packbits(bits, axis=1, bitorder="little"))
        for part in parts:
            wanted = part.dtype == np.uint8 and part.ndim == 2 and len(part) == len(bits)
            require(wanted, f"planes gave {part.dtype} {part.shape}, wanted uint8 ({len(bits)}, bytes)")
        moved = np.unpackbits(np.hstack(parts), axis=1, bitorder="little").astype(np.int64)
        origins = (moved << np.arange(len(digits))[:, None]).sum(axis=0)
        require(len(origins) == len(numbers), f"planes have {len(origins) // 8} bytes of {piece_bytes}")
        lost = sorted(set(numbers.tolist()) - set(origins.tolist()))
        require(not lost, f"bits {lost[:8]} of a block are in no plane")

    # device code ------------------------------------------------------------------------------------------------

    @each("arch", lambda suite: suite.archs)
    def test_the_header_compiles(self, arch: str) -> None:
        """With no GPU, without a warning, and without local memory, which would make every kernel slow."""
        executor = self._trier()
        try:
            complaints = executor.compile_type(self.type, arch)
        except DeviceError as error:
            if _is_missing_tool(error):
                skip(describe(error))
            fail(describe(error))
        require(not complaints, "; ".join(complaints))

    @each("shape", range(3))
    def test_the_header_equals_the_reference_on_the_cpu(self, shape: int) -> None:
        """The header, compiled as C++: the same tiles, values and products as NumPy makes."""
        self._try(shape, on_device=False)

    @needs_gpu
    @each("shape", range(3))
    def test_the_header_equals_the_reference_on_a_gpu(self, shape: int) -> None:
        """The same on a card."""
        executor = self._registry().executor(self.executor)
        try:
            executor.device()
        except DeviceError as error:
            skip(describe(error))
        self._try(shape, on_device=True)

    # ------------------------------------------------------------------------------------------------------------

    def _registry(self) -> Registry:
        ggml = any(known == self.qtype for known in GGML_TYPES.values())
        return self.once("registry", lambda: registry_with(qtypes=() if ggml else [self.type]))

    def _trier(self) -> TriesTypes:
        executor = self._registry().executor(self.executor)
        if self.type.traits is None:
            skip(f"{self.qtype.name} has no CUDA traits header, so it runs on the reference executor only")
        if not isinstance(executor, TriesTypes):
            skip(f"executor {self.executor} cannot try a type by itself")
        return executor

    def _try(self, shape: int, *, on_device: bool) -> None:
        executor = self._trier()
        shapes = executor.trial_shapes(self.type)
        if shape >= len(shapes):
            skip(f"the layout of {self.qtype.name} has {len(shapes)} ways")
        count, columns = shapes[shape]
        rng = np.random.default_rng(shape)
        rows = self.rows(count, columns, seed=shape)
        activations = rng.integers(-127, 128, columns).astype(np.int8)
        scales = rng.uniform(0.001, 0.1, columns // _CHUNK).astype(np.float32)
        try:
            trial = executor.try_type(self.type, rows, activations, scales, on_device=on_device)
        except DeviceError as error:
            if _is_missing_tool(error):
                skip(describe(error))
            fail(describe(error))
        self._judge(trial, rows, activations, scales)

    def _judge(self, trial: TypeTrial, rows: Bytes, activations: NDArray[np.int8], scales: NDArray[np.float32]) -> None:
        if trial.repacked is not None:
            wrong = np.flatnonzero(trial.repacked != trial.stored)
            if len(wrong):
                fail(f"repack and planes differ in {len(wrong)} bytes of the layout, the first is {int(wrong[0])}")
        expected = self.dequantized(rows)
        off = _ulps(trial.values, expected)
        worst = np.unravel_index(int(off.argmax()), off.shape)
        require(
            off[worst] <= _ULP,
            f"dequantise4 (nan: affine differs): element {int(worst[1])} of row {int(worst[0])}: "
            f"found {trial.values[worst]:.9g}, "
            f"dequantize says {expected[worst]:.9g}",
        )
        if trial.products is None:
            return
        weights = expected.astype(np.float64).reshape(len(rows), -1, _CHUNK)
        terms = weights * (activations.reshape(-1, _CHUNK) * scales[:, None].astype(np.float64))
        sums, sizes = terms.sum(axis=-1), np.abs(terms).sum(axis=-1)
        excess = np.abs(trial.products - sums) - _ROUNDING * sizes
        place = np.unravel_index(int(np.where(np.isnan(excess), np.inf, excess).argmax()), excess.shape)
        require(
            excess[place] <= 0,
            f"dot: chunk {int(place[1])} of row {int(place[0])} gives {trial.products[place]:.9g}, "
            f"wanted {sums[place]:.9g}",
        )


def _is_missing_tool(error: DeviceError) -> bool:
    """Whether it is this machine that lacks something, rather than the header that is wrong."""
    return type(error) is DeviceError


def _ulps(found: NDArray[np.float32], wanted: NDArray[np.float32]) -> NDArray[np.float64]:
    """How many float32 lie between two arrays, element by element; NaN is infinitely far."""

    def ordered(values: NDArray[np.float32]) -> NDArray[np.int64]:
        bits = values.view(np.int32).astype(np.int64)
        return np.where(bits < 0, -(bits & 0x7FFFFFFF), bits)

    off = np.abs(ordered(found) - ordered(wanted)).astype(np.float64)
    return np.where(np.isnan(found), np.inf, off)
