"""What hooks give: used under its key, refused when it is not what is wanted, always with the plugin's name.

Every hook has tests here whose names begin with its own; `test_documented` counts them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from attrs import evolve

from mortice.arch_contracts.schema import Contract, parse_contract
from mortice.core.errors import (
    ConfigError,
    ModelFileError,
    MorticeError,
    PluginError,
    UnknownArchitectureError,
)
from mortice.core.model.findings import Finding
from mortice.core.model.qtypes import QType
from mortice.core.model.types import DeviceInfo, LoadOptions, ModelFile, TensorView
from mortice.core.model.weight_plan import Kernel
from mortice.core.plugin.events import Event, StepDone, UploadProgress
from mortice.core.plugin.interfaces import QuantizationType
from tests.support.registry import (
    Upload,
    contract,
    kernel,
    like_reference,
    make_registry,
    model_file,
    plugin_of,
    qtype,
)

CPU = DeviceInfo(kind="cpu", name="a CPU", total_bytes=1, free_bytes=1)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    made = tmp_path / "model.toy"
    made.write_bytes(b"toy")
    return made


def test_mortice_open_model_names_its_loader_and_is_told_the_types(path: Path) -> None:
    told: list[LoadOptions] = []

    def open_toy(path: Path, options: LoadOptions) -> ModelFile | None:
        told.append(options)
        return model_file(path) if path.suffix == ".toy" else None

    hooks = plugin_of(mortice_open_model=open_toy, mortice_qtypes=lambda: [qtype()])
    model = make_registry({"mine": hooks}).open_model(path)
    assert (model.format, model.loader) == ("toy", "mine")
    assert told[0].qtypes[900].name == "MINE"


def test_mortice_open_model_declined_by_all_names_those_asked_and_those_missing(path: Path) -> None:
    plugins = {name: plugin_of(mortice_open_model=lambda path: None) for name in ("mine", "other")}
    with pytest.raises(ModelFileError) as caught:
        make_registry(plugins, block=("other",)).open_model(path)
    message = str(caught.value)
    assert message.startswith(f"{path}: no loader takes it; asked: loaders-gguf, ")
    assert message.endswith(", mine; plugin other (given) is blocked: in plugins.block; it begins with 74 6f 79 (toy)")


def test_mortice_open_model_taken_by_two_is_a_conflict_and_both_files_are_closed(path: Path) -> None:
    closed: list[str] = []
    plugins = {
        "one": plugin_of(mortice_open_model=lambda path: model_file(path, format_name="first", closed=closed)),
        "two": plugin_of(mortice_open_model=lambda path: model_file(path, format_name="second", closed=closed)),
    }
    with pytest.raises(PluginError) as caught:
        make_registry(plugins).open_model(path)
    assert str(caught.value) == (
        f"{path}: loader:toy is given by plugin one (given) and by plugin two (given); "
        'choose one in the config: [plugins.prefer] "loader:toy" = "one" or "two"; '
        "or block one: --block-plugin NAME (plugins.block)"
    )
    assert closed == ["first", "second"]


def test_mortice_open_model_of_the_preferred_plugin_is_the_only_one_called(path: Path) -> None:
    plugins = {
        "one": plugin_of(mortice_open_model=raises_for_a_path),
        "two": plugin_of(mortice_open_model=lambda path: model_file(path, format_name="second")),
    }
    assert make_registry(plugins, prefer={"loader:toy": "two"}).open_model(path).format == "second"


def raises_for_a_path(path: Path) -> None:
    raise AssertionError("not to be asked")


def test_mortice_open_model_of_others_is_called_when_the_preferred_plugin_declines(path: Path) -> None:
    plugins = {
        "one": plugin_of(mortice_open_model=lambda path: None),
        "two": plugin_of(mortice_open_model=lambda path: model_file(path, format_name="second")),
    }
    assert make_registry(plugins, prefer={"loader:toy": "one"}).open_model(path).loader == "two"


def test_mortice_open_model_that_finds_a_broken_file_keeps_its_error_and_is_named(path: Path) -> None:
    closed: list[str] = []

    def broken(path: Path) -> None:
        raise ModelFileError(path, "tensor data end early", 12)

    plugins = {
        "one": plugin_of(mortice_open_model=lambda path: model_file(path, format_name="first", closed=closed)),
        "two": plugin_of(mortice_open_model=broken),
    }
    with pytest.raises(ModelFileError) as caught:
        make_registry(plugins).open_model(path)
    assert str(caught.value) == f"{path}: byte 12: tensor data end early"
    assert caught.value.__notes__ == ["raised by plugin two (given) in mortice_open_model"]
    assert closed == ["first"]


def test_mortice_open_model_that_fails_otherwise_is_a_plugin_error(path: Path) -> None:
    with pytest.raises(PluginError, match=r"^plugin mine \(given\): mortice_open_model: UnicodeDecodeError: "):
        make_registry({"mine": plugin_of(mortice_open_model=lambda path: b"\xff".decode())}).open_model(path)


def with_fields(path: Path, **fields: Any) -> ModelFile:
    return evolve(model_file(path), **fields)


def bad_names(path: Path) -> ModelFile:
    model = model_file(path)
    view = TensorView(
        name="b", shape=(1,), qtype=QType(0, "F32", 1, 4), data=np.zeros(4, np.uint8), offset=0, path=path
    )
    return evolve(model, tensors={"a": view})


def bad_data(path: Path) -> ModelFile:
    data: Any = np.zeros(1, np.float32)
    view = TensorView(name="a", shape=(1,), qtype=QType(0, "F32", 1, 4), data=data, offset=0, path=path)
    return evolve(model_file(path), tensors={"a": view})


@pytest.mark.parametrize(
    ("give", "fault"),
    [
        (lambda path: {"tensors": {}}, "gave dict, wanted ModelFile"),
        (lambda path: ModelFile, "gave the class ModelFile, wanted ModelFile"),
        (lambda path: with_fields(path, metadata=[]), "metadata and tensors are to be mappings by name"),
        (lambda path: with_fields(path, metadata={1: 2}), "metadata key 1 is not a string"),
        (lambda path: with_fields(path, metadata={"a": None}), "metadata 'a' is NoneType, wanted a scalar, .*"),
        (lambda path: with_fields(path, metadata={"a": {"b": 1}}), "metadata 'a' is dict, wanted a scalar, .*"),
        (lambda path: with_fields(path, metadata={"a": [1, 2]}), "metadata 'a' is list, wanted a scalar, .*"),
        (
            lambda path: with_fields(path, metadata={"a": np.ones((2, 2))}),
            "metadata 'a' is ndarray, wanted a scalar, .*",
        ),
        (lambda path: with_fields(path, tensors={"a": b""}), "tensor 'a' is a bytes, wanted a TensorView"),
        (bad_names, "tensor 'a' stands under another name than its own, 'b'"),
        (bad_data, r"tensor 'a': data is float32 \(1,\), wanted uint8 in one dimension"),
    ],
)
def test_mortice_open_model_that_returns_something_else_is_refused(
    path: Path, give: Callable[[Path], object], fault: str
) -> None:
    with pytest.raises(PluginError, match=rf"^plugin mine \(given\): mortice_open_model: {fault}$"):
        make_registry({"mine": plugin_of(mortice_open_model=lambda path: give(path))}).open_model(path)


def test_mortice_open_model_is_not_called_for_a_path_that_cannot_be(tmp_path: Path) -> None:
    registry = make_registry({"mine": plugin_of(mortice_open_model=raises_for_a_path)})
    for wrong, message in (
        (tmp_path / "absent.toy", "no such file or folder"),
        (tmp_path / ("x" * 300), "cannot be read: File name too long"),
        (Path("a\0b"), "cannot be read: embedded null byte"),
    ):
        with pytest.raises(ModelFileError, match=message):
            registry.open_model(wrong)


def test_mortice_arch_contracts_serve_each_of_their_architectures(path: Path) -> None:
    both = evolve(contract(), architectures=("toy", "toy2"))
    registry = make_registry({"mine": plugin_of(mortice_arch_contracts=lambda: [both])})
    for architecture in both.architectures:
        assert registry.contract_for(model_file(path, architecture=architecture)) is both


def test_mortice_arch_contracts_that_cannot_be_parsed_name_the_plugin() -> None:
    hooks = plugin_of(mortice_arch_contracts=lambda: [parse_contract("[contract]", "acme.toml")])
    with pytest.raises(PluginError, match=r"^plugin mine \(given\): mortice_arch_contracts: .*acme.toml: ") as caught:
        make_registry({"mine": hooks})
    assert "\n" not in str(caught.value)


def test_mortice_arch_contracts_missing_for_a_file_names_the_nearest_and_the_plugins_that_are_out(path: Path) -> None:
    registry = make_registry(
        {"mine": plugin_of(mortice_arch_contracts=lambda: [contract("toy")])}, block=("uploads-host",)
    )
    with pytest.raises(UnknownArchitectureError, match=r"unknown architecture 'toi'; nearest are toy, .* is blocked"):
        registry.contract_for(model_file(path, architecture="toi"))
    with pytest.raises(UnknownArchitectureError, match=r"general.architecture is missing"):
        registry.contract_for(model_file(path, architecture=""))
    with pytest.raises(UnknownArchitectureError) as caught:
        registry.contract_for(model_file(path, architecture="x" * 1_000_000))
    assert len(str(caught.value)) < 1000


def test_mortice_qtypes_are_found_by_name_and_by_id() -> None:
    registry = make_registry({"mine": plugin_of(mortice_qtypes=lambda: [qtype()])})
    assert registry.qtypes["MINE"].plugin == "mine"
    assert registry.qtype_table[900] == QType(900, "MINE", 1, 4)


@pytest.mark.parametrize(("number", "name"), [(12, "MINE"), (900, "Q4_K"), (12, "Q4_K")])
def test_mortice_qtypes_may_not_give_ggmls_ids_and_names_another_meaning(number: int, name: str) -> None:
    message = (
        rf"plugin mine \(given\): mortice_qtypes: QType\(id={number}, name='{name}', .* contradicts GGML's QType\(id=12"
    )
    with pytest.raises(PluginError, match=message):
        make_registry({"mine": plugin_of(mortice_qtypes=lambda: [qtype(number, name)])}, prefer={"qtype:Q4_K": "mine"})


def test_mortice_qtypes_of_two_plugins_may_not_share_an_id() -> None:
    plugins = {
        "one": plugin_of(mortice_qtypes=lambda: [qtype(900, "ONE")]),
        "two": plugin_of(mortice_qtypes=lambda: [qtype(900, "TWO")]),
    }
    message = r"tensor type id 900 is used by plugin one \(given\) for ONE and by plugin two \(given\) for TWO"
    with pytest.raises(PluginError, match=message):
        make_registry(plugins)


@pytest.mark.parametrize(
    "broken", [{"qtype": "Q4_K"}, {"dequantize": None}, {"traits": "traits.cuh"}, {"qtype": None, "dequantize": 1}]
)
def test_mortice_qtypes_with_wrong_parts_name_the_plugin(broken: dict[str, Any]) -> None:
    parts: dict[str, Any] = {"qtype": QType(900, "MINE", 1, 1), "dequantize": lambda rows: rows, **broken}
    with pytest.raises(PluginError, match=r"^plugin mine \(given\): mortice_qtypes: (TypeError|NotCallableError): "):
        make_registry({"mine": plugin_of(mortice_qtypes=lambda: [QuantizationType(**parts)])})


@pytest.mark.parametrize(
    ("dequantize", "message"),
    [
        (lambda rows: rows.view("<f4")[:1], r"returned float32 \(1, 2\), wanted float32 \(3, 2\)"),
        (lambda rows: rows.view("<f4").astype(np.float64), r"returned float64 \(3, 2\), wanted float32 \(3, 2\)"),
        (lambda rows: [0.0], r"returned list, wanted float32 \(3, 2\)"),
        (lambda rows: rows[9], "IndexError: "),
    ],
)
def test_mortice_qtypes_that_dequantise_wrongly_name_the_plugin(dequantize: Callable[[Any], Any], message: str) -> None:
    mine = QuantizationType(qtype=QType(900, "MINE", 1, 4), dequantize=dequantize)
    registry = make_registry({"mine": plugin_of(mortice_qtypes=lambda: [mine])})
    with pytest.raises(PluginError, match=rf"^plugin mine \(given\): dequantize MINE: {message}"):
        registry.qtypes["MINE"].value.dequantize(np.zeros((3, 8), np.uint8))


def test_mortice_kernels_follow_those_of_the_executor_and_name_their_plugin() -> None:
    hooks = plugin_of(mortice_kernels=lambda device: [kernel()], mortice_qtypes=lambda: [qtype(901, "OTHER")])
    registry = make_registry({"mine": hooks})
    kernels = registry.kernels(registry.executor("reference"), CPU)
    assert (kernels[-1].qtype, kernels[-1].plugin) == ("MINE", "mine")
    assert {kernel.plugin for kernel in kernels[:-1]} == {"executors-reference"}


def test_mortice_kernels_override_the_executors_only_by_preference() -> None:
    plugins = {"mine": plugin_of(mortice_kernels=lambda device: [kernel(qtype="F32")])}
    for prefer, expected in (({}, "executors-reference"), ({"kernel:linear:F32": "mine"}, "mine")):
        registry = make_registry(plugins, prefer=prefer)
        kernels = registry.kernels(registry.executor("reference"), CPU)
        first = next(it for it in kernels if (it.operator, it.qtype) == ("linear", "F32"))
        assert first.plugin == expected


def test_mortice_kernels_of_two_plugins_for_one_type_are_a_conflict_that_prefer_decides() -> None:
    plugins = {name: plugin_of(mortice_kernels=lambda device: [kernel()]) for name in ("one", "two")}
    registry = make_registry(plugins)
    with pytest.raises(PluginError, match=r"kernel:linear:MINE is given by plugin one \(given\) and by plugin two"):
        registry.kernels(registry.executor("reference"), CPU)
    registry = make_registry(plugins, prefer={"kernel:linear:MINE": "two"})
    kernels = registry.kernels(registry.executor("reference"), CPU)
    assert [it.plugin for it in kernels if it.qtype == "MINE"] == ["two"]


@pytest.mark.parametrize(
    ("give", "message"),
    [
        (lambda: [kernel("liniar")], "there is no operator 'liniar'; operators are act, "),
        (lambda: ["linear"], "gave str, wanted Kernel"),
        (lambda: [Kernel(operator="linear", qtype="F32", layout=object())], "object, given as Layout, has no name"),  # type: ignore[arg-type]
    ],
)
def test_mortice_kernels_that_are_none_are_refused(give: Callable[[], list[object]], message: str) -> None:
    registry = make_registry({"mine": plugin_of(mortice_kernels=lambda device: give())})
    with pytest.raises(PluginError, match=rf"^plugin mine \(given\): mortice_kernels: {message}"):
        registry.kernels(registry.executor("reference"), CPU)


def test_mortice_upload_strategies_are_found_by_name() -> None:
    registry = make_registry({"mine": plugin_of(mortice_upload_strategies=lambda: [Upload()])})
    assert registry.provider(registry.upload("teleport")) == "mine"
    have = "host, mapped, measured, pageable, pinned, teleport"
    with pytest.raises(ConfigError, match=rf"^upload.strategy: unknown 'telepart'; have {have}$"):
        registry.upload("telepart")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"upload": lambda self, resident: 0}, r"U 'teleport': upload is to be a method that takes \(resident, emit\)"),
        ({"upload": 5}, r"U 'teleport': upload is to be a method that takes \(resident, emit\)"),
        ({"device_kind": "tpu"}, "U 'teleport': device_kind is 'tpu', wanted 'cpu' or 'cuda'"),
        ({"name": ""}, "U: name is '', wanted a non-empty string"),
        ({"name": "auto"}, "U: the name 'auto' is taken: in a config it means to choose"),
    ],
)
def test_mortice_upload_strategies_that_do_not_conform_are_refused(changes: dict[str, object], message: str) -> None:
    strategy = type("U", (Upload,), changes)()
    with pytest.raises(PluginError, match=rf"^plugin mine \(given\): mortice_upload_strategies: {message}$"):
        make_registry({"mine": plugin_of(mortice_upload_strategies=lambda: [strategy])})


def test_mortice_upload_strategies_have_to_be_objects() -> None:
    with pytest.raises(PluginError, match="gave the class Upload, wanted an object of it"):
        make_registry({"mine": plugin_of(mortice_upload_strategies=lambda: [Upload])})


def test_mortice_executors_are_found_by_name_and_their_events_name_the_plugin() -> None:
    mine = like_reference()
    registry = make_registry({"mine": plugin_of(mortice_executors=lambda: [mine])})
    assert registry.executor("mine") is mine
    told: list[Event] = []
    registry.observers.append(told.append)
    registry.emitter(registry.executor("mine"))(StepDone(tokens=1, seconds=0.5))
    registry.emit(UploadProgress(strategy="host", done_bytes=1, total_bytes=2))
    assert [event.plugin for event in told] == ["mine", "mortice"]


def test_mortice_executors_lacking_parts_are_refused_with_all_of_them_named() -> None:
    class Half:
        def device(self) -> None: ...

    with pytest.raises(PluginError) as caught:
        make_registry({"mine": plugin_of(mortice_executors=lambda: [Half()])})
    for part in ("name", "kernels", "unsupported", "kv_bytes", "workspace_bytes", "allocate", "default_upload", "open"):
        assert f"Half, given as Executor, has no {part}" in str(caught.value)


def test_mortice_executors_that_fail_name_their_plugin() -> None:
    def kernels(self: object, device: object, qtypes: object) -> None:
        raise ZeroDivisionError("no lanes")

    registry = make_registry({"mine": plugin_of(mortice_executors=lambda: [like_reference(kernels=kernels)])})
    with pytest.raises(PluginError, match=r"^plugin mine \(given\): kernels: ZeroDivisionError: no lanes$"):
        registry.kernels(registry.executor("mine"), CPU)


def finding(severity: Any = "warning") -> Finding:
    return Finding(rule="acme.rule", severity=severity, subject="s", found="f", wanted="w", plugin="someone else")


def test_mortice_validate_adds_findings_in_the_plugins_name(path: Path) -> None:
    def validate(model: ModelFile, contract: Contract) -> Iterator[Finding]:
        if model.architecture == contract.name:
            yield finding()

    registry = make_registry({"mine": plugin_of(mortice_validate=validate)})
    (found,) = registry.findings(model_file(path), contract())
    assert (found.rule, found.plugin) == ("acme.rule", "mine")


@pytest.mark.parametrize(
    ("result", "message"),
    [
        ([finding("fatal")], "acme.rule: severity is 'fatal', wanted one of error, warning, note"),
        (["too big"], "gave str, wanted Finding"),
        ("too big", r"returned str, wanted Iterable\[Finding\]"),
    ],
)
def test_mortice_validate_that_gives_something_else_is_refused(path: Path, result: object, message: str) -> None:
    registry = make_registry({"mine": plugin_of(mortice_validate=lambda model: result)})
    with pytest.raises(PluginError, match=rf"^plugin mine \(given\): mortice_validate: {message}$"):
        registry.findings(model_file(path), contract())


def test_mortice_on_event_is_told_what_the_core_emits() -> None:
    told: list[Event] = []
    registry = make_registry({"mine": plugin_of(mortice_on_event=lambda event: told.append(event))})
    event = StepDone(tokens=3, seconds=0.25)
    registry.emit(event)
    assert told == [event]


def test_mortice_on_event_that_fails_names_the_plugin() -> None:
    def observe(event: Event) -> None:
        raise OSError("metrics server is gone")

    registry = make_registry({"mine": plugin_of(mortice_on_event=observe)})
    with pytest.raises(
        PluginError, match=r"^plugin mine \(given\): mortice_on_event: OSError: metrics server is gone$"
    ):
        registry.emit(StepDone(tokens=1, seconds=0.1))


def test_what_the_programs_own_observer_raises_is_passed_on() -> None:
    class StopError(Exception): ...

    def observe(event: Event) -> None:
        raise StopError

    registry = make_registry()
    registry.observers.append(observe)
    assert not issubclass(StopError, MorticeError)
    with pytest.raises(StopError):
        registry.emit(StepDone(tokens=1, seconds=0.1))
