"""Which kernel source serves which group: file, traits headers and compile-time constants."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from attrs import evolve, field, frozen

from mortice.core.model.operators import Attention, Norm
from mortice.core.model.weight_plan import PlannedWeight
from mortice.plugins.executors.cuda.compile.flatten import Headers
from mortice.plugins.executors.cuda.compile.nvrtc import Source
from mortice.plugins.executors.cuda.lowering.attend_rows import rows_kernel
from mortice.plugins.executors.cuda.lowering.choice_args import choice_defines
from mortice.plugins.executors.cuda.lowering.fusion import PlaceGroup
from mortice.plugins.executors.cuda.lowering.gemv import GemvShape
from mortice.plugins.executors.cuda.lowering.layouts import tile_geometry
from mortice.plugins.executors.cuda.lowering.matmul import AttentionTile, MatmulTile, Slices
from mortice.plugins.executors.cuda.lowering.matmul_input import InputCut, LeftProducts
from mortice.plugins.executors.cuda.lowering.matmul_ring import RingShape

__all__ = ["ACTIVATIONS", "KV_NAMES", "KernelSources", "ring_defines"]

OPS = Path(__file__).parents[1] / "ops"

ACTIVATIONS: Mapping[str | None, str] = {
    None: "kIdentity",
    "silu": "kSilu",
    "gelu_tanh": "kGeluTanh",
    "gelu_erf": "kGeluErf",
    "relu": "kRelu",
    "relu_squared": "kReluSquared",
}
_RUN_PAGES = 2
"""Pages of the KV cache worth a block of their own: with 2 or 3, tokens at some hundred positions took longer."""
_OWN_INSTRUCTIONS = ("-arch=sm_90a",)
"""Products of warpgroups are of sm_90 alone; the compiler takes the last architecture it is given."""
_NORMS = {None: "kNoNorm", "rms": "kRmsNorm", "layer": "kLayerNorm"}
KV_NAMES: Mapping[str, str] = {"f16": "__half", "f32": "float", "q8_0": "Q8"}
"""The C++ types of `mortice.core.model.kv_types.KV_TYPES`, see ``ops/kv_cache.cuh``."""


@frozen(eq=False)
class KernelSources:
    """Makes sources; `traits` gives the header of a quantisation type by name."""

    traits: Mapping[str, Path]
    _headers: Headers = field(factory=lambda: Headers([OPS]), init=False, repr=False)
    _texts: dict[tuple[str, tuple[str, ...]], str] = field(factory=dict, init=False, repr=False)
    """Flattened files, by what was put before them."""
    _known: dict[tuple[object, ...], Source] = field(factory=dict, init=False, repr=False)
    """What was made: a program asks for the same few again and again."""

    def gemv(
        self,
        weights: Sequence[PlannedWeight],
        *,
        columns: int,
        tokens: int,
        shape: GemvShape,
        norm: Norm | None,
        gated: bool,
        activation: str | None,
        quantize_activations: bool,
        left: Attention | None = None,
        left_runs: int = 0,
    ) -> Source:
        """Linear maps of one input, see ``ops/gemv.cu``.

        With `left`, whose result the input is, up to `left_runs` runs of its context are joined there.
        """
        defines: dict[str, str | int] = {
            "COLS": columns,
            "TOKENS": tokens,
            "THREADS": shape.threads,
            "RING_SLOTS": shape.slots,
            "BLOCKS": shape.blocks,
            "NORM": _NORMS[norm.type if norm is not None else None],
            "GATED": int(gated),
            "ACTIVATION": ACTIVATIONS[activation],
            "QUANTIZE_ACTIVATIONS": int(quantize_activations),
            "SEGMENTS": _segments(weights),
            "LEFT_RUNS": left_runs,
        }
        if left is not None:
            defines |= {"HEAD_DIM": left.head_dim, "RUN_PAGES": _RUN_PAGES}
        return self._source("gemv.cu", defines, [weight.tensor.qtype.name for weight in weights])

    def embed(self, weight: PlannedWeight) -> Source:
        """Rows of a weight by id, see ``ops/embed.cu``."""
        qtype = weight.tensor.qtype.name
        defines: dict[str, str | int] = {"WEIGHT": f"Tile<{_tiling(weight)}>", "QTYPE": qtype, "COLS": weight.columns}
        return self._source("embed.cu", defines, [qtype])

    def matmul_input(
        self,
        columns: int,
        norm: Norm | None,
        tile: MatmulTile | None,
        cut: InputCut,
        joined: LeftProducts | None = None,
    ) -> Source:
        """See ``ops/matmul_input.cu``: for a kernel, or without a `tile` rows in order.

        `joined` is what products have left that is finished there.
        """
        defines: dict[str, str | int] = {
            "COLS": columns,
            "THREADS": cut.threads,
            "NORM": _NORMS[norm.type if norm is not None else None],
            "PASS": tile.rows if tile is not None else 0,
            "WGMMA": int(tile is not None and tile.by_warpgroups),
            "FACTOR_LATER": int(cut.factor_later),
            "PART_STEPS": cut.steps,
            "SCALES": cut.scales,
            "JOIN": int(joined is not None),
        }
        defines |= _finishing(joined) if joined is not None else _NOTHING_FINISHED
        return self._source("matmul_input.cu", defines)

    def matmul(self, weights: Sequence[PlannedWeight], columns: int, tile: MatmulTile, slices: Slices) -> Source:
        """See ``ops/matmul.cu`` and ``ops/matmul_wgmma.cu``."""
        defines: dict[str, str | int] = {
            "COLS": columns,
            "PASS": tile.rows,
            "THREADS": tile.threads,
            "HEIGHT": tile.height,
            "SLICES": slices.count,
            "SLICE_STEPS": slices.steps,
            "SEGMENTS": _segments(weights),
        }
        qtypes = [weight.tensor.qtype.name for weight in weights]
        if tile.by_warpgroups:
            return evolve(self._source("matmul_wgmma.cu", defines, qtypes), options=_OWN_INSTRUCTIONS)
        return self._source("matmul.cu", defines, qtypes)

    def matmul_ring(
        self,
        weights: Sequence[PlannedWeight],
        shape: RingShape,
        *,
        norm: Norm | None,
        gated: bool,
        activation: str | None,
    ) -> Source:
        """See ``ops/matmul_ring.cu``."""
        defines = ring_defines(shape, norm, gated=gated, activation=activation)
        defines |= {"COLS": weights[0].columns, "SEGMENTS": _segments(weights)}
        return self._source("matmul_ring.cu", defines, [weight.tensor.qtype.name for weight in weights])

    def matmul_finish(self, left: LeftProducts, vector: int) -> Source:
        """See ``ops/matmul_finish.cu``."""
        return self._source("matmul_finish.cu", {**_finishing(left), "VECTOR": vector})

    def dequantise(self, weight: PlannedWeight) -> Source:
        """A weight as halves, row by row, see ``ops/dequantise.cu``."""
        qtype = weight.tensor.qtype.name
        defines: dict[str, str | int] = {
            "WEIGHT": f"Tile<{_tiling(weight)}>",
            "QTYPE": qtype,
            "COLS": weight.columns,
            "OUT": "__half",
        }
        return self._source("dequantise.cu", defines, [qtype])

    def attention_prefill(self, attention: Attention, kv_type: str, tile: AttentionTile) -> Source:
        """See ``ops/attention_prefill.cu``."""
        defines: dict[str, str | int] = {
            "HEAD_DIM": attention.head_dim,
            "HEADS": tile.heads,
            "GROUP": attention.num_heads // attention.num_kv_heads,
            "KV_HEADS": attention.num_kv_heads,
            "KV": KV_NAMES[kv_type],
            "RUN_TILE": tile.rows,
            "SOFTCAP": int(attention.softcap > 0),
            "WINDOWED": int(attention.window > 0),
        }
        return self._source("attention_prefill.cu", defines)

    def attention(self, attention: Attention, kv_type: str, run_tile: int = 0, *, exact: bool) -> Source:
        """See ``ops/attention_rows.cu``, and ``ops/attention.cu`` for what that does not take.

        With a `run_tile`, of rows that ``ops/attention_prefill.cu`` leaves out; `exact` as `rows_kernel` has it.
        """
        kernel = rows_kernel(attention, kv_type, exact=exact)
        defines: dict[str, str | int] = {
            "HEAD_DIM": attention.head_dim,
            "GROUP": attention.num_heads // attention.num_kv_heads,
            "KV": KV_NAMES[kv_type],
            "WARPS": kernel.warps,
            "RUN_TILE": run_tile,
            "SOFTCAP": int(attention.softcap > 0),
            "WINDOWED": int(attention.window > 0),
        }
        return self._source(f"{kernel.name}.cu", defines)

    def attend(self, place: PlaceGroup, kv_type: str, threads: int, blocks: int, *, tensor: bool) -> Source:
        """See ``ops/attend.cu``; on tensor cores or not."""
        attention = place.attention
        defines: dict[str, str | int] = {
            "GROUP": attention.num_heads // attention.num_kv_heads,
            "SOFTCAP": int(attention.softcap > 0),
            "WINDOWED": int(attention.window > 0),
            "TENSOR": int(tensor),
            "THREADS": threads,
            "RUN_PAGES": _RUN_PAGES,
            "BLOCKS": blocks,
        }
        return self._source("attend.cu", {**_placing(place, kv_type), **defines})

    def place(self, group: PlaceGroup, kv_type: str) -> Source:
        """See ``ops/place.cu``."""
        return self._source("place.cu", {**_placing(group, kv_type), "Q_HEADS": group.attention.num_heads})

    def kv_write(self, kv_type: str) -> Source:
        """See ``ops/kv_write.cu``."""
        return self._source("kv_write.cu", {"KV": KV_NAMES[kv_type]})

    def plain(self) -> Source:
        """Every operator that nothing fuses, see ``ops/plain.cu``."""
        return self._source("plain.cu", {})

    def read(self) -> Source:
        """See ``ops/read.cu``."""
        return self._source("read.cu", {})

    def choose(self, vocab_size: int) -> Source:
        """See ``ops/choose.cu``."""
        return self._source("choose.cu", choice_defines(vocab_size))

    def _source(self, file: str, defines: Mapping[str, str | int], qtypes: Sequence[str] = ()) -> Source:
        names = tuple(sorted(set(qtypes)))
        key = file, names, tuple(defines.items())
        source = self._known.get(key)
        if source is None:
            text = self._texts.get((file, names))
            if text is None:
                text = self._headers.flatten(OPS / file, [self.traits[name] for name in names])
                self._texts[file, names] = text
            source = self._known[key] = Source(name=file.removesuffix(".cu"), text=text, defines=defines)
        return source


def ring_defines(shape: RingShape, norm: Norm | None, *, gated: bool, activation: str | None) -> dict[str, str | int]:
    """The constants of ``ops/matmul_ring.cu`` but for what depends on the weights."""
    return {
        "PASS": shape.rows,
        "WARPS": shape.warps,
        "HELPERS": shape.helpers,
        "EARLY": shape.early,
        "STEPS": shape.steps,
        "SLOTS": shape.slots,
        "NORM": _NORMS[norm.type if norm is not None else None],
        "GATED": int(gated),
        "ACTIVATION": ACTIVATIONS[activation],
    }


_NOTHING_FINISHED: Mapping[str, str | int] = {"SLICES": 1, "NORM_COLS": 0, "GATED": 0, "ACTIVATION": ACTIVATIONS[None]}


def _finishing(left: LeftProducts) -> dict[str, str | int]:
    """The constants of ``ops/finish.cuh``."""
    return {
        "SLICES": left.slices,
        "NORM_COLS": left.group.source.width if left.lacks_factor else 0,
        "GATED": int(left.group.gated is not None),
        "ACTIVATION": ACTIVATIONS[left.group.activation],
    }


def _segments(weights: Sequence[PlannedWeight]) -> str:
    return ",".join(f"Segment<{_tiling(weight)},{weight.rows}>" for weight in weights)


def _tiling(weight: PlannedWeight) -> str:
    geometry = tile_geometry(weight.tensor.qtype, weight.rows, weight.columns)
    return f"{weight.tensor.qtype.name},{geometry.tile_rows},{geometry.tile_columns}"


def _placing(group: PlaceGroup, kv_type: str) -> dict[str, str | int]:
    rope, norm = group.q_rope, group.q_norm
    return {
        "HEAD_DIM": group.write.head_dim,
        "KV_HEADS": group.write.num_kv_heads,
        "DIMS": rope.dims if rope is not None else 0,
        "HALVES": int(rope is not None and rope.style == "halves"),
        "HEAD_NORM": _NORMS[norm.type if norm is not None else None],
        "KV": KV_NAMES[kv_type],
    }
