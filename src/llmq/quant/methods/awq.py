"""AWQ: make the weights of the channels with large inputs larger, so that rounding costs those channels less.

Lin et al.: "AWQ: Activation-aware Weight Quantization for LLM Compression and Acceleration", MLSys 2024, with the duo
scaling of AutoAWQ: for input means x and the weights' mean share of their group's largest, w,

    s = x^r / w^(1 − r),   divided by √(max s · min s)

of 20 ratios r the one with which the sublayer's output, attention's or the MLP's, changes least when its linears are
rounded. The scales are folded into the operation before; then ranges are clipped where that lessens the layer's own
output error.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from llmq.quant.activations import HiddenStates
from llmq.quant.folding import (
    ATTENTION_NORM,
    MLP_NORM,
    UP,
    VALUES,
    Fold,
    apply,
    foldable,
    gather,
    linear,
    spread,
    trial,
)
from llmq.runtime.decoder import DecoderLayer
from llmq.scheme import Scheme

RATIOS = tuple(step / 20 for step in range(20))
SEARCH_TOKENS = 8192
"""Tokens of the calibration text on which ratios are compared."""
SMALLEST = 1e-4
ATTENTION, MLP = (ATTENTION_NORM, VALUES), (MLP_NORM, UP)
UNCLIPPED = ("q_proj", "k_proj")
"""Their products decide where attention goes, and bear no clipping."""


def fold(block: DecoderLayer, states: HiddenStates, schemes: Mapping[str, Scheme]) -> dict[str, Tensor]:
    """Scale the linears of ``block`` that ``schemes`` names, in place; what the block computes stays as it is.

    Returns the changed parameters that are no weights of linears, by their names in ``block``.
    """
    changed: dict[str, Tensor] = {}
    sample = states.sample(SEARCH_TOKENS)
    for folds in ATTENTION, MLP:
        if folds is MLP:
            sample.mix(block)
        targets = list(sample.outputs(block))
        for one in folds:
            if foldable(one, block, schemes):
                scales = _search(one, block, sample, schemes, targets)
                if scales is not None:
                    changed |= apply(one, block, scales)
    return changed


def _search(
    fold: Fold, block: DecoderLayer, sample: HiddenStates, schemes: Mapping[str, Scheme], targets: list[Tensor]
) -> Tensor | None:
    """The best scales of the outputs of ``fold.previous``, fp32; None where none are better than all 1."""
    readers = {name: linear(block, name) for name in fold.linears}
    inputs = next(iter(readers.values())).in_features
    outputs = len(block.get_parameter(f"{fold.previous}.weight"))
    means = sum(x.float().abs().sum(0) for x in sample.inputs_of(block, fold.linears[0])) / sample.tokens
    assert isinstance(means, Tensor)
    x = gather(means, block, outputs)
    shares = [_share_of_group(reader.weight.float(), schemes[name]) for name, reader in readers.items()]
    w = gather(torch.cat(shares).mean(0), block, outputs)

    best, least = None, torch.tensor(torch.inf)
    for ratio in (None, *RATIOS):
        scales = torch.ones_like(x) if ratio is None else _scales(x, w, ratio)
        wide = spread(scales, block, inputs)
        with trial(block, {name: schemes[name] for name in readers}, dict.fromkeys(readers, wide)):
            pairs = zip(sample.outputs(block), targets, strict=True)
            loss = torch.stack([(out - target).float().square().sum() for out, target in pairs]).sum().cpu()
        if loss < least:
            best, least = None if ratio is None else scales, loss
    return best


def _scales(x: Tensor, w: Tensor, ratio: float) -> Tensor:
    scales = (x.pow(ratio) / (w.pow(1 - ratio) + SMALLEST)).clamp(min=SMALLEST)
    scales = scales / (scales.max() * scales.min()).sqrt()
    return torch.where(scales.isfinite(), scales, torch.ones_like(scales))


def _share_of_group(weight: Tensor, scheme: Scheme) -> Tensor:
    """|w| as a share of the largest of its group, [out, in]."""
    groups = weight.abs().view(len(weight), -1, scheme.group_length(weight.shape[1]))
    return (groups / groups.amax(-1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)).view_as(weight)
