"""How many bytes a decode step has to move, from the program and the plan."""

from __future__ import annotations

from attrs import evolve, frozen

from mortice.core.model.operators import Attention, Embed, EmbedPositions, Operator, Rope
from mortice.core.model.program import Program
from mortice.core.model.weight_plan import PlannedWeight, WeightPlan
from mortice.core.plugin.interfaces import Executor, RuntimeSettings

__all__ = ["Traffic", "decode_traffic"]

_MANY_TOKENS = 4096
"""KV bytes of a token are those of so many, divided: executors keep tokens in pages."""


@frozen(kw_only=True)
class Traffic:
    """Bytes of one decode step.

    Attributes:
        weight_bytes: all weights that are read, as they lie on the device: whole matrices, norms and biases, and one
            row of the embedding.
        kv_token_bytes: K and V of one token in each layer.
        windows: tokens each layer sees at most; 0 for all.

    """

    weight_bytes: int
    kv_token_bytes: tuple[float, ...]
    windows: tuple[int, ...]

    def bytes_at(self, length: int) -> float:
        """Weights, `length` tokens read from the KV cache, and one written to it."""
        read = sum(
            each * (min(length, window) if window else length)
            for each, window in zip(self.kv_token_bytes, self.windows, strict=True)
        )
        return self.weight_bytes + read + sum(self.kv_token_bytes)

    def mean_bytes(self, first: int, count: int, sequences: int = 1) -> float:
        """Bytes of a token, the mean of `count` steps, the first of which sees `first` tokens, its own included.

        Of several sequences, all as long, each step reads the weights once.
        """
        mean = sum(self.bytes_at(length) for length in range(first, first + count)) / count
        return mean - self.weight_bytes + self.weight_bytes / sequences


def decode_traffic(plan: WeightPlan, executor: Executor, settings: RuntimeSettings) -> Traffic:
    """The traffic of a planned model on an executor."""
    program = plan.program
    planned = {item.weight: item for item in plan.weights}
    weight_bytes = sum(
        _read_bytes(operator, planned[weight]) for operator in program.operators for weight in operator.weights
    )
    windows = tuple(operator.window for operator in program.operators if isinstance(operator, Attention))
    return Traffic(
        weight_bytes=weight_bytes, kv_token_bytes=_kv_token_bytes(program, executor, settings), windows=windows
    )


def _read_bytes(operator: Operator, planned: PlannedWeight) -> int:
    if isinstance(operator, Rope):
        return 0  # its factors go into a table when the runtime is opened
    nbytes = planned.nbytes or planned.source_bytes  # a layout that takes no memory reads the file
    return nbytes // planned.rows if isinstance(operator, Embed | EmbedPositions) else nbytes


def _kv_token_bytes(program: Program, executor: Executor, settings: RuntimeSettings) -> tuple[float, ...]:
    total = executor.kv_bytes(program, evolve(settings, context_length=_MANY_TOKENS, kv_tokens=0)) / _MANY_TOKENS
    elements = sum(shape.elements for shape in program.kv)
    return tuple(total * shape.elements / elements for shape in program.kv)
