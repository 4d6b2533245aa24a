"""Small random models of every family and weight type against llama.cpp: 512 log-probabilities at many positions."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

import mortice
from mortice.core.plugin.interfaces import StepPart
from mortice.core.testing.tiny_models import write_tiny_model
from tests.support.llamacpp import Difference, LlamaCpp, difference, open_reference
from tests.support.tiny import CONTRACTS, QTYPES, expanded

VOCAB = 512
CONTEXT = 512
POSITIONS = (1, 2, 3, 16, 17, 64, 129, 200, 255, 256, 257, 300, 399, 400)
IDS: list[int] = np.random.default_rng(0).integers(0, VOCAB, max(POSITIONS)).tolist()

YARN: Mapping[str, Any] = {
    "rope.scaling.type": "yarn",
    "rope.scaling.factor": 4.0,
    "rope.scaling.original_context_length": 64,
}
NAMED = {"general.name": "tiny"}  # llama.cpp looks for </s> in the vocabulary of a model whose name has phi3 in it
LONGROPE: Mapping[str, Any] = {"rope.scaling.attn_factor": 1.19}
TABLES = ["rope_factors_short", "rope_factors_long"]
GRANITE = {"embedding_scale": 12.0, "residual_scale": 0.22, "attention_scale": 0.1, "logit_scale": 2.0}
BIASES = ["attn_q_bias", "attn_k_bias", "attn_v_bias", "attn_output_bias"]
WIDE = {"hidden_size": 256}  # heads of 64: YaRN's ramp needs some pairs


def case(arch: str, name: str, *, keys: Mapping[str, Any] | None = None, **arguments: Any) -> Any:
    architecture = CONTRACTS[arch].architectures[0]
    metadata = {f"{architecture}.{key}": value for key, value in (keys or {}).items()} | NAMED
    return pytest.param(arch, {**arguments, "metadata": metadata}, id=f"{arch}-{name}")


CASES = [
    case("llama", "tied"),
    case("llama", "untied", tied=False),
    case("llama", "ten-layers", sizes={"num_layers": 10}),
    case("llama", "biases", include=["attn_q_bias", "attn_k_bias", "attn_v_bias", "attn_output_bias"]),
    case("llama", "group-1", sizes={"num_heads": 4, "num_kv_heads": 4}),
    case("llama", "group-3", sizes={"num_heads": 9, "num_kv_heads": 3, "hidden_size": 576}),
    case("llama", "group-8", sizes={"num_heads": 8, "num_kv_heads": 1}),
    case("llama", "width-896", sizes={"num_heads": 14, "num_kv_heads": 2, "hidden_size": 896, "num_layers": 1}),
    case("llama", "large-epsilon", sizes={"norm_eps": 1e-2}),
    case("llama", "large-base", sizes={"rope_freq_base": 500000.0}),
    case("llama", "rope-freqs", include=["rope_freqs"]),
    case("llama", "linear", keys={"rope.scaling.type": "linear", "rope.scaling.factor": 4.0}),
    case("llama", "linear-attn-factor", keys={"rope.scaling.factor": 4.0, "rope.scaling.attn_factor": 1.3}),
    case("llama", "attn-factor-alone", keys={"rope.scaling.attn_factor": 1.3}),
    case("llama", "linear-of-old-files", keys={"rope.scale_linear": 2.0}),
    case("llama", "linear-without-a-type", keys={"rope.scaling.factor": 4.0}),
    case("llama", "yarn", keys=YARN, sizes=WIDE),
    case("llama", "yarn-with-rope-freqs", keys=YARN, sizes=WIDE, include=["rope_freqs"]),
    case("llama", "yarn-attn-factor", keys={**YARN, "rope.scaling.attn_factor": 0.7}, sizes=WIDE),
    case("qwen2", "tied"),
    case("qwen2", "untied", tied=False, sizes={"norm_eps": 1e-6}),
    case("qwen2", "large-k-bias", gains={"attn_k_bias": 300.0}),
    case("qwen2", "width-896", sizes={"num_heads": 14, "num_kv_heads": 2, "hidden_size": 896, "num_layers": 1}),
    case("qwen2", "output-bias", tied=False, include=["output_bias"]),
    case("qwen2", "yarn", keys=YARN, sizes=WIDE),
    case("qwen3", "wide-heads", keys={"attention.value_length": 32}, sizes={"head_dim": 32, "norm_eps": 1e-6}),
    case("qwen3", "narrow-heads", keys={"attention.value_length": 8}, sizes={"head_dim": 8}),
    case("qwen3", "untied", tied=False),
    case("qwen3", "group-8", sizes={"num_heads": 8, "num_kv_heads": 1}),
    case(
        "qwen3",
        "yarn",
        keys={**YARN, "attention.value_length": 128},
        sizes={"head_dim": 128, "rope_freq_base": 1e6},
    ),
    case("mistral", "tied", sizes={"rope_freq_base": 1e6}),
    case("mistral", "untied", tied=False, sizes={"num_heads": 8, "num_kv_heads": 1}),
    case("mistral", "temperature", sizes={"temperature": 0.5, "original_context": 64}),
    case("mistral", "yarn-log-multiplier", keys={**YARN, "rope.scaling.yarn_log_multiplier": 1.0}, sizes=WIDE),
    case("phi3", "tied"),
    case("phi3", "untied", tied=False, sizes={"num_heads": 4, "num_kv_heads": 4}),
    case("phi3", "part-of-a-head", sizes={"hidden_size": 256, "rope_dim": 48}),
    case("phi3", "longrope-short", keys={**LONGROPE, "rope.scaling.original_context_length": 512}, include=TABLES),
    case("phi3", "longrope-long", keys={**LONGROPE, "rope.scaling.original_context_length": 64}, include=TABLES),
    case("olmo2", "full"),
    case("olmo2", "group-8", sizes={"num_heads": 8, "num_kv_heads": 1}),
    case("olmo2", "windows", sizes={"num_layers": 5, "window": 32}),
    case("olmo2", "windows-by-list", keys={"attention.sliding_window_pattern": [False, True]}, sizes={"window": 32}),
    case(
        "olmo2",
        "windows-and-yarn",
        keys={**YARN, "rope.scaling.yarn_attn_factor": 0.1 * math.log(4.0) + 1.0},
        sizes={**WIDE, "num_layers": 4, "window": 32},
    ),
    case("granite", "no-scales", sizes={"logit_scale": 1.0}),
    case("granite", "all-scales", sizes=GRANITE),
    case("granite", "biases", include=BIASES, tied=False, sizes=GRANITE),
    case("granite", "rope-freqs", include=["rope_freqs"], sizes={"logit_scale": 1.0}),
    case("granite", "no-positions", sizes={**GRANITE, "rotated": False}),
    case("starcoder2", "tied"),
    case("starcoder2", "untied", tied=False, sizes={"num_heads": 12, "num_kv_heads": 2, "hidden_size": 192}),
    case("stablelm", "serial", include=["ffn_norm", "ffn_norm_bias"], sizes={"rope_dim": 4}),
    case("stablelm", "serial-with-biases", include=["ffn_norm", "ffn_norm_bias", *BIASES[:3]]),
    case(
        "stablelm",
        "parallel-with-head-norms",
        include=["attn_q_norm", "attn_k_norm"],
        keys={"use_parallel_residual": True},
        sizes={**WIDE, "rope_dim": 16},
    ),
]

WEIGHT_TYPES = sorted(QTYPES)


def at_positions(logits: NDArray[np.float32]) -> NDArray[np.float32]:
    return logits[[length - 1 for length in POSITIONS]]


def compare(model: Path, oracle: Path) -> Difference:
    """mortice on `model` against llama.cpp on `oracle`."""
    with LlamaCpp(oracle, context=CONTEXT) as llama:
        rows = [llama.after(IDS[:length], VOCAB) for length in POSITIONS]
    with open_reference(model, CONTEXT) as pipeline:
        logits = pipeline.logits(IDS)
    assert len(set(logits.argmax(axis=1).tolist())) > 50, "the model says the same everywhere: nothing is compared"
    return difference(rows, at_positions(logits))


@pytest.mark.parametrize(("arch", "arguments"), CASES)
def test_log_probabilities_are_those_of_llamacpp(arch: str, arguments: dict[str, Any], tmp_path: Path) -> None:
    path = write_tiny_model(tmp_path / "model.gguf", CONTRACTS[arch], **arguments)
    found = compare(path, path)
    print(f"\nmean {found.mean:.1e}, worst {found.worst:.1e}")
    assert found.mean <= 1e-3
    assert found.worst <= 1e-2


def test_yarn_betas_of_the_file_are_those_llamacpp_is_told(tmp_path: Path) -> None:
    """llama.cpp reads these two keys for some families only, so it is told them apart."""
    betas = {"llama.rope.scaling.yarn_beta_fast": 16.0, "llama.rope.scaling.yarn_beta_slow": 2.0}
    yarn = {f"llama.{key}": value for key, value in YARN.items()}
    path = write_tiny_model(tmp_path / "model.gguf", CONTRACTS["llama"], sizes=WIDE, metadata={**yarn, **betas})
    with LlamaCpp(path, context=CONTEXT, yarn_betas=(16.0, 2.0)) as llama:
        rows = [llama.after(IDS[:length], VOCAB) for length in POSITIONS]
    with open_reference(path, CONTEXT) as pipeline:
        found = difference(rows, at_positions(pipeline.logits(IDS)))
    assert found.worst <= 1e-2


@pytest.mark.parametrize("qtype", WEIGHT_TYPES)
def test_weights_of_every_type_mean_what_they_mean_to_llamacpp(qtype: str, tmp_path: Path) -> None:
    path = write_tiny_model(
        tmp_path / "model.gguf",
        CONTRACTS["llama"],
        qtypes=qtype,
        sizes={"hidden_size": 256, "ffn_size": 512, "num_layers": 1},
    )
    exact = compare(path, expanded(path))
    # llama.cpp's own dequantisation, with activations rounded to 8 bits: near, and far from what a wrong one gives
    rounded = compare(path, path)
    print(f"\nmean {exact.mean:.1e}, worst {exact.worst:.1e}; quantised: {rounded.mean:.1e}, {rounded.worst:.1e}")
    assert exact.mean <= 1e-3
    assert exact.worst <= 1e-2
    assert rounded.mean <= 0.3


@pytest.mark.parametrize("qtype", ["Q8_0", "Q4_K"])
@pytest.mark.parametrize("arch", sorted(CONTRACTS))
def test_every_family_runs_with_quantised_weights(arch: str, qtype: str, tmp_path: Path) -> None:
    path = write_tiny_model(
        tmp_path / "model.gguf",
        CONTRACTS[arch],
        qtypes=qtype,
        sizes={"hidden_size": 256, "ffn_size": 512, **({"logit_scale": 2.0} if arch == "granite" else {})},
        metadata=NAMED,
    )
    found = compare(path, expanded(path))
    print(f"\nmean {found.mean:.1e}, worst {found.worst:.1e}")
    assert found.mean <= 1e-3
    assert found.worst <= 1e-2


@pytest.mark.parametrize("qtype", ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "IQ4_NL", "MXFP4"])
@pytest.mark.parametrize(("width", "heads", "kv_heads"), [(576, 9, 3), (896, 14, 2)])
def test_widths_that_256_does_not_divide(qtype: str, width: int, heads: int, kv_heads: int, tmp_path: Path) -> None:
    path = write_tiny_model(
        tmp_path / "model.gguf",
        CONTRACTS["llama"],
        qtypes=qtype,
        tied=False,
        sizes={"hidden_size": width, "num_heads": heads, "num_kv_heads": kv_heads, "ffn_size": width, "num_layers": 1},
    )
    found = compare(path, expanded(path))
    assert found.mean <= 1e-3
    assert found.worst <= 1e-2


def test_a_file_that_mixes_types_uses_each_tensors_own(tmp_path: Path) -> None:
    types = {
        "default": "Q4_K",
        "attn_v": "Q6_K",
        "ffn_down": "Q5_0",
        "attn_output": "Q8_0",
        "token_embd": "Q6_K",
        "output": "F16",
    }
    path = write_tiny_model(
        tmp_path / "model.gguf",
        CONTRACTS["llama"],
        qtypes=types,
        tied=False,
        sizes={"hidden_size": 256, "ffn_size": 512},
    )
    assert compare(path, expanded(path)).worst <= 1e-2


# one program, many ways through it -------------------------------------------------------------------------------


@pytest.fixture(params=sorted(CONTRACTS))
def pipeline(request: pytest.FixtureRequest, tmp_path: Path) -> Any:
    path = write_tiny_model(tmp_path / "model.gguf", CONTRACTS[request.param], sizes={"num_layers": 3})
    with open_reference(path, CONTEXT) as opened:
        yield opened


def test_prefill_token_by_token_and_chunks_of_any_size_give_the_same_logits(pipeline: mortice.Pipeline) -> None:
    whole = pipeline.logits(IDS)
    for sizes in ([1] * len(IDS), [7] * 57 + [1], [1, 399], [399, 1], [100, 1, 1, 1, 200, 97]):
        assert sum(sizes) == len(IDS)
        with pipeline.session() as session:
            starts = np.cumsum([0, *sizes[:-1]])
            parts = [
                session.feed(IDS[start : start + size], logits="all") for start, size in zip(starts, sizes, strict=True)
            ]
        assert np.abs(np.concatenate(parts) - whole).max() <= 1e-3


def test_sequences_of_different_lengths_in_one_step_do_not_touch_one_another(pipeline: mortice.Pipeline) -> None:
    whole = pipeline.logits(IDS)
    lengths = (1, 40, 300)
    sessions = [pipeline.session() for _ in lengths]
    for session, length in zip(sessions, lengths, strict=True):
        session.feed(IDS[:length])
    parts = [
        StepPart(sequence=session.sequence, token_ids=IDS[length : length + 3], logits="all")
        for session, length in zip(sessions, lengths, strict=True)
    ]
    rows = pipeline.runtime.step(parts)
    wanted = np.concatenate([whole[length : length + 3] for length in lengths])
    assert np.abs(rows - wanted).max() <= 1e-3
    for session in sessions:
        session.close()


def test_a_truncated_sequence_goes_on_as_if_the_rest_had_never_been(pipeline: mortice.Pipeline) -> None:
    with pipeline.session() as session:
        session.feed(IDS[:50] + IDS[::-1][:200])
        session.rewind_to(IDS)
        assert session.sequence.length == 50
        whole = pipeline.logits(IDS)
        assert np.abs(session.feed(IDS[50:], logits="all") - whole[50:]).max() <= 1e-3
