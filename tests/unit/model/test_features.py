"""Any combination of what the vocabulary can say runs as the plain formulas do, not only those that families use."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
from attrs import frozen, resolve_types
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mortice.arch_contracts.schema import Contract, parse_contract
from mortice.core.plugin.interfaces import StepPart
from tests.support.in_memory import arrays_for, metadata_for, model_file, runtime_of
from tests.support.naive_forward import ACTIVATIONS, Family, NaiveModel

HEADS, KV_HEADS, HEAD_DIM = 4, 2, 6
Q, KV = HEADS * HEAD_DIM, KV_HEADS * HEAD_DIM


@frozen(kw_only=True)
class Choice:
    """One value for each setting of the vocabulary."""

    norm: Literal["rms", "layer"]
    placement: Literal["pre", "post", "both"]
    activation: str
    gated: bool
    fused_qkv: bool
    fused_gate_up: bool
    biased: bool
    qk_norm: Literal["none", "per_head", "per_row"]
    qk_norm_type: Literal["rms", "layer"]
    rope: Literal["none", "adjacent", "halves"]
    rope_dims: Literal[2, 4, 6]
    rope_factors: bool
    learned: bool
    embedding_norm: bool
    parallel: bool
    window: Literal[0, 1, 3]
    tied: bool
    embedding_scale: Literal[1, 3]
    residual_scale: float
    attention_scale: float
    attention_cap: float
    logit_scale: float
    logit_cap: float

    def contract(self) -> Contract:
        lines = [
            '[contract]\nname = "any"\narchitectures = ["any"]',
            f'[norm]\ntype = "{self.norm}"\nplacement = "{self.placement}"\neps = 1e-5',
            f'[attention]\nqk_norm = "{self.qk_norm}"\nqk_norm_type = "{self.qk_norm_type}"',
            f"scale = {self.attention_scale}\nsoftcap = {self.attention_cap}",
            f'sliding_window = "{self.window} if layer % 2 else 0"',
            f'[ffn]\ngated = {str(self.gated).lower()}\nactivation = "{self.activation}"',
            f'[embedding]\nscale = {self.embedding_scale}\npositions = "{"learned" if self.learned else "none"}"',
            f"[residual]\nscale = {self.residual_scale}\nparallel = {int(self.parallel)}",
            f"[output]\nscale = {self.logit_scale}\nsoftcap = {self.logit_cap}",
        ]
        if self.rope != "none":
            lines += [f'[rope]\nstyle = "{self.rope}"\nbase = "100 * (layer + 1)"', f"dims = {self.rope_dims}"]
        return parse_contract("\n".join([*lines, *self.global_roles(), *self.layer_roles()]), "any.toml")

    def global_roles(self) -> list[str]:
        head = 'output = { shape = ["vocab_size", "hidden_size"], else = "token_embd" }'
        tied = 'output = { forbidden = true, else = "token_embd" }'
        roles = ["[roles.global]", 'token_embd = ["vocab_size", "hidden_size"]', tied if self.tied else head]
        roles += ['output_bias = ["vocab_size"]'] * self.biased
        roles += ['position_embd = ["context_length", "hidden_size"]'] * self.learned
        roles += [f"rope_freqs = [{self.rope_dims // 2}]"] * (self.rope_factors and self.rope != "none")
        return [*roles, *self.norm_role("output_norm"), *self.norm_role("token_embd_norm") * self.embedding_norm]

    def norm_role(self, name: str) -> list[str]:
        return [f'{name} = ["hidden_size"]', *[f'{name}_bias = ["hidden_size"]'] * self.biased]

    def layer_roles(self) -> list[str]:
        roles = ["[roles.layer]"]
        before, after = self.placement != "post", self.placement != "pre"
        roles += self.norm_role("attn_norm") * before + self.norm_role("ffn_norm") * before
        roles += self.norm_role("post_attention_norm") * after + self.norm_role("post_ffw_norm") * after
        if self.fused_qkv:
            roles += self.fused("attn_qkv", {"attn_q": Q, "attn_k": KV, "attn_v": KV})
        else:
            roles += self.linear("attn_q", Q) + self.linear("attn_k", KV) + self.linear("attn_v", KV)
        roles += self.linear("attn_output", "hidden_size", Q)
        if self.qk_norm != "none":
            wide = self.qk_norm == "per_row"
            roles += [f"attn_q_norm = [{Q if wide else HEAD_DIM}]", f"attn_k_norm = [{KV if wide else HEAD_DIM}]"]
        if self.gated and self.fused_gate_up:
            roles += self.fused("ffn_gate_up", {"ffn_gate": 48, "ffn_up": 48})
        else:
            roles += self.linear("ffn_up", "ffn_size") + self.linear("ffn_gate", "ffn_size") * self.gated
        return roles + self.linear("ffn_down", "hidden_size", "ffn_size")

    def linear(self, name: str, rows: int | str, columns: int | str = "hidden_size") -> list[str]:
        return [f'{name} = ["{rows}", "{columns}"]', *[f'{name}_bias = ["{rows}"]'] * self.biased]

    def fused(self, name: str, parts: dict[str, int]) -> list[str]:
        rows = sum(parts.values())
        split = ", ".join(f"{part} = {count}" for part, count in parts.items())
        biases = ", ".join(f"{part}_bias = {count}" for part, count in parts.items())
        whole = [f'{name} = {{ shape = [{rows}, "hidden_size"], split = {{ {split} }} }}']
        return whole + [f"{name}_bias = {{ shape = [{rows}], split = {{ {biases} }} }}"] * self.biased

    def family(self) -> Family:
        return Family(
            layers=2,
            heads=HEADS,
            kv_heads=KV_HEADS,
            head_dim=HEAD_DIM,
            norm=self.norm,
            pre_norm=self.placement != "post",
            post_norm=self.placement != "pre",
            qk_norm=self.qk_norm,
            qk_norm_type=self.qk_norm_type,
            rope=self.rope,
            rope_dims=lambda layer: self.rope_dims,
            rope_base=lambda layer: 100.0 * (layer + 1),
            window=lambda layer: self.window if layer % 2 else 0,
            attention_scale=self.attention_scale,
            attention_cap=self.attention_cap,
            gated=self.gated,
            activation=self.activation,
            parallel=self.parallel,
            embedding_scale=self.embedding_scale,
            residual_scale=self.residual_scale,
            logit_scale=self.logit_scale,
            logit_cap=self.logit_cap,
            fused_qkv=self.fused_qkv,
            fused_gate_up="ffn_gate_up" if self.gated and self.fused_gate_up else "",
        )


CHOICES: st.SearchStrategy[Choice] = st.builds(
    resolve_types(Choice),
    activation=st.sampled_from(list(ACTIVATIONS)),
    residual_scale=st.sampled_from([1.0, 0.25]),
    attention_scale=st.sampled_from([0.5, 1.5]),
    attention_cap=st.sampled_from([0.0, 2.0]),
    logit_scale=st.sampled_from([1.0, 0.25]),
    logit_cap=st.sampled_from([0.0, 4.0]),
)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(choice=CHOICES, seed=st.integers(0, 5), cut=st.integers(1, 6))
def test_any_combination_runs_as_the_formulas_say(choice: Choice, seed: int, cut: int) -> None:
    contract = choice.contract()
    metadata: dict[str, Any] = metadata_for(contract, attention__key_length=HEAD_DIM)
    arrays = arrays_for(contract, metadata, seed=seed)
    tokens = [int(token) for token in np.random.default_rng(seed).integers(0, 40, 7)]
    runtime = runtime_of(model_file(metadata, arrays), contract)
    sequence = runtime.new_sequence()
    rows = [
        runtime.step([StepPart(sequence=sequence, token_ids=part, logits="all")])
        for part in (tokens[:cut], tokens[cut:])
    ]
    wanted = NaiveModel(choice.family(), arrays).logits(tokens)
    np.testing.assert_allclose(np.concatenate(rows), wanted, rtol=1e-3, atol=1e-3)
