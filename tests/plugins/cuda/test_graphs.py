"""When steps are captured, and how long a captured one lives."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, cast

import pytest
from attrs import define, field

from mortice.core.plugin.events import Event, GraphCaptured
from mortice.plugins.executors.cuda.run.graphs import StepGraphs


@define(eq=False)
class Pretence:
    """A stream, and the graphs captured on it."""

    calls: list[str] = field(factory=list)
    node_count: int = 3

    @contextmanager
    def capture(self) -> Iterator[Pretence]:
        self.calls.append("begin")
        yield self
        self.calls.append("end")

    def instantiate(self) -> Pretence:
        return Pretence(self.calls)

    def synchronize(self) -> None:
        self.calls.append("synchronize")

    def close(self) -> None:
        self.calls.append("close")

    def launches(self) -> list[Callable[[Any], None]]:
        """Made before the capture: what makes them may allocate, which a capture forbids."""
        self.calls.append("prepare")
        return [lambda _: self.calls.append("first"), lambda _: self.calls.append("second")]


@pytest.fixture
def stream() -> Pretence:
    return Pretence()


def test_a_step_is_captured_when_first_wanted_and_kept(stream: Pretence) -> None:
    events: list[Event] = []
    graphs = StepGraphs(cast(Any, stream), events.append)
    first = graphs.get((4, "choose"), stream.launches)
    assert stream.calls == ["prepare", "begin", "first", "second", "end", "close"]
    assert graphs.get((4, "choose"), stream.launches) is first
    assert [event.nodes for event in events if isinstance(event, GraphCaptured)] == [3]
    assert graphs.get((5, "choose"), stream.launches) is not first


def test_graphs_that_were_cleared_are_captured_again(stream: Pretence) -> None:
    graphs = StepGraphs(cast(Any, stream), lambda _: None)
    first = graphs.get(1, stream.launches)
    graphs.get(2, stream.launches)
    del stream.calls[:]
    graphs.clear()
    assert stream.calls == ["synchronize", "close", "close"], "none is closed while it runs"
    assert graphs.get(1, stream.launches) is not first


def test_clearing_nothing_waits_for_nothing(stream: Pretence) -> None:
    StepGraphs(cast(Any, stream), lambda _: None).clear()
    assert stream.calls == []
