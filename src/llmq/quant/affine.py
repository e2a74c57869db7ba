"""Affine quantization of groups: find scale and zero point, round, and back.

    value ≈ scale · (code − zero),   code = clamp(round(value / scale) + zero, 0, 2^bits − 1)

The scale is rounded to fp16, as formats store it, before anything is rounded by it: what a method optimizes is what
is served. It is rounded up, so that a group's ends stay in reach and scales too small for fp16 become its smallest.
"""

from __future__ import annotations

import torch
from torch import Tensor

from llmq.scheme import Scheme

MAX_WEIGHT = torch.finfo(torch.float16).max
"""Larger weights cannot be served: kernels dequantize to fp16. Below it, no scale overflows fp16 either."""


CLIPS = tuple(1 - 0.015 * step for step in range(1, 20))
"""Shares of a group's range that a grid is tried on: 98.5 % to 71.5 %."""


def fit_grid(weight: Tensor, scheme: Scheme, energy: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Scales fp16 and zero points uint8, both [out, groups], for ``weight`` fp32 [out, in].

    They span each group's range and 0, so that no weight is off by more than half a step. A symmetric grid spans
    ``absmax`` with all its 2^bits − 1 steps: its largest positive code falls half a step short, which costs less than
    a coarser step would. A group of zeros gets scale 1 and represents them exactly.

    With ``energy`` fp32 [in], the mean square of each channel's input, a group's ends may be clipped to make its steps
    finer: of ``CLIPS``, the grid whose rounding errors, weighed by it, are least.
    """
    groups = weight.view(len(weight), -1, scheme.group_length(weight.shape[1]))
    low, high = groups.amin(-1).clamp(max=0), groups.amax(-1).clamp(min=0)
    scales, zeros = _grid(low, high, scheme)
    if energy is None:
        return scales, zeros
    energy = energy.view(groups.shape[1:])
    least = _loss(groups, scales, zeros, scheme, energy)
    for share in CLIPS:
        finer, moved = _grid(low * share, high * share, scheme)
        loss = _loss(groups, finer, moved, scheme, energy)
        better = loss < least
        least = torch.where(better, loss, least)
        scales, zeros = torch.where(better, finer, scales), torch.where(better, moved, zeros)
    return scales, zeros


def _grid(low: Tensor, high: Tensor, scheme: Scheme) -> tuple[Tensor, Tensor]:
    span = 2 * torch.maximum(-low, high) if scheme.symmetric else high - low
    scales = _ceil_fp16(span / scheme.max_code)
    scales = torch.where(span == 0, torch.ones_like(scales), scales)
    if scheme.symmetric:
        return scales, torch.full_like(scales, scheme.middle_code, dtype=torch.uint8)
    return scales, (-low / scales.float()).round().clamp(0, scheme.max_code).to(torch.uint8)


def _loss(groups: Tensor, scales: Tensor, zeros: Tensor, scheme: Scheme, energy: Tensor) -> Tensor:
    """Σ energy · error² of each group of ``groups`` [out, groups, channels] → [out, groups]."""
    wide_scales, wide_zeros = scales.float().unsqueeze(-1), zeros.float().unsqueeze(-1)
    codes = encode(groups, wide_scales, wide_zeros, scheme.max_code)
    return decode(codes, wide_scales, wide_zeros).sub_(groups).square_().mul_(energy).sum(-1)


def encode(values: Tensor, scales: Tensor, zeros: Tensor, max_code: int) -> Tensor:
    """Codes of ``values``, as whole numbers in fp32. ``scales`` and ``zeros`` in fp32 broadcast against them."""
    return (values / scales).round_().add_(zeros).clamp_(0, max_code)


def decode(codes: Tensor, scales: Tensor, zeros: Tensor) -> Tensor:
    """The values that ``codes`` stand for, fp32."""
    return scales * (codes - zeros)


def per_channel(grid: Tensor, in_features: int) -> Tensor:
    """A grid's scales or zero points [out, groups] → fp32 [out, in], each repeated over its group."""
    return grid.float().repeat_interleave(in_features // grid.shape[1], dim=1)


def _ceil_fp16(positive: Tensor) -> Tensor:
    """The smallest fp16 number that is not below ``positive`` fp32, which fp16's range must hold."""
    rounded = positive.to(torch.float16)
    # Positive floats are ordered as the integers of the same bits: the next number is one up.
    following = (rounded.view(torch.int16) + 1).view(torch.float16)
    return torch.where(rounded.float() < positive, following, rounded)
