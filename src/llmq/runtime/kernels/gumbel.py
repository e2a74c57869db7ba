"""Drawing a token of each row by the Gumbel-max trick (Gumbel, 1954): no softmax, no sum over the vocabulary.

token[r] = argmax_v  logits[r, v] / temperature[r] − log E[r, v]      E ~ Exp(1)
           argmax_v  logits[r, v]                                     at temperature 0

E is a pure function of (seed, position, token id), not the state of a generator: a row draws the same token whatever
else is in the batch, in whatever order, also when it is computed again after a preemption.

state = mix(mix(seed · golden + position) + v · golden)       mix: splitmix64's finalizer (Steele, Lea & Flood, 2014)
x = (state's upper 31 bits + ½) / 2^31, in (0, 1)             E = −log(1 − x): as fine near 0, where draws are decided,
                                                              as fp32 is
"""

from __future__ import annotations

import torch
from torch import Tensor

from llmq.runtime.kernels import runs_triton

MIX_1, MIX_2, GOLDEN = -0x40A7B892E31B1A47, -0x6B2FB644ECCEEE15, -0x61C8864680B583EB
"""splitmix64's odd constants, as signed 64-bit integers."""
MOST = 1 - 2.0**-24
"""The largest fp32 number below 1: x must not round up to 1, where E has no end."""


def draw_gumbel(logits: Tensor, temperatures: Tensor, seeds: Tensor, positions: Tensor) -> Tensor:
    """A token id for each row, int64 [rows], drawn from softmax(logits / temperature); at temperature 0 the likeliest.

    logits            [rows, vocabulary], contiguous in vocabulary; −inf: never drawn
    temperatures      floating [rows]
    seeds, positions  int64 [rows]
    """
    if not runs_triton(logits):
        return draw_gumbel_reference(logits, temperatures, seeds, positions)
    from llmq.runtime.kernels.gumbel_triton import draw_gumbel_triton

    return draw_gumbel_triton(logits, temperatures, seeds, positions)


def draw_gumbel_reference(logits: Tensor, temperatures: Tensor, seeds: Tensor, positions: Tensor) -> Tensor:
    """``draw_gumbel`` in plain PyTorch."""
    greedy = (temperatures == 0)[:, None]
    if greedy.all():
        return logits.argmax(dim=-1)
    scores = logits.float() / torch.where(greedy, 1.0, temperatures[:, None].float())
    noise = exponential_noise(seeds[:, None], positions[:, None], logits.shape[1])
    return torch.where(greedy, scores, scores - noise.log()).argmax(dim=-1)


def exponential_noise(seeds: Tensor, positions: Tensor, vocabulary: int) -> Tensor:
    """Exp(1) noise, fp32 [rows, vocabulary], from int64 ``seeds`` and ``positions`` [rows, 1]."""
    tokens = torch.arange(vocabulary, device=seeds.device)
    state = _mix(_mix(seeds * GOLDEN + positions) + tokens * GOLDEN)
    x = ((state >> 33) & 0x7FFFFFFF).float().add_(0.5).mul_(2.0**-31).clamp_(max=MOST)
    return x.neg_().log1p_().neg_()


def _mix(x: Tensor) -> Tensor:
    """int64 products wrap as unsigned ones do; right shifts have their sign bits masked."""
    x = (x ^ ((x >> 30) & ((1 << 34) - 1))) * MIX_1
    x = (x ^ ((x >> 27) & ((1 << 37) - 1))) * MIX_2
    return x ^ ((x >> 31) & ((1 << 33) - 1))
