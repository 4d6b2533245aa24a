"""Contract + hyperparameters -> the program: the one description of a forward pass.

Every executor interprets or lowers what is built here; there is no second forward anywhere.
"""

from __future__ import annotations

from collections.abc import Mapping

from attrs import define, field, frozen

from mortice.arch_contracts.expressions import Expression, Number
from mortice.core.errors import ContractError
from mortice.core.model.operators import (
    Act,
    Add,
    AddBias,
    Attention,
    Buffer,
    Embed,
    EmbedPositions,
    GatedAct,
    KvWrite,
    Linear,
    Norm,
    NormType,
    Operator,
    PositionScale,
    Rope,
    Scale,
    SelectRows,
    Softcap,
    WeightRef,
)
from mortice.core.model.program_check import check_operators
from mortice.core.model.validation import ValidatedModel

__all__ = ["KvShape", "Program", "build_program"]


@frozen
class KvShape:
    """What a layer caches for each token: K and V of shape (num_kv_heads, head_dim) each."""

    num_kv_heads: int
    head_dim: int

    @property
    def elements(self) -> int:
        """Elements of K and V together, for one token."""
        return 2 * self.num_kv_heads * self.head_dim


@frozen(eq=False, kw_only=True)
class Program:
    """A forward pass.

    Attributes:
        architecture: the family's name.
        operators: in order; each buffer is written before it is read, and once.
        logits: the buffer that holds the result, (rows selected, vocab_size).
        kv: what each layer caches.
        vocab_size: rows of the embedding.
        hidden_size: width of the residual stream.
        context_length: tokens the model was made for.

    """

    architecture: str
    operators: tuple[Operator, ...] = field(repr=False)
    logits: Buffer
    kv: tuple[KvShape, ...] = field(repr=False)
    vocab_size: int
    hidden_size: int
    context_length: int

    @property
    def num_layers(self) -> int:
        """Layers."""
        return len(self.kv)

    def last_uses(self) -> dict[Buffer, int]:
        """For each buffer the place in `operators` after which it is no longer needed; the logits' is the last."""
        last: dict[Buffer, int] = {}
        for place, operator in enumerate(self.operators):
            last.update(dict.fromkeys((*operator.inputs, *operator.outputs), place))
        return {**last, self.logits: len(self.operators) - 1}

    @property
    def weights(self) -> tuple[WeightRef, ...]:
        """Every weight the operators read, each once, in order of first use."""
        return tuple(dict.fromkeys(weight for operator in self.operators for weight in operator.weights))


def build_program(model: ValidatedModel) -> Program:
    """Build the program of a validated model.

    Raises:
        ContractError: when a weight of the file has no use, or the shapes that the contract gives do not fit together.

    """
    builder = _Builder(model)
    x = builder.embedding()
    for layer in range(model.hyperparameters.integer("num_layers")):
        x = builder.block(x, layer)
    logits = builder.head(x)
    integer = model.hyperparameters.integer
    program = Program(
        architecture=model.contract.name,
        operators=tuple(builder.operators),
        logits=logits,
        kv=tuple(builder.kv),
        vocab_size=integer("vocab_size"),
        hidden_size=integer("hidden_size"),
        context_length=integer("context_length"),
    )
    check_operators(program.architecture, program.operators)
    _check_every_weight_is_read(model, program)
    return program


def _check_every_weight_is_read(model: ValidatedModel, program: Program) -> None:
    read = {weight.tensor for weight in program.weights}
    for (role, _), weight in model.weights.items():
        if weight.tensor not in read:
            raise ContractError(
                f"contract {model.contract.name}: {weight.tensor} serves role {role}, which its settings give no use"
            )


