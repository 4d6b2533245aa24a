"""What the kernel that chooses tokens is handed, ``ops/choose.cu``: its structures, their sizes, its constants."""

from __future__ import annotations

import ctypes
import math

from mortice.core.text.params import SamplingParams
from mortice.plugins.executors.cuda.device.module import Int, Pointer
from mortice.plugins.executors.cuda.lowering.launches import MAX_SEQUENCES

__all__ = [
    "RING",
    "THREADS",
    "TOP_LIMIT",
    "ChoiceParams",
    "ChoiceRow",
    "ChooseArgs",
    "Chosen",
    "choice_blocks",
    "choice_bytes",
    "choice_defines",
    "choice_params",
    "choice_parts",
    "choice_rows_at_once",
    "history_length",
]

THREADS = 512
TOP_LIMIT = 64
"""Alternatives a step can report; where more are wanted the host samples."""

RING = 16
_MOST_BLOCKS, _LEAST_BLOCKS = 64, 4
_BINS = 2048


class ChoiceParams(ctypes.Structure):
    """Mirror of ``ChoiceParams``."""

    _fields_ = [
        ("seed", ctypes.c_uint64),
        ("step", ctypes.c_uint64),
        ("top_p", ctypes.c_double),
        *((name, ctypes.c_float) for name in ("temperature", "log_min_p", "repetition", "presence", "frequency")),
        *((name, Int) for name in ("top_k", "window", "top", "penalises", "biased", "position", "unused")),
    ]


class ChoiceRow(ctypes.Structure):
    """Mirror of ``ChoiceRow``."""

    _fields_ = [("slot", Int), ("launches", ctypes.c_uint32)]


class _Alternative(ctypes.Structure):
    _fields_ = [("id", Int), ("logprob", ctypes.c_float)]


class Chosen(ctypes.Structure):
    """Mirror of ``Chosen``."""

    _fields_ = [
        ("id", Int),
        ("logprob", ctypes.c_float),
        ("problem", Int),
        ("unused", Int),
        ("top", _Alternative * TOP_LIMIT),
    ]


class ChooseArgs(ctypes.Structure):
    """Mirror of ``ChooseArgs``."""

    _fields_ = [
        *((name, Pointer) for name in ("logits", "rows", "params", "bias", "counts", "history", "scratch")),
        *((name, Pointer) for name in ("token_ids", "positions", "chosen")),
        *((name, Int) for name in ("first", "history_length")),
    ]


def choice_rows_at_once(sm_count: int) -> int:
    """Rows of a launch. All its blocks wait for others, so that each has to find a multiprocessor."""
    return max(1, min(MAX_SEQUENCES, sm_count // _LEAST_BLOCKS))


def choice_blocks(sm_count: int, rows: int) -> int:
    """Blocks for each row of a launch of `rows`."""
    return max(_LEAST_BLOCKS, min(_MOST_BLOCKS, sm_count // rows))


def _scratch_bytes(vocab_size: int, most_blocks: int = _MOST_BLOCKS, threads: int = THREADS) -> int:
    exchange = 8 * (_BINS + 1) + 4 * (_BINS + 2) + 16 * threads
    return -(-(3 * exchange + 28 * most_blocks + 8 + 4 * vocab_size) // 8) * 8


def choice_bytes(vocab_size: int, context_length: int, sm_count: int) -> int:
    """Bytes a `TokenChooser` allocates on the device."""
    return sum(choice_parts(vocab_size, context_length, sm_count).values())


def choice_parts(vocab_size: int, context_length: int, sm_count: int) -> dict[str, int]:
    """Bytes of each part of that memory, in the order in which they lie there; the names are those of `ChooseArgs`."""
    return {
        "params": ctypes.sizeof(ChoiceParams) * MAX_SEQUENCES,
        "rows": ctypes.sizeof(ChoiceRow) * MAX_SEQUENCES,
        "scratch": _scratch_bytes(vocab_size) * choice_rows_at_once(sm_count),
        "bias": 4 * vocab_size * MAX_SEQUENCES,
        "counts": 4 * vocab_size * MAX_SEQUENCES,
        "history": 4 * history_length(context_length) * MAX_SEQUENCES,
    }


def history_length(context_length: int) -> int:
    """Tokens of a slot's history: the token chosen at the context's end is noted too."""
    return context_length + 1


def choice_defines(
    vocab_size: int, most_blocks: int = _MOST_BLOCKS, least_blocks: int = _LEAST_BLOCKS, threads: int = THREADS
) -> dict[str, str | int]:
    """Constants of the kernel; it refuses to compile where its structures are not those of this module."""
    return {
        "VOCAB_SIZE": vocab_size,
        "MOST_BLOCKS": most_blocks,
        "LEAST_BLOCKS": least_blocks,
        "THREADS": threads,
        "RING": RING,
        "ROWS": MAX_SEQUENCES,
        "TOP_LIMIT": TOP_LIMIT,
        "PARAMS_BYTES": ctypes.sizeof(ChoiceParams),
        "CHOSEN_BYTES": ctypes.sizeof(Chosen),
        "SCRATCH_BYTES": _scratch_bytes(vocab_size, most_blocks, threads),
        "ARGS_BYTES": ctypes.sizeof(ChooseArgs),
    }


def choice_params(sampling: SamplingParams, vocab_size: int, *, step: int, top: int, position: int = 0) -> ChoiceParams:
    """What the kernel reads; the seed is settled."""
    return ChoiceParams(
        seed=sampling.seed,
        step=step,
        top_p=sampling.top_p,
        temperature=sampling.temperature,
        log_min_p=math.log(sampling.min_p) if sampling.min_p > 0 else -math.inf,
        repetition=sampling.repetition_penalty,
        presence=sampling.presence_penalty,
        frequency=sampling.frequency_penalty,
        top_k=min(sampling.top_k, vocab_size),
        window=sampling.penalty_window,
        top=top,
        penalises=sampling.penalises,
        biased=bool(sampling.logit_bias),
        position=position,
    )
