"""One decoder for the Llama family and its relatives, driven by ModelConfig.

Tokens of all sequences of a step lie in one flat row, never padded; what binds a token to its sequence is its
position and the ``attend`` function, which the caller brings: over a paged KV cache to generate, over whole sequences
to calibrate and to score. Module names are those of the checkpoint, without the leading ``model.``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor, nn

from llmq.checkpoint.config import ModelConfig
from llmq.errors import note
from llmq.runtime.experts import GroupedExperts
from llmq.runtime.kernels import triton_runs_on
from llmq.runtime.kernels.attention import dot_product_attention
from llmq.runtime.kernels.embedding import embedding
from llmq.runtime.kernels.gelu import gelu_mul
from llmq.runtime.kernels.megakernel import MOST_ROWS, MOST_VALUES, Between, Weight, has_room, megakernel, takes
from llmq.runtime.kernels.norm import add_rms_norm, add_rms_norm_quantize
from llmq.runtime.kernels.quantize_rows import QuantizedRows
from llmq.runtime.kernels.rope import norm_and_rotate
from llmq.runtime.kernels.routing import choose, combine
from llmq.runtime.kernels.silu import silu_mul, silu_mul_quantize
from llmq.runtime.linear import DenseLinear, WeightOnlyLinear, input_number, merge, plain_weight
from llmq.runtime.rotary import Rotation, rotary_angles

ADDING_TOKENS = 1024
"""The library's product of as many tokens adds the hidden state in less time than the next norm does, which was seen at
8,192. Of few tokens the norm has it at no cost."""


class Attend(Protocol):
    """How tokens of the same sequence see each other: what the caller brings to the decoder."""

    def __call__(self, attention: Attention, query: Tensor, key: Tensor, value: Tensor, rotation: Rotation) -> Tensor:
        """Attention of one layer. ``query`` [tokens, heads, head_dim], and ``key`` and ``value`` [tokens, kv_heads,
        head_dim] of the same tokens, come as they are projected: neither normed nor rotated.
        → [tokens, heads, head_dim]"""
        ...


class RMSNorm(nn.Module):
    """The weight of a norm; ``add_rms_norm`` computes it.

    weight  what the norm multiplies by: the checkpoint's weight plus ``offset``, in fp32 where there is an offset, for
            a sum near 1 would lose what a weight near 0 says
    """

    def __init__(self, size: int, config: ModelConfig) -> None:
        super().__init__()
        self.offset = config.norm_offset
        self.eps = config.rms_norm_eps
        self.weight = nn.Parameter(torch.empty(size), requires_grad=False)

    def forward(self, residual: Tensor, x: Tensor | None = None, number: str | None = None) -> Tensor | QuantizedRows:
        """Add ``x`` to ``residual`` in place, and return the sum normalized over its last dimension; in 8 bits of
        ``number``, if given."""
        if number is not None:
            return add_rms_norm_quantize(residual, x, self.weight, self.eps, number)
        return add_rms_norm(residual, x, self.weight, self.eps)


class Attention(nn.Module):
    """Grouped-query self-attention (Ainslie et al., 2023): the projections, around what ``attend`` computes."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.layer = layer
        self.window = config.windows[layer]
        self.rope = config.ropes[layer]
        self.scale = config.attention_scale
        self.softcap = config.attention_softcap
        self.head_dim = config.head_dim
        self.eps = config.rms_norm_eps
        q_size, kv_size = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
        self.sizes = (q_size, kv_size, kv_size)
        self.qkv = config.names.qkv
        add_linears(self, self.qkv, config.hidden_size, self.sizes, bias=config.qkv_bias)
        self.o_proj = DenseLinear(q_size, config.hidden_size, bias=config.o_bias)
        if config.qk_norm:
            self.q_norm = RMSNorm(config.head_dim, config)
            self.k_norm = RMSNorm(config.head_dim, config)
        self.qk_norm = config.qk_norm

    @property
    def norms(self) -> tuple[Tensor, Tensor] | None:
        """The weights of the norms of queries and keys, where the architecture has them."""
        return (self.q_norm.weight, self.k_norm.weight) if self.qk_norm else None

    @property
    def input_number(self) -> str | None:
        return stack_number(self, self.qkv)

    def merge(self) -> None:
        """Make one product of the projections of query, key and value, where their layers allow it."""
        self.qkv = stack(self, self.qkv, "qkv_proj")

    def mix(self, x: Tensor | QuantizedRows, rotation: Rotation, attend: Attend) -> Tensor:
        """What the heads gather from all tokens, [tokens, heads · head_dim]: the input of ``o_proj``."""
        return self.gather(project(self, self.qkv, x, self.sizes), rotation, attend)

    def gather(self, parts: Sequence[Tensor], rotation: Rotation, attend: Attend) -> Tensor:
        """``mix`` of queries, keys and values as they are projected, each [tokens, its heads · head_dim]."""
        query, key, value = (part.view(part.shape[0], -1, self.head_dim) for part in parts)
        return attend(self, query, key, value, rotation).reshape(query.shape[0], -1)


