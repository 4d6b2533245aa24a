"""``mortice contract``: draft a contract from a file, compare two, show the program one builds."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter

from mortice.core.cli.flags import CommonFlags, ModelPath
from mortice.core.cli.render import Screen, printable
from mortice.core.cli.written_files import ForceFlag, require_writable
from mortice.core.errors import ConfigError, ContractError
from mortice.core.whole_file import write_text

if TYPE_CHECKING:
    from mortice.arch_contracts.vocabulary import Contract
    from mortice.core.contracts.derive import Draft
    from mortice.core.model.program import Program
    from mortice.core.plugin.registry import Registry

__all__ = ["derive", "diff", "show"]

_DIFFERENT = 1
_CONTRACT = "A contract: the name of a registered one or its architecture (PLUGIN: before it decides), or a TOML file."

ContractName = Annotated[str, Parameter(help=_CONTRACT)]


def _sizes(_: Any, tokens: Sequence[Any]) -> dict[str, float]:
    """``num_layers=2,hidden_size=64``."""
    sizes = {}
    for part in tokens[0].value.split(","):
        name, equals, value = part.partition("=")
        try:
            sizes[name.strip()] = float(value)
        except ValueError:
            equals = ""
        if not equals or not name.strip():
            raise ValueError(f"found {part!r}, wanted NAME=NUMBER")
    return sizes


def derive(
    file: ModelPath,
    /,
    *,
    like: Annotated[
        str | None,
        Parameter(help="A contract of a family known to be alike; it gives what the file does not say."),
    ] = None,
    measure: Annotated[
        bool,
        Parameter(
            help="Run the readings a file leaves open on the reference executor and take the one that expects text.",
            negative=(),
            show_default=False,
        ),
    ] = False,
    name: Annotated[str | None, Parameter(help="The contract's name; by default the file's architecture.")] = None,
    to: Annotated[Path | None, Parameter(name=("--output", "-o"), help="Write the draft into this file.")] = None,
    force: ForceFlag = False,
    common: CommonFlags | None = None,
) -> int:
    """Draft the contract of a model file, of an unknown architecture too.

    What metadata and tensor shapes say is filled in; what they cannot say is written as "?" and named. No tensor data
    are read without --measure.

    """
    from mortice.core.contracts.derive import derive_contract
    from mortice.core.stages import open_file
    from mortice.core.validation.likelihood import measure_draft

    common = common or CommonFlags()
    screen = common.screen()
    if to is not None:
        require_writable("--output", to, force=force, inputs=[file, common.config, _path_of(like)])
    registry = _registry(common)
    alike = _contract(registry, like, "--like") if like is not None else None
    with open_file(registry, file) as opened:
        if to is not None:
            require_writable("--output", to, force=force, inputs=opened.files)
        draft = derive_contract(opened, name=name, like=alike)
    if measure:
        draft = measure_draft(draft, file, registry, screen.note)
    text = draft.text(file.name)
    if to is None:
        screen.say(text.removesuffix("\n"))
    else:
        write_text(to, text)
    screen.result({"contract": text, "unknown": dict(draft.unknown), "remarks": list(draft.remarks)})
    _note_open(screen, draft, text)
    return 0


def _note_open(screen: Screen, draft: Draft, text: str) -> None:
    """What a person still has to do, with the line of each key."""
    table = ""
    for number, line in enumerate(text.splitlines(), 1):
        if line.startswith("["):
            table = line.strip("[]")
        setting, mark, reason = line.partition("# unknown: ")
        if mark:
            key = f"{table}.{setting.partition(' = ')[0]}: " if setting else ""
            must = "fill in" if '"?"' in setting else "check"
            screen.note(f"line {number}: {must} {key}{printable(reason)}")
    if draft.unknown:
        keys = ", ".join(draft.unknown)
        screen.note(f"not usable before {keys} {'is' if len(draft.unknown) == 1 else 'are'} filled in")


def diff(
    first: ContractName,
    second: ContractName,
    /,
    *,
    common: CommonFlags | None = None,
) -> int:
    """Compare two contracts key by key, defaults included.

    The exit code is 0 when they say the same, 1 when they differ, 2 when one cannot be read.

    """
    from mortice.arch_contracts.differences import differences

    common = common or CommonFlags()
    screen = common.screen()
    registry = _registry(common)
    left, right = _contract(registry, first), _contract(registry, second)
    found = differences(left, right)
    screen.result(
        {
            "equal": not found,
            "differences": [{"key": item.key, "first": item.first, "second": item.second} for item in found],
        }
    )
    if found:
        rows = [(item.key, *("-" if side is None else side for side in (item.first, item.second))) for item in found]
        screen.table(("key", printable(first), printable(second)), rows)
    else:
        screen.say("no difference")
    return _DIFFERENT if found else 0


def show(
    contract: ContractName,
    /,
    *,
    file: Annotated[
        Path | None, Parameter(name="--file", help="A model file that gives the sizes; it must fit the contract.")
    ] = None,
    sizes: Annotated[
        dict[str, float] | None,
        Parameter(
            name="--sizes",
            help="Sizes instead of a file, NAME=NUMBER separated by commas; by default a tiny model's.",
            converter=_sizes,
            accepts_keys=False,
            n_tokens=1,
            negative=(),
        ),
    ] = None,
    picture: Annotated[
        Path | None, Parameter(name="--picture", help="Also draw the program into this SVG file.")
    ] = None,
    force: ForceFlag = False,
    common: CommonFlags | None = None,
) -> int:
    """Print the program a contract builds, alike layers once, with every shape and number."""
    from mortice.core.contracts.listing import parts_of, program_listing
    from mortice.core.contracts.picture import program_picture

    common = common or CommonFlags()
    screen = common.screen()
    if file is not None and sizes is not None:
        raise ConfigError("--file and --sizes: found both, wanted one")
    if picture is not None:
        require_writable("--picture", picture, force=force, inputs=[file, common.config, _path_of(contract)])
    registry = _registry(common)
    program = _program(registry, _contract(registry, contract), file, sizes)
    screen.say(program_listing(program))
    screen.result(
        {
            "contract": program.architecture,
            "layers": program.num_layers,
            "hidden_size": program.hidden_size,
            "vocab_size": program.vocab_size,
            "context_length": program.context_length,
            "parts": [
                {
                    "layers": list(part.layers),
                    "operators": [
                        {"out": line.out, "inputs": list(line.inputs), "kind": line.kind, "width": line.width}
                        | {"text": line.text}
                        for line in part.lines
                    ],
                }
                for part in parts_of(program)
            ],
        }
    )
    if picture is not None:
        write_text(picture, program_picture(program))
        screen.note(f"{picture}: drawn")
    return 0


def _program(registry: Registry, contract: Contract, file: Path | None, sizes: dict[str, float] | None) -> Program:
    from mortice.core.contracts.sized import program_of_sizes
    from mortice.core.model.program import build_program
    from mortice.core.model.validation import validate
    from mortice.core.stages import open_file

    if file is None:
        return program_of_sizes(contract, sizes or {})
    with open_file(registry, file) as opened:
        return build_program(validate(opened, contract).model())


def _registry(common: CommonFlags) -> Registry:
    from mortice.core.stages import registry_for

    return registry_for(common.settings().config)


def _contract(registry: Registry, name: str, flag: str = "") -> Contract:
    """A contract by architecture or name, ``PLUGIN:`` before it where several have it, else from a file."""
    from mortice.core.stages import read_contract

    where = f"{flag}: " if flag else ""
    served = _served(registry)
    found = [
        (plugin, contract)
        for (plugin, own), (contract, architectures) in served.items()
        if any(name in (known, f"{plugin}:{known}") for known in (own, *architectures))
    ]
    if len(found) > 1:
        choices = " or ".join(f"{plugin}:{name}" for plugin, _ in found)
        raise ContractError(f"{where}{name!r} is the name or the architecture of several contracts; write {choices}")
    if found:
        return found[0][1]
    path = Path(name)
    if name and (path.suffix or path.exists() or len(path.parts) > 1):
        return read_contract(path)
    have = ", ".join(
        own if architectures == [own] else f"{own} ({', '.join(architectures)})"
        for (_, own), (_, architectures) in sorted(served.items(), key=lambda item: item[0][1])
    )
    raise ContractError(f"{where}no contract {name!r} is registered, and no file has this name; have {have}")


def _path_of(name: str | None) -> Path | None:
    """The file that a contract's name may stand for."""
    return Path(name) if name else None


def _served(registry: Registry) -> dict[tuple[str, str], tuple[Contract, list[str]]]:
    """The contracts and the architectures they serve, by plugin and name."""
    served: dict[tuple[str, str], tuple[Contract, list[str]]] = {}
    for architecture, given in registry.contracts.items():
        served.setdefault((given.plugin, given.value.name), (given.value, []))[1].append(architecture)
    return served
