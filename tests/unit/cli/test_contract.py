"""``mortice contract``: derive, diff, show."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from xml.etree import ElementTree as ET

import pytest
from attrs import evolve

from mortice.core.testing.tiny_models import write_tiny_model
from tests.support.registry import install
from tests.support.tiny import CONTRACTS
from tests.unit.cli.conftest import Mortice


@pytest.fixture
def unknown(tmp_path: Path) -> Path:
    """A model of an architecture nobody knows."""
    contract = evolve(CONTRACTS["qwen3"], name="newfam", architectures=("newfam",))
    return write_tiny_model(tmp_path / "new.gguf", contract, sizes={"rope_freq_base": 1e4})


def test_the_way_from_an_unknown_file_to_an_answer(mortice: Mortice, unknown: Path, tmp_path: Path) -> None:
    """Refused, drafted, filled in, validated, run."""
    own = tmp_path / "newfam.toml"
    assert mortice("validate", unknown).code == 2
    derived = mortice("contract", "derive", unknown, "-o", own)
    assert (derived.code, derived.out) == (0, "")
    refused = mortice("validate", unknown, "--contract", own)
    assert refused.code == 2
    assert "rope.style" in refused.err
    assert "ffn.activation" in refused.err
    text = own.read_text()
    own.write_text(text.replace('style = "?"', 'style = "halves"').replace('activation = "?"', 'activation = "silu"'))
    assert mortice("validate", unknown, "--contract", own, "--strict").code == 0
    ran = mortice("run", "-m", unknown, "--contract", own, "-p", "a", "-n", 2, "--json", "--executor", "reference")
    assert ran.code == 0
    assert len(ran.json["ids"]) == 2


def test_what_is_open_is_said_with_line_and_key(mortice: Mortice, unknown: Path) -> None:
    ran = mortice("contract", "derive", unknown)
    lines = ran.out.splitlines()
    said = {line.partition(": ")[0]: line for line in ran.err.splitlines()}
    place = next(number for number, line in enumerate(lines, 1) if line.startswith("style = "))
    assert said[f"line {place}"].startswith(f"line {place}: fill in rope.style: a file does not say")
    assert ran.err.splitlines()[-1] == "not usable before rope.style, ffn.activation are filled in"
    assert mortice("contract", "derive", unknown, "--quiet").err == ""


def test_a_family_that_is_alike_fills_in_the_rest(mortice: Mortice, unknown: Path, tmp_path: Path) -> None:
    own = tmp_path / "newfam.toml"
    ran = mortice("contract", "derive", unknown, "--like", "qwen3", "--name", "mine", "-o", own)
    assert (ran.code, ran.err) == (0, "")
    assert mortice("validate", unknown, "--contract", own).code == 0
    assert 'name = "mine"' in own.read_text()
    assert "as in contract qwen3" in own.read_text()


def test_a_draft_overwrites_only_when_told(mortice: Mortice, unknown: Path, tmp_path: Path) -> None:
    (tmp_path / "own.toml").write_text("mine")
    ran = mortice("contract", "derive", unknown, "-o", tmp_path / "own.toml")
    assert ran.code == 2
    assert "own.toml: is there already; --force overwrites it" in ran.err
    assert (tmp_path / "own.toml").read_text() == "mine"
    assert mortice("contract", "derive", unknown, "-o", tmp_path / "own.toml", "--force").code == 0
    assert "architectures" in (tmp_path / "own.toml").read_text()


def test_a_draft_as_json_has_the_text_and_what_is_open(mortice: Mortice, unknown: Path) -> None:
    found = mortice("contract", "derive", unknown, "--json").json
    assert found["contract"] == mortice("contract", "derive", unknown, "-q").out
    assert found["unknown"].keys() == {"rope.style", "ffn.activation"}
    assert found["remarks"] == []


def test_equal_contracts_have_exit_code_0_and_others_1(mortice: Mortice) -> None:
    toml = Path(__file__).parents[3] / "arch_contracts" / "llama.toml"
    same = mortice("contract", "diff", "llama", toml)
    assert (same.code, same.out) == (0, "no difference\n")
    other = mortice("contract", "diff", "llama", "qwen3")
    assert other.code == 1
    assert any(line.split() == ["rope.style", "adjacent", "halves"] for line in other.out.splitlines())
    found = mortice("contract", "diff", "llama", "qwen3", "--json")
    assert (found.code, found.json["equal"]) == (1, False)
    assert {"key": "rope.style", "first": "adjacent", "second": "halves"} in found.json["differences"]


@pytest.mark.parametrize("second", ["nope", "none.toml", ""])
def test_a_contract_that_cannot_be_had_has_exit_code_2(mortice: Mortice, second: str) -> None:
    ran = mortice("contract", "diff", "llama", second)
    assert (ran.code, ran.out) == (2, "")
    assert len(ran.err.splitlines()) == 1


def test_contracts_are_listed_by_name_with_their_architectures(mortice: Mortice) -> None:
    ran = mortice("contract", "diff", "llama", "nope")
    assert "have granite, llama, mistral (mistral3), olmo2, phi3, " in ran.err
    assert mortice("contract", "diff", "mistral", "mistral3").out == "no difference\n"


def test_a_name_that_two_contracts_answer_to_is_refused(
    mortice: Mortice, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = """
