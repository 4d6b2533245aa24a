"""Where every weight will lie: weight -> kernel layout -> offset and bytes, and what a run needs in memory.

A plan is made from the program alone, before the device is touched. Its unit is a `WeightRef`: the parts of a fused
tensor are planned one by one, and a tied head is planned once.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cache
from typing import Protocol

import numpy as np
from attrs import evolve, field, frozen
from numpy.typing import NDArray

from mortice.core.counts import counted
from mortice.core.errors import DoesNotFitError, UnsupportedError
from mortice.core.model.findings import join_layers
from mortice.core.model.operators import WeightRef
from mortice.core.model.program import Program
from mortice.core.model.qtypes import QType
from mortice.core.model.types import DeviceInfo, TensorView
from mortice.core.model.validation import ValidatedModel

__all__ = [
    "ALIGNMENT",
    "FitReport",
    "Kernel",
    "Layout",
    "PlannedWeight",
    "WeightPlan",
    "fit_report",
    "plan_weights",
]

ALIGNMENT = 256
"""Every weight starts at a multiple of this many bytes, as with CUDA's own allocator: more than any load needs."""


class Layout(Protocol):
    """How a weight lies in memory once it is resident."""

    @property
    def name(self) -> str:
        """A name for tables; layouts with the same name are the same."""
        ...

    def nbytes(self, qtype: QType, rows: int, columns: int) -> int:
        """Bytes of a weight; 0 when the layout uses the mapped file itself."""
        ...

    def store(self, rows: NDArray[np.uint8], columns: int, out: NDArray[np.uint8]) -> None:
        """Write a weight.

        Args:
            rows: the bytes as in the file, shape (rows, bytes of a row).
            columns: elements of a row.
            out: ``nbytes(...)`` bytes to fill.

        """
        ...


@frozen(eq=False, kw_only=True)
class Kernel:
    """An implementation of an operator for weights of one type.

    Attributes:
        operator: the operator's kind (``linear``).
        qtype: the weight type's name (``Q4_K``).
        layout: how it wants the weight to lie.
        plugin: who gave it (filled in by the registry).

    """

    operator: str
    qtype: str
    layout: Layout
    plugin: str = ""


@frozen(eq=False, kw_only=True)
class PlannedWeight:
    """A weight with its place.

    Attributes:
        weight: which rows of which tensor.
        tensor: the tensor in the file.
        layout: how it will lie.
        offset: byte offset in the arena.
        nbytes: bytes there.

    """

    weight: WeightRef
    tensor: TensorView = field(repr=False)
    layout: Layout
    offset: int
    nbytes: int

    @classmethod
    def of(cls, weight: WeightRef, tensor: TensorView, layout: Layout, offset: int) -> PlannedWeight:
        """A weight at `offset` in `layout`."""
        planned = cls(weight=weight, tensor=tensor, layout=layout, offset=offset, nbytes=0)
        return evolve(planned, nbytes=layout.nbytes(tensor.qtype, planned.rows, planned.columns))

    @property
    def columns(self) -> int:
        """Elements of a row; a vector is one row."""
        return self.weight.columns if len(self.weight.shape) > 1 else self.weight.rows

    @property
    def rows(self) -> int:
        """Rows used; a vector is one row."""
        return self.weight.rows if len(self.weight.shape) > 1 else 1

    def source(self) -> NDArray[np.uint8]:
        """The bytes in the file, shape (rows, bytes of a row); a view, but of a tensor that is made."""
        weight = self.weight
        if len(weight.shape) > 1:
            return self.source_rows(0, weight.rows)
        start, stop = (self.tensor.qtype.row_bytes(edge) for edge in (weight.row_start, weight.row_stop))
        return self.tensor.data[None, start:stop]

    def source_rows(self, start: int, stop: int) -> NDArray[np.uint8]:
        """`source` of rows [start, stop) of a matrix."""
        assert len(self.weight.shape) > 1, "a vector is one row"
        return self.tensor.row_bytes(self.weight.row_start + start, self.weight.row_start + stop)

    @property
    def source_bytes(self) -> int:
        """Bytes of `source`, which is not made to tell them."""
        return self.rows * self.tensor.qtype.row_bytes(self.columns)

    def read_rows(self, row: int, out: NDArray[np.uint8]) -> None:
        """Fill `out`, one dimension and whole rows, with what `source` has from `row` on.

        Raises:
            ModelFileError: when the file cannot be read any more.

        """
        weight = self.weight
        matrix = len(weight.shape) > 1
        columns, first = (weight.columns, weight.row_start + row) if matrix else (weight.row_start, 1)
        self.tensor.read_into(out, first * self.tensor.qtype.row_bytes(columns))


