"""Mistakes that other systems of this kind have made, one test for each, numbered as in the list of traps.

A test fails when its rule is broken. Numbers 20 to 24 and 32 are about a GPU (arena and graph, positions in a captured
graph, work inside a capture, streams, quantised activations, a capture that failed): ``tests/gpu/test_lifetimes.py``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from attrs import evolve
from numpy.typing import NDArray

import mortice
from mortice.core.config_layers import read_config
from mortice.core.errors import ConfigError, InputError, UnknownArchitectureError, UnsupportedError, ValidationError
from mortice.core.model.operators import AddBias, Attention, Buffer, Linear, Norm, Operator, Rope
from mortice.core.model.program import Program, build_program
from mortice.core.model.qtypes import GGML_TYPES
from mortice.core.model.types import TensorView
from mortice.core.model.validation import validate
from mortice.core.model.weight_plan import plan_weights
from mortice.core.plugin.interfaces import StepPart
from mortice.core.stages import open_file
from mortice.core.testing.gguf_files import TensorData
from mortice.core.testing.vocabulary import tiny_vocabulary
from mortice.core.text.detokenizer import IncrementalDetokenizer
from mortice.plugins.executors.reference.runtime import ReferenceRuntime
from tests.support.tiny import (
    CONTRACTS,
    FUSED_WITH_BIAS_AND_NORM,
    IDS,
    QTYPES,
    REGISTRY,
    expanded,
    logits,
    program_of,
    rewritten,
    tiny,
    without,
)


def dequantize(name: str, block: Sequence[int]) -> NDArray[np.float32]:
    values: NDArray[np.float32] = QTYPES[name].dequantize(np.array([block], np.uint8))[0]
    return values


# how weights are stored ------------------------------------------------------------------------------------------


def test_trap_01_each_tensor_is_read_as_its_own_type(tmp_path: Path) -> None:
    types = {"default": "Q4_0", "attn_v": "Q5_0", "ffn_down": "Q6_K", "attn_q": "Q4_K", "token_embd": "Q8_0"}
    path = tiny(tmp_path, qtypes=types, sizes={"hidden_size": 256, "ffn_size": 256})
    np.testing.assert_array_equal(logits(path), logits(expanded(path)))


def test_trap_02_a_type_that_nothing_serves_is_refused_with_tensor_and_type(tmp_path: Path) -> None:
    with open_file(REGISTRY, tiny(tmp_path, qtypes={"ffn_up": "Q5_1"})) as file:
        model = validate(file, CONTRACTS["llama"]).model()
        executor = REGISTRY.executor("reference")
        kernels = [kernel for kernel in REGISTRY.kernels(executor, executor.device()) if kernel.qtype != "Q5_1"]
        with pytest.raises(UnsupportedError, match=r"blk\.\{0\.\.1\}\.ffn_up\.weight.*Q5_1"):
            plan_weights(model, build_program(model), kernels)


def test_trap_03_types_of_equal_size_are_told_apart_by_the_file_alone(tmp_path: Path) -> None:
    assert GGML_TYPES[2].block_bytes == GGML_TYPES[20].block_bytes
    path = tiny(tmp_path, qtypes={"ffn_up": "Q4_0"})

    def as_iq4_nl(tensor: TensorData) -> list[TensorData]:
        return [evolve(tensor, qtype=GGML_TYPES[20]) if tensor.qtype.name == "Q4_0" else tensor]

    named = rewritten(path, as_iq4_nl)
    with open_file(REGISTRY, named) as file:
        assert file.tensors["blk.0.ffn_up.weight"].qtype.name == "IQ4_NL"
    assert np.abs(logits(named) - logits(path)).max() > 0.1


def test_trap_04_bytes_that_disagree_with_shape_and_type_are_no_tensor(tmp_path: Path) -> None:
    data = np.zeros(35, np.uint8)
    with pytest.raises(AssertionError, match="disagree"):
        TensorView(name="t", shape=(1, 32), qtype=GGML_TYPES[8], data=data, offset=0, path=tmp_path)
    path = tiny(tmp_path)
    path.write_bytes(path.read_bytes()[:-64])
    with pytest.raises(InputError, match=r"output_norm|bytes"):
        open_file(REGISTRY, path)


@pytest.mark.parametrize("qtype", ["F32", "F16", "BF16"])
def test_trap_05_an_unquantised_head_is_read_as_what_it_is(qtype: str, tmp_path: Path) -> None:
    path = tiny(tmp_path, qtypes={"default": "Q8_0", "output": qtype}, tied=False)
    found = logits(path)
    np.testing.assert_array_equal(found, logits(expanded(path)))
    assert 1 < found.std() < 10


def test_trap_06_low_nibbles_of_q4_0_are_the_first_sixteen() -> None:
    nibbles = [low | (15 - low) << 4 for low in range(16)]
    wanted = [low - 8 for low in range(16)] + [7 - low for low in range(16)]
    assert dequantize("Q4_0", [0x00, 0x3C, *nibbles]).tolist() == wanted


@pytest.mark.parametrize(("qtype", "start", "zero"), [("Q5_0", [0, 0x3C], 16), ("Q5_1", [0, 0x3C, 0, 0], 0)])
def test_trap_06_low_nibbles_and_low_high_bits_of_q5_are_the_first_sixteen(
    qtype: str, start: list[int], zero: int
) -> None:
    nibbles = [low | (15 - low) << 4 for low in range(16)]
    fifth_bits = [0xFF, 0xFF, 0, 0]  # set in elements 0 to 15 only
    wanted = [low + 16 - zero for low in range(16)] + [15 - low - zero for low in range(16)]
    assert dequantize(qtype, [*start, *fifth_bits, *nibbles]).tolist() == wanted


@pytest.mark.parametrize("width", [576, 896])
def test_trap_07_blocks_belong_to_rows_at_widths_that_256_does_not_divide(width: int, tmp_path: Path) -> None:
    sizes = {"hidden_size": width, "num_heads": width // 64, "num_kv_heads": 1, "ffn_size": width, "num_layers": 1}
    path = tiny(tmp_path, qtypes="Q5_0", sizes=sizes)
    np.testing.assert_array_equal(logits(path), logits(expanded(path)))
    with pytest.raises(ValueError, match=rf"{width} is not a multiple"):
        tiny(tmp_path, qtypes="Q4_K", sizes=sizes)


def test_trap_08_type_ids_and_blocks_are_those_of_ggml() -> None:
    ours = {qtype.id: (qtype.name, qtype.block_elements, qtype.block_bytes) for qtype in GGML_TYPES.values()}
    theirs = {
        int(type_): (type_.name, *gguf.GGML_QUANT_SIZES[type_])
        for type_ in gguf.GGMLQuantizationType
        if int(type_) in ours
    }
    assert ours == theirs
    assert all(GGML_TYPES[type_.qtype.id] == type_.qtype for type_ in QTYPES.values())


def test_trap_09_extents_are_reversed_in_the_file_and_bytes_are_not(tmp_path: Path) -> None:
    path = tiny(tmp_path, sizes={"ffn_size": 96})
    stored = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}["blk.0.ffn_up.weight"]
    assert stored.shape.tolist() == [64, 96]
    with open_file(REGISTRY, path) as file:
        tensor = file.tensors["blk.0.ffn_up.weight"]
        assert tensor.shape == (96, 64)
        assert tensor.data.tobytes() == stored.data.tobytes()
    linear = next(
        operator for operator in program_of(path, CONTRACTS["llama"]).operators if operator.name == "layers.0.ffn_up"
    )
    assert isinstance(linear, Linear)
    assert (linear.src.width, linear.out.width) == (64, 96)


# what a family is ------------------------------------------------------------------------------------------------


def test_trap_10_a_bias_counts_and_one_that_is_missing_or_does_not_fit_is_an_error(tmp_path: Path) -> None:
    plain, biased = tiny(tmp_path, "qwen2"), tiny(tmp_path, "qwen2", gains={"attn_v_bias": 20})
    assert np.abs(logits(plain) - logits(biased)).max() > 0.1
    with pytest.raises(ValidationError, match=r"blk\.1\.attn_k\.bias: missing"):
        logits(without(plain, "blk.1.attn_k.bias"))

    def cut(tensor: TensorData) -> list[TensorData]:
        short = TensorData.f32(tensor.name, np.zeros(31, np.float32))
        return [short if tensor.name == "blk.0.attn_k.bias" else tensor]

    with pytest.raises(ValidationError, match=r"blk\.0\.attn_k\.bias: shape \(31\)"):
        logits(rewritten(plain, cut))


def test_trap_11_fused_qkv_and_its_bias_are_cut_by_query_and_kv_widths(tmp_path: Path) -> None:
    contract = FUSED_WITH_BIAS_AND_NORM
    fused = tiny(tmp_path, contract, include=["attn_qkv", "attn_qkv_bias"])
    widths = {"attn_q": 64, "attn_k": 32, "attn_v": 32}

    def apart(tensor: TensorData) -> list[TensorData]:
        if ".attn_qkv." not in tensor.name:
            return [tensor]
        values = tensor.data.view(np.float32).reshape(tensor.shape)
        edges = np.cumsum(list(widths.values()))[:-1]
        pieces = zip(widths, np.split(values, edges), strict=True)
        return [TensorData.f32(tensor.name.replace("attn_qkv", name), piece) for name, piece in pieces]

    separate = rewritten(fused, apart)
    np.testing.assert_allclose(logits(fused, contract), logits(separate, contract), atol=1e-4)


def chain(program: Program, name: str) -> list[Operator]:
    """The operators from `name` on, each the only reader of the one before."""
    found = [next(operator for operator in program.operators if operator.name == name)]
    while True:
        readers = [operator for operator in program.operators if found[-1].outputs[0] in operator.inputs]
        if len(readers) != 1 or not readers[0].outputs:
            return found
        found.append(readers[0])


@pytest.mark.parametrize("role", ["attn_q", "attn_k"])
def test_trap_12_qk_norm_stands_between_bias_and_rope(role: str, tmp_path: Path) -> None:
    contract = FUSED_WITH_BIAS_AND_NORM
    path = tiny(tmp_path, contract, include=["attn_qkv", "attn_qkv_bias"])
    kinds = [type(operator) for operator in chain(program_of(path, contract), f"layers.0.{role}")]
    assert kinds[:4] == [Linear, AddBias, Norm, Rope]


def test_trap_13_head_dim_is_the_files_and_the_cache_has_it_too(tmp_path: Path) -> None:
    path = tiny(tmp_path, "qwen3", sizes={"head_dim": 32})
    program = program_of(path, CONTRACTS["qwen3"])
    attention = next(operator for operator in program.operators if isinstance(operator, Attention))
    assert (program.hidden_size, attention.head_dim, attention.src.width) == (64, 32, 128)
    assert [(shape.num_kv_heads, shape.head_dim) for shape in program.kv] == [(2, 32), (2, 32)]
    assert attention.scale == pytest.approx(32**-0.5)


@pytest.mark.parametrize(("arch", "style"), [("llama", "adjacent"), ("qwen2", "halves"), ("qwen3", "halves")])
def test_trap_14_rope_style_is_the_contracts_whatever_the_scaling(arch: str, style: str, tmp_path: Path) -> None:
    keys = {f"{arch}.rope.scaling.type": "yarn", f"{arch}.rope.scaling.factor": 2.0}
    for metadata in ({}, keys):
        program = program_of(tiny(tmp_path, arch, metadata=metadata), CONTRACTS[arch])
        ropes = [operator for operator in program.operators if isinstance(operator, Rope)]
        assert {rope.style for rope in ropes} == {style}
        assert all((rope.scaling is not None) == bool(metadata) for rope in ropes)


def test_trap_14_a_scaling_that_is_not_known_is_refused_and_factors_are_their_own_thing(tmp_path: Path) -> None:
    with pytest.raises(ValidationError, match=r"llama\.rope\.scaling\.type.*longrope"):
        tiny(tmp_path, metadata={"llama.rope.scaling.type": "longrope", "llama.rope.scaling.factor": 2.0})
    plain, factors = logits(tiny(tmp_path)), logits(tiny(tmp_path, include=["rope_freqs"]))
    np.testing.assert_allclose(plain[0], factors[0], atol=1e-4)
    assert np.abs(plain[1:] - factors[1:]).max(axis=1).min() > 1e-3


@pytest.mark.parametrize("arch", ["llama", "qwen2", "qwen3"])
def test_trap_15_prefill_decode_and_batch_are_the_same_program(arch: str, tmp_path: Path) -> None:
    with mortice.load(tiny(tmp_path, arch), executor="reference") as pipeline:
        whole = pipeline.logits(IDS)
        decoding, other = pipeline.session(), pipeline.session()
        decoding.feed(IDS[:1])
        for place, token in enumerate(IDS[1:], start=1):
            parts = [
                StepPart(sequence=decoding.sequence, token_ids=[token]),
                StepPart(sequence=other.sequence, token_ids=IDS[place - 1 : place]),
            ]
            found = pipeline.runtime.step(parts)
            np.testing.assert_allclose(found, whole[[place, place - 1]], atol=1e-3)


def test_trap_16_names_are_exact(tmp_path: Path) -> None:
    path = tiny(tmp_path)
    head = next(operator for operator in program_of(path, CONTRACTS["llama"]).operators if operator.name == "output")
    assert [weight.tensor for weight in head.weights] == ["token_embd.weight"]

    def repeated(tensor: TensorData) -> list[TensorData]:
        return [tensor, evolve(tensor, name=f"not_{tensor.name}")] if tensor.name == "output_norm.weight" else [tensor]

    renamed = rewritten(path, repeated)
    with pytest.raises(ValidationError, match=r"not_output_norm\.weight: no role"):
        logits(renamed)


def test_trap_17_end_tokens_and_bos_come_from_the_file(tmp_path: Path) -> None:
    for eos in (7, 300):
        keys = {**tiny_vocabulary(add_bos=eos == 300), "tokenizer.ggml.eos_token_id": eos}
        with mortice.load(tiny(tmp_path, tokenizer=keys), executor="reference") as pipeline:
            assert eos in pipeline.tokenizer.stop_ids
            assert 151645 not in pipeline.tokenizer.stop_ids
            assert (pipeline.encode("fit")[0] == pipeline.tokenizer.bos_id) == (eos == 300)
            pieces = list(pipeline.generate([1, 2], max_tokens=8, logit_bias={eos: 100.0}))
            assert [(piece.id, piece.finish_reason) for piece in pieces] == [(eos, "stop")]


# running ---------------------------------------------------------------------------------------------------------


def test_trap_18_a_sequence_is_as_long_as_what_was_fed_not_as_its_memory(tmp_path: Path) -> None:
    with mortice.load(tiny(tmp_path), executor="reference") as pipeline:
        fresh = pipeline.logits(IDS)
        with pipeline.session() as session:
            session.feed([*IDS[::-1]] * 8)
            assert session.sequence.length == 8 * len(IDS)
            session.sequence.truncate(0)
            assert session.sequence.length == 0
            one_by_one = np.concatenate([session.feed([token]) for token in IDS])
            np.testing.assert_allclose(one_by_one, fresh, atol=1e-4)
        assert pipeline.session().sequence.length == 0


@pytest.mark.parametrize("arch", ["llama", "qwen2", "qwen3"])
def test_trap_19_every_buffer_is_written_once_before_it_is_read_and_never_changed(arch: str, tmp_path: Path) -> None:
    path = tiny(tmp_path, arch)
    written = set[Buffer]()
    for operator in program_of(path, CONTRACTS[arch]).operators:
        assert written.issuperset(operator.inputs), operator.name
        assert written.isdisjoint(operator.outputs), operator.name
        written.update(operator.outputs)
    with mortice.load(path, executor="reference") as pipeline:
        wanted = pipeline.logits(IDS)
        runtime = pipeline.runtime
        assert isinstance(runtime, ReferenceRuntime)
        runtime._plan = [evolve(bound, run=read_only(bound.run)) for bound in runtime._plan]
        np.testing.assert_array_equal(pipeline.logits(IDS), wanted)


def read_only(run: Callable[..., tuple[NDArray[np.float32], ...]]) -> Callable[..., tuple[NDArray[np.float32], ...]]:
    """`run`, with results that nobody can write into afterwards."""

    def wrapped(step: Any, inputs: Any) -> tuple[NDArray[np.float32], ...]:
        results = run(step, inputs)
        for result in results:
            result.flags.writeable = False
        return results

    return wrapped


def test_trap_25_epsilon_is_the_files_and_has_no_default(tmp_path: Path) -> None:
    path = tiny(tmp_path, sizes={"norm_eps": 1e-6})
    norms = [operator for operator in program_of(path, CONTRACTS["llama"]).operators if isinstance(operator, Norm)]
    assert [norm.eps for norm in norms] == pytest.approx([1e-6] * 5)
    assert np.abs(logits(path) - logits(tiny(tmp_path, sizes={"norm_eps": 0.5}))).max() > 0.1
    with open_file(REGISTRY, path) as file:
        metadata = {key: value for key, value in file.metadata.items() if "epsilon" not in key}
        findings = validate(evolve(file, metadata=metadata), CONTRACTS["llama"]).findings
    assert [finding.subject for finding in findings.errors] == ["llama.attention.layer_norm_rms_epsilon"]


def test_trap_26_a_missing_ffn_norm_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValidationError, match=r"blk\.0\.ffn_norm\.weight: missing"):
        logits(without(tiny(tmp_path), "blk.0.ffn_norm.weight"))


def test_trap_27_position_0_alone_would_not_notice_that_rope_is_gone(tmp_path: Path) -> None:
    roles = {role: spec for role, spec in CONTRACTS["llama"].global_roles.items() if role != "rope_freqs"}
    no_rope = evolve(CONTRACTS["llama"], name="no-rope", architectures=("no-rope",), rope=None, global_roles=roles)
    with_rope, without_rope = logits(tiny(tmp_path)), logits(tiny(tmp_path, no_rope), no_rope)
    np.testing.assert_allclose(with_rope[0], without_rope[0], atol=1e-4)
    assert np.abs(with_rope[1:] - without_rope[1:]).max(axis=1).min() > 1e-2


def test_trap_28_an_unknown_architecture_is_refused_with_the_nearest_and_how_to_add_it(tmp_path: Path) -> None:
    path = tiny(tmp_path, architecture="qwen33")
    with pytest.raises(UnknownArchitectureError, match=r"qwen33.*nearest.*qwen3.*--contract"):
        logits(path)


# text and settings -----------------------------------------------------------------------------------------------


def test_trap_29_no_piece_of_a_stream_has_half_a_character(tmp_path: Path) -> None:
    text = "é中🙂"
    with mortice.load(tiny(tmp_path), executor="reference") as pipeline:
        wanted = pipeline.tokenizer.encode(text)
        assert len(wanted) == len(text.encode())
        prompt, pieces = [1, 2], []
        for token in wanted:
            pieces += list(pipeline.generate(prompt, max_tokens=1, temperature=0.0, logit_bias={token: 1000.0}))
        assert [piece.id for piece in pieces] == wanted
        detokenizer = IncrementalDetokenizer(pipeline.tokenizer)
        shown = [detokenizer.push(token) for token in wanted]
    assert shown == ["", "é", "", "", "中", "", "", "", "🙂"]


def test_trap_30_options_act_or_are_refused(tmp_path: Path) -> None:
    with mortice.load(tiny(tmp_path), executor="reference") as pipeline:

        def ids(**options: Any) -> list[int]:
            return [piece.id for piece in pipeline.generate([1, 2, 3], max_tokens=12, **options)]

        greedy = ids(temperature=0.0)
        assert ids(temperature=5.0, seed=1) == ids(temperature=5.0, seed=1) != ids(temperature=5.0, seed=2)
        assert ids(temperature=5.0, seed=1, top_p=1e-6) == greedy != ids(temperature=5.0, seed=1)
        assert ids(temperature=5.0, seed=1, top_k=1) == greedy
        text = [piece.text for piece in pipeline.generate([1, 2, 3], max_tokens=12, temperature=0.0)]
        stop = next(piece for piece in text[2:] if piece and "\ufffd" not in piece)
        stopped = list(pipeline.generate([1, 2, 3], max_tokens=12, temperature=0.0, stop=(stop,)))
        assert stopped[-1].stop_reason == stop
        with pytest.raises(ConfigError, match="best_of"):
            ids(best_of=4)


def test_trap_31_an_environment_variable_sets_the_key_of_its_name_and_nothing_else(tmp_path: Path) -> None:
    file = tmp_path / "run.toml"
    file.write_text("[executor]\ncontext = 64\n")
    assert read_config(file, {}).executor.context == 64
    assert read_config(file, {"MORTICE_EXECUTOR_CONTEXT": "128"}).executor.context == 128
    assert read_config(file, {"CONTEXT": "128", "CUDA_GRAPH": "0"}) == read_config(file, {})
    with pytest.raises(ConfigError, match="MORTICE_EXECUTOR_CONTEX"):
        read_config(file, {"MORTICE_EXECUTOR_CONTEX": "128"})


def test_trap_33_a_tied_head_is_the_embedding_and_is_kept_once(tmp_path: Path) -> None:
    tied, untied = tiny(tmp_path), tiny(tmp_path, tied=False)
    with mortice.load(tied, executor="reference") as pipeline:
        names = [planned.tensor.name for planned in pipeline.plan.weights]
        assert names.count("token_embd.weight") == 1
        head = pipeline.program.operators[-1]
        assert [weight.tensor for weight in head.weights] == ["token_embd.weight"]
        tied_bytes = pipeline.plan.arena_bytes
    with mortice.load(untied, executor="reference") as pipeline:
        assert pipeline.plan.arena_bytes == tied_bytes + 4 * 512 * 64
