"""What a runtime keeps on the card besides the weights: how much it will be, and where it is."""

from __future__ import annotations

from typing import Any

import numpy as np
from attrs import define, field

from mortice.core.model import operators as op
from mortice.core.model.operators import Buffer
from mortice.core.model.program import Program
from mortice.core.model.residency import BoundModel
from mortice.core.model.rope import rope_frequencies
from mortice.core.plugin.interfaces import RuntimeSettings
from mortice.core.plugin.kv_pages import page_count
from mortice.plugins.executors.cuda.device.device import Device
from mortice.plugins.executors.cuda.device.memory import HostBuffer
from mortice.plugins.executors.cuda.device.stream import Stream
from mortice.plugins.executors.cuda.lowering.choice_args import choice_bytes
from mortice.plugins.executors.cuda.lowering.crossovers import gemm_thresholds
from mortice.plugins.executors.cuda.lowering.launches import MAX_SEQUENCES, Addresses, rope_key
from mortice.plugins.executors.cuda.lowering.lowering import Lowering
from mortice.plugins.executors.cuda.lowering.matmul import rows_at_once
from mortice.plugins.executors.cuda.lowering.placing import LOGIT_ROWS, matmul_bytes, place_program, scratch_bytes
from mortice.plugins.executors.cuda.run.kv_pool import kv_pool_bytes, page_bytes
from mortice.plugins.executors.cuda.run.rows import RowTable

__all__ = ["CODE_BYTES", "CUBLAS_BYTES", "RuntimeMemory", "runtime_bytes"]

CODE_BYTES = 8 << 20
"""What the driver takes for the code of a runtime: 5 to 16 MB for 45 to 55 sources (H100, CUDA 13.0)."""
CUBLAS_BYTES = 64 << 20
"""What cuBLAS takes for itself at its first product, beside the memory lent to it (the same card)."""


def runtime_bytes(program: Program, settings: RuntimeSettings, sm_count: int, *, cublas: bool) -> int:
    """Bytes a runtime takes of the device besides weights and KV cache, with or without `cublas`."""
    exact = settings.activations == "f32"
    most = rows_at_once(settings.step_tokens, exact=exact, cublas=cublas)
    _, workspace = place_program(program, most)
    rows = RowTable.nbytes(most, MAX_SEQUENCES, page_count(settings.context_length))
    ropes = {rope_key(o): 8 * (o.dims // 2) for o in program.operators if isinstance(o, op.Rope)}
    choice = choice_bytes(program.vocab_size, settings.context_length, sm_count)
    scratch = sum(scratch_bytes(program, sm_count, most))
    gemm_from = gemm_thresholds(settings)
    scratch += matmul_bytes(program, sm_count, most, exact=exact, cublas=cublas, gemm_from=gemm_from)
    driver = CODE_BYTES
    if cublas and not exact and most >= min(gemm_from):
        driver += CUBLAS_BYTES
    return workspace.nbytes + scratch + rows + sum(ropes.values()) + choice + driver


@define(eq=False)
class RuntimeMemory:
    """The workspace, the KV cache, the step's rows and the tables of a runtime; allocated once, freed by `close`.

    Attributes:
        device: where.
        stream: what fills the tables.
        lowering: what runs there.
        model: the weights.
        settings: for the context and the tokens of the KV cache.
        rows: what a step says of its tokens.
        logits: pinned memory for `LOGIT_ROWS` rows of logits.
        addresses: where everything is.

    """

    device: Device
    stream: Stream
    lowering: Lowering
    model: BoundModel
    settings: RuntimeSettings
    rows: RowTable = field(init=False)
    logits: HostBuffer = field(init=False)
    addresses: Addresses = field(init=False, repr=False)
    _owned: list[Any] = field(factory=list, init=False, repr=False)

    def __attrs_post_init__(self) -> None:
        try:
            self._allocate()
        except BaseException:
            self.close()
            raise

    def _allocate(self) -> None:
        device, lowering, program = self.device, self.lowering, self.lowering.plan.program
        pages = page_count(self.settings.context_length)
        self.rows = self._own(RowTable(device, lowering.rows, MAX_SEQUENCES, pages))
        self.logits = self._own(device.allocate_host(4 * LOGIT_ROWS * program.vocab_size))
        workspace = self._own(device.allocate(lowering.workspace.nbytes))
        partial, arrivals = (
            self._own(device.allocate(nbytes)) for nbytes in scratch_bytes(program, lowering.sm_count, lowering.rows)
        )
        self.stream.fill(arrivals.address, 0, arrivals.nbytes)
        matmul = self._own(device.allocate(lowering.scratch.nbytes))
        keys, values = self._caches()
        self.addresses = Addresses(
            weights={
                planned.weight: self.model.resident.address(i) for i, planned in enumerate(self.model.plan.weights)
            },
            workspace=workspace.address,
            matmul=matmul.address,
            keys=keys,
            values=values,
            rows=self.rows.structure(),
            selected=self.rows.selected,
            partial=partial.address,
            arrivals=arrivals.address,
            frequencies=self._frequencies(),
        )

    def _own(self, memory: Any) -> Any:
        self._owned.append(memory)
        return memory

    def _caches(self) -> tuple[list[int], list[int]]:
        """Where each layer's pages of K and of V start: one block of memory, layer after layer."""
        shapes, kv_type, tokens = self.lowering.plan.program.kv, self.lowering.kv_type, self.settings.cache_tokens
        at = self._own(self.device.allocate(kv_pool_bytes(shapes, tokens, kv_type))).address
        keys, values = [], []
        for shape in shapes:
            half = page_count(tokens) * page_bytes(shape, kv_type)
            keys.append(at)
            values.append(at + half)
            at += 2 * half
        return keys, values

    def copy_page(self, source: int, destination: int) -> None:
        """Queue a copy of K and V of all layers from one page to another."""
        at = self.addresses
        for shape, keys, values in zip(self.lowering.plan.program.kv, at.keys, at.values, strict=True):
            size = page_bytes(shape, self.lowering.kv_type)
            for start in (keys, values):
                self.stream.copy(start + destination * size, start + source * size, size)

    def _frequencies(self) -> dict[object, tuple[int, float]]:
        """RoPE's tables, one for each distinct set of constants."""
        tables: dict[object, tuple[int, float]] = {}
        planned = {item.weight: item for item in self.model.plan.weights}
        for operator in self.model.plan.program.operators:
            if isinstance(operator, op.Rope) and rope_key(operator) not in tables:
                factors = None
                chosen = operator.factors_for(self.settings.context_length)
                if chosen is not None:
                    factors = np.ascontiguousarray(planned[chosen].source()).view("<f4").reshape(-1)
                frequencies, magnitude = rope_frequencies(operator, factors)
                memory = self._own(self.device.allocate(frequencies.nbytes))
                self.stream.write(memory.address, frequencies)
                tables[rope_key(operator)] = memory.address, magnitude
        return tables

    def address(self, buffer: Buffer) -> int:
        """Where a buffer of the program lies."""
        return self.addresses.workspace + self.lowering.workspace.offsets[buffer]

    def close(self) -> None:
        """Give all of it back; the stream has to be idle."""
        for memory in self._owned:
            memory.close()
        self._owned.clear()
