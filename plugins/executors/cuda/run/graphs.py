"""Steps captured as graphs: one launch for all their kernels, at any position and for any sequences."""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable, Sequence

from attrs import define, field

from mortice.core.plugin.events import GraphCaptured
from mortice.core.plugin.interfaces import Emit
from mortice.plugins.executors.cuda.device.stream import GraphExec, Stream
from mortice.plugins.executors.cuda.lowering.launches import Queued

__all__ = ["StepGraphs"]


@define(eq=False)
class StepGraphs:
    """Graphs by what they are of, each captured when first wanted.

    Attributes:
        stream: what they run on.
        emit: told of each capture.

    """

    stream: Stream
    emit: Emit
    _captured: dict[Hashable, tuple[GraphExec, Sequence[Queued]]] = field(factory=dict, init=False, repr=False)
    """With the launches, which own the arguments that the graph points to."""

    def get(self, key: Hashable, launches: Callable[[], Sequence[Queued]]) -> GraphExec:
        """The graph of a key; `launches` gives what it consists of, where it is to be captured."""
        captured = self._captured.get(key)
        if captured is None:
            started = time.perf_counter()
            queued = launches()
            with self.stream.capture() as graph:
                for launch in queued:
                    launch(self.stream)
            captured = self._captured[key] = graph.instantiate(), queued
            self.emit(GraphCaptured(nodes=graph.node_count, seconds=time.perf_counter() - started))
            graph.close()
        return captured[0]

    def clear(self) -> None:
        """Forget all of them; what is wanted again is captured again."""
        if self._captured:
            self.stream.synchronize()
            for graph, _ in self._captured.values():
                graph.close()
            self._captured.clear()
