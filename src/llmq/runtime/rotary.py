"""The angles of the rotary position embedding (Su et al., 2021), with all its scalings beyond the trained context.

angle of pair i at position p  =  p · frequency[i]        pair i: channels i and i + rotated / 2 of a head
                               | rotated channels | the rest pass as they are |
                               0                  rotated                     head_dim
"""

from __future__ import annotations

import math
from functools import lru_cache

import torch
from torch import Tensor

from llmq.checkpoint.config import ModelConfig
from llmq.checkpoint.rope import Rope
from llmq.runtime.kernels.angles import cos_and_sin

Rotation = tuple[Tensor, Tensor]
"""cos and sin, fp32 [tokens, 1, rotated / 2]."""


def rotary_angles(config: ModelConfig, positions: Tensor) -> dict[Rope, Rotation]:
    """The rotations of tokens at ``positions`` [tokens], for each ``Rope`` that some layer has."""
    return {rope: _rotation(rope, config, positions) for rope in dict.fromkeys(config.ropes)}


def _rotation(rope: Rope, config: ModelConfig, positions: Tensor) -> Rotation:
    frequencies = _frequencies_on(rope, config.head_dim, config.context_length, positions.device)
    return cos_and_sin(positions, frequencies, rope.attention_factor)


@lru_cache
def _frequencies_on(rope: Rope, head_dim: int, context: int, device: torch.device) -> Tensor:
    # Kept where they are used: a step that copied them would have to wait for the copy.
    with torch.inference_mode(False):
        return rotary_frequencies(rope, head_dim, context).to(device)


def rotary_frequencies(rope: Rope, head_dim: int, context: int) -> Tensor:
    """Radians per position, fp32 [rotated / 2], for sequences of up to ``context`` tokens.

    linear    all slower by ``factor``
    dynamic   a greater base, as much as ``context`` exceeds the original one ("NTK-aware", by bloc97 and emozilla)
    llama3    wavelengths longer than the trained context slower by ``factor``, the short ones as they are, and
              interpolated between (Llama 3.1 model card)
    yarn      the same by the turns within the trained context, on a ramp over channels (Peng et al., 2023)
    longrope  divided by searched factors, one set for the trained context and one beyond (Ding et al., 2024)
    """
    rotated, theta = rope.rotated(head_dim), rope.theta
    if rope.kind == "dynamic" and context > rope.original_context:
        growth = rope.factor * context / rope.original_context - (rope.factor - 1)
        theta *= growth ** (rotated / (rotated - 2))
    exponents = torch.arange(0, rotated, 2, dtype=torch.int64).float() / rotated
    frequencies = 1.0 / theta**exponents
    match rope.kind:
        case "linear":
            return frequencies / rope.factor
        case "llama3":
            wavelengths = 2 * math.pi / frequencies
            low, high = rope.low_freq_factor, rope.high_freq_factor
            kept = ((rope.original_context / wavelengths - low) / (high - low)).clamp(0, 1)
            return (1 - kept) * frequencies / rope.factor + kept * frequencies
        case "yarn":
            kept = 1 - _yarn_ramp(rope, rotated)
            return (1 - kept) * frequencies / rope.factor + kept * frequencies
        case "longrope":
            factors = rope.long_factors if context > rope.original_context else rope.short_factors
            return 1.0 / (torch.tensor(factors) * theta**exponents)
        case _:
            return frequencies


def _yarn_ramp(rope: Rope, rotated: int) -> Tensor:
    """How far each pair is scaled, from 0 to 1: [rotated / 2]."""

    def pair_that_turns(times: float) -> float:
        turns = rope.original_context / (times * 2 * math.pi)
        return rotated * math.log(turns) / (2 * math.log(rope.theta))

    first, last = pair_that_turns(rope.beta_fast), pair_that_turns(rope.beta_slow)
    if rope.truncate:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, rotated - 1)
    width = last - first or 0.001
    return ((torch.arange(rotated // 2).float() - first) / width).clamp(0, 1)
