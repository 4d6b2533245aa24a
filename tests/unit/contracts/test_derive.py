"""A contract drafted from a file: equivalent where the file says all, and open where it does not."""

from __future__ import annotations

import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from attrs import evolve

from mortice.arch_contracts.schema import Contract, ContractFormatError, parse_contract
from mortice.core.contracts.derive import Draft, derive_contract
from mortice.core.contracts.listing import program_listing
from mortice.core.errors import UnsupportedError
from mortice.core.model.types import ModelFile, TensorView
from mortice.core.model.validation import validate
from mortice.core.stages import open_file
from mortice.core.testing.tiny_models import write_tiny_model
from tests.support.in_memory import model_file
from tests.support.tiny import CONTRACTS, FUSED_WITH_BIAS_AND_NORM, REGISTRY, logits, program_of

OPEN = {"rope.style", "ffn.activation"}
"""What no GGUF file says."""

VARIANTS: list[tuple[str, dict[str, Any]]] = [
    ("llama", {}),
    ("llama", {"tied": False}),
    ("llama", {"include": ["rope_freqs", "attn_q_bias", "attn_k_bias", "attn_v_bias", "attn_output_bias"]}),
    ("llama", {"sizes": {"num_kv_heads": 4, "rope_dim": 8, "rope_freq_base": 5e5}}),
    ("qwen2", {}),
    ("qwen2", {"tied": False}),
    ("qwen3", {}),
    ("qwen3", {"sizes": {"head_dim": 32}}),
]


def renamed(contract: Contract) -> Contract:
    """The same family under a name that nobody knows."""
    return evolve(contract, name="newfam", architectures=("newfam",))


def drafted(path: Path, like: Contract | None = None) -> Draft:
    with open_file(REGISTRY, path) as file:
        return derive_contract(file, like=like)


def changed(path: Path, metadata: Mapping[str, Any], drop: tuple[str, ...] = ()) -> Draft:
    """The draft of a file with other keys (None takes one away) and without some tensors."""
    with open_file(REGISTRY, path) as file:
        keys = {key: value for key, value in {**file.metadata, **metadata}.items() if value is not None}
        tensors: dict[str, TensorView] = {name: view for name, view in file.tensors.items() if name not in drop}
        return derive_contract(ModelFile(**_parts(file, keys, tensors)))


