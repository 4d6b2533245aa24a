"""Feeds the same tokens to two executors, in the three kinds of step there are, and compares what comes out.

Distributions come from steps as they are run for users. Values of operators come from `Traceable.trace`, on the same
tokens at the same positions. Both executors live through the whole run on their own, so that an error spreads: each
operator is judged by what it adds to the errors of what it read.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager

import numpy as np
from attrs import define, field
from numpy.typing import NDArray

from mortice.core.counts import counted
from mortice.core.errors import ConfigError
from mortice.core.model.operators import Attention, Buffer, KvWrite, Operator
from mortice.core.model.program import Program
from mortice.core.parity.measures import Distances, distances, nmse
from mortice.core.parity.results import MODES, Comparison, Distribution, Mode, ParityReport
from mortice.core.parity.tolerances import GROWTH, Tolerances, tolerances_for
from mortice.core.pipeline import Pipeline
from mortice.core.plugin.interfaces import StepPart, TokenSequence, Traceable

__all__ = ["SPARE_CONTEXT", "compare", "covers"]

SPARE_CONTEXT = 256
"""Tokens of context that are not fed: several sequences share it, and executors hand it out in pages."""

_LEAST_TOKENS = 16
_Array = NDArray[np.float32]


def compare(
    oracle: Pipeline,
    tested: Pipeline,
    token_ids: Sequence[int],
    *,
    text: str,
    note: Callable[[str], None],
    tolerances: Tolerances | None = None,
) -> ParityReport:
    """Hold one executor against another.

    Args:
        oracle: who is right.
        tested: who is judged; a pipeline of the same file.
        token_ids: at least 16 tokens; `SPARE_CONTEXT` fewer than either context are needed.
        text: where they come from, for the report.
        note: told what is going on, one line each.
        tolerances: by default those of the tested pipeline's settings.

    Raises:
        ConfigError: when there are too few tokens, or too little context for them.
        MorticeError: what the executors raise.

    """
    _require_room(token_ids, oracle, tested)
    tolerances = tolerances or tolerances_for(tested.settings)
    comparer = _Comparer(oracle=oracle, tested=tested)
    comparer.decode(token_ids)
    note(f"decode: {len(token_ids)} steps compared")
    comparer.prefill(token_ids)
    note(f"prefill: {len(token_ids)} tokens compared")
    comparer.mixed(token_ids)
    note("mixed steps compared")
    if not comparer.traces:
        names = [side.executor.name for side in (oracle, tested) if not isinstance(side.runtime, Traceable)]
        note(f"values of operators are not compared: {' and '.join(names)} cannot show them")
    return ParityReport(
        model=tested.model.file.path.name,
        executor=tested.executor.name,
        device=tested.fit.device.name,
        oracle=oracle.executor.name,
        kv_type=tested.settings.kv_type,
        activations=tested.settings.activations,
        text=text,
        tokens=len(token_ids),
        num_layers=tested.program.num_layers,
        tolerances=tolerances,
        comparisons=tuple(comparer.comparisons(tolerances)),
        distributions=tuple(comparer.distribution(mode) for mode in MODES),
    )


def _require_room(token_ids: Sequence[int], *pipelines: Pipeline) -> None:
    if len(token_ids) < _LEAST_TOKENS:
        raise ConfigError(f"parity: found {counted(len(token_ids), 'token')}, wanted at least {_LEAST_TOKENS}")
    for pipeline in pipelines:
        wanted = len(token_ids) + SPARE_CONTEXT
        if pipeline.settings.context_length < wanted:
            raise ConfigError(
                f"parity: {len(token_ids)} tokens want a context of {wanted}, executor {pipeline.executor.name} "
                f"was given {pipeline.settings.context_length}"
            )
        if pipeline.settings.step_tokens < _LEAST_TOKENS:
            raise ConfigError(
                f"executor.step_tokens: found {pipeline.settings.step_tokens}, parity wants at least {_LEAST_TOKENS}"
            )


_Pair = tuple[TokenSequence, TokenSequence]
"""The oracle's sequence and the tested executor's."""


@define(eq=False, kw_only=True)
class _Comparer:
    oracle: Pipeline
    tested: Pipeline
    traces: bool = field(init=False)
    distances: dict[Mode, list[Distances]] = field(factory=lambda: defaultdict(list), init=False)
    errors: dict[tuple[Mode, Buffer], list[NDArray[np.float64]]] = field(factory=lambda: defaultdict(list), init=False)
    """NMSE of each row of each buffer, one array for each traced step."""

    def __attrs_post_init__(self) -> None:
        self.traces = all(isinstance(side.runtime, Traceable) for side in (self.oracle, self.tested))

    # the three kinds of step ------------------------------------------------------------------------------------

    def decode(self, token_ids: Sequence[int]) -> None:
        """One token a step. The first step, one in the middle and the last one are looked into."""
        looked_into = {0, len(token_ids) // 2, len(token_ids) - 1}
        with self._sequences(1) as (pair,):
            for position, token in enumerate(token_ids):
                self._step("decode", [(pair, [token])], trace=position in looked_into)

    def prefill(self, token_ids: Sequence[int]) -> None:
        """All tokens, in as few steps as there may be."""
        size = self._step_tokens
        with self._sequences(1) as (pair,):
            for start in range(0, len(token_ids), size):
                self._step("prefill", [(pair, token_ids[start : start + size])], trace=True)

    def mixed(self, token_ids: Sequence[int]) -> None:
        """Three sequences in each of two steps; some bring many tokens, some one."""
        few = 3
        many = min(len(token_ids) // 2, self._step_tokens) - few - 1
        ids = list(token_ids)
        with self._sequences(3) as (first, second, third):
            later = many + few  # another part of the text for each, so that none could be mistaken for another
            self._step("mixed", [(first, ids[:many]), (second, ids[-1:]), (third, ids[many:later])], trace=True)
            self._step("mixed", [(first, ids[many : many + 1]), (second, ids[-many:]), (third, ids[:1])], trace=True)

    @property
    def _step_tokens(self) -> int:
        return min(self.oracle.settings.step_tokens, self.tested.settings.step_tokens)

    @contextmanager
    def _sequences(self, count: int) -> Iterator[list[_Pair]]:
        """Some sequences of both runtimes, closed at the end."""
        with ExitStack() as stack:

            def opened(side: Pipeline) -> TokenSequence:
                sequence = side.runtime.new_sequence()
                stack.callback(sequence.close)
                return sequence

            yield [(opened(self.oracle), opened(self.tested)) for _ in range(count)]

    # one step ---------------------------------------------------------------------------------------------------

    def _step(self, mode: Mode, parts: Sequence[tuple[_Pair, Sequence[int]]], *, trace: bool) -> None:
        wanted, found = (
            side.runtime.step(_parts(parts, number)) for number, side in enumerate((self.oracle, self.tested))
        )
        self.distances[mode].append(distances(found, wanted))
        if trace and self.traces:
            for pair, ids in parts:
                for sequence in pair:
                    sequence.truncate(sequence.length - len(ids))
            self._trace(mode, parts)

    def _trace(self, mode: Mode, parts: Sequence[tuple[_Pair, Sequence[int]]]) -> None:
        oracle, tested = self.oracle.runtime, self.tested.runtime
        assert isinstance(oracle, Traceable)
        assert isinstance(tested, Traceable)
        found: dict[Buffer, _Array] = {}
        # the tested one first: it may write fewer values, and only those are kept
        tested.trace(_parts(parts, 1), found.__setitem__)

        def see(buffer: Buffer, wanted: _Array) -> None:
            if buffer in found:
                self.errors[mode, buffer].append(nmse(found.pop(buffer), wanted))

        oracle.trace(_parts(parts, 0), see)

    # what was found ---------------------------------------------------------------------------------------------

    def comparisons(self, tolerances: Tolerances) -> Iterator[Comparison]:
        """Every compared value, in the program's order."""
        program = self.oracle.program
        # what one kind of step fuses, another may write
        compared = {mode: {buffer for of, buffer in self.errors if of == mode} for mode in MODES}
        for place, operator in enumerate(program.operators):
            for buffer in operator.outputs:
                for mode in MODES:
                    if buffer not in compared[mode]:
                        continue
                    covered, sources = covers(program, operator, compared[mode])
                    kinds = list(dict.fromkeys(part.kind for part in covered))
                    inherited = max((self._error(mode, source) for source in sources), default=0.0)
                    yield Comparison(
                        operator=operator.name,
                        place=place,
                        layer=operator.layer,
                        kind="+".join(kinds),
                        covers=tuple(part.name for part in covered),
                        mode=mode,
                        nmse=self._error(mode, buffer),
                        inherited=inherited,
                        limit=tolerances.nmse(kinds) + GROWTH * inherited,
                    )

    def _error(self, mode: Mode, buffer: Buffer) -> float:
        return float(np.concatenate(self.errors[mode, buffer]).mean())

    def distribution(self, mode: Mode) -> Distribution:
        """Every position of a kind of step."""
        parts = self.distances[mode]
        differences = np.concatenate([part.top_differences.reshape(-1) for part in parts])
        return Distribution(
            mode=mode,
            kl=np.concatenate([part.kl for part in parts]),
            same_top=float(np.concatenate([part.same_top for part in parts]).mean()),
            widest_margin=float(np.concatenate([part.margin for part in parts]).max()),
            top_mean=float(differences.mean()),
            top_p99=float(np.percentile(differences, 99, method="higher")),
        )


def _parts(parts: Sequence[tuple[_Pair, Sequence[int]]], side: int) -> list[StepPart]:
    return [StepPart(sequence=pair[side], token_ids=list(ids), logits="all") for pair, ids in parts]


def covers(program: Program, operator: Operator, compared: set[Buffer]) -> tuple[list[Operator], set[Buffer]]:
    """What stands between an operator's output and the compared values before it.

    Returns:
        The operators, `operator` included, in the program's order, and those compared values. Attention also reads
        what its layer's write put into the cache.

    """
    places = {id(part): place for place, part in enumerate(program.operators)}
    writers = {buffer: part for part in program.operators for buffer in part.outputs}
    cached = {part.layer: part for part in program.operators if isinstance(part, KvWrite)}
    found: dict[int, Operator] = {}
    sources: set[Buffer] = set()
    pending: list[Operator] = [operator]
    while pending:
        part = pending.pop()
        if places[id(part)] in found:
            continue
        found[places[id(part)]] = part
        for buffer in part.inputs:
            if buffer in compared:
                sources.add(buffer)
            else:
                pending.append(writers[buffer])
        if isinstance(part, Attention) and part.layer in cached:
            pending.append(cached[part.layer])
    return [found[place] for place in sorted(found)], sources
