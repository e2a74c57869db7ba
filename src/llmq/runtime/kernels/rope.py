"""What lies between a layer's projections and its attention, in one pass: norms of query and key, rotary embedding,
and the write of key and value into the paged cache.

query  [tokens, heads, head_dim]      → norm → rotate → result
key    [tokens, kv_heads, head_dim]   → norm → rotate → key_cache at its slot
value  [tokens, kv_heads, head_dim]   ────────────────→ value_cache at its slot

rotate (Su et al., 2021): the pair (i, i + rotated / 2) turns by the token's angle i
       | rotated channels | the rest pass as they are |
       0                  rotated                     head_dim
"""

from __future__ import annotations

import torch
from torch import Tensor

from llmq.runtime.kernels import runs_triton
from llmq.runtime.kernels.kv_write import Scales, write_kv
from llmq.runtime.kernels.norm import add_rms_norm_reference


def rope_and_write(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    rotation: tuple[Tensor, Tensor],
    key_cache: Tensor,
    value_cache: Tensor,
    slots: Tensor,
    *,
    norms: tuple[Tensor, Tensor] | None = None,
    eps: float = 0.0,
    scales: Scales | None = None,
) -> Tensor:
    """Write key and value, and return the query, rotated: [tokens, heads, head_dim].

    query, key, value       contiguous in head_dim: slices of one fused projection, say
    rotation                cos and sin, fp32 [tokens, 1, rotated / 2]
    key_cache, value_cache  [blocks, block_size, kv_heads, head_dim], of the same strides; see ``write_kv``
    slots                   integers [tokens]
    norms                   weights [head_dim] of the RMS norms of query and key, which have ``eps``, as those of
                            ``add_rms_norm``; None: no norm
    scales                  of a cache of 8 bits; see ``write_kv``
    """
    arguments = (query, key, value, rotation, key_cache, value_cache, slots)
    if not runs_triton(query):
        return rope_and_write_reference(*arguments, norms=norms, eps=eps, scales=scales)
    from llmq.runtime.kernels.rope_triton import rope_and_write_triton

    return rope_and_write_triton(*arguments, norms=norms, eps=eps, scales=scales)


def rope_and_write_reference(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    rotation: tuple[Tensor, Tensor],
    key_cache: Tensor,
    value_cache: Tensor,
    slots: Tensor,
    *,
    norms: tuple[Tensor, Tensor] | None = None,
    eps: float = 0.0,
    scales: Scales | None = None,
) -> Tensor:
    """``rope_and_write`` in plain PyTorch."""
    query, key = norm_and_rotate(query, key, rotation, norms, eps)
    write_kv(key, value, key_cache, value_cache, slots, scales)
    return query


def norm_and_rotate(
    query: Tensor, key: Tensor, rotation: tuple[Tensor, Tensor], norms: tuple[Tensor, Tensor] | None, eps: float
) -> tuple[Tensor, Tensor]:
    """The first half of ``rope_and_write``, in plain PyTorch, for attention without a cache."""
    if norms is not None:
        query, key = (add_rms_norm_reference(x, None, norm, eps) for x, norm in zip((query, key), norms, strict=True))
    return _rotate(query, rotation), _rotate(key, rotation)


def _rotate(x: Tensor, rotation: tuple[Tensor, Tensor]) -> Tensor:
    cos, sin = rotation
    half = cos.shape[-1]
    first, second = x[..., : 2 * half].to(torch.promote_types(x.dtype, cos.dtype)).chunk(2, dim=-1)
    turned = torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)
    return turned if 2 * half == x.shape[-1] else torch.cat((turned, x[..., 2 * half :]), dim=-1)
