"""Device code of ``kv_write``."""

# mypy: disable-error-code="untyped-decorator, no-untyped-def, no-untyped-call"

import triton
import triton.language as tl
from torch import Tensor


def write_kv_triton(key: Tensor, value: Tensor, key_cache: Tensor, value_cache: Tensor, slots: Tensor) -> None:
    """``write_kv`` through Triton: one program a token."""
    tokens, kv_heads, head_dim = key.shape
    if key_cache.stride() != value_cache.stride() or key_cache.stride(3) != 1:
        raise ValueError("the key and value caches must have the same strides, and be contiguous in head_dim")
    if key.stride(2) != 1 or value.stride(2) != 1:
        raise ValueError("keys and values must be contiguous in head_dim")
    if tokens:
        write_kv_kernel[tokens,](
            key, value, key_cache, value_cache, slots, *key.stride()[:2], *value.stride()[:2], *key_cache.stride()[:3],
            KV_HEADS=kv_heads, HEAD_DIM=head_dim, BLOCK_SIZE=key_cache.shape[1],
            HEADS_PADDED=triton.next_power_of_2(kv_heads), DIM_PADDED=triton.next_power_of_2(head_dim),
        )  # fmt: skip


@triton.jit
def write_kv_kernel(
    key, value, key_cache, value_cache, slots,
    key_token_stride, key_head_stride, value_token_stride, value_head_stride,
    cache_block_stride, cache_token_stride, cache_head_stride,
    KV_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    HEADS_PADDED: tl.constexpr, DIM_PADDED: tl.constexpr,
):  # fmt: skip
    """One token: all its KV heads."""
    token = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots + token).to(tl.int64)
    head = tl.arange(0, HEADS_PADDED)[:, None]
    dim = tl.arange(0, DIM_PADDED)[None, :]
    inside = (head < KV_HEADS) & (dim < HEAD_DIM)
    # A pool may hold more than 2^31 elements: the block's offset is 64 bits wide, the rest is small.
    to = (slot // BLOCK_SIZE) * cache_block_stride + (slot % BLOCK_SIZE) * cache_token_stride
    within = head * cache_head_stride + dim
    k = tl.load(key + token * key_token_stride + head * key_head_stride + dim, mask=inside)
    v = tl.load(value + token * value_token_stride + head * value_head_stride + dim, mask=inside)
    tl.store(key_cache + to + within, k, mask=inside)
    tl.store(value_cache + to + within, v, mask=inside)
