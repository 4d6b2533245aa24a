"""Tests of a GPU on a card that is the CPU: whole pipelines by the CUDA executor where there is no GPU.

A few of `tests/gpu`, chosen to go every way once and to take a minute or two. `python -m tests.support.cpu_card` runs
others.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.support.cpu_card import run_tests
from tests.support.cuda import needs_nvrtc
from tests.support.cuda_on_cpu import needs_cpu_compiler

CHOSEN = {
    "8.0": ("tests/gpu/test_graphs.py", "llama and (1] or 8])"),
    "9.0": ("tests/gpu/test_lifetimes.py", "usable[1] or capture_that_fails or another"),
}
"""Compute capability: a file, and what of it. 8.0 has no dependent launches, bulk copies or warpgroup products."""


@needs_nvrtc
@needs_cpu_compiler
@pytest.mark.slow
@pytest.mark.parametrize("capability", CHOSEN)
def test_the_tests_of_a_gpu_pass_on_a_card_that_is_the_cpu(capability: str, tmp_path: Path) -> None:
    file, names = CHOSEN[capability]
    done = run_tests(["-q", "-p", "no:cacheprovider", file, "-k", names], tmp_path, capability, capture=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]
    assert re.search(r"\b[1-9]\d* passed, \d+ deselected in", done.stdout), done.stdout
    assert "skipped" not in done.stdout
