"""Where text is cut into words, for the expressions that llama.cpp only approximates, and for the table itself."""

from __future__ import annotations

import pytest
from tokenizers import Regex, pre_tokenizers

from mortice.core.errors import TokenizerError
from mortice.core.text.pretokenizers import PRE_TOKENIZERS, pre_tokenizer


def cuts(name: str, text: str) -> list[str]:
    steps = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in pre_tokenizer(name).patterns]
    return [word for word, _ in pre_tokenizers.Sequence(steps).pre_tokenize_str(text)]


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("tekken", "helloWorld's ÉTÉ 123", ["hello", "World", "'s", " ÉTÉ", " ", "1", "2", "3"]),
        ("gpt-4o", "helloWorld's ÉTÉ 1234", ["hello", "World's", " ÉTÉ", " ", "123", "4"]),
        ("gpt-4o", "e\u0301a //\n/x", ["e\u0301a", " //\n/", "x"]),
        ("youtu", "한국어漢字 xDEAD 12", ["한국어", "漢字", " x", "DEAD", " ", "1", "2"]),
        ("tiny_aya", "a 1234567", ["a", " ", "1", "234", "567"]),
        ("tiny_aya", "1 12 123 1234 123456", ["1", " ", "12", " ", "123", " ", "1", "234", " ", "123", "456"]),
        ("afmoe", "漢字 12345 ab", ["漢字", " ", "12", "345", " ab"]),
        ("kimi-k2", "漢字xDEAD's 1234", ["漢字", "x", "DEAD's", " ", "123", "4"]),
        ("superbpe", "a1234567b", ["a", "1", "234", "567", "b"]),
        ("gemma4", "a b\n\nc", ["a b", "\n\n", "c"]),
    ],
)
def test_words_are_cut_as_the_models_own_expressions_cut_them(name: str, text: str, words: list[str]) -> None:
    assert cuts(name, text) == words


def test_an_unknown_pre_tokenizer_is_refused_naming_the_known_ones() -> None:
    with pytest.raises(TokenizerError, match=r"tokenizer\.ggml\.pre: unknown .*'lama-bpe'.*llama-bpe.*qwen2"):
        pre_tokenizer("lama-bpe")


@pytest.mark.parametrize("name", sorted(PRE_TOKENIZERS))
def test_cutting_loses_no_character(name: str) -> None:
    text = "Hello World's  12345\r\n\n漢字かな ÄÖ🦙 नमस्ते \t!?…。 x_y(z) \u00a0\u3000end   "
    assert "".join(cuts(name, text)) == text
