"""`mortice plugins list`, `show`, `check` and `new`, in this process."""

from __future__ import annotations

import io
import json
import os
import runpy
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mortice.core.cli.main import main
from mortice.core.errors import ConfigError
from mortice.core.scaffold import package
from mortice.core.scaffold.package import KINDS, names_for, write_package
from mortice.core.testing.registries import registry_with
from tests.support.registry import install

Run = Callable[..., tuple[int, str, str]]

GOOD = """
from mortice.core.model.qtypes import QType
from mortice.core.plugin.hookspecs import hookimpl
from mortice.core.plugin.interfaces import QuantizationType
mortice_contract_version = 1
def dequantize(rows):
    return {values}
@hookimpl
def mortice_qtypes():
    return [QuantizationType(qtype=QType(1900, "ACME", 1, 4), dequantize=dequantize)]
"""
RIGHT = GOOD.format(values="rows.copy().view('<f4').reshape(len(rows), rows.shape[1] // 4)")
WRONG = GOOD.format(values="rows.copy().view('<f4').reshape(len(rows), rows.shape[1] // 4) * len(rows)")
LOADER = """
from mortice.core.errors import ModelFileError
from mortice.core.model.types import ModelFile, TensorView
import numpy as np
@hookimpl
def mortice_open_model(path, options):
    if path.suffix != ".acme":
        return None
    try:
        data = np.frombuffer(path.read_bytes(), np.uint8)
    except OSError as error:
        raise ModelFileError(path, f"cannot be read: {error.strerror}") from None
    types = {qtype.name: qtype for qtype in options.qtypes.values()}
    if len(data) != 32 or "ACME" not in types:
        raise ModelFileError(path, "wanted 32 bytes of ACME")
    view = TensorView(name="a", shape=(2, 4), qtype=types["ACME"], data=data, offset=0, path=path)
    keys = {"general.architecture": "acme"}
    return ModelFile(path=path, format="acme", version="1", metadata=keys, tensors={"a": view}, files=(path,))
"""
LLAMA = """
from mortice.arch_contracts.schema import builtin_contracts
from mortice.core.plugin.hookspecs import hookimpl
mortice_contract_version = 1
@hookimpl
def mortice_arch_contracts():
    return [contract for contract in builtin_contracts() if contract.name == "llama"]
"""


@pytest.fixture
def plugins(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Run:
    """Call ``mortice plugins``; gives exit code, standard output and standard error."""
    for name in [name for name in os.environ if name.startswith("MORTICE_")]:
        monkeypatch.delenv(name)

    def call(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "stdin", io.StringIO())
        capsys.readouterr()
        code = main(["plugins", *map(str, arguments)])
        return code, *capsys.readouterr()

    return call


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], str]]:
    """Install a plugin `acme` of a text."""

    def put(source: str) -> str:
        folder = tmp_path / "packages"
        folder.mkdir()
        install(folder, "acme-for-commands", {"acme": "acme_for_commands"}, source)
        monkeypatch.syspath_prepend(folder)
        return "acme"

    yield put
    sys.modules.pop("acme_for_commands", None)


# list -------------------------------------------------------------------------------------------------------------


def test_the_list_tells_versions_and_time(plugins: Run, installed: Callable[[str], str]) -> None:
    installed(RIGHT)
    code, out, _ = plugins("list", "--json")
    found = {plugin["name"]: plugin for plugin in json.loads(out)}
    assert code == 0
    assert (found["acme"]["version"], found["acme"]["contract_version"]) == ("1.0", 1)
    assert found["acme"]["import_ms"] > 0
    assert found["qtypes"]["version"]
    line = next(line for line in plugins("list")[1].splitlines() if line.startswith("acme "))
    assert line.split()[:4] == ["acme", "acme-for-commands", "1.0", "active"]


def test_a_plugin_that_names_no_version_of_the_hooks_is_shown_so(plugins: Run, installed: Callable[[str], str]) -> None:
    installed(RIGHT.replace("mortice_contract_version = 1", ""))
    found = {plugin["name"]: plugin for plugin in json.loads(plugins("list", "--json")[1])}
    assert found["acme"]["contract_version"] is None
    assert "not said" in plugins("list")[1]


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--allow-plugin", "acme"], "plugin acme (acme-for-commands 1.0): RuntimeError: out of anvils"),
        (["--prefer", "qtype:Q4_K=acme"], "'qtype:Q4_K': plugin acme (acme-for-commands 1.0) is failed: RuntimeError"),
        (["--prefer", "qtype:Q4_K=nobody"], "no plugin 'nobody'"),
        (["--prefer", "qtype:Q4_K=loaders-gguf"], "has no mortice_qtypes"),
        (["--allow-plugin", "nobody"], "no installed plugin 'nobody'"),
    ],
)
def test_a_wish_that_cannot_be_met_is_said_after_the_list(
    plugins: Run, installed: Callable[[str], str], flags: list[str], words: str
) -> None:
    installed("raise RuntimeError('out of anvils')")
    code, out, err = plugins("list", *flags)
    assert code == 2
    assert words in err
    assert any(line.startswith("qtypes ") and "Q4_K" in line for line in out.splitlines())
    assert any(line.startswith("acme ") for line in out.splitlines())
    assert json.loads(plugins("list", "--json", *flags)[1])


