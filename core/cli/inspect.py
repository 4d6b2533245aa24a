"""``mortice inspect``: what is in a file, whether or not it can be run."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mortice.core.cli.findings import counts_text
from mortice.core.cli.flags import CommonFlags, FileFlags, ModelPath
from mortice.core.cli.render import Screen, printable, size_text
from mortice.core.counts import counted
from mortice.core.errors import MorticeError

if TYPE_CHECKING:
    from mortice.core.model.types import MetadataValue, ModelFile
    from mortice.core.plugin.registry import Registry

__all__ = ["inspect"]

_SHOWN_ITEMS = 4
_SHOWN_CHARS = 100


def inspect(
    file: ModelPath,
    /,
    *,
    model: FileFlags | None = None,
    common: CommonFlags | None = None,
) -> int:
    """Show metadata, tensors, types, the contract that serves a file and the program it makes.

    Works on files of unknown architectures, too. No tensor is read.

    """
    from mortice.core.stages import open_file, quantize_opened, registry_for

    common = common or CommonFlags()
    screen = common.screen()
    chosen = common.settings(model).config
    registry = registry_for(chosen)
    quantize = chosen.model.quantize
    with open_file(registry, file) as stored, quantize_opened(registry, stored, quantize) as opened:
        served = _served(registry, opened, chosen.model.contract)
        types = _types(opened)
        screen.result({**_file_dict(opened), "types": types, **served})
        _show(screen, opened, types, served)
    return 0


def _served(registry: Registry, file: ModelFile, contract: Path | None) -> dict[str, Any]:
    """Contract, findings and program, as far as they can be had."""
    from mortice.core.model.program import build_program
    from mortice.core.stages import validate_opened

    served: dict[str, Any] = {
        "contract": None,
        "contract_plugin": None,
        "valid": None,
        "problem": None,
        "program": None,
    }
    try:
        report = validate_opened(registry, file, contract)
        served["contract"] = report.contract.name
        given = registry.contracts.get(file.architecture) if contract is None else None
        served["contract_plugin"] = given.plugin if given is not None else None
        served["valid"] = report.ok
        if not report.ok:
            served["problem"] = f"{counts_text(report.findings.errors)}; mortice validate lists them"
            return served
        program = build_program(report.model())
        served["program"] = {
            "layers": program.num_layers,
            "hidden_size": program.hidden_size,
            "vocab_size": program.vocab_size,
            "context_length": program.context_length,
            "operators": dict(Counter(operator.kind for operator in program.operators).most_common()),
        }
    except MorticeError as error:
        served["problem"] = str(error)
    return served


def _types(file: ModelFile) -> list[dict[str, Any]]:
    """Totals for each tensor type, largest first."""
    totals: dict[str, dict[str, Any]] = {}
    for tensor in file.tensors.values():
        total = totals.setdefault(tensor.qtype.name, {"tensors": 0, "elements": 0, "bytes": 0})
        total["tensors"] += 1
        total["elements"] += tensor.elements
        total["bytes"] += tensor.nbytes
    return [{"type": name, **total} for name, total in sorted(totals.items(), key=lambda item: -int(item[1]["bytes"]))]


def _bits_per_weight(file: ModelFile) -> float | None:
    return 8 * file.tensor_bytes / file.parameters if file.parameters else None


def _file_dict(file: ModelFile) -> dict[str, Any]:
    return {
        "path": file.path,
        "files": list(file.files),
        "format": file.format,
        "version": file.version,
        "loader": file.loader,
        "architecture": file.architecture or None,
        "parameters": file.parameters,
        "tensor_bytes": file.tensor_bytes,
        "bits_per_weight": _bits_per_weight(file),
        "metadata": {key: _value_dict(value) for key, value in file.metadata.items()},
        "tensors": [
            {
                "name": tensor.name,
                "shape": list(tensor.shape),
                "type": tensor.qtype.name,
                "bytes": tensor.nbytes,
                "offset": tensor.offset,
                "file": tensor.path,
            }
            for tensor in file.tensors.values()
        ],
    }


def _value_dict(value: MetadataValue) -> Any:
    """Scalars as they are; of an array its length and first items."""
    if isinstance(value, bool | int | float | str):
        return value
    return {"array": len(value), "first": [_item(item) for item in value[:_SHOWN_ITEMS]]}


def _item(item: Any) -> Any:
    return item.item() if hasattr(item, "item") else item


def _value_text(value: MetadataValue) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int | float):
        return str(value)
    if isinstance(value, str):
        return printable(value, _SHOWN_CHARS)
    items = ", ".join(printable(str(_item(item)), 24) for item in value[:_SHOWN_ITEMS])
    more = ", …" if len(value) > _SHOWN_ITEMS else ""
    return f"[{items}{more}] ({counted(len(value), 'item')})"


def _show(screen: Screen, file: ModelFile, types: list[dict[str, Any]], served: Mapping[str, Any]) -> None:
    screen.say(f"{printable(str(file.path))}: {file.format} v{file.version}, opened by plugin {file.loader}")
    bits = _bits_per_weight(file)
    screen.say(
        f"architecture {printable(file.architecture) or 'not given'}, {counted(len(file.tensors), 'tensor')}, "
        f"{file.parameters / 1e6:.1f} M parameters, {size_text(file.tensor_bytes)}"
        + (f", {bits:.2f} bits per weight" if bits is not None else "")
    )
    screen.say("")
    screen.table(("key", "value"), [(key, _value_text(value)) for key, value in file.metadata.items()])
    screen.say("")
    screen.table(
        ("tensor", ">shape", "type", ">bytes", ">offset"),
        [
            (tensor.name, " x ".join(map(str, tensor.shape)), tensor.qtype.name, str(tensor.nbytes), str(tensor.offset))
            for tensor in file.tensors.values()
        ],
    )
    screen.say("")
    screen.table(
        ("type", ">tensors", ">elements", ">size"),
        [(row["type"], str(row["tensors"]), str(row["elements"]), size_text(row["bytes"])) for row in types],
    )
    screen.say("")
    if served["contract"]:
        origin = f" of plugin {served['contract_plugin']}" if served["contract_plugin"] else ""
        screen.say(f"contract {served['contract']}{origin}: {'valid' if served['valid'] else 'not valid'}")
    if served["problem"]:
        screen.say("\n".join(printable(line) for line in served["problem"].splitlines()))
    if served["program"]:
        program = served["program"]
        screen.say(
            f"program: {counted(program['layers'], 'layer')}, hidden size {program['hidden_size']}, vocabulary "
            f"{program['vocab_size']}, context {program['context_length']}"
        )
        screen.say("operators: " + ", ".join(f"{count} {kind}" for kind, count in program["operators"].items()))