def _parts(file: ModelFile, keys: dict[str, Any], tensors: dict[str, TensorView]) -> dict[str, Any]:
    return {
        "path": file.path,
        "format": file.format,
        "version": file.version,
        "metadata": keys,
        "tensors": tensors,
        "files": file.files,
    }


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A llama under a name that nobody knows."""
    return write_tiny_model(tmp_path / "new.gguf", renamed(CONTRACTS["llama"]), sizes={"rope_freq_base": 1e4})


@pytest.mark.parametrize(("family", "arguments"), VARIANTS)
def test_a_draft_of_a_known_family_computes_the_same(tmp_path: Path, family: str, arguments: dict[str, Any]) -> None:
    known = renamed(CONTRACTS[family])
    path = write_tiny_model(tmp_path / "new.gguf", known, **arguments)
    draft = drafted(path, like=CONTRACTS[family])
    assert draft.unknown == {}
    assert draft.remarks == ()
    contract = parse_contract(draft.text("new.gguf"), "newfam.toml")
    with open_file(REGISTRY, path) as file:
        report = validate(file, contract)
        assert report.findings.items == ()
    assert program_listing(program_of(path, contract)) == program_listing(program_of(path, known))
    np.testing.assert_array_equal(logits(path, contract), logits(path, known))


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_only_what_no_file_says_is_open_and_the_draft_cannot_be_read_before_it_is_filled_in(
    tmp_path: Path, family: str
) -> None:
    draft = drafted(write_tiny_model(tmp_path / "new.gguf", renamed(CONTRACTS[family])))
    assert draft.unknown.keys() == OPEN
    text = draft.text("new.gguf")
    with pytest.raises(ContractFormatError) as caught:
        parse_contract(text, "new.toml")
    assert {line.split(": ")[1] for line in str(caught.value).splitlines()} == OPEN
    filled = text.replace('style = "?"', f'style = "{CONTRACTS[family].rope.style}"')  # type: ignore[union-attr]
    contract = parse_contract(filled.replace('activation = "?"', 'activation = "silu"'), "new.toml")
    assert contract.attention == CONTRACTS[family].attention
    assert contract.norm == CONTRACTS[family].norm


def test_a_fused_weight_is_split_in_the_usual_order_with_a_mark(tmp_path: Path) -> None:
    known = renamed(FUSED_WITH_BIAS_AND_NORM)
    path = write_tiny_model(tmp_path / "f.gguf", known, include=["attn_qkv", "attn_qkv_bias"])
    draft = drafted(path, like=FUSED_WITH_BIAS_AND_NORM)
    assert "unknown: the order of the parts" in draft.notes["roles.layer.attn_qkv"]
    contract = parse_contract(draft.text("f.gguf"), "f.toml")
    np.testing.assert_array_equal(logits(path, contract), logits(path, known))


@pytest.mark.parametrize("family", ["phi3", "olmo2", "granite", "starcoder2", "stablelm"])
def test_other_families_are_drafted_with_every_weight_in_its_role(tmp_path: Path, family: str) -> None:
    if family not in CONTRACTS:
        pytest.skip(f"no contract {family}")
    known = renamed(CONTRACTS[family])
    path = write_tiny_model(tmp_path / "new.gguf", known)
    draft = drafted(path, like=CONTRACTS[family])
    with open_file(REGISTRY, path) as file:
        rules = {finding.rule for finding in validate(file, draft.contract).findings.errors}
    assert not {rule for rule in rules if rule.startswith(("role.", "tensor."))}
    assert draft.contract.norm.placement == known.norm.placement
    assert draft.contract.norm.type == known.norm.type
    assert draft.contract.ffn == known.ffn
    if "attn_q_norm" in draft.contract.layer_roles:
        assert draft.contract.attention.qk_norm == known.attention.qk_norm
    else:
        assert draft.contract.attention.qk_norm == "none"


def test_a_file_without_any_key_of_rope_may_have_none(tmp_path: Path) -> None:
    path = write_tiny_model(tmp_path / "new.gguf", renamed(CONTRACTS["llama"]))
    assert any("no key speaks of RoPE" in remark for remark in drafted(path).remarks)
    assert drafted(path, like=CONTRACTS["llama"]).remarks == ()
    assert drafted(path, like=evolve(CONTRACTS["llama"], rope=None)).contract.rope is None


def test_a_tensor_that_no_role_is_named_after_is_remarked_on(path: Path) -> None:
    with open_file(REGISTRY, path) as file:
        view = file.tensors["blk.0.attn_q.weight"]
        extra = TensorView(
            name="blk.0.attn_magic.weight", shape=view.shape, qtype=view.qtype, data=view.data, offset=0, path=path
        )
        draft = derive_contract(ModelFile(**_parts(file, dict(file.metadata), {**file.tensors, extra.name: extra})))
    (remark,) = draft.remarks
    assert remark.startswith("unknown: blk.0.attn_magic.weight: no role in contract newfam")
    assert f"# {remark}\n" in draft.text("x")


def test_a_key_that_may_change_the_maths_is_remarked_on(path: Path) -> None:
    (remark,) = changed(path, {"newfam.expert_count": 8}).remarks
    assert remark == (
        "unknown: newfam.expert_count: 8, not read by contract newfam; a mixture of experts; "
        "leaving it out would change the result"
    )


def test_numbers_whose_keys_are_missing_follow_from_shapes_or_stay_open(path: Path) -> None:
    draft = changed(path, {"newfam.feed_forward_length": None, "newfam.context_length": None})
    assert draft.contract.hyperparameters["ffn_size"].default is not None
    assert "128 follows from the tensors" in draft.notes["hyperparameters.ffn_size"]
    assert draft.unknown.keys() == OPEN | {"hyperparameters.context_length"}
    assert 'default = "?"' in draft.text("x")


def test_a_missing_epsilon_stays_open(path: Path) -> None:
    draft = changed(path, {"newfam.attention.layer_norm_rms_epsilon": None})
    assert draft.unknown.keys() == OPEN | {"norm.eps", "norm.type"}


def test_what_multiplies_logits_stays_open_for_families_differ(path: Path) -> None:
    draft = changed(path, {"newfam.logit_scale": 4.0})
    assert "multiply or divide" in draft.unknown["output.scale"]


def test_caps_scales_and_windows_are_read_from_their_keys(path: Path) -> None:
    keys = {"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0, "attention.scale": 0.5}
    keys |= {"residual_scale": 0.2, "embedding_scale": 12.0, "attention.sliding_window": 64}
    draft = changed(path, {f"newfam.{key}": value for key, value in keys.items()})
    assert draft.remarks == ()
    contract = draft.contract
    assert contract.attention.softcap.text == "attention_softcap"
    assert contract.output.softcap.text == "output_softcap"
    assert (contract.residual.scale.text, contract.embedding.scale.text) == ("residual_scale", "embedding_scale")
    assert "which layers" in draft.notes["attention.sliding_window"]


def test_an_ffn_without_a_norm_beside_attention_is_parallel(path: Path) -> None:
    draft = changed(path, {}, drop=tuple(f"blk.{layer}.ffn_norm.weight" for layer in range(2)))
    assert draft.contract.residual.parallel.text == "1"


def test_a_weight_that_some_layers_lack_is_marked(path: Path) -> None:
    draft = changed(path, {}, drop=("blk.1.ffn_norm.weight",))
    assert draft.notes["roles.layer.ffn_norm"] == "unknown: 1 of 2 layers have it"


def test_layers_beyond_the_count_do_not_stop_a_draft(path: Path) -> None:
    draft = changed(path, {"newfam.block_count": 1})
    assert any("blk.1." in remark for remark in draft.remarks)


@pytest.mark.parametrize("broken", [{}, {"general.architecture": "x"}, {"general.architecture": ""}])
def test_a_file_that_is_no_model_of_text_is_refused(broken: dict[str, Any]) -> None:
    with pytest.raises(UnsupportedError, match="missing"):
        derive_contract(model_file(broken, {}))


def test_a_draft_of_a_damaged_file_can_be_read_or_names_all_that_is_open(tmp_path: Path) -> None:
    rng = random.Random(1)
    values = [0, -1, 2**63, 1.5, float("nan"), "x", True, np.array([], np.int32), np.array([1, 2], np.int32), ["a"]]
    path = write_tiny_model(tmp_path / "new.gguf", renamed(CONTRACTS["qwen3"]), sizes={"rope_freq_base": 1e4})
    with open_file(REGISTRY, path) as file:
        keys = [key for key in file.metadata if key.startswith("newfam.")] + ["newfam.logit_scale"]
        for _ in range(40):
            metadata = {**file.metadata, **{rng.choice(keys): rng.choice(values) for _ in range(2)}}
            metadata.pop(rng.choice(keys), None)
            tensors = dict(file.tensors)
            for name in rng.sample(sorted(tensors), 2):
                tensors.pop(name)
            try:
                draft = derive_contract(ModelFile(**_parts(file, metadata, tensors)))
            except UnsupportedError:
                continue
            with pytest.raises(ContractFormatError) as caught:
                parse_contract(draft.text("x"), "x.toml")
            refused = {line.split(": ")[1].removesuffix(".default") for line in str(caught.value).splitlines()}
            assert refused <= draft.unknown.keys()


def test_names_from_a_file_cannot_leave_their_comment(path: Path) -> None:
    draft = changed(path, {"newfam.\nx = 1": 2})
    assert draft.remarks
    assert "\nx = 1" not in draft.text("a\nb = 2")
    assert "\nb = 2" not in draft.text("a\nb = 2")
