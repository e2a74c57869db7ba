"""The KV cache on the device, and the place in main memory that preempted requests are moved to.

pool   [layers of a group, 2, num_blocks, block_size, kv_heads, head_dim]
                           │  └── block 0 is where padding reads and writes
                           └── keys, values
swap   the same, with blocks of its own, in main memory
slot of a token = block · block_size + offset in the block

All groups of layers are of one size and share the blocks: a block belongs to one group at a time.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from llmq.checkpoint.config import ModelConfig
from llmq.plan import StepPlan, layer_groups


class KVCache:
    """The pool and the swap space, allocated once for the life of the engine."""

    def __init__(
        self,
        config: ModelConfig,
        num_blocks: int,
        block_size: int,
        dtype: torch.dtype,
        device: str,
        cpu_blocks: int = 0,
    ) -> None:
        """Allocate the pool. It is zeroed because attention multiplies masked positions by 0, and 0 · NaN is NaN."""
        self.groups = layer_groups(config.windows)
        self._places = {
            layer: (number, index)
            for number, group in enumerate(self.groups)
            for index, layer in enumerate(group.layers)
        }
        block = (block_size, config.num_kv_heads, config.head_dim)
        layers = len(self.groups[0].layers)
        self.pool = torch.zeros((layers, 2, num_blocks, *block), dtype=dtype, device=device)
        self.swap = torch.empty((layers, 2, cpu_blocks, *block), dtype=dtype, pin_memory=device != "cpu")
        self.block_size = block_size

    def layer(self, layer: int) -> tuple[Tensor, Tensor]:
        """Keys and values of one layer, each [num_blocks, block_size, kv_heads, head_dim]."""
        _, index = self._places[layer]
        return self.pool[index, 0], self.pool[index, 1]

    def group_of(self, layer: int) -> int:
        return self._places[layer][0]

    def move(self, plan: StepPlan) -> None:
        """The moves of a step, in their order: swap out, swap in, copy."""
        if plan.swap_out:
            here, there = _columns(plan.swap_out)
            self.swap[:, :, there] = self.pool[:, :, here.to(self.pool.device)].cpu()
        if plan.swap_in:
            there, here = _columns(plan.swap_in)
            self.pool[:, :, here.to(self.pool.device)] = self.swap[:, :, there].to(self.pool.device)
        if plan.copies:
            source, target = (column.to(self.pool.device) for column in _columns(plan.copies))
            self.pool[:, :, target] = self.pool[:, :, source]


def _columns(pairs: Sequence[tuple[int, int]]) -> tuple[Tensor, Tensor]:
    first, second = torch.tensor(pairs, dtype=torch.int64).unbind(1)
    return first, second
