"""Products of many rows on tensor cores: by themselves on fresh random data, and as steps of every length."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from attrs import define, field
from numpy.typing import NDArray

import mortice
from mortice.core.config import ExecutorConfig, ModelConfig, RunConfig
from mortice.core.model.operators import Add, AddBias, Buffer, GatedAct, Linear, Norm, WeightRef
from mortice.core.model.types import TensorView
from mortice.core.model.weight_plan import PlannedWeight
from mortice.core.pipeline import Pipeline
from mortice.core.plugin.interfaces import StepPart
from mortice.core.testing.tiny_models import write_tiny_model
from mortice.plugins.executors.cuda.compile.nvrtc import compile_cubin
from mortice.plugins.executors.cuda.device.cublas import WORKSPACE_BYTES, Blas, find_cublas
from mortice.plugins.executors.cuda.device.device import Device, open_device
from mortice.plugins.executors.cuda.lowering.fusion import LinearGroup
from mortice.plugins.executors.cuda.lowering.gemv import has_bulk_copies
from mortice.plugins.executors.cuda.lowering.launches import Addresses, GemmSpec, StepRows
from mortice.plugins.executors.cuda.lowering.layouts import TileLayout
from mortice.plugins.executors.cuda.lowering.linear import LinearLowering
from mortice.plugins.executors.cuda.lowering.matmul import GEMM_FROM_ROWS, matmul_scratch, row_path, row_paths
from mortice.plugins.executors.cuda.lowering.sources import KernelSources
from mortice.plugins.executors.cuda.lowering.workspace import Workspace
from tests.plugins.qtypes.blocks import NAMES, TYPES
from tests.plugins.qtypes.blocks import stored as tiles_of
from tests.support.cuda import needs_gpu
from tests.support.tiny import CONTRACTS

pytestmark = [pytest.mark.gpu, needs_gpu]

needs_cublas = pytest.mark.skipif(find_cublas() is None, reason="cuBLAS is not installed")

HALF = 1e-3
"""Of the norm of a product: what rounding activations and weights to halves changes, and more."""

POISON = 0xA5
LENGTHS = [1, 2, 3, 7, 8, 9, 31, 32, 33, 63, 64, 65, GEMM_FROM_ROWS - 1, GEMM_FROM_ROWS, 255, 256, 257, 511]

Array = NDArray[np.float64]


@pytest.fixture(scope="module")
def device() -> Iterator[Device]:
    opened = open_device()
    yield opened
    opened.close()


@define(eq=False)
class Bench:
    """Groups of linear maps on a card, with weights and inputs of their own."""

    device: Device
    rows: int
    bulk_copies: bool = False
    wgmma: bool = False
    rng: np.random.Generator = field(factory=lambda: np.random.default_rng(5))
    planned: dict[WeightRef, PlannedWeight] = field(factory=dict)
    values: dict[WeightRef | Buffer, Array] = field(factory=dict)
    _addresses: dict[WeightRef, int] = field(factory=dict)
    _offsets: dict[Buffer, int] = field(factory=dict)
    _held: list[Any] = field(factory=list)

    def __attrs_post_init__(self) -> None:
        self.device.make_current()
        self.stream = self.device.new_stream()

    stream: Any = field(init=False)

    def send(self, array: NDArray[Any]) -> int:
        buffer = self.device.allocate(array.nbytes)
        self.stream.write(buffer.address, np.ascontiguousarray(array).reshape(-1).view(np.uint8))
        self._held.append(buffer)
        return int(buffer.address)

    def vector(self, name: str, width: int) -> WeightRef:
        ref = WeightRef(role=name, layer=None, tensor=name, shape=(width,), row_stop=width)
        values = self.rng.standard_normal(width).astype(np.float32)
        self.values[ref], self._addresses[ref] = values.astype(np.float64), self.send(values)
        return ref

    def linear(self, name: str, source: Buffer, outputs: int, qtype: str) -> Linear:
        type_, columns = TYPES[qtype], source.width
        ref = WeightRef(role=name, layer=None, tensor=name, shape=(outputs, columns), row_stop=outputs)
        raw = tame_rows(qtype, outputs, columns, self.rng)
        view = TensorView(
            name=name, shape=ref.shape, qtype=type_.qtype, data=raw.reshape(-1), offset=0, path=Path("none")
        )
        self.planned[ref] = PlannedWeight.of(ref, view, TileLayout(type_), 0)
        self.values[ref] = type_.dequantize(raw).astype(np.float64)
        self._addresses[ref] = self.send(tiles_of(type_, raw, columns))
        return Linear(name=name, src=source, out=Buffer(name=f"{name}.out", width=outputs), weight=ref)

    def input(self, name: str, width: int) -> Buffer:
        """Rows of very different sizes: halves alone would overflow and underflow."""
        buffer = Buffer(name=name, width=width)
        sizes = 10.0 ** self.rng.integers(-6, 8, (self.rows, 1)).astype(np.float32)
        self.values[buffer] = (self.rng.standard_normal((self.rows, width)) * sizes).astype(np.float32).astype(float)
        return buffer

    def run(self, groups: Sequence[LinearGroup]) -> list[list[Array]]:
        """The outputs of each group, all memory poisoned before."""
        buffers = {b for group in groups for b in (group.source, *group.outputs)}
        buffers |= {group.added for group in groups if group.added is not None}
        at = 0
        for buffer in buffers:
            self._offsets[buffer] = at
            at += -(-4 * self.rows * buffer.width // 256) * 256  # as `place_buffers` aligns
        workspace = self.device.allocate(at)
        paths = row_paths(self.rows, exact=False, cublas=True)
        sm_count = self.device.properties.sm_count
        scratch = matmul_scratch([(group, self.rows) for group in groups], paths, sm_count, WORKSPACE_BYTES)
        matmul = self.device.allocate(scratch.nbytes)
        self._held += [workspace, matmul]
        for memory in (workspace, matmul):
            self.stream.fill(memory.address, POISON, memory.nbytes)
        for buffer in buffers & self.values.keys():
            given = self.values[buffer].astype(np.float32)
            self.stream.write(workspace.address + self._offsets[buffer], given.reshape(-1).view(np.uint8))
        lowering = LinearLowering(
            sources=KernelSources({name: type_.traits for name, type_ in TYPES.items() if type_.traits is not None}),
            planned=self.planned,
            workspace=Workspace(offsets=self._offsets, nbytes=at),
            scratch=scratch,
            sm_count=sm_count,
            quantize_activations=True,
            bulk_copies=self.bulk_copies,
            wgmma=self.wgmma,
        )
        addresses = Addresses(
            weights=self._addresses,
            workspace=workspace.address,
            matmul=matmul.address,
            keys=[],
            values=[],
            rows=StepRows(),
            selected=0,
            partial=0,
            arrivals=0,
            frequencies={},
        )
        path = row_path(paths, self.rows)
        around = [None, *groups, None]
        for before, group, after in zip(around, groups, around[2:], strict=False):
            for spec in lowering.launches(group, path, before, after):
                self._queue(spec, addresses)
        return [[self._read(workspace.address, buffer) for buffer in group.outputs] for group in groups]

    def _queue(self, spec: Any, addresses: Addresses) -> None:
        if isinstance(spec, GemmSpec):
            blas = Blas(find_cublas(), self.stream, self.send(np.zeros(WORKSPACE_BYTES, np.uint8)))
            blas.prepare(spec.gemm(addresses, self.rows))(self.stream)
            self.stream.synchronize()
            blas.close()
            return
        module = self.device.load(compile_cubin(spec.source, self.device.arch).cubin)
        function, shared = module.function(spec.entry), np.zeros(1, np.int32)
        if spec.shared_symbol:
            self.stream.read(shared, module.symbol(spec.shared_symbol)[0])
            function.set_dynamic_shared(int(shared[0]))
        at_once = self.device.properties.sm_count * max(1, function.blocks_per_sm(spec.block, int(shared[0])))
        args = spec.args(addresses, self.rows)
        function.prepare(spec.grid(self.rows, at_once), spec.block, args, dynamic_shared=int(shared[0]))(self.stream)
        self.stream.synchronize()

    def _read(self, workspace: int, buffer: Buffer) -> Array:
        values = np.empty((self.rows, buffer.width), np.float32)
        self.stream.read(values, workspace + self._offsets[buffer])
        assert np.isfinite(values).all()
        return values.astype(np.float64)

    def close(self) -> None:
        for memory in self._held:
            memory.close()
        self.stream.close()


def tame_rows(qtype: str, rows: int, columns: int, rng: np.random.Generator) -> NDArray[np.uint8]:
    """Random bits with half-precision factors of a model's size; F16 and BF16 are drawn as numbers."""
    halves = {"Q4_0": (0,), "Q4_1": (0, 2), "Q5_0": (0,), "Q5_1": (0, 2), "Q8_0": (0,), "Q2_K": (80, 82)}
    halves |= {"Q3_K": (108,), "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,), "IQ4_NL": (0,), "IQ4_XS": (0,)}
    values = rng.standard_normal((rows, columns)).astype(np.float32)
    if qtype not in halves:
        stored = values.astype("<f2") if qtype == "F16" else (values.view("<u4") >> 16).astype("<u2")
        return stored.view(np.uint8)
    kind = TYPES[qtype].qtype
    blocks = rng.integers(0, 256, (rows * columns // kind.block_elements, kind.block_bytes), np.uint8)
    for at in halves[qtype]:
        blocks[:, at : at + 2] = rng.uniform(0.001, 0.02, len(blocks)).astype("<f2").view(np.uint8).reshape(-1, 2)
    return blocks.reshape(rows, -1)


def check(found: Array, wanted: Array, size: Array) -> None:
    """Each row within rounding of values of that size."""
    off = np.linalg.norm(found - wanted, axis=1) / np.linalg.norm(size, axis=1)
    assert (off < HALF).all(), f"row {np.argmax(off)} of {len(off)}: off by {off.max():.1e}"


def spread(x: Array, weight: Array) -> Array:
    """How large products are apart from luck: the root of the sum of the squares of their terms."""
    result: Array = np.sqrt(np.square(x) @ np.square(weight).T)
    return result


def normed(x: Array, weight: Array, eps: float) -> Array:
    result: Array = x / np.sqrt(np.square(x).mean(axis=1, keepdims=True) + eps) * weight
    return result


MANY = pytest.param(GEMM_FROM_ROWS + 1, "cuBLAS", marks=needs_cublas)
ROWS = [
    *((rows, "warps") for rows in (2, 20, 70)),
    MANY,
    *((rows, "rings") for rows in (2, 8, 13)),
    *((rows, "warpgroups") for rows in (7, 16, 17, 31, 33, 64, 70)),
]
"""With which kernel multiplies; some are only for cards with bulk copies or products of warpgroups."""


@pytest.fixture
def bench(device: Device) -> Iterator[Callable[[int, str], Bench]]:
    made: list[Bench] = []

    def make(rows: int, kernel: str) -> Bench:
        if kernel == "rings" and not has_bulk_copies(device.properties):
            pytest.skip("the card has no bulk copies")
        if kernel == "warpgroups" and device.properties.compute_capability != (9, 0):
            pytest.skip("the card has no products of warpgroups")
        made.append(Bench(device, rows, bulk_copies=kernel == "rings", wgmma=kernel == "warpgroups"))
        return made[-1]

    yield make
    for each in made:
        each.close()


@pytest.mark.parametrize(("rows", "kernel"), ROWS)
@pytest.mark.parametrize("qtype", [name for name in NAMES if name != "F32"])
def test_maps_of_one_normed_input_with_biases(
    bench: Callable[[int, str], Bench], qtype: str, rows: int, kernel: str
) -> None:
    on = bench(rows, kernel)
    source = on.input("x", 768)
    norm = Norm(
        name="norm",
        src=source,
        out=Buffer(name="n", width=768),
        type="rms",
        eps=1e-5,
        weight=on.vector("norm.weight", 768),
    )
    # a number of outputs that is no multiple of 16, another type, and one without a bias
    linears = tuple(
        on.linear(f"w{i}", norm.out, n, t) for i, (n, t) in enumerate([(200, qtype), (72, "Q8_0"), (5, qtype)])
    )
    biases = [
        AddBias(
            name=f"b{i}",
            src=linear.out,
            out=Buffer(name=f"b{i}.out", width=linear.out.width),
            weight=on.vector(f"b{i}", linear.out.width),
        )
        for i, linear in enumerate(linears[:2])
    ]
    found = on.run([LinearGroup(norm=norm, linears=linears, biases=(*biases, None))])[0]
    n = normed(on.values[source], on.values[norm.weight], norm.eps)
    for values, linear, bias in zip(found, linears, (*biases, None), strict=True):
        weight = on.values[linear.weight]
        check(values, n @ weight.T + (on.values[bias.weight] if bias else 0.0), spread(n, weight))


@pytest.mark.parametrize(("rows", "kernel"), ROWS)
@pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])
def test_a_gated_map_whose_result_goes_on_into_another(
    bench: Callable[[int, str], Bench], activation: Any, rows: int, kernel: str
) -> None:
    on = bench(rows, kernel)
    source, residual = on.input("x", 512), on.input("r", 256)
    on.values[source] /= np.abs(on.values[source]).max(axis=1, keepdims=True)
    gate, up = on.linear("gate", source, 1792, "Q4_K"), on.linear("up", source, 1792, "Q6_K")
    gated = GatedAct(name="gated", gate=gate.out, up=up.out, out=Buffer(name="h", width=1792), activation=activation)
    down = on.linear("down", gated.out, 256, "Q5_K")
    add = Add(name="add", a=residual, b=down.out, out=Buffer(name="sum", width=256))
    first = LinearGroup(norm=None, linears=(gate, up), biases=(None, None), gated=gated)
    second = LinearGroup(norm=None, linears=(down,), biases=(None,), residual=add)
    (h,), (found,) = on.run([first, second])
    x = on.values[source]
    g, u = x @ on.values[gate.weight].T, x @ on.values[up.weight].T
    tanh = np.tanh(0.7978845608 * (g + 0.044715 * g**3))
    acted = g / (1 + np.exp(-g)) if activation == "silu" else 0.5 * g * (1 + tanh)
    check(h, acted * u, 2 * np.abs(u) * spread(x, on.values[gate.weight]))
    weight = on.values[down.weight]
    check(found, h @ weight.T + on.values[residual], np.maximum(spread(h, weight), np.abs(on.values[residual])))


# whole models ----------------------------------------------------------------------------------------------------


def load(path: Path, **kinds: Any) -> Pipeline:
    chosen = ExecutorConfig(name="cuda", context=CONTEXT, step_tokens=512, **kinds)
    return mortice.load(RunConfig(model=ModelConfig(path=path), executor=chosen))


def error(found: NDArray[np.float32], wanted: NDArray[np.float32]) -> float:
    assert np.isfinite(found).all()
    return float(np.square(found - wanted, dtype=np.float64).sum() / np.square(wanted, dtype=np.float64).sum())


def fed(cuda: Pipeline, ids: Sequence[int], at_once: int) -> NDArray[np.float32]:
    with cuda.session() as session:
        rows = []
        for start in range(0, len(ids), at_once):
            part = StepPart(sequence=session.sequence, token_ids=ids[start : start + at_once], logits="all")
            rows.append(cuda.runtime.step([part]))
        return np.concatenate(rows)


CONTEXT = 1100
FAMILIES = {
    "llama": {"hidden_size": 512, "ffn_size": 1536, "num_heads": 8, "num_kv_heads": 2},
    "qwen2": {"hidden_size": 896, "num_heads": 14, "num_kv_heads": 2},
    "qwen3": {"head_dim": 128},
}


@pytest.mark.parametrize("family", FAMILIES)
def test_prefill_equals_decode_and_eight_at_a_time_at_every_length(tmp_path: Path, family: str) -> None:
    path = write_tiny_model(
        tmp_path / "m.gguf", CONTRACTS[family], qtypes="Q8_0", sizes={**FAMILIES[family], "context_length": CONTEXT}
    )
    with load(path) as cuda, load(path, activations="f32") as exact:
        ids = [int(i) for i in np.random.default_rng(7).integers(0, cuda.program.vocab_size, max(LENGTHS))]
        wanted, few = fed(exact, ids, 1), fed(cuda, ids, 8)
        single = error(fed(cuda, ids, 1), wanted)  # int8 activations, as decode takes them
        assert error(few, wanted) < single
        for length in LENGTHS[1:]:
            assert error(fed(cuda, ids[:length], length), wanted[:length]) < single, length


def test_a_long_prompt_in_chunks_equals_one_by_one(tmp_path: Path) -> None:
    path = write_tiny_model(
        tmp_path / "m.gguf", CONTRACTS["llama"], qtypes="Q8_0", sizes={**FAMILIES["llama"], "context_length": CONTEXT}
    )
    with load(path) as cuda, load(path, activations="f32") as exact:
        ids = [int(i) for i in np.random.default_rng(8).integers(0, cuda.program.vocab_size, 1025)]
        wanted = fed(exact, ids, 1)
        single = error(fed(cuda, ids, 1), wanted)  # int8 activations, as decode takes them
        assert error(fed(cuda, ids, 512), wanted) < single


@pytest.mark.parametrize("kv", ["f16", "q8_0", "f32"])
def test_prefills_and_decodes_of_several_sequences_in_one_step(tmp_path: Path, kv: str) -> None:
    sizes = {"hidden_size": 512, "ffn_size": 768, "num_heads": 8, "num_kv_heads": 2}
    path = write_tiny_model(
        tmp_path / "m.gguf", CONTRACTS["llama"], qtypes="Q4_K", sizes={**sizes, "context_length": CONTEXT}
    )
    with load(path, kv=kv) as cuda:
        rng = np.random.default_rng(9)
        past = [70, 0, 3, 129, 0, 64, 40]
        now = [1, 200, 2, 1, 33, 1, 5]
        prompts = [
            [int(i) for i in rng.integers(0, cuda.program.vocab_size, p + n)] for p, n in zip(past, now, strict=True)
        ]
        alone = [fed(cuda, ids, len(ids))[-1] for ids in prompts]
        sequences = [cuda.runtime.new_sequence() for _ in prompts]
        for sequence, ids, length in zip(sequences, prompts, past, strict=True):
            if length:
                cuda.runtime.step([StepPart(sequence=sequence, token_ids=ids[:length], logits="none")])
        parts = [
            StepPart(sequence=sequence, token_ids=ids[length:])
            for sequence, ids, length in zip(sequences, prompts, past, strict=True)
        ]
        together = cuda.runtime.step(parts)
        for sequence in sequences:
            sequence.close()
        assert all(error(found, wanted) < 1e-3 for found, wanted in zip(together, alone, strict=True))
