"""What a comparison of two executors found."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

import numpy as np
from attrs import frozen
from numpy.typing import NDArray

from mortice.core.parity.measures import TOP
from mortice.core.parity.tolerances import Tolerances

__all__ = ["MODES", "Comparison", "Distribution", "Mode", "ParityReport"]

Mode = Literal["decode", "prefill", "mixed"]
MODES: tuple[Mode, ...] = ("decode", "prefill", "mixed")


@frozen(kw_only=True)
class Comparison:
    """A value that both executors wrote.

    Attributes:
        operator: the program's operator that writes it.
        place: its place in the program.
        layer: its layer; None before the first and after the last.
        kind: kinds of all operators between this value and those compared before it, joined by ``+``; more than one
            where the executor does several at once.
        covers: names of those operators, in the program's order; the last is `operator`.
        mode: the kind of step.
        nmse: normalised mean squared error, the mean over all tokens.
        inherited: the largest error among the values it was made from.
        limit: what `nmse` may be: the kinds' tolerance, and what may have grown from `inherited`.

    """

    operator: str
    place: int
    layer: int | None
    kind: str
    covers: tuple[str, ...]
    mode: Mode
    nmse: float
    inherited: float
    limit: float

    @property
    def passed(self) -> bool:
        """Whether the error is within the limit."""
        return self.nmse <= self.limit


@frozen(eq=False, kw_only=True)
class Distribution:
    """Next-token distributions of one kind of step.

    Attributes:
        mode: the kind of step.
        kl: Kullback-Leibler divergence in nats, shape (positions,).
        same_top: share of positions whose best token is the same.
        widest_margin: among positions where it is not, the most that the oracle puts between the two.
        top_mean: mean difference of the oracle's five best log-probabilities.
        top_p99: 99th percentile of them.

    """

    mode: Mode
    kl: NDArray[np.float64]
    same_top: float
    widest_margin: float
    top_mean: float
    top_p99: float

    def failures(self, tolerances: Tolerances) -> Iterator[str]:
        """A line for each tolerance that does not hold."""
        checks = (
            ("mean KL divergence", float(self.kl.mean()), tolerances.kl_mean),
            (f"mean difference of the top {TOP} log-probabilities", self.top_mean, tolerances.top_mean),
            (f"p99 difference of the top {TOP} log-probabilities", self.top_p99, tolerances.top_p99),
            ("margin of a best token that differs", self.widest_margin, 2 * tolerances.top_p99),
        )
        for what, found, most in checks:
            if not found <= most:
                yield f"{self.mode}: {what}: found {found:.3g}, wanted at most {most:.3g}"


@frozen(eq=False, kw_only=True)
class ParityReport:
    """All of it.

    Attributes:
        model: the file's name.
        executor: the one that is tested.
        device: its device.
        oracle: the one it is held against.
        kv_type: of the tested one's cache, as asked for.
        activations: of the tested one, as asked for.
        text: where the tokens come from.
        tokens: how many.
        num_layers: of the model.
        tolerances: what may differ.
        comparisons: in the program's order, then by mode; empty where an executor cannot show its values.
        distributions: one for each kind of step.

    """

    model: str
    executor: str
    device: str
    oracle: str
    kv_type: str
    activations: str
    text: str
    tokens: int
    num_layers: int
    tolerances: Tolerances
    comparisons: tuple[Comparison, ...]
    distributions: tuple[Distribution, ...]

    @property
    def first_wrong(self) -> Comparison | None:
        """The first operator of the program that is further off than it may be."""
        return next((found for found in self.comparisons if not found.passed), None)

    @property
    def failures(self) -> tuple[str, ...]:
        """What does not hold, one line each; the first wrong operator before the distributions."""
        lines = [line for found in self.distributions for line in found.failures(self.tolerances)]
        wrong = self.first_wrong
        if wrong is not None:
            place = "outside the layers" if wrong.layer is None else f"layer {wrong.layer}"
            more = f", which ends {' + '.join(wrong.covers)}" if len(wrong.covers) > 1 else ""
            lines.insert(
                0,
                f"first wrong operator: {wrong.operator} ({wrong.kind}, {place}){more}: "
                f"{wrong.mode}: NMSE {wrong.nmse:.3g}, wanted at most {wrong.limit:.3g}",
            )
        return tuple(lines)

    @property
    def passed(self) -> bool:
        """Whether everything holds."""
        return not self.failures
