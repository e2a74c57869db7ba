"""What the runner keeps between steps: the block tables, as each step has them."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from llmq.runtime.runner import TableBuffer

tables = st.lists(st.integers(1, 99), min_size=1, max_size=6)


@given(st.lists(st.lists(st.tuples(st.booleans(), tables), min_size=1, max_size=5), min_size=1, max_size=8))
def test_the_matrix_holds_just_the_tables_of_the_step(steps: list[list[tuple[bool, list[int]]]]) -> None:
    buffer = TableBuffer()
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
        longest = max(map(len, now))
        expected = [table + [0] * (longest - len(table)) for table in now]
        assert torch.equal(buffer.fill(now), torch.tensor(expected, dtype=torch.int32))
        last = now
