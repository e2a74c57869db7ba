"""GPTQ: round the columns of a weight one after another, each error made good by the columns not yet rounded.

Frantar, Ashkboos, Hoefler, Alistarh: "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained
Transformers", ICLR 2023, with static act-order: every group's grid is fitted to the original weights, with clipping
weighed by the inputs' energy; then columns are rounded in descending order of that energy. Codes stay where their
columns are, so the order costs nothing when the model runs.
"""

from __future__ import annotations

import torch
from torch import Tensor

from llmq.checkpoint.quantized_weight import QuantizedWeight
from llmq.quant.affine import decode, encode, fit_grid, per_channel
from llmq.scheme import Scheme

DAMP_PERCENT = 0.01
"""Added to the Hessian's diagonal, as a share of its mean."""
DAMP_TRIES = 3
"""Each ten times the last, where the Hessian cannot be factored: 1 %, 10 %, 100 %."""
BLOCK = 128
"""Columns whose errors are carried to all later columns in one product."""


class NotPositiveDefinite(ArithmeticError):
    """The Hessian cannot be factored, however much it is damped."""


def quantize_weight(weight: Tensor, scheme: Scheme, hessian: Tensor) -> QuantizedWeight:
    """Quantize ``weight`` fp32 [out, in], whose inputs have the second moment ``hessian`` fp32 [in, in].

    Raises NotPositiveDefinite when the Hessian cannot be used.
    """
    in_features = weight.shape[1]
    scales, zeros = fit_grid(weight, scheme, hessian.diagonal())
    order = torch.argsort(hessian.diagonal(), descending=True, stable=True)
    compensation = _compensation(hessian[order][:, order])
    # Transposed, so that what is rounded together lies together: [in, out].
    left = weight.t()[order]
    all_scales = per_channel(scales, in_features).t()[order]
    all_zeros = per_channel(zeros, in_features).t()[order]
    codes = torch.empty_like(left)

    for start in range(0, in_features, BLOCK):
        block = slice(start, min(start + BLOCK, in_features))
        inner = compensation[block, block]
        columns = left[block].clone()
        errors = torch.empty_like(columns)
        for i, column in enumerate(columns):
            scale, zero = all_scales[start + i], all_zeros[start + i]
            code = codes[start + i] = encode(column, scale, zero, scheme.max_code)
            errors[i] = (column - decode(code, scale, zero)) / inner[i, i]
            columns[i + 1 :].addr_(inner[i, i + 1 :], errors[i], alpha=-1)
        left[block.stop :].addmm_(compensation[block, block.stop :].t(), errors, alpha=-1)

    natural = torch.empty_like(weight, dtype=torch.uint8)
    natural[:, order] = codes.t().to(torch.uint8)
    return QuantizedWeight(scheme, natural, scales, zeros)


def _compensation(hessian: Tensor) -> Tensor:
    """The upper triangular U with H⁻¹ = Uᵀ U: row i says how an error in column i is made good by those after it.

    Found from one Cholesky factor of H with its order reversed (H = R Rᵀ with R upper, U = R⁻¹), which loses less in
    fp32 than inverting H first. Channels that never saw an input have no say in the others: their columns are rounded
    to nearest.
    """
    hessian = hessian.clone()
    diagonal = hessian.diagonal()
    dead = diagonal == 0
    mean = diagonal[~dead].mean() if not dead.all() else diagonal.new_ones(())
    diagonal[dead] = mean
    for attempt in range(DAMP_TRIES):
        damped = hessian.flip(0, 1)
        damped.diagonal().add_(mean * DAMP_PERCENT * 10**attempt)
        lower, failed = torch.linalg.cholesky_ex(damped)
        if not failed and lower.isfinite().all():
            identity = torch.eye(len(lower), device=lower.device)
            upper: Tensor = torch.linalg.solve_triangular(lower.flip(0, 1), identity, upper=True)
            return upper
    raise NotPositiveDefinite
