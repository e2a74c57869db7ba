"""Learned rounding: the block's own output tells each weight whether to go up or down, and each group where to be cut.

Cheng et al.: "Optimize Weight Rounding via Signed Gradient Descent for the Quantization of LLMs", 2023 (AutoRound).
All layers of a decoder block learn together, to bring its output back to what it was:

    low, high  ← the ends of each group, times a clip of their own in (0, 1]
    weight     ≈ scale · (clamp(round(weight / scale + offset) + zero, 0, 2^bits − 1) − zero)       |offset| ≤ ½

Offsets and clips go against the sign of their gradients, all by the same length, which falls to 0 along the way.
Gradients pass through a rounding as if it were not there (Bengio et al., 2013: the straight-through estimator). What
the last step leaves is kept: each step sees another batch, and the step of the least error had the easiest one.

A weight moves to a neighbouring code at most. Where outliers of the inputs meet weights that are smaller than a step,
that is too far or not at all: let AWQ's scales (``awq.fold``) even them out before.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.utils.hooks import RemovableHandle

from llmq.checkpoint.quantized_weight import QuantizedWeight
from llmq.quant.activations import HiddenStates
from llmq.quant.affine import decode, fit_grid, grid_between, step_between
from llmq.quant.folding import linear
from llmq.runtime.decoder import DecoderLayer
from llmq.scheme import Scheme

STEPS = 200
MAX_OFFSET = 0.5
MIN_CLIP = 0.2
"""At 0 there would be no grid."""


def quantize_block(
    block: DecoderLayer,
    schemes: Mapping[str, Scheme],
    states: HiddenStates,
    targets: Sequence[Tensor],
    *,
    seed: int,
    steps: int = STEPS,
) -> dict[str, QuantizedWeight]:
    """Quantize the linears of ``block`` that ``schemes`` names, by integers that each group has its own scale for.

    states   the calibration windows as the quantized blocks before this one leave them
    targets  [tokens, hidden] for each batch of ``states``: the block's outputs in the model that is quantized. So a
             block makes good what those before it lost, which is better than to reproduce its own output on ``states``

    ``block`` is left as it was. Not to be called in inference mode, whose tensors have no gradients.
    """
    weights = {name: linear(block, name).weight for name in schemes}
    energies = _input_energies(block, schemes, states)
    roundings = {name: Rounding(weights[name], scheme, energies[name]) for name, scheme in schemes.items()}
    with _parametrized(block, roundings), torch.enable_grad():
        for step, number in enumerate(_order(len(targets), steps, seed)):
            target = targets[number].to(states.device, non_blocking=True)
            error = _outputs(block, states, number) - target.float()
            torch.autograd.backward(error.square().sum(-1).mean())  # of a token: a mean of all would underflow in fp16
            for rounding in roundings.values():
                rounding.step((1 - step / steps) / steps)
    return {name: rounding.result(weights[name]) for name, rounding in roundings.items()}


class Rounding(nn.Module):
    """The rounding of one weight as it is learned: a parametrization, weight [out, in] → quantized weight.

    offset  [out, groups, channels]
    clips   [2, out, groups], of the low and the high ends
    """

    def __init__(self, weight: Tensor, scheme: Scheme, energy: Tensor) -> None:
        """Begin with rounding to nearest, on grids that are clipped as best for inputs of ``energy`` [in]."""
        super().__init__()
        self.scheme = scheme
        wide = weight.float()
        groups = self._groups(wide)
        self.ends = torch.stack((groups.amin(-1).clamp(max=0), groups.amax(-1).clamp(min=0)))
        clip = fit_grid(wide, scheme, energy)[0].float() / fit_grid(wide, scheme)[0].float()
        self.offset = nn.Parameter(torch.zeros_like(groups))
        self.clips = nn.Parameter(clip.expand_as(self.ends).clone())

    def forward(self, weight: Tensor) -> Tensor:
        codes, scales, zeros = self._quantize(weight)
        return decode(codes, scales.unsqueeze(-1), zeros.unsqueeze(-1)).view_as(weight)

    @torch.no_grad()
    def step(self, length: float) -> None:
        """Go ``length`` against the signs of the gradients, and forget these."""
        for parameter, least, most in ((self.offset, -MAX_OFFSET, MAX_OFFSET), (self.clips, MIN_CLIP, 1.0)):
            if parameter.grad is not None:  # none where no token of the batch has come to this layer
                parameter.sub_(parameter.grad.sign_(), alpha=length).clamp_(least, most)
                parameter.grad = None

    @torch.no_grad()
    def result(self, weight: Tensor) -> QuantizedWeight:
        codes, scales, zeros = self._quantize(weight)
        return QuantizedWeight(
            self.scheme, codes.view_as(weight).to(torch.uint8), scales.to(torch.float16), zeros.to(torch.uint8)
        )

    def _quantize(self, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Codes [out, groups, channels], scales and zero points [out, groups]: all in fp32, all with gradients."""
        low, high = self.ends * self.clips
        step = step_between(low, high, self.scheme)
        served_scales, served_zeros = grid_between(low.detach(), high.detach(), self.scheme)
        scales, zeros = _straight_through(step, served_scales.float()), served_zeros.float()
        if not self.scheme.symmetric:
            zeros = _straight_through(-low / scales, zeros)
        places = self._groups(weight.float()) / scales.unsqueeze(-1) + self.offset
        codes = _straight_through(places, places.round()) + zeros.unsqueeze(-1)
        return codes.clamp(0, self.scheme.max_code), scales, zeros

    def _groups(self, weight: Tensor) -> Tensor:
        return weight.view(len(weight), -1, self.scheme.group_length(weight.shape[1]))


