"""``mortice synth``: a model file of a published shape with random weights."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from mortice.core.cli.flags import OutputFlags
from mortice.core.cli.render import Screen, size_text
from mortice.core.cli.written_files import ForceFlag
from mortice.core.errors import ConfigError

__all__ = ["synth"]


def synth(
    shape: Annotated[str, Parameter(help="A model's name, such as Llama-3.1-8B; a wrong one lists them all.")],
    recipe: Annotated[str, Parameter(help="A mix of llama-quantize, such as Q4_K_M; a wrong one lists them all.")],
    out: Annotated[Path, Parameter(help="The GGUF file to write.")],
    /,
    *,
    layers: Annotated[int | None, Parameter(help="How many layers; by default those of the shape.")] = None,
    seed: Annotated[int, Parameter(help="The same seed gives the same file.")] = 0,
    force: ForceFlag = False,
    output: OutputFlags | None = None,
) -> int:
    """Write a model of a published shape with random weights, to measure speed with.

    Tensor types are those that llama-quantize picks. The vocabulary has the right size, but knows few words.

    """
    from mortice.core.synth.model import synth_model, write_model

    output = output or OutputFlags()
    screen = Screen(json=output.json, quiet=output.quiet)
    out = _target(out, force=force)
    started = time.perf_counter()
    file = synth_model(shape, recipe, seed=seed, layers=layers)
    part = out.with_name(f".{out.name}.{os.getpid()}.part")  # what is interrupted leaves no half file under the name
    try:
        write_model(file, part)
        part.replace(out)
    except OSError as error:
        raise ConfigError(f"{out}: cannot be written: {error.strerror or error}") from None
    finally:
        part.unlink(missing_ok=True)
    seconds = time.perf_counter() - started
    screen.result(
        {
            "file": out,
            "shape": shape,
            "recipe": recipe,
            "bytes": out.stat().st_size,
            "parameters": file.parameters,
            "bits_per_weight": 8 * file.tensor_bytes / file.parameters,
            "seconds": seconds,
        }
    )
    screen.say(
        f"{out}: {file.parameters / 1e6:.1f} M random weights, {size_text(out.stat().st_size)}, "
        f"{8 * file.tensor_bytes / file.parameters:.2f} bits each, in {seconds:.1f} s"
    )
    return 0


def _target(out: Path, *, force: bool) -> Path:
    """The file to write: where a symbolic link leads to, never anything but a regular file."""
    try:
        target = out.resolve(strict=True)
    except FileNotFoundError:
        if out.is_symlink():
            raise ConfigError(f"{out}: is a symbolic link to nothing") from None
        return out
    except (OSError, RuntimeError) as error:
        raise ConfigError(f"{out}: cannot be written: {error}") from None
    if not target.is_file():
        raise ConfigError(f"{out}: is there already and is no regular file, so it is not overwritten")
    if not force:
        raise ConfigError(f"{out}: is there already; --force overwrites it")
    return target
