"""How `measured` chooses, with ways whose speed is set by a clock of our own."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import pytest
from attrs import define, field

from mortice.core.errors import DeviceError, DoesNotFitError, UnsupportedError
from mortice.core.model.residency import Intake, RawRows, ResidentWeights, batches
from mortice.core.model.weight_plan import WeightPlan
from mortice.core.plugin.events import UploadProgress
from mortice.plugins.uploads.device.measured import MeasuredWay
from mortice.plugins.uploads.device.strategy import Arrived, upload_by
from tests.plugins.uploads.fakes import FakeArena, open_model, plan_for_cuda, resident_of, stored_by_the_host

TRIAL = 128 * 1024


@pytest.fixture(scope="module")
def plan(tmp_path_factory: pytest.TempPathFactory) -> Iterator[WeightPlan]:
    with open_model(tmp_path_factory.mktemp("uploads")) as opened:
        yield plan_for_cuda(opened)


@define(eq=False)
class Clock:
    now: float = 0.0

    def __call__(self) -> float:
        return self.now


@define(eq=False)
class ScriptedWay:
    """Sends at `rate` bytes per second of `clock`, after `startup` seconds; or raises `error`."""

    name: str
    clock: Clock
    rate: float = 1.0
    startup: float = 0.0
    error: Exception | None = None
    moved: int = field(default=0, init=False)

    def move(self, resident: ResidentWeights, intake: Intake, rows: Sequence[RawRows], arrived: Arrived) -> None:
        del resident
        if self.error is not None:
            raise self.error
        self.clock.now += self.startup
        for batch in batches(rows, intake):
            intake.send(batch).wait()
            nbytes = sum(part.data.nbytes for part in batch)
            self.clock.now += nbytes / self.rate
            self.moved += nbytes
            arrived(batch)


def uploaded(plan: WeightPlan, *ways: ScriptedWay) -> list[str]:
    """Upload by the fastest of `ways`; which of them were gone. 10 bytes per second are good enough."""
    resident = resident_of(plan, capacity=16 * 1024)
    told: list[int] = []
    way = MeasuredWay(ways, trial_bytes=TRIAL, good_enough=10.0, clock=ways[0].clock)
    upload_by(way, resident, lambda event: told.append(event.done_bytes if isinstance(event, UploadProgress) else -1))
    arena = resident.arena
    assert isinstance(arena, FakeArena)
    assert np.array_equal(arena.memory, stored_by_the_host(plan))
    assert told[-1] == plan.file_bytes
    return [way.name for way in ways if way.moved]


def test_a_first_way_that_is_good_enough_is_gone_to_the_end(plan: WeightPlan) -> None:
    clock = Clock()
    assert uploaded(plan, ScriptedWay("a", clock, 11.0), ScriptedWay("b", clock, 1000.0)) == ["a"]


def test_what_a_way_takes_to_begin_is_not_held_against_it(plan: WeightPlan) -> None:
    clock = Clock()
    assert uploaded(plan, ScriptedWay("a", clock, 11.0, startup=1e9), ScriptedWay("b", clock, 1000.0)) == ["a"]


def test_a_slow_first_way_makes_room_for_a_faster_one(plan: WeightPlan) -> None:
    clock = Clock()
    ways = [ScriptedWay("a", clock, 2.0), ScriptedWay("b", clock, 5.0), ScriptedWay("c", clock, 3.0)]
    assert uploaded(plan, *ways) == ["a", "b", "c"]
    assert ways[0].moved < 2 * TRIAL
    assert ways[2].moved < 2 * TRIAL
    assert ways[1].moved > 3 * TRIAL


def test_after_slower_ways_the_first_goes_on(plan: WeightPlan) -> None:
    clock = Clock()
    ways = [ScriptedWay("a", clock, 5.0), ScriptedWay("b", clock, 2.0)]
    assert uploaded(plan, *ways) == ["a", "b"]
    assert ways[1].moved < 2 * TRIAL


def test_a_way_that_cannot_be_gone_is_passed_over(plan: WeightPlan) -> None:
    clock = Clock()
    refused = ScriptedWay("a", clock, error=DoesNotFitError("no pinned memory"))
    assert uploaded(plan, refused, ScriptedWay("b", clock, 1.0)) == ["b"]


def test_when_no_way_can_be_gone_each_says_why(plan: WeightPlan) -> None:
    clock = Clock()
    refusals = [
        ScriptedWay("a", clock, error=DoesNotFitError("no pinned memory")),
        ScriptedWay("b", clock, error=UnsupportedError("no pages")),
    ]
    with pytest.raises(UnsupportedError, match=r"^no pinned memory\nno pages$"):
        uploaded(plan, *refusals)


def test_a_broken_device_is_not_a_reason_to_try_another_way(plan: WeightPlan) -> None:
    clock = Clock()
    other = ScriptedWay("b", clock)
    with pytest.raises(DeviceError, match=r"^fell off the bus$"):
        uploaded(plan, ScriptedWay("a", clock, error=DeviceError("fell off the bus")), other)
    assert not other.moved


def test_a_small_model_is_not_worth_a_trial(plan: WeightPlan) -> None:
    clock = Clock()
    ways = [ScriptedWay("a", clock, 1.0), ScriptedWay("b", clock, 1000.0)]
    resident = resident_of(plan)
    upload_by(MeasuredWay(ways, trial_bytes=plan.file_bytes // 3, clock=clock), resident, lambda event: None)
    assert not ways[1].moved
