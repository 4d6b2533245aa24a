"""How far an executor may be from the oracle. The reasons for each number stand in ``docs/how-to/check-parity.md``."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from attrs import frozen

from mortice.core.plugin.interfaces import RuntimeSettings

__all__ = ["EXACT", "GROWTH", "ROUNDED", "Tolerances", "tolerances_for"]

GROWTH = 30.0
"""An operator may leave so many times the error of what it read, besides its own tolerance: norms and sums that nearly
cancel make a relative error larger without a mistake of their own."""


@frozen(kw_only=True)
class Tolerances:
    """What may differ.

    Attributes:
        name: ``exact`` or ``rounded``.
        operator_nmse: normalised mean squared error that an operator may add.
        kind_nmse: the same for kinds of operators that may add more.
        kl_mean: Kullback-Leibler divergence in nats, the mean over positions.
        top_mean: difference of the oracle's five best log-probabilities, the mean.
        top_p99: the same, 99th percentile. Another token may be the best one only where the oracle puts the two
            within twice this.

    """

    name: str
    operator_nmse: float
    kind_nmse: Mapping[str, float]
    kl_mean: float
    top_mean: float
    top_p99: float

    def nmse(self, kinds: Collection[str]) -> float:
        """What operators of these kinds together may add."""
        return max((self.kind_nmse.get(kind, self.operator_nmse) for kind in kinds), default=self.operator_nmse)


EXACT = Tolerances(
    name="exact",
    operator_nmse=1e-7,
    kind_nmse={"linear": 5e-4, "attention": 5e-4},
    kl_mean=5e-6,
    top_mean=1e-3,
    top_p99=5e-3,
)
"""For float32 activations and a float32 cache: nothing but the order of additions may differ."""

ROUNDED = Tolerances(
    name="rounded",
    operator_nmse=1e-6,
    kind_nmse={"linear": 5e-3, "attention": 5e-4},
    kl_mean=0.02,
    top_mean=0.093,
    top_p99=0.43,
)
"""For int8 activations or a cache of fewer bits."""


def tolerances_for(settings: RuntimeSettings) -> Tolerances:
    """`EXACT` where both the cache and the activations are asked to be float32, else `ROUNDED`."""
    return EXACT if (settings.kv_type, settings.activations) == ("f32", "f32") else ROUNDED
