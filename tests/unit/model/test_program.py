"""The program that a contract becomes: order of operators, widths, buffers."""

from __future__ import annotations

import math

import numpy as np
import pytest
from attrs import evolve

from mortice.core.errors import ContractError
from mortice.core.model.operators import OPERATOR_KINDS, Add, Attention, Buffer, Linear, Operator, Rope, RopeScaling
from mortice.core.model.program import Program, build_program
from mortice.core.model.program_check import check_operators
from mortice.core.model.rope import rope_frequencies
from mortice.core.model.validation import validate
from tests.support.in_memory import model_file
from tests.unit.model.test_families import CASES, build


def program_of(name: str) -> Program:
    contract, metadata, arrays = build(CASES[name])
    return build_program(validate(model_file(metadata, arrays), contract).model())


def kinds(program: Program, layer: int | None) -> list[str]:
    return [operator.name.removeprefix(f"layers.{layer}.") for operator in program.operators if operator.layer == layer]


def test_a_llama_layer() -> None:
    names = kinds(program_of("llama"), 1)
    assert [name for name in names if not name.endswith("_bias")] == [
        "attn_norm",
        "attn_q",
        "attn_k",
        "attn_v",
        "rope_q",
        "rope_k",
        "kv_write",
        "attention",
        "attn_output",
        "attn_residual",
        "ffn_norm",
        "ffn_gate",
        "ffn_up",
        "ffn_act",
        "ffn_down",
        "ffn_residual",
    ]


def test_q_passes_bias_then_norm_then_rope() -> None:
    """The order that parity depends on: linear, bias, per-head norm, RoPE."""
    program = program_of("stablelm, serial")
    by_output = {operator.outputs[0].name: operator for operator in program.operators if operator.outputs}
    (attention,) = [item for item in program.operators if isinstance(item, Attention) and item.layer == 0]
    chain: list[str] = []
    source = attention.src
    while source.name in by_output and by_output[source.name].name != "layers.0.attn_norm":
        operator = by_output[source.name]
        chain.append(operator.kind)
        source = operator.inputs[0]
    assert chain == ["rope", "norm", "add_bias", "linear"]
    qwen = program_of("starcoder2")
    names = kinds(qwen, 0)
    assert names.index("attn_q") < names.index("attn_q_bias") < names.index("rope_q")


def test_before_and_after_the_layers() -> None:
    assert kinds(program_of("gemma2"), None) == [
        "token_embd",
        "token_embd.scaled",
        "select_rows",
        "output_norm",
        "output",
        "softcap",
    ]


def test_scales_of_one_leave_no_operator() -> None:
    assert not [operator for operator in program_of("llama").operators if operator.kind == "scale"]


def test_rope_scaling_holds_only_where_the_contract_says_so() -> None:
    ropes = [operator for operator in program_of("gemma3").operators if isinstance(operator, Rope)]
    assert {rope.layer for rope in ropes if rope.scaling is not None} == {5}
    assert {(rope.layer, rope.base) for rope in ropes} == {(0, 1e4), (1, 1e4), (2, 1e4), (3, 1e4), (4, 1e4), (5, 1e6)}


def test_a_layer_without_positions_has_no_rope() -> None:
    ropes = {operator.layer for operator in program_of("smollm3").operators if isinstance(operator, Rope)}
    assert ropes == {0, 1, 2}


def test_the_cache_has_the_shape_of_each_layer() -> None:
    assert [(shape.num_kv_heads, shape.head_dim, shape.elements) for shape in program_of("gemma3").kv] == [
        (2, 12, 48)
    ] * 6


def test_the_drafts_use_every_operator_there_is() -> None:
    used = {operator.kind for name in CASES for operator in program_of(name).operators}
    assert used == set(OPERATOR_KINDS)


@pytest.mark.parametrize("name", CASES)
def test_a_buffer_is_alive_from_its_writer_to_its_last_reader(name: str) -> None:
    program = program_of(name)
    last = program.last_uses()
    assert last[program.logits] == len(program.operators) - 1
    for place, operator in enumerate(program.operators):
        for buffer in (*operator.inputs, *operator.outputs):
            assert last[buffer] >= place
    residual = next(item for item in program.operators if isinstance(item, Add) and item.layer == 1)
    assert last[residual.inputs[0]] >= program.operators.index(residual)