class MLP(nn.Module):
    """SwiGLU and GeGLU (Shazeer, 2020): down(silu(gate(x)) · up(x)), or gelu in place of silu"""

    def __init__(self, config: ModelConfig, inner: int) -> None:
        super().__init__()
        self.gate_up, self.down = config.names.gate_up, config.names.down
        self.sizes = (inner, inner)
        self.gelu = config.activation == "gelu_tanh"
        add_linears(self, self.gate_up, config.hidden_size, self.sizes, bias=config.mlp_bias)
        add_linears(self, (self.down,), inner, (config.hidden_size,), bias=config.mlp_bias)

    @property
    def input_number(self) -> str | None:
        return stack_number(self, self.gate_up)

    def merge(self) -> None:
        """Make one product of gate and up, where their layers allow it."""
        self.gate_up = stack(self, self.gate_up, "gate_up_proj")

    def forward(self, x: Tensor | QuantizedRows) -> Tensor:
        out: Tensor = getattr(self, self.down)(self.gated(x))
        return out

    def gated(self, x: Tensor | QuantizedRows) -> Tensor | QuantizedRows:
        """The input of ``down``."""
        number = input_number(getattr(self, self.down))
        merged = getattr(self, self.gate_up[0]) if len(self.gate_up) == 1 else None
        if isinstance(merged, WeightOnlyLinear) and isinstance(x, Tensor) and not self.gelu and number is None:
            return merged.gated(x)
        gate, up = project(self, self.gate_up, x, self.sizes)
        if self.gelu:
            return gelu_mul(gate, up)
        return silu_mul(gate, up) if number is None else silu_mul_quantize(gate, up, number)


class MixtureOfExperts(nn.Module):
    """For each token the few MLPs that a router finds likeliest, weighed by their probabilities (Shazeer et al., 2017).

    ``experts`` are the checkpoint's, one by one, to quantize; ``merge`` makes one product of them.
    """

    input_number = None
    """The router, too, reads the input."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        assert config.experts is not None
        self.per_token, self.renormalized = config.experts.per_token, config.experts.renormalized
        self.gate = DenseLinear(config.hidden_size, config.experts.count, bias=False)
        self.experts = nn.ModuleList(MLP(config, config.experts.intermediate_size) for _ in range(config.experts.count))
        self.grouped: GroupedExperts | None = None

    def merge(self) -> None:
        """Make one product of all experts' layers where these allow it, or else merge each expert's."""
        experts = [expert for expert in self.experts if isinstance(expert, MLP)]
        for expert in experts:
            expert.merge()
        gate_up, down = (
            None if len(names) > 1 else merge([expert.get_submodule(*names) for expert in experts])
            for names in (experts[0].gate_up, (experts[0].down,))
        )
        if gate_up is not None and down is not None and not experts[0].gelu:
            self.grouped = GroupedExperts(gate_up, down)
            del self.experts
        elif triton_runs_on(self.gate.weight.device.type):
            note("the experts' layers are not of one scheme: they run one by one, and steps without CUDA graphs")

    def forward(self, x: Tensor) -> Tensor:
        weights, chosen = choose(self.gate(x), self.per_token, self.renormalized)
        if self.grouped is not None:
            mixed: Tensor = self.grouped(x, weights, chosen)
            return mixed
        # The assignments of tokens to experts, [tokens · per_token], by expert: one product for all tokens of each.
        order = chosen.flatten().argsort(stable=True)
        counts = chosen.flatten().bincount(minlength=len(self.experts)).tolist()
        out = x.new_empty(len(order), x.shape[1])
        for expert, assignments in zip(self.experts, torch.split(order, counts), strict=True):
            if len(assignments):
                out[assignments] = expert(x[assignments // self.per_token]).to(x.dtype)  # autocast's is narrower
        return combine(out, weights)


# Several projections of one input: a layer for each, or one that they are stacked in, on disk or by merging.


def add_linears(module: nn.Module, names: Sequence[str], in_features: int, sizes: Sequence[int], *, bias: bool) -> None:
    """Give ``module`` projections of these ``sizes`` by these ``names``; a single name for all: stacked."""
    for name, size in zip(names, sizes if len(names) == len(sizes) else (sum(sizes),), strict=True):
        module.add_module(name, DenseLinear(in_features, size, bias=bias))


def stack(module: nn.Module, names: tuple[str, ...], name: str) -> tuple[str, ...]:
    """Replace the projections ``names`` of ``module`` by one layer ``name``, if they can be → their names now."""
    layer = merge([getattr(module, each) for each in names]) if len(names) > 1 else None
    if layer is None:
        return names
    for each in names:
        delattr(module, each)
    module.add_module(name, layer)
    return (name,)


def stack_number(module: nn.Module, names: Sequence[str]) -> str | None:
    """The number that the projections' input is rounded to, by whoever computes it; None if they take it as it is."""
    return input_number(getattr(module, names[0])) if len(names) == 1 else None


