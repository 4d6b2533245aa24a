"""Some threads that share a queue of jobs; the calling thread hears of each job done."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from queue import SimpleQueue
from threading import Lock, Thread
from typing import Generic, TypeVar

from attrs import define, field, frozen

__all__ = ["cores", "run_crew"]

Job = TypeVar("Job")
Done = TypeVar("Done")


@define(eq=False)
class _Shared(Generic[Job]):
    """One iterator for several threads, which ends when it is stopped."""

    _jobs: Iterator[Job]
    _stopped: bool = field(default=False, init=False)
    _lock: Lock = field(factory=Lock, init=False)

    def __iter__(self) -> Iterator[Job]:
        return self

    def __next__(self) -> Job:
        with self._lock:
            if self._stopped:
                raise StopIteration
            return next(self._jobs)

    def stop(self) -> None:
        self._stopped = True


@frozen(eq=False)
class _Ended:
    error: BaseException | None


def run_crew(
    work: Callable[[Iterator[Job]], Iterator[Done]],
    jobs: Iterable[Job],
    *,
    threads: int,
    name: str,
    done: Callable[[Done], None],
    started: Callable[[], None] | None = None,
    stop: Callable[[], None] | None = None,
) -> None:
    """Run `work` on each of `threads` threads until the jobs are used up.

    The first exception, in a thread, in `done` or an interrupt, ends all after the job each has in hand, and passes on.
    No thread works when this returns or raises.

    Args:
        work: takes jobs from the iterator it is given, which the threads share, and yields what to report.
        jobs: gone through by the threads, one at a time.
        threads: how many.
        name: theirs, with a number.
        done: called on the calling thread.
        started: called on the calling thread when all threads run.
        stop: called when no more jobs are given out, to let threads go that wait for something else.

    """
    shared = _Shared(iter(jobs))
    reports: SimpleQueue[Done | _Ended] = SimpleQueue()

    def body() -> None:
        error: BaseException | None = None
        try:
            for report in work(shared):
                reports.put(report)
        except BaseException as caught:  # noqa: BLE001 (raised again by the caller)
            error = caught
        reports.put(_Ended(error))

    crew = [Thread(target=body, name=f"{name}-{number}") for number in range(threads)]
    try:
        for thread in crew:
            thread.start()
        if started is not None:
            started()
        running = threads
        while running:
            report = reports.get()
            if not isinstance(report, _Ended):
                done(report)
                continue
            running -= 1
            if report.error is not None:
                raise report.error
    finally:
        shared.stop()
        if stop is not None:
            stop()
        _join(crew)


def _join(crew: list[Thread]) -> None:
    """Wait for the threads, through interrupts too: what they use is freed afterwards.

    One that an interrupt caught while it was starting is not alive yet, and will find the jobs stopped.
    """
    interrupt: KeyboardInterrupt | None = None
    for thread in crew:
        while thread.is_alive():
            try:
                thread.join()
            except KeyboardInterrupt as caught:
                interrupt = caught
    if interrupt is not None:
        raise interrupt


def cores() -> int:
    """Cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
