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

import torch
from torch import Tensor
from torch.nn import functional as F

from llmq.runtime.kernels import runs_triton


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
    split: int | None = None,
) -> Tensor:
    """Causal attention of each row's queries over the row's pages, scaled by 1/√head_dim → [tokens, heads, head_dim].

    query         [tokens, heads, head_dim]
    key_cache     [blocks, block_size, kv_heads, head_dim]; may be a view of a bigger pool, contiguous in head_dim.
    value_cache   This step's keys and values are in it already
    block_tables  int32 [rows, max blocks of a row]
    query_starts  int32 [rows + 1]; row r's queries are query[query_starts[r]:query_starts[r + 1]]
    kv_lengths    int32 [rows]; tokens of the row in the cache. Its last query is at position kv_length − 1.
                  A row of length 0 is padding: its output is zero
    window        a query at position p sees the keys at (p − window, p]; None: all up to p
    max_query_length, max_kv_length
                  bounds over all rows, known to the host: they set the grid, so that a CUDA graph can replay it
    split         on a GPU a row's positions are divided among programs, this many to each (128, 256, 512 or 1024), and
                  the parts joined in order. None: what is fastest for this many rows and these bounds, so that the
                  last bits of a row's result depend on its batch. With a number they do not
    """
    inputs = (query, key_cache, value_cache, block_tables, query_starts, kv_lengths)
    if not runs_triton(query):
        return paged_attention_reference(
            *inputs, window=window, max_query_length=max_query_length, max_kv_length=max_kv_length
        )
    from llmq.runtime.kernels.attention_triton import paged_attention_triton

    return paged_attention_triton(
        *inputs, window=window, max_query_length=max_query_length, max_kv_length=max_kv_length, split=split
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
) -> Tensor:
    """``paged_attention`` in plain PyTorch.

    Rows with as many queries, and contexts within a factor of two, are computed together, their pages gathered and
    padded to the longest: all decode rows in a few products, and little padding.
    """
    starts, lengths = query_starts.tolist(), kv_lengths.tolist()
    groups: dict[tuple[int, int], list[int]] = defaultdict(list)
    for row, length in enumerate(lengths):
        queries = starts[row + 1] - starts[row]
        if queries and length:
            groups[queries, length.bit_length()].append(row)

    out = torch.zeros_like(query)
    for (queries, _), rows in groups.items():
        index = torch.tensor(rows, device=query.device)
        longest = max(lengths[row] for row in rows)
        blocks = block_tables[index, : -(-longest // key_cache.shape[1])]
        position = torch.arange(longest, device=query.device)
        past_end = position >= kv_lengths[index, None]
        key, value = (_gather(cache, blocks, past_end).transpose(1, 2) for cache in (key_cache, value_cache))
        step = torch.arange(queries, device=query.device)
        tokens = query_starts[index, None] + step
        seen_to = (kv_lengths[index, None] - queries + step)[:, None, :, None]
        mask = position <= seen_to
        if window is not None:
            mask &= position > seen_to - window
        mixed = F.scaled_dot_product_attention(
            query[tokens].transpose(1, 2), key, value, attn_mask=mask, enable_gqa=True
        )
        out[tokens] = mixed.transpose(1, 2)
    return out


def _gather(cache: Tensor, blocks: Tensor, past_end: Tensor) -> Tensor:
    """Pages of ``blocks`` [rows, n] end to end: [rows, longest, kv_heads, head_dim], zero past each row's end."""
    pages = cache.index_select(0, blocks.flatten())  # several times faster on a CPU than indexing with a matrix
    tokens = pages.view(len(blocks), -1, *cache.shape[2:])[:, : past_end.shape[1]]
    # A page holds anything there, NaN too, which no mask removes from a sum.
    tokens[past_end] = 0
    return tokens
