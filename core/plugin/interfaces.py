"""What plugins provide and what they are handed: the shapes of the tenons."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Literal, Protocol, runtime_checkable

import numpy as np
from attrs import define, field, frozen, validators
from numpy.typing import NDArray

from mortice.core.model.operators import Buffer
from mortice.core.model.program import Program
from mortice.core.model.qtypes import QType
from mortice.core.model.residency import Arena, BoundModel, ResidentWeights
from mortice.core.model.types import DeviceInfo
from mortice.core.model.weight_plan import Kernel, WeightPlan
from mortice.core.plugin.events import Event
from mortice.core.text.generation import ChooseToken
from mortice.core.text.params import GenerationParams, SamplingParams

__all__ = [
    "Emit",
    "Executor",
    "Identified",
    "Prepares",
    "QuantizationType",
    "Runtime",
    "RuntimeSettings",
    "StepPart",
    "TokenSequence",
    "Traceable",
    "TriesTypes",
    "Tuned",
    "TypeTrial",
    "UploadStrategy",
    "Wakes",
]

Emit = Callable[[Event], None]
"""How a plugin tells observers something."""


@define(eq=False, kw_only=True)
class QuantizationType:
    """A quantisation type: how its bytes become numbers.

    Attributes:
        qtype: id, name and block shape.
        dequantize: bytes of rows, ``uint8`` of shape (rows, bytes of a row), to ``float32`` of shape (rows, columns).
        traits: the CUDA traits header, where there is one; it comes with `planes`.
        planes: how the blocks lie on the device, in the header's order: bytes of blocks, ``uint8`` of shape (blocks,
            bytes), to one array of shape (blocks, bytes) for each plane, the same bytes in all. A block of fewer than
            32 elements stands for as many as make 32.
        quantize: the way back, ``float32`` of shape (rows, columns) to bytes of rows, for ``model.quantize``; left out
            where there is none. What it takes in passing is to be small beside the rows. It raises FloatingPointError
            for values that the type cannot hold.
        largest_error: what `quantize` loses at most of normal random values: the root mean square of the error over
            that of the values, above 0 and below 1, which is what a type of zeros loses. Q8_0 loses 0.005, Q4_0 0.09;
            state it where a type of few bits loses more than half.

    """

    qtype: QType = field(validator=validators.instance_of(QType))
    dequantize: Callable[[NDArray[np.uint8]], NDArray[np.float32]] = field(validator=validators.is_callable())
    traits: Path | None = field(default=None, validator=validators.optional(validators.instance_of(Path)))
    planes: Callable[[NDArray[np.uint8]], tuple[NDArray[np.uint8], ...]] | None = field(
        default=None, validator=validators.optional(validators.is_callable())
    )
    quantize: Callable[[NDArray[np.float32]], NDArray[np.uint8]] | None = field(
        default=None, validator=validators.optional(validators.is_callable())
    )
    largest_error: float = field(
        default=0.5, validator=(validators.instance_of(float), validators.gt(0.0), validators.lt(1.0))
    )

    def __attrs_post_init__(self) -> None:
        if (self.traits is None) != (self.planes is None):
            raise ValueError(f"{self.qtype.name}: traits and planes describe one device layout; give both or neither")


class UploadStrategy(Protocol):
    """A way to make weights resident."""

    name: str
    device_kind: str
    """The kind of arena it fills: ``cpu`` or ``cuda``."""

    def upload(self, resident: ResidentWeights, emit: Emit) -> int:
        """Bring every missing weight into the arena and mark it.

        Args:
            resident: the plan, its arena, and what is already there.
            emit: called with `UploadProgress`.

        Returns:
            Bytes written into the arena; 0 when nothing was missing.

        """
        ...


@frozen(kw_only=True)
class RuntimeSettings:
    """How a runtime is opened.

    Attributes:
        context_length: tokens a sequence may hold.
        kv_type: the type of the KV cache (``f32``, ``f16``, ``q8_0``), or ``auto``; an executor refuses what it lacks.
        activations: what products with quantised weights take: ``int8``, ``f32`` or ``auto``; an executor refuses what
            it lacks.
        step_tokens: the most tokens of one step; longer prompts are fed in several.
        kv_tokens: tokens that all sequences together may hold; 0 for as many as one; see `cache_tokens`.
        prefix_cache: whether a sequence may take over what others computed; see `mortice.core.plugin.kv_pages`.
        tuning: what an executor may find out by timing ways to compute on its device: ``auto`` measures what is not
            known yet and keeps it, ``cached`` takes what was kept and measures nothing, ``off`` takes built-in figures.

    """

    context_length: int
    kv_type: str = "auto"
    activations: str = "auto"
    step_tokens: int = 2048
    kv_tokens: int = 0
    prefix_cache: bool = True
    tuning: Literal["auto", "cached", "off"] = "auto"

    @property
    def cache_tokens(self) -> int:
        """Tokens that the KV cache has room for: those of one full sequence at least."""
        return max(self.kv_tokens, self.context_length)


class TokenSequence(Protocol):
    """One sequence of tokens with its KV cache."""

    @property
    def length(self) -> int:
        """Tokens in the cache."""
        ...

    def truncate(self, length: int) -> None:
        """Forget all tokens from position `length` on; a sequence that shares them keeps them."""
        ...

    def close(self) -> None:
        """Give its memory back."""
        ...


@frozen(eq=False, kw_only=True)
class StepPart:
    """What one sequence does in a step.

    Attributes:
        sequence: which.
        token_ids: tokens that follow those it has, at least one.
        logits: for which of them logits are wanted.

    """

    sequence: TokenSequence
    token_ids: Sequence[int] = field(validator=lambda _, __, ids: _not_empty(ids))
    logits: Literal["last", "all", "none"] = "last"


def _not_empty(ids: Sequence[int]) -> None:
    if len(ids) == 0:
        raise ValueError("a step part has at least one token")


class Runtime(Protocol):
    """A program on a device, ready to step."""

    settings: RuntimeSettings

    def new_sequence(self) -> TokenSequence:
        """An empty sequence."""
        ...

    def step(self, parts: Sequence[StepPart]) -> NDArray[np.float32]:
        """Run the program once over the tokens of all parts.

        Returns:
            float32, shape (rows asked for, vocab_size), in the order of the parts and of their tokens.

        Raises:
            InputError: before any work, for a token id outside the vocabulary or more tokens than the context holds.

        """
        ...

    def device_chooser(
        self,
        sequence: TokenSequence,
        sampling: SamplingParams,
        generation: GenerationParams,
        fed: Sequence[int] | None = None,
    ) -> ChooseToken | None:
        """Something that feeds tokens and chooses the next one without logits leaving the device.

        Args:
            sequence: what is fed.
            sampling: how to choose.
            generation: for the alternatives to report.
            fed: the sequence's tokens so far, a list the caller keeps up to date; penalties need it.

        Returns:
            It, for use with this sequence only; None where the host has to sample.

        """
        ...

    def close(self) -> None:
        """Give all memory back; calling twice is fine."""
        ...


@runtime_checkable
class Traceable(Protocol):
    """A runtime that can show the values within a step; optional, ``mortice parity`` looks for it."""

    def trace(
        self, parts: Sequence[StepPart], see: Callable[[Buffer, NDArray[np.float32]], None]
    ) -> NDArray[np.float32]:
        """Run a step like `Runtime.step`, with the same kernels where that is possible, and show what it writes.

        Args:
            parts: as for `Runtime.step`; not more tokens in all than ``settings.step_tokens``.
            see: called with each buffer of the program that is written to memory, once, and its value: float32, shape
                (rows, width), the caller's to keep. Rows are the tokens of all parts in order, from `SelectRows` on
                those whose logits were asked for. A value that exists only within a kernel is left out, so an executor
                that fuses operators shows the last of each group.

        Returns:
            The logits, as `Runtime.step` does.

        Raises:
            InputError: before any work, as `Runtime.step` does, and for more tokens than a step has.

        """
        ...


@runtime_checkable
class Wakes(Protocol):
    """An executor whose device takes a while to come up; optional, the pipeline looks for it."""

    def wake(self) -> None:
        """Begin to bring the device up, and return; the model file is read meanwhile. `Executor.device` waits for it.

        What goes wrong is kept for `Executor.device` to say: perhaps nobody will ask for the device.

        """
        ...


@runtime_checkable
class Prepares(Protocol):
    """An executor with work to do before there are weights; optional, the pipeline looks for it."""

    def prepare(self, plan: WeightPlan, settings: RuntimeSettings) -> None:
        """Do what needs no weights, such as compiling kernels; the next `Executor.open` of this plan makes use of it.

        It comes before `Executor.allocate`, so that what fails here fails before anything is uploaded.

        """
        ...


@frozen(eq=False, kw_only=True)
class TypeTrial:
    """What a quantisation type's device code made of a weight, beside what the host makes of it.

    Attributes:
        stored: the weight in the executor's layout, written by the host.
        repacked: the same, written by the device code; None where the executor has none.
        values: float32 of the weight's shape, from `stored`.
        products: float32, shape (rows, columns / 32): of each 32 weights with their activations; None for a type whose
            products are made of `values`.

    """

    stored: NDArray[np.uint8]
    repacked: NDArray[np.uint8] | None
    values: NDArray[np.float32]
    products: NDArray[np.float32] | None


@runtime_checkable
class TriesTypes(Protocol):
    """An executor that can try a type's device code by itself; optional, the conformance kit looks for it."""

    def trial_shapes(self, type_: QuantizationType) -> Sequence[tuple[int, int]]:
        """Shapes of weights, (rows, columns), that together see every way the layout has."""
        ...

    def compile_type(self, type_: QuantizationType, arch: str) -> Sequence[str]:
        """Compile everything of a type for an architecture (``sm_90``); needs no device.

        Returns:
            What is wrong with it, such as spilled registers; empty when nothing is.

        Raises:
            DeviceError: when there is no compiler, or the code does not compile.

        """
        ...

    def try_type(
        self,
        type_: QuantizationType,
        rows: NDArray[np.uint8],
        activations: NDArray[np.int8],
        scales: NDArray[np.float32],
        *,
        on_device: bool,
    ) -> TypeTrial:
        """Run the device code of a type on a weight.

        Args:
            type_: which; it has traits.
            rows: the weight as in a file, shape (rows, bytes of a row).
            activations: int8, shape (columns,).
            scales: of each 32 activations, shape (columns / 32,).
            on_device: on the device; otherwise the same code on the host, as far as the executor can.

        Raises:
            DeviceError: when there is no device, or nothing here that runs device code on the host.

        """
        ...


