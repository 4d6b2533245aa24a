"""Findings for a person: those that differ only in the layer stand in one line."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from mortice.core.cli.render import Screen
from mortice.core.model.findings import Finding

__all__ = ["COLUMNS", "counts_text", "finding_rows", "note_findings"]

COLUMNS = ("severity", "rule", "where", "found", "wanted")
_LAYER = re.compile(r"(?<=\.)\d+(?=\.)")


def finding_rows(findings: Iterable[Finding]) -> list[tuple[str, ...]]:
    """Rows for `COLUMNS`; ``blk.0.attn_q.weight`` … ``blk.29.attn_q.weight`` become ``blk.{0..29}.attn_q.weight``."""
    groups: dict[tuple[str, ...], list[Finding]] = {}
    for finding in findings:
        subject = _LAYER.sub("{}", finding.subject, count=1)
        key = (finding.severity, finding.rule, subject, finding.found, finding.wanted, finding.plugin)
        groups.setdefault(key, []).append(finding)
    return [_row(group) for group in groups.values()]


def _row(group: Sequence[Finding]) -> tuple[str, ...]:
    first = group[0]
    where = first.subject
    if len(group) > 1:
        layers = sorted({int(match[0]) for finding in group if (match := _LAYER.search(finding.subject))})
        if layers:
            where = _LAYER.sub(_ranges(layers), where, count=1)
    elif first.offset is not None:
        where += f" (byte {first.offset})"
    wanted = first.wanted if first.plugin == "mortice" else f"{first.wanted} [plugin {first.plugin}]"
    return first.severity, first.rule, where, first.found, wanted


def _ranges(numbers: Sequence[int]) -> str:
    """``{0..3,7}`` of 0, 1, 2, 3, 7."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1][1:] = [number]
        else:
            runs.append([number])
    inside = ",".join("..".join(map(str, run)) for run in runs)
    return f"{{{inside}}}"


def counts_text(findings: Sequence[Finding]) -> str:
    """``2 errors, 1 warning``, or ``no findings``."""
    parts = []
    for severity in ("error", "warning", "note"):
        count = sum(finding.severity == severity for finding in findings)
        if count:
            parts.append(f"{count} {severity}" + ("s" if count > 1 else ""))
    return ", ".join(parts) or "no findings"


def note_findings(screen: Screen, findings: Sequence[Finding]) -> None:
    """Print them for a person who watches."""
    if findings:
        screen.note_table(COLUMNS, finding_rows(findings))
