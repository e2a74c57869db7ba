"""Device code of ``attention``.

The heads that share a KV head are packed into one tile of queries, so that K and V are read once for all of them:

    tile of queries   row m  =  query m // group, head m % group of the KV head        [BLOCK_M, head_dim]
    tile of keys      TILE consecutive positions of one row                            [TILE, head_dim]

One loop over tiles of keys serves two grids, because the two kinds of row are short of different things:

    few queries (decode)     short of parallel work: a program takes one split of the row's positions, and writes its
                             softmax-weighted mean and its log-sum-exp in fp32; merge_kernel joins the splits in order

        positions   | split 0 | split 1 | split 2 … |         split boundaries are multiples of the split length

                             the longest row and the grid decide on that length, on the device: a CUDA graph has one
                             grid for all lengths up to a bound, and its programs share out what there is

                             of few rows with one query each, a program norms and rotates it, too, with keys and
                             values of earlier tokens on their way already; the one whose split has the row's last
                             position also writes that token, and begins with it: none reads what another one writes

    many queries (prefill)   short of arithmetic: a program takes one big tile of queries and all their positions,
                             and leaves the mask out where every query of the tile sees every key
                             (on Hopper, without windows and the like: ``attention_hopper_triton``)

Keys and values of 8 bits become fp16 in registers. The matrix instruction takes a value's channel from two tokens at
once, which no load brings together byte by byte. In wide heads, two channels at a time, one does:

    token t       … c1 c0 …     }  a register of        ┌ c0 of t, c0 of t + 1  →  one product for the even channels
    token t + 1   … c1 c0 …     }  c1 c0 | c1 c0   →    └ c1 of t, c1 of t + 1  →  one for the odd

A scale of the layer goes into that of the scores, and into the sum at the end; those of tokens multiply the scores and
the weights.
"""

# ruff: noqa: SIM102, SIM108 (an `if` on a constexpr is decided when the kernel is compiled)
# mypy: disable-error-code="untyped-decorator, no-untyped-def, no-untyped-call"

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from llmq.runtime.kernels import attention_hopper_triton
from llmq.runtime.kernels.attention import Fresh
from llmq.runtime.kernels.kv_write import Scales
from llmq.runtime.kernels.kv_write_triton import scale_strides
from llmq.runtime.kernels.pdl_triton import pdl, wait
from llmq.runtime.kernels.quantize_rows_triton import INTERPRETED
from llmq.runtime.kernels.rope_triton import load_rotation, rope_and_write_triton, turned

SHORTEST_SPLIT = 96  # positions; joining more splits takes longer than reading so few side by side saves
LONGEST_SPLIT = 2048  # so that one long row among short ones does not keep the rest waiting
PROGRAMS = 256  # with two on a multiprocessor an H200 is busy, and none waits for a second turn
LOG2_E = math.log2(math.e)
VALUE_SCALE = tl.constexpr(1024.0)
"""What int8 values are taken times, so that a weight times a value's scale is a normal number of fp16 for values whose
largest is anywhere from 1e-3 to 8,000."""


# In one register two pairs of codes, of two tokens and two channels; out, for each channel, the numbers of both tokens,
# as the matrix instruction wants them.
UNPAIR_E4M3 = tl.constexpr("""{
    .reg .b32 codes;
    .reg .b16 first, second;
    prmt.b32 codes, $2, 0, 0x3120;
    mov.b32 {first, second}, codes;
    cvt.rn.f16x2.e4m3x2 $0, first;
    cvt.rn.f16x2.e4m3x2 $1, second;
}""")
# 0x64 in the upper byte of a number of fp16 makes it 1024 + the lower byte.
UNPAIR_INT8 = tl.constexpr("""{
    .reg .b32 codes, first, second, zero;
    xor.b32 codes, $2, 0x80808080;
    prmt.b32 first, codes, 0x64646464, 0x4240;
    prmt.b32 second, codes, 0x64646464, 0x4341;
    mov.b32 zero, 0x64806480;
    sub.f16x2 $0, first, zero;
    sub.f16x2 $1, second, zero;
}""")
WIDEN_INT8 = tl.constexpr(UNPAIR_INT8.value.replace("0x4240", "0x4140").replace("0x4341", "0x4342"))


