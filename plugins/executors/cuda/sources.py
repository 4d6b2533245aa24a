"""Which kernel source serves which group: file, traits headers and compile-time constants."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from attrs import frozen

from mortice.core.model.operators import Attention, Norm
from mortice.core.model.weight_plan import PlannedWeight
from mortice.plugins.executors.cuda.choosing import choice_blocks, choice_defines
from mortice.plugins.executors.cuda.flatten import flatten
from mortice.plugins.executors.cuda.fusion import PlaceGroup
from mortice.plugins.executors.cuda.layouts import tile_geometry
from mortice.plugins.executors.cuda.nvrtc import Source

__all__ = ["ACTIVATIONS", "GEMV_THREADS", "KernelSources"]

OPS = Path(__file__).parent / "ops"

GEMV_THREADS = 512

ACTIVATIONS: Mapping[str | None, str] = {
    None: "kIdentity",
    "silu": "kSilu",
    "gelu_tanh": "kGeluTanh",
    "gelu_erf": "kGeluErf",
    "relu": "kRelu",
    "relu_squared": "kReluSquared",
}
_NORMS = {None: "kNoNorm", "rms": "kRmsNorm", "layer": "kLayerNorm"}
_KV = {"f16": "__half", "f32": "float"}


@frozen
class KernelSources:
    """Makes sources; `traits` gives the header of a quantisation type by name."""

    traits: Mapping[str, Path]

    def gemv(
        self,
        weights: Sequence[PlannedWeight],
        *,
        columns: int,
        tokens: int,
        norm: Norm | None,
        gated: bool,
        activation: str | None,
        quantize_activations: bool,
    ) -> Source:
        """Linear maps of one input, see ``ops/gemv.cu``."""
        defines: dict[str, str | int] = {
            "COLS": columns,
            "TOKENS": tokens,
            "THREADS": GEMV_THREADS,
            "NORM": _NORMS[norm.type if norm is not None else None],
            "GATED": int(gated),
            "ACTIVATION": ACTIVATIONS[activation],
            "QUANTIZE_ACTIVATIONS": int(quantize_activations),
            "SEGMENTS": ",".join(f"Segment<{_tiling(weight)},{weight.rows}>" for weight in weights),
        }
        return self._source("gemv.cu", defines, [weight.tensor.qtype.name for weight in weights])

    def embed(self, weight: PlannedWeight) -> Source:
        """Rows of a weight by id, see ``ops/embed.cu``."""
        qtype = weight.tensor.qtype.name
        defines: dict[str, str | int] = {"WEIGHT": f"Tile<{_tiling(weight)}>", "QTYPE": qtype, "COLS": weight.columns}
        return self._source("embed.cu", defines, [qtype])

    def attention(self, attention: Attention, kv_type: str, splits: int) -> Source:
        """See ``ops/attention.cu``."""
        defines: dict[str, str | int] = {
            "HEAD_DIM": attention.head_dim,
            "GROUP": attention.num_heads // attention.num_kv_heads,
            "KV": _KV[kv_type],
            "SPLITS": splits,
            "SOFTCAP": int(attention.softcap > 0),
            "WINDOWED": int(attention.window > 0),
        }
        return self._source("attention.cu", defines)

    def place(self, group: PlaceGroup, kv_type: str) -> Source:
        """See ``ops/place.cu``."""
        rope, norm = group.q_rope, group.q_norm
        defines: dict[str, str | int] = {
            "HEAD_DIM": group.write.head_dim,
            "Q_HEADS": group.attention.num_heads,
            "KV_HEADS": group.write.num_kv_heads,
            "DIMS": rope.dims if rope is not None else 0,
            "HALVES": int(rope is not None and rope.style == "halves"),
            "HEAD_NORM": _NORMS[norm.type if norm is not None else None],
            "KV": _KV[kv_type],
        }
        return self._source("place.cu", defines)

    def kv_write(self, kv_type: str) -> Source:
        """See ``ops/kv_write.cu``."""
        return self._source("kv_write.cu", {"KV": _KV[kv_type]})

    def plain(self) -> Source:
        """Every operator that nothing fuses, see ``ops/plain.cu``."""
        return self._source("plain.cu", {})

    def read(self) -> Source:
        """See ``ops/read.cu``."""
        return self._source("read.cu", {})

    def choose(self, vocab_size: int, sm_count: int) -> Source:
        """See ``ops/choose.cu``."""
        return self._source("choose.cu", choice_defines(vocab_size, choice_blocks(sm_count)))

    def _source(self, file: str, defines: Mapping[str, str | int], qtypes: Sequence[str] = ()) -> Source:
        headers = [self.traits[name] for name in sorted(set(qtypes))]
        text = flatten(OPS / file, [OPS], before=headers)
        return Source(name=file.removesuffix(".cu"), text=text, defines=defines)


def _tiling(weight: PlannedWeight) -> str:
    geometry = tile_geometry(weight.tensor.qtype, weight.rows, weight.columns)
    return f"{weight.tensor.qtype.name},{geometry.tile_rows},{geometry.tile_columns}"
