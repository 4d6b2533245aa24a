"""Split models: ``name-00001-of-00003.gguf`` and its siblings.

Source: llama.cpp's ``gguf-split``. Every shard carries ``split.no`` (from 0), ``split.count`` and, for all
shards together, ``split.tensors.count``; the first shard alone carries the model's own metadata.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from attrs import frozen

from mortice.core.errors import ModelFileError
from mortice.plugins.loaders.gguf.parser import Header
from mortice.plugins.loaders.gguf.reader import quoted

__all__ = ["ShardName", "check_agreement", "shard_paths"]

_NAME = re.compile(r"(?P<stem>.+)-(?P<number>[0-9]{5})-of-(?P<count>[0-9]{5})\.gguf", re.DOTALL)


@frozen
class ShardName:
    """What a shard's file name says.

    Attributes:
        stem: the part all shards share.
        number: of this shard, from 1.
        count: of shards.

    """

    stem: str
    number: int
    count: int

    @classmethod
    def of(cls, path: Path) -> ShardName | None:
        """The parts of the file name, or None when it is not a shard's."""
        match = _NAME.fullmatch(path.name)
        return match and cls(match["stem"], int(match["number"]), int(match["count"]))

    def path(self, path: Path, number: int) -> Path:
        """Where shard `number` lies, beside `path`."""
        return path.with_name(f"{self.stem}-{number:05d}-of-{self.count:05d}.gguf")


def shard_paths(header: Header) -> tuple[Path, ...]:
    """All files, in order, of the model that this header's file belongs to; itself alone if not split.

    Raises:
        ModelFileError: when name and keys disagree, or a shard is missing.

    """
    name = ShardName.of(header.path)
    count = _split_number(header, "split.count")
    if count is None or count <= 1:
        if name is not None and name.count > 1:
            raise ModelFileError(
                header.path,
                f"by its name this is shard {name.number} of {name.count}, but split.count is "
                f"{'missing' if count is None else count}",
                header.offsets.get("split.count"),
            )
        return (header.path,)
    offset = header.offsets["split.count"]
    if name is None:
        found = f"split.count is {count}, so a file name like model-00001-of-{count:05d}.gguf was expected"
        raise ModelFileError(header.path, found, offset)
    if name.count != count or not 1 <= name.number <= count:
        found = f"split.count is {count}, but by its name this is shard {name.number} of {name.count}"
        raise ModelFileError(header.path, found, offset)
    paths = tuple(name.path(header.path, number) for number in range(1, count + 1))
    missing = [number for number, path in enumerate(paths, 1) if not path.exists()]
    if missing:
        others = f", and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise ModelFileError(paths[missing[0] - 1], f"shard {missing[0]} of {count} is missing{others}")
    return paths


def check_agreement(headers: Sequence[Header]) -> None:
    """Check that the headers, in order, are those of one model's shards.

    Raises:
        ModelFileError: naming the shard that does not fit and what was expected of it.

    """
    first = headers[0]
    owners: dict[str, Path] = {}
    for number, header in enumerate(headers):
        _expect(header, "split.no", number)
        _expect(header, "split.count", len(headers))
        _check_architecture(first, header)
        if header.order != first.order:
            raise ModelFileError(header.path, f"byte order differs from that of {first.path.name}")
        for tensor in header.tensors:
            owner = owners.setdefault(tensor.name, header.path)
            if owner is not header.path:
                found = f"tensor {quoted(tensor.name)} is there twice, first in {owner.name}"
                raise ModelFileError(header.path, found, tensor.info_offset)
    for header in headers:
        if "split.tensors.count" in header.metadata:
            _expect(header, "split.tensors.count", len(owners))


def _check_architecture(first: Header, header: Header) -> None:
    key = "general.architecture"
    wanted, found = first.metadata.get(key), header.metadata.get(key)
    if found is not None and found != wanted:
        message = f"{key} is {quoted(str(found))}, but {quoted(str(wanted))} in {first.path.name}"
        raise ModelFileError(header.path, message, header.offsets[key])


def _expect(header: Header, key: str, wanted: int) -> None:
    found = _split_number(header, key)
    if found != wanted:
        shown = "missing" if found is None else found
        raise ModelFileError(header.path, f"{key} is {shown}, {wanted} was expected", header.offsets.get(key))


def _split_number(header: Header, key: str) -> int | None:
    value = header.metadata.get(key)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        shown = value if isinstance(value, int | float) else quoted(str(value))
        raise ModelFileError(header.path, f"{key} is {shown}, a count was expected", header.offsets[key])
    return value
