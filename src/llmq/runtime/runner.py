"""Runner: a StepPlan in, the drawn tokens out.

The side effects of a step, in order: swap out, swap in, copy; write the keys and values of its tokens into the cache,
layer by layer as the forward pass reaches them; draw. Between steps it keeps the block tables, and the tokens drawn
last: a plan may be made, and run, before the host knows them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from llmq.memory import blocks_for
from llmq.plan import PlanRow, StepOutput, StepPlan, TokenLogprobs
from llmq.runtime.batch import ALIGNMENT, Batch, batch_shape, fill, view
from llmq.runtime.block_tables import BlockTables
from llmq.runtime.decoder import Attention, Decoder
from llmq.runtime.device import on_device
from llmq.runtime.graphs import MAX_ROWS, DecodeGraphs, padded_rows
from llmq.runtime.kernels.attention import paged_attention
from llmq.runtime.kernels.rope import rope_and_write
from llmq.runtime.kv_cache import KVCache
from llmq.runtime.linear import make_batch_invariant
from llmq.runtime.rotary import Rotation
from llmq.runtime.sampler import sample, score

SCORED_ROWS = 256
"""Prompt tokens whose logits are held at once, where their log-probabilities are asked for."""
ROWS_PER_SEQUENCE = 2
"""Its own, and one of padding, in the older ways of batching."""
NOBODY = -1
"""The sequence id of a row that fills up the batch of a graph."""

Result = Callable[[], StepOutput]
"""Waits for what a step gives."""


class Runner:
    """A decoder and its KV cache, to which plans are given one after another."""

    def __init__(
        self,
        decoder: Decoder,
        cache: KVCache,
        device: str,
        *,
        max_sequences: int,
        max_tokens: int,
        enforce_eager: bool = False,
        deterministic: bool = False,
    ) -> None:
        """``max_sequences`` in a step, of ``max_tokens`` each. CUDA graphs on a GPU, unless ``enforce_eager``.

        ``deterministic``: a sequence's tokens do not depend on what else is in a step, nor on how it is cut into steps.
        """
        self.decoder = decoder
        self.cache = cache
        self.device = device
        self._deterministic = deterministic
        if deterministic:
            make_batch_invariant(decoder)
        rows, columns = max(ROWS_PER_SEQUENCE * max_sequences, MAX_ROWS), blocks_for(max_tokens, cache.block_size)
        rows += -rows % ALIGNMENT
        self._tables = [BlockTables(rows, columns, device) for _ in cache.groups]
        graphed = device != "cpu" and not enforce_eager and not decoder.waits_for_host
        self._graphs = DecodeGraphs(self._forward, rows, len(cache.groups), device) if graphed else None
        none_drawn = torch.zeros(rows, dtype=torch.int32, device=device)
        self._drawn = none_drawn if self._graphs is None else self._graphs.drawn
        table = [0]
        self._padding = PlanRow(NOBODY, 0, (0,), tuple(table for _ in cache.groups), None)

    @torch.inference_mode()
    def launch(self, plan: StepPlan) -> Result:
        """Give the device the step to compute, and a token to draw for each row whose tokens are then all in the cache.
        The result waits for it; the next step may be launched before.

        A token id −1 − i in ``plan`` stands for the i-th token that the step launched before draws.
        """
        self.cache.move(plan)
        if not plan.rows:
            return lambda: StepOutput(())
        hidden = self._hidden(plan.rows)
        scores = self._score_prompts(plan, hidden)
        if not any(row.sampling is not None for row in plan.rows):
            return lambda: StepOutput((), scores())
        samples = sample(self.decoder.logits(self._last(plan.rows, hidden)), plan.sampled_rows, self._drawn)
        drawn = samples.token_ids[: len(self._drawn)]
        self._drawn[: len(drawn)] = drawn
        return lambda: StepOutput(samples.collect(), scores())

    def _hidden(self, rows: Sequence[PlanRow]) -> Tensor:
        """The hidden states of the step's tokens, perhaps followed by those of padding."""
        block_size = self.cache.block_size
        if self._graphs is not None and len(rows) <= MAX_ROWS and all(len(row.tokens) == 1 for row in rows):
            rows = [*rows, *[self._padding] * (padded_rows(len(rows)) - len(rows))]
            self._update_tables(rows)
            return self._graphs.run(rows, block_size)
        self._update_tables(rows)
        shape = batch_shape(rows, len(self._drawn))
        ints = on_device(fill(rows, shape, block_size), torch.int32, self.device)
        return self._forward(view(torch.cat((self._drawn, ints)), shape))

    def _update_tables(self, rows: Sequence[PlanRow]) -> None:
        for group, tables in enumerate(self._tables):
            tables.update([row.block_tables[group] for row in rows])

    def _forward(self, batch: Batch) -> Tensor:
        def attend(attention: Attention, query: Tensor, key: Tensor, value: Tensor, rotation: Rotation) -> Tensor:
            keys, values, scales = self.cache.layer(attention.layer)
            group = self.cache.group_of(attention.layer)
            query = rope_and_write(
                query,
                key,
                value,
                rotation,
                keys,
                values,
                batch.slots[group],
                norms=attention.norms,
                eps=attention.eps,
                scales=scales,
            )
            return paged_attention(
                query,
                keys,
                values,
                self._tables[group].matrix,
                batch.query_starts,
                batch.kv_lengths,
                window=attention.window,
                max_query_length=batch.shape.max_query_length,
                max_kv_length=batch.shape.max_kv_length,
                longest=batch.longest,
                order=batch.order,
                scale=attention.scale,
                softcap=attention.softcap,
                batch_invariant=self._deterministic,
                scales=scales,
            )

        return self.decoder(batch.ints[batch.sources], batch.positions, attend)  # type: ignore[no-any-return]

    def _last(self, rows: Sequence[PlanRow], hidden: Tensor) -> Tensor:
        """Of ``hidden``, the last of each row that draws."""
        places: list[int] = []
        end = 0
        for row in rows:
            end += len(row.tokens)
            if row.sampling is not None:
                places.append(end - 1)
        if len(places) == end:
            return hidden[:end]
        return hidden[on_device(places, torch.int32, self.device)]

    def _score_prompts(self, plan: StepPlan, hidden: Tensor) -> Callable[[], list[tuple[int, list[TokenLogprobs]]]]:
        pending: list[tuple[int, list[Callable[[], list[TokenLogprobs]]]]] = []
        start = 0
        for row in plan.rows:
            scores: list[Callable[[], list[TokenLogprobs]]] = []
            for first in range(0, len(row.prompt_targets), SCORED_ROWS):
                targets = row.prompt_targets[first : first + SCORED_ROWS]
                logits = self.decoder.logits(hidden[start + first : start + first + len(targets)])
                scores.append(score(logits, targets, row.prompt_top))
            if scores:
                pending.append((row.sequence_id, scores))
            start += len(row.tokens)
        return lambda: [(sequence_id, [one for part in parts for one in part()]) for sequence_id, parts in pending]
