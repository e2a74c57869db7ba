"""SmoothQuant: move outliers from activations, which a token's one scale serves badly, to weights, which bear them.

Xiao et al.: "SmoothQuant: Accurate and Efficient Post-Training Quantization for Large Language Models", ICML 2023. For
the largest inputs x and weights w of each channel after a norm,

    s = x^α / w^(1 − α)

divides what the norm gives and multiplies the weights that read it. What attention and the MLP's product give to
``o_proj`` and ``down_proj`` is left as it is, and so is what experts read: one channel is large for one and not for
another.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from llmq.checkpoint.config import ModelConfig
from llmq.quant.activations import HiddenStates, squared_distance
from llmq.quant.folding import Fold, apply, foldable, linear, norm_folds, trial
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
    block: DecoderLayer,
    config: ModelConfig,
    states: HiddenStates,
    schemes: Mapping[str, Scheme],
    alpha: float | str,
) -> dict[str, Tensor]:
    """Smooth the linears of ``block`` that ``schemes`` names, in place; what the block computes stays as it is.

    An ``alpha`` of ``auto`` is searched for: that with which the block's output changes least when weights and inputs
    are rounded. Returns what changed beside the linears: names in ``block`` → tensors as checkpoints have them.
    """
    largest: dict[Fold, tuple[Tensor, Tensor]] = {}
    passing = states.sample(states.tokens)
    for one in norm_folds(config):
        if one.previous != "input_layernorm":
            passing.mix(block)
        if foldable(one, block, schemes) and not one.others:
            largest[one] = _largest(one, block, passing)
    if isinstance(alpha, str):
        alpha = _search(block, states.sample(SEARCH_TOKENS), schemes, largest)
    changed: dict[str, Tensor] = {}
    for one, (x, w) in largest.items():
        changed |= apply(one, block, _scales(x, w, alpha))
    return changed


def _largest(fold: Fold, block: DecoderLayer, passing: HiddenStates) -> tuple[Tensor, Tensor]:
    """The largest |x| and |w| of each channel, fp32 [in]."""
    inputs: list[Tensor] = []
    passing.show_inputs(block, {fold.readers[0]: lambda x: inputs.append(x.float().abs().amax(0))})
    weights = [linear(block, name).weight.float().abs().amax(0) for name in fold.readers]
    return torch.stack(inputs).amax(0), torch.stack(weights).amax(0)


def _search(
    block: DecoderLayer,
    sample: HiddenStates,
    schemes: Mapping[str, Scheme],
    largest: Mapping[Fold, tuple[Tensor, Tensor]],
) -> float:
    targets = _passed(block, sample)
    losses: dict[float, float] = {}
    for alpha in ALPHAS:
        scales = {name: _scales(x, w, alpha) for one, (x, w) in largest.items() for name in one.readers}
        with trial(block, schemes, scales):
            losses[alpha] = squared_distance(_passed(block, sample), targets)
    return min(losses, key=losses.__getitem__)


def _passed(block: DecoderLayer, sample: HiddenStates) -> list[Tensor]:
    """The outputs of ``block``."""
    passing = sample.sample(sample.tokens)
    passing.mix(block)
    passing.finish(block)
    return passing.inputs


def _scales(x: Tensor, w: Tensor, alpha: float) -> Tensor:
    return (x.clamp(min=SMALLEST).pow(alpha) / w.clamp(min=SMALLEST).pow(1 - alpha)).clamp(min=SMALLEST)
