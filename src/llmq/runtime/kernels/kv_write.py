"""Writing a step's keys and values into a paged KV cache, as they are or rounded to 8 bits.

slot = block · block_size + offset

key    [tokens, kv_heads, head_dim]      token t  →  key_cache[slots[t] // block_size, slots[t] % block_size]
cache  [blocks, block_size, kv_heads, head_dim]

key ≈ scale · code:
codes  of                 scales, fp32
e4m3   key / scale        [1]                             one for the layer, measured beforehand
int8   key / scale        [blocks, kv_heads, block_size]  one for each head of each token: max|key| / 127

Attention reads what is stored, also of a step's own tokens: it makes no difference whether a prompt was computed in one
piece, in several, again after a preemption, or found in the prefix cache.
"""

from __future__ import annotations

import torch
from torch import Tensor

from llmq.runtime.kernels.quantize_rows import LARGEST, quantize_rows_reference
from llmq.scheme import E4M3, INT

Scales = tuple[Tensor, Tensor]
"""Of a layer's keys, and of its values, both of one shape and strides."""


def write_kv(
    key: Tensor, value: Tensor, key_cache: Tensor, value_cache: Tensor, slots: Tensor, scales: Scales | None = None
) -> None:
    """Write ``key`` and ``value`` at ``slots``, in plain PyTorch; on a GPU ``rope_and_write`` does it.

    key, value    [tokens, kv_heads, head_dim]
    key_cache     [blocks, block_size, kv_heads, head_dim]; may be a view of a bigger pool, contiguous in head_dim,
    value_cache   both with the same strides; of int8 or e4m3 where there are scales
    slots         integers [tokens]; distinct, but for those of block 0, where padding tokens are written
    scales        of e4m3, read; of int8, written too. None: the caches have the type of key and value
    """
    block_size = key_cache.shape[1]
    block, offset = slots // block_size, slots % block_size
    for x, cache, scale in zip((key, value), (key_cache, value_cache), scales or (None, None), strict=True):
        if scale is None:
            codes = x
        elif cache.dtype == torch.int8:
            rows = quantize_rows_reference(x.flatten(0, 1), INT)
            codes = rows.codes.view(x.shape)
            scale[block, :, offset] = rows.scales.view(x.shape[:2])
        else:
            largest = LARGEST[E4M3]
            codes = (x.float() * scale.reciprocal()).clamp(-largest, largest).to(cache.dtype)
        cache.index_put_((block, offset), codes)


def read_pages(cache: Tensor, scale: Tensor | None, blocks: Tensor, dtype: torch.dtype) -> Tensor:
    """The numbers that ``cache`` holds in ``blocks`` [n], in ``dtype``: [n, block_size, kv_heads, head_dim]. In plain
    PyTorch."""
    pages = cache.index_select(0, blocks)  # several times faster on a CPU than indexing with a matrix
    if scale is None:
        return pages
    if cache.dtype == torch.int8:
        scale = scale.index_select(0, blocks).transpose(1, 2)[..., None]
    return (pages.to(torch.promote_types(dtype, torch.float32)) * scale).to(dtype)
