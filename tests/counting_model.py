"""A model made to count: behind 17, 18, 19 it says 20. It knows how far it has come only by what it reads in its cache.

The query at position p looks for one position h(p) ≤ p, another for each p, and finds the token there: attention over
codes of the positions, scaled until it is a lookup. The next token is what it read, plus p + 1 − h(p). A read from a
wrong block, of a stale copy, or of a slot never written breaks the count at once.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from llmq.checkpoint.config import ModelConfig
from llmq.checkpoint.rope import Rope
from llmq.runtime.decoder import Attend

HEAD_DIM = 64
VOCABULARY = 4096
SHARPNESS = 400.0


def counting_config(windows: tuple[int | None, ...] = (None,)) -> ModelConfig:
    return ModelConfig(
        model_type="llama",
        hidden_size=HEAD_DIM,
        intermediate_size=1,
        num_layers=len(windows),
        num_heads=1,
        num_kv_heads=1,
        head_dim=HEAD_DIM,
        vocab_size=VOCABULARY,
        context_length=2048,
        rms_norm_eps=1e-6,
        ropes=(Rope(),) * len(windows),
        windows=windows,
        tied_embeddings=True,
        qkv_bias=False,
        o_bias=False,
        mlp_bias=False,
        qk_norm=False,
        dtype="float32",
        bos_token_id=None,
        eos_token_ids=(),
        quantization=None,
    )


@dataclass(frozen=True)
class _Layer:
    """What the cache and attention want to know of a layer."""

    layer: int
    window: int | None
    norms: None = None
    eps: float = 0.0
    scale: None = None
    softcap: None = None


class CountingDecoder:
    """Each layer reads on its own, within its window; they must agree, or there is no next number."""

    def __init__(self, config: ModelConfig) -> None:
        self.config = config

    def __call__(self, token_ids: Tensor, positions: Tensor, attend: Attend, wanted: Tensor | None = None) -> Tensor:
        values = token_ids.float()[:, None, None].expand(-1, 1, HEAD_DIM).contiguous()
        half = (len(token_ids), 1, HEAD_DIM // 2)
        unturned = (torch.ones(half), torch.zeros(half))
        nexts = []
        for layer, window in enumerate(self.config.windows):
            reach = (positions + 1) if window is None else torch.minimum(positions + 1, torch.tensor(window))
            back = (positions * 7919 + 13 * layer) % reach
            query, key = _code(positions - back) * SHARPNESS, _code(positions)
            found = attend(_Layer(layer, window), query, key, values, unturned)[:, 0, 0]  # type: ignore[arg-type]
            nexts.append(found.round() + back + 1)
        agreed = torch.stack(nexts)
        hidden = torch.where((agreed == agreed[0]).all(0), agreed[0], torch.zeros(()))[:, None]
        return hidden if wanted is None else hidden[wanted]

    def logits(self, hidden: Tensor) -> Tensor:
        return -(torch.arange(VOCABULARY).float() - hidden).abs()

    narrow_logits = logits


def _code(positions: Tensor) -> Tensor:
    frequencies = 1.5 ** -torch.arange(HEAD_DIM // 2).float()
    angles = positions.float()[:, None, None] * frequencies
    return torch.cat((angles.cos(), angles.sin()), dim=-1)


def counting_decoder(windows: tuple[int | None, ...] = (None,)) -> Any:
    return CountingDecoder(counting_config(windows))
