"""Kernels compile with no GPU, what the compiler says names file and line, and costs are known."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType

import pytest

from mortice.core.errors import DeviceError
from mortice.plugins.executors.cuda.compile.build import compile_all
from mortice.plugins.executors.cuda.compile.flatten import flatten
from mortice.plugins.executors.cuda.compile.nvrtc import KernelResources, Source, compile_cubin, read_resources
from mortice.plugins.executors.cuda.device.errors import CompileError
from mortice.plugins.executors.cuda.device.toolkit import Compiler, header_version, look_for_compiler
from tests.support.cuda import needs_nvrtc

ARCHS = ("sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120")

SCALE = """
#include <cuda_fp16.h>
#include <cuda_bf16.h>
extern "C" __global__ void scale(const __half* x, float* y, int n) {
    __shared__ float factor[FACTORS];
    const int i = blockIdx.x * blockDim.x + threadIdx.x;
    factor[threadIdx.x % FACTORS] = i;
    __syncthreads();
    if (i < n) y[i] = __half2float(x[i]) * factor[i % FACTORS];
}
"""

INDEXED = """
extern "C" __global__ void indexed(float* y, const int* at) {
    float local[64];
    for (int i = 0; i < 64; ++i) local[at[i]] = y[i];
    for (int i = 0; i < 64; ++i) y[i] = local[at[64 + i]];
}
"""


def compiler_for(*archs: int, version: tuple[int, int] = (13, 0)) -> Compiler:
    return Compiler(
        api=ModuleType("fake"), version=version, build="", archs=archs, headers=Path("/x"), header_version=(13, 0)
    )


@needs_nvrtc
@pytest.mark.parametrize("arch", ARCHS)
def test_a_kernel_with_half_floats_compiles_to_an_elf_image_with_no_gpu(arch: str) -> None:
    compiled = compile_cubin(Source(name="scale.cu", text=SCALE, defines={"FACTORS": 32}), arch)
    assert compiled.cubin.startswith(b"\x7fELF")
    used = compiled.functions["scale"]
    assert used.registers > 0
    assert used.shared_bytes in range(128, 128 + 1024 + 1)  # from sm_90 on a block may reserve up to 1 KiB
    assert used.barriers == 1
    assert compiled.spills == ()


@needs_nvrtc
def test_the_same_source_makes_the_same_code_and_another_arch_other_code() -> None:
    source = Source(name="scale.cu", text=SCALE, defines={"FACTORS": 32})
    first, second, other = (compile_cubin(source, arch).cubin for arch in ("sm_80", "sm_80", "sm_90"))
    assert first == second
    assert first != other


@needs_nvrtc
def test_local_memory_is_reported() -> None:
    compiled = compile_cubin(Source(name="indexed.cu", text=INDEXED), "sm_90")
    assert compiled.functions["indexed"].stack_bytes >= 256
    assert compiled.functions["indexed"].uses_local_memory
    assert compiled.spills[0].startswith("indexed: ")


@needs_nvrtc
def test_spilled_registers_are_reported() -> None:
    body = "".join(f"float v{i} = y[{i} * n + threadIdx.x];\n" for i in range(96))
    chain = "".join(f"v{i} = v{i} * v{(i * 7 + 1) % 96} + r;\n" for i in range(96))
    total = " + ".join(f"v{i}" for i in range(96))
    text = (
        'extern "C" __global__ void __launch_bounds__(1024, 2) crowded(float* y, int n) {\n'
        f"{body}#pragma unroll 1\nfor (int r = 0; r < n; ++r) {{\n{chain}}}\ny[threadIdx.x] = {total};\n}}\n"
    )
    used = compile_cubin(Source(name="crowded.cu", text=text), "sm_90").functions["crowded"]
    assert used.registers <= 32
    assert used.spill_store_bytes > 0
    assert used.spill_load_bytes > 0


@needs_nvrtc
def test_an_error_in_a_header_names_the_header_and_its_line(tmp_path: Path) -> None:
    (tmp_path / "ops").mkdir()
    (tmp_path / "ops/k.cu").write_text('#include "broken.cuh"\nextern "C" __global__ void k() { f(); }\n')
    (tmp_path / "ops/broken.cuh").write_text("#pragma once\n\n__device__ void f() { undeclared = 1; }\n")
    text = flatten(tmp_path / "ops/k.cu", [tmp_path])
    with pytest.raises(CompileError) as caught:
        compile_cubin(Source(name="ops/k.cu", text=text, defines={"N": 4}), "sm_80")
    first, second = str(caught.value).splitlines()
    assert first.endswith("refuses ops/k.cu -DN=4 for sm_80:")
    assert second == 'ops/broken.cuh:3: identifier "undeclared" is undefined'


@needs_nvrtc
def test_an_error_of_the_assembler_is_shown() -> None:
    text = 'extern "C" __global__ void k() { asm volatile("wgmma.fence.sync.aligned;"); }'
    with pytest.raises(CompileError, match=r"(?s)refuses k.cu for sm_90:.*wgmma.*sm_90"):
        compile_cubin(Source(name="k.cu", text=text), "sm_90")
    assert compile_cubin(Source(name="k.cu", text=text), "sm_90a").cubin


@needs_nvrtc
def test_warnings_are_kept() -> None:
    compiled = compile_cubin(Source(name="k.cu", text='extern "C" __global__ void k() {\n  int unused;\n}'), "sm_80")
    assert compiled.warnings == ('k.cu:2: variable "unused" was declared but never referenced',)


@needs_nvrtc
def test_many_errors_are_counted_not_listed() -> None:
    text = "".join(f"__device__ void f{i}() {{ x{i} = 1; }}\n" for i in range(40))
    with pytest.raises(CompileError, match=r"… and 28 more$"):
        compile_cubin(Source(name="k.cu", text=text), "sm_80")


@needs_nvrtc
def test_sources_are_compiled_once_each_in_threads_and_every_refusal_is_told() -> None:
    good = [Source(name="scale.cu", text=SCALE, defines={"FACTORS": n}) for n in (8, 16, 16, 32)]
    build = compile_all(good, "sm_90", workers=3)
    assert (build.compiled, build.cached, len(build.kernels)) == (3, 0, 3)
    assert len({compiled.cubin for compiled in build.kernels.values()}) == 3
    bad = [Source(name=f"{name}.cu", text="#error no") for name in ("one", "two")]
    with pytest.raises(CompileError, match=r"(?s)one.cu:1: #error.*two.cu:1: #error"):
        compile_all([*good, *bad], "sm_90")


def test_only_real_architectures_are_compiled_for() -> None:
    with pytest.raises(CompileError, match=r"k.cu: architecture 'compute_90' is not one such as sm_90"):
        compile_cubin(Source(name="k.cu", text=""), "compute_90", compiler_for(90))


def test_equal_sources_are_equal_keys_whatever_the_order_of_their_defines() -> None:
    one = Source(name="k.cu", text="x", defines={"A": 1, "B": True})
    two = Source(name="k.cu", text="x", defines={"B": True, "A": 1})
    assert {one: 1}[two] == 1
    assert one.flags == ("-DA=1", "-DB=1")


@pytest.mark.parametrize("defines", [{"A B": 1}, {"A": "1\n2"}, {"-I/x": 1}])
def test_a_define_that_is_no_macro_is_refused(defines: dict[str, str]) -> None:
    with pytest.raises(CompileError, match="not a name and a value of one line"):
        Source(name="k.cu", text="", defines=defines)


def test_the_assembler_report_is_read_also_with_functions_that_are_not_inlined() -> None:
    log = """ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function 'k' for 'sm_90'
