"""The page of hooks has every hook with its arguments, and what it shows of the code says all there is to say."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from mortice.core.plugin import events, hookspecs, interfaces
from mortice.core.plugin.hookspecs import HookSpecs

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "reference" / "hooks.md").read_text(encoding="utf-8")


def hooks_of(specs: type) -> dict[str, Any]:
    """The hooks by name."""
    return {name: hook for name, hook in vars(specs).items() if name.startswith("mortice_")}


def page_faults(page: str, specs: type) -> Iterator[str]:
    """Hooks without a section, with other arguments there, or whose text the site would not show; sections of none."""
    sections = dict(re.findall(r"^## (mortice_\w+)\((.*)\)$", page, re.MULTILINE))
    shown = re.findall(r"^::: mortice\.core\.plugin\.hookspecs\.HookSpecs\.(\w+)$", page, re.MULTILINE)
    for name, hook in hooks_of(specs).items():
        arguments = ", ".join(list(inspect.signature(hook).parameters)[1:])
        if sections.get(name) != arguments:
            yield f"{name}: wanted a section {name}({arguments}), found {sections.get(name, 'none')}"
        if name not in shown:
            yield f"{name}: its text is not shown"
    yield from (f"{name}: there is no such hook" for name in sections if name not in hooks_of(specs))


def text_faults(specs: type) -> Iterator[str]:
    """What the texts of hooks leave out: when it is called, the arguments, what is returned, an example."""
    for name, hook in hooks_of(specs).items():
        text = f"{inspect.getdoc(hook)}\n"
        described = re.search(r"^Args:\n((?: .*\n|\n)*)", text, re.MULTILINE)
        listed = re.findall(r"^ {4}(\w+): \S", described[1] if described else "", re.MULTILINE)
        arguments = list(inspect.signature(hook).parameters)[1:]
        if listed != arguments:
            yield f"{name}: describes the arguments {listed}, has {arguments}"
        yield from (
            f"{name}: has no {part}" for part in ("Called ", "Returns:\n", "Example::\n") if f"\n{part}" not in text
        )


def member_faults(module: ModuleType) -> Iterator[str]:
    """Public classes and methods of a module without a text: the site leaves them out."""
    for name in module.__all__:
        thing = getattr(module, name)
        if not inspect.isclass(thing) or thing.__module__ != module.__name__:
            continue
        if not thing.__doc__:
            yield f"{name} has no text"
        for member, value in vars(thing).items():
            function = value.fget if isinstance(value, property) else getattr(value, "__func__", value)
            if not member.startswith("_") and inspect.isfunction(function) and not function.__doc__:
                yield f"{name}.{member} has no text"


def test_every_hook_is_on_the_page_with_every_argument() -> None:
    assert len(hooks_of(HookSpecs)) >= 8
    assert list(page_faults(PAGE, HookSpecs)) == []


def test_every_hook_says_when_it_is_called_with_what_and_what_it_returns_and_shows_an_example() -> None:
    assert list(text_faults(HookSpecs)) == []


@pytest.mark.parametrize("module", [interfaces, events], ids=lambda module: module.__name__)
def test_everything_that_hooks_give_and_are_handed_is_described_and_shown(module: ModuleType) -> None:
    assert f"\n::: {module.__name__}\n" in PAGE
    assert list(member_faults(module)) == []


@pytest.mark.parametrize("name", hooks_of(HookSpecs))
def test_a_hook_that_is_missing_on_the_page_is_noticed(name: str) -> None:
    heading = next(line for line in PAGE.splitlines() if line.startswith(f"## {name}("))
    assert [fault.split(":")[0] for fault in page_faults(PAGE.replace(f"{heading}\n", ""), HookSpecs)] == [name]
    shown = f"::: mortice.core.plugin.hookspecs.HookSpecs.{name}\n"
    assert list(page_faults(PAGE.replace(shown, ""), HookSpecs)) == [f"{name}: its text is not shown"]


class _Planted:
    def mortice_open_model(self, path: Path) -> None:
        """Open a file.

        Called for each.

        Returns:
            Nothing.

        """

    def mortice_new(self, value: int) -> None:
        """Do something.

        Args:
            value: a number.

        """


def test_a_new_hook_and_a_changed_argument_are_noticed() -> None:
    found = list(page_faults(PAGE, _Planted))
    assert "mortice_open_model: wanted a section mortice_open_model(path), found path, options" in found
    assert "mortice_new: wanted a section mortice_new(value), found none" in found
    assert "mortice_qtypes: there is no such hook" in found


def test_a_text_that_leaves_something_out_is_noticed() -> None:
    assert list(text_faults(_Planted)) == [
        "mortice_open_model: describes the arguments [], has ['path']",
        "mortice_open_model: has no Example::\n",
        "mortice_new: has no Called ",
        "mortice_new: has no Returns:\n",
        "mortice_new: has no Example::\n",
    ]


def test_a_method_without_a_text_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(interfaces.Executor.allocate, "__doc__", None)
    assert list(member_faults(interfaces)) == ["Executor.allocate has no text"]


def test_the_hooks_are_all_of_the_module() -> None:
    assert {name for name in dir(hookspecs.HookSpecs) if not name.startswith("_")} == set(hooks_of(HookSpecs))
