"""What the runner keeps between steps: the block tables, as each step has them."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from llmq.runtime.runner import TableBuffer

tables = st.lists(st.integers(1, 99), min_size=1, max_size=6).map(tuple)


@given(st.lists(st.lists(st.tuples(st.booleans(), tables), min_size=1, max_size=5), min_size=1, max_size=8))
def test_the_matrix_holds_just_the_tables_of_the_step(steps: list[list[tuple[bool, tuple[int, ...]]]]) -> None:
    buffer = TableBuffer()
    last: list[tuple[int, ...]] = []
    for step in steps:
        # Some rows keep the tuple that they had, others have a new one; rows come and go.
        now = [last[row] if kept and row < len(last) else table for row, (kept, table) in enumerate(step)]
        longest = max(map(len, now))
        expected = [table + (0,) * (longest - len(table)) for table in now]
        assert torch.equal(buffer.fill(now), torch.tensor(expected, dtype=torch.int32))
        last = now
