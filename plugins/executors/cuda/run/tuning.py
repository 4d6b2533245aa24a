"""Times the ways to multiply on the card at hand, with the model's own weights, and takes the fastest for each length.

That is done once for a card and a model's shapes, see `mortice.plugins.executors.cuda.run.tuned`. What is timed is the
linear maps of some layers, launched as a step launches them, and the head where it takes part: enough of them that
weights come from memory, not from the L2 cache. They work in as much memory as the runtime will have afterwards, so
nothing is needed beyond what `fit` counts.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, closing
from itertools import pairwise
from typing import Literal

import numpy as np
from attrs import evolve, field, frozen

from mortice.core.model import operators as op
from mortice.core.model.residency import BoundModel
from mortice.core.plugin.events import WaysMeasured
from mortice.core.plugin.interfaces import Emit
from mortice.plugins.executors.cuda.compile.nvrtc import Source
from mortice.plugins.executors.cuda.device.cublas import cublas_version, find_cublas
from mortice.plugins.executors.cuda.device.device import Device
from mortice.plugins.executors.cuda.device.stream import Stream
from mortice.plugins.executors.cuda.device.toolkit import find_compiler
from mortice.plugins.executors.cuda.lowering.crossovers import GEMM_CANDIDATES, Timing, Way, choose_crossovers
from mortice.plugins.executors.cuda.lowering.fusion import Group, LinearGroup
from mortice.plugins.executors.cuda.lowering.launches import Addresses, LaunchSpec, Queued, Spec, StepRows
from mortice.plugins.executors.cuda.lowering.linear import LinearLowering
from mortice.plugins.executors.cuda.lowering.lowering import Lowering
from mortice.plugins.executors.cuda.lowering.matmul import MATMUL_TILES, RowPath, row_path, row_paths
from mortice.plugins.executors.cuda.lowering.matmul_ring import RING_ROWS
from mortice.plugins.executors.cuda.lowering.placing import LOGIT_ROWS
from mortice.plugins.executors.cuda.run.kernels import Kernels, compile_kernels
from mortice.plugins.executors.cuda.run.loaded import LoadedKernels
from mortice.plugins.executors.cuda.run.tuned import TunedFile, tuned_for

__all__ = ["Compilation", "Trial", "choices_of", "compile_tuned", "measured_kernels", "plan_trial", "time_trial"]

_LEAST_BYTES = 64 << 20
"""Weights of a model whose steps depend on how they are multiplied; those of less stay in the L2 cache."""

_SAMPLE_BYTES = 512 << 20
"""Weights of the layers that are timed, four times the largest L2 cache there is (126 MB)."""

_INPUT_BYTE = 0x3C
"""Fills activations with 0.0115 in float32: kernels draw power by their inputs."""

_WARM_UPS, _REPEATS = 2, 5


Neighbours = tuple[LinearGroup | None, LinearGroup, LinearGroup | None]
"""A group of linear maps between those right before and after it, if they are such groups, too."""


@frozen(eq=False, kw_only=True)
class Stretch:
    """Groups of linear maps that follow one another.

    Attributes:
        groups: all.
        each_kind: of those that are lowered alike the first.

    """

    groups: Sequence[Neighbours] = ()
    each_kind: Sequence[Neighbours] = ()

    @classmethod
    def of(cls, lowering: Lowering, groups: Sequence[Group]) -> Stretch:
        """The linear maps among groups of a program."""
        linears = [None, *(group if isinstance(group, LinearGroup) else None for group in groups), None]
        around = zip(linears, linears[1:], linears[2:], strict=False)
        found = [(before, group, after) for before, group, after in around if group is not None]
        return cls(groups=found, each_kind=[found[i] for i in lowering.likeness.first_of_each(found)])


@frozen(eq=False, kw_only=True)
class Sample:
    """What is launched for a way.

    Attributes:
        linear: makes the launches.
        path: the way.
        layers: what is timed of the body.
        ending: the head; empty where steps of that many rows have one of their own way.
        sources: of the kernels.

    """

    linear: LinearLowering = field(repr=False)
    path: RowPath
    layers: Stretch = field(repr=False)
    ending: Stretch = field(repr=False, factory=Stretch)
    sources: frozenset[Source] = field(init=False, repr=False)

    @sources.default
    def _of_each_kind(self) -> frozenset[Source]:
        specs = self._launches([*self.layers.each_kind, *self.ending.each_kind])
        return frozenset(spec.source for spec in specs if isinstance(spec, LaunchSpec))

    @property
    def body(self) -> list[Spec]:
        """Launches of the layers timed."""
        return self._launches(self.layers.groups)

    @property
    def head(self) -> list[Spec]:
        """Launches of the head."""
        return self._launches(self.ending.groups)

    def _launches(self, groups: Sequence[Neighbours]) -> list[Spec]:
        return [
            spec for before, group, after in groups for spec in self.linear.launches(group, self.path, before, after)
        ]


@frozen(eq=False, kw_only=True)
class TrialPoint:
    """A number of rows and the ways that steps of about as many may go; the attributes are those of `Timing`."""

    least: int
    most: int
    rows: int
    ways: Mapping[Way, Sample]


@frozen(eq=False, kw_only=True)
class Trial:
    """What is to be timed for a program.

    Attributes:
        points: by rows.
        nbytes: of the weights of the layers that are timed.
        share: of the bytes of all layers.

    """

    points: Sequence[TrialPoint] = field(repr=False)
    nbytes: int
    share: float

    @property
    def sources(self) -> frozenset[Source]:
        """Everything that has to be compiled."""
        return frozenset().union(*(sample.sources for point in self.points for sample in point.ways.values()))


def plan_trial(lowering: Lowering) -> Trial | None:
    """What is to be timed before a program runs; None where there is nothing to choose, or nothing to gain."""
    if not lowering.quantize_activations:
        return None
    body, head = _parts(lowering.groups)
    sizes = [_bytes(lowering, group) for group in body]
    if sum(sizes) + sum(_bytes(lowering, group) for group in head) < _LEAST_BYTES:
        return None
    window = _window(sizes, _SAMPLE_BYTES)
    layers, ending = Stretch.of(lowering, body[window]), Stretch.of(lowering, head)
    points = [*_ring_points(lowering, layers, ending), *_gemm_points(lowering, layers)]
    timed = sum(sizes[window])
    return Trial(points=points, nbytes=timed, share=timed / sum(sizes)) if points else None


def _parts(groups: Sequence[Group]) -> tuple[Sequence[Group], Sequence[Group]]:
    """The groups of the layers, and those of the head."""
    ends = (i for i, group in enumerate(groups) if isinstance(group.operators[0], op.SelectRows))
    end = next(ends, len(groups))
    return groups[:end], groups[end:]


def _bytes(lowering: Lowering, group: Group) -> int:
    if not isinstance(group, LinearGroup):
        return 0
    return sum(lowering.linear.planned[linear.weight].nbytes for linear in group.linears)


def _window(sizes: Sequence[int], wanted: int) -> slice:
    """Neighbours of so many bytes together, or all: from the middle, for the first and last may be of other types."""
    start = stop = len(sizes) // 2
    while sum(sizes[start:stop]) < wanted and stop - start < len(sizes):
        start, stop = max(0, start - 1), min(len(sizes), stop + 1)
    return slice(start, stop)


def _ring_points(lowering: Lowering, layers: Stretch, ending: Stretch) -> Iterator[TrialPoint]:
    """Rings against ``ops/matmul.cu`` or ``ops/matmul_wgmma.cu``, for each tile that they can stand in for."""
    paths = row_paths(min(RING_ROWS, lowering.rows), exact=False, cublas=False)
    for path in paths[1:]:
        samples: dict[Way, Sample] = {}
        ways: tuple[tuple[Way, int], ...] = (("matmul", 0), ("ring", RING_ROWS))
        for way, ring_rows in ways:
            linear = evolve(lowering.linear, ring_rows=ring_rows)
            own = ending if path.rows <= LOGIT_ROWS else Stretch()
            samples[way] = Sample(linear=linear, path=path, layers=layers, ending=own)
        if samples["ring"].sources != samples["matmul"].sources:  # the card and some shapes allow it
            yield from _point(lowering, path.least, path.rows, samples)


def _gemm_points(lowering: Lowering, layers: Stretch) -> Iterator[TrialPoint]:
    """Products by cuBLAS against as many passes of ``ops/matmul.cu`` or ``ops/matmul_wgmma.cu``."""
    if not lowering.cublas:
        return
    last = MATMUL_TILES[-1].rows
    by_matmul = row_path(row_paths(last, exact=False, cublas=False), last)
    by_gemm = row_path(row_paths(last, exact=False, cublas=True, gemm_from_rows=2), last)
    samples: dict[Way, Sample] = {
        "matmul": Sample(linear=lowering.linear, path=by_matmul, layers=layers),
        "gemm": Sample(linear=lowering.linear, path=by_gemm, layers=layers),
    }
    for least, following in pairwise(GEMM_CANDIDATES):
        yield from _point(lowering, least, following - 1, samples)


def _point(lowering: Lowering, least: int, most: int, ways: Mapping[Way, Sample]) -> Iterator[TrialPoint]:
    """The middle of those rows, where steps have as many."""
    rows = (least + most) // 2
    if rows <= lowering.rows:
        yield TrialPoint(least=least, most=most, rows=rows, ways=ways)


# kernels ----------------------------------------------------------------------------------------------------------


@frozen(eq=False, kw_only=True)
class Compilation:
    """Compiled kernels, by crossovers that are known or built in.

    Attributes:
        kernels: they; with the code of a trial beside.
        trial: what is to be timed before they run; None where that is known, or not wanted.
        file: where what was found is kept.

    """

    kernels: Kernels
    trial: Trial | None = None
    file: TunedFile | None = None


def compile_tuned(lowering: Lowering, device: Device, tuning: Literal["auto", "cached", "off"]) -> Compilation:
    """Compile a program by the crossovers that were measured before, or with what measuring them takes.

    Raises:
        CompileError: as `compile_kernels` does.
        DeviceError: as `compile_kernels` does.

    """
    trial = plan_trial(lowering) if tuning != "off" else None
    if trial is None:
        return Compilation(kernels=compile_kernels(lowering, device.arch))
    library = find_cublas()
    version = cublas_version(library) if library is not None else ""
    measured_for = tuned_for(device.properties, find_compiler(), device.arch, version, trial.sources)
    measured_for["weights"] = str(trial.nbytes)
    file = TunedFile(measured_for=measured_for)
    known = file.read()
    if known is not None and known != lowering.crossovers:
        return Compilation(kernels=compile_kernels(evolve(lowering, crossovers=known), device.arch))
    if known is not None or tuning == "cached":
        return Compilation(kernels=compile_kernels(lowering, device.arch))
    return Compilation(kernels=compile_kernels(lowering, device.arch, beside=trial.sources), trial=trial, file=file)


def measured_kernels(device: Device, compilation: Compilation, model: BoundModel, emit: Emit) -> Kernels:
    """The kernels to run, by the crossovers that suit this card; what is not known is measured and kept."""
    kernels, trial, file = compilation.kernels, compilation.trial, compilation.file
    if trial is None or file is None:
        return kernels
    started = time.perf_counter()
    timings = time_trial(device, kernels, trial, model)
    chosen = choose_crossovers(timings)
    if chosen != kernels.lowering.crossovers:
        kernels = compile_kernels(evolve(kernels.lowering, crossovers=chosen), device.arch, known=kernels)
    kept = file.write(chosen, timings)
    seconds = time.perf_counter() - started
    emit(WaysMeasured(choices=choices_of(kernels.lowering), kept=kept, seconds=seconds))
    return evolve(kernels, beside={})


def choices_of(lowering: Lowering) -> dict[str, str]:
    """See `Tuned.measured_choices`; empty where float32 leaves none."""
    crossovers, chosen = lowering.crossovers, {}
    if lowering.quantize_activations and lowering.bulk_copies:
        chosen["products by rings"] = f"to {crossovers.ring_rows} rows" if crossovers.ring_rows else "none"
    if lowering.quantize_activations and lowering.cublas:
        chosen["products by cuBLAS"] = f"from {crossovers.gemm_from_rows} rows"
    return chosen


# times ------------------------------------------------------------------------------------------------------------


def time_trial(device: Device, kernels: Kernels, trial: Trial, model: BoundModel) -> list[Timing]:
    """Time every way of a trial; `kernels` have its code beside their own."""
    lowering = kernels.lowering
    code = {**kernels.build.kernels, **kernels.beside}
    device.make_current()
    with ExitStack() as undo:
        stream = undo.enter_context(closing(device.new_stream()))
        workspace = undo.enter_context(device.allocate(lowering.workspace.nbytes))
        matmul = undo.enter_context(device.allocate(lowering.scratch.nbytes))
        for memory in (workspace, matmul):
            stream.fill(memory.address, _INPUT_BYTE, memory.nbytes)
        sources = {source: code[source] for source in trial.sources}
        loaded = LoadedKernels(device, stream, sources, matmul.address + lowering.scratch.blas)
        undo.callback(loaded.close)
        addresses = _addresses(model, workspace.address, matmul.address)
        timings = []
        for point in trial.points:
            seconds = _time_point(loaded, point, addresses, trial.share)
            timings.append(Timing(least=point.least, most=point.most, rows=point.rows, seconds=seconds))
        return timings


def _addresses(model: BoundModel, workspace: int, matmul: int) -> Addresses:
    """Where linear maps find what they read and write; they touch nothing else."""
    return Addresses(
        weights={planned.weight: model.resident.address(i) for i, planned in enumerate(model.plan.weights)},
        workspace=workspace,
        matmul=matmul,
        keys=(),
        values=(),
        rows=StepRows(),
        selected=0,
        partial=0,
        arrivals=0,
        frequencies={},
    )


def _time_point(loaded: LoadedKernels, point: TrialPoint, addresses: Addresses, share: float) -> dict[Way, float]:
    """Seconds of a step's products by each way: the median; the ways by turns, so that a clock that changes is fair."""
    with ExitStack() as undo:
        runs = {
            way: [_run(loaded, specs, point.rows, addresses, undo) for specs in (sample.body, sample.head) if specs]
            for way, sample in point.ways.items()
        }
        events = [undo.enter_context(closing(loaded.device.new_event(timing=True))) for _ in range(3)]
        times: dict[Way, list[float]] = {way: [] for way in runs}
        for number in range(_WARM_UPS + _REPEATS):
            for way, parts in runs.items():
                passed = events[: len(parts) + 1]
                passed[0].record(loaded.stream)
                for part, event in zip(parts, passed[1:], strict=True):
                    part(loaded.stream)
                    event.record(loaded.stream)
                passed[-1].synchronize()
                layers, *head = (after.milliseconds_since(before) / 1000 for before, after in pairwise(passed))
                if number >= _WARM_UPS:
                    times[way].append(layers / share + sum(head))
        return {way: float(np.median(found)) for way, found in times.items()}


def _run(loaded: LoadedKernels, specs: Sequence[Spec], rows: int, addresses: Addresses, undo: ExitStack) -> Queued:
    """Runs launches as a step does: as one graph, or one by one where it has too many rows for that."""
    launches = loaded.queue(specs, rows, addresses)

    def one_by_one(stream: Stream) -> None:
        for launch in launches:
            launch(stream)

    if rows > LOGIT_ROWS:
        return one_by_one
    with loaded.stream.capture() as graph:
        one_by_one(loaded.stream)
    undo.callback(graph.close)
    return undo.enter_context(closing(graph.instantiate())).launch
