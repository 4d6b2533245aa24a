"""Findings for a person: those that differ only in the layer stand in one line."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from mortice.core.cli.render import Screen
from mortice.core.model.findings import Finding, join_layers

__all__ = ["COLUMNS", "counts_text", "finding_rows", "note_findings"]

COLUMNS = ("severity", "rule", "where", "found", "wanted")


def finding_rows(findings: Iterable[Finding]) -> list[tuple[str, ...]]:
    """Rows for `COLUMNS`; ``blk.0.attn_q.weight`` … ``blk.29.attn_q.weight`` become ``blk.{0..29}.attn_q.weight``."""
    rows: dict[tuple[str, ...], list[Finding]] = {}
    for finding in findings:
        alike = (finding.severity, finding.rule, finding.found, finding.wanted, finding.plugin)
        rows.setdefault(alike, []).append(finding)
    return [_row(group[0], where) for group in rows.values() for where in _places(group)]


def _places(group: Sequence[Finding]) -> list[str]:
    if len(group) == 1 and group[0].offset is not None:
        return [f"{group[0].subject} (byte {group[0].offset})"]
    return join_layers(finding.subject for finding in group)


def _row(finding: Finding, where: str) -> tuple[str, ...]:
    wanted = finding.wanted if finding.plugin == "mortice" else f"{finding.wanted} [plugin {finding.plugin}]"
    return finding.severity, finding.rule, where, finding.found, wanted


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
