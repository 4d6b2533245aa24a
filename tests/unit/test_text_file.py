"""Small text files: whatever stands at the path, it is read within bounds or refused by name."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from mortice.core.errors import ConfigError, ContractError
from mortice.core.stages import read_contract
from mortice.core.text_file import MAX_BYTES, beginning, read_small_text


def refusal(path: Path) -> str:
    with pytest.raises(ConfigError) as error:
        read_small_text(path, ConfigError)
    return str(error.value).removeprefix(f"{path}: cannot be read: ")


def test_text_is_read_up_to_the_bound_and_no_further(tmp_path: Path) -> None:
    path = tmp_path / "a.toml"
    path.write_text("ü" * (MAX_BYTES // 2), encoding="utf-8")
    assert read_small_text(path, ConfigError) == "ü" * (MAX_BYTES // 2)
    path.write_bytes(b"#" * (MAX_BYTES + 1))
    assert refusal(path) == f"wanted at most {MAX_BYTES} bytes, found more"


def test_what_is_no_regular_file_is_refused_at_once(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    assert refusal(tmp_path / "fifo") == "wanted a regular file, found a FIFO"
    assert refusal(Path("/dev/zero")) == "wanted a regular file, found a device"
    assert refusal(tmp_path) == "Is a directory"
    assert refusal(Path("a\0b")) == "embedded null byte"


def test_bytes_that_are_no_utf_8_are_named_by_offset(tmp_path: Path) -> None:
    (tmp_path / "a.toml").write_bytes(b"# ab\xe4")
    assert refusal(tmp_path / "a.toml") == "not UTF-8 at byte 4"


def test_a_byte_order_mark_is_no_text(tmp_path: Path) -> None:
    (tmp_path / "a.toml").write_bytes(b"\xef\xbb\xbf[model]\n")
    assert read_small_text(tmp_path / "a.toml", ConfigError) == "[model]\n"


def test_a_contract_is_read_within_the_same_bounds(tmp_path: Path) -> None:
    with pytest.raises(ContractError, match="found a device"):
        read_contract(Path("/dev/zero"))
    with pytest.raises(ContractError) as error:
        read_contract(tmp_path / "no.toml")
    assert str(error.value) == f"{tmp_path}/no.toml: cannot be read: No such file or directory"


def test_the_beginning_of_a_file_is_shown_and_named_where_it_says_what_it_is(tmp_path: Path) -> None:
    path = tmp_path / "model"
    path.write_bytes(b"hello\x00\xff")
    assert beginning(path) == "it begins with 68 65 6c 6c 6f 00 ff (hello..)"
    path.write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 7\n")
    assert beginning(path).endswith(
        "(version https://): a Git LFS pointer, not the file itself: git lfs pull fetches it"
    )


def test_what_is_empty_or_no_regular_file_has_no_beginning(tmp_path: Path) -> None:
    (tmp_path / "empty").touch()
    os.mkfifo(tmp_path / "fifo")
    assert [beginning(tmp_path / name) for name in ("empty", "fifo", "none", ".")] == [""] * 4
