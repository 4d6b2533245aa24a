"""Every hook has documentation, a worked example and tests; what the documentation shows is true."""

from __future__ import annotations

import ast
import inspect
import pydoc
import re
import sys
import textwrap
import tomllib
from collections import defaultdict
from importlib import resources
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest.mock import MagicMock

import cattrs
import numpy as np
import pytest

from mortice.arch_contracts.schema import builtin_contracts, parse_contract
from mortice.core.config import PluginsConfig
from mortice.core.model.findings import Finding
from mortice.core.model.qtypes import QType
from mortice.core.model.types import DeviceInfo, LoadOptions
from mortice.core.model.weight_plan import Kernel
from mortice.core.plugin import events
from mortice.core.plugin.events import Event, StepDone
from mortice.core.plugin.hookspecs import HookSpecs, hookimpl
from mortice.core.plugin.interfaces import QuantizationType
from tests.packaging.running import ROOT
from tests.support.registry import SomeLayout, Upload, like_reference, make_registry, model_file

HOOKS = [name for name in vars(HookSpecs) if name.startswith("mortice_")]
REFERENCE = (ROOT / "docs" / "reference" / "hooks.md").read_text(encoding="utf-8")
HOW_TO = (ROOT / "docs" / "how-to" / "write-a-plugin.md").read_text(encoding="utf-8")
TOY = ROOT / "tests" / "plugins" / "external" / "toy"
CPU = DeviceInfo(kind="cpu", name="a CPU", total_bytes=1, free_bytes=1)


def arguments_of(hook: str) -> list[str]:
    return [name for name in inspect.signature(getattr(HookSpecs, hook)).parameters if name != "self"]