def _straight_through(value: Tensor, rounded: Tensor) -> Tensor:
    """``rounded``, with the gradient of ``value``."""
    return value + (rounded - value).detach()


def _outputs(block: DecoderLayer, states: HiddenStates, number: int) -> Tensor:
    """What ``block`` makes of a batch of ``states``, fp32 [tokens, hidden], in a way that gradients can be taken of.

    The products are in the model's type, and the residual stream is in fp32, where small errors do not drown.
    """
    dtype = states.inputs[number].dtype
    residual = states.residual(number).float()
    cos, sin = (angles[: len(residual)] for angles in states.rotations[block.self_attn.rope])
    with torch.autocast(residual.device.type, dtype, enabled=dtype != torch.float32):
        mixed = block.mix(residual, None, (cos, sin), states.attend)
        return residual + block.finish(residual, mixed)


def _input_energies(block: DecoderLayer, names: Iterable[str], states: HiddenStates) -> dict[str, Tensor]:
    """Σ x², fp32 [in], over all inputs x of each of those linears."""
    energies = {name: torch.zeros(linear(block, name).in_features, device=states.device) for name in names}

    def watch(name: str) -> RemovableHandle:
        def add(_: nn.Module, inputs: tuple[Any, ...]) -> None:
            energies[name].add_(inputs[0].float().square().sum(0))

        return linear(block, name).register_forward_pre_hook(add)

    handles = [watch(name) for name in energies]
    try:
        for number in range(len(states.inputs)):
            _outputs(block, states, number)
    finally:
        for handle in handles:
            handle.remove()
    return energies


def _order(batches: int, steps: int, seed: int) -> Iterator[int]:
    """The batch of each step: all in random order, again and again."""
    generator = torch.Generator().manual_seed(seed)
    for step in range(steps):
        if step % batches == 0:
            order = torch.randperm(batches, generator=generator).tolist()
        yield order[step % batches]


@contextmanager
def _parametrized(block: DecoderLayer, roundings: Mapping[str, Rounding]) -> Iterator[None]:
    """Meanwhile the linears of ``block`` compute with weights that are rounded."""
    for name, rounding in roundings.items():
        parametrize.register_parametrization(linear(block, name), "weight", rounding, unsafe=True)
    try:
        yield
    finally:
        for name in roundings:
            parametrize.remove_parametrizations(linear(block, name), "weight", leave_parametrized=False)
