"""The scheduler's rules, each as a small scenario with the decision it must come to. No model, no torch."""

from __future__ import annotations

import gc
import sys
import tracemalloc
from collections.abc import Callable
from types import FrameType
from typing import Any

import pytest
from simulated_model import (
    BLOCK,
    EOS,
    SimulatedModel,
    answers,
    drain,
    make_request,
    make_scheduler,
    run,
    step,
    taken,
)

from llmq.engine.request import Request
from llmq.engine.scheduler import Scheduler
from llmq.errors import LlmqError
from llmq.plan import SampledToken, StepOutput, StepPlan, TokenLogprobs


def ids(queue: list[Request]) -> list[object]:
    return [request.request_id for request in queue]


def add(scheduler: Scheduler, *requests: Request) -> tuple[Request, ...]:
    for request in requests:
        scheduler.add(request)
    return requests


# Continuous batching


def test_a_finished_request_leaves_and_a_waiting_one_enters_in_the_same_step() -> None:
    scheduler = make_scheduler(8, max_num_seqs=1)
    add(scheduler, make_request(0, 5, 1), make_request(1, 5, 1))
    assert step(scheduler) == {0: 5}
    assert step(scheduler) == {1: 5}


def test_a_prompt_longer_than_the_budget_is_computed_in_chunks_beside_the_tokens_of_others() -> None:
    scheduler = make_scheduler(16, max_num_batched_tokens=10)
    add(scheduler, make_request(0, 4))
    step(scheduler)
    add(scheduler, make_request(1, 25))
    assert [step(scheduler) for _ in range(3)] == [{0: 1, 1: 9}, {0: 1, 1: 9}, {0: 1, 1: 7}]


def test_no_token_is_drawn_before_the_last_chunk_of_a_prompt() -> None:
    scheduler = make_scheduler(16, max_num_batched_tokens=10)
    add(scheduler, make_request(0, 25))
    assert [len(run(scheduler).sampled_rows) for _ in range(3)] == [0, 0, 1]


def test_running_requests_are_served_before_waiting_ones_are_let_in() -> None:
    scheduler = make_scheduler(16, max_num_batched_tokens=8)
    add(scheduler, *(make_request(number, 4) for number in range(3)))
    step(scheduler)
    assert step(scheduler) == {0: 1, 1: 1, 2: 4}


def test_a_prompt_that_just_fills_the_budget_is_computed_in_one_step() -> None:
    scheduler = make_scheduler(16, max_num_batched_tokens=32)
    add(scheduler, make_request(0, 32))
    plan = scheduler.schedule()
    assert taken(plan, scheduler) == {0: 32}
    assert len(plan.sampled_rows) == 1


def test_next_tokens_come_before_the_chunks_of_an_older_prompt() -> None:
    scheduler = make_scheduler(16, max_num_batched_tokens=8, queue="priority")
    add(scheduler, make_request(0, 4, 20))
    step(scheduler)
    add(scheduler, make_request(1, 60, priority=-1))
    assert step(scheduler) == {0: 1, 1: 7}
    assert ids(scheduler.running) == [1, 0]
    assert step(scheduler) == {0: 1, 1: 7}


@pytest.mark.parametrize("excess", [-1, 0, 1])
def test_a_sequence_at_a_block_boundary_owns_just_the_blocks_it_needs(excess: int) -> None:
    scheduler = make_scheduler(8)
    (request,) = add(scheduler, make_request(0, 2 * BLOCK + excess))
    scheduler.schedule()
    assert len(request.live[0].tables[0]) == (2 if excess <= 0 else 3)


@pytest.mark.parametrize("prompt", [1, 15, 16, 17, 31, 32, 33, 47, 48, 49])
@pytest.mark.parametrize("new", [1, 15, 16, 17])
def test_any_length_around_a_block_boundary_runs_to_its_end(prompt: int, new: int) -> None:
    scheduler = make_scheduler(5)
    (request,) = add(scheduler, make_request(0, prompt, new))
    drain(scheduler, SimulatedModel(scheduler))
    assert len(request.sequences[0].output_ids) == new


def test_a_request_that_needs_the_whole_pool_runs_to_its_end() -> None:
    scheduler = make_scheduler(4)
    (request,) = add(scheduler, make_request(0, 1, 4 * BLOCK - 1))
    drain(scheduler, SimulatedModel(scheduler))
    assert (request.sequences[0].finish_reason, request.sequences[0].total) == ("length", 4 * BLOCK)
    assert scheduler.stats.preemptions == 0


def test_a_lone_request_grows_into_the_watermark_and_is_neither_evicted_nor_refused() -> None:
    scheduler = make_scheduler(10, watermark=0.5)
    (request,) = add(scheduler, make_request(0, 5 * BLOCK, 5 * BLOCK))
    drain(scheduler, SimulatedModel(scheduler))
    assert request.sequences[0].finish_reason == "length"
    assert scheduler.stats.preemptions == 0