def project(
    module: nn.Module, names: Sequence[str], x: Tensor | QuantizedRows, sizes: Sequence[int]
) -> Sequence[Tensor]:
    """The projections of ``x`` [tokens, in], each [tokens, size]."""
    outputs: list[Tensor] = [getattr(module, name)(x) for name in names]
    return outputs if len(outputs) == len(sizes) else torch.split(outputs[0], list(sizes), dim=1)


class DecoderLayer(nn.Module):
    """One block, in the two halves that calibration runs apart: tokens see each other only in the first.

    The hidden state travels as ``residual`` and the last sublayer's output, which the next norm adds in the same pass.
    """

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config)
        self.self_attn = Attention(config, layer)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config)
        self.post_norms = config.post_norms
        if self.post_norms:
            self.pre_feedforward_layernorm = RMSNorm(config.hidden_size, config)
            self.post_feedforward_layernorm = RMSNorm(config.hidden_size, config)
        self.feed_forward_name = config.names.feed_forward
        dense = config.experts is None
        mlp = MLP(config, config.intermediate_size) if dense else MixtureOfExperts(config)
        self.add_module(self.feed_forward_name, mlp)

    @property
    def feed_forward(self) -> MLP | MixtureOfExperts:
        module: MLP | MixtureOfExperts = getattr(self, self.feed_forward_name)
        return module

    def merge(self) -> None:
        """Make one product of the layers that share an input. For running, not for quantizing them one by one."""
        self.self_attn.merge()
        self.feed_forward.merge()

    def mix(self, residual: Tensor, x: Tensor | None, rotation: Rotation, attend: Attend) -> Tensor:
        """Add ``x`` to ``residual`` in place; return what the heads make of the sum: the input of ``finish``."""
        normed = self.input_layernorm(residual, x, self.self_attn.input_number)
        return self.self_attn.mix(normed, rotation, attend)

    def finish(self, residual: Tensor, mixed: Tensor) -> Tensor:
        """Add the attention's output to ``residual`` in place; return the MLP's, which is still to be added."""
        x = self.self_attn.o_proj(mixed)
        number = self.feed_forward.input_number
        if self.post_norms:  # Gemma's names: its post_attention_layernorm is where Llama has none
            normed = self.pre_feedforward_layernorm(residual, self.post_attention_layernorm(x), number)
            out: Tensor = self.post_feedforward_layernorm(self.feed_forward(normed))
        else:
            out = self.feed_forward(self.post_attention_layernorm(residual, x, number))
        return out

    def add(self, residual: Tensor, mixed: Tensor) -> bool:
        """``finish``, and add the MLP's output too, where both products are the library's: it adds to what is there.
        False, and nothing is done, where they are not."""
        mlp = self.feed_forward
        if not isinstance(mlp, MLP) or self.post_norms:
            return False
        o, down = (plain_weight(layer) for layer in (self.self_attn.o_proj, mlp.get_submodule(mlp.down)))
        if not (isinstance(o, Weight) and isinstance(down, Weight) and o.scales is down.scales is None):
            return False
        residual.addmm_(mixed, o.values.t())
        gated = mlp.gated(self.post_attention_layernorm(residual, None, mlp.input_number))
        assert isinstance(gated, Tensor)
        residual.addmm_(gated, down.values.t())
        return True

    def until(self, following: DecoderLayer | None) -> Between | None:
        """The weights of ``finish``, and of the projections in the next layer's ``mix``; None if ``megakernel`` has no
        form for one of them."""
        mlp = self.feed_forward
        if not isinstance(mlp, MLP) or mlp.gelu or self.post_norms or len(mlp.gate_up) > 1:
            return None
        o, gate_up, down = (
            plain_weight(layer)
            for layer in (self.self_attn.o_proj, mlp.get_submodule(*mlp.gate_up), mlp.get_submodule(mlp.down))
        )
        if o is None or gate_up is None or down is None:
            return None
        behind = None
        if following is not None:
            attention = following.self_attn
            qkv = plain_weight(attention.get_submodule(*attention.qkv)) if len(attention.qkv) == 1 else None
            if qkv is None:
                return None
            behind = following.input_layernorm.weight, qkv
        norm = self.post_attention_layernorm
        return Between(o, norm.weight, gate_up, down, behind, norm.eps)


