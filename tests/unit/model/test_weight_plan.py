"""Where weights will lie: one place for each, aligned and apart, and an exact account of what fits."""

from __future__ import annotations

import re
from collections.abc import Callable

import numpy as np
import pytest
from attrs import frozen
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from mortice.arch_contracts.schema import Contract, builtin_contracts
from mortice.core.errors import DoesNotFitError, UnsupportedError
from mortice.core.model.findings import join_layers
from mortice.core.model.program import build_program
from mortice.core.model.qtypes import QType
from mortice.core.model.types import DeviceInfo, ModelFile
from mortice.core.model.validation import ValidatedModel, validate
from mortice.core.model.weight_plan import ALIGNMENT, FitReport, Kernel, WeightPlan, fit_report, plan_weights
from tests.support.in_memory import QTYPES, arrays_for, metadata_for, model_file, plan_of, raw_view
from tests.unit.model.test_families import contract_of

LLAMA = next(contract for contract in builtin_contracts() if contract.name == "llama")
OPERATORS = ("linear", "embed", "embed_positions", "norm", "add_bias", "rope")


@frozen(eq=False)
class Layout:
    """A layout that only has a size."""

    name: str
    size: Callable[[int, int], int]

    def nbytes(self, qtype: QType, rows: int, columns: int) -> int:
        return self.size(rows, columns)

    def store(self, rows: NDArray[np.uint8], columns: int, out: NDArray[np.uint8]) -> None:
        raise AssertionError("a plan writes nothing")


def kernels(*layouts: Layout, operators: tuple[str, ...] = OPERATORS) -> list[Kernel]:
    return [Kernel(operator=operator, qtype="F32", layout=layout) for layout in layouts for operator in operators]


WIDE, SLIM = Layout("wide", lambda rows, columns: 8 * rows * columns), Layout("slim", lambda rows, columns: rows)


def model_of(contract: Contract = LLAMA, leave_out: tuple[str, ...] = ()) -> ValidatedModel:
    metadata = metadata_for(contract)
    return validate(model_file(metadata, arrays_for(contract, metadata, leave_out=leave_out)), contract).model()


def plan(model: ValidatedModel, offered: list[Kernel], prefer: str = "fastest") -> WeightPlan:
    return plan_weights(model, build_program(model), offered, prefer=prefer)


def names(planned: WeightPlan) -> set[str]:
    return {item.layout.name for item in planned.weights}


@given(st.data())
def test_weights_are_aligned_apart_and_inside_the_arena(data: st.DataObject) -> None:
    sizes = data.draw(st.lists(st.integers(0, 5000), min_size=1, max_size=8))

    def size(rows: int, columns: int) -> int:
        return sizes[(rows + columns) % len(sizes)]

    planned = plan(FUSED, kernels(Layout("odd", size)))
    end = 0
    for item in planned.weights:
        assert item.offset % ALIGNMENT == 0
        assert item.offset >= end
        end = item.offset + item.nbytes
    assert end <= planned.arena_bytes


FUSED = model_of(contract_of("phi3"))


def test_every_weight_of_the_program_is_planned_once() -> None:
    planned = plan(FUSED, kernels(SLIM))
    weights = [item.weight for item in planned.weights]
    assert len(weights) == len(set(weights))
    assert set(weights) == set(build_program(FUSED).weights)


def test_a_tied_head_is_the_embedding_and_planned_once() -> None:
    planned = plan(model_of(leave_out=("output",)), kernels(SLIM))
    assert [item.tensor.name for item in planned.weights].count("token_embd.weight") == 1
    assert planned.file_bytes == planned.model.file.tensor_bytes


def test_parts_of_a_fused_tensor_are_planned_one_by_one_from_their_own_rows() -> None:
    planned = plan(FUSED, kernels(SLIM))
    parts = {item.weight.role: item for item in planned.weights if item.tensor.name == "blk.1.attn_qkv.weight"}
    whole = FUSED.file.tensors["blk.1.attn_qkv.weight"].data.view(np.float32).reshape(64, 32)
    for role, rows in (("attn_q", slice(0, 32)), ("attn_k", slice(32, 48)), ("attn_v", slice(48, 64))):
        np.testing.assert_array_equal(parts[role].source().view(np.float32), whole[rows])
    assert planned.file_bytes == FUSED.file.tensor_bytes


