"""Tokens of several sequences chosen where their logits are: what a runtime may offer a scheduler."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

from attrs import field, frozen, validators

from mortice.core.errors import ExecutionError
from mortice.core.plugin.interfaces import TokenSequence
from mortice.core.text.params import GenerationParams, SamplingParams
from mortice.core.text.sampling import Sampled

__all__ = ["ChoicePart", "ChoosesTokens", "TokenChoice"]


class TokenChoice(Protocol):
    """How the tokens of one sequence are chosen; made by `ChoosesTokens.token_choice`, which alone knows more of it."""

    @property
    def sequence(self) -> TokenSequence:
        """Whose tokens."""
        ...


@frozen(eq=False, kw_only=True)
class ChoicePart:
    """What one sequence does in a step that chooses tokens.

    Attributes:
        sequence: which.
        token_ids: tokens that follow those it has, at least one.
        choice: how the token after them is chosen; None where none is, as within a prompt.
        index: tokens chosen for the sequence before.

    """

    sequence: TokenSequence
    token_ids: Sequence[int] = field(validator=validators.min_len(1))
    choice: TokenChoice | None = None
    index: int = 0


@runtime_checkable
class ChoosesTokens(Protocol):
    """A runtime that chooses the tokens of several sequences where their logits are; optional, schedulers look for it.

    What is chosen is what `mortice.core.text.sampling.Sampler` chooses of the same logits, whoever else is in the step.
    """

    def token_choice(
        self, sequence: TokenSequence, sampling: SamplingParams, generation: GenerationParams
    ) -> TokenChoice | None:
        """How to choose for a sequence, until it is closed.

        Args:
            sequence: whose tokens.
            sampling: how to choose.
            generation: for the alternatives to report.

        Returns:
            It; None where the host has to sample.

        Raises:
            ConfigError: a bias of a token outside the vocabulary.

        """
        ...

    def choose_step(self, parts: Sequence[ChoicePart], *, ahead: bool) -> list[Sampled | ExecutionError | None]:
        """Run the program over the tokens of all parts, and choose.

        Args:
            parts: each sequence once.
            ahead: whether the next call is likely to feed each of these sequences the token now chosen for it, and
                nothing else. The runtime may then begin that step before this call returns; a sequence that is not fed
                so after all loses nothing.

        Returns:
            For each part the token chosen; None where it has no `choice`; an error where its logits cannot be sampled,
            which is no other part's.

        Raises:
            InputError: before any work, as `Runtime.step` does.

        """
        ...
