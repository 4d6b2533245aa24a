"""What validation says: findings, each one precise enough to act on, and the report that holds them all."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal

from attrs import asdict, field, frozen

__all__ = ["Finding", "Findings", "Severity"]

Severity = Literal["error", "warning", "note"]
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
