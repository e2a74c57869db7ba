"""The pool of keys and values: blocks that leave it for main memory, and come back."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from known_models import QWEN_25_05B, config_of
from torch import Tensor

from llmq.plan import StepPlan
from llmq.runtime import kv_cache
from llmq.runtime.device import KV_DTYPES
from llmq.runtime.kv_cache import KVCache

BLOCKS, MOVED = 32, 12


def contents(cache: KVCache) -> list[Tensor]:
    """Codes and scales as bytes, block by block."""
    return [store.blocks.view(torch.uint8) for store in cache._stores]


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("kv_dtype", ["bfloat16", "fp8", "int8"])
def test_blocks_come_back_as_they_left(
    kv_dtype: str, device: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Though those they left, and later those they came back to, are overwritten at once; twice through the same
    blocks of main memory, which lie in several pieces."""
    monkeypatch.setattr(kv_cache, "PIECE_BYTES", 2**17)
    config = config_of(tmp_path, QWEN_25_05B | {"num_hidden_layers": 3})
    cache = KVCache(config, BLOCKS, 16, KV_DTYPES[kv_dtype], device, MOVED)
    generator = torch.Generator(device).manual_seed(0)
    for _ in range(2):
        for pool in contents(cache):
            pool.random_(generator=generator)
        left = [pool.clone() for pool in contents(cache)]
        out = torch.randperm(BLOCKS)[:MOVED].tolist()
        back, places = torch.randperm(BLOCKS)[:MOVED].tolist(), torch.randperm(MOVED).tolist()
        cache.move(StepPlan((), swap_out=tuple(zip(out, places, strict=True))))
        for pool in contents(cache):
            pool.random_(generator=generator)
        overwritten = [pool.clone() for pool in contents(cache)]
        cache.move(StepPlan((), swap_in=tuple(zip(places, back, strict=True))))
        for was, then, pool in zip(left, overwritten, contents(cache), strict=True):
            stayed = sorted(set(range(BLOCKS)) - set(back))
            assert torch.equal(pool[back], was[out])
            assert torch.equal(pool[stayed], then[stayed])
    assert all(len(store.pieces) == -(-MOVED // len(store.pieces[0])) for store in cache._stores)
    assert len(cache._stores[0].pieces) > 1


def test_main_memory_is_taken_as_blocks_come_to_need_it(tmp_path: Path) -> None:
    cache = KVCache(config_of(tmp_path, QWEN_25_05B), BLOCKS, 16, torch.bfloat16, "cpu", 10**6)
    taken = [0]
    for there in (0, 3, 1000, 1):
        cache.move(StepPlan((), swap_out=((1, there),)))
        taken.append(sum(piece.nbytes for store in cache._stores for piece in store.pieces))
    needed = cache.pool[:, :, 0].nbytes * 1001
    assert taken == sorted(taken)
    assert taken[2] <= kv_cache.PIECE_BYTES
    assert needed <= taken[-1] <= needed + kv_cache.PIECE_BYTES
