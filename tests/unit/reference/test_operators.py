"""Each operator of the reference executor against the plain formula, in float64, one element at a time."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from mortice.core.model.operators import Activation, NormType
from mortice.plugins.executors.reference import ops
from tests.support.naive_forward import ACTIVATIONS

Array = NDArray[np.float32]


@pytest.fixture
def random() -> np.random.Generator:
    return np.random.default_rng(7)


def normal(random: np.random.Generator, *shape: int) -> Array:
    return random.normal(size=shape).astype(np.float32)


@pytest.mark.parametrize("tokens", [0, 1, 5])
def test_linear_is_the_sum_over_columns(random: np.random.Generator, tokens: int) -> None:
    x, weight = normal(random, tokens, 6), normal(random, 4, 6)
    out = ops.linear(x, weight)
    assert out.shape == (tokens, 4)
    for t in range(tokens):
        for row in range(4):
            wanted = sum(float(x[t, i]) * float(weight[row, i]) for i in range(6))
            assert out[t, row] == pytest.approx(wanted, rel=1e-5, abs=1e-6)


@pytest.mark.parametrize("tokens", [0, 3])
@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize("weights", ["one for all parts", "one for each part"])
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("kind", ["rms", "layer"])
def test_norms(
    random: np.random.Generator, kind: NormType, groups: int, weights: str, biased: bool, tokens: int
) -> None:
    part, eps = 4, 1e-3
    x = normal(random, tokens, groups * part) + 0.5
    size = part if weights == "one for all parts" else groups * part
    weight, bias = normal(random, size), normal(random, size)
    out = ops.normalize(x, kind, eps, groups, weight, bias if biased else None)
    assert out.shape == x.shape
    for t in range(tokens):
        for group in range(groups):
            values = [float(value) for value in x[t, group * part : (group + 1) * part]]
            mean = sum(values) / part if kind == "layer" else 0.0
            variance = sum((value - mean) ** 2 for value in values) / part
            for i, value in enumerate(values):
                place = (group * part + i) % size
                wanted = (value - mean) / math.sqrt(variance + eps) * weight[place] + (bias[place] if biased else 0.0)
                assert out[t, group * part + i] == pytest.approx(wanted, rel=1e-5, abs=1e-6)


@pytest.mark.parametrize("activation", list(ACTIVATIONS))
def test_activations(activation: Activation) -> None:
    x = np.concatenate([np.linspace(-12, 12, 241), [-80.0, 80.0]]).astype(np.float32)[None]
    wanted = [ACTIVATIONS[activation](float(value)) for value in x[0]]
    np.testing.assert_allclose(ops.activate(x, activation)[0], wanted, rtol=3e-6, atol=1e-6)


@pytest.mark.parametrize("activation", ["silu", "gelu_tanh", "gelu_erf"])
def test_activations_saturate_without_a_warning(activation: Activation) -> None:
    x = np.array([[-1e20, -200.0, 200.0, 1e20]], np.float32)
    np.testing.assert_allclose(ops.activate(x, activation), [[0.0, 0.0, 200.0, 1e20]], rtol=1e-6)


def test_activations_leave_their_input_alone(random: np.random.Generator) -> None:
    x = normal(random, 2, 8)
    before = x.copy()
    for activation in ACTIVATIONS:
        ops.activate(x, activation)  # type: ignore[arg-type]  # the names are those of Activation
    np.testing.assert_array_equal(x, before)


def test_softcap_is_a_scaled_tanh() -> None:
    x = np.array([[-300.0, -2.0, 0.0, 0.5, 40.0]], np.float32)
    wanted = [5.0 * math.tanh(value / 5.0) for value in (-300.0, -2.0, 0.0, 0.5, 40.0)]
    np.testing.assert_allclose(ops.softcap(x, 5.0)[0], wanted, rtol=1e-6)


def test_a_position_scale_begins_with_one_and_grows_with_the_logarithm() -> None:
    factors = ops.position_scale(np.array([0, 3, 4, 7, 8, 4000]), 0.5, 4)
    assert factors.dtype == np.float32
    np.testing.assert_allclose(factors, [1, 1, *(1 + 0.5 * math.log(steps) for steps in (2, 2, 3, 1001))], rtol=1e-6)


@pytest.mark.parametrize("pairs", [1, 3, 4])
@pytest.mark.parametrize("style", ["adjacent", "halves"])
def test_rope_turns_pairs_and_leaves_the_rest(random: np.random.Generator, style: str, pairs: int) -> None:
    head_dim, heads, tokens = 8, 2, 3
    x = normal(random, tokens, heads * head_dim)
    angles = random.uniform(-3, 3, (tokens, pairs))
    out = ops.rotate(x, np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32), head_dim, style)
    for t in range(tokens):
        for head in range(heads):
            source = x[t, head * head_dim : (head + 1) * head_dim].astype(np.float64)
            wanted = source.copy()
            for pair in range(pairs):
                i, j = (2 * pair, 2 * pair + 1) if style == "adjacent" else (pair, pair + pairs)
                c, s = math.cos(angles[t, pair]), math.sin(angles[t, pair])
                wanted[i], wanted[j] = source[i] * c - source[j] * s, source[i] * s + source[j] * c
            np.testing.assert_allclose(out[t, head * head_dim : (head + 1) * head_dim], wanted, rtol=1e-5, atol=1e-6)


def plain_attention(
    q: Array, keys: Array, values: Array, start: int, scale: float, cap: float, window: int
) -> NDArray[np.float64]:
    tokens, heads, head_dim = q.shape
    group = heads // len(keys)
    out = np.zeros((tokens, heads, head_dim))
    for t in range(tokens):
        position = start + t
        first = max(0, position - window + 1) if window else 0
        for head in range(heads):
            kv = head // group
            scores = []
            for seen in range(first, position + 1):
                score = scale * sum(float(a) * float(b) for a, b in zip(q[t, head], keys[kv, seen], strict=True))
                scores.append(cap * math.tanh(score / cap) if cap else score)
            weights = [math.exp(score - max(scores)) for score in scores]
            for offset, weight in enumerate(weights):
                out[t, head] += weight / sum(weights) * values[kv, first + offset]
    return out.reshape(tokens, -1)


@pytest.mark.parametrize("score_elements", [1, 30, 1 << 22])
@pytest.mark.parametrize("cap", [0.0, 1.5])
@pytest.mark.parametrize("window", [0, 1, 3, 100])
@pytest.mark.parametrize(("start", "tokens"), [(0, 1), (0, 6), (5, 1), (5, 4)])
def test_attention(
    random: np.random.Generator,
    monkeypatch: pytest.MonkeyPatch,
    start: int,
    tokens: int,
    window: int,
    cap: float,
    score_elements: int,
) -> None:
    """Blocks of one row, of a few and of all rows see the same."""
    monkeypatch.setattr(ops, "SCORE_ELEMENTS", score_elements)
    q = normal(random, tokens, 4, 3)
    keys, values = normal(random, 2, start + tokens, 3), normal(random, 2, start + tokens, 3)
    arguments: dict[str, Any] = {"start": start, "scale": 0.7, "cap": cap, "window": window}
    out = ops.attend(q, keys, values, **arguments)
    np.testing.assert_allclose(out, plain_attention(q, keys, values, **arguments), rtol=1e-5, atol=1e-6)


def test_attention_survives_scores_that_exp_alone_would_not() -> None:
    q, keys = np.full((1, 1, 2), 300.0, np.float32), np.full((1, 3, 2), 300.0, np.float32)
    values = np.arange(6, dtype=np.float32).reshape(1, 3, 2)
    out = ops.attend(q, keys, values, start=2, scale=1.0, cap=0.0, window=0)
    np.testing.assert_allclose(out, [[2.0, 3.0]])
