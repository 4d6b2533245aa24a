"""How products of many rows are cut up: every output once, and all that is worked with inside its own memory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest

from mortice.core.model import operators as op
from mortice.core.model.program import build_program
from mortice.core.model.types import DeviceInfo
from mortice.core.model.weight_plan import WeightPlan, plan_weights
from mortice.core.stages import open_file, validate_opened
from mortice.core.testing.tiny_models import write_tiny_model
from mortice.plugins.executors.cuda.device.cublas import WORKSPACE_BYTES
from mortice.plugins.executors.cuda.executor import CudaExecutor
from mortice.plugins.executors.cuda.lowering import matmul
from mortice.plugins.executors.cuda.lowering.crossovers import GEMM_CANDIDATES, RowCrossovers
from mortice.plugins.executors.cuda.lowering.fusion import Group, LinearGroup, PlaceGroup
from mortice.plugins.executors.cuda.lowering.launches import Addresses, GemmSpec, LaunchSpec, StepRows, rope_key
from mortice.plugins.executors.cuda.lowering.lowering import Lowering
from mortice.plugins.executors.cuda.lowering.matmul import (
    GEMM_FROM_ROWS,
    MATMUL_TILES,
    STEP,
    WGMMA_TILES,
    attention_tile,
    pieces_of,
    row_path,
    row_paths,
    rows_at_once,
    slices_of,
)
from mortice.plugins.executors.cuda.lowering.matmul_ring import RING_ROWS
from mortice.plugins.executors.cuda.lowering.placing import LOGIT_ROWS, PARTIAL_ROWS, matmul_bytes, scratch_bytes
from mortice.plugins.executors.cuda.lowering.sources import KernelSources
from tests.plugins.qtypes.blocks import TYPES
from tests.support.tiny import CONTRACTS, QTYPES, REGISTRY

SM_COUNT, ROWS = 132, 600
PLACES = ("inputs", "scales", "squares", "products", "weights", "blas")
CARD = DeviceInfo(kind="cuda", name="a GPU", total_bytes=1, free_bytes=1)
SIZES = {"hidden_size": 512, "ffn_size": 1792, "num_heads": 8, "num_kv_heads": 2}


def lowering(
    folder: Path,
    qtypes: str | Mapping[str, str] = "Q8_0",
    sizes: Mapping[str, int] = MappingProxyType({}),
    **options: Any,
) -> Lowering:
    path = write_tiny_model(folder / "model.gguf", CONTRACTS["llama"], qtypes=qtypes, sizes={**SIZES, **sizes})
    executor = CudaExecutor()
    with open_file(REGISTRY, path) as file:
        model = validate_opened(REGISTRY, file, None).model()
        plan: WeightPlan = plan_weights(model, build_program(model), executor.kernels(CARD, list(QTYPES.values())))
    traits = {name: type_.traits for name, type_ in TYPES.items() if type_.traits is not None}
    settings = {"rows": ROWS, "kv_type": "f16", "sm_count": SM_COUNT, "cublas": True, **options}
    return Lowering(plan=plan, sources=KernelSources(traits), **settings)


def addresses(of: Lowering) -> Addresses:
    layers = len(of.plan.program.kv)
    return Addresses(
        weights={planned.weight: 1 << 40 for planned in of.plan.weights},
        workspace=1 << 41,
        matmul=1 << 42,
        keys=[1 << 43] * layers,
        values=[1 << 44] * layers,
        rows=StepRows(),
        selected=0,
        partial=0,
        arrivals=0,
        frequencies={rope_key(o): (0, 1.0) for o in of.plan.program.operators if isinstance(o, op.Rope)},
    )


@pytest.mark.parametrize(
    ("rows", "kind", "passed"),
    [
        (1, "gemv", 1),
        (2, "matmul", 8),
        (8, "matmul", 8),
        (9, "matmul", 16),
        (17, "matmul", 32),
        (33, "matmul", 64),
        (GEMM_FROM_ROWS - 1, "matmul", 64),
        (GEMM_FROM_ROWS, "gemm", 8),
    ],
)
def test_a_step_goes_the_way_of_its_rows(rows: int, kind: str, passed: int) -> None:
    path = row_path(row_paths(ROWS, exact=False, cublas=True), rows)
    assert (path.kind, path.rows) == (kind, passed)


def test_without_cublas_long_steps_take_several_passes() -> None:
    path = row_path(row_paths(ROWS, exact=False, cublas=False), ROWS)
    assert (path.kind, path.rows) == ("matmul", MATMUL_TILES[-1].rows)


@pytest.mark.parametrize("rows", [1, 2, 8, 9, ROWS])
def test_float32_activations_stay_float32(rows: int) -> None:
    assert row_path(row_paths(ROWS, exact=True, cublas=True), rows).kind == "gemv"


def test_only_ways_that_steps_can_go_are_built() -> None:
    assert [path.rows for path in row_paths(1, exact=False, cublas=True)] == [1]
    assert [path.rows for path in row_paths(20, exact=False, cublas=True)] == [1, 8, 16, 32]


@pytest.mark.parametrize("columns", [32, 96, 128, 576, 4096, 14336, 100_000])
@pytest.mark.parametrize("units", [1, 36, 256, 1792, 8016])
@pytest.mark.parametrize("tile", [*MATMUL_TILES, *WGMMA_TILES], ids=lambda tile: f"{tile.rows}-{tile.warps}")
def test_slices_hold_all_columns_and_fit_a_block(columns: int, units: int, tile: matmul.MatmulTile) -> None:
    slices = slices_of(columns, units, tile, SM_COUNT)
    steps = -(-columns // STEP)
    assert (slices.count - 1) * slices.steps < steps <= slices.count * slices.steps
    assert slices.steps * STEP * tile.rows * 2 <= (224 if tile.by_warpgroups else 99) << 10
    assert slices.steps % 2 == 0 or not tile.by_warpgroups


@pytest.mark.parametrize("scratch", [1 << 10, 300_000, 1 << 20, 1 << 30])
def test_every_output_is_in_one_piece(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, scratch: int) -> None:
    monkeypatch.setattr(matmul, "WEIGHT_SCRATCH", scratch)
    groups = [group for group in lowering(tmp_path).groups if isinstance(group, LinearGroup)]
    assert {len(group.linears) for group in groups} == {1, 2, 3}
    for group in groups:
        lots = list(pieces_of(group))
        pieces = [piece for lot in lots for piece in lot]
        for linear, operator in enumerate(group.linears):
            own = sorted((piece.start, piece.stop) for piece in pieces if piece.linear == linear)
            assert [start for start, _ in own] == [0, *(stop for _, stop in own[:-1])]
            assert own[-1][1] == operator.weight.rows
        assert all(piece.start % STEP == 0 for piece in pieces)
        columns = group.linears[0].weight.columns
        least = STEP * (2 if group.gated else 1)
        assert all(2 * columns * sum(p.rows for p in lot) <= max(scratch, 2 * columns * least) for lot in lots)
        if group.gated:
            assert all((lot[0].start, lot[0].stop) == (lot[1].start, lot[1].stop) for lot in lots)


@pytest.mark.parametrize("wgmma", [False, True])
@pytest.mark.parametrize("rings", [False, True])
@pytest.mark.parametrize("rows", [1, 2, 8, 9, 33, GEMM_FROM_ROWS - 1, GEMM_FROM_ROWS, ROWS])
def test_what_products_work_in_is_inside_its_memory(tmp_path: Path, rows: int, rings: bool, wgmma: bool) -> None:
    of = lowering(tmp_path, bulk_copies=rings, wgmma=wgmma, sizes={"ffn_size": 8192} if rings else {})
    seen = _places_worked_in(of, rows)
    wanted: dict[str, set[str]] = {
        "gemv": set(),
        "matmul": {"inputs", "scales", "squares", "products"},
    }
    if rings and rows <= RING_ROWS:
        wanted["matmul"] = {"products"}  # of rows that are two tiles long
    assert seen == wanted.get(of.path(rows).kind, {"inputs", "scales", "products", "weights"})


@pytest.mark.parametrize("gemm_from_rows", GEMM_CANDIDATES)
def test_one_memory_serves_products_by_cublas_from_wherever_they_begin(tmp_path: Path, gemm_from_rows: int) -> None:
    of = lowering(
        tmp_path,
        crossovers=RowCrossovers(gemm_from_rows=gemm_from_rows),
        other_gemm_from=(GEMM_CANDIDATES[0], GEMM_CANDIDATES[-1]),
    )
    for rows in (gemm_from_rows - 1, gemm_from_rows, ROWS):
        places = _places_worked_in(of, rows)
        assert ("weights" in places) == (rows >= gemm_from_rows)
    told = matmul_bytes(
        of.plan.program, SM_COUNT, ROWS, exact=False, cublas=True, gemm_from=(GEMM_CANDIDATES[0], GEMM_CANDIDATES[-1])
    )
    assert told == of.scratch.nbytes


def _places_worked_in(of: Lowering, rows: int) -> set[str]:
    """What a step works in, each inside its own memory."""
    at, scratch, seen = addresses(of), of.scratch, set()
    body, head = of.launches(of.path(rows))
    ends = dict(zip(PLACES, _ends(scratch), strict=True))
    for spec, count in [*((spec, rows) for spec in body), *((spec, min(rows, LOGIT_ROWS)) for spec in head)]:
        for name, start, nbytes in _worked_in(spec, at, count):
            seen.add(name)
            assert getattr(scratch, name) <= start - at.matmul
            assert start - at.matmul + nbytes <= ends[name], (spec.name, spec.label, name)
    return seen


def _ends(scratch: matmul.MatmulScratch) -> Sequence[int]:
    return *(getattr(scratch, name) for name in PLACES[1:]), scratch.nbytes


def _worked_in(spec: LaunchSpec | GemmSpec, at: Addresses, rows: int) -> list[tuple[str, int, int]]:
    """(memory, address, bytes) that a launch reads or writes."""
    if isinstance(spec, GemmSpec):
        gemm = spec.gemm(at, rows)
        return [
            ("inputs", gemm.x, 2 * gemm.rows * gemm.columns),
            ("weights", gemm.weight, 2 * gemm.outputs * gemm.columns),
            ("products", gemm.out, 4 * gemm.rows * gemm.outputs),
        ]
    args = spec.args(at, rows)
    constants = dict(spec.source.defines)
    columns, grid = int(constants.get("COLS", 0)), spec.grid(rows, 2 * SM_COUNT)
    if spec.entry == "matmul_input":
        step = 2 * STEP if constants["WGMMA"] else STEP
        steps = -(-columns // step) * step if constants["PASS"] else columns
        scales = 4 * int(constants["SCALES"]) * rows
        made = [("inputs", args[0].out, 2 * grid[0] * steps), ("scales", args[0].scales, scales)]
        if constants["FACTOR_LATER"]:
            made.append(("squares", args[0].squares, scales))
        return [*made, *_finished(args[0].products, rows, constants)] if constants["JOIN"] else made
    if spec.entry in {"matmul", "matmul_wgmma"}:
        step = 2 * STEP if spec.entry == "matmul_wgmma" else STEP
        width = sum(int(part.rstrip(">")) for part in str(constants["SEGMENTS"]).split(",")[3::4])
        read = 2 * grid[1] * int(constants["PASS"]) * -(-columns // step) * step
        written = 4 * int(constants["SLICES"]) * rows * width
        factors = ("scales", args[0].scales, 4 * int(constants["SLICES"]) * rows)
        return [("inputs", args[0].x, read), factors, ("products", args[0].products, written)]
    if spec.entry == "matmul_ring":
        tiles = str(constants["SEGMENTS"]).replace("Segment<", "").replace(">", "").split(",")
        slices = columns // int(tiles[2])
        return [("products", args[0].products, 4 * slices * rows * sum(map(int, tiles[3::4])))] if slices > 1 else []
    if spec.entry == "matmul_finish":
        return _finished(args[0], rows, constants)
    if spec.entry == "dequantise":
        tile_rows = int(str(constants["WEIGHT"]).split(",")[1])
        return [("weights", args[1].value, 2 * args[2].value * tile_rows * columns)]
    return []


def _finished(args: Any, rows: int, constants: Mapping[str, Any]) -> list[tuple[str, int, int]]:
    assert sum(part.columns for part in args.parts) == args.width
    slices = int(constants["SLICES"])
    assert bool(args.squares) == bool(constants["NORM_COLS"])
    scales = [("scales", args.scales, 4 * rows)] if args.scales else []
    squares = [("squares", args.squares, 4 * slices * rows)] if args.squares else []
    return [("products", args.products, 4 * slices * rows * args.width), *scales, *squares]


def test_fit_is_told_the_memory_that_is_taken(tmp_path: Path) -> None:
    for options in ({}, {"cublas": False}, {"quantize_activations": False}, {"rows": 7}):
        of = lowering(tmp_path, **options)
        told = matmul_bytes(of.plan.program, SM_COUNT, of.rows, exact=not of.quantize_activations, cublas=of.cublas)
        assert told == of.scratch.nbytes
        by_cublas = of.cublas and of.quantize_activations and of.rows >= GEMM_FROM_ROWS
        assert (told - of.scratch.blas) == (WORKSPACE_BYTES if by_cublas else 0)


def test_without_cublas_fewer_rows_go_at_once() -> None:
    assert rows_at_once(2048, exact=False, cublas=True) == 2048
    assert rows_at_once(2048, exact=True, cublas=False) == 2048
    assert rows_at_once(2048, exact=False, cublas=False) == 256
    assert rows_at_once(100, exact=False, cublas=False) == 100


def test_weights_in_float32_are_never_rounded_to_halves(tmp_path: Path) -> None:
    of = lowering(tmp_path, "F32")
    entries = {spec.entry for path in of.paths for spec in of.launches(path)[0] if isinstance(spec, LaunchSpec)}
    assert "gemv" in entries
    assert not {"matmul", "dequantise"} & entries


def kind(group: Group) -> str:
    return "place" if isinstance(group, PlaceGroup) else group.operators[0].kind


def test_each_launch_that_ends_a_group_says_what_it_completed(tmp_path: Path) -> None:
    of = lowering(tmp_path)
    for path in of.paths:
        # Q in its place is not written where attention takes it along; that of one row may leave its result in runs
        one_row = path.kind == "gemv" and path.rows == 1
        kinds = {"place", "attention"} if one_row else {"place"} if path.alone else set()
        wanted = [buffer for group in of.groups if kind(group) not in kinds for buffer in group.outputs]
        body, head = of.launches(path)
        told = [buffer for spec in (*body, *head) for buffer in spec.outputs]
        assert told == wanted[: len(told)]
        assert len(told) == len(wanted) or not head


def test_products_are_finished_where_the_next_ones_begin(tmp_path: Path) -> None:
    of = lowering(tmp_path)
    layers = len(of.plan.program.kv)
    for path in of.paths:
        labels = [spec.label for spec in of.launches(path)[0]]
        # the last layer's end goes to the head; gates wait for blocks of parts of rows
        joins = {"gemv": 0, "gemm": 2 * layers - 1, "matmul": 3 * layers - 1}[path.kind]
        assert labels.count("matmul finish, input") == joins


@pytest.mark.parametrize("group", range(1, 73))
def test_blocks_of_attention_take_whole_warps_and_whole_groups(group: int) -> None:
    tile = attention_tile(group)
    assert group % tile.heads == 0
    assert tile.rows * tile.heads % 16 == 0
    assert tile.threads <= 256
    assert tile.rows <= 32


@pytest.mark.parametrize("kv_type", ["f32", "q8_0", "f16"])
def test_runs_of_rows_attend_together_unless_the_cache_is_exact(tmp_path: Path, kv_type: str) -> None:
    of = lowering(tmp_path, kv_type=kv_type)
    for path in of.paths:
        together = [spec for spec in of.launches(path)[0] if spec.label == "attention of runs"]
        expected = kv_type != "f32" and (path.kind == "gemm" or path.rows > PARTIAL_ROWS)
        assert bool(together) == expected, path


@pytest.mark.parametrize("quantize", [True, False])
def test_rows_attend_in_halves_only_where_activations_are_rounded(tmp_path: Path, quantize: bool) -> None:
    of = lowering(tmp_path, quantize_activations=quantize)
    body, _ = of.launches(of.path(8))
    in_float32 = "attention" in {spec.entry for spec in body if isinstance(spec, LaunchSpec)}
    assert in_float32 == (not quantize)


@pytest.mark.parametrize(
    ("kv_type", "bulk_copies", "entries"),
    [("f16", False, {"attend"}), ("f32", True, {"attend"}), ("f32", False, {"place", "attention"})],
)
def test_a_row_attends_in_one_launch_where_a_page_fits_shared_memory(
    kv_type: str, bulk_copies: bool, entries: set[str], tmp_path: Path
) -> None:
    of = lowering(tmp_path, sizes={"head_dim": 256, "num_heads": 4}, kv_type=kv_type, bulk_copies=bulk_copies)
    body, _ = of.launches(of.path(1))
    assert {spec.entry for spec in body if isinstance(spec, LaunchSpec)} & {"attend", "place", "attention"} == entries


@pytest.mark.parametrize("rows", [2, 3, 8, 9, 16])
def test_rows_of_sequences_of_their_own_attend_in_one_launch(tmp_path: Path, rows: int) -> None:
    of = lowering(tmp_path, bulk_copies=True)
    single, several = (of.launches(of.path(rows, alone=alone))[0] for alone in (True, False))
    assert _attending(single) == {"attend"}
    assert _attending(several) == {"place", "attention_rows"}
    others = [[(spec.name, spec.label) for spec in body if not _attending([spec])] for body in (single, several)]
    assert others[0] == others[1], "all else is the same"


@pytest.mark.parametrize(
    ("rows", "options"),
    [
        (17, {}),
        (9, {"crossovers": RowCrossovers(ring_rows=8)}),
        (8, {"quantize_activations": False}),
        (8, {"bulk_copies": False}),
        (8, {"kv_type": "q8_0"}),
        (8, {"kv_type": "f32"}),
        (8, {"sizes": {"head_dim": 80}}),
    ],
)
def test_where_that_is_not_faster_their_keys_and_values_are_placed_before(
    tmp_path: Path, rows: int, options: dict[str, Any]
) -> None:
    of = lowering(tmp_path, **{"bulk_copies": True, **options})
    assert of.path(rows, alone=True) == of.path(rows)
    assert "attend" not in _attending(of.launches(of.path(rows))[0])


def test_the_runs_of_all_rows_have_room_in_what_fit_counts(tmp_path: Path) -> None:
    of = lowering(tmp_path, bulk_copies=True)
    attention = next(o for o in of.plan.program.operators if isinstance(o, op.Attention))
    nbytes, counters = scratch_bytes(of.plan.program, SM_COUNT, of.rows)
    for rows in range(1, 17):
        body, _ = of.launches(of.path(rows, alone=True))
        (args,) = next(spec for spec in body if _attending([spec])).args(addresses(of), rows)
        assert 4 * rows * args.splits * attention.num_heads * (attention.head_dim + 2) <= nbytes
        assert 4 * rows * attention.num_kv_heads <= counters


def _attending(specs: Sequence[LaunchSpec | GemmSpec]) -> set[str]:
    entries = {spec.entry for spec in specs if isinstance(spec, LaunchSpec)}
    return entries & {"attend", "place", "attention", "attention_rows", "attention_prefill"}


@pytest.mark.parametrize("kv_heads", [1, 2, 8, 32])
def test_no_block_of_attention_waits_for_another_to_end(tmp_path: Path, kv_heads: int) -> None:
    sizes = {"num_heads": 2 * kv_heads, "num_kv_heads": kv_heads, "head_dim": 64}
    of = lowering(tmp_path, bulk_copies=True, sizes=sizes)
    for rows in range(1, 17):
        body, _ = of.launches(of.path(rows, alone=True))
        spec = next(spec for spec in body if _attending([spec]) == {"attend"})
        assert isinstance(spec, LaunchSpec)
        across, down, _ = spec.grid(rows, 0)
        assert down == rows
        room = SM_COUNT * int(dict(spec.source.defines)["BLOCKS"])
        assert across * down <= room or across == kv_heads, "unless there are more rows and heads than that"
