"""What holds for every hook that gives several things: types, keys, conflicts and preferences."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from mortice.core.errors import (
    ConfigError,
    DeviceError,
    ModelFileError,
    PluginError,
)
from mortice.core.plugin.interfaces import QuantizationType
from tests.support.registry import (
    Upload,
    contract,
    like_reference,
    make_registry,
    plugin_of,
    qtype,
    raises,
)

COLLECTED = (
    ("mortice_arch_contracts", "Contract"),
    ("mortice_qtypes", "QuantizationType"),
    ("mortice_upload_strategies", "UploadStrategy"),
    ("mortice_executors", "Executor"),
)


@pytest.mark.parametrize(("hook", "wanted"), COLLECTED)
@pytest.mark.parametrize("result", ["text", 7, {"key": "value"}, contract])
def test_a_result_that_is_not_a_collection_is_refused(hook: str, wanted: str, result: object) -> None:
    message = rf"^plugin mine \(given\): {hook}: returned {type(result).__name__}, wanted Iterable\[{wanted}\]$"
    with pytest.raises(PluginError, match=message):
        make_registry({"mine": plugin_of(**{hook: lambda: result})})


@pytest.mark.parametrize(("hook", "wanted"), COLLECTED)
def test_an_element_of_another_type_is_refused(hook: str, wanted: str) -> None:
    with pytest.raises(PluginError, match=rf"^plugin mine \(given\): {hook}: .*{wanted}"):
        make_registry({"mine": plugin_of(**{hook: lambda: [object()]})})


@pytest.mark.parametrize(("hook", "_"), COLLECTED)
def test_none_and_an_empty_result_give_nothing(hook: str, _: str) -> None:
    bare, other = make_registry(), make_registry({"a": plugin_of(**{hook: lambda: None})})
    for table in ("contracts", "qtypes", "uploads", "executors"):
        assert getattr(other, table).keys() == getattr(bare, table).keys()


@pytest.mark.parametrize(("hook", "_"), COLLECTED)
@pytest.mark.parametrize("error", [KeyError("x"), SystemExit(2), RecursionError("deep")])
def test_an_exception_in_a_hook_names_plugin_and_hook(hook: str, _: str, error: BaseException) -> None:
    with pytest.raises(PluginError, match=rf"^plugin mine \(given\): {hook}: {type(error).__name__}: ") as caught:
        make_registry({"mine": plugin_of(**{hook: raises(error)})})
    assert caught.value.__cause__ is error


def test_an_exception_in_a_generator_is_the_plugins_too() -> None:
    def lazily() -> Iterator[QuantizationType]:
        yield qtype()
        raise OSError("disk gone")

    for hook in (lazily, lambda: map(int, "x")):
        with pytest.raises(PluginError, match=r"^plugin mine \(given\): mortice_qtypes: (OSError|ValueError): "):
            make_registry({"mine": plugin_of(mortice_qtypes=hook)})


def test_our_own_exceptions_keep_their_type_and_get_a_note() -> None:
    with pytest.raises(DeviceError, match=r"^no driver\n") as caught:
        make_registry({"mine": plugin_of(mortice_executors=raises(DeviceError("no driver")))})
    assert caught.value.__notes__ == ["raised by plugin mine (given) in mortice_executors"]


def test_a_refusal_by_a_built_in_stays_one_line(tmp_path: Path) -> None:
    (tmp_path / "model.gguf").write_bytes(b"GGUX")
    with pytest.raises(ModelFileError) as caught:
        make_registry().open_model(tmp_path / "model.gguf")
    assert not hasattr(caught.value, "__notes__")
    assert "\n" not in str(caught.value)


def test_ctrl_c_in_a_hook_stays_that_and_names_the_plugin() -> None:
    with pytest.raises(KeyboardInterrupt) as caught:
        make_registry({"mine": plugin_of(mortice_executors=raises(KeyboardInterrupt()))})
    assert caught.value.__notes__ == ["in plugin mine (given), mortice_executors"]


@pytest.mark.parametrize(
    ("kind", "hook", "give"),
    [
        ("contract:llama", "mortice_arch_contracts", lambda: [contract("llama")]),
        ("qtype:F32", "mortice_qtypes", lambda: [qtype(0, "F32")]),
        ("upload:host", "mortice_upload_strategies", lambda: [type("U", (Upload,), {"name": "host"})()]),
        ("executor:mine", "mortice_executors", lambda: [like_reference()]),
    ],
)
def test_two_plugins_with_one_key_are_a_conflict_that_prefer_decides(
    kind: str, hook: str, give: Callable[[], list[object]]
) -> None:
    plugins = {name: plugin_of(**{hook: (lambda: give())}) for name in ("one", "two")}
    with pytest.raises(PluginError) as caught:
        make_registry(plugins)
    for part in (
        f"{kind} is given by plugin",
        "plugin one (given)",
        "plugin two (given)",
        f'[plugins.prefer] "{kind}" = ',
    ):
        assert part in str(caught.value)
    table = {"contract": "contracts", "qtype": "qtypes", "upload": "uploads", "executor": "executors"}
    name, _, key = kind.partition(":")
    for choice in ("one", "two"):
        made = make_registry(plugins, prefer={kind: choice})
        assert getattr(made, table[name])[key].plugin == choice


def test_the_same_plugin_may_not_give_a_key_twice() -> None:
    with pytest.raises(PluginError, match=r"^plugin mine \(given\): mortice_qtypes: gives qtype 'MINE' twice$"):
        make_registry({"mine": plugin_of(mortice_qtypes=lambda: [qtype(900), qtype(901)])})


@pytest.mark.parametrize(
    ("prefer", "message"),
    [
        ({"qtypes:F32": "qtypes"}, "'qtypes:F32': wanted one of contract:KEY, qtype:KEY,"),
        ({"qtype": "qtypes"}, "'qtype': wanted one of"),
        ({"kernel:linear": "qtypes"}, "'kernel:linear': wanted one of .*kernel:OPERATOR:QTYPE"),
        ({"qtype:F32": "qtipes"}, "'qtype:F32': no plugin 'qtipes'; have archs, "),
        ({"qtype:F33": "qtypes"}, r"'qtype:F33': plugin qtypes \(mortice\) does not give it, no plugin does"),
        ({"qtype:F32": "archs"}, r"'qtype:F32': plugin archs \(mortice\) has no mortice_qtypes"),
        ({"loader:gguf": "archs"}, r"'loader:gguf': plugin archs \(mortice\) has no mortice_open_model"),
    ],
)
def test_a_preference_that_cannot_be_met_is_refused(prefer: dict[str, str], message: str) -> None:
    with pytest.raises(ConfigError, match=f"^plugins.prefer: {message}"):
        make_registry(prefer=prefer)


def test_a_preferred_plugin_that_is_blocked_is_refused() -> None:
    with pytest.raises(PluginError, match=r"plugin qtypes \(mortice\) is blocked: in plugins.block"):
        make_registry(prefer={"qtype:F32": "qtypes"}, block=("qtypes",))
