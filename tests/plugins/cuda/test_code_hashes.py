"""Machine code is known by its hash: of each file, all variants together, in no order."""

from __future__ import annotations

from mortice.plugins.executors.cuda.compile.build import Build
from mortice.plugins.executors.cuda.compile.nvrtc import Compiled, Source


def build(*variants: tuple[str, int, bytes]) -> Build:
    kernels = {
        Source(name=name, text="", defines={"N": number}): Compiled(cubin=cubin, functions={})
        for name, number, cubin in variants
    }
    return Build(kernels=kernels, compiled=0, cached=0, seconds=0.0)


def test_each_file_has_a_hash_that_the_order_of_its_variants_does_not_change() -> None:
    first = build(("gemv", 1, b"a"), ("gemv", 2, b"b"), ("norm", 1, b"c")).hashes()
    second = build(("norm", 1, b"c"), ("gemv", 2, b"b"), ("gemv", 1, b"a")).hashes()
    assert first == second
    assert list(first) == ["gemv", "norm"]
    assert all(len(digest) == 64 for digest in first.values())


def test_other_code_has_another_hash_and_leaves_those_of_other_files() -> None:
    before = build(("gemv", 1, b"a"), ("norm", 1, b"c")).hashes()
    after = build(("gemv", 1, b"A"), ("norm", 1, b"c")).hashes()
    assert before["gemv"] != after["gemv"]
    assert before["norm"] == after["norm"]
