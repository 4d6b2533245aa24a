"""Finding plugins: what takes part, what is skipped and named, what is refused."""

from __future__ import annotations

import logging
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from attrs import define

from mortice.core.errors import ConfigError, PluginError
from mortice.core.model.qtypes import QType
from mortice.core.plugin import registry as registry_module
from mortice.core.plugin.hookspecs import CONTRACT_VERSION, hookimpl
from mortice.core.plugin.interfaces import QuantizationType
from mortice.core.plugin.manager import BUILTIN_PLUGINS, PluginManager, PluginPolicy
from mortice.core.plugin.trial_import import fatal_plugins
from tests.support import registry
from tests.support.registry import install, plugin_of

Install = Callable[..., None]

QTYPES = """
from mortice.core.plugin.hookspecs import hookimpl

@hookimpl
def mortice_qtypes():
    return []
"""


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Install:
    """Install throw-away distributions; their modules are forgotten afterwards."""
    monkeypatch.syspath_prepend(tmp_path)

    def put(distribution: str, entry_points: dict[str, str] | None = None, source: str = QTYPES) -> None:
        module = distribution.replace("-", "_")
        monkeypatch.delitem(sys.modules, module, raising=False)
        install(tmp_path, distribution, entry_points or {distribution: module}, source)

    return put


def empty() -> Callable[[], list[object]]:
    """A function that gives nothing; a new one each time, for marking one as a hook is for good."""

    def give() -> list[object]:
        return []

    return give


def given(plugin: object, name: str = "mine") -> PluginManager:
    return PluginManager.create(PluginPolicy(entry_points=False), [(name, plugin)])


# what takes part ---------------------------------------------------------------------------------------------------


def test_built_ins_come_through_the_same_records_as_others() -> None:
    manager = PluginManager.create(PluginPolicy(entry_points=False))
    assert len(manager.records) == len(BUILTIN_PLUGINS) > 4
    assert {record.source for record in manager.records.values()} == {"builtin"}
    assert {record.status for record in manager.records.values()} == {"active"}


def test_an_installed_plugin_takes_part_and_its_distribution_is_known(installed: Install) -> None:
    installed("acme-one")
    record = PluginManager.create().records["acme-one"]
    assert (record.status, record.source, record.distribution) == ("active", "entry point", "acme-one 1.0")
    assert record.import_seconds > 0


def test_a_class_is_made_an_object() -> None:
    class Plugin:
        @hookimpl
        def mortice_qtypes(self) -> list[QuantizationType]:
            return [QuantizationType(qtype=QType(900, "MINE", 1, 4), dequantize=lambda rows: rows.view("<f4"))]

    assert registry.make_registry({"mine": Plugin}).qtypes["MINE"].plugin == "mine"


def test_equal_plugin_objects_are_told_apart_when_they_compare_by_identity() -> None:
    @define(eq=False)
    class Plugin:
        id: int

        @hookimpl
        def mortice_qtypes(self) -> list[QuantizationType]:
            qtype = QType(self.id, f"MINE{self.id}", 1, 4)
            return [QuantizationType(qtype=qtype, dequantize=lambda rows: rows.view("<f4"))]

    made = registry.make_registry({"a": Plugin(901), "b": Plugin(902)})
    assert (made.qtypes["MINE901"].plugin, made.qtypes["MINE902"].plugin) == ("a", "b")


def test_registries_share_nothing() -> None:
    with_mine = registry.make_registry({"mine": plugin_of(mortice_qtypes=empty())})
    without = registry.make_registry()
    assert "mine" in with_mine.manager.records
    assert "mine" not in without.manager.records
    assert with_mine.executors["reference"].value is not without.executors["reference"].value


