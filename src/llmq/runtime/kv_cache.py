"""The KV cache on the device, and the place in main memory that preempted requests are moved to.

pool   [layers of a group, 2, num_blocks, block_size, kv_heads, head_dim]
                           │  └── block 0 is where padding reads and writes
                           └── keys, values
scales [layers of a group, 2, num_blocks, kv_heads, block_size]        of a pool of int8, fp32
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
from llmq.runtime.kernels.kv_write import Scales


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
        layer_scales: Tensor | None = None,
    ) -> None:
        """Allocate the pool. It is zeroed because attention multiplies masked positions by 0, and 0 · NaN is NaN.

        dtype         of keys and values as they are kept; int8 and e4m3 as in ``write_kv``
        layer_scales  for e4m3, fp32 [num_layers, 2]: of each layer's keys and values; None: all are 1
        """
        self.groups = layer_groups(config.windows)
        self._places = {
            layer: (number, index)
            for number, group in enumerate(self.groups)
            for index, layer in enumerate(group.layers)
        }
        block = (block_size, config.num_kv_heads, config.head_dim)
        layers = len(self.groups[0].layers)
        stores: list[tuple[tuple[int, ...], torch.dtype]] = [(block, dtype)]
        if dtype == torch.int8:
            stores.append(((config.num_kv_heads, block_size), torch.float32))
        self._stores = [
            (
                torch.zeros((layers, 2, num_blocks, *each), dtype=kind, device=device),
                torch.empty((layers, 2, cpu_blocks, *each), dtype=kind, pin_memory=device != "cpu"),
            )
            for each, kind in stores
        ]
        self.pool = self._stores[0][0]
        self.block_size = block_size
        self._layer_scales = layer_scales
        if dtype == torch.float8_e4m3fn and layer_scales is None:
            self._layer_scales = torch.ones(config.num_layers, 2, device=device)

    @property
    def num_bytes(self) -> int:
        """Of the pool and its scales."""
        return sum(pool.nbytes for pool, _ in self._stores)

    def layer(self, layer: int) -> tuple[Tensor, Tensor, Scales | None]:
        """Keys and values of one layer, each [num_blocks, block_size, kv_heads, head_dim], and their scales."""
        _, index = self._places[layer]
        scales = None
        if self._layer_scales is not None:
            scales = self._layer_scales[layer, :1], self._layer_scales[layer, 1:]
        elif len(self._stores) > 1:
            of_tokens = self._stores[1][0]
            scales = of_tokens[index, 0], of_tokens[index, 1]
        return self.pool[index, 0], self.pool[index, 1], scales

    def group_of(self, layer: int) -> int:
        return self._places[layer][0]

    def move(self, plan: StepPlan) -> None:
        """The moves of a step, in their order: swap out, swap in, copy."""
        for pool, swap in self._stores:
            if plan.swap_out:
                here, there = _columns(plan.swap_out)
                swap[:, :, there] = pool[:, :, here.to(pool.device)].cpu()
            if plan.swap_in:
                there, here = _columns(plan.swap_in)
                pool[:, :, here.to(pool.device)] = swap[:, :, there].to(pool.device)
            if plan.copies:
                source, target = (column.to(pool.device) for column in _columns(plan.copies))
                pool[:, :, target] = pool[:, :, source]


def _columns(pairs: Sequence[tuple[int, int]]) -> tuple[Tensor, Tensor]:
    first, second = torch.tensor(pairs, dtype=torch.int64).unbind(1)
    return first, second
