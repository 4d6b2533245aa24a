"""Config layers: default < file < environment < flag, strictly read, every mistake named."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
from attrs import fields

from mortice.core.config import ModelConfig, RunConfig
from mortice.core.config_keys import config_keys, tables, variable_of
from mortice.core.config_layers import OTHER_VARIABLES, Flag, Origin, read_config, resolve_config
from mortice.core.errors import ConfigError


def written(folder: Path, text: str) -> Path:
    path = folder / "run.toml"
    path.write_text(text)
    return path


def refusal(file: Path | None = None, environment: dict[str, str] | None = None, flags: tuple[Flag, ...] = ()) -> str:
    with pytest.raises(ConfigError) as error:
        resolve_config(file, environment, flags)
    return str(error.value)


# layers


def test_without_any_layer_every_value_is_the_default() -> None:
    effective = resolve_config()
    assert effective.config == RunConfig()
    assert set(effective.origins.values()) == {Origin("default")}


def test_each_layer_overrides_those_below_it(tmp_path: Path) -> None:
    file = written(tmp_path, "[sampling]\ntop_k = 1\ntop_p = 0.1\nmin_p = 0.1\n")
    environment = {"MORTICE_SAMPLING_TOP_P": "0.2", "MORTICE_SAMPLING_MIN_P": "0.2"}
    effective = resolve_config(file, environment, [Flag("sampling.min_p", 0.3, "--min-p")])
    sampling = effective.config.sampling
    assert (sampling.top_k, sampling.top_p, sampling.min_p) == (1, 0.2, 0.3)
    assert effective.origins["sampling.top_k"] == Origin("file", str(file))
    assert effective.origins["sampling.top_p"] == Origin("environment", "MORTICE_SAMPLING_TOP_P")
    assert effective.origins["sampling.min_p"] == Origin("flag", "--min-p")
    assert effective.origins["sampling.seed"] == Origin("default")


def test_the_environment_counts_only_where_it_is_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MORTICE_SAMPLING_TOP_K", "7")
    file = written(tmp_path, "")
    assert read_config(file).sampling.top_k == 0
    assert read_config(file, {"MORTICE_SAMPLING_TOP_K": "7"}).sampling.top_k == 7


def test_the_later_of_two_flags_for_one_key_wins() -> None:
    flags = [Flag("sampling.top_k", 3, "--top-k"), Flag("sampling.top_k", "4", "--set sampling.top_k")]
    assert resolve_config(flags=flags).config.sampling.top_k == 4


# paths


def test_paths_in_a_file_are_relative_to_the_file_and_others_are_not(tmp_path: Path) -> None:
    file = written(tmp_path, '[model]\npath = "a.gguf"\ncontract = "/b.toml"\n')
    model = read_config(file).model
    assert (model.path, model.contract) == (tmp_path / "a.gguf", Path("/b.toml"))
    overridden = resolve_config(file, {"MORTICE_MODEL_PATH": "c.gguf"}, [Flag("model.contract", "d.toml", "x")])
    assert overridden.config.model.path == Path("c.gguf")
    assert overridden.config.model.contract == Path("d.toml")


def test_a_tilde_is_the_home_folder_in_every_layer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/somebody")
    file = written(tmp_path, '[model]\npath = "~/a.gguf"\n')
    assert read_config(file).model.path == Path("/home/somebody/a.gguf")
    flag = Flag("model.path", Path("~/b.gguf"), "--model")
    assert resolve_config(flags=[flag]).config.model.path == Path("/home/somebody/b.gguf")


def test_an_empty_path_is_refused(tmp_path: Path) -> None:
    assert "model.path: wanted a path" in refusal(written(tmp_path, '[model]\npath = ""\n'))


# mistakes in a file


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[sampling]\ntemprature = 1", "unknown key 'sampling.temprature', did you mean 'sampling.temperature'?"),
        ("[sampling]\nzzz = 1", "unknown key 'sampling.zzz'; sampling has temperature, top_k"),
        ("[generation]\ntemperature = 1", "unknown key 'generation.temperature', did you mean 'sampling.temperature'?"),
        ("[exector]\nname = 'cuda'", "unknown key 'exector', did you mean 'executor'?"),
        ("temperature = 1", "'temperature' stands in no table, did you mean 'sampling.temperature'?"),
        ("executor = 'cuda'", "executor: wanted a table, found 'cuda'"),
        ("[sampling]\ntop_k = '1'", "sampling.top_k: wanted an integer, found '1'"),
        ("[sampling]\ntop_k = true", "sampling.top_k: wanted an integer, found True"),
        ("[sampling]\ntop_k = 1.0", "sampling.top_k: wanted an integer, found 1.0"),
        ("[sampling]\ntemperature = -1", "sampling.temperature: found -1.0, wanted 0 (greedy)"),
        ("[sampling]\ntemperature = nan", "sampling.temperature: found nan"),
        ("[sampling]\nseed = -1", "sampling.seed: found -1"),
        ("[executor]\nname = 3", "executor.name: wanted a string, found 3"),
        ("[executor]\nkv = 'f8'", "executor.kv: wanted one of 'auto', 'f32', 'f16', 'q8_0', found 'f8'"),
        ("[executor]\ncontext = -1", "executor.context: found -1, wanted at least 0"),
        ("[generation]\nstop = 'a'", "generation.stop: wanted a list of strings, found 'a'"),
        ("[generation]\nstop = ['a', 1]", "generation.stop: wanted a list of strings"),
        ("[generation]\nstop = ['']", "generation.stop: found ('',)"),
        ("[plugins]\nprefer = {a = 1}", "plugins.prefer: wanted a string for 'a', found 1"),
        ("[sampling]\nlogit_bias = {x = 1}", "sampling.logit_bias: wanted token ids as keys, found 'x'"),
        ("[sampling]\nlogit_bias = {1 = 'x'}", "sampling.logit_bias: wanted a number for 1, found 'x'"),
        ("[prompt]\nchat_variables = 3", "prompt.chat_variables: wanted a table, found 3"),
        ("[prompt.chat_variables]\ntools = []", "prompt.chat_variables: found 'tools', which every template is given"),
        ("[prompt.chat_variables]\na = nan", "prompt.chat_variables: a: found nan, wanted a finite number"),
        ("[prompt.chat_variables]\na.b = 2024-07-26", "prompt.chat_variables: a: found date, wanted what JSON has"),
        ("[model]\npath = 3", "model.path: wanted a path, found 3"),
        ("[model", "not TOML"),
        ("[model]\npath = 'a'\npath = 'b'", "not TOML"),
        ("a=" + "[" * 100_000, "not TOML that can be read: nested too deeply"),
        (f"[executor]\ncontext = {'9' * 10_000}", "not TOML: an integer has more than 64 bits"),
        (f"[executor]\ncontext = 0x{'f' * 10_000}", "not TOML: an integer has more than 64 bits"),
    ],
)
def test_a_mistake_is_named_with_file_and_dotted_key(tmp_path: Path, text: str, message: str) -> None:
    file = written(tmp_path, text)
    assert refusal(file).startswith(f"{file}: {message}")


def test_all_mistakes_of_all_layers_are_reported_together(tmp_path: Path) -> None:
    file = written(tmp_path, "[sampling]\ntop_k = 'a'\n[limits]\nmemory = 3\n")
    message = refusal(file, {"MORTICE_SAMPLING_SEED": "x"}, (Flag("sampling.top_p", 2.0, "--top-p"),))
    first, *rest = message.splitlines()
    assert first == "4 mistakes in the configuration"
    assert [line.split(": ")[0].strip() for line in rest] == [
        str(file),
        str(file),
        "MORTICE_SAMPLING_SEED",
        "--top-p",
    ]


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    assert refusal(tmp_path / "no.toml") == f"{tmp_path}/no.toml: cannot be read: No such file or directory"
    assert "cannot be read" in refusal(tmp_path)
    broken = tmp_path / "latin.toml"
    broken.write_bytes(b"# \xe4")
    assert f"{broken}: cannot be read" in refusal(broken)


# logit bias


def test_a_logit_bias_is_a_table_of_token_ids(tmp_path: Path) -> None:
    file = written(tmp_path, "[sampling]\nlogit_bias = { 12 = -inf, '3' = 1 }\n")
    assert read_config(file).sampling.logit_bias == {12: -math.inf, 3: 1.0}


# environment


@pytest.mark.parametrize(
    ("variable", "near"),
    [
        ("MORTICE_EXECUTOR_NAM", "MORTICE_EXECUTOR_NAME"),
        ("MORTICE_SAMPLING_TEMPRATURE", "MORTICE_SAMPLING_TEMPERATURE"),
        ("MORTICE_MODEL", "MORTICE_MODEL_PATH"),
        ("MORTICE_EXECUTR_NAME", "MORTICE_EXECUTOR_NAME"),
    ],
)
def test_a_misspelt_variable_is_refused_with_the_nearest(variable: str, near: str) -> None:
    message = refusal(environment={variable: "x"})
    assert message == f"environment: unknown variable {variable}, did you mean {near}?"


def test_variables_that_are_no_keys_are_left_alone() -> None:
    others = dict.fromkeys([*OTHER_VARIABLES, "MORTICE_ACME_LEVEL", "HOME", "EXECUTOR_NAME"], "x")
    assert resolve_config(environment=others).config == RunConfig()


@pytest.mark.parametrize(
    ("variable", "advice"),
    [
        ("MORTICE_CONTEXT", "; the nearest is MORTICE_EXECUTOR_CONTEXT"),
        ("MORTICE_CACHES", "; the nearest is MORTICE_CACHE"),
        ("MORTICE_FOO", ""),
    ],
)
def test_a_variable_that_is_little_like_a_key_is_warned_of(
    variable: str, advice: str, caplog: pytest.LogCaptureFixture
) -> None:
    resolve_config(environment={variable: "5", **dict.fromkeys(OTHER_VARIABLES, "x")})
    assert caplog.messages == [f"environment: variable {variable} is no config key{advice}"]


@pytest.mark.parametrize(
    ("variable", "text", "key", "value"),
    [
        ("MORTICE_GENERATION_STOP", "END", "generation.stop", ("END",)),
        ("MORTICE_GENERATION_STOP", '["a, b", "c"]', "generation.stop", ("a, b", "c")),
        ("MORTICE_GENERATION_STOP_AT_EOS", "false", "generation.stop_at_eos", False),
        ("MORTICE_SAMPLING_SEED", "none", "sampling.seed", None),
        ("MORTICE_SAMPLING_TEMPERATURE", "1e-1", "sampling.temperature", 0.1),
        ("MORTICE_SAMPLING_LOGIT_BIAS", "{ 5 = -inf }", "sampling.logit_bias", {5: -math.inf}),
        ("MORTICE_PLUGINS_PREFER", '{ "qtype:Q4_K" = "a" }', "plugins.prefer", {"qtype:Q4_K": "a"}),
        ("MORTICE_PROMPT_TEXT", "[not a list]", "prompt.text", "[not a list]"),
    ],
)
def test_a_variable_is_read_as_text_of_its_keys_type(variable: str, text: str, key: str, value: object) -> None:
    assert resolve_config(environment={variable: text}).value(key) == value


@pytest.mark.parametrize(
    ("variable", "text", "wanted"),
    [
        ("MORTICE_GENERATION_STOP_AT_EOS", "yes", "wanted true or false"),
        ("MORTICE_SAMPLING_TOP_K", "1_0", "wanted an integer"),
        ("MORTICE_SAMPLING_TOP_K", "9" * 5000, "wanted an integer"),
        ("MORTICE_SAMPLING_TOP_P", "half", "wanted a number"),
        ("MORTICE_GENERATION_STOP", '["a"', "wanted a list of strings, as in TOML"),
        ("MORTICE_SAMPLING_LOGIT_BIAS", "5", "wanted a table, found 5"),
        ("MORTICE_EXECUTOR_KV", "f8", "wanted one of"),
        ("MORTICE_GENERATION_STOP", "[" * 50_000, "wanted a list of strings, as in TOML"),
        ("MORTICE_GENERATION_STOP", "ü\udcff", "not UTF-8 at byte 2"),
        ("MORTICE_PROMPT_TEXT", "a\udcff", "not UTF-8 at byte 1"),
    ],
)
def test_a_variable_of_the_wrong_type_is_refused(variable: str, text: str, wanted: str) -> None:
    message = refusal(environment={variable: text})
    assert message.startswith(f"{variable}: ")
    assert wanted in message


# keys


def test_every_key_has_a_description_and_a_type_in_words() -> None:
    assert [key.dotted for key in config_keys().values() if not key.doc or not key.type_text] == []


def test_every_key_of_every_table_is_listed_once() -> None:
    attributes = [f"{table}.{attribute.name}" for table, cls in tables().items() for attribute in fields(cls)]
    assert list(config_keys()) == attributes
    assert list(tables()) == [attribute.name for attribute in fields(RunConfig)]


def test_the_listed_defaults_are_those_of_the_classes() -> None:
    config = RunConfig()
    for key in config_keys().values():
        assert getattr(getattr(config, key.table), key.name) == key.default


def test_no_two_keys_share_a_variable() -> None:
    assert len({variable_of(key) for key in config_keys()}) == len(config_keys())


def test_a_path_may_be_given_as_text_in_python() -> None:
    assert ModelConfig(path="a.gguf").path == Path("a.gguf")
