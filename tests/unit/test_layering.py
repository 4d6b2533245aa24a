"""The one-way rule: a file imports only what stands on its own floor or a lower one, and never in a circle.

`FLOORS` is the whole rule. A new file belongs on the lowest floor that holds all it imports; where a pattern
already covers it there is nothing to do.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from fnmatch import fnmatchcase
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]
FACE = ".src/mortice/__init__.py"


class Floor(NamedTuple):
    """Files at one height; in a pattern ``*`` also matches ``/``, and a full path beats a pattern."""

    name: str
    files: tuple[str, ...]
    why: str


FLOORS = (  # from the ground up
    Floor("markers", ("core/__init__.py", "core/*/__init__.py"), "importing a leaf must drag nothing else in"),
    Floor("contracts", ("arch_contracts/*",), "data about model families; readable and checkable on its own"),
    Floor(
        "basics",
        (
            "core/version.py",
            "core/errors.py",
            "core/text_file.py",
            "core/counts.py",
            "core/whole_file.py",
            "core/file_hash.py",
            "core/model/qtypes.py",
        ),
        "every floor raises errors and names types",
    ),
    Floor(
        "descriptors",
        ("core/model/types.py", "core/model/findings.py", "core/model/operators.py", "core/text/params.py"),
        "plain data that later stages and plugins hand to each other",
    ),
    Floor(
        "stages",
        ("core/model/*", "core/text/*", "core/contracts/*", "core/config*"),
        "what is worked out from a file, a contract, a text or a config, with no device and no plugin",
    ),
    Floor(
        "plan",
        ("core/model/weight_plan.py",),
        "needs the program; decides bytes and layouts before any upload",
    ),
    Floor("residency", ("core/model/residency.py",), "what an upload of a plan gives back"),
    Floor(
        "socket",
        ("core/plugin/interfaces.py", "core/plugin/hookspecs.py", "core/plugin/*"),
        "all that a plugin may rely on: the hooks and the data that they exchange",
    ),
    Floor(
        "plugins",
        ("plugins/*",),
        "built-ins stand where third parties stand: above the hooks, below the rest",
    ),
    Floor("manager", ("core/plugin/manager.py",), "finds and loads plugins; no plugin may know that it exists"),
    Floor(
        "registry",
        ("core/plugin/resolution.py", "core/plugin/registry.py", "core/plugin/trial_import.py"),
        "asks the loaded plugins, with types, and looks whether they can be loaded at all",
    ),
    Floor(
        "flow",
        ("core/stages.py", "core/session.py", "core/batch.py", "core/pipeline.py"),
        "the only place that sees the whole flow",
    ),
    Floor("record", ("core/record.py",), "what a run was, to repeat it"),
    Floor("validation", ("core/validation/*",), "validates many models, reads their data, and writes reports"),
    Floor("testing", ("core/testing/*",), "the kit for plugin authors runs whole pipelines"),
    Floor("synth", ("core/synth/*",), "models with random weights, written with the kit for tests"),
    Floor("bench", ("core/bench/*",), "measures pipelines"),
    Floor("parity", ("core/parity/*",), "holds pipelines against each other"),
    Floor(
        "kit",
        ("core/testing/executor_suite.py", "core/testing/plugin_suite.py", "core/scaffold/*"),
        "suites that hold executors against each other, and packages that use suites",
    ),
    Floor("cli", ("core/cli/*",), "speaks to people; nothing builds on it"),
    Floor("face", (FACE,), "what `import mortice` offers; nothing inside uses it"),
)
CUDA = "plugins/executors/cuda/"
CUDA_PARTS = ("device", "compile", "lowering", "weights", "run")
"""Packages of the CUDA executor, from the ground up; its other files stand above all of them."""

GPU_PACKAGES = frozenset({"cuda", "cupy", "cupyx", "cupy_backends", "pynvml"})
HEAVY_PACKAGES = frozenset({"cyclopts", "gguf", "hypothesis", "jinja2", "pytest", "rich", "tokenizers"})
MAY_NAME_BUILT_INS = frozenset({"core/plugin/manager.py"})


def source_files() -> list[str]:
    """Paths of all files of the package, relative to the repository."""
    folders = ("arch_contracts", "core", "plugins")
    inside = [path for folder in folders for path in (ROOT / folder).rglob("*.py")]
    return [FACE, *sorted(path.relative_to(ROOT).as_posix() for path in inside)]


def floor_of(file: str) -> int | None:
    """Index into `FLOORS`, or None for a file that the table does not cover."""
    for index, floor in enumerate(FLOORS):
        if file in floor.files:
            return index
    for index, floor in enumerate(FLOORS):
        if any(fnmatchcase(file, pattern) for pattern in floor.files):
            return index
    return None


def file_of(module: str) -> str | None:
    """File behind a dotted name below ``mortice``, or None where there is none (a function, say)."""
    if module == "mortice":
        return FACE
    stem = module.removeprefix("mortice.").replace(".", "/")
    candidates = (f"{stem}.py", f"{stem}/__init__.py")
    return next((name for name in candidates if (ROOT / name).is_file()), None)


def module_of(file: str) -> list[str]:
    """Dotted name of a file in parts; for a package's ``__init__`` that part is kept."""
    return ["mortice", "__init__"] if file == FACE else ["mortice", *file.removesuffix(".py").split("/")]


