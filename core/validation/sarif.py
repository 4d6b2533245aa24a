"""Results as SARIF 2.1.0, the form that GitHub code scanning and others take (OASIS, ``sarif-v2.1.0``)."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

from mortice.core.model.findings import Finding, join_layers
from mortice.core.validation.results import ModelResult
from mortice.core.validation.rules import describe_rule
from mortice.core.version import __version__

__all__ = ["sarif_log"]

_SCHEMA = "https://json.schemastore.org/sarif-2.1.0.json"
_NAMED = 20
"""Subjects listed one by one in a result; layers are joined before."""


def sarif_log(results: Iterable[ModelResult], *, strict: bool = False, base: Path | None = None) -> dict[str, Any]:
    """The SARIF log of a run.

    Findings that differ only in the tensor are one result, so that a model of many layers stays within the number of
    results that GitHub shows. A result has the line 1, for GitHub shows none without a line, and the byte offset.

    Args:
        results: of all models.
        strict: warnings get the level ``error``, for they fail the run.
        base: files below it get relative URIs; by default the working directory.

    """
    base = (base or Path.cwd()).resolve()
    groups = [(result, group) for result in results for group in _alike(result.everything())]
    rules = sorted({group[0].rule for _, group in groups})
    return {
        "$schema": _SCHEMA,
        "version": "2.1.0",
        "runs": [
            {
                "tool": {
                    "driver": {
                        "name": "mortice",
                        "version": __version__,
                        "rules": [_rule(rule) for rule in rules],
                    }
                },
                "columnKind": "unicodeCodePoints",
                "results": [_result(result, group, rules, base, strict=strict) for result, group in groups],
            }
        ],
    }


def _alike(findings: Iterable[Finding]) -> list[list[Finding]]:
    groups: dict[tuple[str, ...], list[Finding]] = {}
    for finding in findings:
        key = (finding.rule, finding.severity, finding.found, finding.wanted, finding.plugin)
        groups.setdefault(key, []).append(finding)
    return list(groups.values())


def _rule(rule: str) -> dict[str, Any]:
    text = describe_rule(rule)
    return {
        "id": rule,
        "shortDescription": {"text": text},
        "fullDescription": {"text": text},
        "help": {"text": "mortice validate FILE shows the finding with what was found and what was wanted."},
        "properties": {"tags": ["model", rule.partition(".")[0]]},
    }


def _result(
    result: ModelResult, group: Sequence[Finding], rules: Sequence[str], base: Path, *, strict: bool
) -> dict[str, Any]:
    first = group[0]
    names = join_layers(finding.subject for finding in group)
    shown = ", ".join(names[:_NAMED]) + (f" and {len(names) - _NAMED} more" if len(names) > _NAMED else "")
    plugin = "" if first.plugin == "mortice" else f" [plugin {first.plugin}]"
    uri = _uri(result.path, base)
    region: dict[str, int] = {"startLine": 1}
    if first.offset is not None:
        region["byteOffset"] = first.offset
    level = "error" if strict and first.severity == "warning" else first.severity
    return {
        "ruleId": first.rule,
        "ruleIndex": rules.index(first.rule),
        "level": level,
        "message": {"text": f"{shown}: {first.found}; {first.wanted}{plugin}"},
        "locations": [
            {
                "physicalLocation": {"artifactLocation": {"uri": uri}, "region": region},
                "logicalLocations": [{"name": name, "kind": "element"} for name in names[:_NAMED]],
            }
        ],
        "partialFingerprints": {"morticeFinding/v1": _fingerprint(uri, first.rule, *names)},
    }


def _fingerprint(*parts: str) -> str:
    return hashlib.sha256("\0".join(parts).encode("utf-8", "surrogateescape")).hexdigest()


def _uri(path: Path, base: Path) -> str:
    """Relative to `base` where it lies below, as code hosts want it; the name given, not what a link points to."""
    absolute = path if path.is_absolute() else Path.cwd() / path
    for root in (base, Path.cwd()):
        if absolute.is_relative_to(root):
            return quote(absolute.relative_to(root).as_posix().encode("utf-8", "surrogateescape"))
    return "file://" + quote(absolute.as_posix().encode("utf-8", "surrogateescape"))
