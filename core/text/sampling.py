"""From a row of logits to a token: bias, penalties, temperature, top-k, top-p, min-p, and a seeded draw.

The algorithm is written so that another executor can repeat it. In this order, on float32 logits ``l``:

1. **bias**: ``l[i] = l[i] + logit_bias[i]``; minus infinity bans a token.
2. **penalties**, for every token ``i`` found ``n > 0`` times among the last `penalty_window` tokens, prompt
   included: ``l[i] = l[i] / repetition_penalty`` where ``l[i] > 0``, else ``l[i] * repetition_penalty``; then
   ``l[i] = l[i] - (n * frequency_penalty + presence_penalty)``. The formulae, their order and the shared
   window are llama.cpp's (`llama_sampler_penalties`); the first is from CTRL (Keskar et al., 2019). Every
   operation rounds to float32 by itself: no fused multiply-add.
3. **rank**: tokens in order of falling ``l``; among equals the lower id comes first.
   With ``temperature = 0`` the first token is the answer (greedy), whatever the filters say, since none drops
   it.
4. **temperature**: ``z[i] = (l[i] - l[first]) / temperature`` in float32; the weight is ``w[i] = exp(z[i])``.
5. **top-k**: the first `top_k` tokens stay. ``total`` is the sum of their weights.
6. **top-p** (Holtzman et al., 2019): the shortest prefix whose weight reaches ``top_p * total`` stays.
7. **min-p** (Nguyen et al., 2024): tokens with ``z[i] >= log(min_p)`` stay, that is those whose probability
   is at least `min_p` times that of the first token. It too keeps a prefix, so 6 and 7 could be swapped.
8. **draw**: with ``u = uniform(seed, step)`` and ``kept`` the weight of what stays, the answer is the first
   token in rank order at which the running sum of weights reaches ``u * kept``.

The order temperature, top-k, top-p, min-p is that of Hugging Face transformers (`GenerationMixin`); in
llama.cpp's default chain the temperature comes last, so that there `top_p` cuts the distribution as it is at
temperature 1. Weights are float32, sums of weights and their comparisons float64.

The random number is counter-based: it depends on the seed and on the step (0 for the first token generated),
not on how many numbers were drawn before. See `uniform`.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable

import numpy as np
from attrs import frozen
from numpy.typing import NDArray

from mortice.core.errors import ConfigError, ExecutionError, TokenizerError
from mortice.core.text.params import SamplingParams

__all__ = ["Sampled", "Sampler", "SamplingParams", "philox4x32", "uniform"]


@frozen(kw_only=True)
class Sampled:
    """A token and what the model thought of it.

    Log-probabilities are natural logarithms of the softmax of the model's raw logits: before bias, penalties,
    temperature and filters. So they do not depend on how the token was chosen.

    Attributes:
        id: the token chosen.
        logprob: its log-probability.
        top: the most likely tokens as (id, log-probability), best first, equals by lower id.

    """

    id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


class Sampler:
    """Chooses one token after the other for one sequence.

    `sample` changes nothing; `accept` tells the sampler which tokens the sequence has, prompt first. Asking
    twice for the same step therefore gives the same answer.

    Args:
        params: how to choose.
        vocab_size: length of a row of logits.
        top_logprobs: how many of the most likely tokens `Sampled.top` lists.

    Raises:
        ConfigError: a biased token id, or `top_logprobs`, lies outside the vocabulary.

    """

    def __init__(self, params: SamplingParams, vocab_size: int, *, top_logprobs: int = 0) -> None:
        beyond = [token for token in params.logit_bias if token >= vocab_size]
        if beyond:
            raise ConfigError(f"logit_bias: found token id {min(beyond)}, wanted one below {vocab_size}")
        if not 0 <= top_logprobs <= vocab_size:
            raise ConfigError(f"logprobs: found {top_logprobs}, wanted 0 to {vocab_size}, the vocabulary's size")
        self._params = params.seeded()
        self._vocab_size = vocab_size
        self._top_logprobs = top_logprobs
        self._bias_ids = np.array(list(params.logit_bias), dtype=np.intp)
        self._bias = np.array(list(params.logit_bias.values()), dtype=np.float32)
        self._seen = _SeenTokens(vocab_size, params.penalty_window) if params.penalises else None

    @property
    def params(self) -> SamplingParams:
        """The parameters in force, the seed among them."""
        return self._params

    @property
    def seed(self) -> int:
        """The seed in force: the one given, or the one drawn where none was."""
        assert self._params.seed is not None
        return self._params.seed

    def accept(self, ids: Iterable[int]) -> None:
        """Append tokens to the sequence that the penalties look at.

        Raises:
            TokenizerError: an id lies outside the vocabulary; nothing has been appended.

        """
        ids = list(ids)
        for token in ids:
            if not 0 <= token < self._vocab_size:
                raise TokenizerError(f"token id {token}: outside the vocabulary of {self._vocab_size} tokens")
        if self._seen is not None:
            self._seen.extend(ids)

    def sample(self, logits: NDArray[np.float32], step: int) -> Sampled:
        """Choose a token.

        Args:
            logits: ``float32``, shape (vocab_size,), the model's raw logits; not changed.
            step: how many tokens were generated before; with the seed it settles the random number.

        Raises:
            ExecutionError: the logits have another shape or type, hold NaN or plus infinity, or leave no
            token that may be chosen.

        """
        peak, log_total = self._read(logits, step)
        adjusted = self._adjust(logits)
        token = int(adjusted.argmax())
        if not np.isfinite(adjusted[token]):
            raise ExecutionError(f"step {step}: logit_bias and penalties leave no best token with a finite logit")
        if not self._params.greedy:
            token = _draw(adjusted, adjusted[token], self._params, uniform(self.seed, step))
        top = _best_ids(logits, self._top_logprobs).tolist()
        return Sampled(
            id=token,
            logprob=float(logits[token]) - peak - log_total,
            top=tuple((other, float(logits[other]) - peak - log_total) for other in top),
        )

    def _read(self, logits: NDArray[np.float32], step: int) -> tuple[float, float]:
        """Check the raw logits; return their maximum and the logarithm of the sum of exp(logit - maximum)."""
        if logits.shape != (self._vocab_size,) or logits.dtype != np.float32:
            raise ExecutionError(
                f"step {step}: logits are {logits.dtype} {logits.shape}, wanted float32 ({self._vocab_size},)"
            )
        peak = logits.max()  # NaN where any logit is NaN
        if not np.isfinite(peak):
            found = "NaN" if np.isnan(peak) else "plus infinity" if peak > 0 else "nothing but minus infinity"
            raise ExecutionError(f"step {step}: the logits hold {found}, wanted numbers")
        with np.errstate(over="ignore"):  # a spread beyond float32 makes a weight of 0, as it should
            weights = logits - peak
        np.exp(weights, out=weights)
        return float(peak), math.log(weights.sum(dtype=np.float64))

    def _adjust(self, logits: NDArray[np.float32]) -> NDArray[np.float32]:
        """Logits with bias and penalties; the array given where there are none, else a copy."""
        if self._seen is None and not self._bias_ids.size:
            return logits
        adjusted = logits.copy()
        adjusted[self._bias_ids] += self._bias
        if self._seen is None:
            return adjusted
        params = self._params
        ids, counts = self._seen.distinct()
        values = adjusted[ids]
        with np.errstate(over="ignore"):  # plus infinity would be the best token, which `sample` refuses
            repetition = np.float32(params.repetition_penalty)
            values = np.where(values > 0, values / repetition, values * repetition)
            values -= counts * np.float32(params.frequency_penalty) + np.float32(params.presence_penalty)
        adjusted[ids] = values
        return adjusted


class _SeenTokens:
    """How often each token occurs among the latest `window` tokens (0: among all), kept up step by step."""

    def __init__(self, vocab_size: int, window: int) -> None:
        self._counts = np.zeros(vocab_size, dtype=np.int32)
        self._present = np.zeros(vocab_size, dtype=np.bool_)  # NumPy finds set booleans ten times as fast
        self._latest: deque[int] | None = deque(maxlen=window) if window else None

    def extend(self, ids: Iterable[int]) -> None:
        for token in ids:
            if self._latest is not None:
                if len(self._latest) == self._latest.maxlen:
                    oldest = self._latest[0]
                    self._counts[oldest] -= 1
                    self._present[oldest] = self._counts[oldest] > 0
                self._latest.append(token)
            self._counts[token] += 1
            self._present[token] = True

    def distinct(self) -> tuple[NDArray[np.intp], NDArray[np.float32]]:
        """The ids present, rising, and their counts."""
        ids = np.flatnonzero(self._present)
        return ids, self._counts[ids].astype(np.float32)


def _best_ids(values: NDArray[np.float32], count: int) -> NDArray[np.intp]:
    """Ids of the `count` largest values, largest first, equals by lower id."""
    if not count:
        return np.empty(0, dtype=np.intp)
    bound = np.partition(values, values.size - count)[values.size - count]
    ids = np.flatnonzero(values >= bound)
    return ids[np.argsort(-values[ids], kind="stable")][:count]


def _draw(adjusted: NDArray[np.float32], peak: np.float32, params: SamplingParams, u: float) -> int:
    """Steps 4 to 8 of the module's description; `peak` is the largest of the adjusted logits.

    Only values are sorted, which costs a fraction of sorting ids; the id is looked up at the end. Values that
    lie past the nucleus, or, where nothing is cut, past the answer, are dropped before the sort.
    """
    values = adjusted
    if 0 < params.top_k < values.size:
        values = np.partition(values, values.size - params.top_k)[values.size - params.top_k :]
    uncut = params.top_p == 1 and params.min_p == 0
    share, reach = (u if uncut else params.top_p), math.inf
    if share < 1:
        weights = _weights(values, peak, params)
        total = float(weights.sum(dtype=np.float64))
        reach = share * total
        # Tokens below (1 - share) * total / size weigh less than (1 - share) * total together, so they come
        # after the one that completes `reach`. Half of that leaves room for rounding.
        values = values[weights >= 0.5 * (1 - share) * total / values.size]
    if params.min_p > 0:
        values = values[_shifted(values, peak, params) >= np.float32(math.log(params.min_p))]

    ranked = np.sort(values)[::-1]
    running = np.cumsum(_weights(ranked, peak, params), dtype=np.float64)
    last = min(int(np.searchsorted(running, reach)), ranked.size - 1)
    rank = last if uncut else int(np.searchsorted(running, u * running[last]))

    same = np.flatnonzero(adjusted == ranked[rank])
    first = ranked.size - int(np.searchsorted(ranked[::-1], ranked[rank], side="right"))
    return int(same[rank - first])


def _shifted(values: NDArray[np.float32], peak: np.float32, params: SamplingParams) -> NDArray[np.float32]:
    with np.errstate(over="ignore"):  # minus infinity, and so a weight of 0, is right
        z = values - peak
        z /= np.float32(params.temperature)
    return z


def _weights(values: NDArray[np.float32], peak: np.float32, params: SamplingParams) -> NDArray[np.float32]:
    z = _shifted(values, peak, params)
    return np.exp(z, out=z)


def uniform(seed: int, step: int) -> float:
    """A number in (0, 1), evenly distributed, that depends on nothing but its arguments.

    It is ``(x + 0.5) / 2**32`` in float64 for the first word ``x`` of ``philox4x32(counter, key)`` with

    - key = (low 32 bits of the seed, high 32 bits),
    - counter = (low 32 bits of the step, high 32 bits, 0, 0).

    cuRAND gives the same word: ``curand_init(seed, 0, 4 * step, &state)`` for a Philox4_32_10 state, then
    ``curand``.
    """
    mask = 0xFFFFFFFF
    words = philox4x32((step & mask, step >> 32 & mask, 0, 0), (seed & mask, seed >> 32 & mask))
    return (words[0] + 0.5) / 2.0**32


def philox4x32(counter: tuple[int, int, int, int], key: tuple[int, int]) -> tuple[int, int, int, int]:
    """Philox4x32-10, the counter-based generator of Salmon et al., "Parallel random numbers" (2011).

    All words are unsigned 32-bit integers.
    """
    mask = 0xFFFFFFFF
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        product0, product1 = 0xD2511F53 * c0, 0xCD9E8D57 * c2
        c0, c1, c2, c3 = (
            (product1 >> 32) ^ c1 ^ k0,
            product1 & mask,
            (product0 >> 32) ^ c3 ^ k1,
            product0 & mask,
        )
        k0, k1 = (k0 + 0x9E3779B9) & mask, (k1 + 0xBB67AE85) & mask
    return c0, c1, c2, c3
