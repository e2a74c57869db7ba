"""GPTQ: round the columns of a weight one after another, each error made good by the columns not yet rounded.

Frantar, Ashkboos, Hoefler, Alistarh: "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained
Transformers", ICLR 2023, with act-order: columns are rounded in descending order of their inputs' energy. Every
group's grid is fitted to the original weights before, with clipping weighed by that energy. With ``static`` order a
group is a run of neighbours, whenever they are rounded, and the order costs nothing when the model runs; with
``dynamic`` order it is of columns that are rounded together, which keeps those of much energy among themselves.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from llmq.checkpoint.quantized_weight import QuantizedWeight
from llmq.quant.affine import fit_grid
from llmq.quant.options import DYNAMIC, OFF, STATIC
from llmq.runtime.kernels.round_columns import MAX_COLUMNS, round_columns
from llmq.scheme import WHOLE_TENSOR, Scheme

DAMP_PERCENT = 0.01
"""Added to the Hessian's diagonal, as a share of its mean."""
DAMP_TRIES = 3
"""Each ten times the last, where the Hessian cannot be factored: 1 %, 10 %, 100 %."""
BLOCK = MAX_COLUMNS
"""Columns whose errors are carried to all later columns in one product."""


class NotPositiveDefinite(ArithmeticError):
    """The Hessian cannot be factored, however much it is damped."""


def quantize_weights(
    weights: Sequence[Tensor], scheme: Scheme, hessian: Tensor, act_order: str = STATIC
) -> list[QuantizedWeight]:
    """Quantize layers that have the same inputs. As ``quantize_weight`` of each, but their rows, one below
    another, take no more steps than one layer's, and one inverse."""
    if len(weights) == 1 or scheme.group_size == WHOLE_TENSOR:
        return [quantize_weight(weight, scheme, hessian, act_order) for weight in weights]
    stacked = quantize_weight(torch.cat(tuple(weights)), scheme, hessian, act_order)
    rows = [len(weight) for weight in weights]
    return [
        QuantizedWeight(scheme, codes, scales, zeros, stacked.group_index)
        for codes, scales, zeros in zip(
            *(torch.split(part, rows) for part in (stacked.codes, stacked.scales, stacked.zero_points)), strict=True
        )
    ]


def quantize_weight(weight: Tensor, scheme: Scheme, hessian: Tensor, act_order: str = STATIC) -> QuantizedWeight:
    """Quantize ``weight`` fp32 [out, in] to integers, whose inputs have the second moment ``hessian`` fp32 [in, in].

    Raises NotPositiveDefinite when the Hessian cannot be used.
    """
    in_features = weight.shape[1]
    energy = hessian.diagonal()
    natural = torch.arange(in_features, device=weight.device)
    order = natural if act_order == OFF else torch.argsort(energy, descending=True, stable=True)
    members = order if act_order == DYNAMIC else natural  # the columns, group by group
    scales, zeros = fit_grid(weight if members is natural else weight[:, members], scheme, energy[members])
    group_index = torch.empty_like(natural)
    group_index[members] = natural // scheme.group_length(in_features)
    compensation = _compensation(hessian, order)
    # Transposed, so that what is rounded together lies together: [in, out], and [groups, out].
    left = weight.t()[order]
    wide_scales, wide_zeros = (part.float().t().contiguous() for part in (scales, zeros))
    in_place = torch.empty_like(weight, dtype=torch.uint8)
    for start in range(0, in_features, BLOCK):
        block = slice(start, min(start + BLOCK, in_features))
        which = order[block]
        codes, errors = round_columns(
            left[block],
            compensation[block, block],
            wide_scales,
            wide_zeros,
            group_index[which],
            scheme.max_code,
        )
        in_place[:, which] = codes.t()
        left[block.stop :].addmm_(compensation[block, block.stop :].t(), errors, alpha=-1)

    scattered = act_order == DYNAMIC and not torch.equal(group_index, natural // scheme.group_length(in_features))
    return QuantizedWeight(scheme, in_place, scales, zeros, group_index if scattered else None)


def _compensation(hessian: Tensor, order: Tensor) -> Tensor:
    """The upper triangular U with H⁻¹ = Uᵀ U, of H with its channels in ``order``: row i says how an error in column i
    is made good by those after it.

    Found from one Cholesky factor of H with its order reversed (H = R Rᵀ with R upper, U = R⁻¹), which loses less in
    fp32 than inverting H first. Channels that never saw an input have no say in the others: their columns are rounded
    to nearest.
    """
    reverse = order.flip(0)
    energy = hessian.diagonal()[reverse]
    dead = energy == 0
    mean = energy[~dead].mean() if not dead.all() else energy.new_ones(())
    for attempt in range(DAMP_TRIES):
        damped = hessian[reverse][:, reverse]  # at once, torch would make two int64 of each element first
        damped.diagonal().add_(mean * DAMP_PERCENT * 10**attempt).add_(mean * dead)
        lower, failed = torch.linalg.cholesky_ex(damped)
        del damped  # of a wide layer it takes a gigabyte
        if not failed and lower.diagonal().isfinite().all():  # NaN in a row reaches its diagonal
            factor = lower.flip(0, 1)
            del lower
            upper = torch.eye(len(factor), device=factor.device)
            torch.linalg.solve_triangular(factor, upper, upper=True, out=upper)
            return upper
    raise NotPositiveDefinite
