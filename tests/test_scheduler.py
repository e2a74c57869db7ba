"""The scheduler's rules, by small scenarios and by random runs. No model, no torch."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmq.engine.blocks import BlockManager
from llmq.engine.options import EngineOptions
from llmq.engine.request import SamplingParams, Sequence
from llmq.engine.scheduler import Scheduler
from llmq.plan import SampledToken, StepPlan

EOS = 0
BLOCK = 16


def make_scheduler(blocks: int, *, seqs: int = 8, tokens: int = 64) -> Scheduler:
    """A scheduler over ``blocks`` usable blocks of 16 tokens."""
    return Scheduler(EngineOptions(seqs, tokens, BLOCK), BlockManager(blocks + 1, BLOCK), [EOS])


def make_sequence(number: int, prompt: int, new: int = 4) -> Sequence:
    return Sequence(number, list(range(1, prompt + 1)), SamplingParams(), seed=0, max_total=prompt + new)


def run(scheduler: Scheduler, plan: StepPlan, token: int = 7) -> None:
    scheduler.update(plan, [SampledToken(row.sequence_id, token, None) for row in plan.sampled_rows])


def taken(plan: StepPlan) -> dict[int, int]:
    return {row.sequence_id: len(row.tokens) for row in plan.rows}


def test_a_finished_sequence_leaves_and_a_waiting_one_enters_in_the_same_step() -> None:
    scheduler = make_scheduler(8, seqs=1)
    for number in (0, 1):
        scheduler.add(make_sequence(number, prompt=5, new=1))
    plan = scheduler.schedule()
    assert taken(plan) == {0: 5}
    run(scheduler, plan)
    assert taken(scheduler.schedule()) == {1: 5}


def test_a_prompt_longer_than_the_budget_is_computed_in_chunks_beside_the_tokens_of_others() -> None:
    scheduler = make_scheduler(16, tokens=10)
    scheduler.add(make_sequence(0, prompt=4))
    run(scheduler, scheduler.schedule())
    scheduler.add(make_sequence(1, prompt=25))
    chunks = []
    for _ in range(3):
        plan = scheduler.schedule()
        chunks.append(taken(plan))
        assert plan.num_tokens <= 10
        run(scheduler, plan)
    assert chunks == [{0: 1, 1: 9}, {0: 1, 1: 9}, {0: 1, 1: 7}]


def test_no_token_is_drawn_before_the_last_chunk_of_a_prompt() -> None:
    scheduler = make_scheduler(16, tokens=10)
    scheduler.add(make_sequence(0, prompt=25))
    drawn = []
    for _ in range(3):
        plan = scheduler.schedule()
        drawn.append(len(plan.sampled_rows))
        run(scheduler, plan)
    assert drawn == [0, 0, 1]


def test_running_sequences_are_served_before_waiting_ones_are_let_in() -> None:
    scheduler = make_scheduler(16, tokens=8)
    for number in range(3):
        scheduler.add(make_sequence(number, prompt=4))
    run(scheduler, scheduler.schedule())
    assert taken(scheduler.schedule()) == {0: 1, 1: 1, 2: 4}


def test_who_does_not_fit_waits_at_the_head_and_nobody_passes() -> None:
    scheduler = make_scheduler(3)
    scheduler.add(make_sequence(0, prompt=17))
    scheduler.add(make_sequence(1, prompt=30))
    scheduler.add(make_sequence(2, prompt=1))
    assert taken(scheduler.schedule()) == {0: 17}
    assert [sequence.sequence_id for sequence in scheduler.waiting] == [1, 2]


def test_when_blocks_run_out_the_newest_gives_its_own_back_and_keeps_its_tokens_and_its_place() -> None:
    scheduler = make_scheduler(3)
    old, new = make_sequence(0, prompt=16), make_sequence(1, prompt=31)
    scheduler.add(old)
    scheduler.add(new)
    scheduler.add(make_sequence(2, prompt=1))
    run(scheduler, scheduler.schedule())
    plan = scheduler.schedule()
    assert taken(plan) == {0: 1}
    assert scheduler.stats.preemptions == 1
    assert (new.output_ids, new.computed, new.block_table) == ([7], 0, [])
    assert scheduler.waiting[0] is new


def test_nobody_is_let_in_in_a_step_that_preempted() -> None:
    scheduler = make_scheduler(3)
    scheduler.add(make_sequence(0, prompt=16))
    scheduler.add(make_sequence(1, prompt=31))
    run(scheduler, scheduler.schedule())
    scheduler.add(make_sequence(2, prompt=1))
    assert taken(scheduler.schedule()) == {0: 1}


def test_a_preempted_sequence_is_computed_anew_with_what_it_had_produced() -> None:
    scheduler = make_scheduler(3)
    scheduler.add(make_sequence(0, prompt=16, new=3))
    scheduler.add(make_sequence(1, prompt=31, new=8))
    for _ in range(3):
        run(scheduler, scheduler.schedule())
    plan = scheduler.schedule()
    assert [(row.sequence_id, row.start, row.tokens[-1]) for row in plan.rows] == [(1, 0, 7)]
    assert len(plan.rows[0].tokens) == 32


@pytest.mark.parametrize("excess", [-1, 0, 1])
def test_a_sequence_at_a_block_boundary_owns_just_the_blocks_it_needs(excess: int) -> None:
    scheduler = make_scheduler(8)
    sequence = make_sequence(0, prompt=2 * BLOCK + excess)
    scheduler.add(sequence)
    scheduler.schedule()
    assert len(sequence.block_table) == (2 if excess <= 0 else 3)


def test_a_sequence_that_needs_the_whole_pool_runs_to_its_end() -> None:
    scheduler = make_scheduler(4)
    sequence = make_sequence(0, prompt=1, new=4 * BLOCK - 1)
    scheduler.add(sequence)
    while not scheduler.idle:
        run(scheduler, scheduler.schedule())
    assert sequence.finish_reason == "length"
    assert sequence.total == 4 * BLOCK


def test_a_sequence_that_the_pool_can_never_hold_is_not_queued() -> None:
    with pytest.raises(ValueError, match="65 tokens can never fit 64"):
        make_scheduler(4).add(make_sequence(0, prompt=1, new=4 * BLOCK))


def test_every_eos_token_ends_a_sequence_unless_it_is_ignored() -> None:
    scheduler = make_scheduler(4)
    ends = make_sequence(0, prompt=3)
    goes_on = Sequence(1, [1, 2], SamplingParams(ignore_eos=True), seed=0, max_total=9)
    scheduler.add(ends)
    scheduler.add(goes_on)
    run(scheduler, scheduler.schedule(), token=EOS)
    assert (ends.finish_reason, goes_on.finish_reason) == ("stop", None)


def test_ending_a_sequence_frees_everything_wherever_it_is() -> None:
    scheduler = make_scheduler(4, seqs=1)
    running, waiting = make_sequence(0, prompt=20), make_sequence(1, prompt=20)
    scheduler.add(running)
    scheduler.add(waiting)
    scheduler.schedule()
    for sequence in (running, waiting):
        scheduler.finish(sequence, "abort")
    assert scheduler.idle
    assert scheduler.blocks.used == 0
    scheduler.check_integrity()


def test_block_zero_is_never_handed_out() -> None:
    scheduler = make_scheduler(4)
    sequence = make_sequence(0, prompt=4 * BLOCK - 1, new=1)
    scheduler.add(sequence)
    scheduler.schedule()
    assert sorted(sequence.block_table) == [1, 2, 3, 4]


@given(
    prompts=st.lists(st.integers(1, 60), min_size=1, max_size=20),
    blocks=st.integers(4, 12),
    seqs=st.integers(1, 6),
    tokens=st.integers(1, 70),
    seed=st.integers(0, 999),
)
def test_under_any_pressure_every_sequence_ends_with_its_own_tokens_and_no_block_is_lost(
    prompts: list[int], blocks: int, seqs: int, tokens: int, seed: int
) -> None:
    """Each drawn token says whose it is and where it stands, so that a lost or doubled one shows."""
    scheduler = make_scheduler(blocks, seqs=seqs, tokens=tokens)
    chance = random.Random(seed)
    sequences = [make_sequence(number, prompt, new=4) for number, prompt in enumerate(prompts)]
    aborted = set()
    pending = list(sequences)
    steps = 0
    while pending or not scheduler.idle:
        for _ in range(chance.randint(0, 3)):
            if pending:
                scheduler.add(pending.pop(0))
        if scheduler.idle:
            continue
        plan = scheduler.schedule()
        assert 0 < plan.num_tokens <= tokens
        assert len(plan.rows) <= seqs
        for row in plan.rows:
            owner = sequences[row.sequence_id]
            assert row.tokens == tuple([*owner.prompt_ids, *owner.output_ids][row.start : row.end])
            assert len(row.block_table) * BLOCK >= row.end
        drawn = [
            SampledToken(row.sequence_id, 1000 * (row.sequence_id + 1) + row.end, None) for row in plan.sampled_rows
        ]
        scheduler.update(plan, drawn)
        scheduler.check_integrity()
        if chance.random() < 0.05:
            victim = chance.choice(sequences)
            if victim not in pending and victim.finish_reason is None:
                scheduler.finish(victim, "abort")
                aborted.add(victim.sequence_id)
        steps += 1
        assert steps < 10_000
    assert scheduler.blocks.used == 0
    for sequence in sequences:
        if sequence.sequence_id not in aborted:
            prompt = len(sequence.prompt_ids)
            expected = [1000 * (sequence.sequence_id + 1) + end for end in range(prompt, prompt + 4)]
            assert sequence.output_ids == expected
