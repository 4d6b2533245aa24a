"""Linear maps of one input whose weights are of different types: different tiles, integer and float products."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest

from mortice.core.model.qtypes import GGML_TYPES
from mortice.core.testing.tiny_models import write_tiny_model
from mortice.plugins.executors.cuda.lowering.layouts import tile_geometry
from tests.gpu.test_executor import EXACT, ROUNDED, error, load, prompt
from tests.support.cuda import needs_gpu
from tests.support.tiny import CONTRACTS

pytestmark = [pytest.mark.gpu, needs_gpu]

SIZES = {"hidden_size": 4864, "num_heads": 2, "num_kv_heads": 1, "head_dim": 64, "ffn_size": 256, "num_layers": 1}
"""A width at which types with blocks of 256 lie in tiles of four rows, the others in tiles of two."""

MIXES: Mapping[str, Mapping[str, str]] = {
    "a taller gate": {"ffn_gate": "Q4_K", "ffn_up": "Q8_0"},
    "a taller up": {"ffn_gate": "Q5_1", "ffn_up": "Q6_K"},
    "a float gate": {"ffn_gate": "F16", "ffn_up": "IQ4_XS"},
    "q, k and v": {"attn_q": "Q4_K", "attn_k": "Q5_0", "attn_v": "BF16"},
}


def tile_rows(name: str, rows: int, columns: int) -> int:
    qtype = next(qtype for qtype in GGML_TYPES.values() if qtype.name == name)
    return tile_geometry(qtype, rows, columns).tile_rows


@pytest.mark.parametrize("mix", MIXES)
@pytest.mark.parametrize("exact", [True, False], ids=["f32", "int8"])
def test_types_of_one_input_may_differ(mix: str, exact: bool, tmp_path: Path) -> None:
    types = MIXES[mix]
    assert len({tile_rows(name, SIZES["ffn_size"], SIZES["hidden_size"]) for name in types.values()}) == 2
    qtypes = {"default": "Q8_0", **types}
    path = write_tiny_model(tmp_path / "model.gguf", CONTRACTS["qwen3"], qtypes=qtypes, sizes=SIZES)
    with load(path, "reference", exact=exact) as reference, load(path, "cuda", exact=exact) as cuda:
        ids = prompt(reference, 11)
        wanted = reference.logits(ids)
        assert error(cuda.logits(ids), wanted) < (EXACT if exact else ROUNDED)
        with cuda.session() as session:
            for position, token in enumerate(ids):
                assert error(session.feed([token])[0], wanted[position]) < (EXACT if exact else ROUNDED), position
