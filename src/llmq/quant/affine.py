"""Linear quantization of groups: find scale and zero point, round, and back.

    value ≈ scale · (code − zero),   code = clamp(round(value / scale) + zero, 0, 2^bits − 1)      of integers
    value ≈ scale · e4m3(code)                                                                     of 8-bit floats

The scale is rounded to fp16, as formats store it, before anything is rounded by it: what a method optimizes is what
is served. It is rounded up, so that a group's ends stay in reach and scales too small for fp16 become its smallest.
"""

from __future__ import annotations

import torch
from torch import Tensor

from llmq.scheme import E4M3, WHOLE_TENSOR, Scheme

MAX_WEIGHT = torch.finfo(torch.float16).max
"""Larger weights cannot be served: kernels dequantize to fp16. Below it, no scale overflows fp16 either."""
MAX_E4M3 = torch.finfo(torch.float8_e4m3fn).max


CLIPS = tuple(1 - 0.015 * step for step in range(1, 20))
"""Shares of a group's range that a grid is tried on: 98.5 % to 71.5 %."""
CLIPS_OF_2_BITS = tuple(1 - 0.015 * step for step in range(1, 41))
"""The same for 2 bits, with which half of all groups go below 70 %. More bits are better off without."""


def fit_grid(weight: Tensor, scheme: Scheme, curvature: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Scales fp16 and zero points uint8, both [out, groups], for ``weight`` fp32 [out, in].

    They span each group's range and 0, so that no weight is off by more than half a step. A symmetric grid spans
    ``absmax`` with all its 2^bits − 1 steps: its largest positive code falls half a step short, which costs less than
    a coarser step would. A group of zeros gets scale 1 and represents them exactly.

    With ``curvature``, a group's ends may be clipped to make its steps finer: of ``CLIPS``, the grid whose rounding
    errors e cost least. It is fp32, and either the diagonal of the layer's Hessian, [in], for a cost of Σ hᵢ eᵢ², or
    its blocks, ``group_blocks``, for one of eᵀ H e. Only of integers.
    """
    groups = weight.view(len(weight), -1, scheme.group_length(weight.shape[1]))
    low, high = groups.amin(-1).clamp(max=0), groups.amax(-1).clamp(min=0)
    if scheme.group_size == WHOLE_TENSOR:
        low, high = low.amin().expand_as(low), high.amax().expand_as(high)
    scales, zeros = grid_between(low, high, scheme)
    if curvature is None:
        return scales, zeros
    if curvature.dim() == 1:
        curvature = curvature.view(groups.shape[1:])
    least = _loss(groups, scales, zeros, scheme, curvature)
    for share in CLIPS_OF_2_BITS if scheme.bits == 2 else CLIPS:
        finer, moved = grid_between(low * share, high * share, scheme)
        loss = _loss(groups, finer, moved, scheme, curvature)
        better = loss < least
        least = torch.where(better, loss, least)
        scales, zeros = torch.where(better, finer, scales), torch.where(better, moved, zeros)
    return scales, zeros


def group_blocks(hessian: Tensor, scheme: Scheme) -> Tensor:
    """What of ``hessian`` [in, in] binds channels of the same group: [groups, channels, channels]."""
    length = scheme.group_length(len(hessian))
    return torch.stack(
        [hessian[first : first + length, first : first + length] for first in range(0, len(hessian), length)]
    )


def grid_between(low: Tensor, high: Tensor, scheme: Scheme) -> tuple[Tensor, Tensor]:
    """Scales fp16 and zero points uint8 of the grids that span ``low`` to ``high``, at most and at least 0: as both."""
    step = step_between(low, high, scheme)
    scales = torch.where(step == 0, torch.ones_like(step, dtype=torch.float16), _ceil_fp16(step))
    if scheme.symmetric:
        return scales, torch.full_like(scales, scheme.middle_code, dtype=torch.uint8)
    return scales, (-low / scales.float()).round().clamp(0, scheme.max_code).to(torch.uint8)


def step_between(low: Tensor, high: Tensor, scheme: Scheme) -> Tensor:
    """A grid's scale before it is rounded to fp16, fp32."""
    most = torch.maximum(-low, high)
    if scheme.number == E4M3:
        return most / MAX_E4M3
    return (2 * most if scheme.symmetric else high - low) / scheme.max_code


def _loss(groups: Tensor, scales: Tensor, zeros: Tensor, scheme: Scheme, curvature: Tensor) -> Tensor:
    """What the rounding of ``groups`` [out, groups, channels] costs each of them, or all: [out, groups]."""
    wide_scales, wide_zeros = scales.float().unsqueeze(-1), zeros.float().unsqueeze(-1)
    codes = encode(groups, wide_scales, wide_zeros, scheme.max_code)
    error = decode(codes, wide_scales, wide_zeros).sub_(groups)
    if curvature.dim() == 2:
        loss = error.square_().mul_(curvature).sum(-1)
    else:
        loss = torch.einsum("ngc,gcd->ngd", error, curvature).mul_(error).sum(-1)
    return loss.sum().expand_as(loss) if scheme.group_size == WHOLE_TENSOR else loss


def encode(values: Tensor, scales: Tensor, zeros: Tensor, max_code: int) -> Tensor:
    """Codes of ``values``, as whole numbers in fp32. ``scales`` and ``zeros`` in fp32 broadcast against them."""
    return (values / scales).round_().add_(zeros).clamp_(0, max_code)


def decode(codes: Tensor, scales: Tensor, zeros: Tensor) -> Tensor:
    """The values that ``codes`` stand for, fp32."""
    return scales * (codes - zeros)


def per_channel(grid: Tensor, in_features: int) -> Tensor:
    """A grid's scales or zero points [out, groups] → fp32 [out, in], each repeated over its group."""
    return grid.float().repeat_interleave(in_features // grid.shape[1], dim=1)


def energy(error: Tensor, hessian: Tensor | None) -> float:
    """tr(E H Eᵀ): the squared error of a layer's outputs, of the error E [out, in] of its weights and the second moment
    H of its inputs; ‖E‖² without it."""
    return float(((error if hessian is None else error @ hessian) * error).sum())


def _ceil_fp16(positive: Tensor) -> Tensor:
    """The smallest fp16 number that is not below ``positive`` fp32, which fp16's range must hold."""
    rounded = positive.to(torch.float16)
    # Positive floats are ordered as the integers of the same bits: the next number is one up.
    following = (rounded.view(torch.int16) + 1).view(torch.float16)
    return torch.where(rounded.float() < positive, following, rounded)
