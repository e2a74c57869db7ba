"""Runner: a StepPlan in, the drawn tokens out.

The side effects of a step, in order: swap out, swap in, copy; write the keys and values of its tokens into the cache,
layer by layer as the forward pass reaches them; draw. Between steps it keeps the block tables, and the tokens drawn
last: a plan may be made, and run, before the host knows them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from llmq.errors import CHECK_FAILED, LlmqError
from llmq.memory import blocks_for
from llmq.plan import PlanRow, SampledToken, StepOutput, StepPlan, TokenLogprobs
from llmq.runtime.batch import Batch, batch_shape, fill, view
from llmq.runtime.block_tables import BlockTables
from llmq.runtime.decoder import Attention, Decoder
from llmq.runtime.device import ToHost, on_device
from llmq.runtime.graphs import MAX_TOKENS, StepGraphs, padded_rows, power_of_two
from llmq.runtime.kernels.attention import Fresh, paged_attention
from llmq.runtime.kernels.gumbel import draw_gumbel
from llmq.runtime.kv_cache import KVCache
from llmq.runtime.linear import make_batch_invariant
from llmq.runtime.rotary import Rotation
from llmq.runtime.sampler import Samples, sample, score

SCORED_ROWS = 256
"""Prompt tokens whose logits are held at once, where their log-probabilities are asked for."""
ROWS_PER_SEQUENCE = 2
"""Its own, and one of padding, in the older ways of batching."""

Result = Callable[[], StepOutput]
"""Waits for what a step gives."""


@dataclass(frozen=True, slots=True)
class _Part:
    """Rows of a step on their way: the tokens that they draw, on the device, and what waits for them and for the
    log-probabilities of their prompts."""

    drawn: Tensor | None
    collect: Callable[[], list[SampledToken]]
    scores: Callable[[], list[tuple[int, list[TokenLogprobs]]]]


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
        columns = blocks_for(max_tokens, cache.block_size)
        rows = power_of_two(max(ROWS_PER_SEQUENCE * max_sequences, MAX_TOKENS))  # as graphs pad them
        self._tables = [BlockTables(rows, columns, device) for _ in cache.groups]
        graphed = device != "cpu" and not enforce_eager and not decoder.waits_for_host
        hidden_size = decoder.config.hidden_size
        self._graphs = StepGraphs(self._step, rows, len(cache.groups), hidden_size, device) if graphed else None
        none_drawn = torch.zeros(rows, dtype=torch.int32, device=device)
        self._drawn = none_drawn if self._graphs is None else self._graphs.drawn
        self._most_tokens: int | None = None
        """What a step may compute at once, once there was no memory for more."""

    @torch.inference_mode()
    def launch(self, plan: StepPlan) -> Result:
        """Give the device the step to compute, and a token to draw for each row whose tokens are then all in the cache.
        The result waits for it; the next step may be launched before.

        A token id −1 − i in ``plan`` stands for the i-th token that the step launched before draws.

        A step that there is no memory for is computed in parts, and so are all that are as long, from then on: a row's
        result does not depend on the rest of the step. LlmqError when there is none for one token.
        """
        self.cache.move(plan)
        parts: list[_Part] = []
        left = list(plan.rows)
        while left:
            rows, rest = first_tokens(left, self._most_tokens)
            part = self._try(rows)
            if part is None:
                continue
            parts.append(part)
            left = rest
        drawn = [part.drawn for part in parts if part.drawn is not None]
        if drawn:
            # Not before the last part has read those of the step before.
            token_ids = (drawn[0] if len(drawn) == 1 else torch.cat(drawn))[: len(self._drawn)]
            self._drawn[: len(token_ids)] = token_ids
        return lambda: StepOutput(
            [token for part in parts for token in part.collect()], [score for part in parts for score in part.scores()]
        )

    def _try(self, rows: Sequence[PlanRow]) -> _Part | None:
        """``rows`` on their way; None if there was no memory for them: fewer tokens are to be tried."""
        try:
            return self._compute(rows)
        except torch.OutOfMemoryError as error:
            tokens = sum(len(row.tokens) for row in rows)
            if tokens == 1:
                raise LlmqError(
                    f"out of memory while computing one token: {error}",
                    "lower --gpu-memory-utilization or --kv-cache-memory",
                    exit_code=CHECK_FAILED,
                ) from error
        torch.cuda.empty_cache()
        self._most_tokens = tokens // 2
        return None

    def _compute(self, rows: Sequence[PlanRow]) -> _Part:
        drawing = [index for index, row in enumerate(rows) if row.sampling is not None]
        draws = bool(drawing) and all(row.plain for row in rows)
        scored = any(row.prompt_targets for row in rows)
        hidden, drawn = self._run(rows, draws=draws, whole=scored)
        scores = self._score_prompts(rows, hidden)
        if not drawing:
            return _Part(None, list, scores)
        if drawn is None:
            logits = self.decoder.logits(self._last(rows, hidden, whole=scored))
            samples = sample(logits, [rows[index] for index in drawing], self._drawn)
        else:
            all_draw = len(drawing) == len(rows)
            drawn = drawn[: len(rows)] if all_draw else drawn[on_device(drawing, torch.int32, self.device)]
            samples = _on_its_way(drawn, [rows[index].sequence_id for index in drawing])
        return _Part(samples.token_ids, samples.collect, scores)

    def _run(self, rows: Sequence[PlanRow], *, draws: bool, whole: bool) -> tuple[Tensor, Tensor | None]:
        """The hidden states of the last token of each of ``rows``, perhaps followed by those of padding, or of their
        ``whole`` chunks; and a token for each row, if a graph ``draws`` them."""
        block_size = self.cache.block_size
        if self._graphs is not None and not whole and self._graphs.take(sum(len(row.tokens) for row in rows)):
            padded = padded_rows(rows)
            self._update_tables(padded)
            return self._graphs.run(padded, block_size, draws)
        self._update_tables(rows)
        shape = batch_shape(rows, len(self._drawn))
        ints = on_device(fill(rows, shape, block_size), torch.int32, self.device)
        return self._forward(view(torch.cat((self._drawn, ints)), shape), whole), None

    def _step(self, batch: Batch, draws: bool) -> tuple[Tensor, Tensor | None]:
        """What a graph holds."""
        hidden = self._forward(batch)
        if not draws:
            return hidden, None
        logits = self.decoder.narrow_logits(hidden)
        return hidden, draw_gumbel(logits, batch.temperatures, batch.seeds, batch.kv_lengths)

    def _update_tables(self, rows: Sequence[PlanRow]) -> None:
        for group, tables in enumerate(self._tables):
            tables.update([row.block_tables[group] for row in rows])

    def _forward(self, batch: Batch, whole: bool = False) -> Tensor:
        def attend(attention: Attention, query: Tensor, key: Tensor, value: Tensor, rotation: Rotation) -> Tensor:
            keys, values, scales = self.cache.layer(attention.layer)
            group = self.cache.group_of(attention.layer)
            return paged_attention(
                query,
                keys,
                values,
                self._tables[group].matrix,
                batch.query_starts,
                batch.kv_lengths,
                window=attention.window,
                min_query_length=batch.shape.min_query_length,
                max_query_length=batch.shape.max_query_length,
                max_kv_length=batch.shape.max_kv_length,
                longest=batch.longest,
                order=batch.order,
                scale=attention.scale,
                softcap=attention.softcap,
                batch_invariant=self._deterministic,
                scales=scales,
                fresh=Fresh(key, value, rotation, batch.slots[group], attention.norms, attention.eps),
            )

        token_ids = batch.ints.index_select(0, batch.sources)
        wanted = None if whole or batch.shape.max_query_length == 1 else batch.last
        return self.decoder(token_ids, batch.positions, attend, wanted)  # type: ignore[no-any-return]

    def _last(self, rows: Sequence[PlanRow], hidden: Tensor, *, whole: bool) -> Tensor:
        """Of ``hidden``, as ``_run`` gives it, the last of each row that draws."""
        ends = accumulate(len(row.tokens) if whole else 1 for row in rows)
        places = [end - 1 for row, end in zip(rows, ends, strict=True) if row.sampling is not None]
        if places[-1] + 1 == len(places):
            return hidden[: len(places)]
        return hidden[on_device(places, torch.int32, self.device)]

    def _score_prompts(
        self, rows: Sequence[PlanRow], hidden: Tensor
    ) -> Callable[[], list[tuple[int, list[TokenLogprobs]]]]:
        pending: list[tuple[int, list[Callable[[], list[TokenLogprobs]]]]] = []
        start = 0
        for row in rows:
            scores: list[Callable[[], list[TokenLogprobs]]] = []
            for first in range(0, len(row.prompt_targets), SCORED_ROWS):
                targets = row.prompt_targets[first : first + SCORED_ROWS]
                logits = self.decoder.logits(hidden[start + first : start + first + len(targets)])
                scores.append(score(logits, targets, row.prompt_top))
            if scores:
                pending.append((row.sequence_id, scores))
            start += len(row.tokens)
        return lambda: [(sequence_id, [one for part in parts for one in part()]) for sequence_id, parts in pending]


def first_tokens(rows: Sequence[PlanRow], most: int | None) -> tuple[list[PlanRow], list[PlanRow]]:
    """The first ``most`` tokens of ``rows`` (None: all), and the rest; a chunk of a prompt that lies on both sides is
    two, and the first of them draws nothing."""
    room = most
    for index, row in enumerate(rows):
        if room is None:
            break
        if len(row.tokens) > room:
            cut = [row._replace(tokens=row.tokens[:room], sampling=None, prompt_targets=row.prompt_targets[:room])]
            rest = row._replace(
                start=row.start + room, tokens=row.tokens[room:], prompt_targets=row.prompt_targets[room:]
            )
            return [*rows[:index], *(cut if room else [])], [rest, *rows[index + 1 :]]
        room -= len(row.tokens)
    return list(rows), []


def _on_its_way(token_ids: Tensor, sequence_ids: Sequence[int]) -> Samples:
    on_host = ToHost(token_ids)
    return Samples(
        token_ids,
        lambda: [
            SampledToken(sequence_id, token_id, None)
            for sequence_id, token_id in zip(sequence_ids, on_host.tolist(), strict=True)
        ],
    )
