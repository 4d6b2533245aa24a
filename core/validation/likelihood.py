"""What a file does not say, asked of its weights: each reading of it runs, and the one that expects plain text wins.

A wrong style of RoPE or a wrong activation makes a trained model expect nothing in particular. Where readings do not
differ clearly, and for weights that were never trained, nothing is decided.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import get_args

import numpy as np
from attrs import evolve

from mortice.arch_contracts.vocabulary import Contract
from mortice.arch_contracts.writing import contract_text
from mortice.core.config import ExecutorConfig, ModelConfig, RunConfig
from mortice.core.contracts.derive import Draft
from mortice.core.errors import UnsupportedError
from mortice.core.model.operators import Activation
from mortice.core.pipeline import prepare
from mortice.core.plugin.registry import Registry

__all__ = ["CHOICES", "measure_draft"]

CHOICES: Mapping[str, tuple[str, ...]] = {
    "rope.style": ("adjacent", "halves"),
    "ffn.activation": get_args(Activation),
}  # the usual first
"""What can be measured, with the readings there are."""

CLEAR = 0.2
"""Nats a token between the best reading and the best with another value, from which on the value counts as known."""

_BETTER_THAN_CHANCE = 2.0
"""Nats a token that the best reading has to stay below a uniform guess."""

_TOKENS = 96
_TEXT = (
    "The harbour was quiet in the early morning. Two fishing boats had come in during the night, and the men were "
    "still unloading boxes of mackerel onto the quay. A woman with a notebook counted the boxes, wrote down the "
    "number, and asked how long the journey had taken. Nine hours, said the older man, because of the wind from the "
    "north. She thanked him and walked back to her office, where the telephone had been ringing for some time."
)


Values = tuple[tuple[str, str], ...]
"""A reading: keys with their values."""


def measure_draft(draft: Draft, path: Path, registry: Registry, tell: Callable[[str], None] | None = None) -> Draft:
    """Fill in what the weights answer clearly.

    The reference executor runs a short English text for one reading after the other: from the best so far, each value
    of one key, until nothing gets better.

    Args:
        draft: with nothing open but keys of `CHOICES`.
        path: the model it was derived from, with a tokenizer.
        registry: the plugins.
        tell: told the result of each reading.

    Returns:
        The draft with fewer unknown keys; notes and reasons say what was measured.

    Raises:
        UnsupportedError: when something else is open.

    """
    others = sorted(draft.unknown.keys() - CHOICES.keys())
    if others:
        raise UnsupportedError(f"{path}: {', '.join(others)} cannot be measured; fill in these first, or use --like")
    keys = [key for key in CHOICES if key in draft.unknown]
    measured: dict[Values, float] = {}
    chance = 0.0

    def nats(values: Values) -> float:
        nonlocal chance
        if values not in measured:
            measured[values], chance = _nats(_with(draft.contract, dict(values)), path, registry)
            if tell is not None:
                tell(f"{', '.join(value for _, value in values)}: {measured[values]:.2f} nats a token")
        return measured[values]

    best = _search({key: CHOICES[key] for key in keys}, nats)
    if keys and measured[best] > chance - _BETTER_THAN_CHANCE:
        reason = f"measured, but the best reading has {measured[best]:.2f} nats a token, little better than chance"
        return evolve(draft, unknown={key: f"{text}; {reason}" for key, text in draft.unknown.items()})
    return _decided(draft, dict(_verdicts(measured, best)), dict(best))


def _search(choices: Mapping[str, tuple[str, ...]], nats: Callable[[Values], float]) -> Values:
    """The best reading when no change of one value makes it better."""
    best: Values = tuple((key, values[0]) for key, values in choices.items())
    moved = True
    while moved:
        before = best
        for key, values in choices.items():
            alike = [tuple((k, value if k == key else v) for k, v in best) for value in values]
            best = min(alike, key=nats)
        moved = best != before
    return best


def _verdicts(measured: Mapping[Values, float], best: Values) -> Iterator[tuple[str, tuple[bool, str]]]:
    """For each key whether its value is clear, and the words for it."""
    for pair in best:
        key = pair[0]
        rival = min((values for values in measured if pair not in values), key=lambda values: measured[values])
        words = f"{measured[best]:.2f} nats a token, {measured[rival]:.2f} with {dict(rival)[key]}"
        yield key, (measured[rival] - measured[best] >= CLEAR, f"measured: {words}")


def _decided(draft: Draft, verdicts: Mapping[str, tuple[bool, str]], values: Mapping[str, str]) -> Draft:
    clear = {key: words for key, (is_clear, words) in verdicts.items() if is_clear}
    still = {
        key: f"{reason}; {verdicts[key][1]}, no clear difference"
        for key, reason in draft.unknown.items()
        if key not in clear
    }
    contract = _with(draft.contract, {key: values[key] for key in clear})
    return evolve(draft, contract=contract, unknown=still, notes={**draft.notes, **clear})


def _with(contract: Contract, values: Mapping[str, str]) -> Contract:
    for key, value in values.items():
        section, _, attribute = key.partition(".")
        contract = evolve(contract, **{section: evolve(getattr(contract, section), **{attribute: value})})
    return contract


def _nats(contract: Contract, path: Path, registry: Registry) -> tuple[float, float]:
    """Mean negative log-likelihood of the text's tokens, and that of a uniform guess."""
    with tempfile.TemporaryDirectory(prefix="mortice-") as folder:
        file = Path(folder) / "reading.toml"
        file.write_text(contract_text(contract), encoding="utf-8")
        config = RunConfig(model=ModelConfig(path=path, contract=file), executor=ExecutorConfig(name="reference"))
        with prepare(config, registry) as pipeline:
            ids = pipeline.encode(_TEXT)[: min(_TOKENS, pipeline.program.context_length)]
            logits = pipeline.logits(ids)[:-1].astype(np.float64)
    logits -= logits.max(axis=1, keepdims=True)
    of_next = logits[np.arange(len(logits)), ids[1:]] - np.log(np.exp(logits).sum(axis=1))
    return float(-of_next.mean()), float(np.log(logits.shape[1]))
