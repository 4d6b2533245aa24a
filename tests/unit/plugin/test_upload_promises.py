"""An upload strategy that breaks its promise is the one that is named, not the executor that comes after it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mortice.core.config import ExecutorConfig, ModelConfig, RunConfig, UploadConfig
from mortice.core.errors import PluginError
from mortice.core.model.residency import ResidentWeights
from mortice.core.pipeline import Pipeline, prepare
from tests.support.registry import Upload, make_registry, plugin_of
from tests.support.tiny import tiny


def mark_all(resident: ResidentWeights) -> None:
    for index, _ in list(resident.missing()):
        resident.mark(index)


def mark_all_but_two(resident: ResidentWeights) -> None:
    for index, _ in list(resident.missing())[:-2]:
        resident.mark(index)


def pipeline_with(folder: Path, doing: Callable[[ResidentWeights], None], returned: object) -> Pipeline:
    """A tiny model whose strategy does that to the weights, writes nothing, and returns `returned`."""

    def upload(_: object, resident: ResidentWeights, emit: object) -> Any:
        doing(resident)
        return returned

    strategy = type("Promising", (Upload,), {"upload": upload})()
    registry = make_registry({"acme": plugin_of(mortice_upload_strategies=lambda: [strategy])})
    config = RunConfig(
        model=ModelConfig(path=tiny(folder)),
        executor=ExecutorConfig(name="reference"),
        upload=UploadConfig(strategy="teleport"),
    )
    return prepare(config, registry)


@pytest.mark.parametrize(
    ("doing", "message"),
    [
        (
            lambda resident: None,
            r"20 of 20 weights not marked as resident when upload returned, the first is token_embd",
        ),
        (mark_all_but_two, r"2 of 20 weights not marked as resident when upload returned, the first is "),
    ],
)
def test_a_strategy_that_leaves_weights_out_is_named_with_the_first_of_them(
    tmp_path: Path, doing: Callable[[ResidentWeights], None], message: str
) -> None:
    with pipeline_with(tmp_path, doing, 0) as pipeline:
        with pytest.raises(
            PluginError, match=rf"^plugin acme \(given\): upload strategy 'teleport': {message}"
        ) as caught:
            pipeline.preload()
        assert not getattr(caught.value, "__notes__", []), "the plugin is in the message already"


@pytest.mark.parametrize("returned", ["many", None, 1.5, -1, True])
def test_a_strategy_that_gives_no_number_of_bytes_is_named(tmp_path: Path, returned: object) -> None:
    wanted = f"upload returned {returned!r}, wanted the number of bytes it wrote, an int"
    with pipeline_with(tmp_path, mark_all, returned) as pipeline:
        with pytest.raises(PluginError) as caught:
            pipeline.preload()
        assert str(caught.value) == f"plugin acme (given): upload strategy 'teleport': {wanted}"


@pytest.mark.parametrize("index", [20, -1, "token_embd.weight"])
def test_a_weight_that_the_plan_does_not_have_cannot_be_marked(tmp_path: Path, index: Any) -> None:
    with (
        pipeline_with(tmp_path, lambda resident: resident.mark(index), 0) as pipeline,
        pytest.raises(PluginError, match=r"^plugin acme \(given\): upload: IndexError: mark: there is no weight "),
    ):
        pipeline.preload()


def test_a_strategy_that_keeps_its_promise_may_write_nothing(tmp_path: Path) -> None:
    with pipeline_with(tmp_path, mark_all, 0) as pipeline:
        assert pipeline.preload() == 0
        assert pipeline.upload.name == "teleport"