def broken(program: Program, place: int, **changes: object) -> list[Operator]:
    operators = list(program.operators)
    operators[place] = evolve(operators[place], **changes)
    return operators


def test_operators_that_do_not_fit_together_are_refused() -> None:
    program = program_of("llama")
    place = next(place for place, item in enumerate(program.operators) if isinstance(item, Linear))
    linear = program.operators[place]
    assert isinstance(linear, Linear)
    cases = {
        "reads a buffer that nothing wrote": {"src": Buffer("nothing", 32)},
        "rows of the weight: 32 and 31 do not fit": {"out": Buffer("new", 31)},
        "writes a buffer again": {"out": linear.src},
        "has the name of another operator": {"name": "token_embd"},
    }
    for message, changes in cases.items():
        with pytest.raises(ContractError, match=message):
            check_operators("llama", broken(program, place, **changes))
    check_operators("llama", program.operators)


# RoPE frequencies ----------------------------------------------------------------------------------------------------


def rope(dims: int = 64, base: float = 10000.0, scaling: RopeScaling | None = None) -> Rope:
    wide = Buffer("x", dims)
    return Rope(src=wide, out=wide, num_heads=1, head_dim=dims, dims=dims, style="halves", base=base, scaling=scaling)


def test_frequencies_fall_from_one_geometrically() -> None:
    frequencies, magnitude = rope_frequencies(rope(8, 10000.0), None)
    np.testing.assert_allclose(frequencies, [1.0, 0.1, 0.01, 0.001])
    assert magnitude == 1.0


def test_linear_scaling_and_factors_divide() -> None:
    factors = np.array([1, 1, 2, 4], np.float32)
    frequencies, magnitude = rope_frequencies(rope(8, scaling=RopeScaling(type="linear", factor=2.0)), factors)
    np.testing.assert_allclose(frequencies, [0.5, 0.05, 0.0025, 0.000125])
    assert magnitude == 1.0


def test_a_table_serves_contexts_up_to_the_original_one_and_another_those_beyond() -> None:
    ropes = [operator for operator in program_of("phi3, long").operators if isinstance(operator, Rope)]
    assert {rope.layer for rope in ropes} == {0, 1}
    for rope_of_layer in ropes:
        chosen = [rope_of_layer.factors_for(context) for context in (1, 63, 64)]
        tables = ["rope_factors_short.weight", "rope_factors_short.weight", "rope_factors_long.weight"]
        assert [weight.tensor for weight in chosen if weight is not None] == tables
        assert [weight.tensor for weight in rope_of_layer.weights] == sorted(set(tables), reverse=True)


@pytest.mark.parametrize("multiplier", [0.0, 0.5, 1.0])
def test_a_log_multiplier_takes_back_its_share_of_yarns_magnitude(multiplier: float) -> None:
    scaling = RopeScaling(type="yarn", factor=16.0, original_context=4096, log_multiplier=multiplier)
    _, magnitude = rope_frequencies(rope(scaling=scaling), None)
    stretch = 0.1 * math.log(16.0)
    assert magnitude == pytest.approx((1 + stretch) / (1 + multiplier * stretch))
    assert (magnitude == 1.0) == (multiplier == 1.0)


def test_yarn_keeps_fast_pairs_and_stretches_slow_ones() -> None:
    """Peng et al. 2023, equations 17 to 20 and 22, written out pair by pair."""
    dims, base, factor, trained = 64, 10000.0, 8.0, 4096
    scaling = RopeScaling(type="yarn", factor=factor, original_context=trained)
    frequencies, magnitude = rope_frequencies(rope(dims, base, scaling), None)

    def pair_of(rotations: float) -> float:
        return dims * math.log(trained / (rotations * 2 * math.pi)) / (2 * math.log(base))

    low, high = math.floor(pair_of(32.0)), math.ceil(pair_of(1.0))
    assert 0 < low < high < dims // 2
    for pair in range(dims // 2):
        plain = base ** (-2 * pair / dims)
        share = min(1.0, max(0.0, (pair - low) / (high - low)))  # of interpolation
        assert frequencies[pair] == pytest.approx(plain / factor * share + plain * (1 - share))
    assert frequencies[0] == 1.0
    assert frequencies[-1] == pytest.approx(base ** (-62 / 64) / factor)
    assert magnitude == pytest.approx(0.1 * math.log(factor) + 1)
