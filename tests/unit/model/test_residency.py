"""Making weights resident: once, where the plan says, and not at all when something fails."""

from __future__ import annotations

import numpy as np
import pytest
from attrs import frozen
from numpy.typing import NDArray

from mortice.arch_contracts.schema import builtin_contracts
from mortice.core.errors import PluginError
from mortice.core.model.program import build_program
from mortice.core.model.residency import ResidentWeights, bind
from mortice.core.model.validation import validate
from mortice.core.model.weight_plan import ALIGNMENT, WeightPlan, plan_weights
from mortice.core.plugin.events import Event, UploadProgress
from mortice.core.plugin.interfaces import QuantizationType
from mortice.plugins.executors.reference.executor import ReferenceExecutor
from mortice.plugins.qtypes import mortice_qtypes
from mortice.plugins.uploads.host import HostUpload
from tests.support.in_memory import QTYPES, arrays_for, metadata_for, model_file, plan_of
from tests.unit.model.test_families import contract_of

LLAMA = next(contract for contract in builtin_contracts() if contract.name == "llama")


def resident_of(plan: WeightPlan) -> ResidentWeights:
    return ResidentWeights(plan=plan, arena=ReferenceExecutor().allocate(plan.arena_bytes))


def llama_plan(layout: str = "fastest") -> WeightPlan:
    metadata = metadata_for(LLAMA)
    return plan_of(model_file(metadata, arrays_for(LLAMA, metadata)), LLAMA, layout)


def no_one(event: Event) -> None:
    """No observer."""


def test_every_weight_is_where_the_plan_says() -> None:
    contract = contract_of("gpt2")
    metadata = metadata_for(contract)
    resident = resident_of(plan_of(model_file(metadata, arrays_for(contract, metadata)), contract))
    HostUpload().upload(resident, no_one)
    view = resident.arena.host_view()
    assert view is not None
    for planned in resident.plan.weights:
        stored = view[planned.offset : planned.offset + planned.nbytes].view(np.float32)
        np.testing.assert_array_equal(stored, planned.source().view(np.float32).reshape(-1))


def test_a_second_upload_writes_nothing_and_moves_nothing() -> None:
    resident = resident_of(llama_plan())
    assert HostUpload().upload(resident, no_one) == sum(planned.nbytes for planned in resident.plan.weights)
    before = [resident.address(index) for index in range(len(resident.plan.weights))]
    assert resident.complete
    assert HostUpload().upload(resident, no_one) == 0
    assert [resident.address(index) for index in range(len(resident.plan.weights))] == before
    assert all(address % ALIGNMENT == 0 for address in before)


def test_weights_read_from_the_file_take_no_memory() -> None:
    resident = resident_of(llama_plan("file"))
    assert resident.arena.nbytes == 0
    assert HostUpload().upload(resident, no_one) == 0
    assert resident.complete


def test_progress_ends_at_the_total() -> None:
    events: list[UploadProgress] = []
    resident = resident_of(llama_plan())

    def observe(event: Event) -> None:
        assert isinstance(event, UploadProgress)
        events.append(event)

    HostUpload().upload(resident, observe)
    assert len(events) == len(resident.plan.weights)
    assert [event.done_bytes for event in events] == sorted(event.done_bytes for event in events)
    assert events[-1].done_bytes == events[-1].total_bytes == resident.plan.file_bytes


def test_an_observer_that_fails_stops_the_upload_and_what_is_there_stays_known() -> None:
    resident = resident_of(llama_plan())

    def fail(event: Event) -> None:
        raise PluginError("observer: enough")

    with pytest.raises(PluginError, match="enough"):
        HostUpload().upload(resident, fail)
    assert not resident.complete
    missing = sum(planned.nbytes for _, planned in resident.missing())
    assert HostUpload().upload(resident, no_one) == missing > 0
    assert resident.complete


@frozen
class Broken:
    """A qtype plugin's function that does not do what it says."""

    how: str

    def __call__(self, rows: NDArray[np.uint8]) -> NDArray[np.float32]:
        values = rows.view(np.float32)
        match self.how:
            case "raises":
                raise KeyError("scales")
            case "one row":
                return values[:1]
            case "transposed":
                return np.ascontiguousarray(values.T)
        return values.astype(np.float64)  # type: ignore[return-value]  # what a careless plugin may do


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("raises", r"\.weight: F32: its dequantize failed: KeyError: 'scales'"),
        ("one row", r"F32: its dequantize gave float32 of shape \(1, "),
        ("transposed", r"F32: its dequantize gave float32 of shape"),
        ("float64", r"F32: its dequantize gave float64"),
    ],
)
def test_a_qtype_that_fails_is_named_with_its_tensor(how: str, message: str) -> None:
    metadata = metadata_for(LLAMA)
    model = validate(model_file(metadata, arrays_for(LLAMA, metadata)), LLAMA).model()
    executor = ReferenceExecutor()
    broken = QuantizationType(qtype=QTYPES["F32"], dequantize=Broken(how))
    plan = plan_weights(model, build_program(model), executor.kernels(executor.device(), [broken]))
    with pytest.raises(PluginError, match=message):
        HostUpload().upload(resident_of(plan), no_one)


def test_only_resident_weights_are_bound() -> None:
    resident = resident_of(llama_plan())
    with pytest.raises(AssertionError, match="only resident weights"):
        bind(resident)


def test_operators_are_bound_by_index() -> None:
    resident = resident_of(llama_plan())
    HostUpload().upload(resident, no_one)
    bound = bind(resident)
    for item in bound.operators:
        assert tuple(bound.plan.weights[index].weight for index in item.weights) == item.operator.weights


def test_closing_twice_is_fine_and_frees_the_arena() -> None:
    resident = resident_of(llama_plan())
    HostUpload().upload(resident, no_one)
    resident.close()
    resident.close()
    assert not resident.complete
    with pytest.raises(AssertionError, match="closed"):
        resident.arena.host_view()


def test_every_weight_type_has_both_layouts() -> None:
    executor = ReferenceExecutor()
    qtypes = list(mortice_qtypes())
    served = {(kernel.qtype, kernel.layout.name) for kernel in executor.kernels(executor.device(), qtypes)}
    assert served == {(item.qtype.name, layout) for item in qtypes for layout in ("f32", "file")}
