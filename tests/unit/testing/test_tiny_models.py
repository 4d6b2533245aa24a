from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mortice.core.errors import ValidationError
from mortice.core.model.qtypes import GGML_TYPES, QType
from mortice.core.stages import open_file, validate_opened
from mortice.core.testing.blocks import encode
from mortice.core.testing.gguf_files import TensorData, write_gguf
from mortice.core.testing.tiny_models import write_tiny_model
from mortice.core.testing.vocabulary import tiny_vocabulary
from mortice.core.text.tokenizer import Tokenizer
from tests.support.tiny import CONTRACTS, FUSED_WITH_BIAS_AND_NORM, QTYPES, REGISTRY, logits, tiny

LLAMA = CONTRACTS["llama"]


@pytest.mark.parametrize("arch", sorted(CONTRACTS))
def test_a_tiny_model_fits_its_contract_and_has_a_clear_best_token(arch: str, tmp_path: Path) -> None:
    path = tiny(tmp_path, arch)
    with open_file(REGISTRY, path) as file:
        assert validate_opened(REGISTRY, file, None).ok
    found = logits(path)
    assert 2 < found.std() < 5
    assert len(set(found.argmax(axis=1).tolist())) > 20


def test_the_same_arguments_give_the_same_file_and_another_seed_another(tmp_path: Path) -> None:
    one, two, three = (write_tiny_model(tmp_path / f"{n}.gguf", LLAMA, seed=seed) for n, seed in enumerate((1, 1, 2)))
    assert one.read_bytes() == two.read_bytes() != three.read_bytes()


def test_optional_roles_are_written_when_asked_for_and_a_fused_tensor_replaces_its_parts(tmp_path: Path) -> None:
    path = tiny(tmp_path, FUSED_WITH_BIAS_AND_NORM, include=["attn_qkv", "attn_qkv_bias"], tied=False)
    with open_file(REGISTRY, path) as file:
        assert file.tensors["blk.0.attn_qkv.weight"].shape == (128, 64)
        assert "output.weight" in file.tensors
        assert "blk.0.attn_q.weight" not in file.tensors


def test_sizes_that_differ_from_layer_to_layer_are_refused_where_the_contract_wants_one(tmp_path: Path) -> None:
    with pytest.raises(ValidationError, match="feed_forward_length"):
        tiny(tmp_path, sizes={"ffn_size": [64, 96]})


def test_what_does_not_exist_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"include: .*attn_r"):
        tiny(tmp_path, include=["attn_r"])
    with pytest.raises(ValueError, match=r"sizes: .*heads"):
        tiny(tmp_path, sizes={"heads": 3})
    with pytest.raises(ValueError, match=r"'Q9_Z'.*encoder"):
        tiny(tmp_path, qtypes="Q9_Z")
    with pytest.raises(ValueError, match=r"blk\.0\.attn_q\.weight: Q4_K rows"):
        tiny(tmp_path, qtypes={"attn_q": "Q4_K"})


def test_a_type_of_a_plugin_is_written_with_its_own_encoder(tmp_path: Path) -> None:
    ours = QType(7000, "MINE", 4, 1)
    path = tmp_path / "m.gguf"

    def encoder(values: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        return rng.integers(0, 256, (len(values), values.shape[1] // 4), np.uint8)

    write_tiny_model(path, LLAMA, qtypes={"ffn_up": ours}, encoders={"MINE": encoder})
    assert path.read_bytes().count((7000).to_bytes(4, "little")) >= 2


@pytest.mark.parametrize("name", sorted(QTYPES))
def test_blocks_of_every_weight_type_have_the_spread_asked_for(name: str) -> None:
    rng = np.random.default_rng(0)
    values = rng.standard_normal((64, 512), np.float32) * np.float32(0.05)
    data = encode(values, QTYPES[name].qtype, rng)
    assert data.shape == (64, QTYPES[name].qtype.row_bytes(512))
    found = QTYPES[name].dequantize(data)
    assert found.std() == pytest.approx(0.05, rel=0.15)
    assert abs(found.mean()) < 0.005


def test_the_vocabulary_encodes_any_text_and_uses_its_merges() -> None:
    tokenizer = Tokenizer.from_metadata(tiny_vocabulary())
    assert tokenizer.vocab_size == 512
    for text in ("the tenon is made to fit", "Größe 東京 🙂 \x00"):
        assert tokenizer.decode(tokenizer.encode(text)) == text
    assert len(tokenizer.encode("the tenon is made to fit")) < 15
    with pytest.raises(ValueError, match="261 to 600"):
        tiny_vocabulary(100)


def test_every_kind_of_metadata_value_is_read_back_as_it_was_written(tmp_path: Path) -> None:
    metadata: dict[str, Any] = {
        "a.flag": True,
        "a.count": 3,
        "a.debt": -3,
        "a.ratio": 0.5,
        "a.text": "ü",
        "a.texts": ["x", "yy"],
        "a.numbers": np.array([1, -2], np.int16),
        "a.ratios": np.array([0.25], np.float64),
    }
    tensor = TensorData.f32("t", np.arange(6, dtype=np.float32).reshape(2, 3))
    with open_file(REGISTRY, write_gguf(tmp_path / "m.gguf", "toy", metadata, [tensor])) as file:
        assert file.architecture == "toy"
        for key, value in metadata.items():
            found: Any = file.metadata[key]
            assert type(found) is type(value) or key == "a.texts"
            assert list(found) == list(value) if hasattr(value, "__len__") else found == value
        assert (file.tensors["t"].shape, file.tensors["t"].qtype) == ((2, 3), GGML_TYPES[0])
        assert file.tensors["t"].data.tobytes() == tensor.data.tobytes()
