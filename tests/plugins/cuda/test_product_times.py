"""Which launches a product is timed with, and that no cache can hold its weights: on a card that only pretends."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
from attrs import define, evolve, field

from mortice.core.errors import InputError
from mortice.core.model.operators import Linear, WeightRef
from mortice.core.model.weight_plan import PlannedWeight
from mortice.plugins.executors.cuda.lowering.launches import Addresses, LaunchSpec, Spec
from mortice.plugins.executors.cuda.lowering.lowering import Lowering
from mortice.plugins.executors.cuda.run.product_times import ProductSteps, time_products
from tests.plugins.cuda.test_matmul import addresses, lowering

L2_BYTES = 1 << 20
SECONDS_A_LAUNCH = 1e-5

Launched = tuple[str, tuple[int, ...]]
"""The operators of a launch, and where the weights of its maps lie."""


@define(eq=False)
class Pretence:
    """A runtime, its card and its stream: each graph takes as long as it has launches."""

    lowering: Lowering
    launched: list[Launched] = field(factory=list)
    copied: dict[int, tuple[int, int]] = field(factory=dict)
    """Destination to (source, bytes) of what is copied."""
    held: dict[int, int] = field(factory=dict)
    """Address to bytes of what is allocated."""
    written: dict[int, Any] = field(factory=dict)
    next_address: int = 1 << 50
    graph_rows: int = 32
    captured: list[Launched] | None = None
    now: float = 0.0
    sizes: dict[WeightRef, int] = field(factory=dict)

    def __attrs_post_init__(self) -> None:
        weights, at = {}, 1 << 30
        for planned in self.lowering.plan.weights:
            weights[planned.weight], self.sizes[planned.weight] = at, planned.nbytes
            at += planned.nbytes
        places = evolve(addresses(self.lowering), weights=weights)
        self.memory = SimpleNamespace(
            addresses=places, address=lambda buffer: places.workspace + self.lowering.workspace.offsets[buffer]
        )
        specs = {path: self.lowering.launches(path) for path in self.lowering.paths}
        self.kernels = SimpleNamespace(specs=specs)
        self.device = SimpleNamespace(
            make_current=lambda: None,
            properties=SimpleNamespace(l2_bytes=L2_BYTES),
            allocate=self.allocate,
            new_event=lambda *, timing: Moment(self) if timing else None,
        )
        self.stream = self

    memory: Any = field(init=False)
    kernels: Any = field(init=False)
    device: Any = field(init=False)
    stream: Any = field(init=False)

    # the runtime

    def queue(self, specs: Sequence[Spec], rows: int, at: Addresses) -> list[Any]:
        assert self.captured is None, "kernels are not made ready within a capture"
        assert specs
        linears = {o.name: o for group in self.lowering.groups for o in group.operators if isinstance(o, Linear)}
        queued = []
        for spec in specs:
            assert isinstance(spec, LaunchSpec)
            assert spec.args(at, rows)
            maps = [linears[name] for name in spec.name.split("+") if name in linears]
            told = spec.name, tuple(at.weights[linear.weight] for linear in maps)
            queued.append(lambda _, told=told: cast(list[Launched], self.captured).append(told))
        return queued

    # the card

    def allocate(self, nbytes: int) -> Any:
        start = self.next_address
        self.next_address += nbytes + 4096
        self.held[start] = nbytes
        return SimpleNamespace(address=start, nbytes=nbytes, close=lambda: self.held.pop(start))

    # the stream

    def synchronize(self) -> None:
        assert self.captured is None

    def copy(self, destination: int, source: int, nbytes: int) -> None:
        self.copied[destination] = source, nbytes
        assert any(start <= destination and destination + nbytes <= start + size for start, size in self.held.items())

    def write(self, destination: int, array: Any) -> None:
        self.written[destination] = array

    @contextmanager
    def capture(self) -> Iterator[Graph]:
        self.captured = []
        yield (graph := Graph(self))
        graph.launches, self.captured = self.captured, None


@define(eq=False)
class Graph:
    on: Pretence
    launches: list[Launched] = field(factory=list)
    closed: bool = False

    def instantiate(self) -> Graph:
        return Graph(self.on, self.launches)

    def launch(self, stream: Any) -> None:
        assert stream is self.on
        assert not self.closed
        self.on.launched += self.launches
        self.on.now += SECONDS_A_LAUNCH * len(self.launches)

    def close(self) -> None:
        self.closed = True


@define(eq=False)
class Moment:
    on: Pretence
    at: float = 0.0

    def record(self, stream: Any) -> None:
        assert stream is self.on
        self.at = self.on.now

    def synchronize(self) -> None:
        """It has passed."""

    def milliseconds_since(self, start: Moment) -> float:
        return 1000 * (self.at - start.at)

    def close(self) -> None:
        """Nothing to give back."""


@pytest.fixture
def card(tmp_path: Path) -> Pretence:
    return Pretence(lowering(tmp_path))


def timed(card: Pretence, rows: int = 1, repeats: int = 3) -> Any:
    return time_products(cast(ProductSteps, card), rows, repeats)


def planned(card: Pretence) -> dict[WeightRef, PlannedWeight]:
    return {each.weight: each for each in card.lowering.plan.weights}


def test_each_product_that_differs_is_timed_once(card: Pretence) -> None:
    found = timed(card)
    assert card.lowering.plan.program.num_layers > 1
    assert ["+".join(weight.role for weight in time.weights) for time in found] == [
        "attn_q+attn_k+attn_v",
        "attn_output",
        "ffn_gate+ffn_up",
        "ffn_down",
        "token_embd",  # which is the head, too
    ]


def test_products_may_be_of_several_types(tmp_path: Path) -> None:
    mixed = Pretence(lowering(tmp_path, qtypes={"attn_v": "Q6_K", "default": "Q4_K"}))
    types = planned(mixed)
    named = [[types[weight].tensor.qtype.name for weight in time.weights] for time in timed(mixed)]
    assert named == [["Q4_K", "Q4_K", "Q6_K"], ["Q4_K"], ["Q4_K", "Q4_K"], ["Q4_K"], ["Q4_K"]]


def test_the_bytes_are_those_of_the_weights_as_they_lie(card: Pretence) -> None:
    for time in timed(card):
        assert time.nbytes == sum(planned(card)[weight].nbytes for weight in time.weights)
        assert time.launches == 1


def test_a_product_takes_the_time_of_its_chain_shared_by_its_launches(card: Pretence) -> None:
    for time in timed(card, repeats=4):
        assert time.seconds == pytest.approx([SECONDS_A_LAUNCH] * 4)


def test_the_launches_are_those_of_a_step(card: Pretence) -> None:
    timed(card)
    body, head = card.kernels.specs[card.lowering.path(1)]
    in_a_step = {spec.name for spec in (*body, *head)}
    assert {name for name, _ in card.launched} <= in_a_step


def test_weights_are_read_again_only_after_several_times_what_the_cache_holds(card: Pretence) -> None:
    timed(card)
    weights = planned(card)
    last: dict[tuple[int, ...], int] = {}
    read = 0
    name_before = ""
    own = {at: ref for ref, at in card.memory.addresses.weights.items()}
    distances = []
    for name, places in card.launched:
        if name != name_before:
            last, name_before = {}, name
        if places in last:
            distances.append(read - last[places])
        last[places] = read
        sources = [places[i] if places[i] in own else card.copied[places[i]][0] for i in range(len(places))]
        read += sum(weights[own[source]].nbytes for source in sources)
    assert min(distances) >= 6 * L2_BYTES


def test_copies_are_whole_and_do_not_overlap(card: Pretence) -> None:
    timed(card)
    own = {at: ref for ref, at in card.memory.addresses.weights.items()}
    assert card.copied
    for source, nbytes in card.copied.values():
        assert nbytes == card.sizes[own[source]]
    spans = sorted((start, start + nbytes) for start, (_, nbytes) in card.copied.items())
    assert all(end <= start for (_, end), (start, _) in pairwise(spans))


def test_all_memory_is_given_back(card: Pretence) -> None:
    timed(card)
    assert card.held == {}


def test_inputs_are_as_many_random_rows_as_the_step_has(card: Pretence) -> None:
    timed(card, rows=5)
    assert {array.shape[0] for array in card.written.values()} == {5}
    assert all(0.8 < np.std(array) < 1.2 for array in card.written.values())


def test_products_of_several_rows_are_timed_with_all_their_launches(card: Pretence) -> None:
    path = card.lowering.path(32)
    assert path.kind == "matmul"
    body, _ = card.kernels.specs[path]
    down = next(time for time in timed(card, rows=32) if time.weights[0].role == "ffn_down")
    names = [spec.name for spec in body if "ffn_down" in spec.name]
    assert down.launches == names.count(names[0]) > 1


def test_more_rows_than_a_graph_takes_are_refused(card: Pretence) -> None:
    with pytest.raises(InputError, match="products: found 33 rows, wanted at most 32"):
        timed(card, rows=33)
