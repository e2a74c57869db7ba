"""Cosines and sines of the angles by which the rotary position embedding turns (Su et al., 2021), in one pass.

angle of pair i at position p  =  p · frequencies[i]
"""

from __future__ import annotations

from torch import Tensor

from llmq.runtime.kernels import runs_triton


def cos_and_sin(positions: Tensor, frequencies: Tensor, factor: float) -> tuple[Tensor, Tensor]:
    """Cosine and sine, each fp32 [tokens, 1, pairs], times ``factor``.

    positions    integers [tokens]
    frequencies  fp32 [pairs], radians per position
    """
    if not runs_triton(frequencies):
        return cos_and_sin_reference(positions, frequencies, factor)
    from llmq.runtime.kernels.angles_triton import cos_and_sin_triton

    return cos_and_sin_triton(positions, frequencies, factor)


def cos_and_sin_reference(positions: Tensor, frequencies: Tensor, factor: float) -> tuple[Tensor, Tensor]:
    """``cos_and_sin`` in plain PyTorch."""
    angles = positions[:, None, None] * frequencies
    return (angles.cos(), angles.sin()) if factor == 1 else (angles.cos() * factor, angles.sin() * factor)
