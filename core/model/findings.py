"""What validation says: findings, each one precise enough to act on, and the report that holds them all."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any, Literal

from attrs import asdict, evolve, field, frozen

__all__ = ["Finding", "Findings", "Severity", "join_findings", "join_layers", "join_numbers"]

Severity = Literal["error", "warning", "note"]
_LAYER = re.compile(r"(?<=\.)\d+(?=\.)")
_ORDER: tuple[Severity, ...] = ("error", "warning", "note")


@frozen(kw_only=True)
class Finding:
    """One thing found.

    Attributes:
        rule: a stable id, ``area.name`` (``role.missing``).
        severity: an ``error`` keeps the model from going on.
        subject: the tensor, key or file it is about.
        found: what is there.
        wanted: what should be there, and why where that is not plain.
        offset: byte offset in the file, where there is one.
        plugin: who raised it.

    """

    rule: str
    severity: Severity
    subject: str
    found: str
    wanted: str
    offset: int | None = None
    plugin: str = "mortice"

    def __str__(self) -> str:
        where = "" if self.offset is None else f" (byte {self.offset})"
        return f"{self.subject}: {self.found}; {self.wanted}{where}"

    def as_dict(self) -> dict[str, Any]:
        """The fields, for JSON."""
        return asdict(self)


def _by_severity(found: Iterable[Finding]) -> tuple[Finding, ...]:
    return tuple(sorted(found, key=lambda item: _ORDER.index(item.severity)))


@frozen
class Findings:
    """Findings in order of severity, then of discovery."""

    items: tuple[Finding, ...] = field(converter=_by_severity)

    @property
    def errors(self) -> tuple[Finding, ...]:
        """Those that keep the model from going on."""
        return tuple(finding for finding in self.items if finding.severity == "error")

    @property
    def warnings(self) -> tuple[Finding, ...]:
        """Those worth a look."""
        return tuple(finding for finding in self.items if finding.severity == "warning")

    @property
    def ok(self) -> bool:
        """Whether there is no error."""
        return not self.errors


def join_findings(findings: Iterable[Finding]) -> list[Finding]:
    """Findings that differ in the layer only as one, with the subject of `join_layers` and without an offset."""
    groups: dict[tuple[str, ...], list[Finding]] = {}
    for item in findings:
        subject = _LAYER.sub("{}", item.subject, count=1)
        groups.setdefault((item.severity, item.rule, subject, item.found, item.wanted, item.plugin), []).append(item)
    return [
        group[0]
        if len(group) == 1
        else evolve(group[0], subject=join_layers(item.subject for item in group)[0], offset=None)
        for group in groups.values()
    ]


def join_layers(names: Iterable[str]) -> list[str]:
    """Names that differ in the layer only as one: ``blk.{0..3,7}.attn_q.weight``; in the order of the first of each."""
    groups: dict[str, list[str]] = {}
    for name in names:
        groups.setdefault(_LAYER.sub("{}", name, count=1), []).append(name)
    joined = []
    for group in groups.values():
        layers = sorted({int(match[0]) for name in group if (match := _LAYER.search(name))})
        joined.append(_LAYER.sub(join_numbers(layers), group[0], count=1) if len(layers) > 1 else group[0])
    return joined


def join_numbers(numbers: Iterable[int]) -> str:
    """Ascending numbers as ranges: ``{0..3,7}``."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1][1:] = [number]
        else:
            runs.append([number])
    return f"{{{','.join('..'.join(map(str, run)) for run in runs)}}}"
