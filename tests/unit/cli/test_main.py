"""The command as a whole: usage errors, help, plugins, and that nothing goes undocumented."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

import mortice as package
from mortice.core.cli.flags import FLAGS
from mortice.core.config_keys import config_keys
from mortice.core.errors import DeviceError
from mortice.core.plugin.registry import make_registry
from mortice.plugins.executors.cuda.executor import CudaExecutor
from tests.docs.reference import commands, flags_of
from tests.support.registry import install
from tests.unit.cli.conftest import Mortice


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["rnu"], 'Unknown command "rnu"'),
        (["run", "--promt", "x"], "Unknown option: --promt. Did you mean --prompt?"),
        (["run", "--prompt"], "run: --prompt wants a value; usage: mortice run [CONFIG|MODEL] [flags]"),
        (["run", "--temperature", "hot"], "Invalid value for --temperature: found 'hot', wanted a number"),
        (["run", "--top-k", "1.5"], "Invalid value for --top-k: found '1.5', wanted an integer"),
        (["fit"], "fit: FILE is missing; usage: mortice fit FILE [flags]"),
        (["synth", "a"], "synth: RECIPE is missing; usage: mortice synth SHAPE RECIPE OUT [flags]"),
        (["validate"], "validate: PATH is missing; usage: mortice validate PATH [PATHS…] [flags]"),
        (["contract", "diff", "a"], "contract diff: SECOND is missing; usage: mortice contract diff FIRST SECOND"),
        (["run", "a.toml", "b.toml"], "run: found 'b.toml' beyond its arguments; usage: mortice run [CONFIG|MODEL]"),
        (["plugins", "lst"], "usage: mortice plugins COMMAND, see mortice plugins --help"),
        (["config", "schema", "--format", "xml"], "--format"),
        (["bench", "-p", "1,a"], "bench: Invalid value for -p: found 'a', wanted integers separated by commas;"),
        (["parity", "m.gguf", "--token-ids", "1,"], "Invalid value for --token-ids: found '', wanted integers sep"),
    ],
)
def test_a_usage_error_is_a_line_and_exit_code_2(mortice: Mortice, arguments: list[str], message: str) -> None:
    ran = mortice(*arguments)
    assert (ran.code, ran.out) == (2, "")
    assert ran.err.startswith("mortice: error: ")
    assert message in ran.err
    assert ran.err.count("\n") == 1
    assert "; usage: mortice " in ran.err
    assert mortice(*arguments, "--json").json["error"]["exit_code"] == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--set", "sampling.top_k"], "--set: found 'sampling.top_k', wanted TABLE.KEY=VALUE"),
        (["--set", "sampling.topk=1"], "unknown key 'sampling.topk', did you mean 'sampling.top_k'?"),
        (["--logit-bias", "7"], "--logit-bias: found '7', wanted ID=BIAS"),
        (["--logit-bias", "x=1"], "--logit-bias: wanted token ids as keys, found 'x'"),
        (["--prefer", "qtype:Q4_K"], "--prefer: found 'qtype:Q4_K', wanted KIND:KEY=PLUGIN"),
        (["--prefer", "colour:red=archs"], "plugins.prefer: 'colour:red'"),
        (["--temperature", "-1"], "--temperature: found -1.0, wanted 0 (greedy)"),
        (["--executor", "abacus"], "executor.name: unknown 'abacus'; have"),
        (["--kv", "f8"], "--kv: wanted one of 'auto'"),
        (["--layout", "sideways"], "kernels.layout: unknown 'sideways'"),
        (["--upload", "pigeon"], "upload.strategy: unknown 'pigeon'"),
        (["--stop", ""], "--stop: found ('',)"),
    ],
)
def test_a_flag_with_a_bad_value_is_refused(mortice: Mortice, tiny: Path, arguments: list[str], message: str) -> None:
    ran = mortice("run", "-m", tiny, "-p", "a", "-q", *arguments)
    assert ran.code == 2
    assert message in ran.err


def test_a_usage_error_is_the_same_one_line_for_people_and_programs(mortice: Mortice) -> None:
    ran = mortice("rnu", "--json")
    assert ran.err == f"mortice: error: {ran.json['error']['message']}\n"


@pytest.mark.parametrize("arguments", [["run", "-p", "a", "-m", ""], ["inspect", ""], ["run", ""]])
def test_an_empty_path_is_refused(mortice: Mortice, arguments: list[str]) -> None:
    ran = mortice(*arguments)
    assert ran.code == 2
    assert "found '', wanted a path" in ran.err


def test_a_folder_or_an_empty_file_in_the_place_of_a_model_is_called_so(mortice: Mortice, tmp_path: Path) -> None:
    (tmp_path / "empty").touch()
    assert mortice("inspect", tmp_path).err.endswith(" (a folder)\n")
    assert mortice("inspect", tmp_path / "empty").err.endswith(" (an empty file)\n")
    assert mortice("inspect", "/dev/null").err.endswith(" (a device)\n")


def test_a_line_end_in_a_path_does_not_break_the_line(mortice: Mortice) -> None:
    assert mortice("inspect", "a\nb.gguf").err == "mortice: error: a\\nb.gguf: no such file or folder\n"


def test_a_value_that_nobody_serves_is_refused_with_its_source(
    mortice: Mortice, tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MORTICE_EXECUTOR_NAME", "abacus")
    err = mortice("run", "-m", tiny, "-p", "a").err
    assert err.startswith("mortice: error: executor.name: unknown 'abacus'; have ")
    assert err.endswith(" (from environment MORTICE_EXECUTOR_NAME)\n")
    assert "(from flag --executor)" in mortice("run", "-m", tiny, "-p", "a", "--executor", "b").err


def test_what_is_missing_is_reported_together(mortice: Mortice) -> None:
    err = mortice("run").err
    assert "model.path: no model given, prompt.text: no prompt given; pass --model FILE and --prompt TEXT" in err


def test_no_prompt_and_no_model_are_refused_by_name(mortice: Mortice, tiny: Path) -> None:
    assert "prompt.text: no prompt given" in mortice("run", "-m", tiny).err
    assert "model.path: no model given" in mortice("run", "-p", "a").err


def test_help_shows_what_may_be_chosen() -> None:
    """Fixed choices are those of the config; what plugins give is at least what the built-ins give."""
    registry = make_registry()
    layouts = {
        kernel.layout.name
        for executor in map(registry.executor, registry.executors)
        for kernel in executor.kernels(None, [type_.value for type_ in registry.qtypes.values()])  # type: ignore[arg-type]
    }
    wanted = {
        **{key: known.choices for key, known in config_keys().items() if known.choices},
        "executor.name": ("auto", *registry.executors),
        "upload.strategy": ("auto", *registry.uploads),
        "kernels.layout": ("auto", "compact", *layouts),
        "model.quantize": (
            "none",
            *(name for name, type_ in registry.qtypes.items() if type_.value.quantize is not None),
        ),
    }
    assert {"executor.kv", "executor.activations", "executor.tuning"} <= set(wanted)
    helps = {
        flag: text
        for name, command in commands()
        if name == "run"
        for flags, text, _ in flags_of(command)
        for flag in flags
    }
    for key, choices in wanted.items():
        words = set(re.findall(r"[\w-]+", helps[FLAGS[key][0]]))
        assert set(choices) <= words, key


def test_products_without_a_gpu_say_that_a_cuda_device_is_needed(
    mortice: Mortice, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(CudaExecutor, "device", _no_device)
    for flags, begin in (
        ((), "products: executor reference (auto: no NVIDIA driver) cannot time them"),
        (("--executor", "cuda"), "no NVIDIA driver"),
        (("--executor", "reference"), "products: executor reference (asked for) cannot time them"),
    ):
        ran = mortice("bench", "--products", *flags)
        advice = "timing products takes a CUDA device: run it on a machine where nvidia-smi lists one"
        assert (ran.code, ran.err) == (2, f"mortice: error: {begin}; {advice}\n")


@pytest.mark.parametrize("flags", [(), ("--executor", "reference", "--against", "cuda")])
def test_parity_without_a_gpu_does_not_advise_the_executor_it_compares_with(
    mortice: Mortice, tiny: Path, monkeypatch: pytest.MonkeyPatch, flags: tuple[str, ...]
) -> None:
    monkeypatch.setattr(CudaExecutor, "device", _no_device)
    ran = mortice("parity", tiny, *flags)
    assert ran.code == 2
    assert ran.err.startswith("mortice: error: no NVIDIA driver; parity compares two executors: run it where both")
    assert "On a CPU alone, `mortice validate --deep` checks the file" in ran.err
    assert "executor = " not in ran.err


def _no_device(_: object) -> None:
    raise DeviceError('no NVIDIA driver; executor = "reference" runs on the CPU')


def test_help_names_every_command(mortice: Mortice) -> None:
    out = mortice("--help").out
    for command in ("run", "chat", "validate", "inspect", "tokenize", "fit", "plugins", "config"):
        assert f" {command} " in out
    assert mortice("--version").out.strip() == package.__version__


def test_every_config_key_has_a_flag_and_every_flag_is_in_the_help_of_run(mortice: Mortice) -> None:
    assert FLAGS.keys() == config_keys().keys()
    words = set(mortice("run", "--help").out.split())
    missing = [name for names in FLAGS.values() for name in names if name not in words]
    assert not missing


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys; from mortice.core.cli.main import main; main(['run', '--help']);"
        "print(*sys.modules, file=sys.stderr)"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    heavy = {"numpy", "tokenizers", "gguf", "jinja2", "mortice.core.pipeline"}
    assert not heavy & set(ran.stderr.split())


# the face


def test_the_face_gives_every_name_it_lists() -> None:
    for name in package.__all__:
        assert getattr(package, name) is not None
    assert set(package.__all__) <= set(dir(package))
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        _ = package.nothing


# plugins


def test_plugins_are_listed_with_what_they_give(mortice: Mortice) -> None:
    found = {plugin["name"]: plugin for plugin in mortice("plugins", "list", "--json").json}
    assert "llama" in found["archs"]["gives"]["contracts"]
    assert found["loaders-gguf"]["gives"] == {"loaders": ["loaders-gguf"]}
    assert found["executors-reference"]["gives"] == {"executors": ["reference"]}
    assert found["uploads-host"]["gives"] == {"uploads": ["host"]}
    assert "Q4_K" in found["qtypes"]["gives"]["qtypes"]
    assert {plugin["status"] for plugin in found.values() if plugin["source"] == "builtin"} == {"active"}
    assert "contracts: " in mortice("plugins", "list").out


def test_a_blocked_plugin_is_listed_as_blocked(mortice: Mortice) -> None:
    found = mortice("plugins", "list", "--block-plugin", "uploads-host", "--json").json
    assert {plugin["name"]: plugin["status"] for plugin in found}["uploads-host"] == "blocked"


@pytest.fixture
def broken_plugin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """An installed plugin that cannot be imported."""
    folder = tmp_path / "packages"
    folder.mkdir()
    install(folder, "acme-tools", {"acme": "acme_tools"}, "raise RuntimeError('out of anvils')")
    monkeypatch.syspath_prepend(folder)
    return "acme"


@pytest.mark.parametrize("command", [["validate"], ["inspect"], ["fit"], ["run", "-p", "a", "-n", "1", "-q", "-m"]])
def test_every_command_names_a_broken_plugin_once_and_goes_on(
    mortice: Mortice, tiny: Path, broken_plugin: str, command: list[str]
) -> None:
    ran = mortice(*command, tiny)
    assert ran.code == 0
    assert ran.err.count("out of anvils") == 1
    assert f"mortice: warning: plugin {broken_plugin}" in ran.err


def test_a_broken_plugin_is_listed_with_its_error(mortice: Mortice, broken_plugin: str) -> None:
    found = {plugin["name"]: plugin for plugin in mortice("plugins", "list", "--json").json}[broken_plugin]
    assert found["status"] == "failed"
    assert "out of anvils" in found["error"]
    assert found["distribution"].startswith("acme-tools")


def test_a_broken_plugin_is_an_error_where_it_was_asked_for(mortice: Mortice, broken_plugin: str) -> None:
    for flags in (["--strict-plugins"], ["--allow-plugin", broken_plugin]):
        ran = mortice("plugins", "list", *flags)
        assert ran.code == 2
        assert "out of anvils" in ran.err
        assert "Traceback" not in ran.err


def test_the_block_list_silences_a_broken_plugin(mortice: Mortice, broken_plugin: str) -> None:
    ran = mortice("plugins", "list", "--block-plugin", broken_plugin)
    assert (ran.code, ran.err) == (0, "")


def test_what_the_library_logs_looks_like_a_warning_of_ours(mortice: Mortice) -> None:
    assert (
        "mortice: warning: plugins.block: no plugin 'nobody'"
        in mortice("plugins", "list", "--block-plugin", "nobody").err
    )


def test_an_error_in_a_plugins_hook_names_the_plugin(
    mortice: Mortice, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "packages"
    folder.mkdir()
    source = (
        "from mortice.core.plugin.hookspecs import hookimpl\n"
        "@hookimpl\n"
        "def mortice_validate(model, contract):\n"
        "    return [1 / 0]\n"
    )
    install(folder, "acme-checks", {"checks": "acme_checks"}, source)
    monkeypatch.syspath_prepend(folder)
    ran = mortice("fit", tiny)
    assert ran.code == 2
    assert "plugin checks (acme-checks 1.0)" in ran.err
    assert "ZeroDivisionError" in ran.err
    assert isinstance(sys.modules.get("acme_checks"), ModuleType)


@pytest.mark.parametrize(
    "command",
    [
        ["config", "init", "/proc/mortice.toml"],
        ["contract", "derive", "MODEL", "--output", "/proc/mortice.toml"],
        ["synth", "SmolLM2-135M", "Q8_0", "/proc/mortice.gguf", "--layers", "1"],
        ["plugins", "new", "acme", "--kind", "arch", "--folder", "/proc"],
    ],
    ids=lambda command: " ".join(command[:2]),
)
def test_a_place_where_the_system_lets_nothing_be_written_is_exit_code_1_for_every_command(
    mortice: Mortice, tiny: Path, command: list[str]
) -> None:
    ran = mortice(*[str(tiny) if part == "MODEL" else part for part in command])
    assert ran.code == 1
    assert "cannot be written: " in ran.err
    assert ran.err.count("\n") == 1