def imported_names(file: str, tree: ast.AST) -> Iterator[str]:
    """Dotted names that the tree imports, wherever in the file; ``from a import b`` gives ``a.b``."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parts = module_of(file)[: -node.level] if node.level else []
            base = ".".join([*parts, *(node.module or "").split(".")]).strip(".")
            yield from (f"{base}.{alias.name}" for alias in node.names)


def imports_of(file: str) -> set[str]:
    """Files of the package that `file` imports, at the top or inside a function."""
    found = set()
    for name in imported_names(file, ast.parse((ROOT / file).read_text(encoding="utf-8"))):
        if name == "mortice" or name.startswith("mortice."):
            target = file_of(name) or file_of(name.rpartition(".")[0])
            if target is not None and target != file:
                found.add(target)
    return found


def imports_when_loaded(file: str) -> set[str]:
    """Top-level packages imported as soon as `file` is; not those in functions or ``if TYPE_CHECKING``."""
    pending: list[ast.AST] = [ast.parse((ROOT / file).read_text(encoding="utf-8"))]
    found: set[str] = set()
    while pending:
        for node in ast.iter_child_nodes(pending.pop()):
            if isinstance(node, ast.Import):
                found.update(alias.name.partition(".")[0] for alias in node.names)
            elif isinstance(node, ast.ImportFrom) and not node.level:
                found.add((node.module or "").partition(".")[0])
            elif isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
                pending.extend(node.orelse)
            elif not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
                pending.append(node)
    return found


def plugin_of(file: str) -> str:
    """Name of the plugin that a file under plugins/ belongs to: ``loaders/gguf``."""
    if file.startswith("plugins/qtypes/"):
        return "qtypes"  # GGML's own types are one plugin; its hook stands in the folder's __init__.py
    return "/".join(file.removesuffix(".py").split("/")[1:3])


def loaded_after(statement: str) -> set[str]:
    """Top-level packages in ``sys.modules`` of a fresh interpreter that ran `statement`."""
    code = f"{statement}\nimport sys; print(*sys.modules)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    return {name.partition(".")[0] for name in run.stdout.split()}


def test_every_file_has_a_floor() -> None:
    lost = [file for file in source_files() if floor_of(file) is None]
    assert not lost, f"give each of these a floor in {Path(__file__).name}, the lowest that holds its imports: {lost}"


def test_a_file_imports_only_from_its_floor_and_below() -> None:
    wrong = []
    for file in source_files():
        own = floor_of(file)
        for target in sorted(imports_of(file)):
            other = floor_of(target)
            if own is not None and other is not None and other > own:
                upper, lower = FLOORS[other], FLOORS[own]
                wrong.append(f"{file} ({lower.name}) imports {target} ({upper.name}: {upper.why})")
    assert not wrong, "imports that point upwards:\n" + "\n".join(wrong)


def cuda_part_of(file: str) -> int:
    """Index into `CUDA_PARTS`, or its length for what stands above them."""
    part = file.removeprefix(CUDA).partition("/")[0]
    return CUDA_PARTS.index(part) if part in CUDA_PARTS else len(CUDA_PARTS)


def test_a_part_of_the_cuda_executor_imports_only_from_itself_and_those_below() -> None:
    files = [file for file in source_files() if file.startswith(CUDA)]
    assert {cuda_part_of(file) for file in files} == set(range(len(CUDA_PARTS) + 1)), "each part has files"
    wrong = [
        f"{file} imports {target}"
        for file in files
        for target in sorted(imports_of(file))
        if target.startswith(CUDA) and cuda_part_of(target) > cuda_part_of(file)
    ]
    assert not wrong, "imports that point upwards:\n" + "\n".join(wrong)


def test_no_files_import_each_other_in_a_circle() -> None:
    try:
        TopologicalSorter({file: imports_of(file) for file in source_files()}).prepare()
    except CycleError as error:
        raise AssertionError("files import each other: " + " -> ".join(error.args[1])) from None


def test_only_the_manager_names_built_in_plugins() -> None:
    core = [file for file in source_files() if file.startswith("core/") and file not in MAY_NAME_BUILT_INS]
    wrong = [f"{file} imports {t}" for file in core for t in sorted(imports_of(file)) if t.startswith("plugins/")]
    assert not wrong, "the core reaches plugins through hooks only:\n" + "\n".join(wrong)


def test_no_plugin_imports_another_plugin() -> None:
    wrong = []
    for file in source_files():
        if file.startswith("plugins/"):
            others = {t for t in imports_of(file) if t.startswith("plugins/") and plugin_of(t) != plugin_of(file)}
            wrong += [f"{file} imports {target}" for target in sorted(others)]
    assert not wrong, "a plugin reaches another through hooks only:\n" + "\n".join(wrong)


def test_no_file_imports_a_gpu_package_when_it_is_loaded() -> None:
    wrong = {file: found for file in source_files() if (found := imports_when_loaded(file) & GPU_PACKAGES)}
    assert not wrong, "import these inside the function that opens the device"


def test_loading_every_plugin_module_loads_no_gpu_package() -> None:
    modules = [".".join(module_of(file)).removesuffix(".__init__") for file in source_files() if "plugins/" in file]
    assert len(modules) > 1
    loaded = loaded_after("\n".join(f"import {name}" for name in modules)) & GPU_PACKAGES
    assert not loaded, "import these inside the function that opens the device"


def test_import_mortice_loads_no_heavy_package() -> None:
    loaded = loaded_after("import mortice") & (HEAVY_PACKAGES | GPU_PACKAGES)
    assert not loaded, "import these inside the functions that use them"


def test_the_rule_sees_an_upward_import_inside_a_function() -> None:
    tree = ast.parse("def f():\n    from mortice.core import pipeline\n    from . import errors\n")
    assert list(imported_names("core/config.py", tree)) == ["mortice.core.pipeline", "mortice.core.errors"]
