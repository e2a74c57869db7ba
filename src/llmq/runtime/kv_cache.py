"""The KV cache on the device, and the place in main memory that preempted requests are moved to.

pool   [layers of a group, 2, num_blocks, block_size, kv_heads, head_dim]
                           │  └── block 0 is where padding reads and writes
                           └── keys, values
scales [layers of a group, 2, num_blocks, kv_heads, block_size]        of a pool of int8, fp32
swap   [cpu_blocks, layers of a group, 2, block_size, kv_heads, head_dim], and of scales, in main memory: a block is one
       copy
slot of a token = block · block_size + offset in the block

All groups of layers are of one size and share the blocks: a block belongs to one group at a time.

Blocks travel to main memory and back on a stream of their own, while the one that computes goes on:

    computes   │ … step n │ gather the blocks that go │ step n + 1 …        │ wait │ put the blocks that came in place │
    copies                                            │ them → main memory │ main memory → the device │
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from llmq.checkpoint.config import ModelConfig
from llmq.plan import StepPlan, layer_groups
from llmq.runtime.device import on_device
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
                torch.empty((cpu_blocks, layers, 2, *each), dtype=kind, pin_memory=device != "cpu"),
            )
            for each, kind in stores
        ]
        self._copies = None if device == "cpu" else torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
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
                self._swap_out(pool, swap, plan.swap_out)
            if plan.swap_in:
                self._swap_in(pool, swap, plan.swap_in)
            if plan.copies:
                source, target = on_device(plan.copies, torch.int64, pool.device).unbind(1)
                pool[:, :, target] = pool[:, :, source]

    def _swap_out(self, pool: Tensor, swap: Tensor, pairs: Sequence[tuple[int, int]]) -> None:
        here = on_device([block for block, _ in pairs], torch.int64, pool.device)
        going = pool.movedim(2, 0)[here].contiguous()  # the pool's blocks are free for the step that comes
        if self._copies is not None:
            self._copies.wait_stream(torch.cuda.current_stream(pool.device))
            going.record_stream(self._copies)
        with torch.cuda.stream(self._copies):
            for block, (_, there) in zip(going, pairs, strict=True):
                swap[there].copy_(block, non_blocking=True)

    def _swap_in(self, pool: Tensor, swap: Tensor, pairs: Sequence[tuple[int, int]]) -> None:
        with torch.cuda.stream(self._copies):
            coming = torch.empty((len(pairs), *swap.shape[1:]), dtype=swap.dtype, device=pool.device)
            for block, (there, _) in zip(coming, pairs, strict=True):
                block.copy_(swap[there], non_blocking=True)
        if self._copies is not None:
            step = torch.cuda.current_stream(pool.device)
            step.wait_stream(self._copies)
            coming.record_stream(step)
        here = on_device([block for _, block in pairs], torch.int64, pool.device)
        pool.movedim(2, 0)[here] = coming
