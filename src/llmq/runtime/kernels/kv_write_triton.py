"""Device code of ``kv_write``."""

# mypy: disable-error-code="untyped-decorator, no-untyped-def, no-untyped-call"

import triton
import triton.language as tl
from torch import Tensor

from llmq.runtime.kernels.kv_write import Scales
from llmq.runtime.kernels.quantize_rows_triton import TINY, rounded


def scale_strides(scales: Scales | None) -> tuple[int, int]:
    """Of a block's and of a head's scales; those of a layer have none."""
    if scales is None or scales[0].dim() == 1:
        return 0, 0
    if scales[0].stride() != scales[1].stride() or scales[0].stride(2) != 1:
        raise ValueError("the scales of keys and values must have the same strides, and be contiguous in block_size")
    block, head, _ = scales[0].stride()
    return block, head


def write_kv_triton(
    key: Tensor, value: Tensor, key_cache: Tensor, value_cache: Tensor, slots: Tensor, scales: Scales | None = None
) -> None:
    """``write_kv`` through Triton: one program a token."""
    tokens, kv_heads, head_dim = key.shape
    if key_cache.stride() != value_cache.stride() or key_cache.stride(3) != 1:
        raise ValueError("the key and value caches must have the same strides, and be contiguous in head_dim")
    if key.stride(2) != 1 or value.stride(2) != 1:
        raise ValueError("keys and values must be contiguous in head_dim")
    if tokens:
        write_kv_kernel[tokens,](
            key, value, key_cache, value_cache, *(scales or (None, None)), slots,
            *key.stride()[:2], *value.stride()[:2], *key_cache.stride()[:3], *scale_strides(scales),
            KV_HEADS=kv_heads, HEAD_DIM=head_dim, BLOCK_SIZE=key_cache.shape[1],
            HEADS_PADDED=triton.next_power_of_2(kv_heads), DIM_PADDED=triton.next_power_of_2(head_dim),
        )  # fmt: skip


@triton.jit
def store_heads(heads, to, dim, scales, at, is_head, is_channel):
    """Store ``heads`` [n, channels ``dim``] of one token in a cache, at the places ``to`` [n], rounded if it has
    ``scales``; where those are the heads' own, they are stored too, at ``at`` [n]."""
    if scales is not None:
        heads = heads.to(tl.float32)
        if to.dtype.element_ty == tl.int8:
            most = tl.maximum(tl.max(tl.abs(heads), 1), TINY)
            tl.store(scales + at, tl.div_rn(most, 127.0), mask=is_head)
            inverse = tl.div_rn(127.0, most)[:, None]
        else:
            inverse = tl.div_rn(1.0, tl.load(scales))
        heads = rounded(heads * inverse, to)
    tl.store(to[:, None] + dim[None, :], heads, mask=is_head[:, None] & is_channel[None, :])


@triton.jit
def write_kv_kernel(
    key, value, key_cache, value_cache, key_scales, value_scales, slots,
    key_token_stride, key_head_stride, value_token_stride, value_head_stride,
    cache_block_stride, cache_token_stride, cache_head_stride, scale_block_stride, scale_head_stride,
    KV_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    HEADS_PADDED: tl.constexpr, DIM_PADDED: tl.constexpr,
):  # fmt: skip
    """One token: all its KV heads."""
    token = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots + token).to(tl.int64)
    head = tl.arange(0, HEADS_PADDED)
    dim = tl.arange(0, DIM_PADDED)
    is_head, is_channel = head < KV_HEADS, dim < HEAD_DIM
    inside = is_head[:, None] & is_channel[None, :]
    # A pool may hold more than 2^31 elements: the block's offset is 64 bits wide, the rest is small.
    to = (slot // BLOCK_SIZE) * cache_block_stride + (slot % BLOCK_SIZE) * cache_token_stride
    to += head * cache_head_stride
    at = (slot // BLOCK_SIZE) * scale_block_stride + slot % BLOCK_SIZE + head * scale_head_stride
    at_key = token * key_token_stride + head[:, None] * key_head_stride + dim[None, :]
    at_value = token * value_token_stride + head[:, None] * value_head_stride + dim[None, :]
    k = tl.load(key + at_key, mask=inside, other=0.0)
    store_heads(k, key_cache + to, dim, key_scales, at, is_head, is_channel)
    v = tl.load(value + at_value, mask=inside, other=0.0)
    store_heads(v, value_cache + to, dim, value_scales, at, is_head, is_channel)
