"""Every kernel that a program can ask for compiles for every architecture, and keeps its values in registers.

The sources are those of whole programs: each built-in shape and each recipe at least once, with the types of the KV
cache in turns and both kinds of activations, and every family the tests know with its norms, activations and lone
operators; then attention and what writes the cache for more heads than models come with. `covering_set` chooses of them
so that within a kernel file every two compile-time constants, weight types and architectures meet, with as few
compilations as that takes: about 450 of 8000. One takes a quarter of a second, all of them a minute on two cores.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from itertools import chain, cycle, product
from typing import Any, Literal

import pytest
from attrs import evolve, frozen

from mortice.core.model import operators as op
from mortice.core.model.kv_types import KV_TYPES
from mortice.core.model.operators import Buffer, NormType, WeightRef
from mortice.core.model.program import build_program
from mortice.core.model.types import DeviceInfo
from mortice.core.model.validation import validate
from mortice.core.model.weight_plan import WeightPlan, plan_weights
from mortice.core.synth.model import synth_model
from mortice.core.synth.recipes import RECIPES
from mortice.core.synth.shapes import SHAPES
from mortice.plugins.executors.cuda.compile.build import compile_all
from mortice.plugins.executors.cuda.compile.nvrtc import Source
from mortice.plugins.executors.cuda.executor import CudaExecutor
from mortice.plugins.executors.cuda.lowering.attend import attend_fits, attend_tensor, attend_threads
from mortice.plugins.executors.cuda.lowering.crossovers import RowCrossovers
from mortice.plugins.executors.cuda.lowering.fusion import PlaceGroup
from mortice.plugins.executors.cuda.lowering.launches import LaunchSpec
from mortice.plugins.executors.cuda.lowering.lowering import Lowering
from mortice.plugins.executors.cuda.lowering.matmul import attention_tile
from mortice.plugins.executors.cuda.lowering.matmul_ring import RING_ROWS
from mortice.plugins.executors.cuda.lowering.sources import OPS, KernelSources
from tests.plugins.cuda.covering import covering_set
from tests.support.cuda import needs_nvrtc
from tests.support.in_memory import model_file
from tests.support.tiny import CONTRACTS, QTYPES
from tests.unit.model.test_families import CASES, build

pytestmark = pytest.mark.xdist_group("compiles everywhere")  # what is to be compiled is worked out once

Style = Literal["adjacent", "halves"]

ARCHS = ("sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120")

Wanted = tuple[Source, Sequence[str]]
"""Something to compile, and the architectures that can be asked for it."""

BULK_COPIES = ("sm_90", "sm_100")
"""Those whose multiprocessors bring weights into rings of shared memory, see ``ops/gemv_ring.cuh``."""
WGMMA = ("sm_90",)
"""Those with products of warpgroups, see ``ops/wgmma.cuh``."""
WITHOUT_BULK_COPIES = tuple(arch for arch in ARCHS if arch not in BULK_COPIES)

WITH_THE_TYPES = "tests/plugins/qtypes/test_conformance.py"
"""Compiles these for every type and architecture: each by itself takes longer than all of them at once."""
ELSEWHERE: Mapping[str, str] = {"repack.cu": WITH_THE_TYPES, "probe.cu": WITH_THE_TYPES}
"""Kernel files that no program launches, and where they are compiled."""
TYPES_ELSEWHERE = ("embed", "dequantise")
"""Kernel files whose types meet every architecture there; here they meet every width."""


@frozen
class Excuse:
    """Kernels that may use local memory, by a pattern of what their source is called; how much, and why."""

    source: str
    most_bytes: int
    why: str


EXCUSED = (
    Excuse(
        r"gemv .*-DQUANTIZE_ACTIVATIONS=0 .*-DTOKENS=8",
        2048,
        "eight rows of float32 activations: what is measured against, not what is run for speed",
    ),
    Excuse(
        r"gemv .*-DQUANTIZE_ACTIVATIONS=0 .*-DTOKENS=1",
        16,
        "one row of float32 activations: the same",
    ),
    Excuse(
        r"matmul(_ring|_wgmma)? .*-DPASS=(8|16|32|64) ",
        128,
        "512 threads leave each 128 registers, 256 leave 255; with some types a few words do not fit",
    ),
    Excuse(
        r"(attend|attention) .*-DKV=float ",
        64,
        "a cache of float32 is what others are measured against; with large groups a few words do not fit",
    ),
)

TRAITS = {name: type_.traits for name, type_ in QTYPES.items() if type_.traits is not None}
KERNELS = CudaExecutor().kernels(
    DeviceInfo(kind="cuda", name="any", total_bytes=0, free_bytes=0), list(QTYPES.values())
)
SOURCES = KernelSources(TRAITS)


def lowered(plan: WeightPlan, kv_type: str) -> Iterator[Wanted]:
    """The sources of a program, with both kinds of activations, and with rings or without where there are any."""
    ways = [*product((BULK_COPIES, WITHOUT_BULK_COPIES), (True, False), (RING_ROWS,)), (BULK_COPIES, True, 0)]
    ways += [(WGMMA, True, RING_ROWS), (WGMMA, True, 0)]
    for archs, quantize, ring_rows in ways:
        lowering = Lowering(
            plan=plan,
            sources=SOURCES,
            rows=512,
            kv_type=kv_type,
            sm_count=132,
            quantize_activations=quantize,
            cublas=True,
            bulk_copies=archs in {BULK_COPIES, WGMMA},
            wgmma=archs is WGMMA,
            crossovers=RowCrossovers(ring_rows=ring_rows),
        )
        parts = [part for path in lowering.paths for part in lowering.launches(path)]
        yield from ((spec.source, archs) for part in parts for spec in part if isinstance(spec, LaunchSpec))
        yield SOURCES.choose(plan.program.vocab_size), archs


def of_shapes() -> Iterator[Wanted]:
    """Programs of each built-in shape and each recipe, with the types of the cache in turns."""
    recipes = [*RECIPES, *["Q4_K_M"] * len(SHAPES)]
    for shape, recipe, kv_type in zip(cycle(SHAPES), recipes, cycle(KV_TYPES), strict=False):
        file = synth_model(shape, recipe, layers=2)
        model = validate(file, CONTRACTS[file.architecture]).model()
        plan = plan_weights(model, build_program(model), KERNELS)
        yield from lowered(plan, kv_type)
        for weight in plan.weights:  # a matrix of any type may be the embedding, or go to cuBLAS
            if weight.layout.name == "tiles":
                yield SOURCES.embed(weight), ARCHS
                yield SOURCES.dequantise(weight), ARCHS


def of_families() -> Iterator[Wanted]:
    for case, kv_type in zip(CASES.values(), cycle(("f32", "f16")), strict=False):
        contract, metadata, arrays = build(evolve(case, keys={**case.keys, "feed_forward_length": 64}))
        model = validate(model_file(metadata, arrays), contract).model()
        program = build_program(model)
        if not any(isinstance(o, op.Linear) and o.weight.columns % 32 for o in program.operators):
            yield from lowered(plan_weights(model, program, KERNELS), kv_type)


def of_heads() -> Iterator[Wanted]:
    """Attention and what comes before it, for every size of head and group."""
    turns = cycle(product(KV_TYPES, (0.0, 30.0), (0, 128)))
    for (head_dim, group), _ in product(product((64, 80, 96, 128, 256), (1, 2, 3, 4, 5, 6, 7, 8)), range(3)):
        kv_type, softcap, window = next(turns)
        if head_dim % KV_TYPES[kv_type].block_elements:
            kv_type = "f16"
        attention = _attention(head_dim, group, softcap, window)
        tile = attention_tile(group)
        yield from ((SOURCES.attention(attention, kv_type, exact=exact), ARCHS) for exact in (False, True))
        place = _place(head_dim, "halves", head_dim, "rms", attention)
        archs = ARCHS if attend_fits(attention, kv_type, bulk_copies=False) else BULK_COPIES
        threads, tensor = attend_threads(attention, kv_type), attend_tensor(attention, kv_type)
        yield SOURCES.attend(place, kv_type, threads, 2, tensor=tensor), archs
        if tensor:
            yield SOURCES.attend(place, kv_type, threads, 1, tensor=tensor), BULK_COPIES
        if kv_type != "f32":
            yield SOURCES.attention(attention, kv_type, tile.rows, exact=False), ARCHS
            yield SOURCES.attention_prefill(attention, kv_type, tile), ARCHS
    styles: tuple[Style, ...] = ("adjacent", "halves")
    norms: tuple[NormType | None, ...] = (None, "rms", "layer")
    for kv_type, head_dim, style, part, norm in product(KV_TYPES, (64, 96, 256), styles, (0, 2, 1), norms):
        if part or norm:
            yield SOURCES.place(_place(head_dim, style, head_dim // part if part else 0, norm), kv_type), ARCHS
    yield from ((SOURCES.kv_write(kv_type), ARCHS) for kv_type in KV_TYPES)


def _attention(head_dim: int, group: int, softcap: float, window: int) -> op.Attention:
    q, out = (Buffer(name, 4 * group * head_dim) for name in ("q", "out"))
    return op.Attention(
        layer=0,
        name="attention",
        src=q,
        out=out,
        num_heads=4 * group,
        num_kv_heads=4,
        head_dim=head_dim,
        scale=1.0,
        softcap=softcap,
        window=window,
    )


def _place(
    head_dim: int, style: Style, dims: int, norm: NormType | None, attention: op.Attention | None = None
) -> PlaceGroup:
    attention = attention or _attention(head_dim, 2, 0.0, 0)
    heads = attention.num_heads
    weight = WeightRef(role="attn_q_norm", layer=0, tensor="norm", shape=(head_dim,), row_stop=head_dim)
    k = Buffer("k", 4 * head_dim)

    def norm_of(src: Buffer, heads: int) -> op.Norm | None:
        if norm is None:
            return None
        return op.Norm(layer=0, name="norm", src=src, out=src, type=norm, eps=1e-5, groups=heads, weight=weight)

    def rope_of(src: Buffer, heads: int) -> op.Rope | None:
        if not dims:
            return None
        shape: dict[str, Any] = {"num_heads": heads, "head_dim": head_dim, "dims": dims}
        return op.Rope(layer=0, name="rope", src=src, out=src, style=style, base=1e4, **shape)

    return PlaceGroup(
        q_norm=norm_of(attention.src, heads),
        k_norm=norm_of(k, 4),
        q_rope=rope_of(attention.src, heads),
        k_rope=rope_of(k, 4),
        write=op.KvWrite(layer=0, name="kv_write", k=k, v=k, num_kv_heads=4, head_dim=head_dim),
        attention=attention,
    )


@cache
def chosen() -> Mapping[str, Sequence[Source]]:
    wanted: dict[Source, set[str]] = defaultdict(set)
    for source, archs in chain(of_shapes(), of_families(), of_heads(), [(SOURCES.read(), ARCHS)]):
        wanted[source].update(archs)
    return covering_set(wanted, types_elsewhere=TYPES_ELSEWHERE)


def test_every_kernel_file_is_compiled_somewhere() -> None:
    compiled = {f"{source.name}.cu" for sources in chosen().values() for source in sources}
    assert {path.name for path in OPS.glob("*.cu")} == compiled | set(ELSEWHERE)


def types_in(kernels: str, archs: Sequence[str]) -> set[str]:
    sources = [source for arch in archs for source in chosen()[arch] if source.name in kernels.split()]
    return {name for name in TRAITS for source in sources if f"{name}," in str(source.defines)}


@pytest.mark.parametrize("arch", ARCHS)
def test_products_are_compiled_with_every_type(arch: str) -> None:
    assert types_in("gemv", [arch]) == set(TRAITS)
    of_rows = types_in("matmul matmul_ring matmul_wgmma", [arch])
    assert of_rows == TRAITS.keys() - {"F32"}, "whose products are of float32, by gemv or cuBLAS"


@pytest.mark.parametrize("kernel", TYPES_ELSEWHERE)
def test_rows_are_expanded_of_every_type(kernel: str) -> None:
    assert types_in(kernel, ARCHS) == set(TRAITS)


def allowed(source: Source) -> int:
    """Bytes of local memory that a source is excused for."""
    return max((excuse.most_bytes for excuse in EXCUSED if re.search(excuse.source, str(source))), default=0)


@needs_nvrtc
@pytest.mark.slow
@pytest.mark.parametrize("arch", ARCHS)
def test_kernels_compile_without_local_memory(arch: str) -> None:
    compiled = compile_all(chosen()[arch], arch)
    assert compiled.compiled == len(chosen()[arch])
    used = [(source, name, code) for source, made in compiled.kernels.items() for name, code in made.functions.items()]
    spills = [
        f"{source}: {name} has {resources.stack_bytes} bytes of local memory"
        for source, name, resources in used
        if resources.uses_local_memory and resources.stack_bytes > allowed(source)
    ]
    assert not spills, "\n".join(spills)
    warnings = [f"{source}: {code.warnings}" for source, code in compiled.kernels.items() if code.warnings]
    assert not warnings, "\n".join(warnings)
