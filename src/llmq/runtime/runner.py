"""Runner: a StepPlan in, the drawn tokens out.

The side effects of a step, in order: write the keys and values of its tokens into the cache, layer by layer as the
forward pass reaches them; draw; return. Nothing else is kept between steps.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from llmq.plan import SampledToken, StepPlan
from llmq.runtime.decoder import Attention, Decoder
from llmq.runtime.kernels.attention import paged_attention
from llmq.runtime.kernels.rope import rope_and_write
from llmq.runtime.kv_cache import KVCache
from llmq.runtime.sampler import sample


@dataclass(frozen=True, slots=True)
class Batch:
    """A step on the device. T tokens of R rows lie end to end, never padded.

    token_ids, positions, slots   int64 [T]; a slot is where the token's keys and values go
    block_tables                  int32 [R, most blocks of a row], the rest 0
    query_starts, kv_lengths      int32 [R + 1], [R]; see ``paged_attention``
    sampled                       int64: of the T tokens, the last of each row that draws
    """

    token_ids: Tensor
    positions: Tensor
    slots: Tensor
    block_tables: Tensor
    query_starts: Tensor
    kv_lengths: Tensor
    sampled: Tensor
    max_query_length: int
    max_kv_length: int


class Runner:
    """A decoder and its KV cache, to which plans are given one after another."""

    def __init__(self, decoder: Decoder, cache: KVCache, device: str) -> None:
        self.decoder = decoder
        self.cache = cache
        self.device = device

    @torch.inference_mode()
    def run(self, plan: StepPlan) -> list[SampledToken]:
        """Compute the step and draw a token for each row whose tokens are then all in the cache."""
        batch = build_batch(plan, self.cache.block_size, self.device)

        def attend(
            attention: Attention, query: Tensor, key: Tensor, value: Tensor, rotation: tuple[Tensor, Tensor]
        ) -> Tensor:
            keys, values = self.cache.layer(attention.layer)
            query = rope_and_write(
                query, key, value, rotation, keys, values, batch.slots, norms=attention.norms, eps=attention.eps
            )
            return paged_attention(
                query,
                keys,
                values,
                batch.block_tables,
                batch.query_starts,
                batch.kv_lengths,
                window=attention.window,
                max_query_length=batch.max_query_length,
                max_kv_length=batch.max_kv_length,
            )

        hidden = self.decoder(batch.token_ids, batch.positions, attend)
        if not plan.sampled_rows:
            return []
        return sample(self.decoder.logits(hidden[batch.sampled]), plan.sampled_rows)


def build_batch(plan: StepPlan, block_size: int, device: str) -> Batch:
    """Lay the rows of ``plan`` end to end in tensors on ``device``."""
    token_ids: list[int] = []
    positions: list[int] = []
    slots: list[int] = []
    starts = [0]
    sampled: list[int] = []
    for row in plan.rows:
        token_ids.extend(row.tokens)
        positions.extend(range(row.start, row.end))
        slots.extend(row.block_table[p // block_size] * block_size + p % block_size for p in range(row.start, row.end))
        starts.append(len(token_ids))
        if row.sampling is not None:
            sampled.append(len(token_ids) - 1)
    most_blocks = max(len(row.block_table) for row in plan.rows)
    tables = [row.block_table + (0,) * (most_blocks - len(row.block_table)) for row in plan.rows]

    def to_device(values: object, dtype: torch.dtype) -> Tensor:
        tensor = torch.tensor(values, dtype=dtype)
        return tensor if device == "cpu" else tensor.pin_memory().to(device, non_blocking=True)

    return Batch(
        to_device(token_ids, torch.int64),
        to_device(positions, torch.int64),
        to_device(slots, torch.int64),
        to_device(tables, torch.int32),
        to_device(starts, torch.int32),
        to_device([row.end for row in plan.rows], torch.int32),
        to_device(sampled, torch.int64),
        max(len(row.tokens) for row in plan.rows),
        max(row.end for row in plan.rows),
    )
