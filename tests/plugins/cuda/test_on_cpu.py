"""Device code as libraries of the CPU."""

from __future__ import annotations

from pathlib import Path

import pytest

from mortice.plugins.executors.cuda.device.errors import CompileError
from mortice.plugins.executors.cuda.on_cpu import compile_for_cpu
from tests.support.cuda_on_cpu import needs_cpu_compiler

pytestmark = needs_cpu_compiler

COUNTER = """
template <class T>
int next_number() {
    static int number = FIRST;
    return number++;
}
extern "C" int next() { return next_number<int>(); }
"""


def test_libraries_of_the_same_text_each_have_their_own_variables(tmp_path: Path) -> None:
    libraries = []
    for first in (10, 20):
        folder = tmp_path / str(first)
        folder.mkdir()
        libraries.append(compile_for_cpu(folder, COUNTER, {"FIRST": first}))
    assert [library.next() for library in libraries for _ in range(2)] == [10, 11, 20, 21]


def test_what_is_refused_is_told_with_the_compilers_words(tmp_path: Path) -> None:
    with pytest.raises(CompileError, match=r"refuses device code:\n.*nothing_like_it"):
        compile_for_cpu(tmp_path, 'extern "C" int next() { return nothing_like_it; }', {})
