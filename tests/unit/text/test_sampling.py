"""`Sampler` against a slow, direct reading of the algorithm that `mortice.core.text.sampling` documents."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from mortice.core.errors import ConfigError, ExecutionError, TokenizerError
from mortice.core.text.params import SamplingParams
from mortice.core.text.sampling import Sampler, philox4x32, uniform

Logits = NDArray[np.float32]


def reference_adjusted(logits: Logits, params: SamplingParams, history: Sequence[int]) -> list[np.float32]:
    """Bias and penalties, one float32 scalar at a time, counts taken from the whole history."""
    adjusted = list(logits)
    for token, bias in params.logit_bias.items():
        adjusted[token] = adjusted[token] + np.float32(bias)
    window = history[-params.penalty_window :] if params.penalty_window else history
    for token, count in Counter(window).items():
        value, repetition = adjusted[token], np.float32(params.repetition_penalty)
        value = value / repetition if value > 0 else value * repetition
        subtracted = np.float32(count) * np.float32(params.frequency_penalty) + np.float32(params.presence_penalty)
        adjusted[token] = value - subtracted
    return adjusted


def reference_ranking(adjusted: Sequence[np.float32]) -> list[int]:
    return sorted(range(len(adjusted)), key=lambda token: (-adjusted[token], token))


def reference_rank(adjusted: Sequence[np.float32], params: SamplingParams, u: float, slack: float = 0.0) -> int:
    """The rank of the token drawn; `slack` moves every comparison of sums by that share."""
    ranking = reference_ranking(adjusted)
    if params.top_k:
        ranking = ranking[: params.top_k]
    best = adjusted[ranking[0]]
    z = [float((adjusted[token] - best) / np.float32(params.temperature)) for token in ranking]
    weights = [math.exp(value) for value in z]
    sums = [math.fsum(weights[: index + 1]) for index in range(len(weights))]
    kept = len(ranking)
    if params.top_p < 1:
        nucleus = params.top_p * sums[-1] * (1 + slack)
        kept = next((index + 1 for index, running in enumerate(sums) if running >= nucleus), kept)
    if params.min_p:
        kept = min(kept, len([value for value in z if value >= np.float32(math.log(params.min_p))]))
    target = u * sums[kept - 1] * (1 + slack)
    return next((index for index, running in enumerate(sums[:kept]) if running >= target), kept - 1)


logit_rows = st.lists(st.floats(-30, 30, width=32), min_size=2, max_size=40).map(
    lambda row: np.array(row, dtype=np.float32)
)
tied_rows = st.lists(st.sampled_from([-2.0, 0.0, 0.5, 3.0]), min_size=2, max_size=40).map(
    lambda row: np.array(row, dtype=np.float32)
)
off_or: dict[str, st.SearchStrategy[Any]] = {
    "top_k": st.integers(0, 50),
    "top_p": st.just(1.0) | st.floats(0.01, 1.0),
    "min_p": st.just(0.0) | st.floats(0.001, 1.0),
    "repetition_penalty": st.just(1.0) | st.floats(0.5, 2.0),
    "presence_penalty": st.just(0.0) | st.floats(-2.0, 2.0),
    "frequency_penalty": st.just(0.0) | st.floats(-2.0, 2.0),
    "penalty_window": st.integers(0, 6),
    "seed": st.integers(0, 2**64 - 1),
}


@st.composite
def situations(draw: st.DrawFn, temperature: st.SearchStrategy[float]) -> tuple[Logits, SamplingParams, list[int]]:
    logits = draw(logit_rows | tied_rows)
    tokens = st.integers(0, logits.size - 1)
    params = SamplingParams(
        temperature=draw(temperature),
        logit_bias=draw(st.dictionaries(tokens, st.floats(-5, 5), max_size=3)),
        **{name: draw(values) for name, values in off_or.items()},
    )
    return logits, params, draw(st.lists(tokens, max_size=12))


@given(situations(temperature=st.just(0.0)))
def test_greedy_takes_the_first_of_the_best_after_bias_and_penalties(
    situation: tuple[Logits, SamplingParams, list[int]],
) -> None:
    logits, params, history = situation
    sampler = Sampler(params, logits.size)
    sampler.accept(history)
    expected = reference_ranking(reference_adjusted(logits, params, history))[0]
    assert sampler.sample(logits, 0).id == expected


@settings(max_examples=400)
@given(situations(temperature=st.floats(0.05, 5.0)), st.integers(0, 1000))
def test_a_draw_agrees_with_the_direct_reading_of_the_algorithm(
    situation: tuple[Logits, SamplingParams, list[int]], step: int
) -> None:
    logits, params, history = situation
    sampler = Sampler(params, logits.size)
    sampler.accept(history)
    adjusted = reference_adjusted(logits, params, history)
    u = uniform(sampler.seed, step)
    # float32 weights may move a sum by a millionth part: the answer lies between those with sums moved
    lowest, highest = (reference_rank(adjusted, params, u, slack) for slack in (-2e-6, 2e-6))
    rank = reference_ranking(adjusted).index(sampler.sample(logits, step).id)
    assert lowest <= rank <= highest


@given(logit_rows | tied_rows, st.integers(0, 40))
def test_logprobs_are_the_log_softmax_of_the_raw_logits(logits: Logits, top: int) -> None:
    top = min(top, logits.size)
    params = SamplingParams(temperature=2.0, repetition_penalty=3.0, logit_bias={0: 4.0}, seed=5)
    sampler = Sampler(params, logits.size, top_logprobs=top)
    sampler.accept([1])
    sampled = sampler.sample(logits, 3)
    peak = float(logits.max())
    log_total = math.log(math.fsum(math.exp(float(value) - peak) for value in logits))
    expected = [float(value) - peak - log_total for value in logits]
    assert sampled.logprob == pytest.approx(expected[sampled.id], abs=1e-6)
    assert [token for token, _ in sampled.top] == reference_ranking(list(logits))[:top]
    assert [logprob for _, logprob in sampled.top] == pytest.approx(
        [expected[token] for token, _ in sampled.top], abs=1e-6
    )


@given(st.lists(st.lists(st.integers(0, 9), max_size=6), max_size=8), st.integers(0, 7))
def test_counts_kept_step_by_step_equal_counts_of_the_whole_history(batches: list[list[int]], window: int) -> None:
    params = SamplingParams(repetition_penalty=1.3, frequency_penalty=0.7, presence_penalty=0.2, penalty_window=window)
    logits = np.linspace(-1, 1, 10, dtype=np.float32)
    sampler, history = Sampler(params, 10), []
    for batch in batches:
        sampler.accept(batch)
        history += batch
        assert sampler._adjust(logits).tolist() == reference_adjusted(logits, params, history)


def test_draws_follow_the_distribution() -> None:
    logits = np.array([1.0, 0.0, 2.0, -1.0, 0.0, 1.5], dtype=np.float32)
    sampler = Sampler(SamplingParams(temperature=1.5, seed=1234), logits.size)
    draws = 20_000
    counts = np.bincount([sampler.sample(logits, step).id for step in range(draws)], minlength=logits.size)
    expected = np.exp(logits / 1.5) / np.exp(logits / 1.5).sum() * draws
    chi_square = float(((counts - expected) ** 2 / expected).sum())
    assert chi_square < 20.5  # the 0.999 quantile with 5 degrees of freedom; the seed is fixed, so it cannot flake


def test_filtered_draws_follow_the_renormalised_distribution() -> None:
    probabilities = np.array([0.05, 0.4, 0.1, 0.25, 0.2])
    logits = np.log(probabilities).astype(np.float32)
    sampler = Sampler(SamplingParams(temperature=1.0, top_k=4, top_p=0.8, seed=99), logits.size)
    draws = 20_000
    counts = np.bincount([sampler.sample(logits, step).id for step in range(draws)], minlength=logits.size)
    kept = np.array([1, 3, 4])  # 0.4 + 0.25 of 0.95 is 0.68, with 0.2 it is 0.89
    expected = probabilities[kept] / probabilities[kept].sum() * draws
    assert counts.sum() == counts[kept].sum()
    assert float(((counts[kept] - expected) ** 2 / expected).sum()) < 13.8  # 0.999, 2 degrees of freedom


def test_a_large_vocabulary_gives_the_same_draws_as_a_full_sort() -> None:
    rng = np.random.default_rng(7)
    logits = np.round(rng.standard_normal(50_000) * 3, 1).astype(np.float32)  # rounded, so that many are equal
    order = np.lexsort((np.arange(logits.size), -logits))
    running = np.cumsum(np.exp((logits[order] - logits.max()) / np.float32(0.7)), dtype=np.float64)
    for top_p in (1.0, 0.9):
        kept = int(np.searchsorted(running, top_p * running[-1])) + 1 if top_p < 1 else running.size
        sampler = Sampler(SamplingParams(temperature=0.7, top_p=top_p, seed=3), logits.size)
        for step in range(40):
            target = uniform(3, step) * running[kept - 1]
            assert sampler.sample(logits, step).id == order[int(np.searchsorted(running, target))]


def test_a_draw_depends_on_seed_and_step_and_not_on_earlier_draws() -> None:
    logits = np.zeros(1000, dtype=np.float32)
    params = SamplingParams(temperature=1.0, seed=42)
    in_order = [Sampler(params, 1000).sample(logits, step).id for step in range(20)]
    sampler = Sampler(params, 1000)
    backwards = [sampler.sample(logits, step).id for step in reversed(range(20))]
    assert in_order == backwards[::-1]
    assert len(set(in_order)) > 10
    other = Sampler(SamplingParams(temperature=1.0, seed=43), 1000)
    assert [other.sample(logits, step).id for step in range(20)] != in_order


def test_no_seed_draws_a_fresh_one_that_repeats_the_run() -> None:
    logits = np.zeros(1000, dtype=np.float32)
    first, second = (Sampler(SamplingParams(temperature=1.0), 1000) for _ in range(2))
    assert first.seed != second.seed
    assert 0 <= first.seed < 2**53
    again = Sampler(SamplingParams(temperature=1.0, seed=first.seed), 1000)
    assert [first.sample(logits, s).id for s in range(9)] == [again.sample(logits, s).id for s in range(9)]


def test_seeded_fills_in_a_seed_only_where_there_is_none() -> None:
    given_seed = SamplingParams(seed=0)
    assert given_seed.seeded() is given_seed
    drawn = SamplingParams(top_k=3).seeded()
    assert drawn.seed is not None
    assert drawn.top_k == 3


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_philox_gives_the_known_answers_of_random123(
    counter: tuple[int, int, int, int], key: tuple[int, int], expected: tuple[int, int, int, int]
) -> None:
    assert philox4x32(counter, key) == expected


def test_uniform_uses_all_bits_of_seed_and_step() -> None:
    numbers = {uniform(seed, step) for seed in (0, 1, 1 << 32, 1 << 63) for step in (0, 1, 1 << 32, 1 << 63)}
    assert len(numbers) == 16
    assert all(0 < number < 1 for number in numbers)


def test_a_bias_of_minus_infinity_bans_a_token() -> None:
    logits = np.array([5.0, 1.0, 0.0], dtype=np.float32)
    for temperature in (0.0, 1.0):
        sampler = Sampler(SamplingParams(temperature=temperature, logit_bias={0: -math.inf}, seed=1), 3)
        assert all(sampler.sample(logits, step).id != 0 for step in range(50))
        assert sampler.sample(logits, 0).logprob < -3  # the model's own opinion, before the ban


def test_banning_every_token_is_an_error() -> None:
    sampler = Sampler(SamplingParams(logit_bias={0: -math.inf, 1: -math.inf}, temperature=1.0), 2)
    with pytest.raises(ExecutionError, match="logit_bias and penalties leave no best token"):
        sampler.sample(np.zeros(2, dtype=np.float32), 0)


def test_a_token_whose_logit_is_minus_infinity_is_never_drawn() -> None:
    logits = np.array([-np.inf, 0.0, -np.inf, 0.0], dtype=np.float32)
    sampler = Sampler(SamplingParams(temperature=5.0, seed=1), 4, top_logprobs=4)
    assert {sampler.sample(logits, step).id for step in range(50)} == {1, 3}
    assert sampler.sample(logits, 0).top[2:] == ((0, -math.inf), (2, -math.inf))


def test_extreme_temperatures_neither_warn_nor_leave_the_best_or_the_even_choice() -> None:
    logits = np.array([3e38, -3e38, 1.0, 0.0], dtype=np.float32)
    cold = Sampler(SamplingParams(temperature=1e-6, seed=1), 4)
    assert {cold.sample(logits, step).id for step in range(20)} == {0}
    hot = Sampler(SamplingParams(temperature=1e6, seed=1), 4)
    assert {hot.sample(logits[[2, 3, 2, 3]], step).id for step in range(50)} == {0, 1, 2, 3}


@pytest.mark.parametrize(
    ("logits", "message"),
    [
        ([0.0, math.nan, 1.0], "step 4: the logits hold NaN"),
        ([-math.inf] * 3, "step 4: the logits hold nothing but minus infinity"),
        ([0.0, math.inf, 1.0], "step 4: the logits hold plus infinity"),
        ([0.0, 1.0], r"step 4: logits are float32 \(2,\), wanted float32 \(3,\)"),
    ],
)
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_that_are_no_distribution_are_an_error(logits: list[float], message: str, temperature: float) -> None:
    sampler = Sampler(SamplingParams(temperature=temperature), 3)
    with pytest.raises(ExecutionError, match=message):
        sampler.sample(np.array(logits, dtype=np.float32), 4)


def test_logits_of_another_type_are_an_error() -> None:
    with pytest.raises(ExecutionError, match=r"logits are float64 \(3,\), wanted float32"):
        Sampler(SamplingParams(), 3).sample(np.zeros(3), 0)  # type: ignore[arg-type]


def test_the_logits_handed_in_are_not_changed() -> None:
    logits = np.linspace(-2, 2, 50, dtype=np.float32)
    before = logits.copy()
    params = SamplingParams(
        temperature=0.7, top_k=9, top_p=0.9, min_p=0.01, repetition_penalty=1.5, logit_bias={3: 1.0}, seed=2
    )
    sampler = Sampler(params, 50, top_logprobs=5)
    sampler.accept([1, 2, 3])
    sampler.sample(logits, 0)
    assert np.array_equal(logits, before)


def test_a_token_outside_the_vocabulary_cannot_be_accepted() -> None:
    sampler = Sampler(SamplingParams(presence_penalty=1.0), 4)
    with pytest.raises(TokenizerError, match="token id 4: outside the vocabulary of 4 tokens"):
        sampler.accept([1, 4])
    with pytest.raises(TokenizerError, match="token id -1"):
        sampler.accept([-1])
    assert sampler.sample(np.array([0.0, 0.5, 0.0, 0.0], dtype=np.float32), 0).id == 1  # nothing was counted


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": -0.1}, "temperature: found -0.1, wanted 0"),
        ({"temperature": math.nan}, "temperature: found nan"),
        ({"temperature": math.inf}, "temperature: found inf"),
        ({"temperature": 1e-9}, "temperature: found 1e-09"),
        ({"temperature": "hot"}, "temperature: found 'hot'"),
        ({"temperature": True}, "temperature: found True"),
        ({"top_k": -1}, "top_k: found -1, wanted an integer >= 0"),
        ({"top_k": 1.5}, "top_k: found 1.5"),
        ({"top_k": False}, "top_k: found False"),
        ({"top_p": 0.0}, "top_p: found 0.0, wanted a number above 0"),
        ({"top_p": 1.1}, "top_p: found 1.1"),
        ({"min_p": -0.1}, "min_p: found -0.1, wanted a number from 0 to 1"),
        ({"min_p": 2}, "min_p: found 2"),
        ({"repetition_penalty": 0.0}, "repetition_penalty: found 0.0"),
        ({"presence_penalty": math.nan}, "presence_penalty: found nan"),
        ({"frequency_penalty": math.inf}, "frequency_penalty: found inf"),
        ({"penalty_window": -1}, "penalty_window: found -1"),
        ({"seed": -1}, "seed: found -1, wanted an integer from 0"),
        ({"seed": 2**64}, "seed: found 18446744073709551616"),
        ({"seed": 1.0}, "seed: found 1.0"),
        ({"logit_bias": [1]}, r"logit_bias: found \[1\], wanted a mapping"),
        ({"logit_bias": {"7": 1.0}}, "logit_bias: found token id '7'"),
        ({"logit_bias": {-1: 1.0}}, "logit_bias: found token id -1"),
        ({"logit_bias": {7: math.inf}}, "logit_bias: found inf for token 7"),
        ({"logit_bias": {7: math.nan}}, "logit_bias: found nan for token 7"),
    ],
)
def test_a_bad_parameter_is_refused_by_name(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        SamplingParams(**options)


def test_a_bias_or_logprobs_beyond_the_vocabulary_is_refused() -> None:
    with pytest.raises(ConfigError, match="logit_bias: found token id 10, wanted one below 10"):
        Sampler(SamplingParams(logit_bias={10: 1.0}), 10)
    with pytest.raises(ConfigError, match="logprobs: found 11, wanted 0 to 10"):
        Sampler(SamplingParams(), 10, top_logprobs=11)


def test_changing_the_callers_bias_mapping_later_changes_nothing() -> None:
    bias = {1: 2.0}
    params = SamplingParams(logit_bias=bias)
    bias[1] = 100.0
    assert params.logit_bias == {1: 2.0}
