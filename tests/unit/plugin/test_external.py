"""The real thing: a package of its own, built and installed, whose loader, contract and qtype a run picks up."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from tests.packaging.running import ROOT, attempt, run

TOY = ROOT / "tests" / "plugins" / "external" / "toy"
HIDDEN, HEADS, HEAD_DIM, FFN, VOCAB, LAYERS = 64, 2, 32, 96, 50, 2
IDS = [3, 41, 7, 7, 0]

Array = NDArray[np.float32]
Python = Callable[[str], str]


@pytest.fixture(scope="session")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder into which pip has installed the toy plugin."""
    folder = tmp_path_factory.mktemp("external")
    source, site = folder / "toy", folder / "site"
    shutil.copytree(TOY, source, ignore=shutil.ignore_patterns("__pycache__"))
    wheels = folder / "wheels"
    run([sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", wheels], cwd=source)
    (wheel,) = wheels.glob("mortice_toy-1.0-*.whl")
    run([sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", site, wheel], cwd=folder)
    return site


@pytest.fixture
def python(site: Path, tmp_path: Path) -> Python:
    """Run code in a fresh interpreter that has the plugin; warnings are errors."""

    def execute(code: str) -> str:
        return run([sys.executable, "-W", "error", "-c", code], cwd=tmp_path, PYTHONPATH=str(site))

    return execute


def t2(values: Array) -> tuple[bytes, Array]:
    """Rows as T2 blocks, and the values those stand for."""
    blocks = values.reshape(-1, 32)
    scales = np.abs(blocks).mean(axis=1, keepdims=True).astype(np.float16)
    codes = (np.clip(np.rint(blocks / scales), -1, 1) + 1).astype(np.uint8).reshape(-1, 8, 4)
    packed = np.bitwise_or.reduce(codes << np.array([0, 2, 4, 6], np.uint8), axis=2)
    data = np.concatenate([scales.view(np.uint8), packed], axis=1).tobytes()
    stored = scales.astype(np.float32) * (codes.reshape(-1, 32).astype(np.float32) - 1)
    return data, stored.reshape(values.shape)


def write_toy(path: Path, *, leave_out: str = "", architecture: str = "toy") -> dict[str, Array]:
    """Write a random model and give the values of its weights."""
    rng = np.random.default_rng(1)
    shapes: dict[str, tuple[int, ...]] = {"token_embd.weight": (VOCAB, HIDDEN), "output_norm.weight": (HIDDEN,)}
    for layer in range(LAYERS):
        for name, shape in {
            "attn_norm": (HIDDEN,),
            "attn_q": (HEADS * HEAD_DIM, HIDDEN),
            "attn_k": (HEAD_DIM, HIDDEN),
            "attn_v": (HEAD_DIM, HIDDEN),
            "attn_output": (HIDDEN, HEADS * HEAD_DIM),
            "ffn_norm": (HIDDEN,),
            "ffn_up": (FFN, HIDDEN),
            "ffn_down": (HIDDEN, FFN),
        }.items():
            shapes[f"blk.{layer}.{name}.weight"] = shape
    weights: dict[str, Array] = {}
    tensors, body = {}, b""
    for name, shape in shapes.items():
        values = rng.standard_normal(shape, np.float32)
        kind = "F32" if len(shape) == 1 else "T2"
        data, weights[name] = t2(values) if kind == "T2" else (values.tobytes(), values)
        if name != leave_out:
            tensors[name] = (kind, shape, len(body))
            body += data
    metadata = {
        "general.architecture": architecture,
        "toy.block_count": LAYERS,
        "toy.embedding_length": HIDDEN,
        "toy.attention.head_count": HEADS,
        "toy.attention.head_count_kv": 1,
        "toy.attention.key_length": HEAD_DIM,
        "toy.feed_forward_length": FFN,
        "toy.context_length": 64,
        "toy.vocab_size": VOCAB,
    }
    path.write_bytes(json.dumps({"metadata": metadata, "tensors": tensors}).encode() + b"\n" + body)
    return weights


def rms_norm(x: Array, gamma: Array) -> Array:
    scale: Array = np.sqrt((x * x).mean(axis=-1, keepdims=True) + np.float32(1e-6))
    return x / scale * gamma


def forward(w: dict[str, Array], ids: list[int]) -> Array:
    """The toy family in NumPy: its logits after each token, (tokens, VOCAB)."""
    x = w["token_embd.weight"][ids]
    future = np.triu(np.full((len(ids), len(ids)), -np.inf, np.float32), 1)
    for layer in range(LAYERS):
        part = {name: w[f"blk.{layer}.{name}.weight"] for name in ("attn_q", "attn_k", "attn_v", "attn_output")}
        h = rms_norm(x, w[f"blk.{layer}.attn_norm.weight"])
        q = (h @ part["attn_q"].T).reshape(len(ids), HEADS, HEAD_DIM).transpose(1, 0, 2)
        scores = q @ (h @ part["attn_k"].T).T / np.sqrt(np.float32(HEAD_DIM)) + future
        weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
        mixed = weights / weights.sum(axis=-1, keepdims=True) @ (h @ part["attn_v"].T)
        x = x + mixed.transpose(1, 0, 2).reshape(len(ids), -1) @ part["attn_output"].T
        h = rms_norm(x, w[f"blk.{layer}.ffn_norm.weight"])
        x = x + np.maximum(h @ w[f"blk.{layer}.ffn_up.weight"].T, 0) @ w[f"blk.{layer}.ffn_down.weight"].T
    return rms_norm(x, w["output_norm.weight"]) @ w["token_embd.weight"].T


def test_a_run_picks_up_an_installed_loader_contract_and_qtype(python: Python, tmp_path: Path) -> None:
    expected = forward(write_toy(tmp_path / "model.toy"), IDS)
    said = python(
        f"""
import mortice, numpy as np
with mortice.load("model.toy", executor="reference") as pipe:
    np.save("logits.npy", pipe.logits({IDS}))
    file, types = pipe.model.file, pipe.registry.qtypes
    print(file.loader, file.format, pipe.registry.contracts["toy"].plugin, types["T2"].plugin)
    print(pipe.registry.manager.records["toy"].distribution)
"""
    )
    assert said.splitlines() == ["toy toy toy toy", "mortice-toy 1.0"]
    logits = np.load(tmp_path / "logits.npy")
    assert logits.dtype == np.float32
    np.testing.assert_allclose(logits, expected, rtol=2e-4, atol=2e-4 * np.abs(expected).max())


def test_the_installed_contract_is_what_the_file_is_held_against(python: Python, tmp_path: Path) -> None:
    write_toy(tmp_path / "model.toy", leave_out="blk.1.ffn_up.weight")
    said = python(
        """
import mortice
report = mortice.validate("model.toy")
for finding in report.findings.errors:
    print(report.contract.name, finding.rule, finding.subject)
"""
    )
    assert said.splitlines() == ["toy role.missing blk.1.ffn_up.weight"]


def test_without_the_plugin_the_file_is_refused(tmp_path: Path) -> None:
    write_toy(tmp_path / "model.toy")
    done = attempt([sys.executable, "-c", "import mortice; mortice.load('model.toy')"], cwd=tmp_path)
    assert done.returncode == 1
    assert "ModelFileError: model.toy: no loader takes it; asked: loaders-gguf" in done.stdout


def test_a_file_cut_short_is_refused_by_the_installed_loader(python: Python, tmp_path: Path) -> None:
    write_toy(tmp_path / "model.toy")
    whole = (tmp_path / "model.toy").read_bytes()
    (tmp_path / "model.toy").write_bytes(whole[:-1])
    said = python(
        """
import mortice
try:
    mortice.load("model.toy")
except mortice.InputError as error:
    print(error, *error.__notes__, sep="\\n")
"""
    ).splitlines()
    assert f"the file at {len(whole) - 1}" in said[0]
    assert said[1] == "raised by plugin toy (mortice-toy 1.0) in mortice_open_model"


def test_blocked_in_the_config_it_takes_no_part(python: Python, tmp_path: Path) -> None:
    write_toy(tmp_path / "model.toy")
    said = python(
        """
from attrs import evolve
import mortice
from mortice.core.config import ModelConfig, PluginsConfig
from pathlib import Path
config = mortice.RunConfig(model=ModelConfig(path=Path("model.toy")), plugins=PluginsConfig(block=("toy",)))
try:
    mortice.load(config)
except mortice.InputError as error:
    print(error)
"""
    )
    assert "no loader takes it; asked: loaders-gguf" in said
    assert "; plugin toy (mortice-toy 1.0) is blocked: in plugins.block; it begins with" in said


def test_the_command_line_lists_it_and_validates_with_it(site: Path, tmp_path: Path) -> None:
    def mortice(*arguments: str) -> str:
        code = "import sys; from mortice.core.cli.main import main; sys.exit(main())"
        return run([sys.executable, "-c", code, *arguments], cwd=tmp_path, PYTHONPATH=str(site))

    write_toy(tmp_path / "model.toy")
    (toy,) = (plugin for plugin in json.loads(mortice("plugins", "list", "--json")) if plugin["name"] == "toy")
    assert (toy["distribution"], toy["status"]) == ("mortice-toy 1.0", "active")
    assert toy["gives"] == {"contracts": ["toy"], "qtypes": ["T2"], "loaders": ["toy"]}
    assert "model.toy" in mortice("validate", "model.toy")
