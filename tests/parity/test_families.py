"""Every built-in contract through the conformance suite, llama.cpp as the oracle, in every kind of file it allows."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import MappingProxyType

import numpy as np
import pytest
from numpy.typing import NDArray

from mortice.core.testing.contract_suite import ContractSuite
from mortice.core.testing.llamacpp import llamacpp_logits
from tests.support.tiny import CONTRACTS

pytest.importorskip("xllamacpp", reason="xllamacpp, llama.cpp on the CPU, is not installed")


class Family(ContractSuite):
    metadata = MappingProxyType(
        {"general.name": "tiny"}
    )  # llama.cpp looks for </s> in the vocabulary of a model called phi3

    @staticmethod
    def oracle(path: Path, token_ids: Sequence[int]) -> NDArray[np.float32]:
        return llamacpp_logits(path, token_ids)


class TestGranite(Family):
    contract = CONTRACTS["granite"]
    sizes = MappingProxyType(
        {"embedding_scale": 12.0, "residual_scale": 0.22, "attention_scale": 0.1, "logit_scale": 2.0}
    )


class TestLlama(Family):
    contract = CONTRACTS["llama"]


class TestMistral(Family):
    contract = CONTRACTS["mistral"]
    sizes = MappingProxyType({"temperature": 0.5, "original_context": 3})


class TestOlmo2(Family):
    contract = CONTRACTS["olmo2"]
    sizes = MappingProxyType({"window": 4})
    own_head_dim = False


class TestPhi3(Family):
    contract = CONTRACTS["phi3"]
    sizes = MappingProxyType({"rope_dim": 12})
    own_head_dim = False


class TestQwen2(Family):
    contract = CONTRACTS["qwen2"]
    own_head_dim = False


class TestQwen3(Family):
    contract = CONTRACTS["qwen3"]


class TestStablelm(Family):
    contract = CONTRACTS["stablelm"]
    sizes = MappingProxyType({"rope_dim": 4})
    own_head_dim = False


class TestStarcoder2(Family):
    contract = CONTRACTS["starcoder2"]
    own_head_dim = False


def test_every_family_is_here() -> None:
    assert {suite.contract.name for suite in Family.__subclasses__()} == set(CONTRACTS)
