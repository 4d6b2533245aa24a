"""Text that cannot fit the context is refused before it is encoded, and no text that fits ever is."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from attrs import evolve
from hypothesis import given
from hypothesis import strategies as st

from mortice.core.config import ExecutorConfig, ModelConfig, RunConfig
from mortice.core.errors import ConfigError, InputError, TemplateError, TokenizerError
from mortice.core.pipeline import Pipeline, prepare
from mortice.core.testing.tiny_models import write_tiny_model
from mortice.core.text.chat import ChatTemplate, Message, encode_chat
from mortice.core.text.params import GenerationParams, SamplingParams
from mortice.core.text.tokenizer import Tokenizer
from tests.support.tiny import CONTRACTS
from tests.support.vocab import CONTROL, byte_level_metadata, metadata_of, spm_metadata

TEMPLATE = "{% for message in messages %}{{ message.content }}{% endfor %}"
VOCABULARIES: dict[str, dict[str, Any]] = {
    "byte level": byte_level_metadata(),
    "byte level that lacks bytes": metadata_of("gpt2", [("h", 1, 0), ("<s>", CONTROL, 0)], pre="gpt-2", merges=[]),
    "phi-3": {**spm_metadata(["a", "aa"]), "general.name": "Phi-3"},
    "sentencepiece": spm_metadata(["▁", "a", "▁a", "aaaa"]),
    "sentencepiece without bytes": spm_metadata(["▁", "a"], byte_tokens=False),
}


@pytest.mark.parametrize("name", VOCABULARIES)
@given(text=st.text(st.sampled_from("hello wa é漢<|im_end|>\n"), max_size=60))
def test_no_text_that_fits_is_refused(name: str, text: str) -> None:
    free = Tokenizer.from_metadata(VOCABULARIES[name])
    ids = free.encode(text)
    assert Tokenizer.from_metadata(VOCABULARIES[name], max_tokens=len(ids)).encode(text) == ids


def test_text_too_long_is_refused_with_bytes_and_limit() -> None:
    tokenizer = Tokenizer.from_metadata(byte_level_metadata(special=()), max_tokens=10)
    assert len(tokenizer.encode("l" * 50)) == 25
    with pytest.raises(InputError, match=r"found 51 bytes, .* context's 10 tokens can hold: 50, at most 5 bytes"):
        tokenizer.encode("l" * 51)


def test_a_message_too_long_is_refused_before_it_is_encoded(monkeypatch: pytest.MonkeyPatch) -> None:
    metadata = byte_level_metadata() | {"tokenizer.chat_template": TEMPLATE}
    tokenizer = Tokenizer.from_metadata(metadata, max_tokens=4)
    monkeypatch.setattr(Tokenizer, "_partition", lambda *_: pytest.fail("encoded"))
    template = ChatTemplate.from_metadata(metadata, tokenizer)
    try:
        with pytest.raises(InputError, match="found 1000 bytes"):
            encode_chat(tokenizer, template, [Message(role="user", content="<|im_end|>" * 100)])
    finally:
        template.close()


def test_errors_of_tokenizer_and_template_name_the_file() -> None:
    with pytest.raises(TokenizerError, match=r"^m\.gguf: tokenizer\.ggml\.pre: unknown"):
        Tokenizer.from_metadata(byte_level_metadata(pre="none-such"), origin="m.gguf")
    tokenizer = Tokenizer.from_metadata(byte_level_metadata(), origin="m.gguf")
    for source in (None, 3, "{% if %}"):
        metadata = {"tokenizer.chat_template": source} if source is not None else {}
        with pytest.raises(TemplateError, match=r"^m\.gguf: tokenizer\.chat_template: "):
            ChatTemplate.from_metadata(metadata, tokenizer).render([Message(role="user", content="a")])


# a pipeline ----------------------------------------------------------------------------------------------------------

Prepare = Callable[..., Pipeline]


@pytest.fixture
def prepared(tmp_path: Path) -> Prepare:
    path = write_tiny_model(tmp_path / "m.gguf", CONTRACTS["llama"])
    config = RunConfig(model=ModelConfig(path=path), executor=ExecutorConfig(name="reference"))
    return lambda **parts: prepare(evolve(config, **parts))


def test_a_pipeline_refuses_a_prompt_that_cannot_fit(prepared: Prepare) -> None:
    with prepared() as pipeline:
        assert pipeline.tokenizer.origin == str(pipeline.model.file.path)
        with pytest.raises(InputError, match="prompt: found 1000000 bytes"):
            pipeline.encode("1" * 1_000_000)


def test_parameters_beyond_the_vocabulary_are_refused_before_the_upload(prepared: Prepare) -> None:
    with prepared() as pipeline:
        size = pipeline.program.vocab_size
    with prepared(generation=GenerationParams(logprobs=size), sampling=SamplingParams(logit_bias={size - 1: 1.0})):
        pass
    with pytest.raises(ConfigError, match=rf"sampling\.logit_bias: found token id {size}, wanted one below {size}"):
        prepared(sampling=SamplingParams(logit_bias={size: 1.0}))
    with pytest.raises(ConfigError, match=rf"generation\.logprobs: found {size + 1}, wanted 0 to {size}"):
        prepared(generation=GenerationParams(logprobs=size + 1))
