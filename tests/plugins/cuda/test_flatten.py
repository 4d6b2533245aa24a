"""Includes are put in place so that the text is the whole input, and errors still name the real file and line."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path

import pytest

from mortice.plugins.executors.cuda.compile.flatten import Headers, flatten
from mortice.plugins.executors.cuda.device.errors import CompileError


def tree(folder: Path, files: Mapping[str, str]) -> Path:
    """Write files below a folder."""
    for name, text in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    return folder


def test_an_include_is_put_in_place_with_line_directives(tmp_path: Path) -> None:
    tree(tmp_path, {"ops/a.cu": '// first\n#include "b.cuh"\nint a;\n', "ops/b.cuh": "#pragma once\nint b;\n"})
    assert flatten(tmp_path / "ops/a.cu", [tmp_path]) == (
        '#line 1 "ops/a.cu"\n// first\n#line 1 "ops/b.cuh"\n\nint b;\n#line 3 "ops/a.cu"\nint a;\n'
    )


def test_a_file_is_put_in_once_however_many_include_it(tmp_path: Path) -> None:
    files = {
        "a.cu": '#include "b.cuh"\n#include "c.cuh"\n#include "./b.cuh"\n',
        "b.cuh": '#include "common.cuh"\nint b;\n',
        "c.cuh": '#include "common.cuh"\nint c;\n',
        "common.cuh": "int common;\n",
    }
    text = flatten(tree(tmp_path, files) / "a.cu", [tmp_path])
    assert [text.count(line) for line in ("int common;", "int b;", "int c;")] == [1, 1, 1]


def test_an_include_is_found_beside_its_file_before_it_is_looked_for_in_the_roots(tmp_path: Path) -> None:
    files = {
        "ops/a.cu": '#include "near.cuh"\n#include "far.cuh"\n',
        "ops/near.cuh": "int beside;\n",
        "root/near.cuh": "int in_root;\n",
        "root/far.cuh": "int far;\n",
    }
    tree(tmp_path, files)
    text = flatten(tmp_path / "ops/a.cu", [tmp_path / "root"])
    assert "int beside;" in text
    assert "int in_root;" not in text
    assert "int far;" in text


def test_files_put_in_front_come_first_and_once(tmp_path: Path) -> None:
    tree(tmp_path, {"ops/a.cu": '#include "../q4/traits.cuh"\nint a;\n', "q4/traits.cuh": "int traits;\n"})
    text = flatten(tmp_path / "ops/a.cu", [tmp_path], before=[tmp_path / "q4/traits.cuh"])
    assert text.index("int traits;") < text.index("int a;")
    assert text.count("int traits;") == 1


def test_a_file_outside_all_roots_is_named_by_its_folder(tmp_path: Path) -> None:
    tree(tmp_path, {"elsewhere/q4_k/traits.cuh": "int t;\n", "root/x": ""})
    assert flatten(tmp_path / "elsewhere/q4_k/traits.cuh", [tmp_path / "root"]).startswith('#line 1 "q4_k/traits.cuh"')


def test_the_text_does_not_depend_on_the_place_or_on_line_endings(tmp_path: Path) -> None:
    tree(tmp_path / "one", {"ops/a.cu": '#include "b.cuh"\nint a;\n', "ops/b.cuh": "int b;\n"})
    shutil.copytree(tmp_path / "one", tmp_path / "two")
    (tmp_path / "two/ops/b.cuh").write_bytes(b"int b;\r\n")
    texts = {flatten(tmp_path / place / "ops/a.cu", [tmp_path / place]) for place in ("one", "two")}
    assert len(texts) == 1


def test_angle_includes_are_left_to_the_compiler(tmp_path: Path) -> None:
    text = "#ifdef HALF\n#include <cuda_fp16.h>\n#endif\n"
    assert text in flatten(tree(tmp_path, {"a.cu": text}) / "a.cu", [])


@pytest.mark.parametrize(
    "text",
    [
        '// #include "gone.cuh"\n',
        '/* #include "gone.cuh" */\n',
        '/* \n#include "gone.cuh"\n*/\n',
        'const char* s = "/*"; // */ \n',
        'asm("// no comment"); /* but "this */\n',
    ],
)
def test_includes_in_comments_are_no_includes(tmp_path: Path, text: str) -> None:
    tree(tmp_path, {"a.cu": text + '#include "b.cuh"\n', "b.cuh": "int b;\n"})
    flat = flatten(tmp_path / "a.cu", [])
    assert text in flat
    assert "int b;" in flat


def test_a_missing_include_names_its_line_and_where_it_was_looked_for(tmp_path: Path) -> None:
    tree(tmp_path, {"ops/a.cu": '\n#include "gone.cuh"\n', "root/x": ""})
    with pytest.raises(CompileError, match=r'^ops/a.cu:2: #include "gone.cuh" not found in .*ops, .*root$'):
        flatten(tmp_path / "ops/a.cu", [tmp_path / "root"])


def test_a_circular_include_shows_its_circle(tmp_path: Path) -> None:
    files = {"x/a.cu": '#include "b.cuh"\n', "x/b.cuh": '#include "c.cuh"\n', "x/c.cuh": '#include "b.cuh"\n'}
    with pytest.raises(CompileError, match=r"^x/c.cuh:1: circular include: x/b.cuh -> x/c.cuh -> x/b.cuh$"):
        flatten(tree(tmp_path, files) / "x/a.cu", [tmp_path])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('#if FAST\n#include "b.cuh"\n#endif\n', r'x/a.cu:2: #include "b.cuh" under #if'),
        ("#include TRAITS\n", "x/a.cu:1: #include TRAITS: only quoted and angle includes"),
        ('#include "b.cuh" /* a\nb */\n', "x/a.cu:1: #include shares its line with a comment"),
        ('/* a\nb */ #include "b.cuh"\n', "x/a.cu:2: #include shares its line with a comment"),
    ],
)
def test_an_include_that_cannot_be_flattened_is_refused(tmp_path: Path, text: str, message: str) -> None:
    tree(tmp_path, {"x/a.cu": text, "x/b.cuh": "int b;\n"})
    with pytest.raises(CompileError, match=message):
        flatten(tmp_path / "x/a.cu", [])


def test_after_a_conditional_block_includes_are_fine_again(tmp_path: Path) -> None:
    tree(tmp_path, {"a.cu": '#if 1\nint x;\n#else\n#endif\n#include "b.cuh"\n', "b.cuh": "int b;\n"})
    assert "int b;" in flatten(tmp_path / "a.cu", [])


def test_a_source_that_is_not_there_or_not_utf8_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CompileError, match=r"gone.cu: no such CUDA source"):
        flatten(tmp_path / "gone.cu", [])
    (tmp_path / "latin.cu").write_bytes(b"// caf\xe9\n")
    with pytest.raises(CompileError, match=r"latin.cu: cannot be read as UTF-8 text"):
        flatten(tmp_path / "latin.cu", [])


def test_sources_that_share_headers_are_flattened_as_each_by_itself(tmp_path: Path) -> None:
    files = {
        "a.cu": '#include "h.cuh"\nint a;\n',
        "b.cu": 'int b;\n#include "h.cuh"\n',
        "h.cuh": "#pragma once\nint h;\n",
    }
    root = tree(tmp_path, files)
    headers = Headers([root])
    for name in ("a.cu", "b.cu", "a.cu"):
        assert headers.flatten(root / name) == flatten(root / name, [root])


def test_a_header_is_what_it_was_when_it_was_first_read(tmp_path: Path) -> None:
    root = tree(tmp_path, {"a.cu": '#include "h.cuh"\n', "b.cu": '#include "h.cuh"\n', "h.cuh": "int before;\n"})
    headers = Headers([root])
    headers.flatten(root / "a.cu")
    (root / "h.cuh").write_text("int after;\n")
    assert "int before;" in headers.flatten(root / "b.cu")
