"""AWQ: make the weights of the channels with large inputs larger, so that rounding costs those channels less.

Lin et al.: "AWQ: Activation-aware Weight Quantization for LLM Compression and Acceleration", MLSys 2024, with the duo
scaling of AutoAWQ: for input means x and the weights' mean share of their group's largest, w,

    s = x^r / w^(1 − r),   divided by √(max s · min s)

of 20 ratios r the one with which least changes when the linears that read the scaled channels are rounded: of linears
after a norm, what the whole sublayer gives, attention or MLP; of others, what they give themselves. The scales are
folded into the operation before. Then ranges are clipped where that lessens a layer's own output error.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor

from llmq.checkpoint.config import ModelConfig
from llmq.quant.activations import HiddenStates, moments_at_once, squared_distance
from llmq.quant.affine import energy
from llmq.quant.folding import (
    Fold,
    apply,
    exact_scales,
    foldable,
    gather,
    linear,
    linear_folds,
    norm_folds,
    scaled_rounding,
    spread,
    trial,
)
from llmq.runtime.decoder import DecoderLayer
from llmq.scheme import Scheme

RATIOS = tuple(step / 20 for step in range(20))
SEARCH_TOKENS = 8192
"""Tokens of the calibration text on which ratios are compared."""
SMALLEST = 1e-4
UNCLIPPED = ("q_proj", "k_proj", "qkv_proj")
"""Their products decide where attention goes, and bear no clipping."""


def fold(
    block: DecoderLayer, config: ModelConfig, states: HiddenStates, schemes: Mapping[str, Scheme]
) -> dict[str, Tensor]:
    """Scale the linears of ``block`` that ``schemes`` names, in place; what the block computes stays as it is.

    Returns what changed beside them: names in ``block`` → tensors as checkpoints have them.
    """
    sample = states.sample(SEARCH_TOKENS)
    attention, mlp = norm_folds(config)
    values, products = linear_folds(config)
    changed = _fold_norm(attention, block, sample, schemes) | _fold_linears(values, block, sample, schemes)
    sample.mix(block)
    return changed | _fold_norm(mlp, block, sample, schemes) | _fold_linears(products, block, sample, schemes)


def _fold_norm(
    fold: Fold, block: DecoderLayer, sample: HiddenStates, schemes: Mapping[str, Scheme]
) -> dict[str, Tensor]:
    if not foldable(fold, block, schemes):
        return {}
    # All readers have the same inputs, but an expert sees only some of them, and a router all.
    first = (*fold.others, *fold.readers)[0]
    means = _mean_inputs(block, sample, (first,))[first]
    readers = {name: schemes[name] for name in fold.readers}
    targets = list(sample.outputs(block))

    def loss(scales: Tensor) -> float:
        with trial(block, readers, dict.fromkeys(readers, scales)):
            return squared_distance(sample.outputs(block), targets)

    return _fold(fold, block, schemes, means, loss)


def _fold_linears(
    folds: Sequence[Fold], block: DecoderLayer, sample: HiddenStates, schemes: Mapping[str, Scheme]
) -> dict[str, Tensor]:
    folds = [fold for fold in folds if foldable(fold, block, schemes)]
    if not folds:
        return {}
    means = _mean_inputs(block, sample, [fold.readers[0] for fold in folds])
    changed: dict[str, Tensor] = {}
    moments: dict[str, Tensor] = {}
    for number, fold in enumerate(folds):
        (name,) = fold.readers
        weight = linear(block, name).weight.float()
        together = moments_at_once(weight.shape[1])
        if number % together == 0:
            moments.clear()
            some = [reader for one in folds[number : number + together] for reader in one.readers]
            moments = sample.second_moments(block, some, "")
        if name in moments:  # else it is an expert that no token was sent to
            changed |= _fold(
                fold, block, schemes, means[name], partial(_output_loss, weight, schemes[name], moments[name])
            )
    return changed


def _output_loss(weight: Tensor, scheme: Scheme, hessian: Tensor, scales: Tensor) -> float:
    """What rounding costs the layer's own outputs."""
    return energy(scaled_rounding(weight, scheme, scales).sub_(weight), hessian)


def _fold(
    fold: Fold, block: DecoderLayer, schemes: Mapping[str, Scheme], means: Tensor, loss: Callable[[Tensor], float]
) -> dict[str, Tensor]:
    """Fold the scales of the ratio that has the least ``loss``, unless it is least without any."""
    shares = [_share_of_group(linear(block, name).weight.float(), schemes[name]) for name in fold.readers]
    x, w = (gather(fold, block, numbers) for numbers in (means, torch.cat(shares).mean(0)))
    best, least = None, loss(torch.ones_like(means))
    for ratio in RATIOS:
        scales = exact_scales(fold, _scales(x, w, ratio))
        if (cost := loss(spread(fold, block, scales))) < least:
            best, least = scales, cost
    return {} if best is None else apply(fold, block, best)


def _mean_inputs(block: DecoderLayer, sample: HiddenStates, names: Sequence[str]) -> dict[str, Tensor]:
    """Σ |x| / tokens of each input channel of the layers ``names``, fp32 [in]; nothing of an expert without inputs."""
    seen: dict[str, list[Tensor]] = {name: [] for name in names}

    def view(name: str, x: Tensor) -> None:
        seen[name].append(x.float().abs().sum(0) / sample.tokens)

    sample.show_inputs(block, {name: partial(view, name) for name in names})
    return {name: torch.stack(sums).sum(0) for name, sums in seen.items() if sums}


def _scales(x: Tensor, w: Tensor, ratio: float) -> Tensor:
    scales = (x.pow(ratio) / (w.pow(1 - ratio) + SMALLEST)).clamp(min=SMALLEST)
    scales = scales / (scales.max() * scales.min()).sqrt()
    return torch.where(scales.isfinite(), scales, torch.ones_like(scales))


def _share_of_group(weight: Tensor, scheme: Scheme) -> Tensor:
    """|w| as a share of the largest of its group, [out, in]."""
    groups = weight.abs().view(len(weight), -1, scheme.group_length(weight.shape[1]))
    return (groups / groups.amax(-1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)).view_as(weight)