class Decoder(nn.Module):
    """Token ids and positions → hidden states → logits."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        # Not drawn at random: on the meta device that would import torch._dynamo, for more than a second.
        weight = torch.empty(config.vocab_size, config.hidden_size)
        self.embed_tokens = nn.Embedding.from_pretrained(weight)  # type: ignore[no-untyped-call]
        self.layers = nn.ModuleList(DecoderLayer(config, layer) for layer in range(config.num_layers))
        self.norm = RMSNorm(config.hidden_size, config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)

    @property
    def waits_for_host(self) -> bool:
        """Whether a step needs to know how many tokens each expert has, which no CUDA graph can wait for."""
        return any(isinstance(module, MixtureOfExperts) and module.grouped is None for module in self.modules())

    def forward(self, token_ids: Tensor, positions: Tensor, attend: Attend, wanted: Tensor | None = None) -> Tensor:
        """Hidden states [tokens, hidden] of ``token_ids`` [tokens] at ``positions`` [tokens], after the last norm; or
        of the tokens ``wanted`` alone, integers: behind the last attention the others are not computed."""
        residual, x = embedding(token_ids, self.embed_tokens.weight, self.config.embedding_scale), None
        rotations = rotary_angles(self.config, positions)
        layers = [layer for layer in self.layers if isinstance(layer, DecoderLayer)]
        few = len(token_ids) <= MOST_ROWS and has_room(residual.device)
        whole = residual.numel() <= MOST_VALUES
        qkv: Tensor | None = None
        for layer, following in zip(layers, [*layers[1:], None], strict=True):
            rotation = rotations[layer.self_attn.rope]
            if qkv is None:
                mixed = layer.mix(residual, x, rotation, attend)
            else:
                mixed = layer.self_attn.gather(torch.split(qkv, list(layer.self_attn.sizes), 1), rotation, attend)
            if following is None and wanted is not None:
                mixed, residual = mixed[wanted], residual[wanted]
            between = layer.until(following if whole else None) if few else None
            if between is not None and takes(len(mixed), mixed.dtype, between):
                x, qkv = None, megakernel(mixed, residual, between)
            elif len(mixed) >= ADDING_TOKENS and layer.add(residual, mixed):
                x, qkv = None, None
            else:
                x, qkv = layer.finish(residual, mixed), None
        out: Tensor = self.norm(residual, x)
        return out

    def logits(self, hidden: Tensor) -> Tensor:
        """fp32 [tokens, vocabulary]"""
        return self.narrow_logits(hidden).float()

    def narrow_logits(self, hidden: Tensor) -> Tensor:
        """``logits`` as the head gives them, in its type unless they are capped: enough to draw from, for nothing is
        summed."""
        out: Tensor = self.lm_head(hidden)
        softcap = self.config.logits_softcap
        return out if softcap is None else softcap * torch.tanh(out.float() / softcap)


class CausalAttention:
    """``attend`` over whole sequences of one length, laid end to end: for calibration and scoring, without a cache."""

    def __init__(self, length: int) -> None:
        self.length = length

    def __call__(self, attention: Attention, query: Tensor, key: Tensor, value: Tensor, rotation: Rotation) -> Tensor:
        query, key = norm_and_rotate(query, key, rotation, attention.norms, attention.eps)
        query, key, value = (x.view(-1, self.length, *x.shape[1:]).transpose(1, 2) for x in (query, key, value))
        window, softcap = attention.window, attention.softcap
        mask = None
        if softcap is not None or (window is not None and window < self.length):
            position = torch.arange(self.length, device=query.device)
            distance = position[:, None] - position[None, :]
            mask = (distance >= 0) & (distance < (window or self.length))
        mixed = dot_product_attention(query, key, value, mask, scale=attention.scale, softcap=softcap)
        return mixed.transpose(1, 2).flatten(0, 1)
