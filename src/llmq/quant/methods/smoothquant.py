"""SmoothQuant: move outliers from activations, which a token's one scale serves badly, to weights, which bear them.

Xiao et al.: "SmoothQuant: Accurate and Efficient Post-Training Quantization for Large Language Models", ICML 2023. For
the largest inputs x and weights w of each channel after a norm,

    s = x^α / w^(1 − α)

divides what the norm gives and multiplies the weights that read it. What attention and the MLP's product give to
``o_proj`` and ``down_proj`` is left as it is.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from llmq.quant.activations import HiddenStates
from llmq.quant.folding import ATTENTION_NORM, MLP_NORM, Fold, apply, foldable, linear, trial
from llmq.runtime.decoder import DecoderLayer
from llmq.scheme import Scheme

ALPHAS = tuple(step / 20 for step in range(4, 20))
"""Migration strengths that a search compares."""
SEARCH_TOKENS = 8192
"""Tokens of the calibration text on which it does."""
SMALLEST = 1e-5
FAMILY_ALPHAS = {"llama": 0.85, "mistral": 0.8, "mixtral": 0.8}
"""What the method's authors publish for a family's models; 0.5, their default, for others."""


def default_alpha(model_type: str) -> float:
    """The migration strength for a family of models."""
    return FAMILY_ALPHAS.get(model_type, 0.5)


def fold(
    block: DecoderLayer, states: HiddenStates, schemes: Mapping[str, Scheme], alpha: float | None
) -> dict[str, Tensor]:
    """Smooth the linears of ``block`` that ``schemes`` names, in place; what the block computes stays as it is.

    ``alpha`` None is searched for: that with which the block's output changes least when weights and inputs are
    rounded. Returns the changed parameters that are no weights of linears, by their names in ``block``.
    """
    largest: dict[Fold, tuple[Tensor, Tensor]] = {}
    passing = states.sample(states.tokens)
    for one in (ATTENTION_NORM, MLP_NORM):
        if foldable(one, block, schemes):
            x = torch.stack([x.float().abs().amax(0) for x in passing.inputs_of(block, one.linears[0])]).amax(0)
            w = torch.stack([linear(block, name).weight.float().abs().amax(0) for name in one.linears]).amax(0)
            largest[one] = x, w
        if one is ATTENTION_NORM:
            passing.mix(block)
    if alpha is None:
        alpha = _search(block, states.sample(SEARCH_TOKENS), schemes, largest)
    changed: dict[str, Tensor] = {}
    for one, (x, w) in largest.items():
        changed |= apply(one, block, _scales(x, w, alpha))
    return changed


def _search(
    block: DecoderLayer,
    sample: HiddenStates,
    schemes: Mapping[str, Scheme],
    largest: Mapping[Fold, tuple[Tensor, Tensor]],
) -> float:
    targets = _passed(block, sample)
    losses: dict[float, float] = {}
    for alpha in ALPHAS:
        scales = {name: _scales(x, w, alpha) for one, (x, w) in largest.items() for name in one.linears}
        with trial(block, schemes, scales):
            pairs = zip(_passed(block, sample), targets, strict=True)
            losses[alpha] = float(torch.stack([(out - target).float().square().sum() for out, target in pairs]).sum())
    return min(losses, key=losses.__getitem__)


def _passed(block: DecoderLayer, sample: HiddenStates) -> list[Tensor]:
    """The outputs of ``block``."""
    passing = sample.sample(sample.tokens)
    passing.mix(block)
    passing.finish(block)
    return passing.inputs


def _scales(x: Tensor, w: Tensor, alpha: float) -> Tensor:
    return (x.clamp(min=SMALLEST).pow(alpha) / w.clamp(min=SMALLEST).pow(1 - alpha)).clamp(min=SMALLEST)
