"""Scheduler: which sequences run in the next step, and with how many tokens each. No tensors.

Continuous batching, as in vLLM V1: every step first serves the sequences that run, oldest first, then lets waiting
ones in with what is left of the step's token budget. A prompt longer than that is computed in chunks over several
steps, beside the new tokens of the others. When blocks run out, the newest sequence gives all of its own back, goes to
the head of the queue, and is computed anew later: it keeps its place and every token it has produced.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass

from llmq.engine.blocks import BlockManager
from llmq.engine.options import EngineOptions
from llmq.engine.request import FinishReason, Sequence
from llmq.plan import PlanRow, SampledToken, StepPlan


@dataclass(slots=True)
class EngineStats:
    """Counts since the start, or since the last reset."""

    total_blocks: int
    steps: int = 0
    preemptions: int = 0
    peak_blocks: int = 0


class Scheduler:
    """The queue of who waits and the list of who runs, between which sequences move step by step."""

    def __init__(self, options: EngineOptions, blocks: BlockManager, eos_token_ids: Iterable[int]) -> None:
        self.options = options
        self.blocks = blocks
        self.eos_token_ids = frozenset(eos_token_ids)
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []
        self.stats = EngineStats(blocks.total)

    @property
    def idle(self) -> bool:
        return not self.waiting and not self.running

    def add(self, sequence: Sequence) -> None:
        """Queue ``sequence``, whose ``max_total`` the pool must be able to hold."""
        if sequence.max_total > self.blocks.capacity:
            raise ValueError(f"{sequence.max_total} tokens can never fit {self.blocks.capacity}")
        self.waiting.append(sequence)

    def schedule(self) -> StepPlan:
        """The next step. Every sequence in it owns blocks for all the tokens it has.

        Raises RuntimeError when nothing can run although something waits: a defect, never a matter of load.
        """
        budget = self.options.max_num_batched_tokens
        rows: list[PlanRow] = []
        preempted = False

        position = 0
        while position < len(self.running) and budget:
            sequence = self.running[position]
            while not self.blocks.fits(sequence):
                preempted = True
                victim = self.running.pop()
                self._preempt(victim)
                if victim is sequence:
                    break
            else:
                self.blocks.grow(sequence)
                budget -= self._plan(sequence, budget, rows)
                position += 1

        # Whoever was just put back waits at the head: letting it in again would be a step of nothing but churn.
        while not preempted and self.waiting and budget and len(self.running) < self.options.max_num_seqs:
            sequence = self.waiting[0]
            if not self.blocks.fits(sequence):
                break
            self.running.append(self.waiting.popleft())
            self.blocks.grow(sequence)
            budget -= self._plan(sequence, budget, rows)

        if not rows and not self.idle:
            raise RuntimeError(
                f"no progress: {len(self.waiting)} waiting, {len(self.running)} running, "
                f"{self.blocks.used} of {self.blocks.total} blocks used"
            )
        self.stats.steps += 1
        self.stats.peak_blocks = max(self.stats.peak_blocks, self.blocks.used)
        return StepPlan(tuple(rows))

    def update(self, plan: StepPlan, sampled: Iterable[SampledToken]) -> list[Sequence]:
        """Book what the step computed and drew. Returns the sequences that got a token; the finished among them, by
        EOS or by length, have given their blocks back."""
        tokens = {token.sequence_id: token for token in sampled}
        extended = []
        for sequence in list(self.running):
            sequence.computed += sequence.scheduled
            sequence.scheduled = 0
            token = tokens.get(sequence.sequence_id)
            if token is None:
                continue
            sequence.output_ids.append(token.token_id)
            if token.logprobs is not None:
                sequence.output_logprobs.append(token.logprobs)
            extended.append(sequence)
            if token.token_id in self.eos_token_ids and not sequence.params.ignore_eos:
                self.finish(sequence, "stop")
            elif sequence.total >= sequence.max_total:
                self.finish(sequence, "length")
        return extended

    def finish(self, sequence: Sequence, reason: FinishReason) -> None:
        """End ``sequence`` now, wherever it is, and free all it holds. A second call changes nothing."""
        if sequence.finish_reason is not None:
            return
        sequence.finish_reason = reason
        self.blocks.release(sequence)
        if sequence in self.running:
            self.running.remove(sequence)
        else:
            self.waiting.remove(sequence)

    def check_integrity(self) -> None:
        """Raise RuntimeError if a block was lost or is owned twice."""
        self.blocks.check_integrity([*self.running, *self.waiting])

    def _plan(self, sequence: Sequence, budget: int, rows: list[PlanRow]) -> int:
        """Add the row of ``sequence`` to the step; returns the tokens it takes of ``budget``."""
        sequence.scheduled = min(sequence.pending, budget)
        end = sequence.computed + sequence.scheduled
        rows.append(
            PlanRow(
                sequence.sequence_id,
                sequence.computed,
                sequence.tokens(sequence.computed, end),
                tuple(sequence.block_table),
                sequence.sampling if end == sequence.total else None,
            )
        )
        return sequence.scheduled

    def _preempt(self, victim: Sequence) -> None:
        self.stats.preemptions += 1
        self.blocks.release(victim)
        self.waiting.appendleft(victim)
