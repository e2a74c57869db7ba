"""The calibration windows on their way through the model: hidden states at the entrance of the block at hand."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from llmq.errors import LlmqError
from llmq.runtime.decoder import CausalAttention, DecoderLayer, rotary_angles
from llmq.runtime.kernels.norm import add_rms_norm
from llmq.runtime.loader import EMBEDDING, FINAL_NORM, HEAD, Source

MICRO_BATCH_TOKENS = 4096
"""Tokens in one forward pass: what a block's activations take of memory, whatever the number of windows."""
GPU_SHARE = 4
"""Hidden states stay on a GPU when they take no more than one part in this many of its free memory."""


class NotFinite(LlmqError):
    """Activations are NaN or infinite. In fp32 they may not be."""


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
        config = source.config
        count, length = windows.shape
        batch_windows = max(1, min(count, MICRO_BATCH_TOKENS // length))
        self.tokens = windows.numel()
        self.device = source.device
        self.attend = CausalAttention(length)
        self.rotation = rotary_angles(config, torch.arange(length, device=self.device).repeat(batch_windows))
        width = config.hidden_size + config.num_heads * config.head_dim
        self.home = self._home(self.tokens * width * source.dtype.itemsize)
        embedding = source.load(f"{EMBEDDING}.weight")
        self.inputs = [
            F.embedding(part.flatten().to(self.device), embedding).to(self.home)
            for part in torch.split(windows, batch_windows)
        ]
        self.mixed: list[Tensor] = []

    def sample(self, tokens: int) -> HiddenStates:
        """The first batches, of about so many tokens in all, to pass the block on their own."""
        some = copy.copy(self)
        count = max(1, tokens // len(self.inputs[0]))
        some.inputs, some.mixed = self.inputs[:count], self.mixed[:count]
        some.tokens = sum(len(part) for part in some.inputs)
        return some

    def inputs_of(self, block: DecoderLayer, linear: str) -> Iterator[Tensor]:
        """The inputs of the layer ``linear`` [tokens, in], batch by batch, in the step of ``block`` that comes next."""
        seen: list[Tensor] = []

        def capture(_: nn.Module, inputs: tuple[Any, ...]) -> None:
            seen.append(inputs[0])
            raise _Captured

        handle = block.get_submodule(linear).register_forward_pre_hook(capture)
        try:
            for number in range(len(self.inputs)):
                with suppress(_Captured):
                    self._output(block, number)
                yield seen.pop()
        finally:
            handle.remove()

    def second_moment(self, block: DecoderLayer, linear: str, name: str) -> Tensor:
        """2/n Σ x xᵀ, fp32 [in, in], over all n inputs x of the layer ``linear`` in the step of ``block`` that comes
        next: the Hessian of the layer's squared output error. Raises NotFinite, naming it ``name``, when the inputs are
        not finite."""
        return self._second_moment(self.inputs_of(block, linear), name)

    def head_moment(self, source: Source) -> Tensor:
        """The same of the model's head, once all blocks are passed."""
        weight, eps = source.load(f"{FINAL_NORM}.weight"), source.config.rms_norm_eps
        normed = (add_rms_norm(x.to(self.device), None, weight, eps) for x in self.inputs)
        return self._second_moment(normed, HEAD)

    def _second_moment(self, inputs: Iterator[Tensor], name: str) -> Tensor:
        total: Tensor | None = None
        for x in inputs:
            moment = _moment(x)
            total = moment if total is None else total.add_(moment)
        assert total is not None
        if not total.isfinite().all():
            raise NotFinite(
                f"{name}: its inputs on the calibration text are not finite",
                "the model's weights are damaged: download or copy it again",
            )
        return total.mul_(2 / self.tokens)

    def outputs(self, block: DecoderLayer) -> Iterator[Tensor]:
        """What ``block`` adds to the residual stream by attention, or past ``mix`` by the MLP: [tokens, hidden], batch by
        batch."""
        return (self._output(block, number) for number in range(len(self.inputs)))

    def mix(self, block: DecoderLayer) -> None:
        self.mixed = [self._mix(block, number).to(self.home) for number in range(len(self.inputs))]

    def finish(self, block: DecoderLayer) -> None:
        """Pass the rest of ``block``: its outputs are the next block's inputs."""
        for number in range(len(self.inputs)):
            self.inputs[number] = self._finish(block, number).to(self.home)
        self.mixed = []

    def _mix(self, block: DecoderLayer, number: int) -> Tensor:
        x, (cos, sin) = self.inputs[number].to(self.device), self.rotation
        return block.mix(x, None, (cos[: len(x)], sin[: len(x)]), self.attend)

    def _output(self, block: DecoderLayer, number: int) -> Tensor:
        if self.mixed:
            return block.finish(self._residual(number), self.mixed[number].to(self.device))
        out: Tensor = block.self_attn.o_proj(self._mix(block, number))
        return out

    def _finish(self, block: DecoderLayer, number: int) -> Tensor:
        residual = self._residual(number)
        return residual.add_(block.finish(residual, self.mixed[number].to(self.device)))

    def _residual(self, number: int) -> Tensor:
        return self.inputs[number].to(self.device, copy=True)  # the block adds to it in place

    def _home(self, num_bytes: int) -> str:
        if not self.device.startswith("cuda"):
            return self.device
        free, _ = torch.cuda.mem_get_info(self.device)
        return self.device if num_bytes <= free // GPU_SHARE else "cpu"


def _moment(x: Tensor) -> Tensor:
    """Σ x xᵀ in fp32 over the rows of ``x``. A GPU multiplies 16-bit numbers exactly and sums them in fp32."""
    if x.is_cuda and x.element_size() == 2:
        return torch.mm(x.t(), x, out_dtype=torch.float32)
    x = x.float()
    return x.t() @ x
