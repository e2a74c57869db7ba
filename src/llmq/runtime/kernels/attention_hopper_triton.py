"""Device code of ``attention`` for many queries on Hopper, in the manner of FlashAttention-3 (Shah et al. 2024): one
warp reads, and two groups of four, each with half of the rows of a tile of queries, keep the matrix unit busy.

    reader        keys 0 │ queries │ values 0 │ keys 1 │ values 1 │ …      as far ahead as there is room, by TMA
    matrix unit   │ q·k₀ │           │ q·k₁ │ p₀·v₀ │ q·k₂ │ p₁·v₁ │ …
    half          │      │ softmax 0 │      │ softmax 1    │ softmax 2 …

The halves run at their own pace, so that one has the matrix unit where the other leaves it, and a program takes many
tiles of queries, so that the reader is ahead at the end of each. Tiles of keys are taken in the order of
``attention_triton``. A tile of queries is packed like there, but each KV head's heads are padded to a power of two,
as a copy by TMA is:

    half of a tile of queries    row m  =  query m // GROUP_PADDED, head m % GROUP_PADDED of the KV head
    tile of keys or of values    [head_dim / 64, TILE, 64]; a piece, tokens of one page × 64 channels, is one copy

Triton waits for each product, so that this is Gluon; see ``wna16_hopper_triton``.
"""

# mypy: disable-error-code="untyped-decorator, no-untyped-def, no-untyped-call"

import math

import triton
import triton.language as tl
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from llmq.runtime.kernels import is_hopper, multiprocessors
from llmq.runtime.kernels.pdl_triton import wait

BLOCK_M = 128  # packed queries in a tile, 64 for each half
TILE = 128  # keys in a tile
STAGES = 2  # tiles of keys, and as many of values, in shared memory
QUERIES = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=4)
PAGES = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)

# The two numbers as they are; what they come from is done before what follows, as the mask of all lanes takes them in.
SETTLE = gl.constexpr("""{
    .reg .b32 mask;
    activemask.b32 mask;
    or.b32 mask, mask, $2;
    or.b32 mask, mask, $3;
    bar.warp.sync mask;
    mov.b32 $0, $2;
    mov.b32 $1, $3;
}""")


def takes(query: Tensor, key_cache: Tensor, value_cache: Tensor) -> bool:
    """Whether ``attend_hopper`` has a kernel for such queries over such a cache."""
    group = query.shape[1] // key_cache.shape[2]
    return (
        is_hopper(query.device)
        and query.shape[2] == 128  # for heads of 64 the kernel of every GPU is as fast
        and query.element_size() == 2
        and query.dtype == key_cache.dtype
        and group <= BLOCK_M // 2
        and 4 * group > 3 * triton.next_power_of_2(group)  # with more padding, too
        and key_cache.shape[1] % 16 == 0
        and query.stride(0) % 8 == query.data_ptr() % 16 == 0  # or else there is no descriptor of it
        and key_cache.is_contiguous()
        and value_cache.is_contiguous()
    )


