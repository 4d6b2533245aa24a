"""The cache keeps compiled kernels, and never makes anything fail."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
import time
from pathlib import Path

import pytest
from attrs import evolve

from mortice.plugins.executors.cuda.compile.build import compile_all
from mortice.plugins.executors.cuda.compile.cache import KernelCache, cache_folder, cache_key
from mortice.plugins.executors.cuda.compile.nvrtc import Compiled, KernelResources, Source
from mortice.plugins.executors.cuda.device.errors import CompileError
from mortice.plugins.executors.cuda.device.toolkit import Compiler
from tests.support.cuda import needs_nvrtc

COMPILED = Compiled(
    cubin=b"\x7fELF\n\n\x00 code",
    functions={"k": KernelResources(registers=7, stack_bytes=8)},
    warnings=("k.cu:1: hm",),
)
KEY = "0" * 64


def entry(cache: KernelCache, key: str = KEY) -> Path:
    return cache.folder / f"{key}.kernel"


def compiler(headers: str = "/x", header_version: tuple[int, int] = (13, 0), build: str = "13.0.1") -> Compiler:
    return Compiler(
        api=pytest,
        version=(13, 0),
        build=build,
        archs=(90,),
        headers=Path(headers),
        header_version=header_version,
    )


def test_an_entry_comes_back_as_it_was(tmp_path: Path) -> None:
    cache = KernelCache(folder=tmp_path / "a/b")
    assert cache.get(KEY) is None
    cache.put(KEY, COMPILED)
    assert cache.get(KEY) == COMPILED
    assert [path.name for path in cache.folder.iterdir()] == [f"{KEY}.kernel"]
    assert cache.notes == ()


@pytest.mark.parametrize("damage", ["truncated", "changed", "empty", "no newline"])
def test_a_damaged_entry_counts_as_absent_and_is_replaced(tmp_path: Path, damage: str) -> None:
    cache = KernelCache(folder=tmp_path)
    cache.put(KEY, COMPILED)
    good = entry(cache).read_bytes()
    bad = {"truncated": good[:-1], "changed": good[:-1] + b"X", "empty": b"", "no newline": b"x" * 100}[damage]
    entry(cache).write_bytes(bad)
    assert cache.get(KEY) is None
    cache.put(KEY, COMPILED)
    assert cache.get(KEY) == COMPILED


def test_the_key_follows_everything_that_decides_the_code_and_nothing_else() -> None:
    base = Source(name="k.cu", text="t", defines={"A": 1}, options=("-lineinfo",))
    sources = [
        base,
        evolve(base, name="j.cu"),
        evolve(base, text="u"),
        evolve(base, defines={"A": 2}),
        evolve(base, defines={}),
        evolve(base, options=()),
    ]
    keys = {cache_key(source, "sm_90", compiler()) for source in sources}
    keys.add(cache_key(base, "sm_80", compiler()))
    keys.add(cache_key(base, "sm_90", compiler(header_version=(13, 1))))
    keys.add(cache_key(base, "sm_90", compiler(build="13.0.2")))
    assert len(keys) == 9
    assert cache_key(base, "sm_90", compiler(headers="/elsewhere")) in keys


def test_the_entries_unused_for_longest_are_deleted_first(tmp_path: Path) -> None:
    cache = KernelCache(folder=tmp_path)
    keys = [str(number) * 64 for number in range(4)]
    for age, key in enumerate(keys):
        cache.put(key, COMPILED)
        os.utime(entry(cache, key), (1000 + age, 1000 + age))
    assert cache.get(keys[0]) is not None  # used now
    cache.max_bytes = int(2.3 * entry(cache).stat().st_size)
    cache.trim()
    assert [cache.get(key) is not None for key in keys] == [True, False, False, True]


def test_temporary_files_are_deleted_only_when_their_process_must_be_dead(tmp_path: Path) -> None:
    for name, age in ((".young.tmp", 60), (".old.tmp", 7200)):
        (tmp_path / name).touch()
        os.utime(tmp_path / name, (time.time() - age,) * 2)
    KernelCache(folder=tmp_path).trim()
    assert [path.name for path in tmp_path.iterdir()] == [".young.tmp"]


def test_a_folder_that_cannot_be_made_is_noted_once(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    cache = KernelCache(folder=tmp_path / "file/kernels")
    cache.put(KEY, COMPILED)
    cache.put(KEY, COMPILED)
    cache.trim()
    assert cache.get(KEY) is None
    assert len(cache.notes) == 1
    assert cache.notes[0].startswith("compiled kernels are not kept: ")


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes into read-only folders")
def test_a_read_only_folder_still_gives_what_it_has(tmp_path: Path) -> None:
    cache = KernelCache(folder=tmp_path / "kernels")
    cache.put(KEY, COMPILED)
    cache.folder.chmod(0o555)
    try:
        cache.put("1" * 64, COMPILED)
        assert cache.get(KEY) == COMPILED
        assert len(cache.notes) == 1
    finally:
        cache.folder.chmod(0o755)


def test_a_full_disk_is_noted_and_leaves_no_half_file(tmp_path: Path) -> None:
    cache = KernelCache(folder=tmp_path)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (16, hard))  # stands for the full disk: writing more fails
    try:
        cache.put(KEY, COMPILED)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert list(tmp_path.iterdir()) == []
    assert len(cache.notes) == 1


def test_the_folder_follows_the_environment() -> None:
    assert cache_folder({"MORTICE_CACHE": "/a", "XDG_CACHE_HOME": "/b"}) == Path("/a")
    assert cache_folder({"XDG_CACHE_HOME": "/b"}) == Path("/b/mortice")
    home = Path("~/.cache/mortice").expanduser()
    assert cache_folder({}) == home
    assert cache_folder({"XDG_CACHE_HOME": "relative"}) == home, "the XDG specification has relative paths ignored"


def kernels(count: int) -> list[Source]:
    text = 'extern "C" __global__ void k(float* y) { y[threadIdx.x] = FACTOR; }'
    return [Source(name="k.cu", text=text, defines={"FACTOR": number}) for number in range(count)]


@needs_nvrtc
def test_the_second_build_compiles_nothing_and_gives_the_same_code(tmp_path: Path) -> None:
    first = compile_all(kernels(3), "sm_90", cache=KernelCache(folder=tmp_path))
    second = compile_all(kernels(4), "sm_90", cache=KernelCache(folder=tmp_path))
    assert (first.compiled, first.cached) == (3, 0)
    assert (second.compiled, second.cached) == (1, 3)
    assert first.kernels.items() <= second.kernels.items()


@needs_nvrtc
def test_a_refused_source_does_not_cost_the_others_their_entry(tmp_path: Path) -> None:
    with pytest.raises(CompileError):
        compile_all([*kernels(2), Source(name="bad.cu", text="#error no")], "sm_90", cache=KernelCache(folder=tmp_path))
    assert compile_all(kernels(2), "sm_90", cache=KernelCache(folder=tmp_path)).cached == 2


@needs_nvrtc
def test_a_cache_that_cannot_be_written_is_noted_by_the_build(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    build = compile_all(kernels(1), "sm_90", cache=KernelCache(folder=tmp_path / "file/kernels"))
    assert build.compiled == 1
    assert any(note.startswith("compiled kernels are not kept") for note in build.notes)


RACER = """
import sys
from pathlib import Path
from mortice.plugins.executors.cuda.compile.build import compile_all
from mortice.plugins.executors.cuda.compile.cache import KernelCache
from mortice.plugins.executors.cuda.compile.nvrtc import Source
text = 'extern "C" __global__ void k(float* y) { y[threadIdx.x] = FACTOR; }'
sources = [Source(name="k.cu", text=text, defines={"FACTOR": number}) for number in range(8)]
sys.stdin.readline()
for size in (0, 10**9, 0, 10**9):  # every other build deletes all that it and the other process made
    build = compile_all(sources, "sm_90", cache=KernelCache(folder=Path(sys.argv[1]), max_bytes=size))
    assert len(build.kernels) == 8 and not build.notes, build
"""


@needs_nvrtc
def test_two_processes_may_fill_and_empty_the_cache_at_once(tmp_path: Path) -> None:
    racers = [
        subprocess.Popen([sys.executable, "-c", RACER, str(tmp_path)], stdin=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    for racer in racers:
        assert racer.stdin is not None
        racer.stdin.write("go\n")
        racer.stdin.flush()
    for racer in racers:
        racer.communicate()
    assert [racer.returncode for racer in racers] == [0, 0]
    assert compile_all(kernels(8), "sm_90", cache=KernelCache(folder=tmp_path)).cached == 8
    assert not list(tmp_path.glob(".*"))
