"""Special tokens, flags and chat templates, which Hugging Face spreads over several files."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from attrs import frozen

from mortice.core.model.types import MetadataValue
from mortice.core.text.vocabulary import PREFIX
from mortice.plugins.loaders.safetensors.files import Json, quoted, read_json, read_text
from mortice.plugins.loaders.safetensors.tokenizer import TokenizerJson

__all__ = ["SpecialFiles", "special_keys", "template_keys"]

_TEMPLATE = "tokenizer.chat_template"
_NAMES = {"bos": "bos", "eos": "eos", "unknown": "unk", "padding": "pad"}
"""GGUF's names for the ids that Hugging Face calls by the second."""


@frozen(eq=False)
class SpecialFiles:
    """The files read here, those that are there.

    Attributes:
        config: ``config.json``.
        tokenizer: ``tokenizer_config.json``.
        generation: ``generation_config.json``.
        template: ``chat_template.jinja``.
        paths: all but ``config.json``.

    """

    config: Json
    tokenizer: Json | None
    generation: Json | None
    template: str | None
    paths: tuple[Path, ...]

    @classmethod
    def of(cls, folder: Path, config: Json) -> SpecialFiles:
        """Read what a folder has of them."""
        paths = []

        def existing(name: str) -> Path | None:
            path = folder / name
            if not path.exists():
                return None
            paths.append(path)
            return path

        tokenizer, generation, template = map(
            existing, ("tokenizer_config.json", "generation_config.json", "chat_template.jinja")
        )
        return cls(
            config,
            read_json(tokenizer) if tokenizer else None,
            read_json(generation) if generation else None,
            read_text(template, 1 << 20) if template else None,
            tuple(paths),
        )


def special_keys(files: SpecialFiles, tokenizer: TokenizerJson) -> dict[str, MetadataValue]:
    """The ``tokenizer.ggml.*_token_id`` and flag keys.

    An id is that of the text in ``tokenizer_config.json``, else the one in ``config.json``. Further end tokens of
    ``generation_config.json`` become those of a turn and of a message.

    Raises:
        ModelFileError: for a text that is no token, or an id of the wrong type.

    """
    keys: dict[str, MetadataValue] = {}
    for name, theirs in _NAMES.items():
        found = _token_id(files, tokenizer, theirs)
        if found is not None:
            keys[f"{PREFIX}{name}_token_id"] = found
    source = files.generation if files.generation and files.generation.has("eos_token_id") else files.config
    others = [token for token in _ids(source, "eos_token_id") if token != keys.get(f"{PREFIX}eos_token_id")]
    keys |= {f"{PREFIX}{name}_token_id": token for name, token in zip(("eot", "eom"), others, strict=False)}
    for name, text in (("bos", tokenizer.first), ("eos", tokenizer.last)):
        token = keys.get(f"{PREFIX}{name}_token_id")
        by_template = bool(text) and tokenizer.ids.get(text) == token
        flag = f"add_{name}_token"
        added = files.tokenizer.boolean(flag, default=by_template) if files.tokenizer else by_template
        keys[PREFIX + flag] = added and token is not None
    return keys


def _token_id(files: SpecialFiles, tokenizer: TokenizerJson, name: str) -> int | None:
    key = f"{name}_token"
    value = files.tokenizer.values.get(key) if files.tokenizer else None
    if files.tokenizer and value is not None:
        text = value.get("content") if isinstance(value, dict) else value
        if not isinstance(text, str) or text not in tokenizer.ids:
            raise files.tokenizer.error(key, f"found {quoted(text)}", "the text of a token")
        return tokenizer.ids[text]
    return next(_ids(files.config, f"{name}_token_id"), None)


def _ids(source: Json, name: str) -> Iterator[int]:
    """A token id, or several in an array."""
    value = source.values.get(name)
    for token in value if isinstance(value, list) else [] if value is None else [value]:
        if not isinstance(token, int) or isinstance(token, bool) or token < 0:
            raise source.error(name, f"found {quoted(token)}", "a token id")
        yield token


def template_keys(files: SpecialFiles) -> dict[str, MetadataValue]:
    """The chat templates: ``chat_template.jinja`` where it is, else what ``tokenizer_config.json`` has."""
    value = files.tokenizer.values.get("chat_template") if files.tokenizer else None
    if files.template is not None:
        return {_TEMPLATE: files.template}
    if value is None:
        return {}
    if isinstance(value, str):
        return {_TEMPLATE: value}
    assert files.tokenizer is not None, "the value is from there"
    if not isinstance(value, list):
        raise files.tokenizer.error("chat_template", f"found {quoted(value)}", "a string or an array of templates")
    keys: dict[str, MetadataValue] = {}
    for place, item in enumerate(value):
        if not isinstance(item, dict):
            raise files.tokenizer.error(f"chat_template[{place}]", f"found {quoted(item)}", "an object")
        entry = Json(files.tokenizer.path, item, f"chat_template[{place}].")
        name = entry.string("name")
        keys[_TEMPLATE if name == "default" else f"{_TEMPLATE}.{name}"] = entry.string("template")
    return keys
