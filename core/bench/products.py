"""Measures the linear maps of a step by themselves: one row for each type and shape, beside what the device can read.

Works with any executor that is `TimesProducts`.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from attrs import define, evolve, field, frozen

from mortice.core.bench.measure import MeasuresBandwidth
from mortice.core.config import RunConfig
from mortice.core.errors import ConfigError, DoesNotFitError, UnsupportedError
from mortice.core.model.qtypes import GGML_TYPES, QType
from mortice.core.pipeline import Pipeline, prepare_opened
from mortice.core.plugin.interfaces import Executor
from mortice.core.plugin.product_times import ProductTime, TimesProducts
from mortice.core.plugin.registry import Registry
from mortice.core.synth.model import synth_model
from mortice.core.synth.recipes import OneType

__all__ = [
    "NEEDS_DEVICE",
    "LeftOut",
    "ProductModel",
    "ProductReport",
    "ProductRow",
    "bench_products",
    "models_of_shape",
    "require_product_times",
]

NEEDS_DEVICE = "timing products takes a CUDA device: run it on a machine where nvidia-smi lists one"
"""What to do where products cannot be timed."""


@frozen(kw_only=True)
class ProductModel:
    """A model whose products are measured.

    Attributes:
        name: for the report.
        qtype: the type that products are wanted of; None for whatever they are.
        open: opens and plans it.

    """

    name: str
    qtype: QType | None = None
    open: Callable[[], Pipeline]


@frozen(kw_only=True)
class ProductRow:
    """Linear maps that are done together.

    Attributes:
        model: whose.
        product: the roles of the maps.
        qtype: the type of their weights, or several, joined.
        outputs: rows of all weights.
        columns: of a weight.
        sequences: rows of the step.
        nbytes: of the weights as they lie on the device.
        launches: what the device is given to do for them.
        seconds: of each repeat.
        read_bandwidth: what the device was measured to read, bytes a second; None where the executor cannot tell.

    """

    model: str
    product: str
    qtype: str
    outputs: int
    columns: int
    sequences: int
    nbytes: int
    launches: int
    seconds: tuple[float, ...]
    read_bandwidth: float | None = None

    @property
    def median(self) -> float:
        """Of `seconds`."""
        return statistics.median(self.seconds)

    @property
    def bytes_per_second(self) -> float:
        """At the median."""
        return self.nbytes / self.median

    @property
    def bandwidth_share(self) -> float | None:
        """`bytes_per_second` as a part of `read_bandwidth`."""
        return None if self.read_bandwidth is None else self.bytes_per_second / self.read_bandwidth


@frozen(kw_only=True)
class LeftOut:
    """What was not measured; `product` is empty where it is all of a type."""

    model: str
    product: str
    qtype: str
    reason: str


@frozen(kw_only=True)
class ProductReport:
    """All of it; rows of one product stand together."""

    executor: str
    device: str
    read_bandwidth: float | None
    rows: tuple[ProductRow, ...]
    left_out: tuple[LeftOut, ...] = ()


def require_product_times(executor: Executor, why: str = "asked for") -> TimesProducts:
    """The executor, if it can time products; `why` it was chosen is said where it cannot.

    Raises:
        UnsupportedError: when it cannot.

    """
    if not isinstance(executor, TimesProducts):
        raise UnsupportedError(f"products: executor {executor.name} ({why}) cannot time them; {NEEDS_DEVICE}")
    return executor


def models_of_shape(
    config: RunConfig, registry: Registry, executor: Executor, shape: str, names: Sequence[str] = ()
) -> list[ProductModel]:
    """A model of one layer for each type that the executor multiplies with, all of its matrices of that type.

    Args:
        config: how they are opened.
        registry: the plugins.
        executor: what they are opened on.
        shape: one of `SHAPES`.
        names: the types, upper or lower case; by default all.

    Raises:
        ConfigError: for a type that the executor does not have.

    """
    kernels = registry.kernels(executor, executor.device())
    able = {kernel.qtype for kernel in kernels if kernel.operator == "linear"}
    types = {name: provided.value.qtype for name, provided in registry.qtypes.items() if name in able}
    spelling = {name.lower(): name for name in types}
    for name in names:
        if name.lower() not in spelling:
            raise ConfigError(f"products: unknown type {name!r}; {executor.name} has {', '.join(types)}")
    chosen = dict.fromkeys(spelling[name.lower()] for name in names or types)

    def opener(qtype: QType) -> Callable[[], Pipeline]:
        def open_model() -> Pipeline:
            if qtype not in GGML_TYPES.values():
                raise UnsupportedError("random weights of this type cannot be made; measure a file that has it")
            mix = OneType(name=qtype.name, base=qtype.name)
            untuned = evolve(config, executor=evolve(config.executor, tuning="cached"))  # one row needs none
            return prepare_opened(untuned, registry, synth_model(shape, mix, layers=1))

        return open_model

    return [ProductModel(name=shape, qtype=types[name], open=opener(types[name])) for name in chosen]


def bench_products(
    models: Iterable[ProductModel], executor: Executor, rows: Sequence[int], repeats: int, note: Callable[[str], None]
) -> ProductReport:
    """Measure the products of models, one after the other.

    Args:
        models: each is opened, and closed, here.
        executor: what they are opened on.
        rows: of a step; each is measured.
        repeats: times to measure.
        note: told what is going on, one line each.

    Raises:
        UnsupportedError: when the executor cannot time products.
        MorticeError: what opening a model and the executor raise.

    """
    bencher = _Bencher(times=require_product_times(executor), rows=rows, repeats=repeats, note=note)
    for model in models:
        bencher.measure(model)
    products = list(dict.fromkeys((row.model, row.product) for row in bencher.found))
    return ProductReport(
        executor=executor.name,
        device=executor.device().name,
        read_bandwidth=bencher.read_bandwidth,
        rows=tuple(sorted(bencher.found, key=lambda row: products.index((row.model, row.product)))),
        left_out=tuple(bencher.left_out),
    )


@define(eq=False, kw_only=True)
class _Bencher:
    times: TimesProducts
    rows: Sequence[int]
    repeats: int
    note: Callable[[str], None]
    read_bandwidth: float | None = field(default=None, init=False)
    found: list[ProductRow] = field(factory=list, init=False)
    left_out: list[LeftOut] = field(factory=list, init=False)

    def measure(self, model: ProductModel) -> None:
        wanted = model.qtype.name if model.qtype is not None else ""
        try:
            with model.open() as pipeline:
                pipeline.preload()
                self._measure(model, pipeline)
        except (DoesNotFitError, UnsupportedError) as error:
            self.left_out.append(LeftOut(model=model.name, product="", qtype=wanted, reason=str(error)))
        self.note(f"{model.name}{' ' * bool(wanted)}{wanted} measured")

    def _measure(self, model: ProductModel, pipeline: Pipeline) -> None:
        runtime: Any = pipeline.runtime
        if self.read_bandwidth is None and isinstance(runtime, MeasuresBandwidth):
            self.read_bandwidth = runtime.measure_read_bandwidth()
        types = {planned.weight: planned.tensor.qtype.name for planned in pipeline.plan.weights}
        for count in self.rows:
            for time in self.times.time_products(runtime, count, self.repeats):
                found = list(dict.fromkeys(types[weight] for weight in time.weights))
                if model.qtype is None or found == [model.qtype.name]:
                    self.found.append(self._row(model, time, "+".join(found), count))
                elif count == self.rows[0]:
                    self.left_out.append(_too_narrow(model.name, model.qtype, time))

    def _row(self, model: ProductModel, time: ProductTime, qtype: str, count: int) -> ProductRow:
        return ProductRow(
            model=model.name,
            product=_product(time),
            qtype=qtype,
            outputs=sum(weight.rows for weight in time.weights),
            columns=time.weights[0].columns,
            sequences=count,
            nbytes=time.nbytes,
            launches=time.launches,
            seconds=time.seconds,
            read_bandwidth=self.read_bandwidth,
        )


def _product(time: ProductTime) -> str:
    return "+".join(weight.role for weight in time.weights)


def _too_narrow(model: str, qtype: QType, time: ProductTime) -> LeftOut:
    columns, block = time.weights[0].columns, qtype.block_elements
    reason = f"rows of {columns} are no whole number of blocks of {block}"
    return LeftOut(model=model, product=_product(time), qtype=qtype.name, reason=reason)
