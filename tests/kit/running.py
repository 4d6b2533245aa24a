"""Runs suites without pytest, as `mortice plugins check` does."""

from __future__ import annotations

from collections import Counter

from mortice.core.testing.suite import Suite, outcomes

__all__ = ["failures", "run"]


def run(suite: Suite) -> tuple[dict[str, str], Counter[str]]:
    """The checks that failed, with their messages, and how many ended in which way."""
    found = list(outcomes(suite))
    failed = {outcome.check: outcome.message for outcome in found if outcome.status == "failed"}
    return failed, Counter(outcome.status for outcome in found)


def failures(suite: Suite, check: str = "") -> dict[str, str]:
    """The checks that failed, with their messages; where `check` is given, only it and its other cases are run."""
    only = check.partition(" [")[0]
    return {outcome.check: outcome.message for outcome in outcomes(suite, only) if outcome.status == "failed"}
