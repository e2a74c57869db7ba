"""Device code of ``rope``."""

# mypy: disable-error-code="untyped-decorator, no-untyped-def, no-untyped-call"

import torch
import triton
import triton.language as tl
from torch import Tensor

from llmq.runtime.kernels.kv_write import Scales
from llmq.runtime.kernels.kv_write_triton import inverse_scale, scale_strides
from llmq.runtime.kernels.pdl_triton import pdl, wait
from llmq.runtime.kernels.quantize_rows_triton import rounded


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
    scales: Scales | None,
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
            query, key, value, cos, sin, query_norm, key_norm, out, key_cache, value_cache, *(scales or (None, None)),
            slots, *query.stride()[:2], *key.stride()[:2], *value.stride()[:2], *key_cache.stride()[:3],
            *scale_strides(scales), heads, kv_heads, query_blocks, eps,
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
def load_heads(
    source, head, heads, stride,
    HALF: tl.constexpr, HALF_PADDED: tl.constexpr, REST: tl.constexpr, REST_PADDED: tl.constexpr,
):  # fmt: skip
    """The heads ``head`` of one token, 0 where there are none: the two halves that turn, and the rest, if any."""
    half = tl.arange(0, HALF_PADDED)
    inside = (head < heads)[:, None] & (half < HALF)[None, :]
    at = source + head[:, None] * stride + half[None, :]
    first = tl.load(at, mask=inside, other=0.0)
    second = tl.load(at + HALF, mask=inside, other=0.0)
    passed = first
    if REST > 0:
        rest = 2 * HALF + tl.arange(0, REST_PADDED)
        inside = (head < heads)[:, None] & (rest < 2 * HALF + REST)[None, :]
        passed = tl.load(source + head[:, None] * stride + rest[None, :], mask=inside, other=0.0)
    return first, second, passed


@triton.jit
def rotated(
    first, second, passed, norm, cos, sin, eps,
    NORM: tl.constexpr, HALF: tl.constexpr, HALF_PADDED: tl.constexpr, REST: tl.constexpr, REST_PADDED: tl.constexpr,
):  # fmt: skip
    """Heads that were loaded, normed and rotated."""
    kind = first.dtype
    first, second = first.to(tl.float32), second.to(tl.float32)
    if NORM:
        half = tl.arange(0, HALF_PADDED)
        squares = tl.sum(first * first + second * second, 1)
        if REST > 0:
            passed = passed.to(tl.float32)
            squares += tl.sum(passed * passed, 1)
        inverse = tl.rsqrt(squares / (2 * HALF + REST) + eps)[:, None]
        first = scaled(first, inverse, norm, half, half < HALF).to(kind).to(tl.float32)
        second = scaled(second, inverse, norm, HALF + half, half < HALF).to(kind).to(tl.float32)
        if REST > 0:
            rest = tl.arange(0, REST_PADDED)
            passed = scaled(passed, inverse, norm, 2 * HALF + rest, rest < REST).to(kind)
    return (first * cos - second * sin).to(kind), (second * cos + first * sin).to(kind), passed


@triton.jit
def store_heads(
    to, first, second, passed, head, heads, stride,
    HALF: tl.constexpr, HALF_PADDED: tl.constexpr, REST: tl.constexpr, REST_PADDED: tl.constexpr,
):  # fmt: skip
    """The counterpart of ``load_heads``."""
    half = tl.arange(0, HALF_PADDED)
    inside = (head < heads)[:, None] & (half < HALF)[None, :]
    at = to + head[:, None] * stride + half[None, :]
    tl.store(at, first, mask=inside)
    tl.store(at + HALF, second, mask=inside)
    if REST > 0:
        rest = 2 * HALF + tl.arange(0, REST_PADDED)
        inside = (head < heads)[:, None] & (rest < 2 * HALF + REST)[None, :]
        tl.store(to + head[:, None] * stride + rest[None, :], passed, mask=inside)