def test_a_lone_request_that_was_preempted_comes_back_past_the_watermark() -> None:
    scheduler = make_scheduler(10, watermark=0.5)
    (request,) = add(scheduler, make_request(0, 9 * BLOCK, BLOCK))
    step(scheduler)
    step(scheduler)
    scheduler.pressure = lambda running: running[0] if scheduler.stats.preemptions == 0 else None
    model_free_steps = 0
    while not scheduler.idle:
        step(scheduler)
        model_free_steps += 1
        assert model_free_steps < 100
    assert request.sequences[0].finish_reason == "length"


def test_block_zero_is_never_handed_out() -> None:
    scheduler = make_scheduler(4)
    (request,) = add(scheduler, make_request(0, 4 * BLOCK - 1, 1))
    scheduler.schedule()
    assert sorted(request.live[0].tables[0]) == [1, 2, 3, 4]


def test_blocks_freed_in_an_update_are_used_in_the_next_step() -> None:
    scheduler = make_scheduler(2)
    add(scheduler, make_request(0, 31, 1), make_request(1, 31, 1))
    assert [step(scheduler), step(scheduler)] == [{0: 31}, {1: 31}]


def test_a_sequence_has_the_same_table_in_all_its_plans_which_grows_at_its_end() -> None:
    scheduler = make_scheduler(8)
    add(scheduler, make_request(0, 10, 20))
    seen: list[int] = []
    tables = []
    for _ in range(20):
        (table,) = run(scheduler).rows[0].block_tables
        assert list(table[: len(seen)]) == seen
        seen = list(table)
        tables.append(table)
    assert len(seen) == 2
    assert all(table is tables[0] for table in tables)


