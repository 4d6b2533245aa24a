"""Opens files that may be broken, and checks all that holds whatever comes of it: time, memory, files left open."""

from __future__ import annotations

import hashlib
import inspect
import time
import tracemalloc
from pathlib import Path

from attrs import frozen

from mortice.core.errors import ModelFileError
from mortice.core.model.types import LoadOptions, ModelFile
from mortice.core.plugin.conformance import describe, model_faults
from mortice.core.testing.file_damage import open_files
from mortice.core.testing.suite import fail, require

__all__ = ["MOST_SECONDS", "Seen", "open_with", "see"]

MOST_SECONDS = 2.0
"""What opening a file may take, or refusing it."""
_SPARE_BYTES = 96 << 20  # reading "at most so much" takes a buffer of so much


@frozen
class Seen:
    """What became of a file: a digest of its content when it opened, or why not."""

    content: str = ""
    error: str = ""

    @property
    def opened(self) -> bool:
        """Whether it was taken."""
        return bool(self.content)


def open_with(plugin: object, path: Path, options: LoadOptions) -> object:
    """What the plugin's hook returns; pluggy passes only the arguments that it asks for."""
    hook = getattr(plugin, "mortice_open_model", None)
    if hook is None:
        fail("the plugin has no mortice_open_model")
    offered = {"path": path, "options": options}
    wanted = inspect.signature(hook).parameters
    return hook(**{name: value for name, value in offered.items() if name in wanted})


def see(plugin: object, path: Path, options: LoadOptions, *, what: str) -> Seen:
    """Open a file, fail where an outcome is not one a loader may have, and close it again.

    Args:
        plugin: has the hook.
        path: the file; all that lies beside it counts as part of the model.
        options: for the loader.
        what: is wrong with the file, for messages.

    """
    nbytes = sum(file.stat().st_size for file in path.parent.rglob("*") if file.is_file())
    before, started = open_files(), time.perf_counter()
    tracing = tracemalloc.is_tracing()
    tracemalloc.start()
    tracemalloc.reset_peak()
    held = tracemalloc.get_traced_memory()[0]
    try:
        seen = _content(plugin, path, options, what)
        peak = tracemalloc.get_traced_memory()[1] - held
    finally:
        if not tracing:
            tracemalloc.stop()
    seconds = time.perf_counter() - started
    require(seconds < MOST_SECONDS, f"{what}: took {seconds:.1f} s, wanted less than {MOST_SECONDS:g}")
    most = _SPARE_BYTES + 6 * nbytes
    require(peak < most, f"{what}: {peak} bytes were allocated for {nbytes} bytes of files")
    require(open_files() == before, f"{what}: a file is left open")
    return seen


def _content(plugin: object, path: Path, options: LoadOptions, what: str) -> Seen:
    try:
        model = open_with(plugin, path, options)
    except ModelFileError as error:
        message = str(error)
        require("\n" not in message, f"{what}: the refusal has several lines: {message!r}")
        require(str(path.parent) in message, f"{what}: the refusal does not name the file: {message}")
        return Seen(error=message)
    except Exception as error:  # noqa: BLE001 (whatever a broken loader raises is what is looked for)
        fail(f"{what}: raised {describe(error)}, wanted a ModelFileError")
    if model is None:
        return Seen()
    faults = list(model_faults(model))
    require(not faults, f"{what}: {'; '.join(faults)}")
    assert isinstance(model, ModelFile)
    digest = hashlib.sha256()
    with model:
        for key, value in model.metadata.items():
            text = repr(list(value)) if not isinstance(value, (bool, int, float, str)) else repr(value)
            digest.update(f"{key}={text};".encode("utf-8", "backslashreplace"))
        for view in model.tensors.values():
            digest.update(f"{view.name!r}{view.shape}{view.qtype}".encode("utf-8", "backslashreplace"))
            digest.update(view.data.tobytes())
    return Seen(content=digest.hexdigest())
