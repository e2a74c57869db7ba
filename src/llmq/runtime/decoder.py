"""One decoder for the Llama family, driven by ModelConfig.

Tokens of all sequences of a step lie in one flat row, never padded; what binds a token to its sequence is its
position and the ``attend`` function, which the caller brings: over a paged KV cache to generate, over whole sequences
to calibrate and to score. Module names are those of the checkpoint, without the leading ``model.``.
"""

from __future__ import annotations

import math
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from llmq.checkpoint.config import ModelConfig, Rope


class Attend(Protocol):
    def __call__(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Attention of ``query`` [tokens, heads, head_dim] over ``key``, ``value`` [tokens, kv_heads, head_dim] and
        whatever the sequences have cached → [tokens, heads, head_dim]."""
        ...


class RMSNorm(nn.Module):
    """Root-mean-square normalization (Zhang & Sennrich, 2019) over the last dimension, computed in fp32."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size), requires_grad=False)
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        normal = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        return self.weight * normal.to(x.dtype)


class Attention(nn.Module):
    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.layer = layer
        self.head_dim = config.head_dim
        q_size, kv_size = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
        self.q_proj = nn.Linear(config.hidden_size, q_size, bias=config.qkv_bias)
        self.k_proj = nn.Linear(config.hidden_size, kv_size, bias=config.qkv_bias)
        self.v_proj = nn.Linear(config.hidden_size, kv_size, bias=config.qkv_bias)
        self.o_proj = nn.Linear(q_size, config.hidden_size, bias=config.o_bias)
        self.q_norm = RMSNorm(config.head_dim, config.rms_norm_eps) if config.qk_norm else nn.Identity()
        self.k_norm = RMSNorm(config.head_dim, config.rms_norm_eps) if config.qk_norm else nn.Identity()

    def mix(self, x: Tensor, rotation: tuple[Tensor, Tensor], attend: Attend) -> Tensor:
        """What the heads gather from all tokens, [tokens, heads · head_dim]: the input of ``o_proj``."""
        heads = (x.shape[0], -1, self.head_dim)
        query = rotate(self.q_norm(self.q_proj(x).view(heads)), rotation)
        key = rotate(self.k_norm(self.k_proj(x).view(heads)), rotation)
        return attend(self.layer, query, key, self.v_proj(x).view(heads)).reshape(x.shape[0], -1)


class MLP(nn.Module):
    """SwiGLU (Shazeer, 2020): down(silu(gate(x)) · up(x))"""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=config.mlp_bias)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=config.mlp_bias)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=config.mlp_bias)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))
        return out


class DecoderLayer(nn.Module):
    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config, layer)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, rotation: tuple[Tensor, Tensor], attend: Attend) -> Tensor:
        return self.finish(x, self.mix(x, rotation, attend))

    def mix(self, x: Tensor, rotation: tuple[Tensor, Tensor], attend: Attend) -> Tensor:
        """The part of the block in which tokens see each other."""
        return self.self_attn.mix(self.input_layernorm(x), rotation, attend)

    def finish(self, x: Tensor, mixed: Tensor) -> Tensor:
        """The rest, each token for itself. Apart from ``mix`` so that calibration need not repeat the costly half."""
        x = x + self.self_attn.o_proj(mixed)
        out: Tensor = x + self.mlp(self.post_attention_layernorm(x))
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
        x = self.embed_tokens(token_ids)
        rotation = rotary_angles(self.config, positions)
        for layer in self.layers:
            x = layer(x, rotation, attend)
        out: Tensor = self.norm(x)
        return out

    def logits(self, hidden: Tensor) -> Tensor:
        """fp32 [tokens, vocabulary]"""
        out: Tensor = self.lm_head(hidden)
        return out.float()


def rotary_angles(config: ModelConfig, positions: Tensor) -> tuple[Tensor, Tensor]:
    """cos and sin [tokens, 1, head_dim / 2] in fp32 of the rotary embedding (Su et al., 2021) at ``positions``."""
    frequencies = rotary_frequencies(config.rope, config.head_dim).to(positions.device)
    angles = positions.float()[:, None, None] * frequencies
    return angles.cos(), angles.sin()


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


def rotate(x: Tensor, rotation: tuple[Tensor, Tensor]) -> Tensor:
    """Rotate each pair (i, i + head_dim / 2) of ``x`` [tokens, heads, head_dim], in fp32."""
    cos, sin = rotation
    first, second = x.float().chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)


class CausalAttention:
    """``attend`` over whole sequences of one length, laid end to end: for calibration and scoring, without a cache."""

    def __init__(self, config: ModelConfig, length: int) -> None:
        self.windows = config.windows
        self.length = length

    def __call__(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        query, key, value = (x.view(-1, self.length, *x.shape[1:]).transpose(1, 2) for x in (query, key, value))
        window = self.windows[layer]
        mask = None
        if window is not None and window < self.length:
            position = torch.arange(self.length, device=query.device)
            distance = position[:, None] - position[None, :]
            mask = (distance >= 0) & (distance < window)
        mixed = F.scaled_dot_product_attention(
            query, key, value, attn_mask=mask, is_causal=mask is None, enable_gqa=True
        )
        return mixed.transpose(1, 2).flatten(0, 1)