@runtime_checkable
class Identified(Protocol):
    """A runtime that can say which code it runs; optional, the record of a run keeps it."""

    def code_hashes(self) -> Mapping[str, str]:
        """SHA-256 in hex of each piece of code by a name: of what is compiled, or of its source where nothing is."""
        ...


@runtime_checkable
class Tuned(Protocol):
    """A runtime with choices that depend on measurements; optional, the record of a run and a benchmark keep them."""

    def measured_choices(self) -> Mapping[str, str]:
        """What was chosen, by what it decides; with other choices results are rounded differently."""
        ...


class Executor(Protocol):
    """Runs programs on one kind of device."""

    name: str

    def device(self) -> DeviceInfo:
        """The device it would use.

        Raises:
            DeviceError: when there is none it can use, saying what is missing and how to go on without.

        """
        ...

    def kernels(self, device: DeviceInfo, qtypes: Sequence[QuantizationType]) -> Sequence[Kernel]:
        """What it can run, preferred layouts first."""
        ...

    def unsupported(self, program: Program, settings: RuntimeSettings) -> Sequence[str]:
        """Reasons why it cannot run this program; empty when it can. Weight types are checked by the plan."""
        ...

    def kv_bytes(self, program: Program, settings: RuntimeSettings) -> int:
        """Bytes of a KV cache with room for ``settings.cache_tokens`` tokens."""
        ...

    def workspace_bytes(self, program: Program, settings: RuntimeSettings) -> int:
        """Bytes it allocates besides weights and KV cache."""
        ...

    def allocate(self, nbytes: int) -> Arena:
        """Memory for weights.

        Raises:
            DoesNotFitError: when it is not there.

        """
        ...

    def default_upload(self) -> str:
        """The name of the strategy taken for ``upload.strategy = "auto"``."""
        ...

    def open(self, model: BoundModel, settings: RuntimeSettings, emit: Emit) -> Runtime:
        """Make a runtime of a bound model."""
        ...
