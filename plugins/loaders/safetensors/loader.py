"""Opening a Hugging Face folder: its JSON files become GGUF's metadata, its safetensors files GGUF's tensors."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from itertools import islice
from pathlib import Path
from types import MappingProxyType

import numpy as np
from attrs import frozen

from mortice.core.errors import ModelFileError
from mortice.core.model.findings import Finding
from mortice.core.model.mapped_file import MappedFile, map_file
from mortice.core.model.qtypes import GGML_TYPES
from mortice.core.model.types import LoadOptions, MetadataValue, ModelFile, TensorView
from mortice.plugins.loaders.safetensors.config import Hyperparameters, read_config
from mortice.plugins.loaders.safetensors.files import Json, quoted, read_json
from mortice.plugins.loaders.safetensors.folder import CONFIG, INDEX, SINGLE, model_folder
from mortice.plugins.loaders.safetensors.header import Entry, Header, read_header
from mortice.plugins.loaders.safetensors.names import gguf_name, is_computed, rotated_heads
from mortice.plugins.loaders.safetensors.shards import check_index, weight_files
from mortice.plugins.loaders.safetensors.special import SpecialFiles, special_keys, template_keys
from mortice.plugins.loaders.safetensors.tensors import require_weights, tensor_view
from mortice.plugins.loaders.safetensors.tokenizer import read_tokenizer

__all__ = ["open_folder"]

_TOKENIZER = "tokenizer.json"
_FILE_TYPES = {"F32": 0, "F16": 1, "BF16": 32}
"""Values of ``general.file_type`` (``llama_ftype`` in llama.h)."""
_NAMED = 4
"""Most missing tensors that a message names."""


@frozen
class _Part:
    """A safetensors file that is mapped and whose header has been read."""

    mapped: MappedFile
    header: Header


@frozen
class _Chosen:
    """A tensor that is used: in which file, and in how many heads its rows change places."""

    part: _Part
    entry: Entry
    heads: int


def open_folder(path: Path, options: LoadOptions) -> ModelFile | None:
    """Open a folder with ``config.json`` and safetensors files, or such a folder by one of these files.

    Headers and JSON files are read and checked; of tensor data nothing is read. Which tensors are views and which are
    made row by row is told in `tensors`.

    Returns:
        The model; or None when the path is neither a folder with a ``config.json`` or weights, nor a file named
        ``*.safetensors``.

    Raises:
        ModelFileError: when it is such a folder, and cannot be read, is broken or is of a family that is not read.

    """
    folder = model_folder(path)
    if folder is None:
        return None
    _require_config(folder, path)
    config = read_json(folder / CONFIG)
    found = read_config(config)
    special = SpecialFiles.of(folder, config)
    metadata = _metadata(folder, found, special)
    with ExitStack() as stack:
        paths, weight_map = weight_files(folder)
        parts = [_open_part(file, stack) for file in paths]
        if weight_map is not None:
            check_index(folder, [part.header for part in parts], weight_map)
        notes: list[Finding] = []
        chosen = _chosen(parts, found, folder, options, notes)
        metadata |= _file_type(chosen)
        tensors = _views(chosen, found, folder / CONFIG)
        # Views first: a mapping cannot be closed while they refer to it.
        stack.callback(tensors.clear)
        close = stack.pop_all().close
    index = () if weight_map is None else (folder / INDEX,)
    tokenizer = (folder / _TOKENIZER,) if (folder / _TOKENIZER).exists() else ()
    return ModelFile(
        path=folder,
        format="safetensors",
        version="1",  # the format has had one version and does not say it
        metadata=MappingProxyType(metadata),
        tensors=MappingProxyType(tensors),
        files=(folder / CONFIG, *index, *paths, *tokenizer, *special.paths),
        notes=tuple(notes),
        close=close,
    )


def _require_config(folder: Path, path: Path) -> None:
    """Refuse weights without a config in words that tell what a folder has to have."""
    if (folder / CONFIG).exists():
        return
    weights = path.name if path != folder else SINGLE if (folder / SINGLE).exists() else INDEX
    raise ModelFileError(folder, f"{CONFIG} is missing beside {weights}")


def _open_part(path: Path, stack: ExitStack) -> _Part:
    """Map a file and read its header; the mapping is closed with `stack`."""
    mapped = map_file(path, "a safetensors file", stack)
    return _Part(mapped, read_header(path, mapped.data))


def _chosen(
    parts: Sequence[_Part], found: Hyperparameters, folder: Path, options: LoadOptions, notes: list[Finding]
) -> dict[str, _Chosen]:
    """The tensors that are used, by GGUF name; those that are not are noted. Nothing can go wrong with them later."""
    chosen: dict[str, _Chosen] = {}
    for part in parts:
        for entry in part.header.entries:
            name = gguf_name(entry.name)
            reason = ""
            if is_computed(entry.name):
                reason = "a table that follows from config.json"
            elif name == "output.weight" and found.tied:
                reason = "tie_word_embeddings is true: the head is the embedding"
            if reason:
                notes.append(_unread(part.header.path, entry, reason))
                continue
            require_weights(entry, part.header.path, options.qtypes)
            if name in chosen:
                message = f"tensor {quoted(entry.name)} and another are both {name}"
                raise ModelFileError(part.header.path, message, entry.start)
            heads = rotated_heads(name, found.num_heads, found.num_kv_heads) if found.family.adjacent_rope else 0
            chosen[name] = _Chosen(part, entry, heads)
    if found.tied is False and "output.weight" not in chosen:
        raise ModelFileError(folder / CONFIG, "tie_word_embeddings is false, but no tensor 'lm_head.weight' is there")
    _require_biases(chosen, found, folder / CONFIG)
    return chosen


def _require_biases(chosen: Mapping[str, _Chosen], found: Hyperparameters, config: Path) -> None:
    """Refuse a model that lost biases: contracts have them as optional, only the config tells that they were there."""
    for key, modules in found.biased.items():
        wanted = (f"model.layers.{layer}.{module}.bias" for layer in range(found.num_layers) for module in modules)
        # the number of layers is the file's word: no more is looked for than the message names
        missing = list(islice((name for name in wanted if gguf_name(name) not in chosen), _NAMED + 1))
        if missing:
            names = ", ".join(map(quoted, missing[:_NAMED])) + (", …" if len(missing) > _NAMED else "")
            raise ModelFileError(config, f"{key} is true, but these tensors are in no file: {names}")


def _unread(path: Path, entry: Entry, reason: str) -> Finding:
    return Finding(
        rule="safetensors.unread",
        severity="note",
        subject=entry.name,
        found=f"{entry.dtype} in {path.name}, not read",
        wanted=reason,
        offset=entry.start,
    )


def _views(chosen: Mapping[str, _Chosen], found: Hyperparameters, config: Path) -> dict[str, TensorView]:
    """Views by GGUF name, and the one tensor that is a setting in ``config.json``."""
    views = {
        name: tensor_view(each.entry, name, each.part.header.path, each.part.mapped, heads=each.heads)
        for name, each in chosen.items()
    }
    if found.rope_freqs is not None:
        data = found.rope_freqs.view(np.uint8)
        data.flags.writeable = False
        name = "rope_freqs.weight"
        shape = found.rope_freqs.shape
        views[name] = TensorView(name=name, shape=shape, qtype=GGML_TYPES[0], data=data, offset=0, path=config)
    return views


def _file_type(chosen: Mapping[str, _Chosen]) -> dict[str, MetadataValue]:
    """``general.file_type``: the type that most bytes have."""
    counts: Counter[str] = Counter()
    for each in chosen.values():
        counts[each.entry.dtype] += each.entry.nbytes
    return {"general.file_type": _FILE_TYPES[max(counts, key=counts.__getitem__)]} if counts else {}


def _metadata(folder: Path, found: Hyperparameters, special: SpecialFiles) -> dict[str, MetadataValue]:
    """GGUF's keys. Without ``tokenizer.json`` there are none for text, which validation says."""
    metadata = dict(found.keys)
    metadata["general.name"] = _name(folder, special.config)
    if (folder / _TOKENIZER).exists():
        tokenizer = read_tokenizer(read_json(folder / _TOKENIZER), found.vocab_size)
        metadata |= tokenizer.keys
        metadata |= special_keys(special, tokenizer)
    return metadata | template_keys(special)


def _name(folder: Path, config: Json) -> str:
    """What the model is called: as it was when it was saved, or as its folder is."""
    return config.string("_name_or_path", "").rstrip("/").rpartition("/")[2] or folder.resolve().name
