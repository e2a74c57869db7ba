"""Routing in a mixture of experts (Shazeer et al., 2017): where each token goes, and what its experts' answers weigh.

p       = softmax(logits)           over the experts
weights = the greatest of p         per_token of each token; divided by their sum, in some models

Assignments are numbered token by token: a is of token a // per_token. To multiply them expert by expert they are
sorted, and cut into tiles of one expert each. All of it stays on the device: the host never learns the counts.

order    | expert 0's assignments | expert 1's | …       of each expert the lowest first
         0                        starts[1]    starts[2]
tiles    | block_m | block_m | …  | block_m | …          an expert's last tile may be short
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from llmq.runtime.kernels import runs_triton


@dataclass(frozen=True, slots=True)
class Routing:
    """order         int32 [assignments]
    starts        int32 [experts + 1]
    tile_experts  int32 [tiles]: whose the tile is; −1: there is no such tile, as the number is a bound
    tile_starts   int32 [tiles]: where in ``order`` it begins
    block_m       assignments in a tile
    """

    order: Tensor
    starts: Tensor
    tile_experts: Tensor
    tile_starts: Tensor
    block_m: int

    @property
    def experts(self) -> int:
        return len(self.starts) - 1


def most_tiles(assignments: int, experts: int, block_m: int) -> int:
    """Tiles that so many assignments can take: all experts' last ones are short."""
    return (assignments + min(assignments, experts) * (block_m - 1)) // block_m


def choose(logits: Tensor, per_token: int, renormalized: bool) -> tuple[Tensor, Tensor]:
    """The likeliest ``per_token`` experts by ``logits`` [tokens, experts] → weights fp32 and experts int32, both
    [tokens, per_token], the likeliest first."""
    if not runs_triton(logits):
        return choose_reference(logits, per_token, renormalized)
    from llmq.runtime.kernels.routing_triton import choose_triton

    return choose_triton(logits, per_token, renormalized)


def choose_reference(logits: Tensor, per_token: int, renormalized: bool) -> tuple[Tensor, Tensor]:
    """``choose`` in plain PyTorch."""
    weights, chosen = logits.float().softmax(-1).topk(per_token)
    return weights / weights.sum(-1, keepdim=True) if renormalized else weights, chosen.int()


def sort_by_expert(chosen: Tensor, experts: int, block_m: int) -> Routing:
    """The assignments ``chosen`` int32 [tokens, per_token] in tiles of ``block_m``."""
    if not runs_triton(chosen):
        return sort_by_expert_reference(chosen, experts, block_m)
    from llmq.runtime.kernels.routing_triton import sort_by_expert_triton

    return sort_by_expert_triton(chosen, experts, block_m)


def sort_by_expert_reference(chosen: Tensor, experts: int, block_m: int) -> Routing:
    """``sort_by_expert`` in plain PyTorch."""
    counts = chosen.flatten().bincount(minlength=experts)
    ends, tiles = counts.cumsum(0), (counts + block_m - 1) // block_m
    tile = torch.arange(most_tiles(chosen.numel(), experts, block_m), device=chosen.device)
    owner = torch.searchsorted(tiles.cumsum(0), tile, right=True)
    known = owner.clamp(max=experts - 1)
    within = tile - (tiles.cumsum(0) - tiles)[known]
    starts = torch.cat((ends.new_zeros(1), ends))
    return Routing(
        chosen.flatten().argsort(stable=True).int(),
        starts.int(),
        torch.where(owner < experts, owner, -1).int(),
        torch.where(owner < experts, starts[known] + within * block_m, 0).int(),
        block_m,
    )


def combine(answers: Tensor, weights: Tensor) -> Tensor:
    """The sum of each token's ``answers`` [assignments, width] times ``weights`` fp32 [tokens, per_token] → [tokens,
    width]. It is fp32, in the order of the weights."""
    if not runs_triton(answers):
        return combine_reference(answers, weights)
    from llmq.runtime.kernels.routing_triton import combine_triton

    return combine_triton(answers, weights)


def combine_reference(answers: Tensor, weights: Tensor) -> Tensor:
    """``combine`` in plain PyTorch."""
    mixed = answers.view(*weights.shape, -1) * weights[..., None]
    return mixed.sum(1).to(answers.dtype)
