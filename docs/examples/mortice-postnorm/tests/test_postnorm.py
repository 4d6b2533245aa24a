"""Runs with mortice and this package installed; llama.cpp knows the family as ``olmo2``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from mortice_postnorm.plugin import mortice_arch_contracts
from numpy.typing import NDArray

import mortice
from mortice.core.testing.contract_suite import ContractSuite
from mortice.core.testing.llamacpp import difference_from_llamacpp, llamacpp_logits, under_architecture
from mortice.core.testing.tiny_models import write_tiny_model

(CONTRACT,) = mortice_arch_contracts()
IDS = [7, 301, 12, 12, 450, 3, 77, 128] * 8


class TestConformance(ContractSuite):
    """Complete, consistent, every role used; the reference executor runs it, and llama.cpp agrees."""

    contract = CONTRACT

    @staticmethod
    def oracle(path: Path, token_ids: Sequence[int]) -> NDArray[np.float32]:
        return llamacpp_logits(under_architecture(path, "olmo2"), token_ids)


@pytest.mark.parametrize(
    "arguments",
    [{}, {"sizes": {"num_heads": 8, "num_kv_heads": 1}}, {"gains": {"attn_q_norm": 2.0, "post_ffw_norm": 0.5}}],
    ids=["plain", "one KV head", "other norms"],
)
def test_log_probabilities_are_those_of_llamacpp(arguments: dict[str, Any], tmp_path: Path) -> None:
    path = write_tiny_model(tmp_path / "model.gguf", CONTRACT, **arguments)
    found = difference_from_llamacpp(path, IDS, under_architecture(path, "olmo2"))
    assert found.mean <= 1e-3
    assert found.worst <= 1e-2


def test_a_norm_before_a_block_is_refused(tmp_path: Path) -> None:
    write_tiny_model(tmp_path / "model.gguf", CONTRACT)
    name = b"blk.0.post_attention_norm"
    other = (tmp_path / "model.gguf").read_bytes().replace(name, b"blk.0.attn_norm_of_before")
    (tmp_path / "other.gguf").write_bytes(other)
    found = {(item.rule, item.subject) for item in mortice.validate(tmp_path / "other.gguf").findings.errors}
    assert found == {
        ("role.missing", "blk.0.post_attention_norm.weight"),
        ("tensor.unclaimed", "blk.0.attn_norm_of_before.weight"),
    }


def test_it_stands_beside_the_built_in_family(tmp_path: Path) -> None:
    path = write_tiny_model(tmp_path / "model.gguf", CONTRACT)
    assert mortice.validate(path).contract.name == "postnorm"
    assert mortice.validate(under_architecture(path, "olmo2")).contract.name == "olmo2"