def attend_hopper(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    block_tables: Tensor,
    query_starts: Tensor,
    kv_lengths: Tensor,
    out: Tensor,
    *,
    few_queries: int,
    scale: float,
) -> None:
    """Write into ``out`` the causal attention of the rows with more than ``few_queries`` queries, as
    ``paged_attention`` defines it for what this ``takes``; ``scale`` takes a score to units of log 2."""
    tokens, heads, head_dim = query.shape
    block_size, kv_heads = key_cache.shape[1:3]
    group = heads // kv_heads
    group_padded = triton.next_power_of_2(group)
    queries = TensorDescriptor.from_tensor(
        query.unflatten(1, (kv_heads, group)), [64 // group_padded, 1, group_padded, 64], QUERIES
    )
    piece = math.gcd(block_size, TILE)
    pages = [
        TensorDescriptor.from_tensor(cache.view(-1, kv_heads * head_dim), [piece, 64], PAGES)
        for cache in (key_cache, value_cache)
    ]
    rows = len(kv_lengths)
    tiles = (tokens // (BLOCK_M // group_padded) + rows) * kv_heads
    programs = min(tiles, multiprocessors(query.device))
    attention_hopper_kernel[programs,](
        queries, *pages, block_tables, query_starts, kv_lengths, out, block_tables.stride(0), rows, tiles,
        triton.cdiv(tiles, programs), few_queries, scale,
        KV_HEADS=kv_heads, GROUP=group, GROUP_PADDED=group_padded, HEAD_DIM=head_dim, BLOCK_SIZE=block_size,
        PIECE=piece, BLOCK_M=BLOCK_M, TILE=TILE, STAGES=STAGES, num_warps=4, launch_pdl=True,
    )  # fmt: skip


@gluon.jit
def locate(turn, batch, BLOCK_Q: gl.constexpr):
    """Of a program's tile of queries number ``turn``: the KV head, the row, the row's first token, its queries, the
    first of them in the tile, its keys, and how many of them some query of the tile sees: none, if the tile is empty.

    Tiles are dealt to the programs forth and back, the longest contexts, at the end of a prompt, first.
    """
    query_starts, kv_lengths, rows, tiles, _turns, few_queries, KV_HEADS = batch
    programs = gl.num_programs(0)
    place = gl.where(turn % 2 == 0, gl.program_id(0), programs - 1 - gl.program_id(0))
    number = tiles - 1 - turn * programs - place
    tile = number // KV_HEADS
    # Row r owns the tiles from query_starts[r] // BLOCK_Q + r on: at least as many as it needs.
    LANES: gl.constexpr = gl.BlockedLayout([4], [32], [gl.num_warps()], [0])
    row = -1
    for start in range(0, rows, 128):
        other = start + gl.arange(0, 128, layout=LANES)
        begins = gl.load(query_starts + other, mask=other < rows, other=0) // BLOCK_Q + other
        row += gl.sum(((other < rows) & (begins <= tile)).to(gl.int32), 0)
    row = gl.maximum(row, 0)
    query_start = gl.load(query_starts + row)
    queries = gl.load(query_starts + row + 1) - query_start
    kv_length = gl.load(kv_lengths + row)
    first_query = (tile - query_start // BLOCK_Q - row) * BLOCK_Q
    is_tile = (number >= 0) & (queries > few_queries) & (first_query < queries)
    seen = kv_length - queries + gl.minimum(first_query + BLOCK_Q, queries)
    return number % KV_HEADS, row, query_start, queries, first_query, kv_length, gl.where(is_tile, seen, 0)


@gluon.jit
def read(
    batch, at_query, at_keys, at_values, q, keys, values, block_tables, table_stride,
    BLOCK_Q: gl.constexpr, BLOCK_SIZE: gl.constexpr, HEAD_DIM: gl.constexpr, TILE: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """The reader: all tiles of queries, keys and values, one after the other, each into the next free place."""
    q_parts, q_ready, q_free = q
    PARTS: gl.constexpr = HEAD_DIM // 64
    taken, step = 0, 0
    for turn in range(batch[4]):
        kv_head, row, query_start, _queries, first_query, kv_length, seen = locate(turn, batch, BLOCK_Q)
        table = block_tables + row * table_stride
        for start in range(0, seen, TILE):
            slot, phase = step % STAGES, step // STAGES & 1
            read_tile(at_keys, keys, table, start, kv_length, kv_head, slot, phase, BLOCK_SIZE, HEAD_DIM, TILE)
            if start == 0:
                mbarrier.wait(q_free, taken & 1 ^ 1)
                mbarrier.expect(q_ready, 2 * 64 * HEAD_DIM * 2)
                for part in gl.static_range(2 * PARTS):
                    token = query_start + first_query + part // PARTS * (BLOCK_Q // 2)
                    tma.async_copy_global_to_shared(
                        at_query, [token, kv_head, 0, part % PARTS * 64], q_ready, q_parts.index(part)
                    )
                taken += 1
            read_tile(at_values, values, table, start, kv_length, kv_head, slot, phase, BLOCK_SIZE, HEAD_DIM, TILE)
            step += 1


@gluon.jit
def read_tile(
    at_cache, tiles, table, start, kv_length, kv_head, slot, phase,
    BLOCK_SIZE: gl.constexpr, HEAD_DIM: gl.constexpr, TILE: gl.constexpr,
):  # fmt: skip
    """Start the copies of the positions from ``start`` on, when their place is free; page 0 past the row's end."""
    pieces, ready, free = tiles
    PIECE: gl.constexpr = at_cache.block_type.shape[0]
    PIECES: gl.constexpr = TILE // PIECE
    mbarrier.wait(free.index(slot), phase ^ 1)
    mbarrier.expect(ready.index(slot), TILE * HEAD_DIM * 2)
    for piece in gl.static_range(PIECES):
        position = start + piece * PIECE
        page = gl.load(table + position // BLOCK_SIZE, mask=position < kv_length, other=0)
        token = page * BLOCK_SIZE + position % BLOCK_SIZE
        for part in gl.static_range(HEAD_DIM // 64):
            tma.async_copy_global_to_shared(
                at_cache, [token, kv_head * HEAD_DIM + part * 64], ready.index(slot),
                pieces.index((slot * (HEAD_DIM // 64) + part) * PIECES + piece),
            )  # fmt: skip


@gluon.jit
def attend_half(
    batch, q, keys, values, value_pieces, out, scale,
    HALF: gl.constexpr, GROUP: gl.constexpr, GROUP_PADDED: gl.constexpr, BLOCK_Q: gl.constexpr,
):  # fmt: skip
    """One half of the rows of all tiles of queries of the program: the product of the next keys is under way before
    that of the values at hand, and both are while the softmax is taken."""
    q_halves, q_ready, q_free = q
    _starts, _lengths, _rows, _tiles, turns, _few, KV_HEADS = batch
    key_tiles, keys_ready, keys_free = keys
    _value_tiles, _values_ready, values_free = values
    TYPE: gl.constexpr = q_halves.dtype
    STAGES: gl.constexpr = key_tiles.shape[0]
    TILE: gl.constexpr = key_tiles.shape[1]
    HEAD_DIM: gl.constexpr = key_tiles.shape[2]
    SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, TILE, 16])
    MEANS: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, HEAD_DIM, 16])
    ROW: gl.constexpr = gl.SliceLayout(1, SCORES)
    here = q_halves.index(HALF)
    nothing = gl.zeros([64, TILE], gl.float32, layout=SCORES)
    taken, step = 0, 0
    for turn in range(turns):
        kv_head, _row, query_start, queries, first_query, kv_length, seen = locate(turn, batch, BLOCK_Q)
        if seen > 0:
            first_query += HALF * (BLOCK_Q // 2)
            first_position = kv_length - queries + first_query
            position = first_position + gl.arange(0, 64, layout=ROW) // GROUP_PADDED
            # Every query of the half sees all keys before last_full.
            last_full = (first_position + 1) // TILE * TILE
            mbarrier.wait(q_ready, taken & 1)
            slot = step % STAGES
            mbarrier.wait(keys_ready.index(slot), step // STAGES & 1)
            scores = warpgroup_mma(here, key_tiles.index(slot).permute((1, 0)), nothing, use_acc=False, is_async=True)
            scores = warpgroup_mma_wait(0, [scores])
            mbarrier.arrive(keys_free.index(slot))
            if last_full == 0:
                scores = masked(scores, 0, position, TILE)
            best = gl.max(scores, 1) * scale
            exact = gl.exp2(scores * scale - best[:, None])
            total = gl.sum(exact, 1)
            weights = gl.convert_layout(exact.to(TYPE), gl.DotOperandLayout(0, MEANS, 2))
            acc = gl.zeros([64, HEAD_DIM], gl.float32, layout=MEANS)
            for start in range(TILE, seen, TILE):
                acc, weights, best, total = attend(
                    acc, weights, best, total, here, nothing, keys, values, step, start, position, scale, last_full
                )
                step += 1
            mbarrier.arrive(q_free)
            taken += 1
            inside = kv_length - (seen - 1) // TILE * TILE
            acc = warpgroup_mma(weights, values_at(values, value_pieces, step, inside), acc, is_async=True)
            acc, weights = warpgroup_mma_wait(0, [acc, weights])
            mbarrier.arrive(values_free.index(step % STAGES))
            step += 1
            store(
                acc, total, out, kv_head, query_start + first_query, queries - first_query,
                KV_HEADS, GROUP, GROUP_PADDED,
            )  # fmt: skip


@gluon.jit
def attend(acc, weights, best, total, q, nothing, keys, values, step, start, position, scale, last_full):
    """Take tile ``step`` of the values into the sum, with the weights at hand, and the next tile of the keys, from
    position ``start`` on, into the running softmax; see ``attend`` of ``attention_triton``."""
    key_tiles, keys_ready, keys_free = keys
    value_tiles, values_ready, values_free = values
    STAGES: gl.constexpr = key_tiles.shape[0]
    TILE: gl.constexpr = key_tiles.shape[1]
    slot, next_slot = step % STAGES, (step + 1) % STAGES
    mbarrier.wait(keys_ready.index(next_slot), (step + 1) // STAGES & 1)
    scores = warpgroup_mma(q, key_tiles.index(next_slot).permute((1, 0)), nothing, use_acc=False, is_async=True)
    mbarrier.wait(values_ready.index(slot), step // STAGES & 1)
    acc = warpgroup_mma(weights, value_tiles.index(slot), acc, is_async=True)
    scores = warpgroup_mma_wait(1, [scores])
    mbarrier.arrive(keys_free.index(next_slot))
    if start >= last_full:
        scores = masked(scores, start, position, TILE)
    new_best = gl.maximum(best, gl.max(scores, 1) * scale)
    exact = gl.exp2(scores * scale - new_best[:, None])
    fade = gl.exp2(best - new_best)
    total = total * fade + gl.sum(exact, 1)
    # Or else the assembler waits for the matrix unit first, and takes the exponentials then.
    total = gl.inline_asm_elementwise(SETTLE, "=f,=f,f,f", [total], dtype=gl.float32, is_pure=False, pack=2)
    acc, weights = warpgroup_mma_wait(0, [acc, weights])
    mbarrier.arrive(values_free.index(slot))
    acc = acc * gl.convert_layout(fade, gl.SliceLayout(1, acc.type.layout))[:, None]
    return acc, gl.convert_layout(exact.to(weights.dtype), weights.type.layout), new_best, total


@gluon.jit
def values_at(values, value_pieces, step, inside):
    """Tile ``step`` of the values, when it has been read. Its rows from ``inside`` on are zeroed: past the row's end a
    page holds anything, NaN too, which a weight of zero would not remove from the sum. Both halves of the queries
    write the same."""
    tiles, ready, _free = values
    STAGES: gl.constexpr = tiles.shape[0]
    TILE: gl.constexpr = tiles.shape[1]
    PARTS: gl.constexpr = tiles.shape[2] // 64
    PIECE: gl.constexpr = value_pieces.shape[1]
    LAYOUT: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
    slot = step % STAGES
    mbarrier.wait(ready.index(slot), step // STAGES & 1)
    if inside < TILE:
        token = gl.arange(0, PIECE, layout=gl.SliceLayout(1, LAYOUT))
        for piece in range(inside // PIECE, TILE // PIECE):
            for part in gl.static_range(PARTS):
                there = value_pieces.index((slot * PARTS + part) * (TILE // PIECE) + piece)
                there.store(gl.where((piece * PIECE + token < inside)[:, None], there.load(LAYOUT), 0.0))
        fence_async_shared()
        tl.debug_barrier()
    return tiles.index(slot)


@gluon.jit
def store(
    acc, total, out, kv_head, first_token, queries,
    KV_HEADS: gl.constexpr, GROUP: gl.constexpr, GROUP_PADDED: gl.constexpr,
):  # fmt: skip
    """Write the mean that acc / total is, of 64 packed rows from ``first_token`` on, ``queries`` of them at most."""
    HEAD_DIM: gl.constexpr = acc.shape[1]
    STORED: gl.constexpr = gl.BlockedLayout([1, 8], [256 // HEAD_DIM, HEAD_DIM // 8], [4, 1], [1, 0])
    mean = acc * gl.convert_layout(1 / total, gl.SliceLayout(1, acc.type.layout))[:, None]
    m = gl.arange(0, 64, layout=gl.SliceLayout(1, STORED))
    dim = gl.arange(0, HEAD_DIM, layout=gl.SliceLayout(0, STORED))
    at = ((first_token + m // GROUP_PADDED) * KV_HEADS + kv_head) * GROUP + m % GROUP_PADDED
    is_query = (m // GROUP_PADDED < queries) & (m % GROUP_PADDED < GROUP)
    mean = gl.convert_layout(mean.to(out.dtype.element_ty), STORED)
    gl.store(out + at.to(gl.int64)[:, None] * HEAD_DIM + dim[None, :], mean, mask=is_query[:, None])


@gluon.jit
def masked(scores, start, position, TILE: gl.constexpr):
    """``scores`` with −inf for the keys that a query does not see."""
    key = gl.arange(0, TILE, layout=gl.SliceLayout(0, scores.type.layout))
    return gl.where(key[None, :] <= (position - start)[:, None], scores, float("-inf"))


@gluon.jit
def ring(COUNT: gl.constexpr, READERS: gl.constexpr):
    """COUNT pairs of barriers: of a place that has been filled, and of one that READERS have done with."""
    ready = gl.allocate_shared_memory(gl.int64, [COUNT, 1], mbarrier.MBarrierLayout())
    free = gl.allocate_shared_memory(gl.int64, [COUNT, 1], mbarrier.MBarrierLayout())
    for place in gl.static_range(COUNT):
        mbarrier.init(ready.index(place), count=1)
        mbarrier.init(free.index(place), count=READERS)
    return ready, free


@gluon.jit(do_not_specialize=["rows", "tiles", "turns", "few_queries"])
def attention_hopper_kernel(
    at_query, at_keys, at_values, block_tables, query_starts, kv_lengths, out, table_stride, rows, tiles, turns,
    few_queries, scale,
    KV_HEADS: gl.constexpr, GROUP: gl.constexpr, GROUP_PADDED: gl.constexpr, HEAD_DIM: gl.constexpr,
    BLOCK_SIZE: gl.constexpr, PIECE: gl.constexpr, BLOCK_M: gl.constexpr, TILE: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """A share of the tiles of queries. There are descriptors of the queries [tokens, KV heads, GROUP, HEAD_DIM] and of
    the caches [blocks · BLOCK_SIZE, KV heads · HEAD_DIM]."""
    TYPE: gl.constexpr = at_keys.dtype
    LAYOUT: gl.constexpr = at_keys.layout
    BLOCK_Q: gl.constexpr = BLOCK_M // GROUP_PADDED
    PARTS: gl.constexpr = HEAD_DIM // 64
    PIECES: gl.constexpr = STAGES * PARTS * TILE // PIECE
    q_parts = gl.allocate_shared_memory(
        TYPE, [2 * PARTS, 64 // GROUP_PADDED, 1, GROUP_PADDED, 64], at_query.layout
    )  # fmt: skip
    key_pieces = gl.allocate_shared_memory(TYPE, [PIECES, PIECE, 64], LAYOUT)
    value_pieces = gl.allocate_shared_memory(TYPE, [PIECES, PIECE, 64], LAYOUT)
    q_ready, q_free = ring(1, 2)
    keys_ready, keys_free = ring(STAGES, 2)
    values_ready, values_free = ring(STAGES, 2)
    fence_async_shared()
    wait(True)
    batch = (query_starts, kv_lengths, rows, tiles, turns, few_queries, KV_HEADS)
    q = (q_parts._reinterpret(TYPE, [2, 64, HEAD_DIM], LAYOUT), q_ready.index(0), q_free.index(0))
    keys = (key_pieces._reinterpret(TYPE, [STAGES, TILE, HEAD_DIM], LAYOUT), keys_ready, keys_free)
    values = (value_pieces._reinterpret(TYPE, [STAGES, TILE, HEAD_DIM], LAYOUT), values_ready, values_free)
    gl.warp_specialize(
        [
            (attend_half, (
                batch, q, keys, values, value_pieces, out, scale, 0, GROUP, GROUP_PADDED, BLOCK_Q,
            )),
            (attend_half, (
                batch, q, keys, values, value_pieces, out, scale, 1, GROUP, GROUP_PADDED, BLOCK_Q,
            )),
            (read, (
                batch, at_query, at_keys, at_values, (q_parts, q[1], q[2]), (key_pieces, keys_ready, keys_free),
                (value_pieces, values_ready, values_free), block_tables, table_stride,
                BLOCK_Q, BLOCK_SIZE, HEAD_DIM, TILE, STAGES,
            )),
        ],
        [4, 1],  # warps of the other half, and of the reader
        [232, 40],  # their registers; the first half has what is left, 232 again
    )  # fmt: skip
