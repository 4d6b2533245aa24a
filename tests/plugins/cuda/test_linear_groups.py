"""Groups of linear maps, lowered in every way and run on the CPU launch by launch, against NumPy."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from attrs import define, field
from numpy.typing import NDArray

from mortice.core.model.operators import Add, AddBias, Buffer, GatedAct, Linear, Norm, NormType, WeightRef
from mortice.core.model.types import TensorView
from mortice.core.model.weight_plan import PlannedWeight
from mortice.plugins.executors.cuda.lowering import matmul
from mortice.plugins.executors.cuda.lowering.fusion import LinearGroup
from mortice.plugins.executors.cuda.lowering.launches import Addresses, GemmSpec, LaunchSpec, Spec, StepRows
from mortice.plugins.executors.cuda.lowering.layouts import TileLayout
from mortice.plugins.executors.cuda.lowering.linear import LinearLowering
from mortice.plugins.executors.cuda.lowering.sources import KernelSources
from mortice.plugins.executors.cuda.lowering.workspace import Workspace
from tests.plugins.cuda.test_tensor_kernels import tame
from tests.plugins.qtypes.blocks import TYPES, stored
from tests.support.cuda_on_cpu import TENSOR, compile_for_cpu, for_tensor_cores, needs_cpu_compiler

pytestmark = [pytest.mark.slow, needs_cpu_compiler]

AT_ONCE, SM_COUNT = 3, 1
POISON = 0xA5
LAUNCHES = {
    "matmul_input": "const InputArgs* args",
    "matmul": "const MatmulArgs* args",
    "matmul_wgmma": "const MatmulArgs* args",
    "matmul_finish": "const FinishArgs* args",
    "dequantise": "const uint64* tiles, const uint64* out, const int* row_groups",
}
CALLS = {"dequantise": "reinterpret_cast<const uint8*>(*tiles), reinterpret_cast<OUT*>(*out), *row_groups"}

Wide = NDArray[np.float64]


@define(eq=False)
class Card:
    """Memory that stands for a card's: weights, buffers and scratch, all poisoned."""

    folder: Path
    rows: int
    gemm_from_rows: int
    wgmma: bool
    rng: np.random.Generator = field(factory=lambda: np.random.default_rng(3))
    planned: dict[WeightRef, PlannedWeight] = field(factory=dict)
    values: dict[WeightRef | Buffer, Wide] = field(factory=dict)
    memory: dict[Any, NDArray[Any]] = field(factory=dict)

    def vector(self, name: str, width: int) -> WeightRef:
        ref = WeightRef(role=name, layer=None, tensor=name, shape=(width,), row_stop=width)
        self.memory[ref] = self.rng.standard_normal(width).astype(np.float32)
        self.values[ref] = self.memory[ref].astype(np.float64)
        return ref

    def linear(self, name: str, source: Buffer, outputs: int, qtype: str) -> Linear:
        type_, columns = TYPES[qtype], source.width
        ref = WeightRef(role=name, layer=None, tensor=name, shape=(outputs, columns), row_stop=outputs)
        raw = tame(qtype, outputs, columns, self.rng)
        view = TensorView(name=name, shape=ref.shape, qtype=type_.qtype, data=raw.reshape(-1), offset=0, path=Path())
        self.planned[ref] = PlannedWeight.of(ref, view, TileLayout(type_), 0)
        self.values[ref] = type_.dequantize(raw).astype(np.float64)
        self.memory[ref] = stored(type_, raw, columns)
        return Linear(name=name, src=source, out=Buffer(name=f"{name}.out", width=outputs), weight=ref)

    def input(self, name: str, width: int) -> Buffer:
        buffer = Buffer(name=name, width=width)
        self.values[buffer] = self.rng.standard_normal((self.rows, width)).astype(np.float32).astype(np.float64)
        return buffer

    def run(self, groups: Sequence[LinearGroup]) -> tuple[list[str], list[list[Wide]]]:
        """What was launched, and the outputs of each group."""
        buffers = {b for group in groups for b in (group.source, *group.outputs)}
        buffers |= {group.added for group in groups if group.added is not None}
        offsets, end = {}, 0
        for buffer in sorted(buffers, key=lambda buffer: buffer.name):
            offsets[buffer] = end
            end += -(-4 * self.rows * buffer.width // 256) * 256
        paths = matmul.row_paths(self.rows, exact=False, cublas=True, gemm_from_rows=self.gemm_from_rows)
        scratch = matmul.matmul_scratch([(group, self.rows) for group in groups], paths, SM_COUNT, 0)
        workspace, work = (np.full(nbytes + 256, POISON, np.uint8) for nbytes in (end, scratch.nbytes))
        starts = {name: array.ctypes.data + -array.ctypes.data % 256 for name, array in (("w", workspace), ("m", work))}

        def floats(buffer: Buffer) -> NDArray[np.float32]:
            at = starts["w"] - workspace.ctypes.data + offsets[buffer]
            return workspace[at : at + 4 * self.rows * buffer.width].view(np.float32).reshape(self.rows, buffer.width)

        for buffer in buffers & self.values.keys():
            floats(buffer)[:] = self.values[buffer]
        lowering = LinearLowering(
            sources=KernelSources({name: type_.traits for name, type_ in TYPES.items() if type_.traits is not None}),
            planned=self.planned,
            workspace=Workspace(offsets=offsets, nbytes=end),
            scratch=scratch,
            sm_count=SM_COUNT,
            quantize_activations=True,
            wgmma=self.wgmma,
        )
        nowhere: dict[str, Any] = {"keys": [], "values": [], "rows": StepRows(), "frequencies": {}}
        nowhere |= dict.fromkeys(("selected", "partial", "arrivals"), 0)
        weights = {ref: array.ctypes.data for ref, array in self.memory.items()}
        addresses = Addresses(weights=weights, workspace=starts["w"], matmul=starts["m"], **nowhere)
        path = matmul.row_path(paths, self.rows)
        around = [None, *groups, None]
        labels: list[str] = []
        told: list[Buffer] = []
        for before, group, after in zip(around, groups, around[2:], strict=False):
            for spec in lowering.launches(group, path, before, after):
                self._queue(spec, addresses, len(labels))
                labels.append(spec.label)
                told += spec.outputs
        assert told == [buffer for group in groups for buffer in group.outputs]
        return labels, [[floats(buffer).astype(np.float64) for buffer in group.outputs] for group in groups]

    def _queue(self, spec: Spec, addresses: Addresses, number: int) -> None:
        if isinstance(spec, GemmSpec):
            gemm = spec.gemm(addresses, self.rows)
            x, weight = (
                at_address(address, (count, gemm.columns), np.float16).astype(np.float32)
                for address, count in ((gemm.x, gemm.rows), (gemm.weight, gemm.outputs))
            )
            at_address(gemm.out, (gemm.rows, gemm.outputs), np.float32)[:] = x @ weight.T
            return
        library = self._compiled(spec, number)
        args = spec.args(addresses, self.rows)
        grid = map(ctypes.c_uint, spec.grid(self.rows, AT_ONCE))
        library.run(*map(ctypes.byref, args), *grid, spec.block)

    def _compiled(self, spec: LaunchSpec, number: int) -> Any:
        call = CALLS.get(spec.entry, "*args")
        text = for_tensor_cores(spec.source.text) + (
            f'extern "C" void run({LAUNCHES[spec.entry]}, unsigned x, unsigned y, unsigned z, int threads) {{\n'
            f"    launch({{x, y, z}}, threads, [=] {{ {spec.entry}({call}); }});\n}}\n"
        )
        folder = self.folder / str(number)
        folder.mkdir()
        return compile_for_cpu(folder, text, {key: str(value) for key, value in spec.source.defines}, TENSOR)


def at_address(address: int, shape: tuple[int, int], kind: type[np.floating[Any]]) -> NDArray[Any]:
    space = (ctypes.c_uint8 * (shape[0] * shape[1] * np.dtype(kind).itemsize)).from_address(address)
    values: NDArray[Any] = np.ctypeslib.as_array(space).view(kind).reshape(shape)
    return values


def near(found: Wide, wanted: Wide, size: Wide) -> None:
    assert np.isfinite(found).all()
    assert np.linalg.norm(found - wanted) < 1e-3 * np.linalg.norm(size)


def spread(x: Wide, weight: Wide) -> Wide:
    """How large products are apart from luck."""
    result: Wide = np.sqrt(np.square(x) @ np.square(weight).T)
    return result


WAYS = pytest.mark.parametrize(
    ("rows", "way"),
    [
        (5, "matmul"),
        (11, "matmul"),
        (11, "warpgroups"),
        (17, "warpgroups"),
        (3, "gemm, whole weights"),
        (3, "gemm, small lots"),
    ],
)


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, rows: int, way: str) -> Card:
    """One with cuBLAS for any number of rows, or for none."""
    monkeypatch.setattr(matmul, "WEIGHT_SCRATCH", 2 * 256 * (256 if way == "gemm, small lots" else 4096))
    return Card(tmp_path, rows, gemm_from_rows=2 if way.startswith("gemm") else 1000, wgmma=way == "warpgroups")


