"""One decoder for the Llama family, driven by ModelConfig.

Tokens of all sequences of a step lie in one flat row, never padded; what binds a token to its sequence is its
position and the ``attend`` function, which the caller brings: over a paged KV cache to generate, over whole sequences
to calibrate and to score. Module names are those of the checkpoint, without the leading ``model.``.
"""

from __future__ import annotations

import math
from functools import cache
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from llmq.checkpoint.config import ModelConfig, Rope
from llmq.runtime.kernels.norm import add_rms_norm, add_rms_norm_quantize
from llmq.runtime.kernels.quantize_rows import QuantizedRows
from llmq.runtime.kernels.rope import norm_and_rotate
from llmq.runtime.kernels.silu import silu_mul, silu_mul_quantize
from llmq.runtime.linear import input_number, merge


class Attend(Protocol):
    """How tokens of the same sequence see each other: what the caller brings to the decoder."""

    def __call__(
        self, attention: Attention, query: Tensor, key: Tensor, value: Tensor, rotation: tuple[Tensor, Tensor]
    ) -> Tensor:
        """Attention of one layer. ``query`` [tokens, heads, head_dim], and ``key`` and ``value`` [tokens, kv_heads,
        head_dim] of the same tokens, come as they are projected: neither normed nor rotated.
        → [tokens, heads, head_dim]"""
        ...


class RMSNorm(nn.Module):
    """The weight of a norm; ``add_rms_norm`` computes it."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size), requires_grad=False)
        self.eps = eps

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
        self.head_dim = config.head_dim
        self.eps = config.rms_norm_eps
        q_size, kv_size = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
        self.sizes = [q_size, kv_size, kv_size]
        self.qkv_proj: nn.Module | None = None
        self.q_proj = nn.Linear(config.hidden_size, q_size, bias=config.qkv_bias)
        self.k_proj = nn.Linear(config.hidden_size, kv_size, bias=config.qkv_bias)
        self.v_proj = nn.Linear(config.hidden_size, kv_size, bias=config.qkv_bias)
        self.o_proj = nn.Linear(q_size, config.hidden_size, bias=config.o_bias)
        if config.qk_norm:
            self.q_norm = RMSNorm(config.head_dim, config.rms_norm_eps)
            self.k_norm = RMSNorm(config.head_dim, config.rms_norm_eps)
        self.qk_norm = config.qk_norm

    @property
    def norms(self) -> tuple[Tensor, Tensor] | None:
        """The weights of the norms of queries and keys, where the architecture has them."""
        return (self.q_norm.weight, self.k_norm.weight) if self.qk_norm else None

    @property
    def input_number(self) -> str | None:
        return None if self.qkv_proj is None else input_number(self.qkv_proj)

    def merge(self) -> None:
        """Make one product of the projections of query, key and value, where their layers allow it."""
        self.qkv_proj = merge([self.q_proj, self.k_proj, self.v_proj])
        if self.qkv_proj is not None:
            del self.q_proj, self.k_proj, self.v_proj

    def mix(self, x: Tensor | QuantizedRows, rotation: tuple[Tensor, Tensor], attend: Attend) -> Tensor:
        """What the heads gather from all tokens, [tokens, heads · head_dim]: the input of ``o_proj``."""
        if self.qkv_proj is None:
            parts = (self.q_proj(x), self.k_proj(x), self.v_proj(x))
        else:
            parts = self.qkv_proj(x).split(self.sizes, dim=1)
        query, key, value = (part.view(part.shape[0], -1, self.head_dim) for part in parts)
        return attend(self, query, key, value, rotation).reshape(query.shape[0], -1)


class MLP(nn.Module):
    """SwiGLU (Shazeer, 2020): down(silu(gate(x)) · up(x))"""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=config.mlp_bias)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=config.mlp_bias)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=config.mlp_bias)
        self.gate_up_proj: nn.Module | None = None

    @property
    def input_number(self) -> str | None:
        return None if self.gate_up_proj is None else input_number(self.gate_up_proj)

    def merge(self) -> None:
        """Make one product of gate and up, where their layers allow it."""
        self.gate_up_proj = merge([self.gate_proj, self.up_proj])
        if self.gate_up_proj is not None:
            del self.gate_proj, self.up_proj

    def forward(self, x: Tensor | QuantizedRows) -> Tensor:
        if self.gate_up_proj is None:
            gate, up = self.gate_proj(x), self.up_proj(x)
        else:
            gate, up = self.gate_up_proj(x).chunk(2, dim=1)
        number = input_number(self.down_proj)
        out: Tensor = self.down_proj(silu_mul(gate, up) if number is None else silu_mul_quantize(gate, up, number))
        return out


class DecoderLayer(nn.Module):
    """One block, in the two halves that calibration runs apart: tokens see each other only in the first.

    The hidden state travels as ``residual`` and the last sublayer's output, which the next norm adds in the same pass.
    """

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config, layer)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config)

    def merge(self) -> None:
        """Make one product of the layers that share an input. For running, not for quantizing them one by one."""
        self.self_attn.merge()
        self.mlp.merge()

    def mix(self, residual: Tensor, x: Tensor | None, rotation: tuple[Tensor, Tensor], attend: Attend) -> Tensor:
        """Add ``x`` to ``residual`` in place; return what the heads make of the sum: the input of ``finish``."""
        normed = self.input_layernorm(residual, x, self.self_attn.input_number)
        return self.self_attn.mix(normed, rotation, attend)

    def finish(self, residual: Tensor, mixed: Tensor) -> Tensor:
        """Add the attention's output to ``residual`` in place; return the MLP's, which is still to be added."""
        normed = self.post_attention_layernorm(residual, self.self_attn.o_proj(mixed), self.mlp.input_number)
        out: Tensor = self.mlp(normed)
        return out


class Decoder(nn.Module):
    """Token ids and positions → hidden states → logits."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(DecoderLayer(config, layer) for layer in range(config.num_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)

    def forward(self, token_ids: Tensor, positions: Tensor, attend: Attend) -> Tensor:
        """Hidden states [tokens, hidden] of ``token_ids`` [tokens] at ``positions`` [tokens], after the last norm."""
        residual, x = self.embed_tokens(token_ids), None
        rotation = rotary_angles(self.config, positions)
        for layer in self.layers:
            assert isinstance(layer, DecoderLayer)
            x = layer.finish(residual, layer.mix(residual, x, rotation, attend))
        out: Tensor = self.norm(residual, x)
        return out

    def logits(self, hidden: Tensor) -> Tensor:
        """fp32 [tokens, vocabulary]"""
        out: Tensor = self.lm_head(hidden)
        return out.float()


