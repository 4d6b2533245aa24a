"""An installed plugin that gives something wrong: it is left out as a whole, unless the run asks for it."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from mortice.core.cli.main import main
from mortice.core.errors import PluginError
from mortice.core.plugin.manager import PluginPolicy
from mortice.core.plugin.registry import make_registry
from tests.support.registry import contract, install, plugin_of
from tests.support.registry import make_registry as with_given

HEAD = """
from attrs import evolve
from mortice.arch_contracts.schema import builtin_contracts
from mortice.core.model.qtypes import QType
from mortice.core.plugin.hookspecs import hookimpl
from mortice.core.plugin.interfaces import QuantizationType

def qtype(number, name, elements=1, size=4):
    return QuantizationType(qtype=QType(number, name, elements, size), dequantize=lambda rows: rows.view("<f4"))
"""
GOOD = """
@hookimpl
def mortice_open_model(path, options):
    raise AssertionError("asked")

@hookimpl
def mortice_arch_contracts():
    return [evolve(next(builtin_contracts()), name="acme", architectures=("acme",))]
"""
HOOKS = ("mortice_arch_contracts", "mortice_qtypes", "mortice_upload_strategies", "mortice_executors")

Install = Callable[..., None]


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Install:
    """Install the plugin ``acme``, or one of another name, with the functions in `source`."""
    monkeypatch.syspath_prepend(tmp_path)

    def put(source: str, name: str = "acme") -> None:
        monkeypatch.delitem(sys.modules, f"{name}_faulty", raising=False)
        install(tmp_path, f"{name}-faulty", {name: f"{name}_faulty"}, HEAD + source)

    return put


def hook(name: str, body: str) -> str:
    return f"\n@hookimpl\ndef {name}():\n    {body}\n"


FAULTS = [
    ("raise RuntimeError('boo')", "RuntimeError: boo"),
    ("raise SystemExit(3)", "SystemExit: 3"),
    ("return 7", "returned int, wanted Iterable"),
    ("return [object()]", "object"),
    ("yield from map(int, 'x')", "ValueError: invalid literal"),
]


@pytest.mark.parametrize("name", HOOKS)
@pytest.mark.parametrize(("body", "error"), FAULTS)
def test_a_plugin_with_a_wrong_hook_is_skipped_and_named(
    installed: Install, caplog: pytest.LogCaptureFixture, name: str, body: str, error: str
) -> None:
    installed(hook(name, body))
    made = make_registry()
    (record,) = made.manager.failed()
    assert record.name == "acme"
    assert record.error.startswith(f"{name}: ")
    assert error in record.error
    advice = "--block-plugin acme (plugins.block) leaves it out"
    assert caplog.messages == [f"plugin acme (acme-faulty 1.0) is skipped: {record.error}; {advice}"]
    assert "llama" in made.contracts


def test_our_own_exceptions_in_a_hook_are_the_plugins_fault_too(installed: Install) -> None:
    installed(hook("mortice_executors", "from mortice.core.errors import DeviceError; raise DeviceError('no driver')"))
    assert make_registry().manager.records["acme"].error == "mortice_executors: no driver"


def test_a_key_given_twice_by_one_plugin_is_its_fault(installed: Install) -> None:
    installed(hook("mortice_qtypes", "return [qtype(900, 'MINE'), qtype(901, 'MINE')]"))
    assert make_registry().manager.records["acme"].error == "mortice_qtypes: gives qtype 'MINE' twice"


def test_nothing_of_a_skipped_plugin_takes_part(installed: Install, tmp_path: Path) -> None:
    installed(GOOD + hook("mortice_executors", "raise RuntimeError('boo')"))
    made = make_registry()
    assert "acme" not in made.contracts
    assert not made.manager.has("acme", "mortice_open_model")
    (tmp_path / "model.acme").touch()
    with pytest.raises(Exception, match=r"no loader takes it; .*plugin acme .* is failed: mortice_executors: "):
        made.open_model(tmp_path / "model.acme")


@pytest.mark.parametrize(
    ("policy", "prefer"),
    [
        (PluginPolicy(strict=True), {}),
        (PluginPolicy(allow=("acme",)), {}),
        (PluginPolicy(), {"contract:acme": "acme"}),
    ],
)
def test_a_wrong_hook_is_an_error_where_the_plugin_is_wanted(
    installed: Install, policy: PluginPolicy, prefer: dict[str, str]
) -> None:
    installed(GOOD + hook("mortice_qtypes", "raise RuntimeError('boo')"))
    with pytest.raises(PluginError, match=r"^plugin acme \(acme-faulty 1.0\): mortice_qtypes: RuntimeError: boo"):
        make_registry(policy, prefer=prefer)


def test_a_strict_policy_says_how_to_leave_the_plugin_out(installed: Install) -> None:
    installed(hook("mortice_qtypes", "raise RuntimeError('boo')"))
    with pytest.raises(PluginError) as caught:
        make_registry(PluginPolicy(strict=True))
    assert caught.value.__notes__ == ["--block-plugin acme (plugins.block) leaves it out"]


def test_a_contract_built_by_hand_is_held_against_the_rules_of_a_parsed_one(installed: Install) -> None:
    installed(hook("mortice_arch_contracts", "return [evolve(next(builtin_contracts()), name='acme', layer_roles={})]"))
    error = make_registry().manager.records["acme"].error
    assert error.startswith("mortice_arch_contracts: contract 'acme': roles.layer.")


def test_a_contract_without_architectures_is_refused_when_given() -> None:
    bad = contract()
    object.__setattr__(bad, "architectures", ())
    with pytest.raises(PluginError, match=r"contract 'toy': contract\.architectures: at least one is needed"):
        with_given({"mine": plugin_of(mortice_arch_contracts=lambda: [bad])})


@pytest.mark.parametrize("wrong", ["hyperparameters=None", "architectures=(['a'],)", "norm=7"])
def test_a_check_that_a_contract_makes_stumble_is_the_plugins_fault(installed: Install, wrong: str) -> None:
    installed(hook("mortice_arch_contracts", f"return [evolve(next(builtin_contracts()), {wrong})]"))
    assert make_registry().manager.records["acme"].error.startswith("mortice_arch_contracts: ")


# conflicts ---------------------------------------------------------------------------------------------------------

REPEATS = hook("mortice_qtypes", "return [qtype(0, 'F32')]")


def test_a_conflict_with_a_built_in_names_both_and_how_to_decide(installed: Install) -> None:
    installed(REPEATS)
    with pytest.raises(PluginError) as caught:
        make_registry()
    assert str(caught.value) == (
        "qtype:F32 is given by plugin qtypes (mortice) and by plugin acme (acme-faulty 1.0); choose one in the config: "
        '[plugins.prefer] "qtype:F32" = "qtypes" or "acme"; or block one: --block-plugin NAME (plugins.block)'
    )
    assert make_registry(PluginPolicy(block=("acme",))).qtypes["F32"].plugin == "qtypes"
    assert make_registry(prefer={"qtype:F32": "acme"}).qtypes["F32"].plugin == "acme"


def test_a_plugin_that_is_skipped_is_in_no_conflict(installed: Install) -> None:
    installed(REPEATS + hook("mortice_executors", "raise RuntimeError('boo')"))
    assert make_registry().qtypes["F32"].plugin == "qtypes"


def listed(capsys: pytest.CaptureFixture[str], *flags: str, code: int = 0) -> tuple[str, str]:
    capsys.readouterr()
    assert main(["plugins", "list", *flags]) == code
    return capsys.readouterr()


def test_the_list_shows_a_conflict_and_goes_on(installed: Install, capsys: pytest.CaptureFixture[str]) -> None:
    installed(REPEATS)
    out, err = listed(capsys)
    assert "conflict: qtype:F32 with qtypes" in out
    assert "executors: reference" in out
    assert "mortice: warning: qtype:F32 is given by plugin qtypes (mortice) and by plugin acme" in err
    plugins = {plugin["name"]: plugin for plugin in json.loads(listed(capsys, "--json")[0])}
    assert plugins["acme"]["conflicts"] == {"qtype:F32": ["qtypes"]}
    assert plugins["qtypes"]["conflicts"] == {"qtype:F32": ["acme"]}
    assert plugins["archs"]["conflicts"] == {}


def test_the_list_shows_an_id_used_for_two_types(installed: Install, capsys: pytest.CaptureFixture[str]) -> None:
    installed(hook("mortice_qtypes", "return [qtype(900, 'MINE')]"))
    installed(hook("mortice_qtypes", "return [qtype(900, 'OTHER')]"), name="other")
    plugins = {plugin["name"]: plugin for plugin in json.loads(listed(capsys, "--json")[0])}
    assert plugins["acme"]["conflicts"] == {"tensor type id 900": ["other"]}


def test_a_strict_list_is_complete_and_refuses(installed: Install, capsys: pytest.CaptureFixture[str]) -> None:
    installed(REPEATS)
    installed(hook("mortice_qtypes", "raise RuntimeError('boo')"), name="other")
    out, _ = listed(capsys, "--strict-plugins", code=2)
    assert "conflict: qtype:F32 with qtypes" in out
    assert "mortice_qtypes: RuntimeError: boo" in out


def test_the_list_shows_what_a_wrong_hook_did(installed: Install, capsys: pytest.CaptureFixture[str]) -> None:
    installed(hook("mortice_qtypes", "raise RuntimeError('boo')"))
    plugins = {plugin["name"]: plugin for plugin in json.loads(listed(capsys, "--json")[0])}
    assert plugins["acme"]["status"] == "failed"
    assert plugins["acme"]["error"] == "mortice_qtypes: RuntimeError: boo"
