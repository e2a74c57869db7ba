"""Blocks: who owns them, who shares them, what is copied, what is remembered. No model, no scheduler."""

from __future__ import annotations

from itertools import count

import pytest
from simulated_model import BLOCK, make_request

from llmq.engine.blocks import BlockManager, Moves
from llmq.engine.prefix_cache import PrefixCache
from llmq.engine.request import Request, Sequence, first_sequence, fork_sequence
from llmq.plan import layer_groups

NUMBERS = count()


def start(blocks: BlockManager, prompt: int | list[int], **params: object) -> tuple[Request, Sequence]:
    """A request that has its blocks and has computed its prompt."""
    number = next(NUMBERS)
    request = make_request(number, prompt, 50, **params)
    sequence = first_sequence(request, number, len(blocks.windows))
    request.sequences, request.live = [sequence], [sequence]
    blocks.admit(sequence)
    compute(blocks, sequence)
    return request, sequence


def compute(blocks: BlockManager, sequence: Sequence) -> None:
    sequence.computed = sequence.total
    blocks.computed(sequence)


def fork(blocks: BlockManager, parent: Sequence, times: int = 1) -> list[Sequence]:
    request = parent.request
    for _ in range(times):
        child = fork_sequence(parent, next(NUMBERS), len(request.live))
        blocks.fork(parent, child)
        request.live.append(child)
    request.sequences = list(request.live)
    return request.live[-times:]


def append(blocks: BlockManager, request: Request, token: int = 7) -> Moves:
    """A token for every sequence, the last one different for each, and its place in the cache."""
    for place, sequence in enumerate(request.live):
        sequence.token_ids.append(token + place)
    assert blocks.missing(request) <= blocks.available
    before, missing = blocks.available, blocks.missing(request)
    moves = blocks.grow(request)
    assert before - blocks.available == missing
    for sequence in request.live:
        compute(blocks, sequence)
    blocks.check_integrity([request])
    return moves


# Tables


@pytest.mark.parametrize(("tokens", "owned"), [(1, 1), (15, 1), (16, 1), (17, 2), (32, 2), (33, 3)])
def test_a_sequence_owns_the_blocks_that_its_tokens_fill(tokens: int, owned: int) -> None:
    blocks = BlockManager(10, BLOCK)
    _, sequence = start(blocks, tokens)
    assert (len(sequence.tables[0]), blocks.used) == (owned, owned)


def test_the_reserved_block_is_never_handed_out() -> None:
    blocks = BlockManager(4, BLOCK)
    _, sequence = start(blocks, 3 * BLOCK)
    assert sorted(sequence.tables[0]) == [1, 2, 3]


def test_a_table_grows_when_its_last_block_is_full_and_not_before() -> None:
    blocks = BlockManager(10, BLOCK)
    request, sequence = start(blocks, 15)
    lengths = []
    for _ in range(18):
        append(blocks, request)
        lengths.append(len(sequence.tables[0]))
    assert lengths == [1] + [2] * 16 + [3]


def test_what_is_released_can_be_had_again() -> None:
    blocks = BlockManager(3, BLOCK, prefix_caching=False)
    _, sequence = start(blocks, 30)
    blocks.release(sequence)
    assert blocks.available == 2
    start(blocks, 30)


# Forks and copies


def test_a_fork_allocates_nothing() -> None:
    blocks = BlockManager(10, BLOCK)
    request, parent = start(blocks, 40)
    before = blocks.used
    (child,) = fork(blocks, parent)
    assert blocks.used == before
    assert child.tables == parent.tables
    assert child.tables[0] is not parent.tables[0]
    blocks.check_integrity([request])


@pytest.mark.parametrize("sharers", [2, 3, 5])
def test_k_sharers_of_a_partly_filled_block_cost_k_minus_one_copies(sharers: int) -> None:
    blocks = BlockManager(20, BLOCK)
    request, parent = start(blocks, 20)
    last = parent.tables[0][-1]
    fork(blocks, parent, sharers - 1)
    moves = append(blocks, request)
    assert [source for source, _ in moves] == [last] * (sharers - 1)
    assert len({sequence.tables[0][-1] for sequence in request.live}) == sharers
    assert request.live[-1].tables[0][-1] == last


def test_the_next_token_costs_no_more_copies() -> None:
    blocks = BlockManager(20, BLOCK)
    request, parent = start(blocks, 20)
    fork(blocks, parent, 2)
    append(blocks, request)
    assert append(blocks, request) == []