# show -------------------------------------------------------------------------------------------------------------


def test_show_tells_what_each_thing_is(plugins: Run, installed: Callable[[str], str]) -> None:
    installed(RIGHT)
    code, out, _ = plugins("show", "acme")
    assert code == 0
    assert "acme-for-commands 1.0" in out
    assert "acme_for_commands.py" in out
    assert "id 1900, 1 element in 4 bytes, 32.00 bits a weight, reference only" in out
    details = json.loads(plugins("show", "qtypes", "--json")[1])["details"]
    assert "CUDA header" in details["qtypes"]["Q4_K"]


def test_show_of_a_broken_plugin_says_why_and_fails(plugins: Run, installed: Callable[[str], str]) -> None:
    installed("raise RuntimeError('out of anvils')")
    code, out, _ = plugins("show", "acme")
    assert code == 2
    assert "failed: RuntimeError: out of anvils" in out


def test_show_and_check_of_nobody_name_those_there_are(plugins: Run) -> None:
    for command in ("show", "check"):
        code, _, err = plugins(command, "nobody")
        assert code == 2
        assert "no plugin 'nobody'; have archs" in err


# check ------------------------------------------------------------------------------------------------------------


def test_a_right_plugin_passes_its_checks(plugins: Run, installed: Callable[[str], str]) -> None:
    installed(RIGHT)
    code, out, _ = plugins("check", "acme")
    assert code == 0, out
    assert "0 failed" in out.splitlines()[-1]
    assert "skipped: qtype ACME: " in out


def test_a_wrong_plugin_fails_the_check_that_is_for_it(plugins: Run, installed: Callable[[str], str]) -> None:
    installed(WRONG)
    code, out, _ = plugins("check", "acme")
    assert code == 2
    failed = [line for line in out.splitlines() if line.startswith("failed: ")]
    assert "failed: qtype ACME: a block means the same wherever it stands" in failed[0]
    code, out, _ = plugins("check", "acme", "--json")
    report = json.loads(out)
    assert (code, report["passed"]) == (2, False)
    assert {check["status"] for check in report["checks"]} == {"passed", "failed", "skipped"}


def test_a_plugin_that_is_broken_fails_its_check(plugins: Run, installed: Callable[[str], str]) -> None:
    installed("raise RuntimeError('out of anvils')")
    code, out, _ = plugins("check", "acme")
    assert code == 2
    assert "failed: plugin: it takes part: RuntimeError: out of anvils" in out


def test_what_another_plugin_gives_too_fails_the_check(plugins: Run, installed: Callable[[str], str]) -> None:
    installed(LLAMA)
    code, out, _ = plugins("check", "acme")
    assert code == 2
    failed = [line for line in out.splitlines() if line.startswith("failed: ")]
    assert failed[0].startswith(
        "failed: plugin: no other plugin gives the same: contract:llama is given by plugin archs"
    )
    code, out, _ = plugins("check", "acme", "--prefer", "contract:llama=acme")
    assert (code, "no other plugin gives" in out) == (0, False)


GREEDY = """
from mortice.core.errors import ModelFileError
from mortice.core.model.types import ModelFile
from mortice.core.plugin.hookspecs import hookimpl
mortice_contract_version = 1
@hookimpl
def mortice_open_model(path):
    if path.is_dir():
        raise ModelFileError(path, "a folder, wanted a file")
    return ModelFile(path=path, format="any", version="1", metadata={}, tensors={}, files=(path,), close=lambda: None)
"""


