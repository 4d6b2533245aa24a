"""Findings for a person: those that differ only in the layer stand in one line."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from mortice.core.cli.render import Screen
from mortice.core.counts import counted
from mortice.core.model.findings import Finding, join_findings

__all__ = ["COLUMNS", "counts_text", "finding_rows", "note_findings"]

COLUMNS = ("severity", "rule", "where", "found", "wanted")


def finding_rows(findings: Iterable[Finding]) -> list[tuple[str, ...]]:
    """Rows for `COLUMNS`; ``blk.0.attn_q.weight`` … ``blk.29.attn_q.weight`` become ``blk.{0..29}.attn_q.weight``."""
    return [_row(finding) for finding in join_findings(findings)]


def _row(finding: Finding) -> tuple[str, ...]:
    where = finding.subject if finding.offset is None else f"{finding.subject} (byte {finding.offset})"
    wanted = finding.wanted if finding.plugin == "mortice" else f"{finding.wanted} [plugin {finding.plugin}]"
    return finding.severity, finding.rule, where, finding.found, wanted


def counts_text(findings: Sequence[Finding]) -> str:
    """``2 errors, 1 warning``, or ``no findings``."""
    parts = []
    for severity in ("error", "warning", "note"):
        count = sum(finding.severity == severity for finding in findings)
        if count:
            parts.append(counted(count, severity))
    return ", ".join(parts) or "no findings"


def note_findings(screen: Screen, findings: Sequence[Finding]) -> None:
    """Print them for a person who watches."""
    if findings:
        screen.note_table(COLUMNS, finding_rows(findings))
