"""Device code of ``rope``."""

# mypy: disable-error-code="untyped-decorator, no-untyped-def, no-untyped-call"

import torch
import triton
import triton.language as tl
from torch import Tensor

from llmq.runtime.kernels.pdl_triton import pdl, wait


def rope_and_write_triton(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    rotation: tuple[Tensor, Tensor],
    key_cache: Tensor,
    value_cache: Tensor,
    slots: Tensor,
    *,
    norms: tuple[Tensor, Tensor] | None,
    eps: float,
) -> Tensor:
    """``rope_and_write`` through Triton: for each token a few programs, of a few heads each."""
    tokens, heads, head_dim = query.shape
    kv_heads = key.shape[1]
    if key_cache.stride() != value_cache.stride() or key_cache.stride(3) != 1:
        raise ValueError("the key and value caches must have the same strides, and be contiguous in head_dim")
    if query.stride(2) != 1 or key.stride(2) != 1 or value.stride(2) != 1:
        raise ValueError("query, key and value must be contiguous in head_dim")
    cos, sin = (angles.contiguous() for angles in rotation)
    half = cos.shape[-1]
    query_norm, key_norm = norms or (query, key)
    out = torch.empty(tokens, heads, head_dim, dtype=query.dtype, device=query.device)
    block = 8
    query_blocks = triton.cdiv(heads, block)
    if tokens:
        rope_and_write_kernel[tokens, query_blocks + triton.cdiv(kv_heads, block)](
            query, key, value, cos, sin, query_norm, key_norm, out, key_cache, value_cache, slots,
            *query.stride()[:2], *key.stride()[:2], *value.stride()[:2], *key_cache.stride()[:3],
            heads, kv_heads, query_blocks, eps,
            NORM=norms is not None, HALF=half, HALF_PADDED=triton.next_power_of_2(half),
            REST=head_dim - 2 * half, REST_PADDED=triton.next_power_of_2(head_dim - 2 * half),
            BLOCK_SIZE=key_cache.shape[1], BLOCK=block, num_warps=2, **pdl(query.device),
        )  # fmt: skip
    return out


@triton.jit
def scaled(x, inverse, norm, channel, inside):
    """``x`` · ``inverse`` · the norm's weight, rounded where the plain computation rounds."""
    weight = tl.load(norm + channel, mask=inside, other=0.0)
    normal = (x * inverse).to(weight.dtype).to(tl.float32)
    return normal * weight.to(tl.float32)[None, :]


@triton.jit
def rotate_heads(source, to, norm, head, heads, cos, sin, eps, source_stride, to_stride,
                 NORM: tl.constexpr, HALF: tl.constexpr, HALF_PADDED: tl.constexpr, REST: tl.constexpr,
                 REST_PADDED: tl.constexpr):  # fmt: skip
    """Norm and rotate the heads ``head`` of one token, from ``source`` to ``to``."""
    half = tl.arange(0, HALF_PADDED)
    inside = (head < heads)[:, None] & (half < HALF)[None, :]
    at = source + head[:, None] * source_stride + half[None, :]
    at_out = to + head[:, None] * to_stride + half[None, :]
    narrow = tl.load(at, mask=inside, other=0.0)
    kind = narrow.dtype
    first = narrow.to(tl.float32)
    second = tl.load(at + HALF, mask=inside, other=0.0).to(tl.float32)
    if REST > 0:
        rest = tl.arange(0, REST_PADDED)
        inside_rest = (head < heads)[:, None] & (rest < REST)[None, :]
        passed = tl.load(source + head[:, None] * source_stride + 2 * HALF + rest[None, :], mask=inside_rest, other=0.0)
        passed = passed.to(tl.float32)
    if NORM:
        squares = tl.sum(first * first + second * second, 1)
        if REST > 0:
            squares += tl.sum(passed * passed, 1)
        inverse = tl.rsqrt(squares / (2 * HALF + REST) + eps)[:, None]
        first = scaled(first, inverse, norm, half, half < HALF).to(kind).to(tl.float32)
        second = scaled(second, inverse, norm, HALF + half, half < HALF).to(kind).to(tl.float32)
        if REST > 0:
            passed = scaled(passed, inverse, norm, 2 * HALF + rest, rest < REST)
    tl.store(at_out, (first * cos - second * sin).to(kind), mask=inside)
    tl.store(at_out + HALF, (second * cos + first * sin).to(kind), mask=inside)
    if REST > 0:
        tl.store(to + head[:, None] * to_stride + 2 * HALF + rest[None, :], passed.to(kind), mask=inside_rest)


@triton.jit
def rope_and_write_kernel(
    query, key, value, cos, sin, query_norm, key_norm, out, key_cache, value_cache, slots,
    query_token_stride, query_head_stride, key_token_stride, key_head_stride, value_token_stride, value_head_stride,
    cache_block_stride, cache_token_stride, cache_head_stride, heads, kv_heads, query_blocks, eps,
    NORM: tl.constexpr, HALF: tl.constexpr, HALF_PADDED: tl.constexpr, REST: tl.constexpr, REST_PADDED: tl.constexpr,
    BLOCK_SIZE: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """BLOCK heads of one token: of the query, or of key and value."""
    token = tl.program_id(0).to(tl.int64)
    half = tl.arange(0, HALF_PADDED)
    wait(PDL)
    c = tl.load(cos + token * HALF + half, mask=half < HALF, other=0.0)[None, :]
    s = tl.load(sin + token * HALF + half, mask=half < HALF, other=0.0)[None, :]
    block = tl.program_id(1)
    if block < query_blocks:
        head = block * BLOCK + tl.arange(0, BLOCK)
        HEAD_DIM: tl.constexpr = 2 * HALF + REST
        rotate_heads(
            query + token * query_token_stride, out + token * heads * HEAD_DIM, query_norm, head, heads, c, s,
            eps, query_head_stride, HEAD_DIM, NORM, HALF, HALF_PADDED, REST, REST_PADDED,
        )  # fmt: skip
    else:
        head = (block - query_blocks) * BLOCK + tl.arange(0, BLOCK)
        slot = tl.load(slots + token).to(tl.int64)
        # A pool may hold more than 2^31 elements: the block's offset is 64 bits wide, the rest is small.
        to = (slot // BLOCK_SIZE) * cache_block_stride + (slot % BLOCK_SIZE) * cache_token_stride
        rotate_heads(
            key + token * key_token_stride, key_cache + to, key_norm, head, kv_heads, c, s,
            eps, key_head_stride, cache_head_stride, NORM, HALF, HALF_PADDED, REST, REST_PADDED,
        )  # fmt: skip
        inside = (head < kv_heads)[:, None] & (half < HALF)[None, :]
        at = value + token * value_token_stride + head[:, None] * value_head_stride + half[None, :]
        at_cache = value_cache + to + head[:, None] * cache_head_stride + half[None, :]
        tl.store(at_cache, tl.load(at, mask=inside), mask=inside)
        tl.store(at_cache + HALF, tl.load(at + HALF, mask=inside), mask=inside)
        if REST > 0:
            rest = 2 * HALF + tl.arange(0, REST_PADDED)
            inside_rest = (head < kv_heads)[:, None] & (rest < 2 * HALF + REST)[None, :]
            passed = tl.load(
                value + token * value_token_stride + head[:, None] * value_head_stride + rest[None, :],
                mask=inside_rest,
            )  # fmt: skip
            tl.store(value_cache + to + head[:, None] * cache_head_stride + rest[None, :], passed, mask=inside_rest)