def test_two_loaders_that_take_the_same_file_are_a_conflict(plugins: Run, installed: Callable[[str], str]) -> None:
    installed(GREEDY)
    for name in ("acme", "loaders-gguf"):
        code, out, _ = plugins("check", name)
        assert code == 2
        conflict = "loader:gguf is given by plugin loaders-gguf (mortice) and by plugin acme (acme-for-commands 1.0)"
        assert f"failed: plugin: no other plugin gives the same: {conflict}" in out
    assert "loader:none is given by plugin loaders-safetensors (mortice) and by plugin acme" in plugins("list")[2]
    assert "conflict: loader:gguf with loaders-gguf" in plugins("list")[1]
    prefer = ["--prefer", "loader:gguf=loaders-gguf", "--prefer", "loader:none=loaders-safetensors"]
    assert "no other plugin gives" not in plugins("check", "acme", *prefer)[1]
    assert plugins("check", "loaders-gguf", *prefer)[0] == 0


def test_a_plugin_that_ends_the_process_fails_its_check(plugins: Run, installed: Callable[[str], str]) -> None:
    installed("import os; os._exit(7)")
    code, out, _ = plugins("check", "acme")
    assert code == 2
    assert "failed: plugin: it takes part: importing it ends the process (exit code 7)\n" in out
    assert plugins("check", "uploads-host")[0] == 0


def test_a_plugin_whose_hook_ends_the_process_fails_its_check(plugins: Run, installed: Callable[[str], str]) -> None:
    installed(
        "import os\nfrom mortice.core.plugin.hookspecs import hookimpl\nmortice_contract_version = 1\n"
        "@hookimpl\ndef mortice_qtypes():\n    os._exit(7)\n"
    )
    code, out, _ = plugins("check", "acme")
    assert code == 2
    assert "failed: plugin: it takes part: asking what it gives ends the process (exit code 7)\n" in out


def test_a_loader_is_checked_with_a_sample(plugins: Run, tmp_path: Path) -> None:
    code, out, _ = plugins("check", "loaders-gguf")
    assert code == 0, out
    assert "there is no sample" in out
    code, _, err = plugins("check", "loaders-gguf", "--sample", tmp_path / "none.gguf")
    assert code == 2
    assert "no such file" in err
    code, _, err = plugins("check", "loaders-gguf", "--sample", "/dev/zero")
    assert code == 2
    assert err.endswith("--sample: /dev/zero: wanted a regular file or a folder (a device)\n")


def test_a_sample_may_have_tensors_of_a_type_that_the_plugin_gives(
    plugins: Run, installed: Callable[[str], str], tmp_path: Path
) -> None:
    installed(RIGHT + LOADER)
    sample = tmp_path / "model.acme"
    sample.write_bytes(np.arange(8, dtype=np.float32).tobytes())
    out = plugins("check", "acme", "--sample", sample, "--json")[1]
    found = {check["check"]: check["status"] for check in json.loads(out)["checks"] if check["about"] == "loader acme"}
    assert found["a good file opens"] == found["views are the bytes of the file"] == "passed"


HOOKS = """
from mortice.core.plugin.hookspecs import hookimpl
mortice_contract_version = 1
@hookimpl
def mortice_validate(model, contract):
    return 'abc'
@hookimpl
def mortice_on_event(event):
    raise RuntimeError("out of anvils")
"""


def test_the_hooks_that_every_run_calls_are_checked(plugins: Run, installed: Callable[[str], str]) -> None:
    installed(HOOKS)
    code, out, _ = plugins("check", "acme")
    assert code == 2
    failed = "\n".join(line for line in out.splitlines() if line.startswith("failed: "))
    assert "failed: hook mortice_validate: it gives findings for models of every family" in failed
    assert "mortice_validate: returned str, wanted Iterable[Finding]" in failed
    assert "failed: hook mortice_on_event: it takes every event of a run: ModelOpened: " in failed
    assert "mortice_on_event: RuntimeError: out of anvils" in failed


# new --------------------------------------------------------------------------------------------------------------


def test_new_writes_a_package_and_never_over_another(plugins: Run, tmp_path: Path) -> None:
    for kind in KINDS:
        code, out, _ = plugins("new", f"acme-{kind}", "--kind", kind, "--folder", tmp_path)
        assert code == 0
        assert (tmp_path / f"acme-{kind}" / "src" / f"acme_{kind}" / "plugin.py").is_file()
        assert "tests/test_plugin.py" in out
        before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
        code, _, err = plugins("new", f"acme-{kind}", "--kind", kind, "--folder", tmp_path)
        assert code == 2
        assert "is there already" in err
        assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_a_new_loader_reads_past_its_mapping_as_fast_uploads_need_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_package("acme-reads", "loader", tmp_path)
    monkeypatch.syspath_prepend(folder / "src")
    suite = runpy.run_path(str(folder / "tests" / "test_plugin.py"))["TestAcmeReads"]()
    try:
        with registry_with(plugins={"acme": suite.plugin}).open_model(suite.sample(tmp_path)) as model:
            for view in model.tensors.values():
                assert view.reader is not None
                read = np.empty_like(view.data)
                view.reader(read, view.offset)
                np.testing.assert_array_equal(read, view.data)
    finally:
        for name in ("acme_reads", "acme_reads.plugin"):
            sys.modules.pop(name, None)


