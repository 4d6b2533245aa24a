"""The conformance suite on every built-in loader, beyond what tests of their own formats say."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

from mortice.core.testing.loader_suite import LoaderSuite
from mortice.plugins.loaders.gguf import plugin as gguf_plugin
from mortice.plugins.loaders.safetensors import plugin as safetensors_plugin
from tests.support.gguf_bytes import F32, GgufBytes, shard
from tests.support.hf_folders import write_folder


class TestGguf(LoaderSuite):
    """What only GGUF can have wrong is `damaged` here and, in full, in test_gguf_refuses."""

    plugin = gguf_plugin

    def sample(self, folder: Path) -> Path:
        with self.tiny(folder) as model:
            return model.path

    def damaged(self, folder: Path) -> Iterator[tuple[str, Path]]:
        for what, made in {
            "a key twice": GgufBytes().u32("a.b", 1).u32("a.b", 1),
            "an alignment of 48": GgufBytes().u32("general.alignment", 48),
            "a tensor twice": GgufBytes().f32("w", [1.0] * 8).f32("w", [1.0] * 8),
            "overlapping tensors": GgufBytes().tensor("a", [16], F32, bytes(64), 0).tensor("b", [16], F32, b"", 32),
            "a negative extent": GgufBytes().tensor("w", [-8], F32, bytes(32)),
        }.items():
            yield what, made.write(folder / f"{what.replace(' ', '-')}.gguf")


class TestGgufShards(LoaderSuite):
    """A model in two files."""

    plugin = gguf_plugin

    def sample(self, folder: Path) -> Path:
        for number in range(2):
            name = f"model-0000{number + 1}-of-00002.gguf"
            shard(number, 2, 2).f32(f"blk.{number}.w", [float(number)] * 64).write(folder / name)
        return folder / "model-00001-of-00002.gguf"


class TestSafetensorsFolder(LoaderSuite):
    """A folder with two safetensors files."""

    plugin = safetensors_plugin

    def sample(self, folder: Path) -> Path:
        (folder / "source").mkdir()
        with self.tiny(folder / "source") as model:
            path = write_folder(folder / "model", model, shards=2)
        shutil.rmtree(folder / "source")
        return path
