"""The kit's suite for loaders, on folders with one file of weights and with several."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterable
from pathlib import Path

from mortice.core.testing.loader_suite import LoaderSuite
from mortice.plugins.loaders.safetensors import plugin
from tests.support.hf_folders import safetensors_bytes, write_folder


class TestOneFile(LoaderSuite):
    """``model.safetensors``."""

    plugin = plugin
    shards = 1

    def sample(self, folder: Path) -> Path:
        with self.tiny(folder) as file:
            written = write_folder(folder / "hf", file, "BF16", shards=self.shards)
        (folder / "tiny.gguf").unlink()
        for optional in ("tokenizer.json", "tokenizer_config.json"):  # a folder without them opens
            (written / optional).unlink()
        return written

    def damaged(self, folder: Path) -> Iterable[tuple[str, Path]]:
        header = {"a": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}}
        text = json.dumps(header).encode()
        for name, data in (
            ("a hole", struct.pack("<Q", len(text)) + text + bytes(8)),
            ("whole numbers", safetensors_bytes({"model.norm.weight": ("I64", (2,), bytes(16))})),
        ):
            (folder / name).mkdir()
            written = self.sample(folder / name)
            (written / "model.safetensors").write_bytes(data)
            yield name, written


class TestSeveralFiles(TestOneFile):
    """``model.safetensors.index.json`` and what it names."""

    shards = 3
