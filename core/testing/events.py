"""Remembers events, to be looked at afterwards."""

from __future__ import annotations

from collections.abc import Iterator
from threading import Thread, current_thread
from typing import TypeVar

from attrs import define, field

from mortice.core.plugin.events import Event

__all__ = ["EventRecorder"]

E = TypeVar("E", bound=Event)


@define(eq=False)
class EventRecorder:
    """An observer: what a strategy or executor is given as ``emit``, or what a registry has among its observers.

    Attributes:
        events: in the order they were told.
        threads: those that told them.

    """

    events: list[Event] = field(factory=list)
    threads: set[Thread] = field(factory=set)

    def __call__(self, event: Event) -> None:
        self.events.append(event)
        self.threads.add(current_thread())

    def of(self, kind: type[E]) -> list[E]:
        """The events of a kind."""
        return [event for event in self.events if isinstance(event, kind)]

    def __iter__(self) -> Iterator[Event]:
        return iter(self.events)