def test_sharers_of_full_blocks_only_are_given_new_ones_and_copy_nothing() -> None:
    blocks = BlockManager(20, BLOCK)
    request, parent = start(blocks, 32)
    fork(blocks, parent, 3)
    assert append(blocks, request) == []
    assert blocks.used == 2 + 4


def test_a_sharer_that_leaves_before_the_others_write_saves_a_copy() -> None:
    blocks = BlockManager(20, BLOCK)
    request, parent = start(blocks, 20)
    _, second = fork(blocks, parent, 2)
    blocks.release(second)
    request.live.remove(second)
    assert len(append(blocks, request)) == 1


def test_releasing_one_of_two_sharers_frees_nothing_that_the_other_needs() -> None:
    blocks = BlockManager(20, BLOCK)
    request, parent = start(blocks, 40)
    (child,) = fork(blocks, parent)
    blocks.release(parent)
    request.live.remove(parent)
    assert blocks.used == 3
    blocks.check_integrity([request])
    blocks.release(child)
    assert blocks.used == 0


# Prefix cache


def test_a_prompt_that_begins_alike_finds_the_full_blocks_of_the_first() -> None:
    blocks = BlockManager(20, BLOCK)
    _, first = start(blocks, [1] * 40 + [2])
    _, second = start(blocks, [1] * 40 + [3])
    assert second.tables[0][:2] == first.tables[0][:2]
    assert second.tables[0][2] != first.tables[0][2]
    assert blocks.used == 4
    assert (blocks.prefix_stats.queries, blocks.prefix_stats.hits) == (82, 32)


def test_a_prompt_that_differs_early_shares_nothing_however_alike_it_goes_on() -> None:
    blocks = BlockManager(20, BLOCK)
    start(blocks, [1] * 48)
    _, second = start(blocks, [2] + [1] * 47)
    assert blocks.prefix_stats.hits == 0
    assert len(set(second.tables[0])) == 3


@pytest.mark.parametrize(("tokens", "found"), [(16, 0), (17, 16), (32, 16), (33, 32), (48, 32)])
def test_a_prompt_found_whole_computes_its_last_token_in_a_block_of_its_own(tokens: int, found: int) -> None:
    blocks = BlockManager(20, BLOCK)
    _, first = start(blocks, [1] * tokens)
    request = make_request(1, [1] * tokens)
    second = first_sequence(request, 1, 1)
    blocks.admit(second)
    assert second.computed == found
    assert second.tables[0][-1] not in first.tables[0]


def test_what_a_request_leaves_behind_is_found_by_the_next() -> None:
    blocks = BlockManager(20, BLOCK)
    _, first = start(blocks, [1] * 40)
    kept = first.tables[0][:2]
    blocks.release(first)
    assert (blocks.used, blocks.cached) == (0, 2)
    _, second = start(blocks, [1] * 40)
    assert second.tables[0][:2] == kept


def test_generated_tokens_are_found_like_those_of_a_prompt() -> None:
    blocks = BlockManager(20, BLOCK)
    request, first = start(blocks, [1] * 10)
    for _ in range(10):
        append(blocks, request, token=5)
    _, second = start(blocks, [1] * 10 + [5] * 10)
    assert second.tables[0][0] == first.tables[0][0]


def test_nothing_is_found_before_it_is_known_to_be_written() -> None:
    blocks = BlockManager(20, BLOCK)
    for number in (0, 1):
        request = make_request(number, [1] * 40)
        sequence = first_sequence(request, number, 1)
        blocks.admit(sequence)
        assert sequence.computed == 0


def test_blocks_that_nobody_knows_go_before_those_that_are_remembered() -> None:
    blocks = BlockManager(6, BLOCK)
    _, first = start(blocks, [1] * 32)
    blocks.release(first)
    start(blocks, [2] * 40)
    assert blocks.cached == 2 + 2


def test_the_least_recently_used_is_forgotten_first_and_of_a_prompt_its_end() -> None:
    blocks = BlockManager(5, BLOCK)
    _, old = start(blocks, [1] * 32)
    blocks.release(old)
    _, young = start(blocks, [2] * 32)
    blocks.release(young)
    start(blocks, [3] * 10)
    _, again = start(blocks, [1] * 33)
    assert blocks.prefix_stats.hits == 16
    assert again.computed == 33


