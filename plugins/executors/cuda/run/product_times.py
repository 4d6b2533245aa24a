"""Times the products of a step by themselves, with the very launches of a step and weights from memory.

A product is launched many times in a row as one graph, as a step is, so each overlaps with the one before as far as the
launches of a step do. Each finds its weights elsewhere: the copies together are several times what the L2 cache holds.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing
from typing import Protocol

import numpy as np
from attrs import evolve
from numpy.typing import NDArray

from mortice.core.errors import InputError
from mortice.core.model.operators import Buffer
from mortice.core.model.weight_plan import PlannedWeight
from mortice.core.plugin.product_times import ProductTime
from mortice.plugins.executors.cuda.device.device import Device
from mortice.plugins.executors.cuda.device.stream import Stream
from mortice.plugins.executors.cuda.lowering.fusion import LinearGroup, name_of
from mortice.plugins.executors.cuda.lowering.launches import Addresses, Queued, Spec
from mortice.plugins.executors.cuda.lowering.lowering import Lowering
from mortice.plugins.executors.cuda.run.kernels import Kernels
from mortice.plugins.executors.cuda.run.runtime_memory import RuntimeMemory

__all__ = ["ProductSteps", "time_products"]

_CACHES = 6
"""Times the L2 cache that is read before a byte is read again."""
_LEAST_PRODUCTS = 64
"""Of a graph, so that its own launch counts for nothing."""
_WARM_UPS = 2
_ALIGNMENT = 256


class ProductSteps(Protocol):
    """What the runtime does for this module."""

    device: Device
    lowering: Lowering
    kernels: Kernels
    stream: Stream
    memory: RuntimeMemory

    @property
    def graph_rows(self) -> int:
        """Rows of a step that may be one graph, at most."""
        ...

    def queue(self, specs: Sequence[Spec], rows: int, addresses: Addresses) -> list[Queued]:
        """Those launches, ready to run."""
        ...


def time_products(runtime: ProductSteps, rows: int, repeats: int) -> list[ProductTime]:
    """See `TimesProducts`."""
    if rows > runtime.graph_rows:
        raise InputError(f"products: found {rows} rows, wanted at most {runtime.graph_rows}")
    runtime.device.make_current()
    runtime.stream.synchronize()
    return [_time(runtime, group, rows, repeats) for group in _different(runtime.lowering)]


def _different(lowering: Lowering) -> Iterator[LinearGroup]:
    """Groups of linear maps, of equal ones the first."""
    planned = _planned(lowering)
    seen = set()
    for group in lowering.groups:
        if isinstance(group, LinearGroup):
            refs = [linear.weight for linear in group.linears]
            key = tuple((ref.role, planned[ref].tensor.qtype.name, ref.rows, ref.columns) for ref in refs)
            if key not in seen:
                seen.add(key)
                yield group


def _planned(lowering: Lowering) -> dict[object, PlannedWeight]:
    return {planned.weight: planned for planned in lowering.plan.weights}


def _time(runtime: ProductSteps, group: LinearGroup, rows: int, repeats: int) -> ProductTime:
    name = name_of(group.operators)
    body, head = runtime.kernels.specs[runtime.lowering.path(rows)]
    specs = [spec for spec in (*body, *head) if spec.name == name]
    weights = [_planned(runtime.lowering)[linear.weight] for linear in group.linears]
    with ExitStack() as undo:
        places = _copies(runtime, weights, undo)
        _fill_inputs(runtime, group, rows)
        queued = [runtime.queue(specs, rows, each) for each in places]
        rounds = -(-_LEAST_PRODUCTS // len(places))
        with runtime.stream.capture() as graph:
            for _ in range(rounds):
                for launches in queued:
                    for launch in launches:
                        launch(runtime.stream)
        undo.callback(graph.close)
        chain = undo.enter_context(closing(graph.instantiate()))
        before, after = (undo.enter_context(closing(runtime.device.new_event(timing=True))) for _ in range(2))
        seconds = []
        for number in range(_WARM_UPS + repeats):
            before.record(runtime.stream)
            chain.launch(runtime.stream)
            after.record(runtime.stream)
            after.synchronize()
            if number >= _WARM_UPS:
                seconds.append(after.milliseconds_since(before) / 1000 / (rounds * len(places)))
    return ProductTime(
        weights=tuple(weight.weight for weight in weights),
        nbytes=sum(weight.nbytes for weight in weights),
        launches=len(specs),
        seconds=tuple(seconds),
    )


def _copies(runtime: ProductSteps, weights: Sequence[PlannedWeight], undo: ExitStack) -> list[Addresses]:
    """Where things lie, as in a step and with the weights elsewhere, as often as the caches are to be overrun."""
    own = runtime.memory.addresses
    sizes = [-(-weight.nbytes // _ALIGNMENT) * _ALIGNMENT for weight in weights]
    count = -(-_CACHES * runtime.device.properties.l2_bytes // sum(sizes))
    places = [own]
    if count > 1:
        start = undo.enter_context(closing(runtime.device.allocate((count - 1) * sum(sizes)))).address
        for _ in range(count - 1):
            moved = {}
            for weight, size in zip(weights, sizes, strict=True):
                runtime.stream.copy(start, own.weights[weight.weight], weight.nbytes)
                moved[weight.weight] = start
                start += size
            places.append(evolve(own, weights={**own.weights, **moved}))
    return places


def _fill_inputs(runtime: ProductSteps, group: LinearGroup, rows: int) -> None:
    """Random activations, for what a kernel takes and draws may depend on them."""
    rng = np.random.default_rng(0)
    for buffer in filter(None, (group.source, group.added)):
        runtime.stream.write(runtime.memory.address(buffer), _random(rng, rows, buffer))


def _random(rng: np.random.Generator, rows: int, buffer: Buffer) -> NDArray[np.float32]:
    return rng.standard_normal((rows, buffer.width), np.float32)
