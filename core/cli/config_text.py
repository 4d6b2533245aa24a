"""The config's keys written out: as a commented TOML file, as Markdown, as JSON Schema."""

from __future__ import annotations

import json
import math
import re
import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from mortice.core.cli.flags import FLAGS
from mortice.core.config_keys import ConfigKey, config_keys, tables, variable_of
from mortice.core.config_layers import OTHER_VARIABLES

__all__ = ["commented_toml", "json_schema", "markdown", "toml_text"]

_WIDTH = 110
_EXAMPLES = {  # of keys whose default is no value, or shows nothing
    "model.path": '"model.gguf"',
    "model.contract": '"contract.toml"',
    "prompt.text": '"Why is the sky blue?"',
    "prompt.system": '"Answer in one sentence."',
    "prompt.chat_variables": "{ enable_thinking = false }",
    "sampling.seed": "1",
    "sampling.logit_bias": '{ "2" = -inf }',
    "plugins.prefer": '{ "qtype:Q4_K" = "my-plugin" }',
}


def toml_text(value: Any) -> str:
    """A value as TOML, apart from ``null``, which TOML does not have."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, float):
        return str(value) if math.isfinite(value) else str(value).replace("Infinity", "inf")
    if isinstance(value, int):
        return str(value)
    if isinstance(value, str | Path):
        # JSON's escapes are among TOML's, apart from DEL, which TOML wants escaped too
        return json.dumps(str(value), ensure_ascii=False).replace("\x7f", "\\u007f")
    if isinstance(value, Mapping):
        inside = ", ".join(f"{toml_text(str(key))} = {toml_text(item)}" for key, item in value.items())
        return f"{{ {inside} }}" if inside else "{}"
    return f"[{', '.join(map(toml_text, value))}]"


def commented_toml() -> str:
    """A config file with every key commented out at its default."""
    lines = [
        "# A run of mortice: every key, at its default or with an example. Take the # away to set one.",
        "# Paths are relative to this file.",
    ]
    for table in tables():
        lines += ["", f"[{table}]"]
        for key in _keys_of(table):
            lines += textwrap.wrap(
                key.doc.replace("``", ""), _WIDTH, initial_indent="# ", subsequent_indent="# ", break_on_hyphens=False
            )
            lines.append(f"# {key.name} = {_EXAMPLES.get(key.dotted) or toml_text(key.default)}")
    return "\n".join(lines) + "\n"


def markdown() -> str:
    """A reference of every key: type, default, environment variable, flag, meaning."""
    parts = [
        "A run is configured by four layers, the later over the earlier: defaults, a config file in TOML, environment",
        "variables, flags. `mortice config show` prints every value that holds and where it came from. A key that does",
        "not exist is refused with the nearest that does, and all mistakes are reported together.",
        "",
        "Paths in a config file are relative to the file, others to the working directory; `~` is the home folder. In",
        'a variable or after `--set`, lists and tables are written as in TOML (`["a", "b"]`), one string alone is a',
        "list of one, and `none` unsets a key that has no default.",
    ]
    for table, cls in tables().items():
        summary = (cls.__doc__ or "").strip().splitlines()[0]
        parts += ["", f"## {table}", "", summary, ""]
        parts += ["| key | type | default | variable | flag | meaning |", "| --- | --- | --- | --- | --- | --- |"]
        parts += [_row(key) for key in _keys_of(table)]
    parts += ["", "## Other variables", "", "These are no config keys.", "", "| variable | meaning |", "| --- | --- |"]
    parts += [f"| `{name}` | {meaning} |" for name, meaning in OTHER_VARIABLES.items()]
    return "\n".join(parts)


def _row(key: ConfigKey) -> str:
    default = "none" if key.default is None else f"`{toml_text(key.default)}`"
    flags = " ".join(f"`{name}`" for name in FLAGS[key.dotted])
    doc = re.sub("``", "`", key.doc).replace("|", "\\|")
    return f"| `{key.name}` | {key.type_text} | {default} | `{variable_of(key.dotted)}` | {flags} | {doc} |"


def _keys_of(table: str) -> list[ConfigKey]:
    return [key for key in config_keys().values() if key.table == table]


def json_schema() -> dict[str, Any]:
    """JSON Schema (2020-12) of a config file. Ranges are left to mortice, which says more when it refuses."""
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "mortice run",
        "type": "object",
        "additionalProperties": False,
        "properties": {
            table: {
                "type": "object",
                "description": (cls.__doc__ or "").strip().splitlines()[0],
                "additionalProperties": False,
                "properties": {key.name: _json_type(key) for key in _keys_of(table)},
            }
            for table, cls in tables().items()
        },
    }


def _json_type(key: ConfigKey) -> dict[str, Any]:
    simple = {str: "string", Path: "string", bool: "boolean", int: "integer", float: "number"}
    found: dict[str, Any] = {"description": key.doc.replace("``", "`")}
    if key.default is not None:
        found["default"] = list(key.default) if key.kind is tuple else key.default
    if key.kind is Literal:
        return {**found, "enum": list(key.choices)}
    if key.kind is tuple:
        return {**found, "type": "array", "items": {"type": "string"}}
    if key.kind in simple:
        return {**found, "type": simple[key.kind]}
    items = {"table of numbers": {"type": "number"}, "table of strings": {"type": "string"}}
    return {**found, "type": "object", "additionalProperties": items.get(key.type_text, True)}
