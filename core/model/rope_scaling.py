"""Reads a file's RoPE scaling keys (GGUF specification, ``[llm].rope.scaling.*``) as a contract allows them."""

from __future__ import annotations

import math
from typing import Any

from attrs import define, field

from mortice.arch_contracts.schema import Contract
from mortice.core.model.findings import Finding
from mortice.core.model.operators import RopeScaling
from mortice.core.model.rope import yarn_magnitude
from mortice.core.model.types import ModelFile

__all__ = ["resolve_rope_scaling"]

# Keys that would change the result and that nothing here implements, with the value that changes nothing.
# Ignoring another value would be silently wrong.
_UNSUPPORTED = {"yarn_ext_factor": 1.0}
_LEAST = 2.0**-31
_TABLES = ("rope_factors_short", "rope_factors_long")


def resolve_rope_scaling(contract: Contract, file: ModelFile) -> tuple[RopeScaling | None, list[Finding]]:
    """The scaling a file asks for, None for none, and what is wrong with it.

    As in llama.cpp, a factor without a type is linear scaling, and so is the older key ``rope.scale_linear``; tables of
    factors need no type either, and ``rope.scaling.attn_factor`` holds whatever the type.
    """
    keys = _Keys(file)
    return keys.scaling(contract), keys.findings


@define
class _Keys:
    file: ModelFile
    findings: list[Finding] = field(factory=list)

    def scaling(self, contract: Contract) -> RopeScaling | None:
        metadata = self.file.metadata
        factor_key = next(
            (name for name in ("scaling.factor", "scale_linear") if self.key(name) in metadata), "scaling.factor"
        )
        kind = metadata.get(self.key("scaling.type"), "linear" if self.key(factor_key) in metadata else "none")
        allowed = contract.rope.scaling if contract.rope is not None else ()
        if not isinstance(kind, str) or kind not in ("none", *allowed):
            self.refuse("scaling.type", kind, f"{contract.name} allows {', '.join(('none', *allowed))}")
            return None
        tables = [role.name for key in _TABLES if (role := contract.global_roles.get(key))]
        has_tables = any(name in self.file.tensors for name in tables)
        if kind == "longrope" and not has_tables:
            self.refuse("scaling.type", kind, f"the file has none of its tables, {' and '.join(tables) or 'no role'}")
        if kind == "yarn":
            return self.yarn(factor_key)
        magnitude = self.number("scaling.attn_factor", 1.0)
        if contract.rope is None or (kind == "none" and magnitude == 1.0 and not has_tables):
            return None
        return RopeScaling(
            type="linear",
            factor=self.number(factor_key, None if kind == "linear" else 1.0) if kind != "none" else 1.0,
            original_context=self.original_context() if has_tables else 0,
            attn_factor=magnitude,
        )

    def yarn(self, factor_key: str) -> RopeScaling:
        factor = self.number(factor_key, None)
        for name, neutral in _UNSUPPORTED.items():
            value = self.file.metadata.get(self.key(f"scaling.{name}"), neutral)
            if isinstance(value, bool) or not isinstance(value, (int, float)) or value != neutral:
                self.refuse(f"scaling.{name}", value, f"only {neutral:g} is implemented")
        # some files state the magnitude that follows from the factor; another one would be another formula
        usual = yarn_magnitude(factor)
        stated = self.number("scaling.yarn_attn_factor", 1.0)
        if not any(math.isclose(stated, value, rel_tol=1e-5) for value in (1.0, usual)):
            self.refuse(
                "scaling.yarn_attn_factor", stated, f"only 1 and {usual:g}, which the factor gives, are implemented"
            )
        return RopeScaling(
            type="yarn",
            factor=factor,
            original_context=self.original_context(),
            attn_factor=self.number("scaling.attn_factor", 1.0),
            log_multiplier=self.number("scaling.yarn_log_multiplier", 0.0, least=0.0),
            beta_fast=self.number("scaling.yarn_beta_fast", 32.0),
            beta_slow=self.number("scaling.yarn_beta_slow", 1.0),
        )

    def original_context(self) -> int:
        trained = self.file.metadata.get(f"{self.file.architecture}.context_length")
        return int(self.number("scaling.original_context_length", trained))

    def key(self, name: str) -> str:
        return f"{self.file.architecture}.rope.{name}"

    def refuse(self, name: str, found: object, wanted: str) -> None:
        key = self.key(name)
        self.findings.append(
            Finding(
                rule="rope.scaling",
                severity="error",
                subject=key,
                found=f"{found!r:.80}" if found is not None else "missing",
                wanted=wanted,
                offset=self.file.metadata_offsets.get(key),
            )
        )

    def number(self, name: str, default: Any, *, least: float | None = None) -> float:
        """A positive number, or one of at least `least`."""
        value = self.file.metadata.get(self.key(name), default)
        if least is None and isinstance(value, float) and 0 < value < _LEAST:
            least = _LEAST  # less would leave the range of floats once it is divided by
        # 2**31 bounds a context length, and nothing here comes near it
        good = not isinstance(value, bool) and isinstance(value, (int, float)) and value < 2**31
        if not good or not (value > 0 if least is None else value >= least):
            wanted = "wanted a positive number" if least is None else f"wanted a number of at least {least:g}"
            self.refuse(name, value, wanted)
            return 1.0
        assert math.isfinite(value)
        return float(value)
