"""What `mortice validate` found in one model, whatever form it is then shown in."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from attrs import field, frozen

from mortice.core.errors import ModelFileError, MorticeError, PluginError, UnknownArchitectureError
from mortice.core.model.findings import Finding, Findings

__all__ = ["DataRead", "ModelResult"]


@frozen
class DataRead:
    """How much tensor data were read, and how long that took."""

    nbytes: int
    seconds: float


@frozen(eq=False, kw_only=True)
class ModelResult:
    """What was found in one model.

    Attributes:
        path: as it was given, or as it was found in a folder.
        files: every file of the model; empty when it could not be opened.
        contract: what it was held against; None when it did not come so far.
        findings: of validation, and of the tensor data where they were read.
        error: what kept it from being validated.
        template: hash and known family of its chat template.
        data: how much tensor data were read; None without ``--deep``.
        seconds: time for all of it.

    """

    path: Path
    files: tuple[Path, ...] = ()
    contract: str | None = None
    findings: Findings = field(factory=lambda: Findings(()))
    error: MorticeError | None = None
    template: dict[str, str | None] | None = None
    data: DataRead | None = None
    seconds: float = 0.0

    def passed(self, *, strict: bool = False) -> bool:
        """Whether nothing stands against it; `strict` counts warnings."""
        return self.error is None and self.findings.ok and not (strict and self.findings.warnings)

    @property
    def plugin_failed(self) -> bool:
        """Whether a plugin's fault kept it from being validated: nothing is known against the model itself."""
        return isinstance(self.error, PluginError)

    @property
    def error_message(self) -> str:
        """What `error` says, and in the lines after it which plugin it came from."""
        return "\n".join([str(self.error), *getattr(self.error, "__notes__", ())])

    def everything(self) -> tuple[Finding, ...]:
        """The findings, and as one of them what kept the model from being validated."""
        return self.findings.items if self.error is None else (_as_finding(self.path, self.error), *self.findings.items)

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        error = self.error
        return {
            "path": self.path,
            "files": list(self.files),
            "ok": self.passed(),
            "error": None if error is None else {"type": type(error).__name__, "message": self.error_message},
            "contract": self.contract,
            "findings": [finding.as_dict() for finding in self.findings.items],
            "template": self.template,
            "data": None if self.data is None else {"bytes": self.data.nbytes, "seconds": self.data.seconds},
        }


def _as_finding(path: Path, error: MorticeError) -> Finding:
    rules = ((UnknownArchitectureError, "file.architecture"), (PluginError, "plugin.failed"))
    rule = next((rule for kind, rule in rules if isinstance(error, kind)), "file.refused")
    found = str(error).removeprefix(f"{path}: ")
    offset = error.offset if isinstance(error, ModelFileError) and error.path == path else None
    wanted = "nothing else of it was checked"
    return Finding(rule=rule, severity="error", subject=path.name, found=found, wanted=wanted, offset=offset)
