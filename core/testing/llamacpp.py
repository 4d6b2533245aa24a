"""llama.cpp on the CPU as an oracle, through the `xllamacpp` package (``pip install mortice[test]`` brings it).

It runs with an F32 KV cache and without flash attention. On quantised weights it rounds activations to 8 bits, so give
it a model expanded to F32 where more than rough agreement is wanted. It knows its own architectures only: a family that
has a name of its own in mortice is shown to it under the name it knows, see `under_architecture`.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
from attrs import define, field, frozen
from numpy.typing import NDArray

from mortice.core.errors import UnsupportedError
from mortice.core.pipeline import load
from mortice.core.plugin.registry import make_registry
from mortice.core.testing.gguf_files import write_gguf

__all__ = [
    "Difference",
    "LlamaCpp",
    "Row",
    "difference",
    "difference_from_llamacpp",
    "llamacpp_logits",
    "under_architecture",
]


@frozen(eq=False)
class Row:
    """What llama.cpp says about one position.

    Attributes:
        ids: the most likely tokens, best first.
        logprobs: their natural log-probabilities.

    """

    ids: NDArray[np.int64]
    logprobs: NDArray[np.float64]

    @property
    def best(self) -> int:
        """The most likely token."""
        return int(self.ids[0])


@define(eq=False)
class LlamaCpp:
    """A model loaded by llama.cpp; use it as a context manager.

    Attributes:
        path: the file.
        context: tokens a sequence can hold.
        slots: sequences held at once; several threads that each use a slot are computed in one batch.
        yarn_betas: YaRN's fast and slow beta, instead of its defaults.

    Raises:
        UnsupportedError: when `xllamacpp` is not installed.

    """

    path: Path
    context: int = 1024
    slots: int = 1
    yarn_betas: tuple[float, float] | None = None
    _server: Any = field(init=False, repr=False)
    _letter: int = field(init=False, repr=False)

    def __attrs_post_init__(self) -> None:
        xllamacpp = _import_xllamacpp()
        params = xllamacpp.CommonParams()
        params.model.path = str(self.path)
        params.n_ctx = self.context * self.slots
        params.n_parallel = self.slots
        params.n_gpu_layers = 0
        params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
        params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
        # several threads wait for one another by spinning, and take many times as long where a core is not free
        params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
        params.warmup = params.fit_params = params.ctx_shift = False
        params.cache_ram_mib = 0
        params.verbosity = -1
        if self.yarn_betas is not None:
            params.yarn_beta_fast, params.yarn_beta_slow = self.yarn_betas
        with make_registry().open_model(self.path) as file:
            tokens = file.metadata["tokenizer.ggml.tokens"]
            assert isinstance(tokens, Sequence)
            self._letter = tokens.index("a")
        self._server = xllamacpp.Server(params)

    def after(self, token_ids: Sequence[int], top: int = 20, slot: int = 0) -> Row:
        """The row after `token_ids`. What they share with the slot's last call is not computed again.

        One token is asked for, and it is forced to be a plain letter: the server merges the rows of tokens that end
        inside a UTF-8 character, and then no row says which token it belongs to. The log-probabilities are those
        before sampling, so the force does not show in them.

        Raises:
            AssertionError: when the answer is not one row of `top` entries.

        """
        answer = self._server.handle_completions(
            {
                "prompt": list(token_ids),
                "n_predict": 1,
                "temperature": 0.0,
                "logit_bias": [[self._letter, 1000.0]],
                "n_probs": top,
                "post_sampling_probs": False,
                "cache_prompt": True,
                "id_slot": slot,
            }
        )
        assert "choices" in answer, f"{self.path}: llama.cpp answered {answer}"
        rows = answer["choices"][0]["logprobs"]["content"]
        assert len(rows) == 1, f"{self.path}: {len(rows)} rows for one token"
        entries = rows[0]["top_logprobs"]
        assert len(entries) == top, f"{self.path}: {len(entries)} entries, asked for {top}"
        ids = np.array([entry["id"] for entry in entries], np.int64)
        return Row(ids, np.array([entry["logprob"] for entry in entries], np.float64))

    def greedy(self, prompts: Sequence[Sequence[int]], tokens: int, top: int = 20) -> list[list[Row]]:
        """For each prompt the rows after every one of its tokens and of a greedy continuation of `tokens` tokens.

        The row after the whole continuation is left out: there are ``len(prompt) + tokens - 1`` rows, and the last
        `tokens` of them chose the continuation. Each prompt has a slot of its own. An end token ends nothing.
        """
        assert len(prompts) <= self.slots

        def one(slot: int, prompt: Sequence[int]) -> list[Row]:
            rows = [self.after(prompt[:length], top, slot) for length in range(1, len(prompt))]
            ids = list(prompt)
            for _ in range(tokens):
                rows.append(self.after(ids, top, slot))
                ids.append(rows[-1].best)
            return rows

        with ThreadPoolExecutor(len(prompts)) as pool:
            return list(pool.map(one, range(len(prompts)), prompts))

    def close(self) -> None:
        """Unload the model."""
        self._server = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


@frozen(kw_only=True)
class Difference:
    """How far mortice's log-probabilities are from llama.cpp's, over its top tokens at several positions."""

    mean: float
    worst: float
    positions: int


def difference(rows: Sequence[Row], logits: NDArray[np.float32]) -> Difference:
    """Compare rows with mortice's logits at the same positions, shape (len(rows), vocab_size)."""
    assert len(rows) == len(logits) > 0
    wide = logits.astype(np.float64)
    wide -= wide.max(axis=1, keepdims=True)
    wide -= np.log(np.exp(wide).sum(axis=1, keepdims=True))
    gaps = np.array([np.abs(ours[row.ids] - row.logprobs) for row, ours in zip(rows, wide, strict=True)])
    return Difference(mean=float(gaps.mean()), worst=float(gaps.max()), positions=len(rows))


