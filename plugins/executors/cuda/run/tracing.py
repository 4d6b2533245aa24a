"""Steps run launch by launch, with the kernels of ordinary steps but no graph: what each takes, what each writes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import closing
from typing import Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from mortice.core.errors import InputError
from mortice.core.model.operators import Buffer
from mortice.core.plugin.interfaces import StepPart
from mortice.plugins.executors.cuda.device.device import Device
from mortice.plugins.executors.cuda.device.stream import Stream
from mortice.plugins.executors.cuda.lowering.launches import Queued, Spec
from mortice.plugins.executors.cuda.lowering.lowering import Lowering
from mortice.plugins.executors.cuda.lowering.placing import LOGIT_ROWS
from mortice.plugins.executors.cuda.run.rows import Row, RowTable, one_row_each

__all__ = ["Part", "TracedSteps", "profile", "trace"]

Part = Literal["body", "head"]
"""The launches for every row, or those for the rows whose logits are wanted."""


class TracedSteps(Protocol):
    """What the runtime does for this module."""

    device: Device
    lowering: Lowering
    stream: Stream

    @property
    def rows(self) -> RowTable:
        """What the current step says of its tokens."""
        ...

    def begin(self, parts: Sequence[StepPart]) -> list[Row]:
        """Check a step and give its sequences their pages."""
        ...

    def end(self, parts: Sequence[StepPart]) -> None:
        """Count the tokens of a step that was queued."""
        ...

    def launches(self, part: Part, rows: int, *, alone: bool = False) -> list[tuple[Spec, Queued]]:
        """What a step of that many rows queues; `alone` where each is the only one of its sequence."""
        ...

    def read_buffer(self, buffer: Buffer, rows: int) -> NDArray[np.float32]:
        """The first rows of a buffer, as they are now."""
        ...


def profile(runtime: TracedSteps, parts: Sequence[StepPart]) -> list[tuple[str, float]]:
    """Run a step launch by launch; what each was and the seconds it took. Gaps between launches are not counted.

    Of more tokens than a step takes at once, the first are timed.
    """
    rows = runtime.begin(parts)[: runtime.lowering.rows]
    wanted = runtime.rows.send(rows, runtime.stream)[:LOGIT_ROWS]
    times, each_alone = [], one_row_each(rows)
    sizes: tuple[tuple[Part, int], ...] = (("body", len(rows)), ("head", len(wanted)))
    before, after = (runtime.device.new_event(timing=True) for _ in range(2))
    with closing(before), closing(after):
        for part, count in sizes:
            for spec, launch in runtime.launches(part, count, alone=each_alone) if count else ():
                runtime.stream.synchronize()
                before.record(runtime.stream)
                launch(runtime.stream)
                after.record(runtime.stream)
                after.synchronize()
                times.append((spec.label, after.milliseconds_since(before) / 1000))
    runtime.end(parts)
    return times


def trace(
    runtime: TracedSteps, parts: Sequence[StepPart], see: Callable[[Buffer, NDArray[np.float32]], None]
) -> NDArray[np.float32]:
    """Run a step launch by launch and show what each launch wrote; the logits that were asked for.

    Raises:
        InputError: more tokens than a step takes at once.

    """
    tokens = sum(len(part.token_ids) for part in parts)
    if tokens > runtime.lowering.rows:
        raise InputError(
            f"found {tokens} tokens to trace, wanted at most {runtime.lowering.rows} (executor.step_tokens)"
        )
    rows = runtime.begin(parts)
    wanted = runtime.rows.send(rows, runtime.stream)
    _trace_part(runtime, "body", len(rows), see, each_alone=one_row_each(rows))
    pieces: dict[Buffer, list[NDArray[np.float32]]] = {}
    for start in range(0, len(wanted), LOGIT_ROWS):
        chosen = wanted[start : start + LOGIT_ROWS]
        if start:
            runtime.rows.select(chosen, runtime.stream)
        _trace_part(runtime, "head", len(chosen), lambda buffer, value: pieces.setdefault(buffer, []).append(value))
    for buffer, values in pieces.items():
        see(buffer, np.concatenate(values))
    runtime.end(parts)
    logits = runtime.lowering.plan.program.logits
    return np.concatenate(pieces[logits]) if pieces else np.empty((0, logits.width), np.float32)


def _trace_part(
    runtime: TracedSteps,
    part: Part,
    rows: int,
    see: Callable[[Buffer, NDArray[np.float32]], None],
    *,
    each_alone: bool = False,
) -> None:
    for spec, launch in runtime.launches(part, rows, alone=each_alone):
        launch(runtime.stream)
        for buffer in spec.outputs:  # now: a later launch may use their memory for something else
            see(buffer, runtime.read_buffer(buffer, rows))
