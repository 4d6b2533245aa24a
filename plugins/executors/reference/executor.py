"""The reference executor: NumPy on the CPU, float32 throughout."""

from __future__ import annotations

import os
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from attrs import define, field
from numpy.typing import NDArray

from mortice.core.errors import DoesNotFitError
from mortice.core.model.kv_types import kv_type_reasons
from mortice.core.model.operators import OPERATOR_KINDS, Attention, Buffer, SelectRows
from mortice.core.model.program import Program
from mortice.core.model.residency import BoundModel
from mortice.core.model.types import DeviceInfo
from mortice.core.model.weight_plan import ALIGNMENT, Kernel
from mortice.core.plugin.interfaces import Emit, QuantizationType, RuntimeSettings
from mortice.core.plugin.kv_pages import PAGE_TOKENS, page_count
from mortice.plugins.executors.reference.layouts import ExpandedLayout, FileLayout

if TYPE_CHECKING:  # what only a run on the CPU needs
    from mortice.plugins.executors.reference.runtime import ReferenceRuntime

__all__ = ["HostArena", "ReferenceExecutor"]

_WITH_WEIGHTS = ("linear", "embed", "embed_positions", "norm", "add_bias", "rope")


@define(eq=False)
class HostArena:
    """Zeroed pages of host memory, taken from the system as they are touched."""

    nbytes: int
    kind: str = "cpu"
    _data: NDArray[np.uint8] | None = field(init=False, repr=False)

    def __attrs_post_init__(self) -> None:
        try:
            pages = np.zeros(self.nbytes + ALIGNMENT, np.uint8)
        except MemoryError:
            raise DoesNotFitError(f"cpu: {self.nbytes} bytes for weights could not be allocated") from None
        start = -pages.ctypes.data % ALIGNMENT
        self._data = pages[start : start + self.nbytes]

    @property
    def address(self) -> int:
        view = self.host_view()
        return int(view.ctypes.data)

    def host_view(self) -> NDArray[np.uint8]:
        assert self._data is not None, "the arena was closed"
        return self._data

    def write(self, offset: int, data: NDArray[np.uint8]) -> None:
        self.host_view()[offset : offset + len(data)] = data

    def close(self) -> None:
        self._data = None


@define(eq=False)
class ReferenceExecutor:
    """Interprets programs in float32; the oracle, and what runs where there is no GPU."""

    name: str = "reference"

    def device(self) -> DeviceInfo:
        total, free = _memory()
        name = f"CPU ({os.cpu_count()} cores, {platform.machine()})"
        return DeviceInfo(kind="cpu", name=name, total_bytes=total, free_bytes=free)

    def kernels(
        self,
        device: DeviceInfo,  # noqa: ARG002 (as `Executor` has it; every CPU is served alike)
        qtypes: Sequence[QuantizationType],
    ) -> Sequence[Kernel]:
        layouts = [layout for type_ in qtypes for layout in (ExpandedLayout(type_), FileLayout(type_))]
        return [
            Kernel(operator=operator, qtype=layout.type.qtype.name, layout=layout)
            for layout in layouts
            for operator in _WITH_WEIGHTS
        ]

    def unsupported(self, program: Program, settings: RuntimeSettings) -> Sequence[str]:
        from mortice.plugins.executors.reference.runtime import kv_type_of

        reasons = [
            f"{operator.name}: no operator {operator.kind!r}"
            for operator in program.operators
            if operator.kind not in OPERATOR_KINDS
        ]
        if settings.activations not in ("auto", "f32"):
            reasons.append(f"executor.activations = {settings.activations!r}: the reference executor has auto or f32")
        return [*reasons, *kv_type_reasons(program.kv, kv_type_of(settings), self.name)]

    def kv_bytes(self, program: Program, settings: RuntimeSettings) -> int:
        """Four bytes an element, whatever the type: what a smaller one would hold is kept as float32."""
        return 4 * PAGE_TOKENS * page_count(settings.cache_tokens) * sum(shape.elements for shape in program.kv)

    def workspace_bytes(self, program: Program, settings: RuntimeSettings) -> int:
        """What one step of ``step_tokens`` tokens with one row of logits holds at its widest moment.

        Asking for the logits of every token takes four bytes more for each of them and each vocabulary entry.
        """
        from mortice.plugins.executors.reference.ops import SCORE_ELEMENTS

        rows = min(settings.step_tokens, settings.context_length)
        attentions = [operator for operator in program.operators if isinstance(operator, Attention)]
        heads = max(attention.num_heads for attention in attentions)
        scores = 4 * min(SCORE_ELEMENTS, heads * rows * settings.context_length)
        # a soft cap copies the scores; their mask has a byte for each row and token
        scores += scores * any(attention.softcap for attention in attentions) + scores // (4 * heads)
        # attention and the expansion of a weight read from the file are not at work together
        return _widest_moment(program, rows) + max(scores, FileLayout.PASSING_BYTES)

    def allocate(self, nbytes: int) -> HostArena:
        return HostArena(nbytes)

    def default_upload(self) -> str:
        return "host"

    def open(self, model: BoundModel, settings: RuntimeSettings, emit: Emit) -> ReferenceRuntime:
        from mortice.plugins.executors.reference.runtime import ReferenceRuntime

        return ReferenceRuntime(model, settings, emit)


def _widest_moment(program: Program, rows: int) -> int:
    """Bytes of the buffers alive together, and of one operator's intermediates, where these are most."""
    last_uses = program.last_uses()
    alive: dict[Buffer, int] = {}
    most = 0
    for place, operator in enumerate(program.operators):
        if isinstance(operator, SelectRows):
            rows = 1
        alive.update((buffer, 4 * rows * buffer.width) for buffer in operator.outputs)
        # no operator makes more than two arrays as wide as its widest output besides it (LayerNorm, GELU in float64)
        passing = 2 * 4 * rows * max((buffer.width for buffer in operator.outputs), default=0)
        most = max(most, sum(alive.values()) + passing)
        alive = {buffer: count for buffer, count in alive.items() if last_uses[buffer] > place}
    return most


def _memory() -> tuple[int, int]:
    """Total and available bytes of memory, the limit of the control group counted in where there is one."""
    page, pages = os.sysconf("SC_PAGE_SIZE"), os.sysconf("SC_PHYS_PAGES")
    total = page * pages
    free = page * os.sysconf("SC_AVPHYS_PAGES")
    meminfo = Path("/proc/meminfo")
    if meminfo.exists():  # MemAvailable counts what the page cache would give back
        for line in meminfo.read_text(encoding="ascii").splitlines():
            if line.startswith("MemAvailable:"):
                free = int(line.split()[1]) * 1024
    limit, used = Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")
    if limit.exists() and used.exists() and (text := limit.read_text(encoding="ascii").strip()) != "max":
        total = min(total, int(text))
        free = min(free, max(0, int(text) - int(used.read_text(encoding="ascii"))))
    return total, free