class Launch(NamedTuple):
    """What a grid's programs take; found by measuring on an H200."""

    block_m: int  # packed queries in a program's tile
    tile: int  # keys in a tile
    warps: int
    stages: int


def writes_tokens(tiles: int, head_dim: int, cache: torch.dtype) -> bool:
    """Whether the programs of a decode grid, of ``tiles`` (rows × KV heads), take over what ``rope_and_write`` does: it
    is faster where all of them run at once. Measured over 16 bits and heads of 128."""
    return tiles <= PROGRAMS and 64 < head_dim <= 128 and cache.itemsize == 2


def decode_launch(group: int, head_dim: int, element_size: int, cache: torch.dtype, writes: bool) -> Launch:
    """For the grid of rows with few queries; ``element_size``: bytes of an element of the query. ``writes``: as
    ``writes_tokens`` says."""
    block_m = max(16, triton.next_power_of_2(group + 2))  # with a row for its key, and one for its value
    if element_size == 4:
        return Launch(block_m, 16, 4, 1)
    if head_dim > 128:
        return Launch(block_m, 64, 4, 2)
    if writes:
        # At 32 rows the half of a layer of Qwen3 0.6B that has attention takes 50 µs so, as below 61.
        return Launch(block_m, 64, 4, 3)
    # A bigger tile of queries does not fit into the registers of two warps.
    if head_dim > 64 and block_m <= 32:
        if cache == torch.int8:
            return Launch(block_m, 64, 2, 3)
        if cache.itemsize == 2:
            return Launch(block_m, 32, 2, 4)
    return Launch(block_m, 64, 4, 3)


def prefill_launch(group: int, head_dim: int, element_size: int) -> Launch:
    """For the grid of rows with many queries."""
    if element_size == 4:
        return Launch(max(32, triton.next_power_of_2(group)), 16, 8, 1)
    if head_dim > 128:
        return Launch(128, 32, 8, 3)
    return Launch(128, 64, 8, 3)


def in_pairs(head_dim: int, is_decode: bool) -> bool:
    """Whether values of 8 bits are taken two channels at a time. In a prefill over heads of 64 the assembler of
    CUDA 12.8 overwrites the address of the odd channels: their product then read past the end of shared memory."""
    return head_dim >= 64 if is_decode else head_dim > 64


def splits_for(tiles: int, span: int) -> int:
    """Splits of a row that sees ``span`` positions: enough to fill the device, of ``tiles`` (rows × KV heads)."""
    wanted = max(triton.cdiv(PROGRAMS, max(tiles, 1)), triton.cdiv(span, LONGEST_SPLIT))
    return int(max(1, min(wanted, triton.cdiv(span, SHORTEST_SPLIT))))


