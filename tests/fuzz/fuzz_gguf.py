"""Fuzz target for the GGUF loader, run by hand or on a schedule; `make test` does not need atheris.

::

    pip install atheris
    PYTHONPATH=. python tests/fuzz/fuzz_gguf.py --seeds corpus/      # writes small valid files, once
    PYTHONPATH=. python tests/fuzz/fuzz_gguf.py corpus/ -max_len=4096 -timeout=2 -rss_limit_mb=1024

Whatever the bytes, the loader either opens the file or raises `ModelFileError`: any other exception, an input
that takes more than two seconds and one that takes more than a gigabyte are findings. A file that opens has
its metadata decoded and every tensor's first and last byte read.
"""

from __future__ import annotations

import importlib
import sys
import tempfile
from pathlib import Path
from typing import Any

from mortice.core.errors import ModelFileError
from mortice.core.model.types import LoadOptions
from mortice.plugins.loaders.gguf.loader import open_gguf
from tests.support import gguf_bytes as raw
from tests.support.gguf_bytes import GgufBytes, shard


def try_file(path: Path) -> bool:
    """Open the file and touch all of it; false when it is refused.

    Raises:
        AssertionError: when what was opened does not hold together.
        Exception: anything else is a fault of the loader.

    """
    try:
        model = open_gguf(path, LoadOptions())
    except ModelFileError:
        return False
    assert model is not None
    for value in model.metadata.values():
        if not isinstance(value, str | int | float):
            assert len(list(value)) == len(value)
    for view in model.tensors.values():
        assert view.data.nbytes == view.qtype.nbytes(view.shape) > 0
        assert 0 <= int(view.data[0]) + int(view.data[-1]) <= 510
    model.close()
    return True


def seeds() -> dict[str, bytes]:
    """Small valid files that reach every part of the parser."""
    made = {}
    for name, order in (("little", "<"), ("big", ">")):
        file = GgufBytes(order=order).text("general.architecture", "llama").u32("general.alignment", 32)
        file.strings("tokens", ["a", "größe", "x" * 130]).numbers("scores", raw.FLOAT32, [1, 2])
        file.numbers("flags", raw.BOOL, [1, 0]).number("n", raw.UINT64, 7).number("d", raw.FLOAT64, 0.5)
        file.f32("norm", [1, 2, 3]).tensor("w", [32, 2], raw.Q8_0, bytes(68))
        made[name] = file.build()
    made["empty"] = GgufBytes().build()
    made["shard"] = shard(0, 1, 1).f32("a", [1.0]).build()
    return made


def main(arguments: list[str]) -> None:
    """Write the seeds, or fuzz until something is found."""
    if arguments[1:2] == ["--seeds"]:
        folder = Path(arguments[2])
        folder.mkdir(parents=True, exist_ok=True)
        for name, data in seeds().items():
            (folder / f"{name}.gguf").write_bytes(data)
        return

    atheris: Any = importlib.import_module("atheris")

    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / "model-00001-of-00001.gguf"

        def target(data: bytes) -> None:
            path.write_bytes(data)
            try_file(path)

        atheris.instrument_all()
        atheris.Setup(arguments, target)
        atheris.Fuzz()


if __name__ == "__main__":
    main(sys.argv)