@frozen(eq=False, kw_only=True)
class WeightPlan:
    """All weights of a program with their places in one arena of `arena_bytes`."""

    model: ValidatedModel = field(repr=False)
    program: Program
    weights: tuple[PlannedWeight, ...] = field(repr=False)
    arena_bytes: int

    @property
    def file_bytes(self) -> int:
        """Bytes of the planned weights as stored in the file."""
        return sum(planned.source_bytes for planned in self.weights)

    @property
    def bytes_by_qtype(self) -> Mapping[str, int]:
        """Bytes in the file by type name, largest first."""
        counts: Counter[str] = Counter()
        for planned in self.weights:
            counts[planned.tensor.qtype.name] += planned.source_bytes
        return dict(counts.most_common())

    def without_bytes(self) -> WeightPlan:
        """The plan for looking at only: nothing in it refers to the file, see `TensorView.without_bytes`."""
        return evolve(
            self, weights=tuple(evolve(planned, tensor=planned.tensor.without_bytes()) for planned in self.weights)
        )


def plan_weights(
    model: ValidatedModel, program: Program, kernels: Iterable[Kernel], *, prefer: str = "fastest"
) -> WeightPlan:
    """Choose a layout for each weight and lay the weights out.

    Among the layouts that every operator reading a weight can use, `prefer` decides: ``fastest`` takes the first in
    the order of `kernels`, ``compact`` the one with the fewest bytes, a layout's name that one where it is offered.

    Raises:
        UnsupportedError: listing the weights that no layout serves, those of several layers in one line.

    """
    lacking: dict[str, list[str]] = {}
    weights: list[PlannedWeight] = []
    offset = 0
    offered: dict[tuple[str, str], list[Layout]] = {}
    for kernel in kernels:
        offered.setdefault((kernel.operator, kernel.qtype), []).append(kernel.layout)
    for weight, operators in _readers(program).items():
        tensor = model.tensor(weight)
        candidates = [offered.get((kind, tensor.qtype.name), []) for kind in operators]
        shared = [
            layout
            for layout in candidates[0]
            if all(layout.name in {other.name for other in others} for others in candidates[1:])
        ]
        if not shared:
            without = [kind for kind, layouts in zip(operators, candidates, strict=True) if not layouts] or operators
            reason = f"no kernel for {' and '.join(without)} with {tensor.qtype.name} weights"
            lacking.setdefault(reason, []).append(weight.tensor)
            continue
        planned = _place(weight, tensor, shared, prefer, offset)
        weights.append(planned)
        offset += -(-planned.nbytes // ALIGNMENT) * ALIGNMENT
    if lacking:
        reasons = [f"{name}: {reason}" for reason, names in lacking.items() for name in join_layers(names)]
        raise UnsupportedError("\n".join(reasons))
    return WeightPlan(model=model, program=program, weights=tuple(weights), arena_bytes=offset)


def _place(weight: WeightRef, tensor: TensorView, layouts: Sequence[Layout], prefer: str, offset: int) -> PlannedWeight:
    placed = [PlannedWeight.of(weight, tensor, layout, offset) for layout in layouts]
    if tensor.make is not None:  # there are no bytes in a file that could be used where they are
        placed = [planned for planned in placed if planned.nbytes] or placed
    if prefer == "compact":
        return min(placed, key=lambda planned: planned.nbytes)
    return next((planned for planned in placed if planned.layout.name == prefer), placed[0])


def _readers(program: Program) -> Mapping[WeightRef, list[str]]:
    readers: dict[WeightRef, list[str]] = {}
    for operator in program.operators:
        for weight in operator.weights:
            kinds = readers.setdefault(weight, [])
            if operator.kind not in kinds:
                kinds.append(operator.kind)
    return readers


@frozen(kw_only=True)
class FitReport:
    """Whether a run fits, in bytes.

    Attributes:
        device: where.
        context_length: tokens a sequence may hold.
        kv_tokens: tokens of KV cache counted: those of all sequences together.
        weight_bytes: resident weights.
        kv_bytes: KV cache for `kv_tokens` tokens.
        workspace_bytes: everything else that is allocated.
        available_bytes: what may be used.
        largest_context: the longest context that would fit, at most the model's own; 0 for none. Where `kv_tokens` do
            not fit, that is without more of them than the context has.
        largest_kv_tokens: the most tokens of KV cache that would fit with this context; 0 where not even one full
            sequence does.
        least_bytes: what a run with the context `least_context` would take, with no more KV cache than that.
        least_context: tokens of a page of KV cache, or of the context where that is shorter.

    """

    device: DeviceInfo
    context_length: int
    kv_tokens: int
    weight_bytes: int
    kv_bytes: int
    workspace_bytes: int
    available_bytes: int
    largest_context: int
    largest_kv_tokens: int
    least_bytes: int
    least_context: int

    @property
    def total_bytes(self) -> int:
        """All of it."""
        return self.weight_bytes + self.kv_bytes + self.workspace_bytes

    @property
    def fits(self) -> bool:
        """Whether it is there."""
        return self.total_bytes <= self.available_bytes

    def require(self) -> None:
        """Refuse a run that does not fit.

        Raises:
            DoesNotFitError: saying needed, there, and what to change.

        """
        if self.fits:
            return
        raise DoesNotFitError(
            f"{self.device.name}: needs {_gib(self.total_bytes)} (weights {_gib(self.weight_bytes)}, "
            f"KV cache for {counted(self.kv_tokens, 'token')} {_gib(self.kv_bytes)}, "
            f"workspace {_gib(self.workspace_bytes)}), {_gib(self.available_bytes)} may be used; {self.advice}"
        )

    @property
    def advice(self) -> str:
        """What to change where it does not fit, in a few words; empty where it fits."""
        if self.fits:
            return ""
        if self.largest_kv_tokens:
            return f"a KV cache of {counted(self.largest_kv_tokens, 'token')} would fit (executor.kv_tokens)"
        if self.largest_context:
            return f"a context of {counted(self.largest_context, 'token')} would fit (executor.context)"
        if self.least_bytes <= self.device.free_bytes:  # only the limit is in the way
            whole, least = (-(-count >> 20) for count in (self.total_bytes, self.least_bytes))
            shortest = f"{least} with a context of {counted(self.least_context, 'token')} (executor.context)"
            if self.total_bytes > self.device.free_bytes:
                return f"limits.memory_mib would have to be {shortest}"
            return f"limits.memory_mib would have to be {whole}" + (f", or {shortest}" if least < whole else "")
        if self.weight_bytes > self.available_bytes:
            return "its weights alone do not fit: take a smaller model or a smaller quantisation"
        return "no context fits beside its weights: take a smaller model or a smaller quantisation"


_MOST_KV_TOKENS = 1 << 40
"""More than anything has room for."""
_LEAST_CONTEXT = 64
"""A page of the KV cache (`kv_pages`): a shorter context would not take less."""


def fit_report(
    plan: WeightPlan,
    device: DeviceInfo,
    context_length: int,
    *,
    kv_tokens: int = 0,
    kv_bytes: Callable[[int], int],
    workspace_bytes: Callable[[int], int],
    available_bytes: int | None = None,
) -> FitReport:
    """What a run of `context_length` tokens needs.

    Args:
        plan: the weights.
        device: where.
        context_length: tokens a sequence may hold.
        kv_tokens: tokens of all sequences together, where these are more.
        kv_bytes: bytes of a KV cache for so many tokens.
        workspace_bytes: bytes of everything else for such a context.
        available_bytes: a limit below what the device has free.

    """
    available = device.free_bytes if available_bytes is None else min(available_bytes, device.free_bytes)
    workspace_bytes = cache(workspace_bytes)  # a context is asked for as often as numbers of KV tokens are tried

    def total(context: int, kv_tokens: int = 0) -> int:
        return plan.arena_bytes + kv_bytes(max(context, kv_tokens)) + workspace_bytes(context)

    kv_tokens = max(context_length, kv_tokens)
    least_context = min(context_length, _LEAST_CONTEXT)
    pooled = _largest(lambda tokens: total(context_length, tokens) <= available, _MOST_KV_TOKENS)
    beside = kv_tokens if pooled >= kv_tokens else 0
    return FitReport(
        device=device,
        context_length=context_length,
        kv_tokens=kv_tokens,
        weight_bytes=plan.arena_bytes,
        kv_bytes=kv_bytes(kv_tokens),
        workspace_bytes=workspace_bytes(context_length),
        available_bytes=available,
        largest_context=_largest(lambda context: total(context, beside) <= available, plan.program.context_length),
        largest_kv_tokens=pooled if pooled >= context_length else 0,
        least_bytes=total(least_context),
        least_context=least_context,
    )


def _largest(fits: Callable[[int], bool], limit: int) -> int:
    """The largest n in 0 … limit with fits(n), fits being true up to some n and false after it; 0 when never."""
    low, high = 0, limit
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low


def _gib(count: int) -> str:
    return f"{count / 2**30:.2f} GiB" if count >= 2**30 else f"{count / 2**20:.1f} MiB"