def work_of_a_cycle(context: int) -> tuple[list[int], list[int]]:
    """Bytecode instructions and bytes allocated by each of the steps in which four sequences fill a block."""
    scheduler = make_scheduler(4 * (context // BLOCK + 4), max_num_batched_tokens=4 * context)
    add(scheduler, *(make_request(number, context, 4 * BLOCK) for number in range(4)))
    for _ in range(BLOCK):
        run(scheduler)
    instructions: list[int] = []
    allocated: list[int] = []

    def count(frame: FrameType, event: str, _: object) -> Callable[..., object]:
        frame.f_trace_opcodes, frame.f_trace_lines = True, False
        instructions[-1] += event == "opcode"
        return count

    gc.disable()  # what others do after a collection, hypothesis for one, is no work of a step
    for _ in range(2 * BLOCK):
        instructions.append(0)
        tracemalloc.start()
        sys.settrace(count)
        try:
            run(scheduler)
        finally:
            sys.settrace(None)
            allocated.append(tracemalloc.get_traced_memory()[1])
            tracemalloc.stop()
    gc.enable()
    return instructions[BLOCK:], allocated[BLOCK:]  # Python 3.12 does not count all of the first one that it traces


def test_a_step_does_and_allocates_no_more_the_longer_the_contexts() -> None:
    (few, small), (many, large) = work_of_a_cycle(2 * BLOCK), work_of_a_cycle(1024 * BLOCK)
    assert many == few
    assert max(large) < max(small) + 4096  # four tables of 1,024 blocks are eight times that


# Ends


def test_every_end_token_ends_a_sequence_unless_it_is_ignored() -> None:
    scheduler = make_scheduler(4)
    ends, goes_on = add(scheduler, make_request(0, 3), make_request(1, 2, ignore_eos=True))
    step(scheduler, token=EOS)
    assert [ends.sequences[0].finish_reason, goes_on.sequences[0].finish_reason] == ["stop", None]


def test_a_stop_token_of_the_request_ends_it_and_nobody_else() -> None:
    scheduler = make_scheduler(4)
    own, other = add(scheduler, make_request(0, 3, stop_token_ids=(7,)), make_request(1, 3))
    step(scheduler, token=7)
    assert [own.sequences[0].finish_reason, other.sequences[0].finish_reason] == ["stop", None]


def test_until_min_tokens_the_tokens_that_end_are_banned() -> None:
    scheduler = make_scheduler(4)
    add(scheduler, make_request(0, 3, 9, min_tokens=2, stop_token_ids=(5,)))
    assert [run(scheduler).rows[0].banned for _ in range(3)] == [(0, 5), (0, 5), ()]


def test_an_abort_frees_everything_at_once_wherever_the_request_is() -> None:
    scheduler = make_scheduler(6, cpu_blocks=4, preemption="swap", max_num_seqs=2)
    add(scheduler, make_request(0, 20), make_request(1, 20), make_request(2, 20))
    step(scheduler)
    scheduler.pressure = lambda running: running[-1] if len(running) == 2 else None
    step(scheduler)
    assert [ids(queue) for queue in (scheduler.running, scheduler.waiting, scheduler.swapped)] == [[0], [2], [1]]
    for number in range(3):
        scheduler.abort(number)
        scheduler.check_integrity()
    assert scheduler.idle
    assert (scheduler.blocks.used, scheduler.blocks.cpu_used) == (0, 0)


def test_an_abort_while_a_step_runs_discards_what_it_drew() -> None:
    scheduler = make_scheduler(6)
    gone, stays = add(scheduler, make_request(0, 5), make_request(1, 5))
    plan = scheduler.schedule()
    scheduler.abort(0)
    scheduler.update(plan, StepOutput([SampledToken(row.sequence_id, 7, None) for row in plan.rows]))
    scheduler.check_integrity()
    assert (gone.sequences[0].output_ids, stays.sequences[0].output_ids) == ([], [7])


def test_aborting_an_unknown_request_changes_nothing() -> None:
    scheduler = make_scheduler(6)
    scheduler.abort("nobody")
    assert scheduler.idle


def test_an_aborted_request_leaves_its_seats_to_the_next() -> None:
    scheduler = make_scheduler(8, max_num_seqs=4)
    add(scheduler, make_request(0, 5, n=4), make_request(1, 5))
    assert step(scheduler) == {0: 5}
    scheduler.abort(0)
    assert step(scheduler) == {1: 5}


# Submission


def test_a_request_that_the_pool_can_never_hold_is_not_queued() -> None:
    with pytest.raises(ValueError, match="5 blocks and 1 sequences can never fit 4"):
        make_scheduler(4).add(make_request(0, 1, 4 * BLOCK))


def test_two_requests_with_one_id_are_refused() -> None:
    scheduler = make_scheduler(4)
    add(scheduler, make_request(0, 3))
    with pytest.raises(LlmqError, match="there is a request 0 already"):
        scheduler.add(make_request(0, 3))


def test_an_id_can_be_used_again_once_its_request_is_done() -> None:
    scheduler = make_scheduler(4)
    for _ in range(2):
        add(scheduler, make_request(0, 3, 1))
        step(scheduler)
    assert scheduler.idle


# Waiting: blocks, tokens, sequences


def test_who_does_not_fit_waits_at_the_head_and_nobody_passes() -> None:
    scheduler = make_scheduler(3)
    add(scheduler, make_request(0, 17), make_request(1, 30), make_request(2, 1))
    assert step(scheduler) == {0: 17}
    assert ids(scheduler.waiting) == [1, 2]
    assert (scheduler.stats.waits_blocks, scheduler.stats.waits_sequences) == (1, 0)


def test_the_watermark_keeps_new_requests_out_and_lets_running_ones_grow() -> None:
    scheduler = make_scheduler(10, watermark=0.3)
    add(scheduler, make_request(0, 6 * BLOCK, 3 * BLOCK), make_request(1, 2 * BLOCK))
    first = step(scheduler)
    assert first == {0: 64}
    for _ in range(2 * BLOCK + 2):
        step(scheduler)
    assert ids(scheduler.waiting) == [1]
    assert scheduler.blocks.available < 3


def test_a_request_that_leaves_just_the_watermark_free_is_let_in() -> None:
    scheduler = make_scheduler(10, watermark=0.3, max_num_batched_tokens=200)
    add(scheduler, make_request(0, 4 * BLOCK), make_request(1, 3 * BLOCK))
    assert set(step(scheduler)) == {0, 1}


def test_a_request_that_would_leave_one_block_less_than_the_watermark_waits() -> None:
    scheduler = make_scheduler(10, watermark=0.3, max_num_batched_tokens=200)
    add(scheduler, make_request(0, 4 * BLOCK), make_request(1, 3 * BLOCK + 1))
    assert set(step(scheduler)) == {0}


def test_the_step_s_tokens_bound_what_is_let_in() -> None:
    scheduler = make_scheduler(16, max_num_batched_tokens=8)
    add(scheduler, make_request(0, 8), make_request(1, 8))
    assert step(scheduler) == {0: 8}
    assert scheduler.stats.waits_tokens == 1


def test_the_seats_bound_what_is_let_in() -> None:
    scheduler = make_scheduler(16, max_num_seqs=2)
    add(scheduler, *(make_request(number, 4) for number in range(3)))
    assert step(scheduler) == {0: 4, 1: 4}
    assert scheduler.stats.waits_sequences == 1


def test_a_step_never_has_more_sequences_than_tokens() -> None:
    scheduler = make_scheduler(16, max_num_seqs=8, max_num_batched_tokens=3)
    add(scheduler, *(make_request(number, 1, 9) for number in range(8)))
    step(scheduler)
    assert step(scheduler) == {0: 1, 1: 1, 2: 1}


def test_a_request_counts_as_all_its_samples_from_the_moment_it_is_let_in() -> None:
    scheduler = make_scheduler(16, max_num_seqs=5)
    add(scheduler, make_request(0, 4, n=4), make_request(1, 4, n=2), make_request(2, 4))
    assert step(scheduler) == {0: 4}


def test_a_sample_that_ends_gives_its_seat_back() -> None:
    scheduler = make_scheduler(16, max_num_seqs=4)
    several, _ = add(scheduler, make_request(0, 4, 9, n=4), make_request(1, 4))
    step(scheduler)
    scheduler.finish(several.sequences[2], "stop")
    assert step(scheduler) == {0: 3, 1: 4}


def test_beams_keep_all_their_seats_to_the_end() -> None:
    scheduler = make_scheduler(16, max_num_seqs=4)
    add(scheduler, make_request(0, 4, 5, beam_width=4), make_request(1, 4))
    model = SimulatedModel(scheduler)
    for _ in range(5):
        plan = scheduler.schedule()
        assert set(taken(plan, scheduler)) == {0}
        scheduler.update(plan, model.run(plan))
    assert set(step(scheduler)) == {1}


@pytest.mark.parametrize(("skips", "passed"), [(0, []), (1, [2]), (2, [2, 3]), (5, [2, 3, 4])])
def test_smaller_requests_may_pass_one_that_does_not_fit_so_many_times(skips: int, passed: list[int]) -> None:
    scheduler = make_scheduler(6, max_skips=skips)
    add(scheduler, make_request(0, 17, 9), make_request(1, 5 * BLOCK), *(make_request(n, 1, 9) for n in (2, 3, 4)))
    assert list(step(scheduler)) == [0, *passed]
    assert scheduler.stats.skips == len(passed)


def test_once_passed_often_enough_the_head_of_the_line_is_next() -> None:
    scheduler = make_scheduler(6, max_skips=2)
    add(scheduler, make_request(0, 17, 3), make_request(1, 5 * BLOCK, 2), *(make_request(n, 1, 2) for n in range(2, 9)))
    order: list[object] = []
    while not scheduler.idle:
        for name in step(scheduler):
            if name not in order:
                order.append(name)
    assert order.index(1) == 3


# Preemption


def test_when_blocks_run_out_the_newest_gives_its_own_back_and_keeps_its_tokens_and_its_place() -> None:
    scheduler = make_scheduler(3)
    _, new, _ = add(scheduler, make_request(0, 16), make_request(1, 31), make_request(2, 1))
    step(scheduler)
    assert step(scheduler) == {0: 1}
    assert scheduler.stats.preemptions == 1
    sequence = new.live[0]
    assert (sequence.output_ids, sequence.computed, sequence.tables) == ([7], 0, ([],))
    assert ids(scheduler.waiting) == [1, 2]


def test_nobody_is_let_in_in_a_step_that_preempted() -> None:
    scheduler = make_scheduler(3)
    add(scheduler, make_request(0, 16), make_request(1, 31))
    step(scheduler)
    add(scheduler, make_request(2, 1))
    assert step(scheduler) == {0: 1}


def test_a_preempted_request_is_computed_anew_with_what_it_had_produced() -> None:
    scheduler = make_scheduler(3, prefix_caching=False)
    add(scheduler, make_request(0, 16, 3), make_request(1, 31, 8))
    for _ in range(3):
        step(scheduler)
    plan = scheduler.schedule()
    assert [(row.start, len(row.tokens), row.tokens[-1]) for row in plan.rows] == [(0, 32, 7)]


def test_with_the_prefix_cache_a_preempted_request_finds_what_is_still_there() -> None:
    scheduler = make_scheduler(4)
    requests = add(scheduler, make_request(0, 16, 3), make_request(1, 31, 8))
    step(scheduler)
    scheduler.pressure = lambda running: running[-1] if scheduler.stats.preemptions == 0 else None
    step(scheduler)
    plan = scheduler.schedule()
    assert (plan.rows[1].start, len(plan.rows[1].tokens)) == (16, 16)
    assert requests[1].cached_tokens == 0, "of its prompt nothing was there before it came"


def test_the_oldest_request_is_never_preempted_for_another() -> None:
    scheduler = make_scheduler(6)
    requests = add(scheduler, *(make_request(number, 16, 40) for number in range(5)))
    model = SimulatedModel(scheduler)
    while not scheduler.idle:
        oldest = next(request for request in requests if request.live)
        before = oldest.live[0].computed
        plan = scheduler.schedule()
        scheduler.update(plan, model.run(plan))
        assert not oldest.live or oldest.live[0].computed > before


def test_requests_end_in_the_order_of_arrival_however_often_they_are_preempted() -> None:
    scheduler = make_scheduler(5)
    requests = add(scheduler, *(make_request(number, 20, 40) for number in range(6)))
    ended: list[object] = []
    model = SimulatedModel(scheduler)
    while not scheduler.idle:
        plan = scheduler.schedule()
        ended += ids(scheduler.update(plan, model.run(plan)).finished)
    assert ended == ids(list(requests))
    assert scheduler.stats.preemptions > 0


def test_one_sequence_is_recomputed_and_several_are_swapped() -> None:
    scheduler = make_scheduler(20, cpu_blocks=20)
    add(scheduler, make_request(0, 20, 9, n=2), make_request(1, 20, 9))
    step(scheduler)
    scheduler.pressure = lambda running: running[-1]
    step(scheduler)
    step(scheduler)
    assert [ids(queue) for queue in (scheduler.running, scheduler.waiting, scheduler.swapped)] == [[], [1], [0]]


@pytest.mark.parametrize(("preemption", "swapped"), [("recompute", 0), ("swap", 2), ("auto", 1)])
def test_the_user_s_way_of_preempting_wins(preemption: str, swapped: int) -> None:
    scheduler = make_scheduler(20, cpu_blocks=20, preemption=preemption)
    add(scheduler, make_request(0, 20, 9, n=2), make_request(1, 20, 9))
    step(scheduler)
    scheduler.pressure = lambda running: running[-1]
    step(scheduler)
    step(scheduler)
    assert scheduler.stats.swapped_out == swapped


def test_the_swapped_come_back_before_anybody_waiting_is_let_in() -> None:
    scheduler = make_scheduler(20, cpu_blocks=20, preemption="swap", max_num_seqs=2)
    add(scheduler, make_request(0, 20, 9), make_request(1, 20, 9), make_request(2, 20, 9))
    step(scheduler)
    scheduler.pressure = lambda running: running[-1] if scheduler.stats.preemptions == 0 else None
    assert step(scheduler) == {0: 1}
    assert step(scheduler) == {0: 1, 1: 1}


def test_while_somebody_is_swapped_and_does_not_fit_nobody_is_let_in() -> None:
    scheduler = make_scheduler(4, cpu_blocks=20, preemption="swap")
    add(scheduler, make_request(0, 31, 20), make_request(1, 31, 20), make_request(2, 1))
    step(scheduler)
    while not scheduler.swapped:
        step(scheduler)
    assert ids(scheduler.waiting) == [2]
    assert step(scheduler) == {0: 1}


def test_no_step_swaps_both_in_and_out() -> None:
    scheduler = make_scheduler(8, cpu_blocks=20, preemption="swap", prefix_caching=False)
    add(scheduler, *(make_request(number, 20, 40) for number in range(6)))
    model = SimulatedModel(scheduler)
    while not scheduler.idle:
        plan = scheduler.schedule()
        assert not (plan.swap_in and plan.swap_out)
        scheduler.update(plan, model.run(plan))
    assert scheduler.stats.swapped_in == scheduler.stats.swapped_out > 0


def test_when_main_memory_is_full_too_the_request_is_computed_anew() -> None:
    scheduler = make_scheduler(20, cpu_blocks=3, preemption="swap")
    add(scheduler, *(make_request(number, 20, 9) for number in range(3)))
    step(scheduler)
    scheduler.pressure = lambda running: running[-1] if len(running) > 1 else None
    step(scheduler)
    step(scheduler)
    assert [ids(scheduler.swapped), ids(scheduler.waiting)] == [[2], [1]]


def test_samples_that_are_computed_anew_come_back_one_by_one_and_share_their_prompt_again() -> None:
    scheduler = make_scheduler(12, preemption="recompute", prefix_caching=False)
    (request,) = add(scheduler, make_request(0, 50, 20, n=3))
    model = SimulatedModel(scheduler)
    for _ in range(4):
        plan = scheduler.schedule()
        scheduler.update(plan, model.run(plan))
    used = scheduler.blocks.used
    assert used == 3 + 3
    scheduler.pressure = lambda running: running[-1] if scheduler.stats.preemptions == 0 else None
    behind: list[int] = []
    while not behind or behind[-1]:
        plan = scheduler.schedule()
        scheduler.update(plan, model.run(plan))
        behind.append(sum(sequence.computed == 0 for sequence in request.live))
    assert behind == [3, 2, 1, 0]
    assert scheduler.blocks.used == used
    drain(scheduler, model)


def test_a_half_computed_prompt_can_be_swapped_and_goes_on_where_it_was() -> None:
    scheduler = make_scheduler(20, cpu_blocks=20, preemption="swap", max_num_batched_tokens=10)
    add(scheduler, make_request(0, 50))
    model = SimulatedModel(scheduler)
    starts = []
    scheduler.pressure = lambda running: running[-1] if scheduler.stats.steps == 2 else None
    for _ in range(4):
        plan = scheduler.schedule()
        starts += [row.start for row in plan.rows]
        scheduler.update(plan, model.run(plan))
    assert starts == [0, 10, 20]
    drain(scheduler, model)


def test_a_swapped_request_keeps_what_its_samples_share() -> None:
    scheduler = make_scheduler(20, cpu_blocks=20, prefix_caching=False)
    add(scheduler, make_request(0, 40, 30, n=4))
    model = SimulatedModel(scheduler)
    for _ in range(3):
        plan = scheduler.schedule()
        scheduler.update(plan, model.run(plan))
    before = scheduler.blocks.used
    scheduler.pressure = lambda running: running[-1] if scheduler.stats.preemptions == 0 else None
    plan = scheduler.schedule()
    scheduler.update(plan, model.run(plan))
    assert (len(plan.swap_out), scheduler.blocks.used, scheduler.blocks.cpu_used) == (before, 0, before)
    plan = scheduler.schedule()
    assert (len(plan.swap_in), scheduler.blocks.used) == (before, before)
    scheduler.update(plan, model.run(plan))
    drain(scheduler, model)


# Prefill first


def test_prefill_first_makes_a_step_of_prompts_or_of_next_tokens() -> None:
    scheduler = make_scheduler(20, scheduler="prefill-first")
    add(scheduler, make_request(0, 10))
    assert step(scheduler) == {0: 10}
    add(scheduler, make_request(1, 10), make_request(2, 10))
    assert step(scheduler) == {1: 10, 2: 10}
    assert step(scheduler) == {0: 1, 1: 1, 2: 1}


def test_prefill_first_lets_in_whole_prompts_only() -> None:
    scheduler = make_scheduler(20, scheduler="prefill-first", max_num_batched_tokens=24)
    add(scheduler, make_request(0, 10), make_request(1, 15))
    assert step(scheduler) == {0: 10}
    assert scheduler.stats.waits_tokens == 1


@pytest.mark.parametrize("most", [1, 2, 4])
def test_prefill_first_decodes_after_so_many_prompt_steps(most: int) -> None:
    scheduler = make_scheduler(
        200, scheduler="prefill-first", max_prefill_steps=most, max_num_batched_tokens=10, max_num_seqs=10
    )
    add(scheduler, *(make_request(number, 10, 30) for number in range(9)))
    kinds = "".join("d" if 0 in step(scheduler) else "p" for _ in range(12))[1:]
    assert kinds.startswith("p" * (most - 1) + "d")
    assert "p" * (most + 1) not in kinds


def test_prefill_first_recomputes_in_chunks_what_has_grown_longer_than_a_step() -> None:
    scheduler = make_scheduler(20, scheduler="prefill-first", max_num_batched_tokens=16, prefix_caching=False)
    (request,) = add(scheduler, make_request(0, 15, 30))
    model = SimulatedModel(scheduler)
    scheduler.pressure = lambda running: running[-1] if scheduler.stats.steps == 10 else None
    drain(scheduler, model)
    assert len(request.sequences[0].output_ids) == 30


def test_delay_factor_holds_prompts_back_for_a_multiple_of_the_last_prompt_step() -> None:
    now = [0.0]
    scheduler = make_scheduler(20, scheduler="prefill-first", delay_factor=2.0, clock=lambda: now[0])
    add(scheduler, make_request(0, 10, 50))
    plan = scheduler.schedule()
    now[0] = 1.0
    scheduler.update(plan, StepOutput([SampledToken(plan.rows[0].sequence_id, 7, None)]))
    add(scheduler, make_request(1, 10))
    for at, expected in ((2.0, {0: 1}), (3.0, {0: 1}), (3.1, {1: 10})):
        now[0] = at
        assert step(scheduler) == expected


def test_delay_factor_holds_nothing_back_while_nothing_runs() -> None:
    scheduler = make_scheduler(20, scheduler="prefill-first", delay_factor=100.0)
    add(scheduler, make_request(0, 10))
    assert step(scheduler) == {0: 10}


# No starvation


@pytest.mark.parametrize(
    ("options", "bound"),
    [
        ({"scheduler": "mixed"}, 1),
        ({"scheduler": "mixed", "max_num_batched_tokens": 4}, 1),
        ({"scheduler": "prefill-first", "max_prefill_steps": 1}, 2),
        ({"scheduler": "prefill-first", "max_prefill_steps": 4}, 5),
        ({"scheduler": "prefill-first", "max_prefill_steps": 3, "delay_factor": 1.0}, 4),
    ],
    ids=str,
)
def test_under_an_endless_stream_of_prompts_everybody_gets_a_token_every_k_steps(
    options: dict[str, object], bound: int
) -> None:
    scheduler = make_scheduler(400, **options)
    waited: dict[object, int] = {}
    ended = 0
    for number in range(600):
        for prompt in (3, 4):
            add(scheduler, make_request((number, prompt).__hash__() % 10**9, [1] * prompt, 12))
        plan = scheduler.schedule()
        drawn = {
            sequence.request.request_id
            for row, sequence in zip(plan.rows, scheduler._flights[-1].sequences, strict=True)
            if row.sampling
        }
        for request in scheduler.running:
            if request.live[0].num_output:
                waited[request.request_id] = 0 if request.request_id in drawn else waited[request.request_id] + 1
                assert waited[request.request_id] < bound
        output = StepOutput([SampledToken(row.sequence_id, 7, None) for row in plan.sampled_rows])
        progress = scheduler.update(plan, output)
        waited |= dict.fromkeys(drawn, 0)
        ended += len(progress.finished)
    assert ended > 100


def test_five_thousand_requests_pass_through_a_pool_of_32_blocks() -> None:
    scheduler = make_scheduler(32, cpu_blocks=8, max_num_seqs=16, watermark=0.01)
    requests = add(scheduler, *(make_request(number, 1 + number * 37 % 40, 1 + number % 5) for number in range(5000)))
    model = SimulatedModel(scheduler)
    while not scheduler.idle:
        plan = scheduler.schedule()
        scheduler.update(plan, model.run(plan))
    scheduler.check_integrity()
    assert scheduler.blocks.used == 0
    assert all(len(request.sequences[0].output_ids) == 1 + number % 5 for number, request in enumerate(requests))


def test_a_scheduler_that_makes_no_progress_raises_and_shows_its_state() -> None:
    scheduler = make_scheduler(4)
    add(scheduler, make_request(0, 20))
    scheduler.blocks._free.clear()
    with pytest.raises(RuntimeError, match=r"no progress\n(.|\n)*0 of 4 free(.|\n)*waiting: request 0"):
        scheduler.schedule()


# Priority


def test_by_priority_the_most_urgent_is_let_in_first_and_preempted_last() -> None:
    scheduler = make_scheduler(20, max_num_seqs=2, queue="priority")
    add(scheduler, *(make_request(number, 4, 9, priority=priority) for number, priority in enumerate((1, 0, -1))))
    assert list(step(scheduler)) == [2, 1]
    scheduler.pressure = lambda running: running[-1]
    step(scheduler)
    assert ids(scheduler.waiting) == [1, 0]


def test_first_come_first_served_ignores_priority() -> None:
    scheduler = make_scheduler(20, max_num_seqs=1)
    add(scheduler, make_request(0, 4, priority=5), make_request(1, 4, priority=-5))
    assert list(step(scheduler)) == [0]


def test_who_has_waited_ageing_steps_is_as_urgent_as_one_level_more() -> None:
    scheduler = make_scheduler(20, max_num_seqs=1, queue="priority", ageing_steps=3)
    add(scheduler, make_request(0, 4, 50), make_request(1, 4, priority=1))
    for _ in range(2):
        step(scheduler)
    add(scheduler, make_request(2, 4))
    assert ids(scheduler.waiting) == [2, 1]
    step(scheduler)
    step(scheduler)
    add(scheduler, make_request(3, 4))
    assert ids(scheduler.waiting) == [2, 1, 3]


# Whatever the pressure, the same answers


WORLDS = [
    {},
    {"max_num_batched_tokens": 8},
    {"max_num_batched_tokens": 9},
    {"prefix_caching": False},
    {"preemption": "recompute"},
    {"preemption": "swap", "cpu_blocks": 50},
    {"preemption": "swap", "cpu_blocks": 4},
    {"scheduler": "prefill-first"},
    {"scheduler": "prefill-first", "max_prefill_steps": 1, "preemption": "swap", "cpu_blocks": 50},
    {"max_skips": 3},
    {"queue": "priority"},
    {"windows": (20,)},
    {"windows": (None, 20, 40)},
    {"windows": (None, 20), "preemption": "swap", "cpu_blocks": 60},
]


def mixture(backwards: bool = False) -> list[Request]:
    lengths = [1, 15, 16, 17, 31, 33, 5, 20]
    kinds: list[dict[str, object]] = [{}, {"n": 3}, {"beam_width": 2}, {"n": 2}, {}, {}, {"beam_width": 3}, {}]
    requests = [
        make_request(number, length, 24, **kind)
        for number, (length, kind) in enumerate(zip(lengths, kinds, strict=True))
    ]
    return requests[::-1] if backwards else requests


@pytest.mark.parametrize("backwards", [False, True], ids=["in order", "backwards"])
@pytest.mark.parametrize("world", WORLDS, ids=str)
def test_no_setting_and_no_pressure_changes_an_answer(world: dict[str, object], backwards: bool) -> None:
    large = make_scheduler(2000, max_num_batched_tokens=2000, max_num_seqs=100)
    expected = add(large, *mixture())
    drain(large, SimulatedModel(large))
    groups = len(world.get("windows", (None,)))  # type: ignore[arg-type]
    small = make_scheduler(12 * groups, **world)  # type: ignore[arg-type]
    found = add(small, *mixture(backwards))
    drain(small, SimulatedModel(small))
    assert answers(found[::-1] if backwards else found) == answers(expected)
    assert small.stats.preemptions > 0


# A step ahead


def drawn(plan: StepPlan, *tokens: int) -> StepOutput:
    rows = zip(plan.sampled_rows, tokens, strict=True)
    return StepOutput([SampledToken(row.sequence_id, token, None) for row, token in rows])


def test_a_step_is_planned_before_the_tokens_of_the_last_one_are_known() -> None:
    scheduler = make_scheduler(20)
    for number in range(3):
        scheduler.add(make_request(number, 5 + number, 3))
    first = scheduler.schedule()
    scheduler.presume(first)
    second = scheduler.schedule()
    assert [(row.start, row.tokens) for row in second.rows] == [(5, (-1,)), (6, (-2,)), (7, (-3,))]
    progress = scheduler.update(first, drawn(first, 11, 12, 13))
    assert [sequence.output_ids for sequence in progress.extended] == [[11], [12], [13]]
    scheduler.update(second, drawn(second, 21, 22, 23))
    assert [request.live[0].output_ids for request in scheduler.running] == [[11, 21], [12, 22], [13, 23]]


def test_what_ends_by_length_is_in_no_step_too_many_and_leaves_its_room_while_its_last_step_runs() -> None:
    scheduler = make_scheduler(20, max_num_seqs=1)
    scheduler.add(make_request(0, 5, 1))
    scheduler.add(make_request(1, 5, 1))
    first = scheduler.schedule()
    scheduler.presume(first)
    second = scheduler.schedule()
    assert [row.tokens[0] > 0 for row in second.rows] == [True]  # the other request's prompt
    scheduler.presume(second)
    assert not scheduler.has_work
    assert scheduler.blocks.used == 0
    assert [len(scheduler.update(plan, drawn(plan, 9)).finished) for plan in (first, second)] == [1, 1]
    assert scheduler.idle


def test_what_a_stop_token_has_ended_draws_once_more_for_nobody() -> None:
    scheduler = make_scheduler(20)
    scheduler.add(make_request(0, 5, 9))
    first = scheduler.schedule()
    scheduler.presume(first)
    second = scheduler.schedule()
    (sequence,) = scheduler.update(first, drawn(first, EOS)).extended
    assert scheduler.idle
    assert scheduler.blocks.used == 0
    assert scheduler.update(second, drawn(second, 7)).extended == []
    assert (sequence.output_ids, sequence.finish_reason) == ([EOS], "stop")


@pytest.mark.parametrize("preemption", ["recompute", "swap"])
def test_scores_of_a_prompt_are_kept_unless_it_is_to_start_over(preemption: str) -> None:
    scheduler = make_scheduler(20, cpu_blocks=20, preemption=preemption, max_num_batched_tokens=8)
    request = make_request(0, 20, 2, prompt_logprobs=0)
    scheduler.add(request)
    first = scheduler.schedule()
    scheduler.presume(first)
    scheduler.pressure = lambda running: request
    scheduler.schedule()
    scores = [TokenLogprobs(-1.0, ())] * 8
    scheduler.update(first, StepOutput((), [(first.rows[0].sequence_id, scores)]))
    assert request.prompt_logprobs == (scores if preemption == "swap" else [])


@pytest.mark.parametrize(
    ("kind", "waits"),
    [
        ({"beam_width": 2}, [True, True, True]),
        ({"n": 2}, [True, False, False]),
        ({"presence_penalty": 0.5, "min_tokens": 2, "prompt_logprobs": 0}, [False, False, False]),
    ],
    ids=str,
)
def test_only_a_step_whose_tokens_decide_what_the_next_one_computes_is_waited_for(
    kind: dict[str, Any], waits: list[bool]
) -> None:
    scheduler = make_scheduler(20, max_num_batched_tokens=8)
    model = SimulatedModel(scheduler)
    scheduler.add(make_request(0, 5, 5))
    scheduler.add(make_request(1, 8, 3, **kind))
    found = []
    while not scheduler.idle:
        assert scheduler.foresees
        plan = scheduler.schedule()
        found.append(not scheduler.foresees)
        scheduler.update(plan, model.run(plan))
    assert found[:5] == [False, *waits, False]  # the prompt of the second is in two steps
