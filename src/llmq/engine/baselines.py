"""The older ways to batch, and generation without a KV cache, as scheduling plans over the same model and kernels.

static    wait for a full batch, compute its prompts padded to the longest, and decode until its slowest member is done
dynamic   the same, but a batch that is not full starts once its first member has waited ``window`` seconds
no cache  nothing is kept between steps: each computes every token of every sequence in it anew

    static, kept            prompt a  prompt a  prompt a │ token  token  token        real
                            prompt b  padding   padding  │ token  ended  ended        computed, and thrown away

What these ways waste is computed too, in rows of padding that read and write block 0, so that their cost is real. No
prompt is looked up in the prefix cache, and nobody is preempted: a batch is as large as surely fits.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Literal

from llmq.engine.blocks import BlockManager
from llmq.engine.options import EngineOptions
from llmq.engine.request import Request
from llmq.engine.scheduler import Draft, Progress, Scheduler
from llmq.errors import LlmqError
from llmq.memory import blocks_for
from llmq.plan import PlanRow, StepOutput, StepPlan

Batching = Literal["continuous", "dynamic", "static"]
BATCHINGS: tuple[Batching, ...] = ("continuous", "dynamic", "static")
WINDOW = 0.01
PADDING = -1
"""The sequence id of a row that nobody waits for."""


class BaselineScheduler(Scheduler):
    """``blocks`` without prefix cache. ``schedule`` is called when no more requests are to come, or a batch is full:
    static batching takes what is there; dynamic batching sleeps out its window first."""

    def __init__(
        self,
        options: EngineOptions,
        blocks: BlockManager,
        *,
        batching: Batching,
        kv_cache: bool = True,
        window: float = WINDOW,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        super().__init__(options, blocks, clock=clock)
        self.batching = batching
        self.kv_cache = kv_cache
        self.window = window
        self._sleep = sleep
        self._served: dict[int, int] = {}
        self._batch: list[Request] = []
        self._batch_rows = 0
        """Rows of the rectangle, those of ended sequences among them."""
        self._columns = 0
        """Tokens of each row that the rectangle has computed."""
        self._longest_prompt = 0

    @property
    def foresees(self) -> bool:
        return False

    def add(self, request: Request) -> None:
        most = request.params.width * request.max_total
        if not self.kv_cache and most > self.options.batched_tokens:
            raise LlmqError(
                f"without a KV cache a step computes up to {most} tokens of the request, and may have "
                f"{self.options.batched_tokens}",
                f"lower --max-tokens, or raise --max-num-batched-tokens to {most}",
            )
        # Anew in every step, samples share nothing, not even their prompt.
        scratch = (
            request.params.width * len(self.blocks.windows) * blocks_for(request.max_total, self.blocks.block_size)
        )
        if not self.kv_cache and scratch > self.blocks.total:
            raise LlmqError(
                f"without a KV cache the request takes {scratch} blocks, and there are {self.blocks.total}",
                "lower --max-tokens or --n, or raise --kv-cache-memory",
            )
        super().add(request)

    def schedule(self) -> StepPlan:
        draft = Draft(self.options.batched_tokens)
        if self.batching == "continuous":
            self._let_in(draft)
            return self._conclude(draft, self._recompute(draft, pad=False))
        if not self.running:
            self._form_batch(draft)
        if not self.kv_cache:
            return self._conclude(draft, self._recompute(draft, pad=True))
        if self._columns < self._longest_prompt:
            return self._conclude(draft, self._prefill_columns(draft))
        return self._conclude(draft, self._decode_batch(draft))

    def update(self, plan: StepPlan, output: StepOutput) -> Progress:
        progress = super().update(plan, output)
        if not self.kv_cache:
            for request in self.running:
                for sequence in request.live:
                    self.blocks.release(sequence)
        return progress

    def _let_in(self, draft: Draft) -> None:
        seats = sum(request.seats for request in self.running)
        while self.waiting and seats + self.waiting[0].seats <= self.options.seats:
            request = self.waiting.pop(0)
            seats += request.seats
            self.running.append(request)
            draft.admitted.append(request)

    def _form_batch(self, draft: Draft) -> None:
        members = self._members()
        if self.batching == "dynamic" and len(members) == len(self.waiting):
            # All that wait are in it, so more may come and make it fuller.
            left = self.waiting[0].arrival_time + self.window - self._clock()
            if left > 0:
                self._sleep(left)
                members = self._members()
        del self.waiting[: len(members)]
        self.running.extend(members)
        draft.admitted.extend(members)
        self._batch = members
        self._batch_rows = sum(request.params.width for request in members)
        self._columns = 0
        self._longest_prompt = max(len(request.prompt_ids) for request in members)
        if self.kv_cache:
            for request in members:
                self.blocks.admit(request.live[0])

    def _members(self) -> list[Request]:
        """The first in line, as many as surely fit together, whatever they come to."""
        members: list[Request] = []
        rows = blocks = longest = 0
        for request in self.waiting:
            rows += request.params.width
            longest = max(longest, request.max_total)
            blocks += self.blocks.worst_case(len(request.prompt_ids), request.max_total, request.params.width)
            scratch = rows * len(self.blocks.windows) * blocks_for(longest, self.blocks.block_size)
            fits = rows <= self.options.seats and (
                blocks <= self.blocks.total
                if self.kv_cache
                else rows * longest <= self.options.batched_tokens and scratch <= self.blocks.total
            )
            if not fits:
                break
            members.append(request)
        return members or self.waiting[:1]

    def _prefill_columns(self, draft: Draft) -> list[PlanRow]:
        """As many columns of the prompts' rectangle as the step has tokens for."""
        start = self._columns
        end = min(self._longest_prompt, start + max(1, draft.tokens // len(self._batch)))
        padding: list[PlanRow] = []
        for request in self._batch:
            prompt = len(request.prompt_ids) if request.live else 0
            if start < prompt:
                first = request.live[0]
                self._row(first, min(end, prompt) - first.computed, draft)
            if prompt < end:
                padding.append(self._padding(max(start, prompt), end))
        self._columns = end
        return padding

    def _decode_batch(self, draft: Draft) -> list[PlanRow]:
        self._make_room(self.running, draft)
        for request in self.running:
            self._decode(request, draft)
        self._columns += 1
        # The rectangle of a long prompt and a long answer may be wider than any sequence, and than the context.
        end = min(self._columns, max(request.max_total for request in self._batch))
        return [self._padding(end - 1, end)] * (self._batch_rows - len(draft.rows))

    def _recompute(self, draft: Draft, *, pad: bool) -> list[PlanRow]:
        """All tokens of as many sequences as a step has tokens and blocks for; who was served longest ago is first."""
        size, groups = self.blocks.block_size, len(self.blocks.windows)
        longest = max((sequence.total for request in self.running for sequence in request.live), default=0)
        for request in sorted(self.running, key=lambda one: self._served.get(one.number, 0)):
            totals = [sequence.total for sequence in request.live]
            need = groups * sum(blocks_for(total, size) for total in totals)
            if sum(totals) > draft.tokens or need > self.blocks.available:
                break
            for sequence in request.live:
                self.blocks.admit(sequence)
                self._row(sequence, sequence.total, draft)
            self._served[request.number] = self._steps + 1
        if not pad:
            return []
        padding = [self._padding(row.end, longest) for row in draft.rows if row.end < longest]
        return padding + [self._padding(0, longest)] * (self._batch_rows - len(draft.rows))

    def _padding(self, start: int, end: int) -> PlanRow:
        table = (0,) * blocks_for(end, self.blocks.block_size)
        return PlanRow(PADDING, start, (0,) * (end - start), (table,) * len(self.blocks.windows), None)
