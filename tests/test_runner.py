"""What the runner keeps between steps, the block tables and the tokens drawn last; and how a step is padded."""

from __future__ import annotations

from itertools import accumulate

import torch
from hypothesis import given
from hypothesis import strategies as st

from llmq.plan import PlanRow, RowSampling
from llmq.runtime.batch import batch_shape, fill, view
from llmq.runtime.block_tables import BlockTables
from llmq.runtime.graphs import (
    CHUNK,
    MAX_TOKENS,
    MIN_KV_LENGTH,
    NOBODY,
    padded_kv_length,
    padded_rows,
    padded_shape,
    padded_size,
)
from llmq.runtime.runner import first_tokens

tables = st.lists(st.integers(1, 99), min_size=1, max_size=6)


@given(st.lists(st.lists(st.tuples(st.booleans(), tables), min_size=1, max_size=5), min_size=1, max_size=8))
def test_each_row_of_the_matrix_begins_with_its_table(steps: list[list[tuple[bool, list[int]]]]) -> None:
    on_device = BlockTables(5, 48, "cpu")
    last: list[list[int]] = []
    for step in steps:
        now: list[list[int]] = []
        for row, (kept, blocks) in enumerate(step):
            # Some rows keep the list that they had, which may have grown, others have a new one; rows come and go.
            if kept and row < len(last):
                last[row].extend(blocks[1:])
                now.append(last[row])
            else:
                now.append(blocks)
        matrix = on_device.update(now).tolist()
        assert [found[: len(table)] for found, table in zip(matrix, now, strict=False)] == now
        last = now


@given(st.lists(st.tuples(st.integers(0, 70), st.integers(1, 40)), min_size=1, max_size=6), st.integers(1, 2))
def test_a_batch_lies_in_one_tensor_part_by_part(chunks: list[tuple[int, int]], groups: int) -> None:
    table = [11, 7, 8, 9, 5, 6, 2]
    rows = [
        PlanRow(number, start, tuple(range(start, start + length)), (table,) * groups, None)
        for number, (start, length) in enumerate(chunks)
    ]
    shape = batch_shape(rows, drawn=8)
    ints = torch.cat((torch.full((8,), -1), torch.frombuffer(fill(rows, shape, 16), dtype=torch.int32)))
    assert len(ints) == shape.starts[-1]
    batch = view(ints, shape)
    positions = [position for row in rows for position in range(row.start, row.end)]
    assert batch.ints[batch.sources].tolist() == batch.positions.tolist() == positions
    assert [one.tolist() for one in batch.slots] == [[table[at // 16] * 16 + at % 16 for at in positions]] * groups
    assert batch.query_starts.diff().tolist() == [len(row.tokens) for row in rows]
    assert batch.kv_lengths.tolist() == [row.end for row in rows]
    assert sorted(batch.order.tolist()) == list(range(len(rows)))
    assert [rows[row].end for row in batch.order.tolist()] == sorted((row.end for row in rows), reverse=True)
    assert batch.longest.tolist() == [max(row.end for row in rows)]
    assert {part.storage_offset() % 4 for part in (batch.positions, *batch.slots, batch.kv_lengths)} == {0}


def test_a_token_that_was_just_drawn_is_taken_from_where_it_was_drawn() -> None:
    rows = [PlanRow(0, 5, (42,), ([1],), None), PlanRow(1, 7, (-3,), ([2],), None), PlanRow(2, 9, (-1,), ([3],), None)]
    shape = batch_shape(rows, drawn=4)
    drawn = torch.tensor([100, 101, 102, 103], dtype=torch.int32)
    batch = view(torch.cat((drawn, torch.frombuffer(fill(rows, shape, 16), dtype=torch.int32))), shape)
    assert batch.ints[batch.sources].tolist() == [42, 102, 100]


def test_padding_is_little_and_sizes_are_few() -> None:
    sizes = {size: padded_size(size) for size in range(1, MAX_TOKENS + 1)}
    assert all(size <= padded <= max(size + 7, 1.25 * size) for size, padded in sizes.items())
    assert max(sizes.values()) == MAX_TOKENS
    assert len(set(sizes.values())) < 32
    assert {padded_kv_length(length) for length in range(1, MIN_KV_LENGTH + 1)} == {MIN_KV_LENGTH}
    assert padded_kv_length(MIN_KV_LENGTH + 1) == 2 * MIN_KV_LENGTH


chunks = st.lists(st.one_of(st.just(1), st.integers(1, 40), st.just(CHUNK)), min_size=1, max_size=8)


def some_rows(lengths: list[int]) -> list[PlanRow]:
    sampling = RowSampling(0.5, 0, 1.0, 7, None)
    return [
        PlanRow(number, 0, tuple(range(length)), ([1, 2, 3, 4],), sampling, prompt_targets=tuple(range(1, length + 1)))
        for number, length in enumerate(lengths)
    ]


@given(chunks)
def test_a_step_is_padded_to_one_of_a_few_numbers_of_tokens_and_of_rows(lengths: list[int]) -> None:
    rows = some_rows(lengths)
    padded = padded_rows(rows)
    shape = padded_shape(padded, drawn=8)
    assert padded[: len(rows)] == rows
    assert all(row.sequence_id == NOBODY and row.sampling is None for row in padded[len(rows) :])
    assert shape.tokens == padded_size(sum(lengths))
    assert shape.rows == (shape.tokens if max(lengths) == 1 else 1 << (shape.rows - 1).bit_length()) <= MAX_TOKENS
    assert shape.max_query_length == (1 if max(lengths) == 1 else shape.tokens)
    assert shape.min_query_length <= min(len(row.tokens) for row in padded if row.tokens)
    batch = view(torch.cat((torch.zeros(8), torch.frombuffer(fill(padded, shape, 16), dtype=torch.int32))).int(), shape)
    assert {slot // 16 for slot in batch.slots[0].tolist()[sum(lengths) :]} <= {0}
    assert batch.last[: len(rows)].tolist() == [end - 1 for end in accumulate(lengths)]


@given(chunks, st.integers(1, 200))
def test_a_step_in_parts_is_the_same_tokens_and_draws_where_a_row_ends(lengths: list[int], most: int) -> None:
    rows, parts = some_rows(lengths), list[PlanRow]()
    left = rows
    while left:
        part, left = first_tokens(left, most)
        assert 0 < sum(len(row.tokens) for row in part) <= most
        parts += part
    for row in rows:
        own = [part for part in parts if part.sequence_id == row.sequence_id]
        assert tuple(token for part in own for token in part.tokens) == row.tokens
        assert tuple(token for part in own for token in part.prompt_targets) == row.prompt_targets
        assert [part.start for part in own] == list(accumulate((len(one.tokens) for one in own[:-1]), initial=0))
        assert [part.sampling for part in own] == [None] * (len(own) - 1) + [row.sampling]


def test_seeds_and_temperatures_travel_with_the_rows() -> None:
    first, second = some_rows([1, 3])
    rows = [first._replace(sampling=RowSampling(0.7, 0, 1.0, 2**62, None)), second._replace(sampling=None)]
    shape = batch_shape(rows, drawn=4)
    batch = view(torch.cat((torch.zeros(4).int(), torch.frombuffer(fill(rows, shape, 16), dtype=torch.int32))), shape)
    assert batch.seeds.tolist() == [2**62, 0]
    assert torch.equal(batch.temperatures, torch.tensor([0.7, 0.0]))
