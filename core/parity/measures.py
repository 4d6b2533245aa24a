"""How far two results are apart: values of operators, and distributions of the next token."""

from __future__ import annotations

from typing import Any

import numpy as np
from attrs import frozen
from numpy.typing import NDArray

__all__ = ["TOP", "Distances", "distances", "nmse"]

TOP = 5
"""Tokens of a position whose log-probabilities are compared: the oracle's most probable ones."""

Array = NDArray[np.float32]


def nmse(found: Array, wanted: Array) -> NDArray[np.float64]:
    """Normalised mean squared error of each row: ``|found - wanted|² / |wanted|²``, float64, shape (rows,).

    Rows count by themselves: the first token of a text often has values a thousand times those of the others, which
    would hide them. What is not finite is infinitely wrong, and so is anything where zeros are wanted.
    """
    wide = wanted.astype(np.float64)
    with np.errstate(invalid="ignore", over="ignore"):
        error = np.square(found.astype(np.float64) - wide).sum(-1)
    power = np.square(wide).sum(-1)
    relative = np.divide(error, power, out=np.where(error == 0, 0.0, np.inf), where=power > 0)
    return np.where(np.isfinite(relative), relative, np.inf)


@frozen(eq=False, kw_only=True)
class Distances:
    """How far next-token distributions are apart, at each position.

    Attributes:
        kl: Kullback-Leibler divergence from the oracle's distribution in nats, shape (positions,).
        same_top: whether the most probable token is the same, shape (positions,).
        margin: how much more probable the oracle's first token is than the token chosen instead, as a difference of
            the oracle's log-probabilities; 0 where both agree; shape (positions,).
        top_differences: ``|log p - log p'|`` of the oracle's `TOP` tokens, shape (positions, TOP).

    """

    kl: NDArray[np.float64]
    same_top: NDArray[np.bool_]
    margin: NDArray[np.float64]
    top_differences: NDArray[np.float64]


def distances(found: Array, wanted: Array) -> Distances:
    """Compare logits of shape (positions, vocab_size); `wanted` is the oracle's."""
    sound: NDArray[np.bool_] = np.asarray(np.isfinite(found).all(-1))
    ours, theirs = _log_softmax(np.where(sound[:, None], found, 0)), _log_softmax(wanted)
    rows = np.arange(len(theirs))
    # Gibbs: never negative; rounding may leave -1e-17
    kl = np.maximum((np.exp(theirs) * (theirs - ours)).sum(-1), 0)
    best, chosen = theirs.argmax(-1), ours.argmax(-1)
    top = np.argsort(-theirs, axis=-1, kind="stable")[:, :TOP]
    differences = np.abs(np.take_along_axis(theirs, top, -1) - np.take_along_axis(ours, top, -1))
    margin = theirs[rows, best] - theirs[rows, chosen]
    return Distances(
        kl=np.where(sound, kl, np.inf),
        same_top=(best == chosen) & sound,
        margin=np.where(sound, margin, np.inf),
        top_differences=np.where(sound[:, None], differences, np.inf),
    )


def _log_softmax(logits: NDArray[Any]) -> NDArray[np.float64]:
    shifted = logits.astype(np.float64)
    shifted -= shifted.max(-1, keepdims=True)
    shifted -= np.log(np.exp(shifted).sum(-1, keepdims=True))
    return shifted
