"""Broken and hostile GGUF files: one line says where and what, and nothing is kept open."""

from __future__ import annotations

import os
import struct
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from mortice.core.errors import ModelFileError
from mortice.core.model.types import LoadOptions
from mortice.plugins.loaders.gguf import arrays
from mortice.plugins.loaders.gguf import format as limits
from mortice.plugins.loaders.gguf.loader import open_gguf
from mortice.plugins.loaders.gguf.parser import read_header
from tests.support import gguf_bytes as raw
from tests.support.gguf_bytes import GgufBytes
from tests.support.resources import open_files

FIRST_KEY = 24  # offset of the first key, or of the first tensor where there are no keys


class Refuses:
    """Opens a file that must be refused and checks what every refusal has to keep."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "bad.gguf"

    def __call__(self, made: GgufBytes | bytes, *wanted: str, at: int | None, sparse_bytes: int = 0) -> None:
        """Write `made` and open it; the message holds each of `wanted` and the offset is `at`."""
        self.path.write_bytes(made if isinstance(made, bytes) else made.build())
        if sparse_bytes:
            os.truncate(self.path, sparse_bytes)
        self.open(*wanted, at=at)

    def open(self, *wanted: str, at: int | None) -> None:
        tracemalloc.start()
        try:
            with pytest.raises(ModelFileError) as caught:
                open_gguf(self.path, LoadOptions())
            peak_bytes = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
        message = str(caught.value)
        assert open_files(self.path.parent) == 0
        assert peak_bytes < 2**20
        assert "\n" not in message
        assert caught.value.offset == at
        assert message.startswith(f"{self.path}: " + (f"byte {at}: " if at is not None else ""))
        for part in wanted:
            assert part in message


@pytest.fixture
def refuses(tmp_path: Path) -> Refuses:
    return Refuses(tmp_path)


def f32_vector(name: str = "w", length: int = 8) -> GgufBytes:
    return GgufBytes().tensor(name, [length], raw.F32, bytes(4 * length))


# Header


def test_an_empty_file_is_refused(refuses: Refuses) -> None:
    refuses(b"", "file is empty", at=0)


def test_a_wrong_magic_is_refused(refuses: Refuses) -> None:
    refuses(GgufBytes(magic=b"FUGG"), "not a GGUF file", "(FUGG", "b'GGUF' was expected", at=0)


def test_an_html_page_saved_as_a_model_is_refused(refuses: Refuses) -> None:
    refuses(b"<!DOCTYPE html><html>", "not a GGUF file", "(<!DOCTYPE", at=0)


@pytest.mark.parametrize("version", [0, 1, 4, 2**31])
@pytest.mark.parametrize("order", ["<", ">"])
def test_other_versions_are_refused(refuses: Refuses, version: int, order: str) -> None:
    found = min(version, int.from_bytes(version.to_bytes(4, "little"), "big"))
    refuses(GgufBytes(order=order, version=version), f"GGUF version {found}", "2 or 3 was expected", at=4)


def test_a_version_of_the_other_byte_order_than_the_counts_is_refused(refuses: Refuses) -> None:
    data = b"GGUF" + struct.pack(">I", 3) + struct.pack("<QQ", 0, 1)
    refuses(data, f"claims {2**56} keys", at=16)


def test_an_absurd_number_of_tensors_is_refused(refuses: Refuses) -> None:
    refuses(GgufBytes().build(num_tensors=2**64 - 1), f"claims {2**64 - 1} tensors", "at most 65536", at=8)


def test_an_absurd_number_of_keys_is_refused(refuses: Refuses) -> None:
    refuses(GgufBytes().build(num_keys=2**64 - 1), f"claims {2**64 - 1} keys", "at most 65536", at=16)


def test_more_tensors_than_the_file_holds_are_refused(refuses: Refuses) -> None:
    refuses(GgufBytes().build(num_tensors=65536), "file is truncated: length of name of tensor 0", at=24)


def test_more_keys_than_the_file_holds_are_refused(refuses: Refuses) -> None:
    refuses(GgufBytes().build(num_keys=65536), "file is truncated: length of a key", at=24)


def test_a_header_cut_short_is_refused(refuses: Refuses) -> None:
    refuses(GgufBytes().build()[:20], "truncated", "takes 24 bytes, 20 are left", at=0)


def test_a_header_larger_than_allowed_is_refused(refuses: Refuses) -> None:
    data = GgufBytes().raw_key("k", raw.ARRAY, struct.pack("<IQ", raw.UINT8, 2**28)).build()
    refuses(data, "'k'", "a header may have 134217728 bytes", at=49, sparse_bytes=2**30)


# Keys


def test_a_key_longer_than_the_file_is_refused(refuses: Refuses) -> None:
    refuses(GgufBytes().raw_item(struct.pack("<Q", 5000) + b"abc"), "takes 5000 bytes, 3 are left", at=32)


@pytest.mark.parametrize("length", [2**16, 2**62, 2**64 - 1])
def test_a_key_longer_than_the_format_allows_is_refused(refuses: Refuses, length: int) -> None:
    made = GgufBytes().raw_item(struct.pack("<Q", length) + b"abc")
    refuses(made, f"a key has {length} bytes, at most 65535", at=FIRST_KEY)


def test_an_empty_key_is_refused(refuses: Refuses) -> None:
    refuses(GgufBytes().u32("", 1), "a key is empty", at=FIRST_KEY)


def test_a_key_that_is_not_utf8_is_refused_at_the_byte(refuses: Refuses) -> None:
    refuses(GgufBytes().u32(b"ab\xff", 1), "a key is not UTF-8", at=FIRST_KEY + 8 + 2)


@pytest.mark.parametrize("type_id", [13, 2**32 - 1])
def test_an_unknown_value_type_is_refused(refuses: Refuses, type_id: int) -> None:
    made = GgufBytes().raw_key("k", type_id, b"\0" * 8)
    refuses(made, f"'k' has value type {type_id}", "0 to 12 are known", at=33)


def test_an_unknown_array_type_is_refused_even_when_empty(refuses: Refuses) -> None:
    refuses(GgufBytes().raw_key("k", raw.ARRAY, struct.pack("<IQ", 13, 0)), "value type 13", at=37)


def test_a_duplicate_key_is_refused(refuses: Refuses) -> None:
    made = GgufBytes().u32("a.b", 1).u32("a.b", 1)
    refuses(made, "key 'a.b' is there twice, first at byte 24", at=24 + 19)


def test_nested_arrays_are_refused_however_deep(refuses: Refuses) -> None:
    nested = struct.pack("<IQ", raw.ARRAY, 1) * 10_000
    refuses(GgufBytes().raw_key("k", raw.ARRAY, nested), "array of arrays", at=37)


@pytest.mark.parametrize("type_id", [raw.UINT8, raw.STRING, raw.FLOAT64])
@pytest.mark.parametrize("count", [2**40, 2**64 - 1])
def test_an_absurd_array_length_is_refused(refuses: Refuses, type_id: int, count: int) -> None:
    made = GgufBytes().raw_key("k", raw.ARRAY, struct.pack("<IQ", type_id, count) + bytes(64))
    refuses(made, f"'k': an array of {count}", "file is truncated", at=49)


def test_an_array_of_more_strings_than_allowed_is_refused_in_a_large_file(refuses: Refuses) -> None:
    data = GgufBytes().raw_key("k", raw.ARRAY, struct.pack("<IQ", raw.STRING, 2**23)).build()
    refuses(data, "8388608 strings, at most 2097152", at=49, sparse_bytes=2**30)


def test_the_strings_of_all_arrays_count_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "MAX_ARRAY_STRINGS", 5)
    made = GgufBytes().strings("a", ["1", "2", "3"]).strings("b", ["4", "5", "6"])
    with pytest.raises(ModelFileError, match="'b': an array of 3 strings, at most 2 are allowed here"):
        read_header(tmp_path, made.build(), {})


@pytest.mark.parametrize("length", [2**62, 2**64 - 1])
def test_an_absurd_string_length_is_refused(refuses: Refuses, length: int) -> None:
    made = GgufBytes().raw_key("k", raw.STRING, struct.pack("<Q", length) + b"abc")
    refuses(made, f"value of 'k' has {length} bytes, at most 67108864", at=37)


@pytest.mark.parametrize("length", [4, 2**62, 2**64 - 1])
@pytest.mark.parametrize("place", [0, 2])
def test_a_string_of_an_array_that_passes_the_end_is_named(refuses: Refuses, length: int, place: int) -> None:
    made = GgufBytes().strings("k", ["ab"] * place, count=place + 1)
    data = made.build() + struct.pack("<Q", length) + b"abc"
    refuses(data, f"'k'[{place}]: a string takes {length} bytes, 3 are left", at=49 + 10 * place + 8)


def test_a_string_array_cut_in_a_length_is_refused(refuses: Refuses) -> None:
    data = GgufBytes().strings("k", ["a" * 20, "b"]).build()[:-5]
    refuses(data, "'k'[1]: the length of a string takes 8 bytes, 4 are left", at=49 + 28)


def test_a_string_value_that_is_not_utf8_is_refused_at_the_byte(refuses: Refuses) -> None:
    refuses(GgufBytes().text("k", b"abc\xc3("), "value of 'k' is not UTF-8", at=24 + 9 + 4 + 8 + 3)


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize(
    ("strings", "index", "into"),
    [
        ([b"a", b"\xff", b"b"], 1, 0),
        ([b"a", b"b", b"caf\xc3"], 2, 3),  # cut inside a character, at the very end
        ([b"caf\xc3", b"\xa9", b"b"], 0, 3),  # one character over two strings
        ([b"x" * 195, b"\xa9"], 1, 0),  # a length of 195 is the byte C3, which begins a character
        ([b"x" * 300, b"\xed\xa0\x80"], 1, 0),  # a surrogate
        ([b"x" * 200 + b"\xc0\x80"], 0, 200),  # an overlong zero
    ],
)
def test_an_array_string_that_is_not_utf8_is_named(
    refuses: Refuses, order: str, strings: list[bytes], index: int, into: int
) -> None:
    offset = 49 + sum(8 + len(string) for string in strings[:index]) + 8 + into
    refuses(GgufBytes(order=order).strings("k", strings), f"'k'[{index}] is not UTF-8", at=offset)


def test_utf8_is_checked_across_the_chunks_that_are_looked_at() -> None:
    def good_bytes(text: bytes, chunk_bytes: int) -> int:
        return arrays._utf8_bytes(np.frombuffer(text, np.uint8), chunk_bytes)

    text = ("aé日🙂" * 50).encode()
    for chunk_bytes in range(1, 12):
        assert good_bytes(text, chunk_bytes) == len(text)
        assert len(text) - 5 < good_bytes(text[:-1], chunk_bytes) < len(text) - 1
        assert len(text) - chunk_bytes - 4 < good_bytes(text + b"\xff" + text, chunk_bytes) <= len(text)


@pytest.mark.parametrize("place", [0, 1, 17, 998, 999])
def test_a_bad_string_is_found_in_an_array_of_many_chunks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: int
) -> None:
    monkeypatch.setattr(arrays._utf8_bytes, "__defaults__", (64,))
    strings = ["größe" * (index % 5 * 9) for index in range(1000)]
    bad: list[str | bytes] = [*(string.encode() for string in strings[:place]), b"\xe6\x97", *strings[place + 1 :]]
    with pytest.raises(ModelFileError, match=rf"'k'\[{place}\] is not UTF-8"):
        read_header(tmp_path, GgufBytes().strings("k", bad).build(), {})


def test_a_truth_value_of_two_is_refused(refuses: Refuses) -> None:
    refuses(GgufBytes().raw_key("k", raw.BOOL, b"\x02"), "'k' is a truth value of 2", at=37)


def test_a_truth_value_of_two_in_an_array_is_refused(refuses: Refuses) -> None:
    made = GgufBytes().numbers("k", raw.UINT8, [1, 0, 2]).build()
    data = made.replace(struct.pack("<IQ", raw.UINT8, 3), struct.pack("<IQ", raw.BOOL, 3))
    refuses(data, "'k'[2] is a truth value of 2", at=49 + 2)


@pytest.mark.parametrize("alignment", [0, 3, 13, 48, 2**32 - 1])
def test_an_alignment_that_is_no_power_of_two_is_refused(refuses: Refuses, alignment: int) -> None:
    made = GgufBytes().u32("general.alignment", alignment)
    refuses(made, f"general.alignment is {alignment}, a power of two was expected", at=FIRST_KEY)


@pytest.mark.parametrize(("type_id", "name"), [(raw.INT32, "INT32"), (raw.UINT64, "UINT64"), (raw.FLOAT32, "FLOAT32")])
def test_an_alignment_of_the_wrong_type_is_refused(refuses: Refuses, type_id: int, name: str) -> None:
    made = GgufBytes().number("general.alignment", type_id, 32)
    refuses(made, f"general.alignment is of type {name}, UINT32 was expected", at=FIRST_KEY)


def test_an_alignment_given_as_text_is_refused(refuses: Refuses) -> None:
    made = GgufBytes().text("general.alignment", "32")
    refuses(made, "general.alignment is of type STRING, UINT32 was expected", at=FIRST_KEY)


def test_names_from_the_file_cannot_break_the_line_or_the_terminal(refuses: Refuses) -> None:
    refuses(GgufBytes().raw_key("a\n\x1b[31m", 99, b""), r"key 'a\n\x1b[31m' has value type 99", at=39)


# Tensors


@pytest.mark.parametrize("length", [64, 100, 2**62, 2**64 - 1])
def test_a_tensor_name_of_64_bytes_or_more_is_refused(refuses: Refuses, length: int) -> None:
    name = struct.pack("<Q", length) + b"n" * min(length, 100)
    made = GgufBytes().raw_tensor(name + struct.pack("<IQIQ", 1, 8, raw.F32, 0))
    refuses(made, f"name of tensor 0 has {length} bytes, at most 63", at=FIRST_KEY)


def test_an_empty_tensor_name_is_refused(refuses: Refuses) -> None:
    refuses(f32_vector(""), "tensor 0 has an empty name", at=FIRST_KEY)


def test_a_tensor_name_that_is_not_utf8_is_refused(refuses: Refuses) -> None:
    made = GgufBytes().tensor(b"w\xff", [8], raw.F32, bytes(32))
    refuses(made, "name of tensor 0 is not UTF-8", at=FIRST_KEY + 8 + 1)


def test_a_repeated_tensor_name_is_refused(refuses: Refuses) -> None:
    made = f32_vector().tensor("w", [8], raw.F32, bytes(32))
    refuses(made, "tensor 'w' is there twice, first at byte 24", at=24 + 33)


@pytest.mark.parametrize("num_dims", [0, 5, 2**32 - 1])
def test_a_number_of_dimensions_other_than_1_to_4_is_refused(refuses: Refuses, num_dims: int) -> None:
    info = struct.pack("<Q", 1) + b"w" + struct.pack("<I5QIQ", num_dims, 8, 1, 1, 1, 1, raw.F32, 0)
    refuses(GgufBytes().raw_tensor(info), f"tensor 'w' has {num_dims} dimensions, 1 to 4", at=33)


@pytest.mark.parametrize("extent", [0, -1, -(2**63)])
@pytest.mark.parametrize("axis", [0, 1, 3])
def test_an_extent_of_zero_or_less_is_refused(refuses: Refuses, extent: int, axis: int) -> None:
    extents = [8, 8, 8, 8]
    extents[axis] = extent
    made = GgufBytes().tensor("w", extents, raw.F32, b"")
    refuses(made, f"tensor 'w' has extent {extent} on axis {axis}", at=37 + 8 * axis)


def test_a_number_of_elements_beyond_64_bits_is_refused(refuses: Refuses) -> None:
    made = GgufBytes().tensor("w", [2**33, 2**31], raw.F32, b"")
    refuses(made, "more elements than 64 bits can count", at=45)


def test_a_number_of_elements_that_wraps_to_a_small_one_is_refused(refuses: Refuses) -> None:
    made = GgufBytes().tensor("w", [2**32, 2**32, 2], raw.F32, bytes(32))
    refuses(made, "more elements than 64 bits can count", at=45)


def test_a_number_of_bytes_beyond_64_bits_is_refused(refuses: Refuses) -> None:
    made = GgufBytes().tensor("w", [2**61], raw.F32, b"")
    refuses(made, f"has {2**63} bytes, more than 64 bits can count", at=FIRST_KEY)


@pytest.mark.parametrize("type_id", [4, 5, 31, 41, 2**32 - 1])
def test_an_unknown_tensor_type_is_refused_and_the_known_ones_listed(refuses: Refuses, type_id: int) -> None:
    made = GgufBytes().tensor("blk.0.w", [256], type_id, bytes(256))
    refuses(
        made,
        f"tensor 'blk.0.w' has unknown type id {type_id}; known are 0 F32",
        "12 Q4_K",
        "; others need a plugin",
        at=51,
    )


@pytest.mark.parametrize(("type_id", "name", "block"), [(raw.Q8_0, "Q8_0", 32), (raw.Q4_K, "Q4_K", 256)])
def test_a_row_that_is_not_whole_blocks_is_refused(refuses: Refuses, type_id: int, name: str, block: int) -> None:
    made = GgufBytes().tensor("w", [block + block // 2, 2], type_id, bytes(4096))
    refuses(made, f"rows of {block + block // 2} elements", f"{name}'s block of {block}", at=FIRST_KEY)


def test_an_unaligned_offset_is_refused(refuses: Refuses) -> None:
    made = GgufBytes().tensor("w", [8], raw.F32, bytes(96), 16)
    refuses(made, "tensor 'w' has offset 16, a multiple of the alignment 32", at=49)


def test_offsets_written_for_another_alignment_are_refused(refuses: Refuses) -> None:
    made = GgufBytes(alignment=32).u32("general.alignment", 64)
    made.tensor("a", [8], raw.F32, bytes(32)).tensor("b", [8], raw.F32, bytes(32))
    refuses(made, "tensor 'b' has offset 32, a multiple of the alignment 64", at=115)


@pytest.mark.parametrize("offset", [2**63 - 32, 2**64 - 32])
def test_an_offset_beyond_64_bits_is_refused(refuses: Refuses, offset: int) -> None:
    made = GgufBytes().tensor("w", [8], raw.F32, bytes(32), offset)
    refuses(made, f"tensor 'w' has offset {offset}, which lies beyond any file", at=49)


def test_an_offset_beyond_the_file_is_refused(refuses: Refuses) -> None:
    made = GgufBytes().tensor("w", [8], raw.F32, bytes(32), 2**40)
    refuses(made, f"in the data of tensor 'w': {2**40} bytes are missing", at=96)


def test_two_huge_tensors_whose_sizes_together_wrap_are_refused(refuses: Refuses) -> None:
    huge = 2**63 - 64
    made = GgufBytes().tensor("a", [huge], 24, b"", 0).tensor("b", [huge], 24, b"", huge)
    refuses(made, f"tensor 'b' has offset {huge}, which lies beyond any file", at=82)


@pytest.mark.parametrize("offset", [0, 32])
def test_overlapping_tensors_are_refused(refuses: Refuses, offset: int) -> None:
    made = GgufBytes().tensor("a", [16], raw.F32, bytes(64), 0)
    made.tensor("b", [16], raw.F32, bytes(64), offset)
    refuses(made, "tensors 'a' and 'b' overlap", f"the second begins at {offset}", at=57)


def test_an_interrupted_download_says_how_many_bytes_are_missing(refuses: Refuses) -> None:
    made = f32_vector("a").tensor("b", [16], raw.F32, bytes(64)).tensor("c", [8], raw.F32, bytes(32))
    data = made.build()
    cut = len(data) - 40
    refuses(data[:cut], "'b': 40 bytes are missing", f"{len(data)} were expected in all", at=cut)


def test_a_file_cut_in_its_last_padding_is_refused(refuses: Refuses) -> None:
    data = GgufBytes().tensor("w", [2], raw.F32, bytes(8)).build()
    refuses(data[:-3], "the padding after the last tensor: 3 bytes are missing", at=len(data) - 3)


def test_every_truncation_is_refused_except_one_that_loses_only_padding(tmp_path: Path) -> None:
    made = GgufBytes().text("general.architecture", "llama").strings("s", ["a", "größe"])
    made.numbers("n", raw.FLOAT32, [1, 2]).f32("a", [1, 2, 3]).f32("b", [4, 5, 6])
    data, path = made.build(), tmp_path / "cut.gguf"
    opened = []
    for cut in range(len(data)):
        path.write_bytes(data[:cut])
        try:
            open_gguf(path, LoadOptions())
        except ModelFileError:
            continue
        opened.append(cut)
    assert opened == [len(made.build(pad=False))]


# The file itself


def test_a_missing_file_is_refused(refuses: Refuses) -> None:
    refuses.open("cannot be read: No such file or directory", at=None)


def test_a_folder_named_like_a_model_is_refused(refuses: Refuses) -> None:
    refuses.path.mkdir()
    refuses.open("not a regular file", at=None)


def test_a_named_pipe_is_refused_without_waiting_for_a_writer(refuses: Refuses) -> None:
    os.mkfifo(refuses.path)
    refuses.open("not a regular file", at=None)