def rotary_angles(config: ModelConfig, positions: Tensor) -> tuple[Tensor, Tensor]:
    """cos and sin [tokens, 1, head_dim / 2] in fp32 of the rotary embedding (Su et al., 2021) at ``positions``."""
    frequencies = _frequencies_on(positions.device, config.rope, config.head_dim)
    angles = positions.float()[:, None, None] * frequencies
    return angles.cos(), angles.sin()


@cache
def _frequencies_on(device: torch.device, rope: Rope, head_dim: int) -> Tensor:
    # Made once: a CUDA graph cannot be captured while the host sends something.
    return rotary_frequencies(rope, head_dim).to(device)


def rotary_frequencies(rope: Rope, head_dim: int) -> Tensor:
    """Radians per position, fp32 [head_dim / 2].

    ``llama3`` slows down wavelengths longer than the trained context by ``factor``, keeps the short ones, and
    interpolates between (Llama 3.1 model card).
    """
    frequencies = 1.0 / rope.theta ** (torch.arange(0, head_dim, 2, dtype=torch.int64).float() / head_dim)
    if rope.kind == "linear":
        return frequencies / rope.factor
    if rope.kind == "default":
        return frequencies
    wavelengths = 2 * math.pi / frequencies
    low, high = rope.low_freq_factor, rope.high_freq_factor
    sharpness = (rope.original_context / wavelengths - low) / (high - low)
    blended = (1 - sharpness) * frequencies / rope.factor + sharpness * frequencies
    scaled = torch.where(wavelengths > rope.original_context / low, frequencies / rope.factor, blended)
    return torch.where(wavelengths < rope.original_context / high, frequencies, scaled)


class CausalAttention:
    """``attend`` over whole sequences of one length, laid end to end: for calibration and scoring, without a cache."""

    def __init__(self, length: int) -> None:
        self.length = length

    def __call__(
        self, attention: Attention, query: Tensor, key: Tensor, value: Tensor, rotation: tuple[Tensor, Tensor]
    ) -> Tensor:
        query, key = norm_and_rotate(query, key, rotation, attention.norms, attention.eps)
        query, key, value = (x.view(-1, self.length, *x.shape[1:]).transpose(1, 2) for x in (query, key, value))
        window = attention.window
        mask = None
        if window is not None and window < self.length:
            position = torch.arange(self.length, device=query.device)
            distance = position[:, None] - position[None, :]
            mask = (distance >= 0) & (distance < window)
        mixed = F.scaled_dot_product_attention(
            query, key, value, attn_mask=mask, is_causal=mask is None, enable_gqa=True
        )
        return mixed.transpose(1, 2).flatten(0, 1)