def paged_attention_triton(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    block_tables: Tensor,
    query_starts: Tensor,
    kv_lengths: Tensor,
    *,
    window: int | None,
    max_query_length: int,
    max_kv_length: int,
    min_query_length: int = 0,
    scale: float | None = None,
    softcap: float | None = None,
    longest: Tensor | None = None,
    order: Tensor | None = None,
    split: int | None = None,
    batch_invariant: bool = False,
    scales: Scales | None = None,
    fresh: Fresh | None = None,
) -> Tensor:
    """``paged_attention`` through Triton."""
    tokens, heads, head_dim = query.shape
    rows = kv_lengths.shape[0]
    block_size, kv_heads = key_cache.shape[1], key_cache.shape[2]
    if key_cache.stride() != value_cache.stride() or key_cache.stride(3) != 1 or query.stride(2) != 1:
        raise ValueError("the caches must have the same strides; all must be contiguous in head_dim")
    group = heads // kv_heads
    writes = writes_tokens(rows * kv_heads, head_dim, key_cache.dtype)
    decode = decode_launch(group, head_dim, query.element_size(), key_cache.dtype, writes)
    prefill = prefill_launch(group, head_dim, query.element_size())
    out = torch.empty(tokens, heads, head_dim, dtype=query.dtype, device=query.device)

    # Rows of up to few_queries go to the decode grid, the others to the prefill grid, which alone treats a query the
    # same way whatever other queries are in the step.
    few_queries = min(decode.block_m // group, max_query_length)
    if batch_invariant or min_query_length > few_queries:
        few_queries = 0
    span = max_kv_length if window is None else min(max_kv_length, window + few_queries - 1)
    shared = splits_for(rows * kv_heads, span) if split is None else triton.cdiv(span, split)
    # A window may begin in the middle of a split.
    splits = shared + (window is not None)
    shape = (rows, few_queries, heads, splits)
    means = torch.empty(*shape, head_dim, dtype=torch.float32, device=query.device)
    logsums = torch.empty(*shape, dtype=torch.float32, device=query.device)
    scale = 1 / math.sqrt(head_dim) if scale is None else scale
    cap_scale = 0.0 if softcap is None else 2 * LOG2_E * scale / softcap

    of_fresh: tuple[Tensor | int | float | None, ...] = (*(None,) * 7, *(0,) * 4, 0.0)
    if fresh is not None:
        key, value, (cos, sin), slots, norms, eps = fresh
        if writes and max_query_length == 1 and not batch_invariant:
            if key.stride(2) != 1 or value.stride(2) != 1:
                raise ValueError("keys and values must be contiguous in head_dim")
            of_fresh = (key, value, cos.contiguous(), sin.contiguous(), *(norms or (None, None)), slots,
                        *key.stride()[:2], *value.stride()[:2], eps)  # fmt: skip
        else:
            query = rope_and_write_triton(
                query, key, value, (cos, sin), key_cache, value_cache, slots, norms=norms, eps=eps, scales=scales
            )
            fresh = None

    def attend_rows(launch: Launch, tiles: int, grid_rows: int, is_decode: bool) -> None:
        attention_kernel[tiles, kv_heads, grid_rows](
            query, *of_fresh, key_cache, value_cache, *(scales or (None, None)), block_tables, query_starts,
            kv_lengths, longest, order, out, means, logsums,
            *query.stride()[:2], *key_cache.stride()[:3], *scale_strides(scales), block_tables.stride(0), out.stride(0),
            heads, rows, few_queries, splits, shared, span, split or 0, window or 0,
            LOG2_E * (softcap or scale), cap_scale,
            HALF=0 if fresh is None else fresh.rotation[0].shape[-1],
            GROUP=group, HEAD_DIM=head_dim, DIM_PADDED=max(16, triton.next_power_of_2(head_dim)),
            BLOCK_SIZE=block_size, PAIRED=scales is not None and in_pairs(head_dim, is_decode),
            WINDOWED=window is not None, CAPPED=softcap is not None, DECODE=is_decode,
            BLOCK_M=launch.block_m, TILE=launch.tile, num_warps=launch.warps, num_stages=launch.stages,
            **pdl(query.device),
        )  # fmt: skip

    if few_queries:
        attend_rows(decode, splits, rows, True)
    if max_query_length > few_queries:
        plain = window is None and softcap is None and not batch_invariant
        if plain and attention_hopper_triton.takes(query, key_cache, value_cache):
            attention_hopper_triton.attend_hopper(
                query, key_cache, value_cache, block_tables, query_starts, kv_lengths, out,
                few_queries=few_queries, scale=LOG2_E * scale,
            )  # fmt: skip
        else:
            attend_rows(prefill, tokens // (prefill.block_m // group) + rows, 1, False)
    if few_queries and splits > 1:
        merge_kernel[rows * few_queries, heads](
            means, logsums, out, query_starts, kv_lengths, longest, out.stride(0), few_queries, splits, shared, span,
            split or 0, window or 0,
            HEAD_DIM=head_dim, DIM_PADDED=triton.next_power_of_2(head_dim), WINDOWED=window is not None,
            TILE=decode.tile, CHUNK=8 if splits <= 8 else 32, num_warps=2 if splits <= 8 else 4, **pdl(query.device),
        )  # fmt: skip
    return out


@triton.jit
def split_length(longest, shared, span, split, TILE: tl.constexpr):
    """Positions in a split, a multiple of TILE: ``split`` if it is given, or what ``shared`` programs take of the
    longest row, or of the ``span`` that a window lets it see."""
    if split == 0:
        if longest is not None:
            span = tl.minimum(span, tl.load(longest))
        split = tl.maximum(tl.cdiv(tl.cdiv(span, shared), TILE), 1) * TILE
    return split


@triton.jit
def first_seen(kv_length, queries, window, WINDOWED: tl.constexpr):
    """The first position that the first of a row's last ``queries`` queries sees."""
    if WINDOWED:
        first = tl.maximum(kv_length - queries - window + 1, 0)
    else:
        first = 0
    return first


@triton.jit(do_not_specialize=["rows", "few_queries", "splits", "shared", "span", "split", "window"])
def attention_kernel(
    query, key, value, cos, sin, query_norm, key_norm, slots, key_token_stride, key_head_stride, value_token_stride,
    value_head_stride, eps, key_cache, value_cache, key_scales, value_scales, block_tables, query_starts, kv_lengths,
    longest, order, out, means, logsums,
    query_token_stride, query_head_stride, cache_block_stride, cache_token_stride, cache_head_stride,
    scale_block_stride, scale_head_stride, table_stride, out_token_stride, heads, rows, few_queries, splits, shared,
    span, split, window, scale, cap_scale,
    HALF: tl.constexpr, GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, DIM_PADDED: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    PAIRED: tl.constexpr, WINDOWED: tl.constexpr, CAPPED: tl.constexpr, DECODE: tl.constexpr, BLOCK_M: tl.constexpr,
    TILE: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One tile of queries of one KV head, over one split of the row's positions (DECODE) or all of them."""
    BLOCK_Q: tl.constexpr = BLOCK_M // GROUP  # queries in a tile
    kv_head = tl.program_id(1)
    if DECODE:
        row = tl.program_id(2)
        if order is not None:
            row = tl.load(order + row)
        first_query = 0
    else:
        # Row r owns the tiles from query_starts[r] // BLOCK_Q + r on: at least as many as it needs. The longest
        # contexts, at the end of a prompt, start first. The row is searched among 128 at once: halving waits each time.
        tile = tl.num_programs(0) - 1 - tl.program_id(0)
        row = -1
        for start in range(0, rows, 128):
            other = start + tl.arange(0, 128)
            begins = tl.load(query_starts + other, mask=other < rows, other=0) // BLOCK_Q + other
            row += tl.sum(((other < rows) & (begins <= tile)).to(tl.int32), 0)
        first_query = (tile - tl.load(query_starts + row) // BLOCK_Q - row) * BLOCK_Q
    query_start = tl.load(query_starts + row)
    queries = tl.load(query_starts + row + 1) - query_start
    kv_length = tl.load(kv_lengths + row)
    if DECODE:
        split = split_length(longest, shared, span, split, TILE)
    if key is None:
        wait(PDL)
    if DECODE:
        if (queries == 0) | (queries > few_queries):
            return
    else:
        if (queries <= few_queries) | (first_query >= queries):
            return

    m = tl.arange(0, BLOCK_M)
    dim = tl.arange(0, DIM_PADDED)
    query_index = first_query + m // GROUP
    head = kv_head * GROUP + m % GROUP
    is_query = (query_index < queries) & (m < BLOCK_Q * GROUP)
    position = kv_length - queries + query_index
    first_token = (query_start + first_query).to(tl.int64)
    is_channel = dim < HEAD_DIM
    stored = is_query[:, None] & is_channel[None, :]
    at_query = query + first_token * query_token_stride + m // GROUP * query_token_stride
    at_query += head * query_head_stride
    if key is None:
        q = tl.load(at_query[:, None] + dim[None, :], mask=stored, other=0.0)
    else:
        q = tl.zeros([BLOCK_M, DIM_PADDED], dtype=query.dtype.element_ty)

    if key_scales is not None:
        if q.dtype == tl.bfloat16:
            q = q.to(tl.float16)  # what codes of 8 bits become in the fewest instructions
        if key_cache.dtype.element_ty == tl.int8:
            key_scales += kv_head * scale_head_stride
            value_scales += kv_head * scale_head_stride
        else:
            layer_scale = tl.load(key_scales)
            if CAPPED:
                cap_scale *= layer_scale
            else:
                scale *= layer_scale

    # Keys [first, last) are seen by some query of the tile; [first_full, last_full) by all of them.
    last_query = tl.minimum(first_query + BLOCK_Q, queries) - 1
    last = kv_length - queries + last_query + 1
    first = first_seen(kv_length, queries - first_query, window, WINDOWED)
    if DECODE:
        own = first // split + tl.program_id(0)
        row_splits = tl.maximum(tl.cdiv(kv_length, split) - first // split, 1)
        if tl.program_id(0) >= row_splits:
            return
        first = tl.maximum(first, own * split)
        last = tl.minimum(last, (own + 1) * split)
    first = first // TILE * TILE

    if PAIRED:
        acc = tl.zeros([BLOCK_M, DIM_PADDED // 2], dtype=tl.float32)
        acc_odd = tl.zeros([BLOCK_M, DIM_PADDED // 2], dtype=tl.float32)
    else:
        acc = tl.zeros([BLOCK_M, DIM_PADDED], dtype=tl.float32)
        acc_odd = 0.0
    best = tl.full([BLOCK_M], float("-inf"), dtype=tl.float32)
    total = tl.zeros([BLOCK_M], dtype=tl.float32)
    table = block_tables + row.to(tl.int64) * table_stride
    keys = key_cache + kv_head * cache_head_stride
    values = value_cache + kv_head * cache_head_stride
    if key is not None:
        is_last = (first < last) & (last == kv_length)
        last -= is_last.to(tl.int32)
        slot = tl.load(slots + first_token).to(tl.int64)
        at_key = key + first_token * key_token_stride + kv_head * key_head_stride
        at_value = value + first_token * value_token_stride + kv_head * value_head_stride
        brought = (
            tl.where(m < GROUP, at_query, tl.where(m == GROUP, at_key, at_value)),
            cos + first_token * HALF, sin + first_token * HALF, eps, is_last,
            tl.where(m == GROUP, keys, values)
            + (slot // BLOCK_SIZE * cache_block_stride + slot % BLOCK_SIZE * cache_token_stride),
        )  # fmt: skip
    else:
        brought = ()  # type: ignore[assignment]
    if PAIRED:
        values = values.to(tl.pointer_type(tl.int16), bitcast=True)  # two channels each
    if not DECODE:
        first_full = first
        if WINDOWED:
            seen_by_last = tl.maximum(kv_length - queries + last_query - window + 1, 0)
            first_full = tl.minimum(tl.cdiv(seen_by_last, TILE) * TILE, tl.cdiv(last, TILE) * TILE)
            acc, acc_odd, best, total = attend(
                acc, acc_odd, best, total, q, first, tl.minimum(first_full, last), keys, values, key_scales,
                value_scales, table, position, window, scale, cap_scale, cache_block_stride, cache_token_stride,
                scale_block_stride, (), None, None,
                0, GROUP, HEAD_DIM, DIM_PADDED, BLOCK_SIZE, PAIRED, WINDOWED, CAPPED, TILE, True, PDL,
            )  # fmt: skip
        last_full = tl.maximum((kv_length - queries + first_query + 1) // TILE * TILE, first_full)
        acc, acc_odd, best, total = attend(
            acc, acc_odd, best, total, q, first_full, last_full, keys, values, key_scales, value_scales, table,
            position, window, scale, cap_scale, cache_block_stride, cache_token_stride, scale_block_stride, (), None,
            None,
            0, GROUP, HEAD_DIM, DIM_PADDED, BLOCK_SIZE, PAIRED, WINDOWED, CAPPED, TILE, False, PDL,
        )  # fmt: skip
        first = last_full
    acc, acc_odd, best, total = attend(
        acc, acc_odd, best, total, q, first, last, keys, values, key_scales, value_scales, table, position, window,
        scale, cap_scale, cache_block_stride, cache_token_stride, scale_block_stride, brought, query_norm,
        key_norm,
        HALF, GROUP, HEAD_DIM, DIM_PADDED, BLOCK_SIZE, PAIRED, WINDOWED, CAPPED, TILE, True, PDL,
    )  # fmt: skip

    if PAIRED:
        acc = tl.interleave(acc, acc_odd)
    acc = acc / tl.where(total > 0, total, 1.0)[:, None]
    if key_scales is not None:
        if key_cache.dtype.element_ty == tl.int8:
            acc /= VALUE_SCALE
        else:
            acc *= tl.load(value_scales)
    if DECODE:
        if row_splits > 1:
            at = ((row * few_queries + query_index).to(tl.int64) * heads + head) * splits
            at += tl.program_id(0)
            tl.store(means + at[:, None] * HEAD_DIM + dim[None, :], acc, mask=stored)
            tl.store(logsums + at, best + tl.log2(total), mask=is_query)
            return
    at_out = m // GROUP * out_token_stride + head * HEAD_DIM
    out += first_token * out_token_stride
    tl.store(out + at_out[:, None] + dim[None, :], acc.to(out.dtype.element_ty), mask=stored)


@triton.jit
def attend(
    acc, acc_odd, best, total, q, first, last, keys, values, key_scales, value_scales, table, position, window,
    scale, cap_scale, cache_block_stride, cache_token_stride, scale_block_stride, brought,
    query_norm, key_norm,
    HALF: tl.constexpr, GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, DIM_PADDED: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    PAIRED: tl.constexpr, WINDOWED: tl.constexpr, CAPPED: tl.constexpr, TILE: tl.constexpr, MASKED: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """Take the keys [first, last), tile by tile, into the running softmax (acc, best, total) of the queries q.

    acc    the values' sum weighted by 2^(score − best); of 8 bits, that of the even channels, and acc_odd of the odd
    best   the greatest score yet; scores are in units of log 2, so that the exponential is one instruction
    total  the sum of the weights
    scale  takes a product of query and key, or, if CAPPED, its tanh to those units
    brought
           if HALF, what ``enter`` reads the query from: the kernel before is waited for in the first turn of the loop,
           when the first tiles of keys and values are on their way
    """
    step = tl.arange(0, TILE)
    dim = tl.arange(0, DIM_PADDED)[None, :]
    VALUE_DIM: tl.constexpr = HEAD_DIM // 2 if PAIRED else HEAD_DIM
    value_dim = tl.arange(0, DIM_PADDED // 2 if PAIRED else DIM_PADDED)[None, :]
    pages = load_pages(table, first, last, BLOCK_SIZE, TILE)
    stop = last
    if HALF > 0:
        stop = tl.maximum(last, first + 1)
    for start in range(first, stop, TILE):
        key_position = start + step
        inside = (key_position < last)[:, None]
        # The page's place takes 64 bits, what is within it 32: in half the registers, and the same for all tiles.
        if BLOCK_SIZE % TILE == 0:
            place = pages.to(tl.int64) * cache_block_stride + start % BLOCK_SIZE * cache_token_stride
            within = step * cache_token_stride
        else:
            place = (pages.to(tl.int64) * cache_block_stride)[:, None]
            within = key_position % BLOCK_SIZE * cache_token_stride
        at = within[:, None] + dim
        if PAIRED:
            value_place, value_at = place // 2, (within // 2)[:, None] + value_dim
        else:
            value_place, value_at = place, at
        if key_scales is not None:
            if keys.dtype.element_ty == tl.int8:
                scale_at = pages.to(tl.int64) * scale_block_stride + key_position % BLOCK_SIZE
                key_scale = tl.load(key_scales + scale_at, mask=key_position < last, other=0.0)[None, :]
                value_scale = tl.load(value_scales + scale_at, mask=key_position < last, other=0.0)[None, :]
        # One tile ahead, so that no load of keys waits for the load of its address.
        pages = load_pages(table, start + TILE, last, BLOCK_SIZE, TILE)
        # Past the row's end a page holds anything, NaN too, which a weight of zero would not remove from the sum.
        if MASKED:
            if HEAD_DIM == DIM_PADDED:
                k = tl.load(keys + place + at, mask=inside, other=0.0)
                v = tl.load(values + value_place + value_at, mask=inside, other=0.0)
            else:
                k = tl.load(keys + place + at, mask=inside & (dim < HEAD_DIM), other=0.0)
                v = tl.load(values + value_place + value_at, mask=inside & (value_dim < VALUE_DIM), other=0.0)
        else:
            if HEAD_DIM == DIM_PADDED:
                k = tl.load(keys + place + at)
                v = tl.load(values + value_place + value_at)
            else:
                k = tl.load(keys + place + at, mask=dim < HEAD_DIM, other=0.0)
                v = tl.load(values + value_place + value_at, mask=value_dim < VALUE_DIM, other=0.0)
        if HALF > 0:
            if start == first:
                wait(PDL)
                q, acc, best, total = enter(
                    q, acc, best, total, brought, query_norm, key_norm, scale, cap_scale,
                    HALF, GROUP, HEAD_DIM, DIM_PADDED, CAPPED,
                )  # fmt: skip
        scores = tl.dot(q, tl.trans(widened(k, q.dtype, PAIRED)), input_precision="ieee")
        if key_scales is not None:
            if keys.dtype.element_ty == tl.int8:
                scores *= key_scale
        if CAPPED:
            scores = capped(scores, cap_scale)
        if MASKED:
            seen = key_position[None, :] <= tl.minimum(position, last - 1)[:, None]
            if WINDOWED:
                seen &= key_position[None, :] > position[:, None] - window
            scores = tl.where(seen, scores, float("-inf"))
        new_best = tl.maximum(best, tl.max(scores, 1) * scale)
        # A query that has seen nothing yet has no best; any finite number in its place keeps NaN out.
        shift = tl.where(new_best == float("-inf"), 0.0, new_best) if MASKED else new_best
        weights = tl.exp2(scores * scale - shift[:, None])
        fade = tl.exp2(best - shift)
        total = total * fade + tl.sum(weights, 1)
        if key_scales is not None:
            if keys.dtype.element_ty == tl.int8:
                weights *= VALUE_SCALE * value_scale
        weights = weights.to(q.dtype)
        if PAIRED:
            even, odd = unpaired(v, keys, q.dtype)
            acc = tl.dot(weights, even, acc * fade[:, None], input_precision="ieee")
            acc_odd = tl.dot(weights, odd, acc_odd * fade[:, None], input_precision="ieee")
        else:
            acc = tl.dot(weights, v.to(q.dtype), acc * fade[:, None], input_precision="ieee")
        best = new_best
    return acc, acc_odd, best, total


@triton.jit
def enter(
    q, acc, best, total, brought, query_norm, key_norm, scale, cap_scale,
    HALF: tl.constexpr, GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, DIM_PADDED: tl.constexpr, CAPPED: tl.constexpr,
):  # fmt: skip
    """Norm and rotate the one query of a row. In the program that has the row's last position, do so with its key, and
    write it and the value into the cache; they are the first that the softmax takes in.

    row of the tile   | GROUP heads of the query | key | value | zero … |
    """
    at_row, cos, sin, eps, is_last, to_row = brought
    BLOCK_M: tl.constexpr = q.shape[0]
    m, dim = tl.arange(0, BLOCK_M), tl.arange(0, DIM_PADDED)
    is_channel = dim < HEAD_DIM
    inside = (m < GROUP + 2)[:, None] & is_channel[None, :]
    partner, c, s = load_rotation(cos, sin, 0, dim, HALF)
    x = tl.load(at_row[:, None] + dim[None, :], mask=inside, other=0.0)
    other = tl.load(at_row[:, None] + partner[None, :], mask=inside, other=0.0)
    weight = None
    other_weight = None
    if query_norm is not None:
        norm = tl.where(m == GROUP, key_norm, query_norm)[:, None]
        weight = tl.load(norm + dim[None, :], mask=inside, other=0.0)
        other_weight = tl.load(norm + partner[None, :], mask=inside, other=0.0)
    tile = turned(x, other, c[None, :], s[None, :], weight, other_weight, eps, HEAD_DIM)
    tile = tl.where((m == GROUP + 1)[:, None], x, tile)
    is_new = (m >= GROUP) & (m < GROUP + 2) & is_last
    tl.store(to_row[:, None] + dim[None, :], tile, mask=is_new[:, None] & is_channel[None, :])

    column = tl.arange(0, BLOCK_M)[None, :]
    score = tl.sum(tl.where(column == GROUP, tl.dot(tile, tl.trans(tile), input_precision="ieee"), 0.0), 1)
    if CAPPED:
        score = capped(score, cap_scale)
    best = tl.where(is_last, score * scale, best)
    total = tl.where(is_last, 1.0, total)
    weights = tl.where((column == GROUP + 1) & is_last, 1.0, tl.zeros([BLOCK_M, BLOCK_M], q.dtype))
    acc = tl.dot(weights.to(q.dtype), tile, acc, input_precision="ieee")
    return tl.where((m < GROUP)[:, None], tile, 0.0), acc, best, total


@triton.jit
def capped(scores, cap_scale):
    """tanh(x) = 1 − 2 / (1 + e^2x) of the scores, ``cap_scale`` of which are 2x in units of log 2."""
    return 1 - 2 / (1 + tl.exp2(scores * cap_scale))


@triton.jit
def widened(codes, dtype: tl.constexpr, PAIRED: tl.constexpr):
    """``codes`` of the cache as numbers of ``dtype``."""
    if PAIRED and codes.dtype == tl.int8 and dtype == tl.float16 and not INTERPRETED:
        numbers = tl.inline_asm_elementwise(
            WIDEN_INT8, "=r,=r,r", [codes], dtype=tl.float16, is_pure=True, pack=4
        )  # fmt: skip
    else:
        numbers = codes.to(dtype)
    return numbers


@triton.jit
def unpaired(pairs, keys, dtype: tl.constexpr):
    """Two codes side by side in each of ``pairs`` → the numbers of the first and of the second."""
    kind: tl.constexpr = keys.dtype.element_ty
    if INTERPRETED or dtype == tl.float32:
        first = (pairs & 0xFF).to(tl.int8).to(kind, bitcast=True).to(dtype)
        second = (pairs >> 8).to(tl.int8).to(kind, bitcast=True).to(dtype)
        both = (first, second)
    elif kind == tl.int8:
        both = tl.inline_asm_elementwise(
            UNPAIR_INT8, "=r,=r,r", [pairs], dtype=(tl.float16, tl.float16), is_pure=True, pack=2
        )
    else:
        both = tl.inline_asm_elementwise(
            UNPAIR_E4M3, "=r,=r,r", [pairs], dtype=(tl.float16, tl.float16), is_pure=True, pack=2
        )
    return both


@triton.jit
def load_pages(table, start, last, BLOCK_SIZE: tl.constexpr, TILE: tl.constexpr):
    """The pages of the tile at ``start``: one, or one for each position; page 0 from ``last`` on."""
    if BLOCK_SIZE % TILE == 0:
        pages = tl.load(table + start // BLOCK_SIZE, mask=start < last, other=0)
    else:
        position = start + tl.arange(0, TILE)
        pages = tl.load(table + position // BLOCK_SIZE, mask=position < last, other=0)
    return pages


@triton.jit(do_not_specialize=["few_queries", "splits", "shared", "span", "split", "window"])
def merge_kernel(
    means, logsums, out, query_starts, kv_lengths, longest, out_token_stride, few_queries, splits, shared, span, split,
    window,
    HEAD_DIM: tl.constexpr, DIM_PADDED: tl.constexpr, WINDOWED: tl.constexpr, TILE: tl.constexpr, CHUNK: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """Mean of the splits' means, weighted by 2^logsum, CHUNK of them at a time, always in the same order."""
    row = tl.program_id(0) // few_queries
    query_index = tl.program_id(0) % few_queries
    head = tl.program_id(1)
    query_start = tl.load(query_starts + row)
    queries = tl.load(query_starts + row + 1) - query_start
    kv_length = tl.load(kv_lengths + row)
    split = split_length(longest, shared, span, split, TILE)
    row_splits = tl.cdiv(kv_length, split) - first_seen(kv_length, queries, window, WINDOWED) // split
    wait(PDL)
    if (queries > few_queries) | (query_index >= queries) | (row_splits <= 1):
        return
    dim = tl.arange(0, DIM_PADDED)
    at = (tl.program_id(0).to(tl.int64) * tl.num_programs(1) + head) * splits
    acc = tl.zeros([DIM_PADDED], dtype=tl.float32)
    best = float("-inf")
    total = 0.0
    for start in range(0, row_splits, CHUNK):
        part = start + tl.arange(0, CHUNK)
        logsum = tl.load(logsums + at + part, mask=part < row_splits, other=float("-inf"))
        mean = tl.load(
            means + (at + part)[:, None] * HEAD_DIM + dim[None, :],
            mask=(part < row_splits)[:, None] & (dim < HEAD_DIM)[None, :], other=0.0,
        )  # fmt: skip
        new_best = tl.maximum(best, tl.max(logsum, 0))
        # A split may have nothing for an early query of the row: its logsum, and the best so far, are then −inf.
        shift = tl.where(new_best == float("-inf"), 0.0, new_best)
        weights = tl.exp2(logsum - shift)
        fade = tl.exp2(best - shift)
        acc = acc * fade + tl.sum(weights[:, None] * mean, 0)
        total = total * fade + tl.sum(weights, 0)
        best = new_best
    at_out = (query_start + query_index).to(tl.int64) * out_token_stride + head * HEAD_DIM
    tl.store(out + at_out + dim, (acc / total).to(out.dtype.element_ty), mask=dim < HEAD_DIM)
