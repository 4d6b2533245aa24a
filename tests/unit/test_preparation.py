"""What an executor does before weights are uploaded."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest

from mortice.core.config import ExecutorConfig, ModelConfig, RunConfig
from mortice.core.errors import PluginError
from mortice.core.model.types import ModelFile
from mortice.core.pipeline import Pipeline, prepare
from mortice.core.plugin import registry
from mortice.core.plugin.manager import PluginPolicy
from mortice.core.plugin.registry import Registry
from mortice.core.stages import open_file, wake_executor
from mortice.plugins.executors.reference.executor import ReferenceExecutor
from tests.support.registry import like_reference, make_registry, plugin_of
from tests.support.tiny import tiny


def pipeline_with(folder: Path, **changes: Any) -> Pipeline:
    registry = make_registry({"given": plugin_of(mortice_executors=lambda: [like_reference(**changes)])})
    path = tiny(folder)
    return prepare(RunConfig(model=ModelConfig(path=path), executor=ExecutorConfig(name="mine")), registry)


def test_an_executor_prepares_once_before_it_allocates(tmp_path: Path) -> None:
    calls: list[tuple[str, Any]] = []

    def allocate(executor: ReferenceExecutor, nbytes: int) -> Any:
        calls.append(("allocate", nbytes))
        return ReferenceExecutor.allocate(executor, nbytes)

    def prepared(_: ReferenceExecutor, plan: Any, settings: Any) -> None:
        calls.append(("prepare", (plan, settings)))

    with pipeline_with(tmp_path, prepare=prepared, allocate=allocate) as pipeline:
        assert not calls, "nothing is compiled for a model that is only looked at"
        pipeline.preload()
        pipeline.preload()
        assert calls == [
            ("prepare", (pipeline.plan, pipeline.settings)),
            ("allocate", pipeline.plan.arena_bytes),
        ]


def test_an_executor_is_woken_before_the_file_is_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []

    def opened(registry: Registry, path: Path) -> ModelFile:
        calls.append("open")
        return open_file(registry, path)

    def device(executor: ReferenceExecutor) -> Any:
        calls.append("device")
        return ReferenceExecutor.device(executor)

    monkeypatch.setattr("mortice.core.pipeline.open_file", opened)
    with pipeline_with(tmp_path, wake=lambda _: calls.append("wake"), device=device):
        assert calls[:3] == ["wake", "open", "device"]


def test_an_executor_is_woken_before_plugins_are_asked_for_all_else() -> None:
    calls: list[str] = []
    executor = like_reference(wake=lambda _: calls.append("wake"))

    def contracts() -> list[object]:
        calls.append("contracts")
        return []

    plugin = plugin_of(mortice_arch_contracts=contracts, mortice_executors=lambda: [executor])
    for waking, wanted in (("mine", ["wake", "contracts"]), ("", ["contracts"])):
        made = registry.make_registry(PluginPolicy(entry_points=False), given=[("given", plugin)], waking=waking)
        assert calls == wanted
        wake_executor(made, "mine")
        assert calls.count("wake") == 1, "once, whoever comes first"
        calls.clear()


@pytest.mark.parametrize("preferred", ["first", "second", ""])
def test_of_two_executors_of_a_name_the_preferred_one_is_woken_if_there_is_one(preferred: str) -> None:
    woken: list[str] = []

    def executors(plugin: str) -> object:
        return plugin_of(mortice_executors=lambda: [like_reference(wake=lambda _: woken.append(plugin))])

    given = [(name, executors(name)) for name in ("first", "second")]
    prefer = {"executor:mine": preferred} if preferred else {}
    with nullcontext() if preferred else pytest.raises(PluginError, match="executor:mine is given by"):
        registry.make_registry(PluginPolicy(entry_points=False), given=given, prefer=prefer, waking="mine")
    assert woken == ([preferred] if preferred else [])


def test_an_executor_that_cannot_be_woken_is_named(tmp_path: Path) -> None:
    def refuse(_: ReferenceExecutor) -> None:
        raise RuntimeError("let me sleep")

    with pytest.raises(PluginError, match=r"plugin given.*wake.*let me sleep"):
        pipeline_with(tmp_path, wake=refuse)


def test_what_fails_in_preparation_fails_before_the_upload(tmp_path: Path) -> None:
    def refuse(*_: Any) -> None:
        raise RuntimeError("no compiler")

    allocated: list[int] = []
    with pipeline_with(tmp_path, prepare=refuse, allocate=lambda _, nbytes: allocated.append(nbytes)) as pipeline:
        with pytest.raises(PluginError, match=r"plugin given.*prepare.*no compiler"):
            pipeline.preload()
        assert not allocated


def test_an_executor_need_not_prepare(tmp_path: Path) -> None:
    with pipeline_with(tmp_path) as pipeline:
        assert pipeline.preload() > 0
