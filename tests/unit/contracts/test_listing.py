"""A program as text and as a picture, from a file or from sizes alone."""

from __future__ import annotations

import re
import tracemalloc
from pathlib import Path
from xml.etree import ElementTree as ET

import pytest
from attrs import evolve

from mortice.arch_contracts.expressions import Expression
from mortice.arch_contracts.schema import Contract, parse_contract
from mortice.core.contracts.listing import parts_of, program_listing
from mortice.core.contracts.picture import program_picture
from mortice.core.contracts.sized import program_of_sizes
from mortice.core.errors import ConfigError, ContractError, ValidationError
from tests.support.tiny import CONTRACTS, program_of, tiny

FAMILIES = sorted((Path(__file__).parent / "families").glob("*.toml"))
ALL = [*CONTRACTS.values(), *(parse_contract(path.read_text(), path.name) for path in FAMILIES)]
LLAMA = CONTRACTS["llama"]


@pytest.mark.parametrize("contract", ALL, ids=lambda contract: contract.name)
def test_every_operator_of_a_program_has_a_line_and_a_box(contract: Contract) -> None:
    program = program_of_sizes(contract, {})
    parts = parts_of(program)
    assert sum(len(part.lines) * max(1, len(part.layers)) for part in parts) == len(program.operators)
    listing = program_listing(program)
    assert f"{program.operators[0].kind}(" not in listing, "a kind without a formula of its own"
    picture = ET.fromstring(program_picture(program))
    boxes = list(picture.iter("{http://www.w3.org/2000/svg}g"))
    assert len(boxes) == sum(len(part.lines) for part in parts)


def test_alike_layers_are_listed_once_and_others_apart() -> None:
    program = program_of_sizes(LLAMA, {"num_layers": 4})
    assert [part.title for part in parts_of(program)] == ["", "layers {0..3}, each", ""]
    windowed = evolve(LLAMA, attention=evolve(LLAMA.attention, sliding_window=Expression("64 if layer % 2 else 0")))
    titles = [part.title for part in parts_of(program_of_sizes(windowed, {"num_layers": 3}))]
    assert titles == ["", "layer 0", "layer 1", "layer 2", ""]


def test_a_line_says_shapes_numbers_and_where_its_input_comes_from() -> None:
    lines = program_listing(program_of_sizes(LLAMA, {"hidden_size": 96, "num_heads": 6})).splitlines()
    assert lines[0] == "llama: 2 layers, hidden size 96, vocabulary 512, context 512"
    assert any(line.split() == ["attn_k", "[32]", "=", "attn_norm", "@", "attn_k[32", "x", "96]ᵀ"] for line in lines)
    assert any("rope(attn_q: 6 heads of 16, adjacent pairs, base 10000)" in line for line in lines)
    assert lines[-1].endswith("token_embd[512 x 96]ᵀ"), "the tied embedding serves as the head"


def test_a_part_of_a_fused_weight_is_listed_with_its_rows() -> None:
    listing = program_listing(program_of_sizes(CONTRACTS["phi3"] if "phi3" in CONTRACTS else ALL[-1], {}))
    assert "attn_k[128 x 64 rows 64..95]" in listing


def test_sizes_and_a_file_of_these_sizes_give_the_same_program(tmp_path: Path) -> None:
    sizes = {"num_layers": 3, "hidden_size": 32, "num_heads": 2, "num_kv_heads": 1, "ffn_size": 64, "norm_eps": 2**-14}
    path = tiny(tmp_path, "qwen3", sizes=sizes)
    from_file = program_of(path, CONTRACTS["qwen3"])
    from_sizes = program_of_sizes(CONTRACTS["qwen3"], {**sizes, "vocab_size": from_file.vocab_size})
    assert from_sizes.operators == from_file.operators


def test_a_large_model_takes_no_memory() -> None:
    tracemalloc.start()
    try:
        program_of_sizes(LLAMA, {"hidden_size": 16384, "ffn_size": 53248, "num_heads": 128, "num_kv_heads": 8})
        assert tracemalloc.get_traced_memory()[1] < 20 << 20
    finally:
        tracemalloc.stop()


def test_sizes_that_make_no_sense_are_refused() -> None:
    with pytest.raises(ConfigError, match="contract llama has no 'width'; have "):
        program_of_sizes(LLAMA, {"width": 3})
    with pytest.raises(ConfigError, match="num_layers: found 1e"):
        program_of_sizes(LLAMA, {"num_layers": 1e9})
    with pytest.raises(ValidationError, match="head_count_kv"):
        program_of_sizes(LLAMA, {"num_heads": 4, "num_kv_heads": 3})


@pytest.mark.parametrize(
    ("extent", "wanted"),
    [
        ("hidden_size / 0", "division by zero"),
        ("hidden_size * 10 ** 29", "beyond"),
        ("hidden_size - 1000", "found -936 x 64, wanted 1 to"),
        ("hidden_size * 10 ** 20", "x 64, wanted 1 to"),
    ],
)
def test_a_weight_without_a_shape_is_refused(extent: str, wanted: str) -> None:
    up = evolve(LLAMA.layer_roles["ffn_up"], shape=(Expression(extent), Expression("hidden_size")))
    with pytest.raises(ContractError, match=r"contract llama: .*ffn_up.*" + re.escape(wanted)):
        program_of_sizes(evolve(LLAMA, layer_roles={**LLAMA.layer_roles, "ffn_up": up}), {})


@pytest.mark.parametrize("wrong", [float("nan"), float("inf"), -1.0, 0.0, 2.5])
def test_a_count_that_is_none_is_refused(wrong: float) -> None:
    with pytest.raises((ConfigError, ValidationError)):
        program_of_sizes(LLAMA, {"num_layers": wrong})
