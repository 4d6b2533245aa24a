"""The CUDA executor: lowers programs to fused kernels, keeps everything on the card."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from threading import Thread
from typing import TYPE_CHECKING

import numpy as np
from attrs import define, field
from numpy.typing import NDArray

from mortice.core.errors import DeviceError
from mortice.core.model import operators as op
from mortice.core.model.kv_types import kv_type_reasons
from mortice.core.model.operators import OPERATOR_KINDS
from mortice.core.model.program import Program
from mortice.core.model.residency import BoundModel
from mortice.core.model.types import DeviceInfo
from mortice.core.model.weight_plan import Kernel, WeightPlan
from mortice.core.plugin.interfaces import Emit, QuantizationType, Runtime, RuntimeSettings, TypeTrial
from mortice.core.plugin.product_times import ProductTime
from mortice.plugins.executors.cuda.device.cublas import find_cublas
from mortice.plugins.executors.cuda.device.device import Device, open_device
from mortice.plugins.executors.cuda.device.driver import begin_driver, import_bindings, is_driver_installed

if TYPE_CHECKING:  # what only a run needs is imported while its device comes up, see `CudaExecutor.wake`
    from mortice.plugins.executors.cuda.run.runtime import CudaRuntime
    from mortice.plugins.executors.cuda.run.tuning import Compilation
    from mortice.plugins.executors.cuda.weights.arena import CudaArena
    from mortice.plugins.executors.cuda.weights.staging import StagingPool

__all__ = ["CudaExecutor"]

_ACTIVATIONS = ("auto", "int8", "f32")


@define(eq=False)
class CudaExecutor:
    """Runs programs on an NVIDIA GPU."""

    name: str = "cuda"
    _device: Device | None = field(default=None, init=False, repr=False)
    _traits: dict[str, Path] = field(factory=dict, init=False, repr=False)
    _prepared: tuple[WeightPlan, RuntimeSettings, Compilation] | None = field(default=None, init=False, repr=False)
    """What `prepare` made for the next `open`."""
    _staging: StagingPool | None = field(default=None, init=False, repr=False)
    """What `prepare` made for the next `allocate`."""
    _waking: Thread | None = field(default=None, init=False, repr=False)

    def wake(self) -> None:
        if self._device is None and self._waking is None and is_driver_installed():
            self._waking = _ahead("mortice-cuda", self._bring_up)  # first, for the driver takes longest
            with suppress(DeviceError):  # it is said when the device is asked for
                import_bindings("driver")  # alone: threads that import wait for each other
            _ahead("mortice-cublas", find_cublas)  # a large library; what is found is remembered
            _ahead("mortice-cuda-code", _import_all)

    def _bring_up(self) -> None:
        begin_driver()
        self._device = open_device()

    def opened(self) -> Device:
        """The device, opened on first use."""
        waking = self._waking
        if waking is not None:
            waking.join()
            self._waking = None
        if self._device is None:
            self._device = open_device()
        self._device.make_current()
        return self._device

    def device(self) -> DeviceInfo:
        return self.opened().info()

    def kernels(self, device: DeviceInfo, qtypes: Sequence[QuantizationType]) -> Sequence[Kernel]:
        from mortice.plugins.executors.cuda.lowering.layouts import TileLayout
        from mortice.plugins.executors.cuda.weights.vectors import VectorLayout

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
        if settings.activations not in _ACTIVATIONS:
            have = ", ".join(_ACTIVATIONS)
            reasons.append(f"executor.activations = {settings.activations!r}: the CUDA executor has {have}")
        return [*reasons, *kv_type_reasons(program.kv, _kv_type(settings), self.name)]

    def kv_bytes(self, program: Program, settings: RuntimeSettings) -> int:
        from mortice.plugins.executors.cuda.run.kv_pool import kv_pool_bytes

        return kv_pool_bytes(program.kv, settings.cache_tokens, _kv_type(settings))

    def workspace_bytes(self, program: Program, settings: RuntimeSettings) -> int:
        from mortice.plugins.executors.cuda.run.runtime_memory import runtime_bytes

        cublas = find_cublas() is not None
        return runtime_bytes(program, settings, self.opened().properties.sm_count, cublas=cublas)

    def allocate(self, nbytes: int) -> CudaArena:
        from mortice.plugins.executors.cuda.weights.arena import CudaArena

        device = self.opened()
        try:
            buffer = device.allocate(max(nbytes, 1))
        except BaseException:
            self._let_staging_go()
            raise
        code = self._prepared[2].kernels.repacks if self._prepared is not None else {}
        staging, self._staging = self._staging, None
        return CudaArena(device, buffer, device.new_stream(), code, staging)

    def default_upload(self) -> str:
        return "measured"

    def trial_shapes(self, type_: QuantizationType) -> Sequence[tuple[int, int]]:
        from mortice.plugins.executors.cuda.type_trial import trial_shapes

        return trial_shapes(type_)

    def compile_type(self, type_: QuantizationType, arch: str) -> Sequence[str]:
        from mortice.plugins.executors.cuda.type_trial import compile_type

        return compile_type(type_, arch)

    def try_type(
        self,
        type_: QuantizationType,
        rows: NDArray[np.uint8],
        activations: NDArray[np.int8],
        scales: NDArray[np.float32],
        *,
        on_device: bool,
    ) -> TypeTrial:
        from mortice.plugins.executors.cuda.type_trial import try_on_card, try_on_cpu

        if on_device:
            return try_on_card(self.opened(), type_, rows, activations, scales)
        return try_on_cpu(type_, rows, activations, scales)

    def prepare(self, plan: WeightPlan, settings: RuntimeSettings) -> None:
        from mortice.plugins.executors.cuda.weights.arena import begin_staging

        self._let_staging_go()
        self._staging = begin_staging(self.opened(), plan)
        try:
            self._prepared = plan, settings, self._compiled(plan, settings)
        except BaseException:
            self._let_staging_go()
            raise

    def _let_staging_go(self) -> None:
        if self._staging is not None:
            self._staging.close()
            self._staging = None

    def _compiled(self, plan: WeightPlan, settings: RuntimeSettings) -> Compilation:
        from mortice.plugins.executors.cuda.lowering.crossovers import gemm_thresholds
        from mortice.plugins.executors.cuda.lowering.gemv import has_bulk_copies
        from mortice.plugins.executors.cuda.lowering.lowering import Lowering
        from mortice.plugins.executors.cuda.lowering.matmul import rows_at_once
        from mortice.plugins.executors.cuda.lowering.sources import KernelSources
        from mortice.plugins.executors.cuda.run.tuning import compile_tuned

        device = self.opened()
        exact, cublas = settings.activations == "f32", find_cublas() is not None
        lowering = Lowering(
            plan=plan,
            sources=KernelSources(self._traits),
            rows=rows_at_once(settings.step_tokens, exact=exact, cublas=cublas),
            kv_type=_kv_type(settings),
            sm_count=device.properties.sm_count,
            quantize_activations=not exact,
            cublas=cublas,
            bulk_copies=has_bulk_copies(device.properties),
            wgmma=device.properties.compute_capability == (9, 0),
            other_gemm_from=gemm_thresholds(settings),
        )
        return compile_tuned(lowering, device, settings.tuning)

    def open(self, model: BoundModel, settings: RuntimeSettings, emit: Emit) -> CudaRuntime:
        from mortice.plugins.executors.cuda.run.runtime import CudaRuntime
        from mortice.plugins.executors.cuda.run.tuning import measured_kernels

        prepared, self._prepared = self._prepared, None
        if prepared is not None and prepared[0] is model.plan and prepared[1] == settings:
            compilation = prepared[2]
        else:
            compilation = self._compiled(model.plan, settings)
        device = self.opened()
        return CudaRuntime(model, settings, emit, device, measured_kernels(device, compilation, model, emit))

    def time_products(self, runtime: Runtime, rows: int, repeats: int) -> Sequence[ProductTime]:
        from mortice.plugins.executors.cuda.run.product_times import time_products
        from mortice.plugins.executors.cuda.run.runtime import CudaRuntime

        assert isinstance(runtime, CudaRuntime), "opened by this executor"
        return time_products(runtime, rows, repeats)


def _ahead(name: str, work: Callable[[], object]) -> Thread:
    """Do on a thread of that name what will be asked for soon."""

    def body() -> None:
        with suppress(Exception):  # it comes again where somebody asks
            work()

    thread = Thread(target=body, name=name)
    thread.start()
    return thread


def _import_all() -> None:
    """What a run needs besides this module, and the compiler."""
    from mortice.plugins.executors.cuda.device.toolkit import find_compiler
    from mortice.plugins.executors.cuda.run import runtime, tuning  # noqa: F401
    from mortice.plugins.executors.cuda.weights import arena  # noqa: F401

    find_compiler()


def _kv_type(settings: RuntimeSettings) -> str:
    return "f16" if settings.kv_type == "auto" else settings.kv_type