def llamacpp_logits(path: Path, token_ids: Sequence[int]) -> NDArray[np.float32]:
    """llama.cpp's log-probabilities of every token after each of `token_ids`: its logits but for a constant a row.

    Returns:
        float32, shape (len(token_ids), vocab_size).

    Raises:
        UnsupportedError: when `xllamacpp` is not installed.

    """
    rows = _rows(path, token_ids)
    logits = np.empty((len(rows), len(rows[0].ids)), np.float32)
    for place, row in enumerate(rows):
        logits[place, row.ids] = row.logprobs
    return logits


def difference_from_llamacpp(path: Path, token_ids: Sequence[int], oracle: Path | None = None) -> Difference:
    """How far the reference executor is from llama.cpp, over all tokens after each of `token_ids`.

    Args:
        path: the model.
        token_ids: what both are fed.
        oracle: a file of the same weights that llama.cpp is given, where it does not read `path` itself.

    Raises:
        UnsupportedError: when `xllamacpp` is not installed.

    """
    rows = _rows(oracle or path, token_ids)
    with load(path, executor="reference") as pipeline:
        return difference(rows, pipeline.logits(token_ids))


def _rows(path: Path, token_ids: Sequence[int]) -> list[Row]:
    """All tokens after each of `token_ids`."""
    with make_registry().open_model(path) as file:
        tokens = file.metadata["tokenizer.ggml.tokens"]
        assert isinstance(tokens, Sequence)
        size = len(tokens)
        context = file.metadata[f"{file.architecture}.context_length"]  # what RoPE's tables are chosen by
        assert isinstance(context, int)
    with LlamaCpp(path, context=min(context, 4096)) as llama:
        return [llama.after(token_ids[: place + 1], size) for place in range(len(token_ids))]


def under_architecture(path: Path, architecture: str) -> Path:
    """A copy of a GGUF file, beside it, that says `architecture`: the same tensors, keys under the new prefix."""
    copy = path.with_suffix(f".{architecture}.gguf")
    with make_registry().open_model(path) as file:
        old = f"{file.architecture}."
        metadata = {
            f"{architecture}.{key.removeprefix(old)}" if key.startswith(old) else key: value
            for key, value in file.metadata.items()
        }
        return write_gguf(copy, architecture, metadata, file.tensors.values())


def _import_xllamacpp() -> Any:
    try:
        return importlib.import_module("xllamacpp")  # it has no types
    except ImportError:
        raise UnsupportedError("xllamacpp, llama.cpp on the CPU, is not installed: pip install xllamacpp") from None