def test_parts_of_a_fused_bias_are_its_elements() -> None:
    model = model_of(contract_of("gpt2"))
    planned = plan(model, kernels(SLIM))
    (part,) = [item for item in planned.weights if item.weight.role == "attn_k_bias" and item.weight.layer == 0]
    whole = model.file.tensors["blk.0.attn_qkv.bias"].data.view(np.float32)
    assert (part.rows, part.columns) == (1, 16)
    np.testing.assert_array_equal(part.source().view(np.float32)[0], whole[32:48])


def test_the_first_layout_is_the_fastest() -> None:
    assert names(plan(FUSED, kernels(WIDE, SLIM))) == {"wide"}


def test_compact_takes_the_fewest_bytes() -> None:
    assert names(plan(FUSED, kernels(WIDE, SLIM), "compact")) == {"slim"}


def test_a_layout_is_taken_by_name_where_it_is_offered() -> None:
    offered = [*kernels(WIDE), *kernels(SLIM, operators=("linear",))]
    planned = plan(FUSED, offered, "slim")
    assert {item.layout.name for item in planned.weights if item.weight.role == "ffn_down"} == {"slim"}
    assert {item.layout.name for item in planned.weights if item.weight.role == "attn_norm"} == {"wide"}


def test_a_tied_weight_takes_a_layout_that_all_its_readers_know() -> None:
    model = model_of(leave_out=("output",))
    offered = [*kernels(WIDE, operators=("embed", "norm", "rope", "add_bias")), *kernels(SLIM)]
    planned = plan(model, offered)
    assert {item.layout.name for item in planned.weights if item.tensor.name == "token_embd.weight"} == {"slim"}


def test_all_unsupported_weights_are_listed_at_once() -> None:
    metadata = metadata_for(LLAMA)
    file = model_file(metadata, arrays_for(LLAMA, metadata))
    tensors = dict(file.tensors)
    for name in ("blk.0.ffn_gate.weight", "blk.1.attn_q.weight"):
        tensors[name] = raw_view(name, tensors[name].shape, QTYPES["F64"])
    changed = ModelFile(
        path=file.path, format="memory", version="1", metadata=metadata, tensors=tensors, files=file.files
    )
    with pytest.raises(UnsupportedError) as caught:
        plan(validate(changed, LLAMA).model(), kernels(WIDE))
    assert sorted(str(caught.value).splitlines()) == [
        "blk.0.ffn_gate.weight: no kernel for linear with F64 weights",
        "blk.1.attn_q.weight: no kernel for linear with F64 weights",
    ]


def test_weights_that_differ_in_the_layer_only_are_refused_in_one_line() -> None:
    offered = [kernel for kernel in kernels(WIDE) if kernel.operator != "norm"]
    with pytest.raises(UnsupportedError) as caught:
        plan(model_of(), offered)
    assert sorted(str(caught.value).splitlines()) == [
        "blk.{0..1}.attn_norm.weight: no kernel for norm with F32 weights",
        "blk.{0..1}.ffn_norm.weight: no kernel for norm with F32 weights",
        "output_norm.weight: no kernel for norm with F32 weights",
    ]


def test_names_are_joined_over_runs_of_layers() -> None:
    names = ["output.weight", *(f"blk.{layer}.a.weight" for layer in (0, 1, 2, 7)), "blk.3.b.weight"]
    assert join_layers(names) == ["output.weight", "blk.{0..2,7}.a.weight", "blk.3.b.weight"]


def test_bytes_are_counted_by_type_as_in_the_file() -> None:
    planned = plan_of(FUSED.file, FUSED.contract)
    assert planned.bytes_by_qtype == {"F32": FUSED.file.tensor_bytes}


# what fits -----------------------------------------------------------------------------------------------------------


def device(free: int) -> DeviceInfo:
    return DeviceInfo(kind="cpu", name="a CPU", total_bytes=1 << 40, free_bytes=free)


PLAN = plan(FUSED, kernels(WIDE))