def test_making_a_registry_imports_no_gpu_package() -> None:
    code = """
import sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        assert name.partition(".")[0] not in {"cuda", "cupy", "pynvml"}, f"{name} was imported"
sys.meta_path.insert(0, Refuse())
from mortice.core.plugin.registry import make_registry
print(*make_registry().executors)
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    assert "reference" in run.stdout


# what is broken ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("source", "error"),
    [
        ("import a_module_that_is_not_there", "ModuleNotFoundError: No module named 'a_module_that_is_not_there'"),
        ("def broken(:", "SyntaxError: invalid syntax (acme_bad.py, line 1)"),
        ("raise SystemExit(3)", "SystemExit: 3"),
        ("class Panic(BaseException): pass\nraise Panic('boom\\nat 1')", "Panic: boom; at 1"),
        ("raise ValueError", "ValueError"),
        ("mortice_contract_version = 99", f"written for hook contract 99, this mortice has {CONTRACT_VERSION}"),
        ("", "module has no hook: no function in it is marked with @hookimpl"),
    ],
)
def test_a_broken_plugin_is_skipped_and_named(
    installed: Install, caplog: pytest.LogCaptureFixture, source: str, error: str
) -> None:
    installed("acme-bad", source=source)
    installed("acme-good")
    manager = PluginManager.create()
    assert manager.records["acme-good"].status == "active"
    (record,) = manager.failed()
    assert (record.name, record.error) == ("acme-bad", error)
    advice = "--block-plugin acme-bad (plugins.block) leaves it out"
    assert caplog.messages == [f"plugin acme-bad (acme-bad 1.0) is skipped: {error}; {advice}"]


def test_a_skipped_plugin_is_seen_on_standard_error_without_any_logging_set_up(tmp_path: Path) -> None:
    install(tmp_path, "acme-bad", {"acme": "acme_bad"}, "1 / 0")
    code = (
        f"import sys; sys.path.insert(0, {str(tmp_path)!r})\nfrom mortice.core.plugin.registry import make_registry\n"
    )
    run = subprocess.run([sys.executable, "-c", code + "make_registry()"], capture_output=True, text=True, check=True)
    assert run.stderr == (
        "plugin acme (acme-bad 1.0) is skipped: ZeroDivisionError: division by zero; "
        "--block-plugin acme (plugins.block) leaves it out\n"
    )


def test_what_a_package_prints_when_it_is_imported_is_kept_off_standard_output(
    installed: Install, capsys: pytest.CaptureFixture[str]
) -> None:
    installed("acme-loud", source="print('welcome to acme')\n" + QTYPES.replace("return", "print('types'); return"))
    assert registry_module.make_registry().manager.records["acme-loud"].status == "active"
    assert capsys.readouterr() == ("", "welcome to acme\ntypes\n")


def test_ctrl_c_while_a_plugin_is_imported_is_not_swallowed(installed: Install) -> None:
    installed("acme-slow", source="raise KeyboardInterrupt")
    with pytest.raises(KeyboardInterrupt) as caught:
        PluginManager.create()
    assert caught.value.__notes__ == ["while plugin acme-slow (acme-slow 1.0) was imported"]


def test_plugins_whose_hooks_end_the_process_are_found_and_left_out(installed: Install) -> None:
    installed("acme-good", source=QTYPES)
    installed("acme-hook", source="import os\n" + QTYPES.replace("return", "os._exit(3); return"))
    found = fatal_plugins(PluginPolicy())
    assert found == {"acme-hook": "asking what it gives ends the process (exit code 3)"}
    records = registry_module.survey(unfit=found).manager.records
    assert (records["acme-good"].status, records["acme-hook"].status) == ("active", "failed")


def test_plugins_whose_import_ends_the_process_are_found_and_left_out(installed: Install) -> None:
    installed("acme-good")
    installed("acme-loud", source="import sys; print('hello'); sys.exit('no')")  # no more than an exception
    installed("acme-exit", source="import os; os._exit(0)")
    installed("acme-kill", source="import os, signal; os.kill(os.getpid(), signal.SIGKILL)")
    found = fatal_plugins(PluginPolicy())
    assert found == {
        "acme-exit": "importing it ends the process (exit code 0)",
        "acme-kill": "importing it ends the process (SIGKILL)",
    }
    assert fatal_plugins(PluginPolicy(block=("acme-exit", "acme-kill"))) == {}
    assert fatal_plugins(PluginPolicy(allow=("acme-exit",))).keys() == {"acme-exit"}
    records = registry_module.survey(unfit=found).manager.records
    assert {name: record.status for name, record in records.items() if record.source == "entry point"} == {
        "acme-exit": "failed",
        "acme-good": "active",
        "acme-kill": "failed",
        "acme-loud": "failed",
    }


@pytest.mark.parametrize("policy", [PluginPolicy(strict=True), PluginPolicy(allow=("acme-bad",))])
def test_a_broken_plugin_is_an_error_when_it_is_asked_for_or_the_policy_is_strict(
    installed: Install, policy: PluginPolicy
) -> None:
    installed("acme-bad", source="1 / 0")
    with pytest.raises(PluginError, match=r"^plugin acme-bad \(acme-bad 1.0\): ZeroDivisionError: ") as caught:
        PluginManager.create(policy)
    assert isinstance(caught.value.__cause__, ZeroDivisionError)


def test_an_entry_point_to_nothing_is_skipped(installed: Install, caplog: pytest.LogCaptureFixture) -> None:
    installed("acme-bad", {"acme": "acme_bad:plugin"}, QTYPES)
    (record,) = PluginManager.create().failed()
    assert "has no attribute 'plugin'" in record.error
    assert len(caplog.messages) == 1


def test_a_given_plugin_that_is_broken_is_an_error() -> None:
    with pytest.raises(PluginError, match=r"^plugin mine \(given\): NoneType has no hook"):
        given(None)


def test_a_plugin_of_another_contract_version_is_refused_even_if_it_says_so_in_text() -> None:
    plugin = plugin_of(mortice_qtypes=empty())
    plugin.mortice_contract_version = str(CONTRACT_VERSION)  # type: ignore[attr-defined]
    with pytest.raises(PluginError, match="written for hook contract '1', this mortice has 1"):
        given(plugin)


# hooks that would never be called ----------------------------------------------------------------------------------


def test_a_misspelt_hook_is_caught_and_the_nearest_named() -> None:
    with pytest.raises(PluginError, match="there is no hook mortice_qtype; did you mean mortice_qtypes"):
        given(plugin_of(mortice_qtype=empty()))


def test_a_marked_function_without_the_prefix_is_caught() -> None:
    with pytest.raises(PluginError, match="there is no hook open_model"):
        given(plugin_of(open_model=lambda path: None))


def test_a_hook_that_is_not_marked_is_caught() -> None:
    plugin = plugin_of(mortice_executors=empty())
    plugin.mortice_qtypes = empty()  # type: ignore[attr-defined]
    with pytest.raises(PluginError, match="mortice_qtypes is not marked with @hookimpl"):
        given(plugin)


def test_every_fault_of_a_plugin_is_reported_at_once() -> None:
    plugin = plugin_of(mortice_open=lambda path: None, mortice_validate=lambda modell: [])
    plugin.mortice_qtypes = empty()  # type: ignore[attr-defined]
    with pytest.raises(PluginError) as caught:
        given(plugin)
    assert str(caught.value).count("; ") >= 3
    for part in ("mortice_open;", "mortice_validate has no argument 'modell'; it has model, contract", "not marked"):
        assert part in str(caught.value)


def test_an_argument_with_a_default_is_refused_because_it_would_never_be_passed() -> None:
    with pytest.raises(PluginError, match="options has to be a plain argument without a default"):
        given(plugin_of(mortice_open_model=lambda path, options=None: None))


def test_a_keyword_only_argument_is_refused() -> None:
    def mortice_open_model(path: Path, *, options: object) -> None: ...

    with pytest.raises(PluginError, match="options has to be a plain argument"):
        given(plugin_of(mortice_open_model=mortice_open_model))


def test_a_hook_may_leave_out_arguments(tmp_path: Path) -> None:
    seen: list[Path] = []
    manager = given(plugin_of(mortice_open_model=lambda path: seen.append(path)))
    assert dict(manager.call("mortice_open_model", path=tmp_path, options=None))["mine"] is None
    assert seen == [tmp_path]


@pytest.mark.parametrize("option", ["wrapper", "hookwrapper"])
def test_a_hook_wrapper_is_refused(option: str) -> None:
    class Plugin:
        @hookimpl(hookwrapper=option == "hookwrapper", wrapper=option == "wrapper")
        def mortice_qtypes(self) -> Iterator[None]:
            yield

    with pytest.raises(PluginError, match="mortice_qtypes is a hook wrapper"):
        given(Plugin())


@pytest.mark.parametrize("option", ["tryfirst", "trylast"])
def test_a_place_in_the_order_of_calls_is_refused(option: str) -> None:
    class Plugin:
        @hookimpl(tryfirst=option == "tryfirst", trylast=option == "trylast")
        def mortice_qtypes(self) -> list[QuantizationType]:
            return []

    with pytest.raises(PluginError, match="asks for a place in the order of calls"):
        given(Plugin())


def test_a_hook_of_a_later_version_may_be_declared_optional() -> None:
    class Plugin:
        @hookimpl(optionalhook=True)
        def mortice_not_yet(self) -> None: ...

    assert given(Plugin()).records["mine"].status == "active"


def test_a_hook_may_have_a_name_of_its_own() -> None:
    class Plugin:
        @hookimpl(specname="mortice_qtypes")
        def types(self) -> list[QuantizationType]:
            return []

    assert given(Plugin()).has("mine", "mortice_qtypes")


def test_a_refused_plugin_leaves_nothing_behind() -> None:
    manager = PluginManager.create(PluginPolicy(entry_points=False))
    before = {hook: manager.has("mine", hook) for hook in ("mortice_qtypes", "mortice_executors")}
    with pytest.raises(PluginError):
        manager._register("mine", plugin_of(mortice_qtypes=empty(), mortice_executor=empty()))
    assert {hook: manager.has("mine", hook) for hook in before} == before == dict.fromkeys(before, False)


# names -------------------------------------------------------------------------------------------------------------


def test_a_plugin_named_like_a_built_in_is_skipped_and_the_built_in_stays(
    installed: Install, caplog: pytest.LogCaptureFixture
) -> None:
    installed("acme-one", {"qtypes": "acme_one"})
    manager = PluginManager.create()
    assert manager.records["qtypes"].source == "builtin"
    (record,) = manager.failed()
    assert record.name == "qtypes of acme-one 1.0"
    assert record.error == "a built-in plugin is named 'qtypes'; the package has to choose another name"
    assert len(caplog.messages) == 1


def test_two_distributions_with_one_plugin_name_are_both_skipped_and_named(
    installed: Install, caplog: pytest.LogCaptureFixture
) -> None:
    installed("acme-b", {"acme": "acme_b"})
    installed("acme-a", {"acme": "acme_a"})
    (record,) = PluginManager.create().failed()
    assert record.origin == "plugin acme (acme-a 1.0 and acme-b 1.0)"
    assert record.error == "each of them announces a plugin 'acme'; uninstall one"
    assert len(caplog.messages) == 1


def test_a_name_given_twice_is_an_error() -> None:
    plugins = [("mine", plugin_of(mortice_qtypes=empty())), ("mine", plugin_of(mortice_qtypes=empty()))]
    with pytest.raises(PluginError, match=r"given as 'mine', which plugin mine \(given\) is named already"):
        PluginManager.create(PluginPolicy(entry_points=False), plugins)


def test_an_object_given_twice_is_an_error() -> None:
    plugin = plugin_of(mortice_qtypes=empty())
    with pytest.raises(PluginError, match=r"plugin b \(given\): the same object is plugin a \(given\) already"):
        PluginManager.create(PluginPolicy(entry_points=False), [("a", plugin), ("b", plugin)])


# allow and block ---------------------------------------------------------------------------------------------------


def test_only_allowed_plugins_take_part_and_the_others_are_not_imported(installed: Install) -> None:
    installed("acme-one")
    installed("acme-two", source="raise AssertionError('imported')")
    records = PluginManager.create(PluginPolicy(allow=("acme-one",), strict=True)).records
    assert records["acme-one"].status == "active"
    assert (records["acme-two"].status, records["acme-two"].error) == ("blocked", "not in plugins.allow")
    assert records["qtypes"].status == "active"


def test_a_blocked_plugin_is_not_imported(installed: Install) -> None:
    installed("acme-one", source="raise AssertionError('imported')")
    record = PluginManager.create(PluginPolicy(block=("acme-one",), strict=True)).records["acme-one"]
    assert (record.status, record.error) == ("blocked", "in plugins.block")


def test_a_built_in_may_be_blocked() -> None:
    assert "reference" not in registry.make_registry(block=("executors-reference",)).executors


def test_an_allowed_plugin_that_is_not_installed_is_an_error(installed: Install) -> None:
    installed("acme-one")
    with pytest.raises(PluginError, match=r"plugins.allow: no installed plugin 'acme'; installed are: acme-one"):
        PluginManager.create(PluginPolicy(allow=("acme",)))


def test_a_blocked_name_that_is_not_installed_is_logged_with_the_nearest(
    installed: Install, caplog: pytest.LogCaptureFixture
) -> None:
    installed("acme-one")
    manager = PluginManager.create(PluginPolicy(block=("acme-oen",)))
    assert manager.records["acme-one"].status == "active"
    (message,) = [entry.getMessage() for entry in caplog.records if entry.levelno == logging.WARNING]
    assert message == "plugins.block: no plugin 'acme-oen'; the nearest is 'acme-one', which is not blocked"


def test_a_plugin_both_allowed_and_blocked_is_a_contradiction(installed: Install) -> None:
    installed("acme-one")
    with pytest.raises(ConfigError, match=r"plugins.allow and plugins.block both name 'acme-one'"):
        PluginManager.create(PluginPolicy(allow=("acme-one",), block=("acme-one",)))


def test_installed_packages_are_left_alone_when_the_policy_says_so(installed: Install) -> None:
    installed("acme-one", source="raise AssertionError('imported')")
    assert "acme-one" not in PluginManager.create(PluginPolicy(entry_points=False, strict=True)).records