def test_being_found_makes_a_block_recently_used() -> None:
    blocks = BlockManager(6, BLOCK)
    for prompt in ([1] * 20, [2] * 20, [1] * 20):
        _, sequence = start(blocks, prompt)
        blocks.release(sequence)
    _, sequence = start(blocks, [3] * 60)
    blocks.release(sequence)
    before = blocks.prefix_stats.hits
    start(blocks, [1] * 20)
    assert blocks.prefix_stats.hits - before == 16


def test_what_follows_a_forgotten_block_is_not_found_although_it_is_there() -> None:
    cache = PrefixCache(1)
    first = cache.enter(None, (1,))
    cache.put(first, 0, 4)
    second = cache.enter(first, (2,))
    cache.put(second, 0, 5)
    cache.forget(4)
    assert cache.find(None, (1,)) is None
    again = cache.enter(None, (1,))
    cache.put(again, 0, 6)
    assert cache.find(again, (2,)) is None
    assert 5 in cache


def test_of_two_blocks_with_one_content_the_one_in_use_is_remembered() -> None:
    blocks = BlockManager(20, BLOCK)
    pair = [first_sequence(make_request(number, [1] * 40), number, 1) for number in (0, 1)]
    for sequence in pair:
        sequence.request.live = [sequence]
        blocks.admit(sequence)
    compute(blocks, pair[0])
    blocks.release(pair[0])
    compute(blocks, pair[1])
    _, third = start(blocks, [1] * 40)
    assert third.tables[0][:2] == pair[1].tables[0][:2]
    blocks.check_integrity([pair[1].request, third.request])


def test_without_the_prefix_cache_nothing_is_remembered() -> None:
    blocks = BlockManager(20, BLOCK, prefix_caching=False)
    start(blocks, [1] * 40)
    _, second = start(blocks, [1] * 40)
    assert (blocks.used, blocks.cached, blocks.prefix_stats.queries) == (6, 0, 0)
    assert second.total == 40


def test_a_request_that_scores_its_prompt_finds_nothing_but_leaves_something() -> None:
    blocks = BlockManager(20, BLOCK)
    start(blocks, [1] * 40, prompt_logprobs=0)
    request = make_request(5, [1] * 40, prompt_logprobs=0)
    sequence = first_sequence(request, 5, 1)
    blocks.admit(sequence)
    assert sequence.computed == 0
    _, plain = start(blocks, [1] * 40)
    assert blocks.prefix_stats.hits == 32
    assert plain.total == 40


# Layer groups and windows


def test_layers_are_grouped_by_window_into_groups_of_one_size() -> None:
    assert [group.layers for group in layer_groups((None,) * 3)] == [(0, 1, 2)]
    mixed = layer_groups((None, 8, None, None, 8, None))
    assert [(group.window, group.layers) for group in mixed] == [(None, (0, 2)), (None, (3, 5)), (8, (1, 4))]


def test_every_group_has_a_table_of_its_own() -> None:
    blocks = BlockManager(20, BLOCK, windows=(None, 32))
    _, sequence = start(blocks, 20)
    full, sliding = sequence.tables
    assert not set(full) & set(sliding)
    assert blocks.used == 4


def test_a_window_s_group_gives_back_what_no_later_query_sees_and_the_others_nothing() -> None:
    blocks = BlockManager(40, BLOCK, windows=(None, 20))
    request, sequence = start(blocks, 16)
    owned = []
    for _ in range(60):
        append(blocks, request)
        owned.append(sum(map(bool, sequence.tables[1])))
    assert max(owned) <= 3
    assert len(sequence.tables[0]) == len(sequence.tables[1]) == 5
    assert all(sequence.tables[0])
    # the next query is at 76 and sees from 57 on: the blocks before 48 are gone
    assert [bool(block) for block in sequence.tables[1]] == [False, False, False, True, True]


@pytest.mark.parametrize("window", [1, 15, 16, 17, 31, 32, 33])
def test_a_block_is_kept_as_long_as_its_last_token_is_seen(window: int) -> None:
    blocks = BlockManager(40, BLOCK, windows=(window,))
    request, sequence = start(blocks, 1)
    for _ in range(70):
        append(blocks, request)
        first_seen = max(0, sequence.computed - window + 1)
        for index, block in enumerate(sequence.tables[0]):
            assert bool(block) == ((index + 1) * BLOCK > first_seen)


def test_behind_a_window_a_prefix_is_found_where_all_that_is_still_seen_is_there() -> None:
    blocks = BlockManager(40, BLOCK, windows=(None, 20))
    _, first = start(blocks, [1] * 70)
    _, second = start(blocks, [1] * 70)
    assert blocks.prefix_stats.hits == 64
    assert second.tables[0][:4] == first.tables[0][:4]


