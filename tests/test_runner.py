"""What the runner keeps between steps, the block tables and the tokens drawn last; and how a step is padded."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from llmq.plan import PlanRow
from llmq.runtime.batch import batch_shape, fill, view
from llmq.runtime.block_tables import BlockTables
from llmq.runtime.graphs import MAX_ROWS, MIN_KV_LENGTH, padded_kv_length, padded_rows

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
    sizes = {rows: padded_rows(rows) for rows in range(1, MAX_ROWS + 1)}
    assert all(rows <= padded <= max(rows + 7, 1.25 * rows) for rows, padded in sizes.items())
    assert max(sizes.values()) == MAX_ROWS
    assert len(set(sizes.values())) < 32
    assert {padded_kv_length(length) for length in range(1, MIN_KV_LENGTH + 1)} == {MIN_KV_LENGTH}
    assert padded_kv_length(MIN_KV_LENGTH + 1) == 2 * MIN_KV_LENGTH