@WAYS
def test_maps_of_one_normed_input_with_biases(card: Card, rows: int, way: str) -> None:
    source = card.input("x", 256)
    weight = card.vector("norm.weight", 256)
    norm = Norm(name="norm", src=source, out=Buffer(name="n", width=256), type="rms", eps=1e-5, weight=weight)
    kinds = [(272, "Q4_K"), (24, "Q8_0"), (5, "Q6_K")]
    linears = tuple(card.linear(f"w{i}", norm.out, outputs, name) for i, (outputs, name) in enumerate(kinds))
    biases = []
    for i, linear in enumerate(linears[:2]):
        out = Buffer(name=f"b{i}.out", width=linear.out.width)
        biases.append(AddBias(name=f"b{i}", src=linear.out, out=out, weight=card.vector(f"b{i}", out.width)))
    labels, (found,) = card.run([LinearGroup(norm=norm, linears=linears, biases=(*biases, None))])
    assert labels.count("gemm") == {"gemm, whole weights": 1, "gemm, small lots": 2}.get(way, 0)
    x = card.values[source]
    n = x / np.sqrt(np.square(x).mean(axis=1, keepdims=True) + 1e-5) * card.values[weight]
    for values, linear, bias in zip(found, linears, (*biases, None), strict=True):
        matrix = card.values[linear.weight]
        near(values, n @ matrix.T + (card.values[bias.weight] if bias else 0.0), spread(n, matrix))


