"""Checks of an executor: operator by operator against the reference executor, and what its callers rely on.

::

    class TestTorch(ExecutorSuite):
        executor = TorchExecutor()
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Literal

import numpy as np
from attrs import evolve, frozen
from numpy.typing import NDArray

from mortice.core.config import ExecutorConfig, ModelConfig, RunConfig
from mortice.core.errors import DeviceError, InputError
from mortice.core.model.operators import OPERATOR_KINDS
from mortice.core.model.program import Program, build_program
from mortice.core.model.types import DeviceInfo
from mortice.core.model.validation import validate
from mortice.core.parity.compare import SPARE_CONTEXT, compare
from mortice.core.pipeline import Pipeline, prepare
from mortice.core.plugin.conformance import describe, executor_faults, kernel_faults
from mortice.core.plugin.interfaces import (
    Executor,
    RuntimeSettings,
    StepPart,
    TokenSequence,
    UploadStrategy,
)
from mortice.core.plugin.kv_pages import SharesCache
from mortice.core.plugin.registry import Registry
from mortice.core.plugin.token_choice import ChoicePart, ChoosesTokens
from mortice.core.stages import open_file
from mortice.core.testing.operator_cases import OperatorCase, operator_cases
from mortice.core.testing.registries import registry_with
from mortice.core.testing.suite import Suite, each, fail, require, skip
from mortice.core.testing.tiny_models import write_tiny_model
from mortice.core.text.params import GenerationParams, SamplingParams
from mortice.core.text.sampling import Sampled, Sampler

__all__ = ["ExecutorSuite", "Settings"]

_TOKENS = 32
_CONTEXT = 512
_CLOSE = 1e-3
_SAMPLING = (
    SamplingParams(),
    SamplingParams(temperature=1.0, top_p=0.9, seed=3),
    # a token that is taken whenever it is not among the last six twice
    SamplingParams(temperature=0.7, frequency_penalty=15.0, penalty_window=6, logit_bias={5: 30.0}, seed=4),
)
Logits = NDArray[np.float32]


@frozen(kw_only=True)
class Settings:
    """How pipelines are run: the most exact settings the executor has; see `ExecutorConfig`."""

    kv: Literal["auto", "f32", "f16", "q8_0"] = "f32"
    activations: Literal["auto", "f32", "int8"] = "f32"
    step_tokens: int = 24


class ExecutorSuite(Suite):
    """Holds an executor against the reference executor.

    Attributes:
        executor: what is checked.
        uploads: upload strategies of the same plugin, where the built-ins do not serve its memory.
        settings: `Settings` of the comparison.

    """

    executor: Executor
    uploads: Sequence[UploadStrategy] = ()
    settings: Settings = Settings()

    # what the checks share --------------------------------------------------------------------------------------

    def registry(self) -> Registry:
        """The built-ins, with the executor in front."""
        return self.once("registry", lambda: registry_with(executors=self._others(), uploads=self.uploads))

    def _others(self) -> list[Executor]:
        return [] if self.executor.name == "reference" else [self.executor]

    def device(self) -> DeviceInfo:
        """The executor's device; the check is left out, with the reason, where there is none."""
        try:
            return self.executor.device()
        except DeviceError as error:
            skip(describe(error))

    def cases(self) -> list[OperatorCase]:
        """The models that are compared."""
        return self.once("cases", lambda: list(operator_cases(self.registry())))

    def token_ids(self, program: Program, count: int = _TOKENS) -> list[int]:
        """Random tokens of a model's vocabulary."""
        return [int(token) for token in np.random.default_rng(4).integers(0, program.vocab_size, count)]

    @contextmanager
    def pipeline(self, path: Path, name: str, case: OperatorCase, **changes: Any) -> Iterator[Pipeline]:
        """A file on an executor by name."""
        registry = registry_with(contracts=[case.contract], executors=self._others(), uploads=self.uploads)
        settings = evolve(self.settings, **changes)
        executor = ExecutorConfig(
            name=name,
            context=_CONTEXT,
            kv=settings.kv,
            activations=settings.activations,
            step_tokens=settings.step_tokens,
        )
        with prepare(RunConfig(model=ModelConfig(path=path), executor=executor), registry) as pipeline:
            yield pipeline

    @contextmanager
    def running(self, folder: Path, **changes: Any) -> Iterator[Pipeline]:
        """The llama case, or the first, on the executor that is checked."""
        self.device()
        case = next((case for case in self.cases() if case.label == "llama"), self.cases()[0])
        with self.pipeline(_written(folder, case), self.executor.name, case, **changes) as pipeline:
            yield pipeline

    # what it is -------------------------------------------------------------------------------------------------

    def test_it_is_what_the_core_will_call(self) -> None:
        """Name and methods are there."""
        faults = list(executor_faults(self.executor))
        require(not faults, "; ".join(faults))

    def test_its_kernels_are_kernels(self) -> None:
        """Every kernel names an operator and a layout that can lay weights out."""
        registry = self.registry()
        types = {name: provided.value for name, provided in registry.qtypes.items()}
        kernels = list(self.executor.kernels(self.device(), list(types.values())))
        require(kernels, "it has no kernel")
        faults = [fault for kernel in kernels for fault in kernel_faults(kernel)]
        require(not faults, "; ".join(faults))
        for kernel in {(kernel.qtype, kernel.layout.name): kernel for kernel in kernels}.values():
            qtype = types[kernel.qtype].qtype
            columns = 256
            nbytes = kernel.layout.nbytes(qtype, 4, columns)
            if not nbytes:
                continue
            out = np.full(nbytes, 0xA5, np.uint8)
            rows = np.zeros((4, qtype.row_bytes(columns)), np.uint8)
            kernel.layout.store(rows, columns, out)
            again = np.full(nbytes, 0x5A, np.uint8)
            kernel.layout.store(rows, columns, again)
            require(np.array_equal(out, again), f"layout {kernel.layout.name} of {kernel.qtype} leaves bytes unwritten")

    def test_its_own_upload_strategy_exists(self) -> None:
        """`default_upload` names one that fills its kind of memory."""
        name, known = self.executor.default_upload(), self.registry().uploads
        require(name in known, f"no strategy {name!r}; one of the same plugin has to stand in the suite's `uploads`")
        strategy = known[name].value
        kind = self.device().kind
        require(strategy.device_kind == kind, f"{strategy.name} fills {strategy.device_kind} memory, wanted {kind}")

    def test_its_memory_can_be_written_and_given_back(self) -> None:
        """An arena is of the device's kind and as large as asked for; closing twice is fine."""
        kind = self.device().kind
        arena = self.executor.allocate(4096)
        require(arena.kind == kind, f"the arena is of kind {arena.kind}, the device of kind {kind}")
        require(arena.nbytes >= 4096, f"the arena has {arena.nbytes} bytes, wanted 4096")
        arena.write(256, np.arange(512, dtype=np.uint32).view(np.uint8)[:512])
        arena.close()
        arena.close()

    def test_what_it_does_not_know_is_refused(self, tmp_path: Path) -> None:
        """Settings that it does not have are named as reasons, not passed over."""
        self.device()
        program = _program(_written(tmp_path, self.cases()[0]), self.cases()[0], self.registry())
        for settings in (
            RuntimeSettings(context_length=64, kv_type="nonsense"),
            RuntimeSettings(context_length=64, activations="nonsense"),
        ):
            require(self.executor.unsupported(program, settings), f"{settings} is accepted")

    def test_memory_is_counted(self, tmp_path: Path) -> None:
        """The KV cache grows with the context, and neither count is negative."""
        self.device()
        program = _program(_written(tmp_path, self.cases()[0]), self.cases()[0], self.registry())
        short, long = (RuntimeSettings(context_length=tokens) for tokens in (256, 4096))
        counts = [self.executor.kv_bytes(program, settings) for settings in (short, long)]
        require(0 < counts[0] < counts[1], f"KV bytes for 256 and 4096 tokens are {counts}")
        workspace = self.executor.workspace_bytes(program, short)
        require(workspace >= 0, f"workspace_bytes is {workspace}")

    # what it computes -------------------------------------------------------------------------------------------

    def test_the_cases_use_every_operator(self, tmp_path: Path) -> None:
        """The comparison below leaves no kind of operator out."""
        used = set()
        for case in self.cases():
            registry = registry_with(contracts=[case.contract])
            used |= {operator.kind for operator in _program(_written(tmp_path, case), case, registry).operators}
        missing = sorted(set(OPERATOR_KINDS) - used)
        require(not missing, f"no case uses {', '.join(missing)}")

    @each("case", lambda suite: suite.cases())
    def test_every_operator_equals_the_reference(self, case: OperatorCase, tmp_path: Path) -> None:
        """Decode, prefill and mixed steps; values of operators where `trace` shows them, distributions always."""
        self.device()
        path = _written(tmp_path, case)
        settings = RuntimeSettings(
            context_length=_CONTEXT, kv_type=self.settings.kv, activations=self.settings.activations
        )
        registry = registry_with(contracts=[case.contract])
        reasons = self.executor.unsupported(_program(path, case, registry), settings)
        if reasons:
            skip("; ".join(reasons))
        with ExitStack() as stack:
            oracle = stack.enter_context(self._oracle(path, case))
            tested = stack.enter_context(self.pipeline(path, self.executor.name, case))
            assert _TOKENS + SPARE_CONTEXT <= _CONTEXT
            ids = self.token_ids(tested.program)
            report = compare(oracle, tested, ids, text="random tokens", note=lambda _: None)
        require(report.passed, "; ".join(report.failures))

    @contextmanager
    def _oracle(self, path: Path, case: OperatorCase) -> Iterator[Pipeline]:
        registry = registry_with(contracts=[case.contract])
        executor = ExecutorConfig(
            name="reference", context=_CONTEXT, kv="f32", activations="f32", step_tokens=self.settings.step_tokens
        )
        with prepare(RunConfig(model=ModelConfig(path=path), executor=executor), registry) as pipeline:
            yield pipeline

    # what callers rely on ---------------------------------------------------------------------------------------

    def test_forgotten_tokens_leave_no_trace(self, tmp_path: Path) -> None:
        """`truncate` goes back: other tokens fed after it give what they give to a new sequence."""
        with self.running(tmp_path) as pipeline:
            ids = self.token_ids(pipeline.program, 12)
            runtime = pipeline.runtime
            back, fresh = runtime.new_sequence(), runtime.new_sequence()
            _step(pipeline, back, ids)
            back.truncate(6)
            require(back.length == 6, f"length is {back.length} after truncate(6)")
            other = ids[::-1][:5]
            _step(pipeline, fresh, ids[:6])
            _expect_close(_step(pipeline, back, other), _step(pipeline, fresh, other), "after truncate")

    def test_rows_are_those_asked_for(self, tmp_path: Path) -> None:
        """All, the last or none, in the order of parts and tokens."""
        with self.running(tmp_path) as pipeline:
            ids = self.token_ids(pipeline.program, 9)
            every = _step(pipeline, pipeline.runtime.new_sequence(), ids)
            require(every.shape == (9, pipeline.program.vocab_size), f"logits='all' gave shape {every.shape}")
            last = _step(pipeline, pipeline.runtime.new_sequence(), ids, "last")
            require(last.shape == (1, pipeline.program.vocab_size), f"logits='last' gave shape {last.shape}")
            _expect_close(last, every[-1:], "logits='last'")
            none = _step(pipeline, pipeline.runtime.new_sequence(), ids, "none")
            require(none.shape == (0, pipeline.program.vocab_size), f"logits='none' gave shape {none.shape}")

    def test_wrong_tokens_are_refused_before_any_work(self, tmp_path: Path) -> None:
        """A token outside the vocabulary and one too many for the context; the sequence stays as it was."""
        with self.running(tmp_path) as pipeline:
            sequence = pipeline.runtime.new_sequence()
            vocab_size = pipeline.program.vocab_size
            full = [1] * (_CONTEXT + 1)
            for what, ids in (("token -1", [1, -1]), (f"token {vocab_size}", [vocab_size]), ("513 tokens", full)):
                try:
                    _step(pipeline, sequence, ids, "last")
                except InputError:
                    require(sequence.length == 0, f"{what}: {sequence.length} tokens were fed before it was refused")
                else:
                    fail(f"{what} was accepted, wanted InputError")

    def test_closing_gives_sequences_back(self, tmp_path: Path) -> None:
        """Sequences that come and go do not use up the context's memory; closing twice is fine."""
        with self.running(tmp_path) as pipeline:
            ids = self.token_ids(pipeline.program, 20)
            wanted = None
            for _ in range(8):
                sequence = pipeline.runtime.new_sequence()
                for start in range(0, _CONTEXT - 20, 20):
                    found = _step(pipeline, sequence, ids, "last")
                    if start == 0:
                        wanted = found if wanted is None else wanted
                        _expect_close(found, wanted, "a sequence after others were closed")
                sequence.close()
                sequence.close()
            pipeline.runtime.close()
            pipeline.runtime.close()

    def test_sequences_that_share_tokens_do_not_see_each_other(self, tmp_path: Path) -> None:
        """A fork, and a prompt that takes over a known beginning, go on as if they had been fed everything."""
        with self.running(tmp_path) as pipeline:
            runtime = pipeline.runtime
            if not isinstance(runtime, SharesCache):
                skip("its sequences share nothing (SharesCache)")
            size = runtime.page_tokens
            ids = self.token_ids(pipeline.program, min(size + size // 2, _CONTEXT - 8))
            one, other = ids[:3], ids[-3:]
            alone = runtime.new_sequence()
            _feed(pipeline, alone, ids)
            wanted = _step(pipeline, alone, other)
            before, parent = runtime.free_pages, runtime.new_sequence()
            _feed(pipeline, parent, ids)
            child = runtime.fork(parent)
            require(child.length == len(ids), f"a fork of {len(ids)} tokens has {child.length}")
            _step(pipeline, parent, one)
            _expect_close(_step(pipeline, child, other), wanted, "a fork whose parent went on")
            parent.truncate(len(ids))
            _expect_close(_step(pipeline, parent, other), wanted, "a parent whose fork went on")
            parent.truncate(size // 2)
            _step(pipeline, parent, one)
            child.truncate(len(ids))
            _expect_close(_step(pipeline, child, other), wanted, "a fork whose parent was cut and went on")
            late = runtime.new_sequence()
            known = runtime.adopt_prefix(late, ids)
            require(
                known == late.length < len(ids), f"adopt_prefix gave {known}, length is {late.length}, of {len(ids)}"
            )
            _feed(pipeline, late, ids[known:])
            _expect_close(_step(pipeline, late, other), wanted, f"a prompt of which {known} tokens were known")
            for sequence in (parent, child, late):
                sequence.close()
            require(runtime.free_pages == before, f"{before - runtime.free_pages} pages are lost")

    def test_tokens_it_chooses_are_those_of_the_sampler(self, tmp_path: Path) -> None:
        """For several sequences in a step, each with parameters of its own, whether or not a step is begun ahead."""
        with self.running(tmp_path) as pipeline:
            runtime = pipeline.runtime
            if not isinstance(runtime, ChoosesTokens):
                skip("the host chooses its tokens (ChoosesTokens)")
            texts = [self.token_ids(pipeline.program, 4 + number) for number in range(len(_SAMPLING))]
            prompts = [len(ids) for ids in texts]
            sequences = [runtime.new_sequence() for _ in texts]
            ways = zip(sequences, _SAMPLING, strict=True)
            choices = [runtime.token_choice(sequence, sampling, GenerationParams()) for sequence, sampling in ways]
            for index in range(16):
                order = range(len(texts)) if index % 6 else range(len(texts))[::-1]
                parts = [
                    ChoicePart(
                        sequence=sequences[i],
                        token_ids=texts[i][sequences[i].length :],
                        choice=choices[i],
                        index=index,
                    )
                    for i in order
                ]
                for i, made in zip(order, runtime.choose_step(parts, ahead=index % 4 > 0), strict=True):
                    if not isinstance(made, Sampled):
                        fail(f"found {made!r}, wanted a token")
                    texts[i].append(made.id)
            for sampling, ids, start in zip(_SAMPLING, texts, prompts, strict=True):
                logits = _step(pipeline, runtime.new_sequence(), ids)
                for index, found in enumerate(ids[start:]):
                    sampler = Sampler(sampling, pipeline.program.vocab_size)
                    sampler.accept(ids[: start + index])
                    wanted = sampler.sample(logits[start + index - 1], index).id
                    require(found == wanted, f"{sampling}: found token {found} after {index} others, wanted {wanted}")


def _written(folder: Path, case: OperatorCase) -> Path:
    path = folder / f"model-{len(list(folder.iterdir()))}.gguf"
    return write_tiny_model(path, case.contract, **case.arguments)


def _program(path: Path, case: OperatorCase, registry: Registry) -> Program:
    with open_file(registry, path) as file:
        return build_program(validate(file, case.contract).model())


def _step(pipeline: Pipeline, sequence: TokenSequence, ids: Sequence[int], logits: Any = "all") -> Logits:
    return pipeline.runtime.step([StepPart(sequence=sequence, token_ids=list(ids), logits=logits)])


def _feed(pipeline: Pipeline, sequence: TokenSequence, ids: Sequence[int]) -> None:
    size = pipeline.settings.step_tokens
    for start in range(0, len(ids), size):
        _step(pipeline, sequence, ids[start : start + size], "none")


def _expect_close(found: Logits, wanted: Logits, what: str) -> None:
    off = float(np.abs(found - wanted).max() / np.abs(wanted).max())
    require(off < _CLOSE, f"{what}: logits are {off:.2g} off, wanted at most {_CLOSE:g}")
