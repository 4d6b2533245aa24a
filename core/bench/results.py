"""What a benchmark gives: settings in, numbers out. Every number is measured or counted; nothing is estimated."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from typing import Any, Literal

from attrs import Attribute, field, frozen

from mortice.core.errors import ConfigError
from mortice.core.plugin.interfaces import RuntimeSettings
from mortice.core.plugin.kv_pages import PAGE_TOKENS, page_count

__all__ = ["BenchReport", "BenchSettings", "ProfileRow", "SpeedRow", "Startup", "Subject"]


def _counts(_: Any, attribute: Attribute[tuple[int, ...]], values: tuple[int, ...]) -> None:
    for value in values:
        if value < 0:
            raise ConfigError(f"{attribute.name}: found {value}, wanted 0 or more")


def _numbers(_: Any, attribute: Attribute[tuple[int, ...]], values: tuple[int, ...]) -> None:
    for value in values:
        if value < 1:
            raise ConfigError(f"{attribute.name}: found {value}, wanted at least 1")


def _at_least_one(_: Any, attribute: Attribute[int], value: int) -> None:
    if value < 1:
        raise ConfigError(f"{attribute.name}: found {value}, wanted at least 1")


@frozen(kw_only=True)
class BenchSettings:
    """What is measured.

    Attributes:
        prompt_tokens: lengths of prompts whose prefill is measured; 0 is none.
        generated_tokens: numbers of tokens whose decoding is measured; 0 is none.
        depths: tokens in the cache before each measurement, of each sequence.
        batch: numbers of sequences that are fed, or generate, at the same time.
        repeats: measurements of each kind.
        profile: whether the time of each kind of operator is measured too.
        seed: of the tokens, which are random.

    """

    prompt_tokens: tuple[int, ...] = field(default=(512,), validator=_counts)
    generated_tokens: tuple[int, ...] = field(default=(128,), validator=_counts)
    depths: tuple[int, ...] = field(default=(0,), validator=_counts)
    batch: tuple[int, ...] = field(default=(1,), validator=_numbers)
    repeats: int = field(default=5, validator=_at_least_one)
    profile: bool = False
    seed: int = 0

    def __attrs_post_init__(self) -> None:
        if not self.batch or not self.depths or not any((*self.prompt_tokens, *self.generated_tokens)):
            raise ConfigError("nothing to measure: give a prompt length or a number of tokens, a depth, and a batch")

    @property
    def needed_context(self) -> int:
        """Tokens that the longest sequence holds; before the decoded ones stands one that is not measured."""
        generated = max(self.generated_tokens, default=0)
        return max(self.depths) + max((*self.prompt_tokens, generated + 1 if generated else 0))

    @property
    def first_prompt(self) -> int:
        """The prompt whose time to the first token is measured: the first one, or a token where there is none."""
        return next((count for count in self.prompt_tokens if count), 1)

    @property
    def needed_cache(self) -> int:
        """Tokens that the KV cache has to have room for: those of all sequences, in whole pages."""
        return max(self.batch) * page_count(self.needed_context) * PAGE_TOKENS

    def require_room(self, settings: RuntimeSettings) -> None:
        """Refuse what does not fit.

        Raises:
            ConfigError: saying what is needed and there.

        """
        if self.needed_context > settings.context_length:
            raise ConfigError(
                f"bench: prompt, generated tokens and depth need a context of {self.needed_context}, "
                f"found {settings.context_length}"
            )
        if max(self.batch) > 1 and self.needed_cache > settings.cache_tokens:
            raise ConfigError(
                f"bench: {max(self.batch)} sequences of {self.needed_context} tokens need a KV cache of "
                f"{self.needed_cache}, found {settings.cache_tokens} (executor.kv_tokens)"
            )


@frozen(kw_only=True)
class SpeedRow:
    """One test.

    Attributes:
        test: ``prefill`` (a prompt is fed) or ``decode`` (tokens are generated one by one).
        tokens: how many, for each sequence.
        depth: tokens in the cache before.
        sequences: how many were fed, or generated, at the same time.
        seconds: of each repeat.
        token_bytes: bytes a token has to move, the mean over the test; None for prefill, where a step serves many. The
            weights count once for all sequences.
        read_bandwidth: what the device was measured to read, bytes a second; None where the executor cannot tell.
        host_seconds: of each repeat, time in which the host did not wait for the device, all steps taken to be as the
            median one; None where that is unknown.

    """

    test: Literal["prefill", "decode"]
    tokens: int
    depth: int
    seconds: tuple[float, ...]
    sequences: int = 1
    token_bytes: float | None = None
    read_bandwidth: float | None = None
    host_seconds: tuple[float, ...] | None = None

    @property
    def speeds(self) -> tuple[float, ...]:
        """Tokens a second of each repeat, of all sequences together."""
        return tuple(self.sequences * self.tokens / seconds for seconds in self.seconds)

    @property
    def mean(self) -> float:
        """Mean of `speeds`."""
        return statistics.fmean(self.speeds)

    @property
    def deviation(self) -> float | None:
        """Sample standard deviation of `speeds`; None for a single one."""
        return statistics.stdev(self.speeds) if len(self.speeds) > 1 else None

    @property
    def median(self) -> float:
        """Median of `speeds`."""
        return statistics.median(self.speeds)

    @property
    def bytes_per_second(self) -> float | None:
        """Bytes moved in a second, at the median speed."""
        return None if self.token_bytes is None else self.token_bytes * self.median

    @property
    def bandwidth_share(self) -> float | None:
        """`bytes_per_second` as a part of `read_bandwidth`."""
        if self.bytes_per_second is None or self.read_bandwidth is None:
            return None
        return self.bytes_per_second / self.read_bandwidth

    @property
    def host_seconds_per_token(self) -> float | None:
        """Median over the repeats."""
        return (
            None if self.host_seconds is None else statistics.median(self.host_seconds) / (self.sequences * self.tokens)
        )


@frozen(kw_only=True)
class Startup:
    """The way to the first token.

    Attributes:
        plan_seconds: open, validate, build the program, plan.
        upload_seconds: the upload strategy's own time.
        upload_bytes: bytes of the file that became resident.
        made: whether weights were made while they were uploaded, at random or quantised, rather than read.
        open_seconds: the rest of `Pipeline.preload`: memory, kernels, caches.
        prompt_tokens: length of the prompt.
        first_token_cold: seconds from opening the file to the first token; the file may have been in the page cache and
            kernels in the cache on disk.
        first_token_warm: seconds from a prompt to its first token, everything resident: one value a repeat.

    """

    plan_seconds: float
    upload_seconds: float
    upload_bytes: int
    open_seconds: float
    prompt_tokens: int
    first_token_cold: float
    first_token_warm: tuple[float, ...] = ()
    made: bool = False

    @property
    def upload_rate(self) -> float | None:
        """Bytes of the file a second; None when nothing was moved, or not from a file."""
        known = self.upload_bytes and self.upload_seconds and not self.made
        return self.upload_bytes / self.upload_seconds if known else None


@frozen(kw_only=True)
class ProfileRow:
    """Time spent in one kind of launch during one step, the mean over the repeats.

    Attributes:
        test: ``prefill`` or ``decode``.
        tokens: tokens of the step, for each sequence.
        depth: tokens in the cache before.
        sequences: how many the step was made of.
        label: the executor's name for what ran.
        launches: how many in a step.
        seconds: all of them together.
        share: of the sum over all labels.

    """

    test: Literal["prefill", "decode"]
    tokens: int
    depth: int
    sequences: int
    label: str
    launches: int
    seconds: float
    share: float


@frozen(kw_only=True)
class Subject:
    """What was measured.

    Attributes:
        model: the file's name, or SHAPE:RECIPE.
        architecture: the family.
        parameters: elements of all tensors.
        file_bytes: bytes of all tensors as stored.
        executor: its name.
        device: the device's own name.
        layouts: how many weights lie in which layout.
        upload: the strategy.
        kv_type: as asked for.
        context_length: tokens a sequence could hold.
        load_average: of the machine before the measurement, one minute; None where the system has none.
        cores: the machine's.
        choices: what the runtime chose by measuring, as `Tuned.measured_choices` has it.

    """

    model: str
    architecture: str
    parameters: int
    file_bytes: int
    executor: str
    device: str
    layouts: dict[str, int]
    upload: str
    kv_type: str
    context_length: int
    load_average: float | None
    cores: int
    choices: Mapping[str, str] = field(factory=dict)


@frozen(kw_only=True)
class BenchReport:
    """All of it."""

    subject: Subject
    settings: BenchSettings
    startup: Startup
    read_bandwidth: float | None
    rows: tuple[SpeedRow, ...]
    profile: tuple[ProfileRow, ...] = ()
