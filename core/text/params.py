"""What a user may ask of sampling and generation, checked when it is said."""

from __future__ import annotations

import math
import secrets
from collections.abc import Mapping
from typing import Any

from attrs import Attribute, evolve, field, frozen

from mortice.core.errors import ConfigError

__all__ = ["GenerationParams", "SamplingParams"]

_LIMIT = 1e6
"""Largest magnitude of a temperature, penalty or finite bias: float32 arithmetic on logits stays finite."""

_SEEDS = 2**64
_DRAWN_SEED_BITS = 53
"""A seed drawn by the program fits a double, so that a record in JSON keeps it exactly whatever reads it."""


def _number(low: float, high: float, wanted: str, *, or_zero: bool = False) -> Any:
    """An attrs validator: a finite number (no bool) in [low, high], or exactly 0 where `or_zero`."""

    def check(_: object, attribute: Attribute[Any], value: object) -> None:
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if not (is_number and (low <= value <= high or (or_zero and value == 0))):  # type: ignore[operator]
            raise ConfigError(f"{attribute.name}: found {value!r}, wanted {wanted}")

    return check


def _integer(low: int, high: float, wanted: str) -> Any:
    """An attrs validator: an int (no bool) in [low, high]."""

    def check(_: object, attribute: Attribute[Any], value: object) -> None:
        if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
            raise ConfigError(f"{attribute.name}: found {value!r}, wanted {wanted}")

    return check


def _seed(instance: object, attribute: Attribute[Any], value: object) -> None:
    if value is not None:
        _integer(0, _SEEDS - 1, "an integer from 0 to 2**64 - 1, or none for a fresh seed")(instance, attribute, value)


def _bias(_: object, attribute: Attribute[Any], value: object) -> None:
    if not isinstance(value, Mapping):
        raise ConfigError(f"{attribute.name}: found {value!r}, wanted a mapping of token id to bias")
    for token, bias in value.items():
        if not isinstance(token, int) or isinstance(token, bool) or token < 0:
            raise ConfigError(f"{attribute.name}: found token id {token!r}, wanted an integer >= 0")
        is_number = isinstance(bias, int | float) and not isinstance(bias, bool)
        if not (is_number and (abs(bias) <= _LIMIT or bias == -math.inf)):
            raise ConfigError(
                f"{attribute.name}: found {bias!r} for token {token}, wanted -1e6 to 1e6, or -inf to ban it"
            )


def _flag(_: object, attribute: Attribute[Any], value: object) -> None:
    if not isinstance(value, bool):
        raise ConfigError(f"{attribute.name}: found {value!r}, wanted true or false")


def _strings(_: object, attribute: Attribute[Any], value: object) -> None:
    # a bare string is refused too: taken as a sequence it would stop at each of its characters
    if not isinstance(value, tuple) or not all(isinstance(item, str) and item for item in value):
        raise ConfigError(f"{attribute.name}: found {value!r}, wanted a list of strings, none of them empty")


def _as_tuple(value: object) -> object:
    return tuple(value) if isinstance(value, list) else value


def _own_copy(value: object) -> object:
    return dict(value) if isinstance(value, Mapping) else value


@frozen(kw_only=True)
class SamplingParams:
    """How a token is chosen. The defaults are greedy, with nothing filtered, penalised or biased.

    A bad value raises `ConfigError` that names the field, the value found and what is wanted.

    Attributes:
        temperature: 0 for greedy, else from 1e-6 to 1e6.
        top_k: how many of the best tokens stay; 0 keeps all.
        top_p: above 0, up to 1; 1 keeps all.
        min_p: from 0 to 1; 0 keeps all.
        repetition_penalty: from 1e-6 to 1e6; 1 is none, above 1 discourages what was seen.
        presence_penalty: subtracted once from the logit of each token seen; 0 is none.
        frequency_penalty: subtracted once for each time a token was seen; 0 is none.
        penalty_window: how many of the latest tokens, prompt included, the three penalties look at; 0 is all.
        logit_bias: added to the logits of these token ids; ``-inf`` bans a token.
        seed: from 0 to 2**64 - 1; left out, a fresh one is drawn and reported.

    """

    temperature: float = field(
        default=0.0, validator=_number(1e-6, _LIMIT, "0 (greedy) or a number from 1e-6 to 1e6", or_zero=True)
    )
    top_k: int = field(default=0, validator=_integer(0, math.inf, "an integer >= 0 (0: off)"))
    top_p: float = field(default=1.0, validator=_number(math.ulp(0.0), 1.0, "a number above 0, at most 1 (1: off)"))
    min_p: float = field(default=0.0, validator=_number(0.0, 1.0, "a number from 0 to 1 (0: off)"))
    repetition_penalty: float = field(
        default=1.0, validator=_number(1e-6, _LIMIT, "a number from 1e-6 to 1e6 (1: off)")
    )
    presence_penalty: float = field(
        default=0.0, validator=_number(-_LIMIT, _LIMIT, "a number from -1e6 to 1e6 (0: off)")
    )
    frequency_penalty: float = field(
        default=0.0, validator=_number(-_LIMIT, _LIMIT, "a number from -1e6 to 1e6 (0: off)")
    )
    penalty_window: int = field(
        default=0, validator=_integer(0, 2**31 - 1, "an integer from 0 (all tokens) to 2**31 - 1")
    )
    logit_bias: Mapping[int, float] = field(factory=dict, converter=_own_copy, validator=_bias, hash=False)
    seed: int | None = field(default=None, validator=_seed)

    @property
    def greedy(self) -> bool:
        """Whether the best token is always taken."""
        return self.temperature == 0

    @property
    def penalises(self) -> bool:
        """Whether any of the three penalties does something."""
        return self.repetition_penalty != 1 or self.presence_penalty != 0 or self.frequency_penalty != 0

    def seeded(self) -> SamplingParams:
        """The same with a seed: its own, or one freshly drawn (below 2**53). Record this to repeat a run."""
        return self if self.seed is not None else evolve(self, seed=secrets.randbits(_DRAWN_SEED_BITS))


@frozen(kw_only=True)
class GenerationParams:
    """When generation ends and what it reports.

    A bad value raises `ConfigError` that names the field, the value found and what is wanted.

    Attributes:
        max_tokens: at most this many tokens are generated, the end token included; at least 1.
        stop: strings that end the text; they are not part of it.
        stop_at_eos: whether the model's own end tokens (EOS, EOT …) end the text.
        logprobs: how many of the most likely tokens each piece lists; 0 gives only the chosen token's
            log-probability.

    """

    max_tokens: int = field(default=256, validator=_integer(1, math.inf, "an integer >= 1"))
    stop: tuple[str, ...] = field(default=(), converter=_as_tuple, validator=_strings)
    stop_at_eos: bool = field(default=True, validator=_flag)
    logprobs: int = field(default=0, validator=_integer(0, math.inf, "an integer >= 0"))
