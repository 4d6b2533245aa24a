"""Reads a file's RoPE scaling keys (GGUF specification, ``[llm].rope.scaling.*``) as a contract allows them."""

from __future__ import annotations

import math

from mortice.arch_contracts.schema import Contract
from mortice.core.model.findings import Finding
from mortice.core.model.operators import RopeScaling
from mortice.core.model.types import ModelFile

__all__ = ["resolve_rope_scaling"]

# Keys that would change the result and that nothing here implements. Ignoring one would be silently wrong.
_UNSUPPORTED = ("yarn_log_multiplier", "yarn_ext_factor", "yarn_attn_factor")


def resolve_rope_scaling(contract: Contract, file: ModelFile) -> tuple[RopeScaling | None, list[Finding]]:
    """The scaling a file asks for, None for none, and what is wrong with it."""
    prefix = f"{file.architecture}.rope."
    findings: list[Finding] = []

    def refuse(key: str, found: object, wanted: str) -> None:
        offset = file.metadata_offsets.get(key)
        findings.append(
            Finding(
                rule="rope.scaling",
                severity="error",
                subject=key,
                found=repr(found),
                wanted=wanted,
                offset=offset,
            )
        )

    def number(name: str, default: float | None) -> float:
        key = f"{prefix}scaling.{name}"
        value = file.metadata.get(key, default)
        good = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value) and value > 0
        if not good:
            refuse(key, value, "wanted a positive number")
            return 1.0
        assert isinstance(value, (int, float))
        return float(value)

    kind = file.metadata.get(f"{prefix}scaling.type", "none")
    factor_key = f"{prefix}scaling.factor"
    old_factor = file.metadata.get(f"{prefix}scale_linear")  # what files before `rope.scaling.*` say
    if kind == "none" and old_factor is not None and factor_key not in file.metadata:
        kind, factor = "linear", old_factor
        if isinstance(factor, bool) or not isinstance(factor, (int, float)) or not 0 < factor < math.inf:
            refuse(f"{prefix}scale_linear", factor, "wanted a positive number")
            return None, findings
        factor = float(factor)
    elif kind == "none":
        return None, findings
    else:
        factor = number("factor", None)
    allowed = contract.rope.scaling if contract.rope is not None else ()
    if kind not in allowed:
        refuse(f"{prefix}scaling.type", kind, f"{contract.name} allows {', '.join(('none', *allowed))}")
        return None, findings
    for name in _UNSUPPORTED:
        key = f"{prefix}scaling.{name}"
        if key in file.metadata:
            refuse(
                key,
                file.metadata[key],
                "nothing here implements this key; leaving it out would change the result",
            )
    if kind == "linear":
        return RopeScaling(type="linear", factor=factor), findings
    context_key = f"{file.architecture}.context_length"
    trained = file.metadata.get(context_key)
    default_context = float(trained) if isinstance(trained, int) else None
    scaling = RopeScaling(
        type="yarn",
        factor=factor,
        original_context=int(number("original_context_length", default_context)),
        attn_factor=number("attn_factor", 1.0),
        beta_fast=number("yarn_beta_fast", 32.0),
        beta_slow=number("yarn_beta_slow", 1.0),
    )
    return scaling, findings