# Swap


def test_a_request_is_swapped_out_block_by_block_and_comes_back() -> None:
    blocks = BlockManager(20, BLOCK, cpu_blocks=10, prefix_caching=False)
    request, sequence = start(blocks, 40)
    before = list(sequence.tables[0])
    moves = blocks.swap_out(request)
    request.swapped = True
    assert moves is not None
    assert [here for here, _ in moves] == before
    assert (blocks.used, blocks.cpu_used) == (0, 3)
    blocks.check_integrity([request])
    assert blocks.swap_in_cost(request) == 3
    back = blocks.swap_in(request)
    request.swapped = False
    assert {there for there, _ in back} == {there for _, there in moves}
    assert (blocks.used, blocks.cpu_used) == (3, 0)
    blocks.check_integrity([request])


def test_a_full_main_memory_moves_nothing() -> None:
    blocks = BlockManager(20, BLOCK, cpu_blocks=2)
    request, _ = start(blocks, 40)
    assert blocks.swap_out(request) is None
    assert (blocks.used, blocks.cpu_used) == (3, 0)
    blocks.check_integrity([request])


def test_shared_blocks_are_moved_once_and_stay_shared() -> None:
    blocks = BlockManager(20, BLOCK, cpu_blocks=10, prefix_caching=False)
    request, parent = start(blocks, 40)
    fork(blocks, parent, 3)
    moves = blocks.swap_out(request)
    request.swapped = True
    assert moves is not None
    assert len(moves) == 3
    assert blocks.swap_in_cost(request) == 3
    assert len(blocks.swap_in(request)) == 3
    request.swapped = False
    assert len({tuple(sequence.tables[0]) for sequence in request.live}) == 1
    blocks.check_integrity([request])


def test_coming_back_costs_the_next_step_s_copies_too() -> None:
    blocks = BlockManager(20, BLOCK, cpu_blocks=10, prefix_caching=False)
    request, parent = start(blocks, 40)
    fork(blocks, parent, 3)
    for sequence in request.live:
        sequence.token_ids.append(1)
    blocks.swap_out(request)
    request.swapped = True
    assert blocks.swap_in_cost(request) == 3 + 3


def test_what_the_prefix_cache_still_has_is_not_moved_back() -> None:
    blocks = BlockManager(20, BLOCK, cpu_blocks=10)
    request, sequence = start(blocks, 40)
    blocks.swap_out(request)
    request.swapped = True
    assert len(blocks.swap_in(request)) == 1
    request.swapped = False
    assert len(sequence.tables[0]) == 3
    blocks.check_integrity([request])


def test_a_swapped_request_can_be_released() -> None:
    blocks = BlockManager(20, BLOCK, cpu_blocks=10)
    request, sequence = start(blocks, 40)
    blocks.swap_out(request)
    request.swapped = True
    blocks.release(sequence)
    assert (blocks.used, blocks.cpu_used) == (0, 0)


# What a request can come to need


@pytest.mark.parametrize(
    ("prompt", "total", "width", "blocks"),
    [(1, 16, 1, 1), (1, 17, 1, 2), (32, 48, 1, 3), (32, 48, 4, 2 + 4), (31, 48, 4, 1 + 8), (1, 48, 4, 12)],
)
def test_samples_share_the_full_blocks_of_their_prompt_at_worst(
    prompt: int, total: int, width: int, blocks: int
) -> None:
    manager = BlockManager(100, BLOCK)
    assert manager.worst_case(prompt, total, width) == blocks
    tight = BlockManager(blocks + 1, BLOCK)
    assert tight.longest(prompt, width) >= total
    assert tight.worst_case(prompt, tight.longest(prompt, width), width) <= blocks


# A broken book is noticed


@pytest.mark.parametrize("damage", ["lose", "free twice", "share in secret", "own what is free"])
def test_integrity_notices(damage: str) -> None:
    blocks = BlockManager(20, BLOCK)
    request, sequence = start(blocks, 40)
    match damage:
        case "lose":
            sequence.tables[0].pop()
        case "free twice":
            blocks._free.append(blocks._free[0])
        case "share in secret":
            sequence.tables[0].append(sequence.tables[0][0])
        case "own what is free":
            sequence.tables[0][-1] = blocks._free[0]
    with pytest.raises(RuntimeError):
        blocks.check_integrity([request])
