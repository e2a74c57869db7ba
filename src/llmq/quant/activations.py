"""The calibration windows on their way through the model: hidden states at the entrance of the block at hand."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn

from llmq.errors import LlmqError
from llmq.runtime.decoder import CausalAttention, DecoderLayer, embed
from llmq.runtime.loader import EMBEDDING, Source
from llmq.runtime.rotary import rotary_angles

MICRO_BATCH_TOKENS = 4096
"""Tokens in one forward pass: what a block's activations take of memory, whatever the number of windows."""
GPU_SHARE = 4
"""Hidden states stay on a GPU when they take no more than one part in this many of its free memory."""


class _Captured(Exception):
    """The input that was waited for has been seen: the rest of the block need not run."""


class HiddenStates:
    """The calibration windows in batches of whole windows, in the source's dtype.

    They pass each block in two steps: ``mix``, where tokens see each other, and ``finish``, each token for itself.
    inputs  [tokens, hidden] at the block's entrance
    mixed   [tokens, heads · head_dim] between the steps, else empty
    """

    def __init__(self, source: Source, windows: Tensor) -> None:
        """Embed ``windows``, token ids [windows, tokens]."""
        count, length = windows.shape
        config = source.config.for_context(length)
        batch_windows = max(1, min(count, MICRO_BATCH_TOKENS // length))
        self.tokens = windows.numel()
        self.device = source.device
        self.attend = CausalAttention(length)
        self.rotations = rotary_angles(config, torch.arange(length, device=self.device).repeat(batch_windows))
        width = config.hidden_size + config.num_heads * config.head_dim
        self.home = self._home(self.tokens * width * source.dtype.itemsize)
        embedding = source.load(f"{EMBEDDING}.weight")
        self.inputs = [
            embed(config, embedding, part.flatten().to(self.device)).to(self.home)
            for part in torch.split(windows, batch_windows)
        ]
        self.mixed: list[Tensor] = []

    def second_moment(self, block: DecoderLayer, linear: str, name: str) -> Tensor | None:
        """2/n Σ x xᵀ, fp32 [in, in], over all n inputs x of the layer ``linear`` in the step of ``block`` that comes
        next: the Hessian of the layer's squared output error. None for an expert that no token was sent to. Raises
        LlmqError, naming it ``name``, when the inputs are not finite."""
        module = block.get_submodule(linear)
        assert isinstance(module, nn.Linear)
        total = torch.zeros(module.in_features, module.in_features, device=self.device)
        seen = 0

        def accumulate(_: nn.Module, inputs: tuple[Any, ...]) -> None:
            nonlocal seen
            x = inputs[0].float()
            total.addmm_(x.t(), x)
            seen += len(x)
            raise _Captured

        step = self._finish if self.mixed else self._mix
        handle = module.register_forward_pre_hook(accumulate)
        try:
            for number in range(len(self.inputs)):
                with suppress(_Captured):
                    step(block, number)
        finally:
            handle.remove()
        if not total.isfinite().all():
            raise LlmqError(
                f"{name}: its inputs on the calibration text are not finite",
                "the model's weights are damaged, or its dtype is too narrow for it: try --device cpu",
            )
        return total.mul_(2 / seen) if seen else None

    def mix(self, block: DecoderLayer) -> None:
        self.mixed = [self._mix(block, number).to(self.home) for number in range(len(self.inputs))]

    def finish(self, block: DecoderLayer) -> None:
        """Pass the rest of ``block``: its outputs are the next block's inputs."""
        for number in range(len(self.inputs)):
            self.inputs[number] = self._finish(block, number).to(self.home)
        self.mixed = []

    def _mix(self, block: DecoderLayer, number: int) -> Tensor:
        x, (cos, sin) = self.inputs[number].to(self.device), self.rotations[block.self_attn.rope]
        return block.mix(x, None, (cos[: len(x)], sin[: len(x)]), self.attend)

    def _finish(self, block: DecoderLayer, number: int) -> Tensor:
        residual = self.inputs[number].to(self.device, copy=True)  # the block adds to it in place
        return residual.add_(block.finish(residual, self.mixed[number].to(self.device)))

    def _home(self, num_bytes: int) -> str:
        if not self.device.startswith("cuda"):
            return self.device
        free, _ = torch.cuda.mem_get_info(self.device)
        return self.device if num_bytes <= free // GPU_SHARE else "cpu"
