"""Device code of ``rope``."""

# mypy: disable-error-code="untyped-decorator, no-untyped-def, no-untyped-call"

import torch
import triton
import triton.language as tl
from torch import Tensor

from llmq.runtime.kernels.kv_write import Scales
from llmq.runtime.kernels.kv_write_triton import scale_strides, store_heads
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
    out = torch.empty(tokens, heads, head_dim, dtype=query.dtype, device=query.device)
    block = 8
    query_blocks = triton.cdiv(heads, block)
    if tokens:
        rope_and_write_kernel[tokens, query_blocks + triton.cdiv(kv_heads, block)](
            query, key, value, cos, sin, *(norms or (None, None)), out, key_cache, value_cache,
            *(scales or (None, None)), slots,
            *query.stride()[:2], *key.stride()[:2], *value.stride()[:2], *key_cache.stride()[:3],
            *scale_strides(scales), heads, kv_heads, query_blocks, eps,
            HALF=cos.shape[-1], HEAD_DIM=head_dim, DIM_PADDED=triton.next_power_of_2(head_dim),
            BLOCK_SIZE=key_cache.shape[1], BLOCK=block, num_warps=2, **pdl(query.device),
        )  # fmt: skip
    return out


@triton.jit
def load_rotation(cos, sin, token, dim, HALF: tl.constexpr):
    """For each channel ``dim``: the one that it turns with, and what the two are multiplied by to be summed."""
    turns = dim < 2 * HALF
    at = token * HALF + dim % HALF
    c = tl.load(cos + at, mask=turns, other=1.0)
    s = tl.load(sin + at, mask=turns, other=0.0)
    return (dim + HALF) % (2 * HALF), c, tl.where(dim < HALF, -s, s)


@triton.jit
def normed(x, inverse, weight):
    """``x`` · ``inverse`` · ``weight``, rounded where the plain computation rounds."""
    normal = (x.to(tl.float32) * inverse).to(weight.dtype).to(tl.float32)
    return (normal * weight.to(tl.float32)).to(x.dtype)


@triton.jit
def turned(x, other, c, s, weight, other_weight, eps, HEAD_DIM: tl.constexpr):
    """Heads ``x`` [n, channels], normed if there is a ``weight``, and rotated; ``other`` are the channels that they
    turn with, ``c`` and ``s`` those of ``load_rotation``."""
    if weight is not None:
        squares = x.to(tl.float32) * x.to(tl.float32)
        inverse = tl.rsqrt(tl.sum(squares, 1) / HEAD_DIM + eps)[:, None]
        x, other = normed(x, inverse, weight), normed(other, inverse, other_weight)
    return (x.to(tl.float32) * c + other.to(tl.float32) * s).to(x.dtype)


@triton.jit
def load_turned(source, is_head, dim, partner, c, s, norm, eps, HEAD_DIM: tl.constexpr):
    """The heads of one token that begin at ``source`` [n], normed if there is a ``norm``, and rotated; zero where there
    are none, and past their channels: [n, channels ``dim``]. ``partner``, ``c`` and ``s`` are of ``load_rotation``."""
    is_channel = dim < HEAD_DIM
    inside = is_head[:, None] & is_channel[None, :]
    x = tl.load(source[:, None] + dim[None, :], mask=inside, other=0.0)
    other = tl.load(source[:, None] + partner[None, :], mask=inside, other=0.0)
    weight = None
    other_weight = None
    if norm is not None:
        weight = tl.load(norm + dim, mask=is_channel, other=0.0)[None, :]
        other_weight = tl.load(norm + partner, mask=is_channel, other=0.0)[None, :]
    return turned(x, other, c[None, :], s[None, :], weight, other_weight, eps, HEAD_DIM)


@triton.jit
def rope_and_write_kernel(
    query, key, value, cos, sin, query_norm, key_norm, out, key_cache, value_cache, key_scales, value_scales, slots,
    query_token_stride, query_head_stride, key_token_stride, key_head_stride, value_token_stride, value_head_stride,
    cache_block_stride, cache_token_stride, cache_head_stride, scale_block_stride, scale_head_stride,
    heads, kv_heads, query_blocks, eps,
    HALF: tl.constexpr, HEAD_DIM: tl.constexpr, DIM_PADDED: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """BLOCK heads of one token: of the query, or of key and value."""
    token = tl.program_id(0).to(tl.int64)
    dim = tl.arange(0, DIM_PADDED)
    is_channel = dim < HEAD_DIM
    wait(PDL)
    partner, c, s = load_rotation(cos, sin, token, dim, HALF)
    block = tl.program_id(1)
    if block < query_blocks:
        head = block * BLOCK + tl.arange(0, BLOCK)
        source = query + token * query_token_stride + head * query_head_stride
        q = load_turned(source, head < heads, dim, partner, c, s, query_norm, eps, HEAD_DIM)
        at_out = (token * heads + head)[:, None] * HEAD_DIM + dim[None, :]
        tl.store(out + at_out, q, mask=(head < heads)[:, None] & is_channel[None, :])
    else:
        head = (block - query_blocks) * BLOCK + tl.arange(0, BLOCK)
        is_head = head < kv_heads
        slot = tl.load(slots + token).to(tl.int64)
        # A pool may hold more than 2^31 elements: the block's offset is 64 bits wide, the rest is small.
        to = (slot // BLOCK_SIZE) * cache_block_stride + (slot % BLOCK_SIZE) * cache_token_stride
        to += head * cache_head_stride
        at = (slot // BLOCK_SIZE) * scale_block_stride + slot % BLOCK_SIZE + head * scale_head_stride
        source = key + token * key_token_stride + head * key_head_stride
        k = load_turned(source, is_head, dim, partner, c, s, key_norm, eps, HEAD_DIM)
        store_heads(k, key_cache + to, dim, key_scales, at, is_head, is_channel)
        source = value + token * value_token_stride + head * value_head_stride
        v = tl.load(source[:, None] + dim[None, :], mask=is_head[:, None] & is_channel[None, :], other=0.0)
        store_heads(v, value_cache + to, dim, value_scales, at, is_head, is_channel)