@define
class _Builder:
    model: ValidatedModel
    operators: list[Operator] = field(factory=list)
    kv: list[KvShape] = field(factory=list)
    layer: int | None = None
    values: Mapping[str, Number] = field(init=False)

    def __attrs_post_init__(self) -> None:
        self.values = self.model.hyperparameters.uniform()

    # small parts ------------------------------------------------------------------------------------------------

    def number(self, expression: Expression) -> float:
        return float(expression.evaluate(self.values))

    def weight(self, role: str) -> WeightRef | None:
        return self.model.weights.get((role, self.layer))

    def required(self, role: str) -> WeightRef:
        weight = self.weight(role)
        assert weight is not None, f"validation let {self.name(role)} go missing"
        return weight

    def name(self, text: str) -> str:
        return text if self.layer is None else f"layers.{self.layer}.{text}"

    def buffer(self, text: str, width: int) -> Buffer:
        return Buffer(self.name(text), width)

    def emit(self, operator: Operator) -> None:
        self.operators.append(operator)

    def norm(
        self,
        src: Buffer,
        role: str,
        *,
        groups: int = 1,
        kind: NormType | None = None,
        eps: Expression | None = None,
    ) -> Buffer:
        spec = self.model.contract.norm
        out = self.buffer(f"{role}.out", src.width)
        self.emit(
            Norm(
                layer=self.layer,
                name=self.name(role),
                src=src,
                out=out,
                type=kind or spec.type,
                eps=self.number(eps or spec.eps),
                groups=groups,
                weight=self.required(role),
                bias=self.weight(f"{role}_bias"),
            )
        )
        return out

    def linear(self, src: Buffer, role: str) -> Buffer:
        weight = self.required(role)
        out = self.buffer(f"{role}.out", weight.rows)
        self.emit(Linear(layer=self.layer, name=self.name(role), src=src, out=out, weight=weight))
        bias = self.weight(f"{role}_bias")
        if bias is None:
            return out
        biased = self.buffer(f"{role}.biased", weight.rows)
        self.emit(AddBias(layer=self.layer, name=self.name(f"{role}_bias"), src=out, out=biased, weight=bias))
        return biased

    def scaled(self, src: Buffer, text: str, expression: Expression) -> Buffer:
        factor = self.number(expression)
        if factor == 1.0:
            return src
        out = self.buffer(text, src.width)
        self.emit(Scale(layer=self.layer, name=self.name(text), src=src, out=out, factor=factor))
        return out

    def add(self, a: Buffer, b: Buffer, text: str) -> Buffer:
        out = self.buffer(text, a.width)
        self.emit(Add(layer=self.layer, name=self.name(text), a=a, b=b, out=out))
        return out

    # the model --------------------------------------------------------------------------------------------------

    def embedding(self) -> Buffer:
        spec = self.model.contract.embedding
        weight = self.required("token_embd")
        x = self.buffer("token_embd.out", weight.columns)
        self.emit(Embed(name="token_embd", out=x, weight=weight))
        x = self.scaled(x, "token_embd.scaled", spec.scale)
        if spec.positions == "learned":
            positions = self.buffer("position_embd.out", x.width)
            self.emit(EmbedPositions(name="position_embd", out=positions, weight=self.required("position_embd")))
            x = self.add(x, positions, "embedding")
        if self.weight("token_embd_norm") is not None:
            x = self.norm(x, "token_embd_norm")
        return x

    def block(self, x: Buffer, layer: int) -> Buffer:
        self.layer, self.values = layer, self.model.layer_values(layer)
        parallel = self.number(self.model.contract.residual.parallel) != 0
        norm_before = self.model.contract.norm.placement in ("pre", "both")
        attn_input = self.norm(x, "attn_norm") if norm_before else x
        attn = self.added_by("post_attention_norm", self.attention(attn_input))
        after = x if parallel else self.add(x, attn, "attn_residual")
        if norm_before and not (parallel and self.weight("ffn_norm") is None):
            ffn_input = self.norm(after, "ffn_norm")
        else:
            # a parallel block without a norm of its own for the FFN shares attention's
            ffn_input = attn_input if parallel else after
        ffn = self.added_by("post_ffw_norm", self.ffn(ffn_input))
        if parallel:
            ffn = self.add(attn, ffn, "block")
        x = self.add(after, ffn, "ffn_residual")
        self.layer, self.values = None, self.model.hyperparameters.uniform()
        return x

    def added_by(self, post_norm: str, out: Buffer) -> Buffer:
        """What a block adds to the residual stream: its output, normed and scaled where the family does so."""
        if self.model.contract.norm.placement in ("post", "both"):
            out = self.norm(out, post_norm)
        return self.scaled(out, f"{post_norm.removesuffix('_norm')}.scaled", self.model.contract.residual.scale)

    def attention(self, x: Buffer) -> Buffer:
        spec = self.model.contract.attention
        num_heads, num_kv_heads = int(self.values["num_heads"]), int(self.values["num_kv_heads"])
        head_dim = int(self.values["head_dim"])
        q, k, v = (self.linear(x, role) for role in ("attn_q", "attn_k", "attn_v"))
        q, k = self.qk_norm(q, "attn_q_norm", num_heads), self.qk_norm(k, "attn_k_norm", num_kv_heads)
        q, k = self.rope(q, "q", num_heads), self.rope(k, "k", num_kv_heads)
        q = self.sharpened(q)
        self.kv.append(KvShape(num_kv_heads, head_dim))
        self.emit(
            KvWrite(
                layer=self.layer,
                name=self.name("kv_write"),
                k=k,
                v=v,
                num_kv_heads=num_kv_heads,
                head_dim=head_dim,
            )
        )
        out = self.buffer("attention.out", q.width)
        self.emit(
            Attention(
                layer=self.layer,
                name=self.name("attention"),
                src=q,
                out=out,
                num_heads=num_heads,
                num_kv_heads=num_kv_heads,
                head_dim=head_dim,
                scale=self.number(spec.scale),
                softcap=self.number(spec.softcap),
                window=int(self.number(spec.sliding_window)),
            )
        )
        return self.linear(out, "attn_output")

    def qk_norm(self, src: Buffer, role: str, heads: int) -> Buffer:
        spec = self.model.contract.attention
        if spec.qk_norm == "none" or self.weight(role) is None:  # validation knows whether the role may be absent
            return src
        groups = heads if spec.qk_norm == "per_head" else 1
        return self.norm(src, role, groups=groups, kind=spec.qk_norm_type, eps=spec.qk_norm_eps)

    def rope(self, src: Buffer, text: str, heads: int) -> Buffer:
        spec = self.model.contract.rope
        dims = 0 if spec is None else int(self.number(spec.dims))
        if spec is None or dims == 0:
            return src
        scaling = self.model.rope_scaling if self.number(spec.scaled) else None
        short, long = (self.model.weights.get((f"rope_factors_{reach}", None)) for reach in ("short", "long"))
        out = self.buffer(f"{text}.rotated", src.width)
        self.emit(
            Rope(
                layer=self.layer,
                name=self.name(f"rope_{text}"),
                src=src,
                out=out,
                num_heads=heads,
                head_dim=int(self.values["head_dim"]),
                dims=dims,
                style=spec.style,
                base=self.number(spec.base),
                scaling=scaling,
                factors=self.model.weights.get(("rope_freqs", None), short if scaling is not None else None),
                long_factors=long if scaling is not None else None,
            )
        )
        return out

    def sharpened(self, q: Buffer) -> Buffer:
        spec = self.model.contract.attention
        strength = self.number(spec.temperature)
        if strength == 0:
            return q
        out = self.buffer("q.sharpened", q.width)
        self.emit(
            PositionScale(
                layer=self.layer,
                name=self.name("temperature"),
                src=q,
                out=out,
                strength=strength,
                period=int(self.number(spec.temperature_period)),
            )
        )
        return out

    def ffn(self, x: Buffer) -> Buffer:
        spec = self.model.contract.ffn
        if spec.gated:
            gate, up = self.linear(x, "ffn_gate"), self.linear(x, "ffn_up")
            act = self.buffer("ffn_act.out", up.width)
            self.emit(
                GatedAct(
                    layer=self.layer,
                    name=self.name("ffn_act"),
                    gate=gate,
                    up=up,
                    out=act,
                    activation=spec.activation,
                )
            )
        else:
            up = self.linear(x, "ffn_up")
            act = self.buffer("ffn_act.out", up.width)
            self.emit(Act(layer=self.layer, name=self.name("ffn_act"), src=up, out=act, activation=spec.activation))
        return self.linear(act, "ffn_down")

    def head(self, x: Buffer) -> Buffer:
        spec = self.model.contract.output
        rows = self.buffer("selected", x.width)
        self.emit(SelectRows(name="select_rows", src=x, out=rows))
        logits = self.linear(self.norm(rows, "output_norm"), "output")
        logits = self.scaled(logits, "logits.scaled", spec.scale)
        cap = self.number(spec.softcap)
        if cap:
            capped = self.buffer("logits", logits.width)
            self.emit(Softcap(name="softcap", src=logits, out=capped, cap=cap))
            logits = capped
        return logits
