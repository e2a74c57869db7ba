"""Attention over a paged KV cache: decode, prefill and chunked prefill over a cached prefix, mixed in one call.

query  [tokens, heads, head_dim]      rows of a step laid end to end, never padded
       | row 0 | row 1: a chunk of a prompt | row 2 | …
       0       query_starts[1]              query_starts[2]

cache  [blocks, block_size, kv_heads, head_dim]      of one layer
       key of row r, position p:  key_cache[block_tables[r, p // block_size], p % block_size]

row r, its positions   | in the cache before this step | of this step |
                       0                               kv − queries   kv = kv_lengths[r]
"""

from __future__ import annotations

from collections import defaultdict
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from llmq.runtime.kernels import runs_triton
from llmq.runtime.kernels.kv_write import Scales, read_pages
from llmq.runtime.kernels.rope import rope_and_write_reference

PADDED = 255
"""Keys up to which the reference pads: it takes less time than one more product."""


class Fresh(NamedTuple):
    """What a step's tokens bring, as it is projected; see ``rope_and_write``."""

    key: Tensor
    value: Tensor
    rotation: tuple[Tensor, Tensor]
    slots: Tensor
    norms: tuple[Tensor, Tensor] | None = None
    eps: float = 0.0


def paged_attention(
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
    """Causal attention of each row's queries over the row's pages → [tokens, heads, head_dim].

    query         [tokens, heads, head_dim]
    key_cache     [blocks, block_size, kv_heads, head_dim]; may be a view of a bigger pool, contiguous in head_dim.
    value_cache   This step's keys and values are in it already, but for ``fresh`` ones. In the query's type, or in 8
                  bits with ``scales``
    block_tables  int32 [rows, max blocks of a row]
    query_starts  int32 [rows + 1]; row r's queries are query[query_starts[r]:query_starts[r + 1]]
    kv_lengths    int32 [rows]; tokens of the row in the cache. Its last query is at position kv_length − 1.
                  A row of length 0 is padding: its output is zero
    window        a query at position p sees the keys at (p − window, p]; None: all up to p
    max_query_length, max_kv_length, min_query_length
                  bounds over all rows, known to the host: they set the grids, so that a CUDA graph can replay them
    scale         multiplies the scores; None: 1/√head_dim
    softcap       a score s then becomes softcap · tanh(s / softcap) (Gemma 2); None: it stays as it is
    longest       int32 [1], on the device: the greatest of kv_lengths, where max_kv_length is a loose bound
    order         int32 [rows]: all rows, in the order to start them in. The longest first, no long one is left at last
    split         on a GPU a row's positions are divided among programs, this many to each, a multiple of 64, and the
                  parts joined in order. None: what is fastest for this many rows and these bounds, so that the last
                  bits of a row's result depend on its batch. With a number they do not
    batch_invariant
                a token's result does not depend on how many tokens of its row, or of others, are in the step: one
                program takes all positions of a row, in tiles of one shape
    scales        of keys and of values in 8 bits; see ``write_kv``. The products of a bf16 query are then of fp16
    fresh         what ``rope_and_write`` is to do first, if it has not been called: on a GPU, a pass less where few
                  rows have one query each. The slots are then of their last positions
    """
    inputs = (query, key_cache, value_cache, block_tables, query_starts, kv_lengths)
    if not runs_triton(query):
        return paged_attention_reference(
            *inputs,
            window=window,
            max_query_length=max_query_length,
            max_kv_length=max_kv_length,
            scale=scale,
            softcap=softcap,
            scales=scales,
            fresh=fresh,
        )
    from llmq.runtime.kernels.attention_triton import paged_attention_triton

    return paged_attention_triton(
        *inputs,
        window=window,
        max_query_length=max_query_length,
        max_kv_length=max_kv_length,
        min_query_length=min_query_length,
        scale=scale,
        softcap=softcap,
        longest=longest,
        order=order,
        split=split,
        batch_invariant=batch_invariant,
        scales=scales,
        fresh=fresh,
    )


def paged_attention_reference(
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
    scale: float | None = None,
    softcap: float | None = None,
    scales: Scales | None = None,
    fresh: Fresh | None = None,
) -> Tensor:
    """``paged_attention`` in plain PyTorch.

    Rows with as many queries, and contexts up to PADDED or within a factor of two, are computed together, their pages
    gathered and padded to the longest: all decode rows in a few products, and little padding.
    """
    if fresh is not None:
        key, value, rotation, slots, norms, eps = fresh
        query = rope_and_write_reference(
            query, key, value, rotation, key_cache, value_cache, slots, norms=norms, eps=eps, scales=scales
        )
    starts, lengths = query_starts.tolist(), kv_lengths.tolist()
    groups: dict[tuple[int, int], list[int]] = defaultdict(list)
    for row, length in enumerate(lengths):
        queries = starts[row + 1] - starts[row]
        if queries and length:
            groups[queries, max(length, PADDED).bit_length()].append(row)

    out = torch.zeros_like(query)
    for (queries, _), rows in groups.items():
        index = torch.tensor(rows, device=query.device)
        longest = max(lengths[row] for row in rows)
        blocks = block_tables[index, : -(-longest // key_cache.shape[1])]
        position = torch.arange(longest, device=query.device)
        past_end = position >= kv_lengths[index, None]
        key, value = (
            _gather(cache, scale, blocks, past_end, query.dtype).transpose(1, 2)
            for cache, scale in zip((key_cache, value_cache), scales or (None, None), strict=True)
        )
        step = torch.arange(queries, device=query.device)
        tokens = query_starts[index, None] + step
        seen_to = (kv_lengths[index, None] - queries + step)[:, None, :, None]
        mask = position <= seen_to
        if window is not None:
            mask &= position > seen_to - window
        mixed = dot_product_attention(query[tokens].transpose(1, 2), key, value, mask, scale=scale, softcap=softcap)
        out[tokens] = mixed.transpose(1, 2)
    return out


def dot_product_attention(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, *, scale: float | None, softcap: float | None
) -> Tensor:
    """Attention in plain PyTorch, softmax in fp32 → [rows, heads, queries, head_dim].

    query       [rows, heads, queries, head_dim]
    key, value  [rows, kv_heads, keys, head_dim]
    mask        True where a query sees a key, to be broadcast to [rows, 1, queries, keys]; None: as many queries as
                keys, each sees those up to its own. A softcap needs a mask
    """
    if softcap is None:
        return F.scaled_dot_product_attention(
            query, key, value, attn_mask=mask, is_causal=mask is None, scale=scale, enable_gqa=True
        )
    assert mask is not None
    group = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(group, 1), value.repeat_interleave(group, 1)
    scores = (query @ key.transpose(2, 3)) * (query.shape[3] ** -0.5 if scale is None else scale)
    scores = softcap * torch.tanh(scores / softcap)
    wide = scores.to(torch.promote_types(scores.dtype, torch.float32)).masked_fill(~mask, -torch.inf)
    return wide.softmax(-1).to(value.dtype) @ value


def _gather(cache: Tensor, scale: Tensor | None, blocks: Tensor, past_end: Tensor, dtype: torch.dtype) -> Tensor:
    """Pages of ``blocks`` [rows, n] end to end: [rows, longest, kv_heads, head_dim], zero past each row's end."""
    pages = read_pages(cache, scale, blocks.flatten(), dtype)
    tokens = pages.view(len(blocks), -1, *cache.shape[2:])[:, : past_end.shape[1]]
    # A page holds anything there, NaN too, which no mask removes from a sum.
    tokens[past_end] = 0
    return tokens
