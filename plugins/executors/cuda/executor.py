"""The CUDA executor: lowers programs to fused kernels, keeps everything on the card."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from attrs import define, field

from mortice.core.model import operators as op
from mortice.core.model.operators import OPERATOR_KINDS
from mortice.core.model.program import Program
from mortice.core.model.residency import BoundModel
from mortice.core.model.types import DeviceInfo
from mortice.core.model.weight_plan import Kernel
from mortice.core.plugin.interfaces import Emit, QuantizationType, RuntimeSettings
from mortice.plugins.executors.cuda.arena import CudaArena
from mortice.plugins.executors.cuda.device import Device, open_device
from mortice.plugins.executors.cuda.layouts import TileLayout
from mortice.plugins.executors.cuda.lowering import Lowering
from mortice.plugins.executors.cuda.runtime import CudaRuntime, kv_pool_bytes, runtime_bytes
from mortice.plugins.executors.cuda.sources import KernelSources
from mortice.plugins.executors.cuda.vectors import VectorLayout

__all__ = ["CudaExecutor"]

_KV_TYPES = ("auto", "f16", "f32")


@define(eq=False)
class CudaExecutor:
    """Runs programs on an NVIDIA GPU."""

    name: str = "cuda"
    _device: Device | None = field(default=None, init=False, repr=False)
    _traits: dict[str, Path] = field(factory=dict, init=False, repr=False)

    def opened(self) -> Device:
        """The device, opened on first use."""
        if self._device is None:
            self._device = open_device()
        self._device.make_current()
        return self._device

    def device(self) -> DeviceInfo:
        return self.opened().info()

    def kernels(self, device: DeviceInfo, qtypes: Sequence[QuantizationType]) -> Sequence[Kernel]:
        del device  # the same on every card that `open_device` takes
        kernels = []
        for type_ in qtypes:
            if type_.traits is not None:
                self._traits[type_.qtype.name] = type_.traits
                tiles = TileLayout(type_)
                kernels += [
                    Kernel(operator=operator, qtype=type_.qtype.name, layout=tiles)
                    for operator in ("linear", "embed", "embed_positions")
                ]
            vector = VectorLayout(type_)
            kernels += [
                Kernel(operator=operator, qtype=type_.qtype.name, layout=vector)
                for operator in ("norm", "add_bias", "rope")
            ]
        return kernels

    def unsupported(self, program: Program, settings: RuntimeSettings) -> Sequence[str]:
        reasons = []
        for operator in program.operators:
            if operator.kind not in OPERATOR_KINDS:
                reasons.append(f"{operator.name}: no operator {operator.kind!r}")
            if isinstance(operator, op.Linear | op.Embed) and operator.weight.columns % 32:
                reasons.append(
                    f"{operator.weight.tensor}: rows of {operator.weight.columns}, wanted whole groups of 32"
                )
            if isinstance(operator, op.Attention) and (operator.head_dim % 8 or operator.head_dim > 256):
                reasons.append(f"{operator.name}: head_dim {operator.head_dim}, wanted a multiple of 8, at most 256")
        if settings.kv_type not in _KV_TYPES:
            reasons.append(f"executor.kv = {settings.kv_type!r}: the CUDA executor keeps {', '.join(_KV_TYPES)}")
        return reasons

    def kv_bytes(self, program: Program, settings: RuntimeSettings) -> int:
        return kv_pool_bytes(program.kv, settings, _kv_type(settings))

    def workspace_bytes(self, program: Program, settings: RuntimeSettings) -> int:
        return runtime_bytes(program, settings, self.opened().properties.sm_count)

    def allocate(self, nbytes: int) -> CudaArena:
        device = self.opened()
        return CudaArena(device, device.allocate(max(nbytes, 1)), device.new_stream())

    def default_upload(self) -> str:
        return "measured"

    def open(self, model: BoundModel, settings: RuntimeSettings, emit: Emit) -> CudaRuntime:
        device = self.opened()
        lowering = Lowering(
            plan=model.plan,
            sources=KernelSources(self._traits),
            rows=settings.step_tokens,
            kv_type=_kv_type(settings),
            sm_count=device.properties.sm_count,
            quantize_activations=settings.activations != "f32",
        )
        return CudaRuntime(model, settings, emit, device, lowering)


def _kv_type(settings: RuntimeSettings) -> str:
    return "f16" if settings.kv_type == "auto" else settings.kv_type
