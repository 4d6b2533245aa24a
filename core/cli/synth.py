"""``mortice synth``: a model file of a published shape with random weights."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from mortice.core.cli.flags import OutputFlags
from mortice.core.cli.render import Screen, size_text
from mortice.core.cli.written_files import ForceFlag, require_writable
from mortice.core.errors import ConfigError
from mortice.core.whole_file import written_beside

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
    require_writable("", out, force=force)
    if seed < 0:
        raise ConfigError(f"--seed: found {seed}, wanted at least 0")
    started = time.perf_counter()
    file = synth_model(shape, recipe, seed=seed, layers=layers)
    with written_beside(out) as part:
        write_model(file, part)
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
