"""The tensors of a file, sorted by what their names say they are for."""

from __future__ import annotations

import re
from collections.abc import Mapping

from attrs import frozen

from mortice.arch_contracts.vocabulary import GLOBAL_ROLES, LAYER_ROLES
from mortice.core.model.types import ModelFile, TensorView

__all__ = ["RoleTensors"]

_LAYER = re.compile(r"blk\.(\d+)\.(.+)")


@frozen(eq=False)
class RoleTensors:
    """Tensors by role and layer, None for those of no layer."""

    by_role: dict[str, dict[int | None, TensorView]]

    @classmethod
    def of(cls, file: ModelFile) -> RoleTensors:
        """What a file has; what no role is named after stays out, and validation names it."""
        by_role: dict[str, dict[int | None, TensorView]] = {}
        for name, tensor in file.tensors.items():
            match = _LAYER.fullmatch(name)
            base, _, kind = (match[2] if match else name).rpartition(".")
            role = f"{base}_bias" if kind == "bias" else base
            known = LAYER_ROLES if match else GLOBAL_ROLES
            if kind in ("weight", "bias") and role in known:
                by_role.setdefault(role, {})[int(match[1]) if match else None] = tensor
        return cls(by_role)

    def of_role(self, role: str) -> Mapping[int | None, TensorView]:
        """Of one role, by layer; empty where the file has none."""
        return self.by_role.get(role, {})

    def layers(self) -> set[int | None]:
        """Every layer that has a tensor."""
        return {layer for found in self.by_role.values() for layer in found}

    def extent(self, role: str, axis: int) -> int | None:
        """An extent of a role's first tensor."""
        tensor = next(iter(self.of_role(role).values()), None)
        return tensor.shape[axis] if tensor is not None and len(tensor.shape) > axis else None

    def name_fused(self) -> None:
        """GGUF names a fused gate and up after up; there is no gate then, and up has twice the rows."""
        rows = self.extent("ffn_down", 1)
        fused = "ffn_up" in self.by_role and "ffn_gate" not in self.by_role
        if fused and rows and self.extent("ffn_up", 0) == 2 * rows:
            self.by_role["ffn_gate_up"] = self.by_role.pop("ffn_up")