def blocks(text: str, language: str, title: str = "") -> list[str]:
    """Contents of the fenced blocks of a language that have `title`, or none."""
    opening = re.escape(f'```{language} title="{title}"' if title else f"```{language}")
    return re.findall(rf"^{opening}\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)


# the hook reference ------------------------------------------------------------------------------------------------


def test_every_hook_is_documented_under_its_signature() -> None:
    wanted = [f"## {hook}({', '.join(arguments_of(hook))})" for hook in HOOKS]
    assert re.findall(r"^## mortice_.*$", REFERENCE, re.MULTILINE) == wanted
    for heading, hook in zip(wanted, HOOKS, strict=True):
        assert f"{heading}\n\n::: mortice.core.plugin.hookspecs.HookSpecs.{hook}\n" in REFERENCE


@pytest.mark.parametrize("hook", HOOKS)
def test_a_hooks_docstring_says_when_with_what_and_what_to_return_and_shows_an_example(hook: str) -> None:
    text = inspect.getdoc(getattr(HookSpecs, hook)) or ""
    for part in ("\nCalled ", "\nReturns:\n", "\nExample::\n"):
        assert part in text
    for argument in arguments_of(hook):
        assert f"\n    {argument}: " in text


def test_every_hook_has_tests() -> None:
    tree = ast.parse(Path(__file__).with_name("test_hooks.py").read_text(encoding="utf-8"))
    tests = [node.name for node in tree.body if isinstance(node, ast.FunctionDef)]
    lacking = [hook for hook in HOOKS if not any(name.startswith(f"test_{hook}_") for name in tests)]
    assert not lacking, "write a test named test_HOOK_… for each of these"


def test_everything_the_reference_renders_exists() -> None:
    rendered = re.findall(r"^::: (\S+)$", REFERENCE, re.MULTILINE)
    assert len(rendered) > len(HOOKS)
    assert [dotted for dotted in rendered if pydoc.locate(dotted) is None] == []


def test_the_version_in_the_reference_is_that_of_the_hooks() -> None:
    from mortice.core.plugin.hookspecs import CONTRACT_VERSION

    assert f"`mortice_contract_version = {CONTRACT_VERSION}`" in REFERENCE


def test_every_event_is_exported_and_documented() -> None:
    found = {name for name, value in vars(events).items() if isinstance(value, type) and issubclass(value, Event)}
    assert found == set(events.__all__)
    assert all(getattr(events, name).__doc__ for name in found)


# the examples of the hooks -----------------------------------------------------------------------------------------


def example(hook: str) -> str:
    text = inspect.getdoc(getattr(HookSpecs, hook)) or ""
    return textwrap.dedent(text.partition("Example::\n")[2])


@pytest.fixture
def registry_of(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """Make a registry with the example of a hook as the plugin ``mine``; what the examples leave out is here."""
    package = tmp_path / "my_package"
    package.mkdir()
    (package / "__init__.py").write_text("")
    text = resources.files("mortice.arch_contracts").joinpath("llama.toml").read_text(encoding="utf-8")
    (package / "acme.toml").write_text(text.replace('"llama"', '"acme"'))
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "my_package", raising=False)

    def make(hook: str, **more: object) -> Any:
        module = ModuleType("example")
        names: dict[str, object] = {
            "DirectStorageUpload": Upload,
            "Finding": Finding,
            "Kernel": Kernel,
            "QType": QType,
            "QuantizationType": QuantizationType,
            "StepDone": StepDone,
            "TernaryPlanes": SomeLayout,
            "TorchExecutor": like_reference,
            "hookimpl": hookimpl,
            "open_npz": lambda path, qtypes: model_file(path, format_name="npz"),
            "parse_contract": parse_contract,
            "resources": resources,
            "ternary_to_float32": lambda rows: np.zeros((len(rows), 64), np.float32),
        }
        vars(module).update(names, **more)
        exec(compile(example(hook), f"<example of {hook}>", "exec"), vars(module))
        return make_registry({"mine": module})

    return make


def test_the_example_of_open_model(registry_of: Any, tmp_path: Path) -> None:
    (tmp_path / "model.npz").write_bytes(b"")
    (tmp_path / "model.gguf").write_bytes(b"")
    registry = registry_of("mortice_open_model")
    assert registry.open_model(tmp_path / "model.npz").loader == "mine"
    assert dict(registry.manager.call("mortice_open_model", only="mine", path=tmp_path, options=LoadOptions())) == {
        "mine": None
    }


def test_the_example_of_arch_contracts(registry_of: Any) -> None:
    assert registry_of("mortice_arch_contracts").contracts["acme"].plugin == "mine"


def test_the_example_of_qtypes(registry_of: Any) -> None:
    assert registry_of("mortice_qtypes").qtypes["TERNARY"].plugin == "mine"


def test_the_example_of_kernels(registry_of: Any) -> None:
    registry = registry_of("mortice_kernels")
    executor = registry.executor("reference")
    cuda = DeviceInfo(kind="cuda", name="a GPU", total_bytes=1, free_bytes=1)
    assert {kernel.plugin for kernel in registry.kernels(executor, CPU)} == {"executors-reference"}
    assert registry.kernels(executor, cuda)[-1].plugin == "mine"


def test_the_example_of_upload_strategies(registry_of: Any) -> None:
    assert registry_of("mortice_upload_strategies").uploads["teleport"].plugin == "mine"


def test_the_example_of_executors(registry_of: Any) -> None:
    assert registry_of("mortice_executors").executors["mine"].plugin == "mine"


def test_the_example_of_validate(registry_of: Any, tmp_path: Path) -> None:
    registry = registry_of("mortice_validate")
    (found,) = registry.findings(model_file(tmp_path), next(builtin_contracts()))
    assert (found.rule, found.plugin) == ("acme.license", "mine")


def test_the_example_of_on_event(registry_of: Any) -> None:
    metrics = MagicMock()
    registry_of("mortice_on_event", metrics=metrics).emit(StepDone(tokens=2, seconds=0.5))
    metrics.observe.assert_called_once_with(2, 0.5)


def test_every_example_is_tried_here() -> None:
    tried = {name.removeprefix("test_the_example_of_") for name in globals() if name.startswith("test_the_example_of_")}
    assert tried == {hook.removeprefix("mortice_") for hook in HOOKS}


# how to write a plugin ---------------------------------------------------------------------------------------------


def test_the_package_in_the_how_to_is_the_one_that_is_built_and_run() -> None:
    shown = re.findall(r'^```(\w+) title="([^"]+)"$', HOW_TO, re.MULTILINE)
    files = {path.relative_to(TOY).as_posix() for path in TOY.rglob("*") if path.suffix in {".py", ".toml"}}
    assert {title for _, title in shown} == files - {"mortice_toy/__init__.py"}
    for language, title in shown:
        assert blocks(HOW_TO, language, title) == [(TOY / title).read_text(encoding="utf-8")]


def test_the_config_in_the_how_to_is_one() -> None:
    (text,) = blocks(HOW_TO, "toml")
    table = tomllib.loads(text)
    converter = cattrs.Converter(forbid_extra_keys=True)
    config = converter.structure(table.pop("plugins"), PluginsConfig)
    assert not table
    assert config.prefer == {"loader:toy": "toy"}


def test_the_test_in_the_how_to_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(TOY)
    (code,) = blocks(HOW_TO, "python")
    namespace: dict[str, object] = defaultdict()
    exec(compile(code, "<how-to>", "exec"), namespace)
    assert "registry" in namespace


def test_links_between_the_pages_lead_somewhere() -> None:
    for page in ("reference/hooks.md", "how-to/write-a-plugin.md", "design/plugins.md"):
        path = ROOT / "docs" / page
        for target in re.findall(r"\]\(([^)#:]+)\)", path.read_text(encoding="utf-8")):
            assert (path.parent / target).is_file(), f"{page}: {target}"