ptxas info    : Function properties for k
    8 bytes stack frame, 4 bytes spill stores, 12 bytes spill loads
ptxas info    : Function properties for _Z3farv
    16 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 30 registers, used 2 barriers, 16 bytes cumulative stack size, 128 bytes smem, 400 bytes cmem[0]
"""
    assert read_resources(log) == {
        "k": KernelResources(
            registers=30, stack_bytes=8, spill_store_bytes=4, spill_load_bytes=12, shared_bytes=128, barriers=2
        ),
        "_Z3farv": KernelResources(stack_bytes=16),
    }


@pytest.mark.parametrize(
    ("capability", "arch"), [((8, 0), "sm_80"), ((8, 7), "sm_86"), ((9, 0), "sm_90"), ((12, 1), "sm_120")]
)
def test_the_newest_architecture_that_a_device_runs_is_chosen(capability: tuple[int, int], arch: str) -> None:
    assert compiler_for(80, 86, 89, 90, 100, 120).arch_for(capability) == arch


def test_a_device_newer_than_the_compiler_is_refused_with_the_way_back() -> None:
    with pytest.raises(
        DeviceError, match=r'NVRTC 12.4 cannot compile .* 12.0: install .*-cu12; executor = "reference"'
    ):
        compiler_for(80, 90, version=(12, 4)).arch_for((12, 0))


def headers(folder: Path, number: int) -> Path:
    include = folder / "include"
    include.mkdir(parents=True)
    (include / "cuda_runtime_api.h").write_text(f"/* … */\n#define CUDART_VERSION  {number}\n")
    (include / "cuda_fp16.h").touch()
    return include


def fake_nvrtc(monkeypatch: pytest.MonkeyPatch, version: tuple[int, int] | None) -> None:
    api, package = ModuleType("cuda.bindings.nvrtc"), ModuleType("cuda.bindings")
    package.__version__ = "13.1.0"  # type: ignore[attr-defined]

    def nvrtc_version() -> tuple[int, int, int]:
        if version is None:
            raise RuntimeError("libnvrtc.so.13 not found")
        return (0, *version)

    api.nvrtcVersion = nvrtc_version  # type: ignore[attr-defined]
    api.nvrtcGetSupportedArchs = lambda: (0, [80, 90])  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "cuda.bindings", package)
    monkeypatch.setitem(sys.modules, "cuda.bindings.nvrtc", api)
    monkeypatch.setitem(sys.modules, "nvidia", None)  # no headers from packages


def test_headers_of_the_compilers_own_version_are_preferred(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_nvrtc(monkeypatch, (57, 3))
    headers(tmp_path / "old", 57010)
    own = headers(tmp_path / "own", 57030)
    compiler = look_for_compiler({"CUDA_PATH": str(tmp_path / "old"), "CUDA_HOME": str(tmp_path / "own")})
    assert compiler.headers == own
    assert compiler.notes == ()


def test_headers_of_another_minor_version_are_used_and_noted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_nvrtc(monkeypatch, (57, 3))
    headers(tmp_path, 57010)
    compiler = look_for_compiler({"CUDA_PATH": str(tmp_path)})
    assert compiler.header_version == (57, 1)
    assert compiler.notes[0].startswith("NVRTC 57.3 compiles with CUDA headers 57.1")


def test_headers_of_another_major_version_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_nvrtc(monkeypatch, (57, 3))
    headers(tmp_path, 56090)
    with pytest.raises(DeviceError, match=r"install nvidia-cuda-runtime==57.3.*; other versions: .*\(56.9\)"):
        look_for_compiler({"CUDA_PATH": str(tmp_path)})


def test_a_missing_nvrtc_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_nvrtc(monkeypatch, None)
    with pytest.raises(DeviceError, match=r'NVRTC 13.* install mortice\[cuda13\].*nvidia-cuda-nvrtc.*"reference"'):
        look_for_compiler({})


def test_missing_bindings_say_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cuda.bindings.nvrtc", None)
    with pytest.raises(DeviceError, match=r'cuda-python.* mortice\[cuda12\] or mortice\[cuda13\].*"reference"'):
        look_for_compiler({})


def test_a_folder_without_headers_has_no_version(tmp_path: Path) -> None:
    assert header_version(tmp_path / "none") is None
    (tmp_path / "cuda_runtime_api.h").write_text("#define CUDART_VERSION 13000\n")
    assert header_version(tmp_path) is None, "cuda_fp16.h is not there"
