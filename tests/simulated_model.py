"""A model without numbers: its KV cache holds token ids, and its next token is a hash of what it reads there.

It makes the moves of a plan, writes the step's tokens where the tables say, reads back every position that a query can
see, and compares it with what should be there. A wrong block, a lost copy, or a block that is written while another
sequence relies on it shows at once; a wrong token shows in everything that follows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from hashlib import blake2b
from itertools import chain

from llmq.engine.blocks import BlockManager
from llmq.engine.options import EngineOptions
from llmq.engine.request import Request, SamplingParams, token_array
from llmq.engine.scheduler import Scheduler
from llmq.plan import PlanRow, SampledToken, StepOutput, StepPlan

EOS = 0
BLOCK = 16
VOCABULARY = 1000
Slot = tuple[int, int]


class SimulatedModel:
    """``truth`` are the tokens of each sequence that was ever planned, as far as they are known to be computed."""

    def __init__(self, scheduler: Scheduler, *, eos_every: int = 0) -> None:
        self.scheduler = scheduler
        self.block_size = scheduler.blocks.block_size
        self.windows = scheduler.blocks.windows
        self.eos_every = eos_every
        self.pool: dict[int, list[Slot | None]] = {}
        self.swapped: dict[int, list[Slot | None]] = {}

    def run(self, plan: StepPlan) -> StepOutput:
        self._move(plan)
        sampled: list[SampledToken] = []
        sequences = self.scheduler._flights[-1].sequences
        rows = plan.rows[: len(sequences)]
        assert all(not any(chain(*row.block_tables)) for row in plan.rows[len(sequences) :])
        written: set[tuple[int, int]] = set()
        for row in rows:
            self._write(row, written)
        for row, sequence in zip(rows, sequences, strict=True):
            assert tuple(sequence.token_ids[row.start : row.end]) == row.tokens
            self._check(row, sequence.token_ids)
            if row.sampling is not None:
                assert row.end == len(sequence.token_ids)
                sampled += self._draw(row, sequence.token_ids)
        return StepOutput(sampled)

    def _move(self, plan: StepPlan) -> None:
        for here, there in plan.swap_out:
            assert here
            self.swapped[there] = list(self.pool.get(here, [None] * self.block_size))
        for there, here in plan.swap_in:
            assert here
            self.pool[here] = list(self.swapped[there])
        assert len({target for _, target in plan.copies}) == len(plan.copies)
        sources = [list(self.pool[source]) for source, _ in plan.copies]
        for (_, target), content in zip(plan.copies, sources, strict=True):
            assert target
            self.pool[target] = content

    def _write(self, row: PlanRow, written: set[tuple[int, int]]) -> None:
        for table in row.block_tables:
            for position, token in zip(range(row.start, row.end), row.tokens, strict=True):
                place = (table[position // self.block_size], position % self.block_size)
                assert place[0], "a token is written to the reserved block"
                assert place not in written, "two sequences write one slot"
                written.add(place)
                self.pool.setdefault(place[0], [None] * self.block_size)[place[1]] = (position, token)

    def _check(self, row: PlanRow, token_ids: Sequence[int]) -> None:
        for window, table in zip(self.windows, row.block_tables, strict=True):
            first = 0 if window is None else max(0, row.start - window + 1)
            for position in range(first, row.end):
                found = self.pool[table[position // self.block_size]][position % self.block_size]
                assert found == (position, token_ids[position]), (row.sequence_id, position, found)

    def _draw(self, row: PlanRow, token_ids: Sequence[int]) -> list[SampledToken]:
        sampling = row.sampling
        assert sampling is not None
        if sampling.beams:
            candidates = tuple(
                (_hash(token_ids, rank) % VOCABULARY, -0.1 * (rank + 1) - _hash(token_ids, -1 - rank) % 97 / 1000)
                for rank in range(sampling.beams)
            )
            # Of one token only its best place counts.
            unique = tuple({token: (token, logprob) for token, logprob in reversed(candidates)}.values())
            return [SampledToken(row.sequence_id, 0, None, candidates=tuple(sorted(unique, key=lambda one: -one[1])))]
        return [
            SampledToken(row.sequence_id, self._token(token_ids, sampling.seed + sample, row), None, sample)
            for sample in range(sampling.samples)
        ]

    def _token(self, token_ids: Sequence[int], seed: int, row: PlanRow) -> int:
        drawn = _hash(token_ids, seed)
        if self.eos_every and drawn % self.eos_every == 0 and EOS not in row.banned:
            return EOS
        return 1 + drawn // 1000 % (VOCABULARY - 1)


def _hash(token_ids: Sequence[int], salt: int) -> int:
    digest = blake2b(",".join(map(str, token_ids)).encode(), digest_size=6, salt=str(salt).encode()[:16])
    return int.from_bytes(digest.digest())


def make_scheduler(
    blocks: int,
    *,
    windows: Sequence[int | None] = (None,),
    cpu_blocks: int = 0,
    clock: Callable[[], float] = lambda: 0.0,
    **options: object,
) -> Scheduler:
    """A scheduler over ``blocks`` usable blocks of 16 tokens, without a watermark unless one is named."""
    fields: dict[str, object] = {
        "max_num_seqs": 8, "max_num_batched_tokens": 64, "block_size": BLOCK, "watermark": 0.0
    } | options  # fmt: skip
    made = EngineOptions(**fields)  # type: ignore[arg-type]
    manager = BlockManager(
        blocks + 1, made.block_size, windows=windows, cpu_blocks=cpu_blocks, prefix_caching=made.prefix_caching
    )
    return Scheduler(made, manager, clock=clock)


def make_request(number: int, prompt: int | Sequence[int], new: int = 4, **params: object) -> Request:
    """A request of ``new`` tokens behind a prompt that no other request has, or behind the one given."""
    ids = [1 + (number * 7919 + at) % 997 for at in range(prompt)] if isinstance(prompt, int) else list(prompt)
    sampling = SamplingParams(**({"max_tokens": new, "seed": number} | params))  # type: ignore[arg-type]
    return Request(number, token_array(ids), sampling, sampling.seed or 0, len(ids) + new, frozenset([EOS]))


def run(scheduler: Scheduler, token: int = 7) -> StepPlan:
    """One step of a model that always says ``token``."""
    plan = scheduler.schedule()
    drawn = [
        SampledToken(row.sequence_id, token, None, sample)
        for row in plan.sampled_rows
        for sample in range(row.sampling.samples if row.sampling else 0)
    ]
    scheduler.update(plan, StepOutput(drawn))
    return plan


def taken(plan: StepPlan, scheduler: Scheduler) -> dict[object, int]:
    """Request id → tokens that the step, which has just been planned, computes for it."""
    counts: dict[object, int] = {}
    for row, sequence in zip(plan.rows, scheduler._flights[-1].sequences, strict=True):
        name = sequence.request.request_id
        counts[name] = counts.get(name, 0) + len(row.tokens)
    return counts


def step(scheduler: Scheduler, token: int = 7) -> dict[object, int]:
    """``run``, and what it computed."""
    plan = scheduler.schedule()
    counts = taken(plan, scheduler)
    drawn = [
        SampledToken(row.sequence_id, token, None, sample)
        for row in plan.sampled_rows
        for sample in range(row.sampling.samples if row.sampling else 0)
    ]
    scheduler.update(plan, StepOutput(drawn))
    return counts


def drain(scheduler: Scheduler, model: SimulatedModel, *, most_steps: int = 20_000) -> int:
    """Run until nothing is left; returns the steps it took. Integrity is checked after each."""
    steps = 0
    while not scheduler.idle:
        plan = scheduler.schedule()
        scheduler.update(plan, model.run(plan))
        scheduler.check_integrity()
        steps += 1
        assert steps < most_steps, scheduler.describe()
    assert scheduler.blocks.used == 0
    assert scheduler.blocks.cpu_used == 0
    return steps


def answers(requests: Sequence[Request]) -> list[list[list[int]]]:
    """For each request the tokens of its samples, or of its beams, best first."""
    return [
        [answer.token_ids for answer in request.beams.answers]
        if request.beams
        else [sequence.output_ids for sequence in request.sequences]
        for request in requests
    ]