@pytest.mark.parametrize(
    "name", ["", "Acme", "acme_x", "-acme", "acme--x", "3d", "a/b", "../x", "ä", "json", "class", "qtypes", "a" * 300]
)
def test_bad_names_are_refused(name: str, plugins: Run, tmp_path: Path) -> None:
    code, _, err = plugins("new", "--kind", "arch", "--folder", tmp_path, "--", name)
    assert code == 2
    assert err.startswith("mortice: error: ")
    assert len(err) < 200
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["numpy", "attrs", "pluggy", "gguf", "pytest", "cuda-bindings"])
def test_the_name_of_an_installed_package_is_refused(name: str, plugins: Run, tmp_path: Path) -> None:
    code, _, err = plugins("new", name, "--kind", "arch", "--folder", tmp_path)
    assert (code, err.count("\n")) == (2, 1)
    assert f"import {name} means something else" in err or "a package of that name is installed" in err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["src", "conftest", "tests", "test-plugin", "hatchling", "mortice", "mortice-core"])
def test_a_name_that_the_package_itself_would_trip_over_is_refused(name: str, plugins: Run, tmp_path: Path) -> None:
    code, _, err = plugins("new", name, "--kind", "arch", "--folder", tmp_path)
    assert code == 2
    assert f"import {name.replace('-', '_')} means something else" in err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("name", "kind", "words"),
    [
        ("llama", "arch", "contract llama is given by plugin archs (mortice)"),
        ("q4-k", "qtype", "qtype Q4_K is given by plugin qtypes (mortice)"),
        ("pinned", "upload", "upload pinned is given by plugin uploads-device (mortice)"),
        ("safetensors", "loader", "loader safetensors is given by plugin loaders-safetensors (mortice)"),
    ],
)
def test_what_a_plugin_gives_already_is_refused(
    name: str, kind: str, words: str, monkeypatch: pytest.MonkeyPatch, plugins: Run, tmp_path: Path
) -> None:
    monkeypatch.setattr(package, "_is_importable", lambda _: False)  # a package of that name is another reason
    monkeypatch.setattr(package, "_installed_version", lambda _: None)
    code, _, err = plugins("new", name, "--kind", kind, "--folder", tmp_path)
    assert code == 2
    assert words in err
    assert not list(tmp_path.iterdir())


def test_the_name_of_an_installed_plugin_is_refused(
    plugins: Run, installed: Callable[[str], str], tmp_path: Path
) -> None:
    installed(RIGHT)
    code, _, err = plugins("new", "acme", "--kind", "arch", "--folder", tmp_path)
    assert code == 2
    assert "'acme' is the name of plugin acme (acme-for-commands 1.0)" in err


@pytest.mark.parametrize("folder", ["it's here; $HOME", "two\nlines", "\udcff", "-p"])
def test_the_next_steps_are_one_line_that_a_shell_takes(
    folder: str, plugins: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / folder).mkdir()
    code, out, _ = plugins("new", "acme", "--kind", "loader", f"--folder={folder}")
    assert code == 0
    wrote, next_, *rest = out.splitlines()
    assert (wrote.isprintable(), next_.isprintable(), rest) == (True, True, [])
    assert next_.endswith("mortice plugins check acme --sample FILE.acme")
    enter = next_.removeprefix("next: ").removesuffix(next_[next_.index("; python -m pip") :])
    done = subprocess.run(["bash", "-c", f"{enter} && pwd -P"], cwd=tmp_path, capture_output=True, check=True)
    assert os.fsdecode(done.stdout.removesuffix(b"\n")) == str((tmp_path / folder / "acme").resolve())


def test_a_kind_that_does_not_exist_is_refused(plugins: Run, tmp_path: Path) -> None:
    assert plugins("new", "acme", "--kind", "sampler", "--folder", tmp_path)[0] == 2
    with pytest.raises(ConfigError, match="did you mean loader"):
        write_package("acme", "loaders", tmp_path)


def test_a_folder_that_cannot_be_written_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="cannot be written"):
        write_package("acme", "arch", tmp_path / "file")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_type_ids_follow_from_the_name() -> None:
    ids: dict[str, Any] = {name: names_for(name).type_id for name in ("acme", "acme-two", "other")}
    assert len(set(ids.values())) == 3
    assert min(ids.values()) >= 1000
    assert names_for("acme").type_id == ids["acme"]