from attrs import evolve
from mortice.arch_contracts.schema import builtin_contracts
from mortice.core.plugin.hookspecs import hookimpl
mortice_contract_version = 1
@hookimpl
def mortice_arch_contracts():
    qwen3 = next(contract for contract in builtin_contracts() if contract.name == "qwen3")
    return [evolve(qwen3, name="llama", architectures=("acme",))]
"""
    install(tmp_path, "acme-two-names", {"acme": "acme_two_names"}, source)
    monkeypatch.syspath_prepend(tmp_path)
    ran = mortice("contract", "diff", "llama", "qwen3")
    assert ran.code == 2
    assert ran.err.endswith(
        "'llama' is the name or the architecture of several contracts; write archs:llama or acme:llama\n"
    )
    found = mortice("contract", "diff", "archs:llama", "acme:llama", "--json").json["differences"]
    assert {"key": "architectures", "first": "[llama]", "second": "[acme]"} in found
    assert "llama, llama (acme), mistral (mistral3)" in mortice("contract", "show", "nope").err


def test_the_program_of_a_contract_is_shown_for_sizes(mortice: Mortice) -> None:
    ran = mortice("contract", "show", "qwen3", "--sizes", "num_layers=3,hidden_size=96,num_heads=6")
    assert ran.code == 0
    assert ran.out.startswith("qwen3: 3 layers, hidden size 96, vocabulary 512, context 512\n")
    assert "layers {0..2}, each:" in ran.out
    assert "rms_norm(attn_q, eps 1e-05) of each of 6 parts * attn_q_norm[16]" in ran.out


def test_the_program_of_a_contract_is_shown_for_a_file(mortice: Mortice, tiny: Path, unknown: Path) -> None:
    ran = mortice("contract", "show", "llama", "--file", tiny, "--json")
    assert (ran.code, ran.json["layers"]) == (0, 2)
    assert [part["layers"] for part in ran.json["parts"]] == [[], [0, 1], []]
    wrong = mortice("contract", "show", "qwen2", "--file", unknown)
    assert wrong.code == 2
    assert "blk.{0..1}.attn_q.bias: missing; qwen2 requires attn_q_bias" in wrong.err
    assert "blk.0." not in wrong.err
    both = mortice("contract", "show", "llama", "--file", tiny, "--sizes", "num_layers=1")
    assert (both.code, both.err) == (2, "mortice: error: --file and --sizes: found both, wanted one\n")


@pytest.mark.parametrize("sizes", ["num_layers", "num_layers=x", "=3", "", "num_layers=2,,"])
def test_sizes_that_cannot_be_read_are_refused(mortice: Mortice, sizes: str) -> None:
    ran = mortice("contract", "show", "llama", "--sizes", sizes)
    assert ran.code == 2
    assert "wanted NAME=NUMBER" in ran.err


def test_a_picture_is_drawn_without_further_packages(mortice: Mortice, tmp_path: Path) -> None:
    ran = mortice("contract", "show", "llama", "--picture", tmp_path / "llama.svg")
    assert (ran.code, ran.err) == (0, f"{tmp_path}/llama.svg: drawn\n")
    picture = ET.parse(tmp_path / "llama.svg").getroot()
    assert picture.tag == "{http://www.w3.org/2000/svg}svg"
    assert any(text.text == "layers {0..1}, each" for text in picture.iter("{http://www.w3.org/2000/svg}text"))
    refused = mortice("contract", "show", "llama", "--picture", tmp_path / "no" / "x.svg")
    assert (refused.code, refused.out) == (2, "")
    again = mortice("contract", "show", "llama", "--picture", tmp_path / "llama.svg")
    assert (again.code, "llama.svg: is there already; --force overwrites it" in again.err) == (2, True)
    assert mortice("contract", "show", "llama", "--picture", tmp_path / "llama.svg", "--force").code == 0


def test_a_picture_that_cannot_be_written_leaves_the_old_one_alone(
    mortice: Mortice, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    picture = tmp_path / "llama.svg"
    picture.write_text("mine")

    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Path, "write_text", full)
    ran = mortice("contract", "show", "llama", "--picture", picture, "--force", "-q")
    assert (ran.code, ran.err) == (1, f"mortice: error: {picture}: cannot be written: No space left on device\n")
    assert picture.read_text() == "mine"
    assert [path.name for path in tmp_path.iterdir()] == ["llama.svg"]


def test_a_contract_that_is_read_is_never_written_over(mortice: Mortice, unknown: Path, tmp_path: Path) -> None:
    own = tmp_path / "own.toml"
    own.write_text(Path(__file__).parents[3].joinpath("arch_contracts", "llama.toml").read_text())
    before = own.read_bytes()
    for asked in (("show", own, "--picture", own), ("derive", unknown, "--like", own, "-o", own)):
        ran = mortice("contract", *asked, "--force")
        assert (ran.code, "own.toml: is a file that this command reads, wanted another" in ran.err) == (2, True)
    assert own.read_bytes() == before