@given(
    beyond=st.integers(-2000, 200_000),
    kv=st.integers(0, 3000),
    fixed=st.integers(0, 5000),
    growing=st.integers(0, 40),
    context=st.integers(1, 64),
)
def test_the_largest_context_is_exact(beyond: int, kv: int, fixed: int, growing: int, context: int) -> None:
    report = fit_report(
        PLAN,
        device(PLAN.arena_bytes + beyond),
        context,
        kv_bytes=lambda tokens: kv * tokens,
        workspace_bytes=lambda tokens: fixed + growing * tokens // 3,
    )

    def fits(tokens: int) -> bool:
        return PLAN.arena_bytes + kv * tokens + fixed + growing * tokens // 3 <= report.available_bytes

    largest = report.largest_context
    assert 0 <= largest <= PLAN.program.context_length
    assert largest == 0 or fits(largest)
    assert largest == PLAN.program.context_length or not fits(largest + 1)
    assert report.fits == fits(context)
    assert (report.largest_kv_tokens >= context) == fits(context)


def report_with(available: int, context: int = 64) -> Callable[[], None]:
    return fit_report(
        PLAN, device(available), context, kv_bytes=lambda n: 1000 * n, workspace_bytes=lambda n: 10
    ).require


def test_what_does_not_fit_says_what_would() -> None:
    with pytest.raises(
        DoesNotFitError, match=r"a CPU: needs .* KV cache for 64 tokens .*a context of 5 tokens would fit"
    ):
        report_with(PLAN.arena_bytes + 5500)()


def test_a_cache_for_many_sequences_that_does_not_fit_says_what_would() -> None:
    def report(kv_tokens: int) -> FitReport:
        available = device(PLAN.arena_bytes + 100_500)
        return fit_report(
            PLAN, available, 64, kv_tokens=kv_tokens, kv_bytes=lambda n: 1000 * n, workspace_bytes=lambda n: 10
        )

    assert (report(100).fits, report(101).fits) == (True, False)
    assert report(80).largest_context == PLAN.program.context_length, "beside a cache of 80 tokens"
    with pytest.raises(
        DoesNotFitError, match=r"KV cache for 101 tokens .*a KV cache of 100 tokens would fit \(executor\.kv_tokens\)"
    ):
        report(101).require()
    with pytest.raises(DoesNotFitError, match=r"KV cache for 64 tokens .* a context of 5 tokens would fit"):
        report_with(PLAN.arena_bytes + 5500)()


def test_weights_that_do_not_fit_are_named_as_the_reason() -> None:
    with pytest.raises(DoesNotFitError, match="its weights alone do not fit"):
        report_with(PLAN.arena_bytes - 1)()


def test_weights_that_just_fit_leave_no_context() -> None:
    with pytest.raises(DoesNotFitError, match="no context fits beside its weights"):
        report_with(PLAN.arena_bytes + 20)()


def limited(free_mib: int, limit_mib: int, context: int) -> FitReport:
    return fit_report(
        PLAN,
        device(free_mib << 20),
        context,
        kv_bytes=lambda n: max(n, 64) * 10_000,
        workspace_bytes=lambda n: (9 << 20) + n,
        available_bytes=limit_mib << 20,
    )


def test_a_limit_that_no_context_fits_says_which_would_do() -> None:
    advice = "limits.memory_mib would have to be 29, or 10 with a context of 64 tokens (executor.context)"
    with pytest.raises(DoesNotFitError, match=rf"1\.0 MiB may be used; {re.escape(advice)}$"):
        limited(100, 1, 2048).require()
    assert (limited(100, 29, 2048).fits, limited(100, 28, 2048).fits) == (True, False)
    assert (limited(100, 10, 64).fits, limited(100, 9, 64).fits) == (True, False)
    assert limited(100, 29, 2048).advice == ""


def test_no_limit_is_advised_that_is_beyond_the_device_or_the_same_twice() -> None:
    shortest = "limits.memory_mib would have to be 10 with a context of 64 tokens (executor.context)"
    assert limited(20, 1, 2048).advice == shortest
    assert limited(100, 1, 32).advice == "limits.memory_mib would have to be 10"
    assert limited(9, 1, 2048).advice.startswith("no context fits beside its weights")


def test_a_limit_below_the_free_memory_counts() -> None:
    report = fit_report(
        PLAN,
        device(1 << 40),
        1,
        kv_bytes=lambda n: 0,
        workspace_bytes=lambda n: 0,
        available_bytes=PLAN.arena_bytes - 1,
    )
    assert not report.fits
