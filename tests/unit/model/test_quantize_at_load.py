"""Matrices quantised as they are read: which, in what pieces, and what is said of it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from mortice.core.config import ModelConfig, RunConfig
from mortice.core.errors import ConfigError, ModelFileError, PluginError
from mortice.core.model.quantize_at_load import quantized
from mortice.core.model.types import ModelFile
from mortice.core.pipeline import prepare
from mortice.core.stages import open_file, quantize_opened
from tests.support.in_memory import PATH, model_file, view
from tests.support.resources import open_files
from tests.support.tiny import QTYPES, REGISTRY, tiny

WIDE = np.random.default_rng(1).standard_normal((6, 64)).astype(np.float32)


def file_of(**arrays: np.ndarray) -> ModelFile:
    return model_file({}, {name.replace("__", "."): values for name, values in arrays.items()})


def test_matrices_become_blocks_and_nothing_else_does() -> None:
    file = file_of(
        token_embd__weight=WIDE,
        output_norm__weight=WIDE[0],
        layer_norm__weight=WIDE,
        position_embd__weight=WIDE,
        table=WIDE,
    )
    found = quantize_opened(REGISTRY, file, "Q8_0")
    assert {name for name, tensor in found.tensors.items() if tensor.make is not None} == {"token_embd.weight"}
    tensor = found.tensors["token_embd.weight"]
    assert (tensor.qtype.name, tensor.shape, tensor.nbytes) == ("Q8_0", (6, 64), 6 * 68)
    quantize = QTYPES["Q8_0"].quantize
    assert quantize is not None
    assert np.array_equal(tensor.row_bytes(2, 5), quantize(WIDE[2:5]))


def test_rows_that_are_no_whole_blocks_stay_and_a_note_says_so() -> None:
    narrow = np.ones((4, 40), np.float32)
    found = quantize_opened(REGISTRY, file_of(a__weight=WIDE, b__weight=narrow), "Q4_0")
    assert found.tensors["b.weight"].qtype.name == "F32"
    done, kept = found.notes
    assert (kept.rule, kept.subject) == ("quantize.kept", "b.weight")
    assert kept.found == "rows of 40 elements, stays F32"
    assert done.found.startswith("1 matrix becomes Q4_0")


def test_a_file_that_is_quantised_already_stays_with_a_warning(tmp_path: Path) -> None:
    with open_file(REGISTRY, tiny(tmp_path, qtypes="Q8_0", sizes={"hidden_size": 64, "ffn_size": 128})) as file:
        (note,) = quantize_opened(REGISTRY, file, "Q4_0").notes
    assert (note.severity, note.wanted) == ("warning", "nothing is quantised")


def test_none_gives_the_file_itself() -> None:
    file = file_of(a__weight=WIDE)
    assert quantize_opened(REGISTRY, file, "none") is file


def test_a_type_that_nothing_quantises_to_is_refused(tmp_path: Path) -> None:
    config = RunConfig(model=ModelConfig(path=tiny(tmp_path), quantize="Q4_K"))
    with pytest.raises(ConfigError, match=r"^model.quantize: unknown 'Q4_K'; have none, Q4_0, Q8_0$"):
        prepare(config)
    assert open_files(tmp_path) == 0


def test_values_that_cannot_be_held_name_tensor_and_rows() -> None:
    bad = WIDE.copy()
    bad[4, 7] = np.inf
    found = quantize_opened(REGISTRY, file_of(a__weight=bad), "Q8_0")
    found.tensors["a.weight"].row_bytes(0, 4)
    wanted = f"^{PATH}: tensor a.weight, rows 3 to 5: found a value that is not finite .*; Q8_0 cannot hold it$"
    with pytest.raises(ModelFileError, match=wanted):
        found.tensors["a.weight"].row_bytes(3, 6)


def test_what_expanding_takes_does_not_grow_with_the_rows_asked_for() -> None:
    seen: list[int] = []
    quantize = QTYPES["Q8_0"].quantize
    assert quantize is not None

    def watched(values: np.ndarray) -> np.ndarray:
        seen.append(values.size)
        return quantize(values)

    big = view("a.weight", np.ones((96, 1 << 15), np.float32))
    file = model_file({}, {})
    file.tensors = {"a.weight": big}
    found = quantized(file, QTYPES["Q8_0"].qtype, watched, {"F32": QTYPES["F32"].dequantize})
    found.tensors["a.weight"].row_bytes(0, 96)
    assert max(seen) == 1 << 20
    assert sum(seen) == 96 << 15


def test_a_plugin_that_quantises_to_something_else_is_named() -> None:
    found = quantized(
        file_of(a__weight=WIDE),
        QTYPES["Q8_0"].qtype,
        lambda values: np.zeros((len(values), 3), np.uint8),
        {"F32": QTYPES["F32"].dequantize},
    )
    with pytest.raises(PluginError, match=r"^Q8_0: its quantize gave uint8 \(6, 3\), wanted uint8 \(6, 68\)$"):
        found.tensors["a.weight"].row_bytes(0, 6)


def test_closing_closes_the_file_behind_it(tmp_path: Path) -> None:
    found = quantize_opened(REGISTRY, open_file(REGISTRY, tiny(tmp_path)), "Q8_0")
    assert any(tensor.make is not None for tensor in found.tensors.values())
    found.close()
    assert found.tensors == {}
    assert open_files(tmp_path) == 0
