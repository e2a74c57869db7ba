"""Runner: a StepPlan in, the drawn tokens out.

The side effects of a step, in order: swap out, swap in, copy; write the keys and values of its tokens into the cache,
layer by layer as the forward pass reaches them; draw; return. Nothing else is kept between steps but block tables that
have not changed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from llmq.plan import StepOutput, StepPlan, TokenLogprobs
from llmq.runtime.decoder import Attention, Decoder
from llmq.runtime.kernels.attention import paged_attention
from llmq.runtime.kernels.rope import rope_and_write
from llmq.runtime.kv_cache import KVCache
from llmq.runtime.rotary import Rotation
from llmq.runtime.sampler import sample, score

SCORED_ROWS = 256
"""Prompt tokens whose logits are held at once, where their log-probabilities are asked for."""


@dataclass(frozen=True, slots=True)
class Batch:
    """A step on the device. T tokens of R rows lie end to end, never padded.

    token_ids, positions          int64 [T]
    slots                         int64 [T] for each group of layers: where the token's keys and values go
    block_tables                  int32 [R, most blocks of a row] for each group of layers, the rest 0
    query_starts, kv_lengths      int32 [R + 1], [R]; see ``paged_attention``
    sampled                       int64: of the T tokens, the last of each row that draws
    """

    token_ids: Tensor
    positions: Tensor
    slots: tuple[Tensor, ...]
    block_tables: tuple[Tensor, ...]
    query_starts: Tensor
    kv_lengths: Tensor
    sampled: Tensor
    max_query_length: int
    max_kv_length: int


class TableBuffer:
    """The block tables of a step as a matrix on the host, of which only the rows that have changed are written anew.

    A row of a plan names the very same list as in the step before unless its table is another: then it has only grown.
    """

    def __init__(self) -> None:
        self._tables: list[Sequence[int]] = []
        self._lengths: list[int] = []
        self._matrix = torch.zeros((0, 0), dtype=torch.int32)

    def fill(self, tables: list[Sequence[int]]) -> Tensor:
        """int32 [rows, longest], each row padded with 0; a copy: the next call changes nothing in it."""
        rows, columns = len(tables), max(map(len, tables))
        if rows > self._matrix.shape[0] or columns > self._matrix.shape[1]:
            # Twice what is needed: a table that grows by a block now and then must not mean a new matrix each time.
            self._matrix = torch.zeros((2 * rows, 2 * columns), dtype=torch.int32)
            self._tables, self._lengths = [], []
        self._tables += [()] * (rows - len(self._tables))
        self._lengths += [0] * (rows - len(self._lengths))
        for row, table in enumerate(tables):
            same, filled = table is self._tables[row], self._lengths[row]
            if same and filled == len(table):
                continue
            first = filled if same else 0
            self._matrix[row, first : len(table)] = torch.tensor(table[first:], dtype=torch.int32)
            self._matrix[row, len(table) : filled] = 0
            self._tables[row], self._lengths[row] = table, len(table)
        return self._matrix[:rows, :columns].clone()


class Runner:
    """A decoder and its KV cache, to which plans are given one after another."""

    def __init__(self, decoder: Decoder, cache: KVCache, device: str) -> None:
        self.decoder = decoder
        self.cache = cache
        self.device = device
        self._tables = [TableBuffer() for _ in cache.groups]

    @torch.inference_mode()
    def run(self, plan: StepPlan) -> StepOutput:
        """Compute the step and draw a token for each row whose tokens are then all in the cache."""
        self.cache.move(plan)
        if not plan.rows:
            return StepOutput(())
        batch = build_batch(plan, self.cache.block_size, self.device, self._tables)

        def attend(attention: Attention, query: Tensor, key: Tensor, value: Tensor, rotation: Rotation) -> Tensor:
            keys, values = self.cache.layer(attention.layer)
            group = self.cache.group_of(attention.layer)
            query = rope_and_write(
                query, key, value, rotation, keys, values, batch.slots[group], norms=attention.norms, eps=attention.eps
            )
            return paged_attention(
                query,
                keys,
                values,
                batch.block_tables[group],
                batch.query_starts,
                batch.kv_lengths,
                window=attention.window,
                max_query_length=batch.max_query_length,
                max_kv_length=batch.max_kv_length,
                scale=attention.scale,
                softcap=attention.softcap,
            )

        hidden = self.decoder(batch.token_ids, batch.positions, attend)
        rows = plan.sampled_rows
        sampled = sample(self.decoder.logits(hidden[batch.sampled]), rows) if rows else []
        return StepOutput(sampled, self._score_prompts(plan, hidden))

    def _score_prompts(self, plan: StepPlan, hidden: Tensor) -> list[tuple[int, list[TokenLogprobs]]]:
        found: list[tuple[int, list[TokenLogprobs]]] = []
        start = 0
        for row in plan.rows:
            scores: list[TokenLogprobs] = []
            for first in range(0, len(row.prompt_targets), SCORED_ROWS):
                targets = row.prompt_targets[first : first + SCORED_ROWS]
                logits = self.decoder.logits(hidden[start + first : start + first + len(targets)])
                scores += score(logits, targets, row.prompt_top)
            if scores:
                found.append((row.sequence_id, scores))
            start += len(row.tokens)
        return found


def build_batch(plan: StepPlan, block_size: int, device: str, buffers: Sequence[TableBuffer]) -> Batch:
    """Lay the rows of ``plan`` end to end in tensors on ``device``. ``buffers``: for each group, its tables so far."""
    groups = range(len(plan.rows[0].block_tables))
    token_ids: list[int] = []
    positions: list[int] = []
    slots: list[list[int]] = [[] for _ in groups]
    starts = [0]
    sampled: list[int] = []
    for row in plan.rows:
        token_ids.extend(row.tokens)
        places = range(row.start, row.end)
        positions.extend(places)
        for group, table in enumerate(row.block_tables):
            slots[group].extend(table[place // block_size] * block_size + place % block_size for place in places)
        starts.append(len(token_ids))
        if row.sampling is not None:
            sampled.append(len(token_ids) - 1)

    def to_device(values: object, dtype: torch.dtype) -> Tensor:
        return move(torch.tensor(values, dtype=dtype))

    def move(tensor: Tensor) -> Tensor:
        return tensor if device == "cpu" else tensor.pin_memory().to(device, non_blocking=True)

    return Batch(
        to_device(token_ids, torch.int64),
        to_device(positions, torch.int64),
        tuple(to_device(slots[group], torch.int64) for group in groups),
        tuple(move(buffers[group].fill([row.block_tables[group] for row in plan.rows])) for group in groups),
        to_device(starts, torch.int32),
        to_device([row.end for row in plan.rows], torch.int32),
        to_device(sampled, torch.int64),
        max(len(row.tokens) for row in plan.rows),
        max(row.end for row in plan.rows),
    )
