"""The CUDA executor against the reference, on a card."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

import mortice
from mortice.core.config import ExecutorConfig, ModelConfig, RunConfig
from mortice.core.errors import InputError
from mortice.core.pipeline import Pipeline
from mortice.core.plugin.interfaces import StepPart
from mortice.core.testing.tiny_models import write_tiny_model
from mortice.plugins.executors.cuda.run.runtime_memory import CODE_BYTES
from tests.support.cuda import needs_gpu
from tests.support.tiny import CONTRACTS

pytestmark = [pytest.mark.gpu, needs_gpu]

Sizes = Mapping[str, int]

FAMILIES: Mapping[str, tuple[str, str, Sizes]] = {
    "llama, grouped heads, 576 wide": ("llama", "Q4_1", {"hidden_size": 576, "num_heads": 9, "num_kv_heads": 3}),
    "qwen2, biases, 896 wide": ("qwen2", "Q5_0", {"hidden_size": 896, "num_heads": 14, "num_kv_heads": 2}),
    "qwen3, head norms, heads wider than the model": ("qwen3", "Q8_0", {"head_dim": 128}),
}
QTYPES: tuple[str, ...] = ("F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0")
QTYPES += ("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_NL", "IQ4_XS")

EXACT, ROUNDED = 1e-9, 2e-3
"""Normalised mean squared error of logits: with float32 activations and cache, and with int8 and half precision."""


def error(found: NDArray[np.float32], wanted: NDArray[np.float32]) -> float:
    assert np.isfinite(found).all()
    return float(np.square(found - wanted, dtype=np.float64).sum() / np.square(wanted, dtype=np.float64).sum())


def load(path: Path, executor: str, *, exact: bool = True, context: int = 512, **chosen_kinds: Any) -> Pipeline:
    kinds: dict[str, Any] = {"kv": "f32", "activations": "f32"} if exact else {}
    kinds = {"prefix_cache": False, **kinds, **chosen_kinds}  # the same text again is computed in the same way again
    chosen = ExecutorConfig(name=executor, context=context, **kinds)
    return mortice.load(RunConfig(model=ModelConfig(path=path), executor=chosen))


def prompt(pipeline: Pipeline, length: int) -> list[int]:
    return [int(token) for token in np.random.default_rng(7).integers(0, pipeline.program.vocab_size, length)]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    folder = tmp_path_factory.mktemp("models")

    def write(family: str, qtype: str, sizes: Sizes | None = None) -> Path:
        path = folder / f"{family}-{qtype}-{hash(tuple((sizes or {}).items()))}.gguf"
        return path if path.exists() else write_tiny_model(path, CONTRACTS[family], qtypes=qtype, sizes=sizes or {})

    return write


@pytest.fixture
def pair(model: Callable[..., Path], request: pytest.FixtureRequest) -> Iterator[tuple[Pipeline, Pipeline]]:
    """A model on both executors, float32 throughout."""
    path = model(*FAMILIES[request.param])
    with load(path, "reference") as reference, load(path, "cuda") as cuda:
        yield reference, cuda


every_family = pytest.mark.parametrize("pair", FAMILIES, indirect=True)


@every_family
@pytest.mark.parametrize("length", [1, 2, 7, 8, 9, 255, 256, 257])
def test_prefill_equals_the_reference(pair: tuple[Pipeline, Pipeline], length: int) -> None:
    reference, cuda = pair
    ids = prompt(reference, length)
    assert error(cuda.logits(ids), reference.logits(ids)) < EXACT


@every_family
def test_decode_equals_prefill_at_every_position(pair: tuple[Pipeline, Pipeline]) -> None:
    reference, cuda = pair
    ids = prompt(reference, 140)  # over two pages of the cache
    wanted = reference.logits(ids)
    with cuda.session() as session:
        for position, token in enumerate(ids):
            assert error(session.feed([token])[0], wanted[position]) < EXACT, position


@every_family
def test_greedy_text_is_the_references(pair: tuple[Pipeline, Pipeline]) -> None:
    reference, cuda = pair
    ids = prompt(reference, 20)
    options: dict[str, Any] = {"max_tokens": 100, "stop_at_eos": False}
    wanted = list(reference.generate(ids, **options))
    found = list(cuda.generate(ids, **options))
    assert [piece.id for piece in found] == [piece.id for piece in wanted]
    assert np.allclose([piece.logprob for piece in found], [piece.logprob for piece in wanted], atol=1e-3)


@pytest.mark.parametrize("qtype", QTYPES)
def test_every_type_is_exact_with_float32_activations(model: Callable[..., Path], qtype: str) -> None:
    path = model("llama", qtype, {"hidden_size": 512, "ffn_size": 768})
    with load(path, "reference") as reference, load(path, "cuda") as cuda:
        ids = prompt(reference, 40)
        assert error(cuda.logits(ids), reference.logits(ids)) < EXACT


@pytest.mark.parametrize("qtype", QTYPES)
def test_every_type_is_close_with_int8_activations(model: Callable[..., Path], qtype: str) -> None:
    path = model("llama", qtype, {"hidden_size": 512, "ffn_size": 768})
    with load(path, "reference", exact=False) as reference, load(path, "cuda", exact=False) as cuda:
        ids = prompt(reference, 40)
        assert error(cuda.logits(ids), reference.logits(ids)) < ROUNDED


@pytest.mark.parametrize("exact", [True, False], ids=["float32", "rounded"])
@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_a_long_context_is_attended_in_parts(model: Callable[..., Path], family: str, exact: bool) -> None:
    path = model(family, "Q8_0", {"context_length": 8192})
    kinds: dict[str, Any] = {"exact": exact, "context": 4200}
    with load(path, "reference", **kinds) as reference, load(path, "cuda", **kinds) as cuda:
        ids = prompt(reference, 4097)
        with reference.session() as ours, cuda.session() as theirs:
            fed = ids[:4090], *([token] for token in ids[4090:])  # a prompt, and steps of one up to 4096 and past it
            found, wanted = (np.concatenate([session.feed(part) for part in fed]) for session in (theirs, ours))
        assert error(found, wanted) < (EXACT if exact else ROUNDED)


def test_sequences_in_one_step_do_not_touch_each_other(model: Callable[..., Path]) -> None:
    with load(model(*FAMILIES["qwen3, head norms, heads wider than the model"]), "cuda") as cuda:
        ids = prompt(cuda, 90)
        alone = [cuda.logits(ids[:30])[-1], cuda.logits(ids[30:])[-1]]
        sequences = [cuda.runtime.new_sequence() for _ in range(2)]
        parts = [
            StepPart(sequence=sequence, token_ids=part)
            for sequence, part in zip(sequences, (ids[:30], ids[30:]), strict=True)
        ]
        together = cuda.runtime.step(parts)
        for sequence in sequences:
            sequence.close()
        assert all(error(found, wanted) < EXACT for found, wanted in zip(together, alone, strict=True))


def test_a_refused_step_changes_nothing(model: Callable[..., Path]) -> None:
    with load(model("llama", "Q8_0"), "cuda", context=64) as cuda, cuda.session() as session:
        ids = prompt(cuda, 40)
        before = session.feed(ids[:20])
        with pytest.raises(InputError, match="do not fit the context of 64"):
            session.feed([1] * 60)
        with pytest.raises(InputError, match="outside the vocabulary"):
            session.feed([cuda.program.vocab_size])
        session.sequence.truncate(19)
        assert error(session.feed([ids[19]]), before) < EXACT


def test_nothing_is_allocated_per_token(model: Callable[..., Path]) -> None:
    with load(model("llama", "Q8_0"), "cuda", exact=False) as cuda:
        device = cuda.runtime.device  # type: ignore[attr-defined]  # the CUDA runtime's own
        pieces = cuda.generate(prompt(cuda, 8), max_tokens=110, stop_at_eos=False)
        for _ in range(5):
            next(pieces)
        before = device.allocations
        for _ in range(100):
            next(pieces)
        assert device.allocations == before


def test_preload_moves_nothing_while_a_graph_lives(model: Callable[..., Path]) -> None:
    with load(model("qwen2", "Q8_0"), "cuda") as cuda:
        ids = prompt(cuda, 12)
        first = [piece.id for piece in cuda.generate(ids, max_tokens=20, stop_at_eos=False)]
        addresses = dict(cuda.runtime.memory.addresses.weights)  # type: ignore[attr-defined]
        assert cuda.preload() == 0
        assert dict(cuda.runtime.memory.addresses.weights) == addresses  # type: ignore[attr-defined]
        assert [piece.id for piece in cuda.generate(ids, max_tokens=20, stop_at_eos=False)] == first
        cuda.runtime.clear_decode_graph()  # type: ignore[attr-defined]
        assert [piece.id for piece in cuda.generate(ids, max_tokens=20, stop_at_eos=False)] == first


def test_two_threads_share_a_pipeline(model: Callable[..., Path]) -> None:
    with load(model("llama", "Q8_0"), "cuda") as cuda:
        prompts = [prompt(cuda, 10), prompt(cuda, 33)]
        wanted = [[p.id for p in cuda.generate(ids, max_tokens=30, stop_at_eos=False)] for ids in prompts]
        found: dict[int, list[int]] = {}

        def work(index: int) -> None:
            pieces = cuda.generate(prompts[index], max_tokens=30, stop_at_eos=False)
            found[index] = [piece.id for piece in pieces]

        threads = [threading.Thread(target=work, args=(index,)) for index in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert [found[0], found[1]] == wanted


def test_memory_that_is_allocated_is_what_fit_said(model: Callable[..., Path]) -> None:
    with load(model("llama", "F16", {"hidden_size": 1024, "ffn_size": 4096, "num_layers": 6}), "cuda") as cuda:
        device = cuda.runtime.device  # type: ignore[attr-defined]
        cuda.generate(prompt(cuda, 4), max_tokens=2)
        assert device.allocated_bytes + CODE_BYTES == pytest.approx(cuda.fit.total_bytes, rel=1e-3)


def test_closing_gives_everything_back(model: Callable[..., Path]) -> None:
    cuda = load(model("llama", "Q8_0"), "cuda")
    device = cuda.runtime.device  # type: ignore[attr-defined]
    list(cuda.generate(prompt(cuda, 4), max_tokens=3))
    cuda.close()
    assert device.allocated_bytes == 0