@triton.jit
def write_heads(
    to, scales, at, first, second, passed, head, heads, stride,
    HALF: tl.constexpr, HALF_PADDED: tl.constexpr, REST: tl.constexpr, REST_PADDED: tl.constexpr,
):  # fmt: skip
    """``store_heads`` into a cache; ``at`` are the places of the heads' scales, if they have any."""
    if scales is not None:
        first, second, passed = first.to(tl.float32), second.to(tl.float32), passed.to(tl.float32)
        most = tl.maximum(tl.max(tl.abs(first), 1), tl.max(tl.abs(second), 1))
        if REST > 0:
            most = tl.maximum(most, tl.max(tl.abs(passed), 1))
        inverse = inverse_scale(most, scales, at, head < heads, to)
        first, second = rounded(first * inverse, to), rounded(second * inverse, to)
        passed = rounded(passed * inverse, to)
    store_heads(to, first, second, passed, head, heads, stride, HALF, HALF_PADDED, REST, REST_PADDED)


@triton.jit
def rope_and_write_kernel(
    query, key, value, cos, sin, query_norm, key_norm, out, key_cache, value_cache, key_scales, value_scales, slots,
    query_token_stride, query_head_stride, key_token_stride, key_head_stride, value_token_stride, value_head_stride,
    cache_block_stride, cache_token_stride, cache_head_stride, scale_block_stride, scale_head_stride,
    heads, kv_heads, query_blocks, eps,
    NORM: tl.constexpr, HALF: tl.constexpr, HALF_PADDED: tl.constexpr, REST: tl.constexpr, REST_PADDED: tl.constexpr,
    BLOCK_SIZE: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """BLOCK heads of one token: of the query, or of key and value."""
    HEAD_DIM: tl.constexpr = 2 * HALF + REST
    token = tl.program_id(0).to(tl.int64)
    half = tl.arange(0, HALF_PADDED)
    wait(PDL)
    c = tl.load(cos + token * HALF + half, mask=half < HALF, other=0.0)[None, :]
    s = tl.load(sin + token * HALF + half, mask=half < HALF, other=0.0)[None, :]
    block = tl.program_id(1)
    if block < query_blocks:
        head = block * BLOCK + tl.arange(0, BLOCK)
        first, second, passed = load_heads(
            query + token * query_token_stride, head, heads, query_head_stride, HALF, HALF_PADDED, REST, REST_PADDED
        )
        first, second, passed = rotated(
            first, second, passed, query_norm, c, s, eps, NORM, HALF, HALF_PADDED, REST, REST_PADDED
        )
        store_heads(
            out + token * heads * HEAD_DIM, first, second, passed, head, heads, HEAD_DIM,
            HALF, HALF_PADDED, REST, REST_PADDED,
        )  # fmt: skip
    else:
        head = (block - query_blocks) * BLOCK + tl.arange(0, BLOCK)
        slot = tl.load(slots + token).to(tl.int64)
        # A pool may hold more than 2^31 elements: the block's offset is 64 bits wide, the rest is small.
        to = (slot // BLOCK_SIZE) * cache_block_stride + (slot % BLOCK_SIZE) * cache_token_stride
        at = (slot // BLOCK_SIZE) * scale_block_stride + slot % BLOCK_SIZE + head * scale_head_stride
        first, second, passed = load_heads(
            key + token * key_token_stride, head, kv_heads, key_head_stride, HALF, HALF_PADDED, REST, REST_PADDED
        )
        first, second, passed = rotated(
            first, second, passed, key_norm, c, s, eps, NORM, HALF, HALF_PADDED, REST, REST_PADDED
        )
        write_heads(
            key_cache + to, key_scales, at, first, second, passed, head, kv_heads, cache_head_stride,
            HALF, HALF_PADDED, REST, REST_PADDED,
        )  # fmt: skip
        first, second, passed = load_heads(
            value + token * value_token_stride, head, kv_heads, value_head_stride, HALF, HALF_PADDED, REST, REST_PADDED
        )
        write_heads(
            value_cache + to, value_scales, at, first, second, passed, head, kv_heads, cache_head_stride,
            HALF, HALF_PADDED, REST, REST_PADDED,
        )  # fmt: skip
