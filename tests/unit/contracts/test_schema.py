"""Reading contracts: what a good one becomes, and that each kind of mistake is named where it stands."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mortice.arch_contracts.schema import (
    STANDARD_HYPERPARAMETERS,
    ContractFormatError,
    builtin_contracts,
    parse_contract,
)

SMALL = """
[contract]
name = "small"
architectures = ["small", "tiny"]

[hyperparameters]
eps = { key = "attention.layer_norm_rms_epsilon" }
window = { key = "window", kind = "int", default = 0, per_layer = true }

[norm]
eps = "eps"

[attention]
sliding_window = "window"

[rope]
style = "halves"
base = 10000

[roles.global]
token_embd = ["vocab_size", "hidden_size"]
output_norm = ["hidden_size"]
output = { shape = ["vocab_size", "hidden_size"], else = "token_embd" }

[roles.layer]
attn_norm = ["hidden_size"]
attn_qkv.shape = ["3 * hidden_size", "hidden_size"]
attn_qkv.split = { attn_q = "hidden_size", attn_k = "hidden_size", attn_v = "hidden_size" }
attn_output = ["hidden_size", "hidden_size"]
attn_output_bias = { shape = ["hidden_size"], optional = true }
attn_q_bias = { forbidden = true }
ffn_norm = ["hidden_size"]
ffn_gate = ["ffn_size", "hidden_size"]
ffn_up = ["ffn_size", "hidden_size"]
ffn_down = ["hidden_size", "ffn_size"]
"""


def test_a_contract_becomes_data() -> None:
    contract = parse_contract(SMALL, "small.toml")
    assert contract.architectures == ("small", "tiny")
    assert contract.hyperparameters["num_layers"] is STANDARD_HYPERPARAMETERS["num_layers"]
    assert contract.hyperparameters["window"].default is not None
    assert contract.norm.placement == "pre"
    assert contract.rope is not None
    assert contract.rope.base.evaluate({}) == 10000
    assert contract.attention.scale.text == "1 / sqrt(head_dim)"
    roles = contract.layer_roles
    assert roles["attn_output_bias"].tensor(3) == "blk.3.attn_output.bias"
    assert [roles[name].presence for name in ("attn_output", "attn_output_bias", "attn_q_bias")] == [
        "required",
        "optional",
        "forbidden",
    ]
    assert list(roles["attn_qkv"].split) == ["attn_q", "attn_k", "attn_v"]
    assert contract.global_roles["output"].fallback == "token_embd"


def test_the_built_in_contracts_are_what_their_files_are_called() -> None:
    folder = Path(__file__).resolve().parents[3] / "arch_contracts"
    assert [contract.name for contract in builtin_contracts()] == sorted(path.stem for path in folder.glob("*.toml"))


def mistakes_of(text: str) -> list[str]:
    with pytest.raises(ContractFormatError) as caught:
        parse_contract(text, "small.toml")
    lines = str(caught.value).splitlines()
    assert all(line.startswith("small.toml: ") for line in lines)
    return [line.removeprefix("small.toml: ") for line in lines]


@pytest.mark.parametrize(
    ("old", "new", "wanted"),
    [
        # keys and types
        ("[rope]", "[rope]\nstile = 1", "rope: unknown key 'stile', did you mean 'style'?"),
        ('name = "small"', "name = 3", "contract.name: wanted a string, found 3"),
        ('name = "small"\n', "", "contract.name: required, but not there"),
        ("[norm]", "[nrom]", "norm: required, but not there"),
        ('style = "halves"', 'style = "half"', "rope.style: wanted one of 'adjacent', 'halves', found 'half'"),
        ('style = "halves"', "style = ['halves']", "rope.style: wanted one of 'adjacent', 'halves'"),
        ("optional = true", "optional = 1", "roles.layer.attn_output_bias.optional: wanted true or false, found 1"),
        ("optional = true", "option = true", "did you mean 'optional'?"),
        ('attn_norm = ["hidden_size"]', 'attn_norm = "hidden_size"', "roles.layer.attn_norm: wanted a table"),
        ('architectures = ["small", "tiny"]', 'architectures = "small"', "contract.architectures: wanted an array"),
        ('architectures = ["small", "tiny"]', "architectures = []", "contract.architectures: at least one"),
        ('"tiny"]', '"small"]', "contract.architectures: 'small' stands there 2 times"),
        ('name = "small"', 'name = ""', "contract.name: wanted a name"),
        ('kind = "int"', 'kind = "integer"', "hyperparameters.window.kind: wanted one of"),
        # expressions
        ('eps = "eps"', 'eps = "epsilon"', "norm.eps: 'epsilon': unknown key 'epsilon', did you mean 'eps'?"),
        ('eps = "eps"', 'eps = "eps +"', "norm.eps: 'eps +' is not an expression"),
        ('eps = "eps"', 'eps = "__import__(1)"', "norm.eps: '__import__(1)': only these functions exist: sqrt"),
        ('eps = "eps"', "eps = true", "norm.eps: wanted a number or an expression, found True"),
        ('eps = "eps"', "eps = [1]", "norm.eps: wanted a number or an expression, found [1]"),
        ('eps = "eps"', 'eps = "layer"', "norm.eps: 'layer': 'layer' has no value here, outside the layers"),
        ('eps = "eps"', 'eps = "window"', "norm.eps: 'window': 'window' has no value here"),
        ('"3 * hidden_size", "', '"3 * hiden_size", "', "roles.layer.attn_qkv.shape: '3 * hiden_size': unknown key"),
        ('attn_q = "hidden_size"', 'attn_q = "hiden"', "roles.layer.attn_qkv.split.attn_q: 'hiden': unknown key"),
        ('attn_q = "hidden_size"', 'attn_q = "("', "roles.layer.attn_qkv.split.attn_q: '(' is not an expression"),
        # hyperparameters
        ('eps = { key = "attention.layer_norm_rms_epsilon" }', "eps = {}", "hyperparameters.eps.key: required"),
        ('key = "window"', 'key = ""', "hyperparameters.window.key: wanted a metadata key"),
        ("[norm]", 'layer = { key = "x" }\n[norm]', "hyperparameters.layer: 'layer' cannot name"),
        ("[norm]", '"a b" = { key = "x" }\n[norm]', "hyperparameters.a b: 'a b' cannot name"),
        (
            "[norm]",
            'num_heads = { key = "n" }\n[norm]',
            "hyperparameters.num_heads.kind: num_heads is always 'int', found 'float'",
        ),
        (
            "[norm]",
            'num_layers = { key = "n", kind = "int", per_layer = true }\n[norm]',
            "hyperparameters.num_layers.per_layer: num_layers is one number",
        ),
        ("default = 0", 'default = "window"', "hyperparameters.window.default: 'window' builds on itself"),
        (
            "[norm]",
            'a = { key = "a", default = "b" }\nb = { key = "b", default = "a" }\n[norm]',
            "hyperparameters: defaults build on one another in a circle",
        ),
        # roles
        ("attn_norm =", "attn_nrom =", "roles.layer.attn_nrom: unknown key 'attn_nrom', did you mean 'attn_norm'?"),
        ("attn_norm =", "token_embd =", "roles.layer.token_embd: unknown key 'token_embd'"),
        ('attn_norm = ["hidden_size"]', "attn_norm = {}", "roles.layer.attn_norm.shape: required, but not there"),
        (
            'ffn_norm = ["hidden_size"]',
            'ffn_norm = { name = "ffn_norm.weight", shape = ["hidden_size"] }',
            "roles.layer.ffn_norm.name: 'ffn_norm.weight': wanted {i}",
        ),
        (
            'output_norm = ["hidden_size"]',
            'output_norm = { name = "blk.{i}.norm", shape = ["hidden_size"] }',
            "roles.global.output_norm.name: 'blk.{i}.norm': wanted {i}, the layer, in layer roles and only there",
        ),
        (
            'ffn_norm = ["hidden_size"]',
            'ffn_norm = { name = "blk.{i}.attn_norm.weight", shape = ["hidden_size"] }',
            "roles.layer.ffn_norm.name: 'blk.{i}.attn_norm.weight' is the tensor of another role too",
        ),
        ('else = "token_embd"', 'else = "token_emb"', "roles.global.output.else: no role 'token_emb'"),
        ('else = "token_embd"', 'else = "output"', "roles.global.output.else: 'output' has an else of its own"),
        ('else = "token_embd"', 'else = "output_norm"', "roles.global.output.else: 'output_norm' has another shape"),
        (
            'token_embd = ["vocab_size", "hidden_size"]',
            'token_embd = { shape = ["vocab_size", "hidden_size"], else = "output" }',
            "roles.global.token_embd.else: 'output' has an else of its own",
        ),
        ('ffn_norm = ["hidden_size"]', 'ffn_norm = ["1", "2", "3"]', "roles.layer.ffn_norm.shape: 3 extents"),
        # splits
        ('attn_v = "hidden_size"', 'attn_w = "hidden_size"', "roles.layer.attn_qkv.split: unknown key 'attn_w'"),
        ('attn_v = "hidden_size"', 'attn_v_bias = "1"', "roles.layer.attn_qkv.split: attn_qkv cannot hold attn_v_bias"),
        (
            'ffn_up = ["ffn_size", "hidden_size"]',
            'ffn_up = { shape = ["ffn_size", "hidden_size"], split = { ffn_down = "1" } }',
            "roles.layer.ffn_up.split: ffn_up cannot hold ffn_down",
        ),
        (
            "[roles.layer]",
            '[roles.layer]\nffn_gate_up = { shape = ["1", "1"], split = { attn_q = "1" } }',
            "roles.layer.ffn_gate_up.split: 'attn_q' is a part of another role too",
        ),
        (
            "[roles.layer]",
            '[roles.layer]\nffn_gate_up = ["1", "1"]',
            "roles.layer.ffn_gate_up.split: required, but not there",
        ),
        # settings against roles
        ('attn_norm = ["hidden_size"]\n', "", "roles.layer.attn_norm: norm.placement = 'pre' needs it"),
        ('ffn_gate = ["ffn_size", "hidden_size"]\n', "", "roles.layer.ffn_gate: ffn.gated = true needs it"),
        ("[rope]", "[ffn]\ngated = false\n[rope]", "roles.layer.ffn_gate: the contract's settings give it no use"),
        ('eps = "eps"', 'eps = "eps"\nplacement = "post"', "roles.layer.post_ffw_norm: norm.placement = 'post' needs"),
        (
            "[attention]",
            '[attention]\nqk_norm = "per_head"',
            "roles.layer.attn_k_norm: attention.qk_norm = 'per_head' needs it",
        ),
        # which weights a file has
        ("[rope]", '[rope]\ndims = "8 if has_attn_output_bias else has_attn_q_norm"', "unknown key 'has_attn_q_norm'"),
        ('attn_norm = ["hidden_size"]', 'attn_norm = ["has_ffn_norm"]', "roles.layer.attn_norm.shape: 'has_ffn_norm'"),
        ('eps = "eps"', 'eps = "has_ffn_norm"', "norm.eps: 'has_ffn_norm': unknown key"),
        (
            "[norm]",
            'has_beans = { key = "beans" }\n[norm]',
            "hyperparameters.has_beans: 'has_beans' cannot name a hyperparameter",
        ),
        (
            "[roles.global]",
            '[roles.global]\nrope_factors_long = ["head_dim / 2"]',
            "roles.global.rope_factors_long: the contract's settings give it no use",
        ),
        (
            "[roles.layer]",
            '[roles.layer]\nattn_q_norm = ["head_dim"]',
            "roles.layer.attn_q_norm: the contract's settings give it no use",
        ),
        (
            "[rope]",
            '[embedding]\npositions = "learned"\n[rope]',
            "roles.global.position_embd: embedding.positions = 'learned' needs it",
        ),
    ],
)
def test_each_mistake_is_named_where_it_stands(old: str, new: str, wanted: str) -> None:
    assert old in SMALL
    assert any(line.startswith(wanted) or wanted in line for line in mistakes_of(SMALL.replace(old, new, 1)))


def test_all_mistakes_are_reported_at_once() -> None:
    text = SMALL.replace("[rope]", "[rope]\nstile = 1").replace("optional = true", "optional = 1")
    assert len(mistakes_of(text)) == 2
    text = SMALL.replace('eps = "eps"', 'eps = "epsilon"').replace("ffn_down =", "ffn_dwon =")
    assert len(mistakes_of(text)) == 3  # the unknown role, and the known one that is now missing


@pytest.mark.parametrize(
    "text",
    [
        "",
        "x = [",
        "a = " + "[" * 50_000,
        "a = " + "9" * 5000,
        "[contract]\n[contract]",
        "\0",
        "contract = 1",
        "roles = []",
    ],
)
def test_what_is_no_contract_at_all_is_refused(text: str) -> None:
    assert mistakes_of(text)


@given(st.text(alphabet="[]{}=.\"'#\n abcdeinorst_1", max_size=80))
def test_no_text_raises_anything_but_format_errors(text: str) -> None:
    with pytest.raises(ContractFormatError):
        parse_contract(text, "any.toml")


@given(st.sampled_from(SMALL.split("\n")), st.text(alphabet="[]{}=.\"' abfhilnostx_1", max_size=12))
def test_a_line_replaced_by_anything_is_read_or_refused(line: str, new: str) -> None:
    try:
        contract = parse_contract(SMALL.replace(line, new, 1), "any.toml")
    except ContractFormatError:
        return
    assert contract.name
