"""Reads a file's RoPE scaling keys (GGUF specification, ``[llm].rope.scaling.*``) as a contract allows them."""

from __future__ import annotations

import math
from typing import Any

from attrs import define, field

from mortice.arch_contracts.schema import Contract
from mortice.core.model.findings import Finding
from mortice.core.model.operators import RopeScaling
from mortice.core.model.types import ModelFile

__all__ = ["resolve_rope_scaling"]

# Keys that would change the result and that nothing here implements, with the value that changes nothing.
# Ignoring another value would be silently wrong.
_UNSUPPORTED = {"yarn_log_multiplier": 0.0, "yarn_ext_factor": 1.0, "yarn_attn_factor": 1.0}


def resolve_rope_scaling(contract: Contract, file: ModelFile) -> tuple[RopeScaling | None, list[Finding]]:
    """The scaling a file asks for, None for none, and what is wrong with it.

    As in llama.cpp, a factor without a type is linear scaling, and so is the older key ``rope.scale_linear``.
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
        if isinstance(kind, str) and kind == "none":
            return None
        allowed = contract.rope.scaling if contract.rope is not None else ()
        if not isinstance(kind, str) or kind not in allowed:
            self.refuse("scaling.type", kind, f"{contract.name} allows {', '.join(('none', *allowed))}")
            return None
        factor = self.number(factor_key, None)
        if kind == "linear":
            return RopeScaling(type="linear", factor=factor)
        for name, neutral in _UNSUPPORTED.items():
            value = metadata.get(self.key(f"scaling.{name}"), neutral)
            if isinstance(value, bool) or not isinstance(value, (int, float)) or value != neutral:
                self.refuse(f"scaling.{name}", value, f"only {neutral:g} is implemented")
        trained = metadata.get(f"{self.file.architecture}.context_length")
        return RopeScaling(
            type="yarn",
            factor=factor,
            original_context=int(self.number("scaling.original_context_length", trained)),
            attn_factor=self.number("scaling.attn_factor", 1.0),
            beta_fast=self.number("scaling.yarn_beta_fast", 32.0),
            beta_slow=self.number("scaling.yarn_beta_slow", 1.0),
        )

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

    def number(self, name: str, default: Any) -> float:
        value = self.file.metadata.get(self.key(name), default)
        # 2**31 bounds a context length, and nothing here comes near it
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < 2**31:
            self.refuse(name, value, "wanted a positive number")
            return 1.0
        assert math.isfinite(value)
        return float(value)
