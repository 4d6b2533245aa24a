"""The how-to of a quantisation type lists helpers of the headers as they are."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "how-to" / "add-a-qtype.md").read_text(encoding="utf-8")
OPS = ROOT / "plugins" / "executors" / "cuda" / "ops"
HEADERS = "\n".join(
    (OPS / name).read_text(encoding="utf-8") for name in ("common.cuh", "activations.cuh", "unpack.cuh")
)
SIGNATURE = re.compile(r"^\| `((?:void|int|float\d?|uint\d+) [^`]*\))` \|", re.MULTILINE)
LISTED = SIGNATURE.findall(PAGE)


def plain(text: str) -> str:
    """A signature without what depends on where it stands."""
    text = re.sub(r"__device__|__forceinline__|static|typename Q::|<Q>", "", text)
    return " ".join(text.split())


def test_the_page_lists_what_a_header_needs() -> None:
    names = {re.sub(r"<Q>", "", signature).split("(")[0].split()[-1] for signature in LISTED}
    assert {"half_bits", "sums_times", "sum", "raw_word", "put_u16", "affine4", "scaled4", "dot_all"} <= names


@pytest.mark.parametrize("signature", LISTED)
def test_a_helper_of_the_page_is_one_of_the_headers(signature: str) -> None:
    assert plain(signature) in plain(HEADERS)