@WAYS
def test_a_layers_end_is_finished_where_the_next_one_begins(card: Card, rows: int, way: str) -> None:
    source, residual = card.input("x", 256), card.input("r", 256)
    card.values[source] *= 1e-4  # so that the gate is neither open nor shut
    gate, up = card.linear("gate", source, 288, "Q4_0"), card.linear("up", source, 288, "IQ4_NL")
    gated = GatedAct(name="g", gate=gate.out, up=up.out, out=Buffer(name="h", width=288), activation="silu")
    down = card.linear("down", gated.out, 256, "Q5_1")
    add = Add(name="add", a=residual, b=down.out, out=Buffer(name="sum", width=256))
    weight = card.vector("norm.weight", 256)
    norm = Norm(name="norm", src=add.out, out=Buffer(name="n", width=256), type="rms", eps=1e-5, weight=weight)
    last = card.linear("last", norm.out, 40, "Q4_K")
    groups = [
        LinearGroup(norm=None, linears=(gate, up), biases=(None, None), gated=gated),
        LinearGroup(norm=None, linears=(down,), biases=(None,), residual=add),
        LinearGroup(norm=norm, linears=(last,), biases=(None,)),
    ]
    labels, ((h,), (total,), (found,)) = card.run(groups)
    # a weight in several lots is finished lot by lot, and a gate only where parts of a row have blocks of their own
    joined = {"warpgroups": 2, "gemm, small lots": 0}.get(way, 1)
    assert labels.count("matmul finish, input") == joined
    x = card.values[source]
    g, u = x @ card.values[gate.weight].T, x @ card.values[up.weight].T
    near(h, g / (1 + np.exp(-g)) * u, 2 * np.abs(u) * spread(x, card.values[gate.weight]))
    matrix = card.values[down.weight]
    near(total, h @ matrix.T + card.values[residual], spread(h, matrix) + np.abs(card.values[residual]))
    n = total / np.sqrt(np.square(total).mean(axis=1, keepdims=True) + 1e-5) * card.values[weight]
    near(found, n @ card.values[last.weight].T, spread(n, card.values[last.weight]))


@WAYS
def test_norms_that_follow_one_another_are_told_apart(card: Card, rows: int, way: str) -> None:
    """A layer norm sees its row first; of two RMS norms the first one's factor is used before the second's is there."""
    source = card.input("x", 512)
    kinds: list[NormType] = ["layer", "rms", "rms"]
    widths, groups, buffer = (512, 512, 40), [], source
    for i, (kind, width) in enumerate(zip(kinds, widths, strict=True)):
        weight, bias = card.vector(f"g{i}", 512), card.vector(f"b{i}", 512) if kind == "layer" else None
        out = Buffer(name=f"n{i}", width=512)
        norm = Norm(name=f"norm{i}", src=buffer, out=out, type=kind, eps=1e-5, weight=weight, bias=bias)
        linear = card.linear(f"w{i}", out, width, "Q4_K")
        groups.append(LinearGroup(norm=norm, linears=(linear,), biases=(None,)))
        buffer = linear.out
    labels, found = card.run(groups)
    joined = {"gemm, whole weights": 2, "gemm, small lots": 0}.get(way, 1)
    assert labels.count("matmul finish, input") == joined
    x = card.values[source]
    for group, (values,) in zip(groups, found, strict=True):
        assert group.norm is not None
        bias = group.norm.bias
        x = x - x.mean(axis=1, keepdims=True) if group.norm.type == "layer" else x
        n = x / np.sqrt(np.square(x).mean(axis=1, keepdims=True) + 1e-5) * card.values[group.norm.weight]
        n = n + (card.values[bias] if bias is not None else 0.0)
        matrix = card.values[group.linears[0].weight]
        near(values, n @ matrix.T, spread(n, matrix))
        x = values
