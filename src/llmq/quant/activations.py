"""The calibration windows on their way through the model: hidden states at the entrance of the block at hand."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import ExitStack, suppress
from functools import partial
from mmap import mmap
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

import torch
from torch import Tensor, nn

from llmq.checkpoint.config import EMBEDDING, FINAL_NORM, HEAD
from llmq.checkpoint.shards import reserve
from llmq.errors import LlmqError
from llmq.memory import MICRO_BATCH_TOKENS, MOMENT_BYTES
from llmq.runtime.decoder import Attend, Attention, CausalAttention, DecoderLayer
from llmq.runtime.kernels.embedding import embedding
from llmq.runtime.kernels.norm import add_rms_norm
from llmq.runtime.kernels.rope import norm_and_rotate
from llmq.runtime.loader import Source
from llmq.runtime.rotary import Rotation, rotary_angles

FEWEST = 0.005
"""The share of all tokens below which an expert has seen too few to learn from: as GPTQModel has it."""


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

    def __init__(
        self, source: Source, windows: Tensor, batch_tokens: int = MICRO_BATCH_TOKENS, spill: Path | None = None
    ) -> None:
        """Embed ``windows``, token ids [windows, tokens], which pass a block in batches of ``batch_tokens``, or one by
        one. Between passes hidden states are in main memory, or in files in the folder ``spill``: with a block they
        would take a GPU several times what the block does."""
        count, length = windows.shape
        config = source.config.for_context(length)
        batch_windows = max(1, min(count, batch_tokens // length))
        self.tokens = windows.numel()
        self.device = source.device
        self.attend: Attend = CausalAttention(length)
        self.rotations = rotary_angles(config, torch.arange(length, device=self.device).repeat(batch_windows))
        self.spill = spill
        # Of an embedding, which may be larger than a block, only what the windows ask for.
        seen, places = torch.unique(windows, return_inverse=True)
        rows = source.tensors.load(f"{EMBEDDING}.weight")[seen].to(self.device, source.dtype)
        self.inputs = [
            self._keep(embedding(part.flatten().to(self.device), rows, config.embedding_scale))
            for part in torch.split(places, batch_windows)
        ]
        self.mixed: list[Tensor] = []

    def sample(self, tokens: int) -> HiddenStates:
        """The first batches, with at least so many tokens if there are, to pass the block on their own."""
        some = copy.copy(self)
        count = -(-tokens // len(self.inputs[0]))
        some.inputs, some.mixed = self.inputs[:count], self.mixed[:count]
        some.tokens = sum(len(part) for part in some.inputs)
        return some

    def show_inputs(self, block: DecoderLayer, viewers: Mapping[str, Callable[[Tensor], None]]) -> None:
        """Show the inputs [tokens, in] of linear layers of ``block``, batch by batch, to their viewers. The layers, by
        their names in the block, are of the step that comes next, and read nothing that another of them computes. Of an
        expert, only inputs sent to it are seen."""

        def show(view: Callable[[Tensor], None], _: nn.Module, inputs: tuple[Any, ...]) -> None:
            view(inputs[0])
            if len(viewers) == 1:
                raise _Captured

        with ExitStack() as hooks:
            for name, view in viewers.items():
                hooks.callback(block.get_submodule(name).register_forward_pre_hook(partial(show, view)).remove)
            for number in range(len(self.inputs)):
                with suppress(_Captured):
                    self._output(block, number)

    def second_moments(self, block: DecoderLayer, linears: Collection[str], prefix: str) -> dict[str, Tensor]:
        """2/n Σ x xᵀ, fp32 [in, in], over all n inputs x of each of ``linears`` (see ``show_inputs``): the Hessian of
        the layer's squared output error. An expert that hardly any token was sent to has none. Raises NotFinite, naming
        the layer by the block's name ``prefix``, when inputs are not finite."""
        totals: dict[str, Tensor] = {}
        counts: Counter[str] = Counter()

        def add(name: str, x: Tensor) -> None:
            counts[name] += len(x)
            totals[name] = totals[name].add_(moment(x)) if name in totals else moment(x)

        self.show_inputs(block, {name: partial(add, name) for name in linears})
        return {
            name: _mean_moment(total, counts[name], f"{prefix}.{name}")
            for name, total in totals.items()
            if counts[name] >= FEWEST * self.tokens
        }

    def head_moment(self, source: Source) -> Tensor:
        """The same of the model's head, once all blocks are passed."""
        size = source.config.hidden_size
        total = torch.zeros(size, size, device=self.device)
        for x in self.normed(source):
            total += moment(x)
        return _mean_moment(total, self.tokens, HEAD)

    def normed(self, source: Source) -> Iterator[Tensor]:
        """What the model's head reads, once all blocks are passed: [tokens, hidden], batch by batch."""
        weight = source.load(f"{FINAL_NORM}.weight").float() + source.config.norm_offset
        for x in self.inputs:
            yield add_rms_norm(self._back(x), None, weight, source.config.rms_norm_eps)

    def kv_ranges(self, block: DecoderLayer) -> tuple[Tensor, Tensor]:
        """The largest |key| and |value| that ``block`` would write into a KV cache: keys are normed and rotated."""
        keys: list[Tensor] = []
        values: list[Tensor] = []

        def attend(attention: Attention, query: Tensor, key: Tensor, value: Tensor, rotation: Rotation) -> Tensor:
            _, rotated = norm_and_rotate(query, key, rotation, attention.norms, attention.eps)
            keys.append(rotated.float().abs().amax())
            values.append(value.float().abs().amax())
            return query  # nobody looks at what is made of them

        watching = copy.copy(self)
        watching.attend = attend
        for number in range(len(self.inputs)):
            watching._mix(block, number)
        return torch.stack(keys).amax(), torch.stack(values).amax()

    def outputs(self, block: DecoderLayer) -> Iterator[Tensor]:
        """What ``block`` adds to the residual stream by attention, or past ``mix`` by the MLP: [tokens, hidden], batch
        by batch."""
        return (self._output(block, number) for number in range(len(self.inputs)))

    def mix(self, block: DecoderLayer) -> None:
        self.mixed = [self._keep(self._mix(block, number)) for number in range(len(self.inputs))]

    def finish(self, block: DecoderLayer) -> None:
        """Pass the rest of ``block``: its outputs are the next block's inputs."""
        for number in range(len(self.inputs)):
            residual = self.residual(number)
            out = block.finish(residual, self._back(self.mixed[number]))
            self.inputs[number] = self._keep(residual.add_(out))
        self.mixed = []

    def _mix(self, block: DecoderLayer, number: int) -> Tensor:
        x, (cos, sin) = self._back(self.inputs[number]), self.rotations[block.self_attn.rope]
        return block.mix(x, None, (cos[: len(x)], sin[: len(x)]), self.attend)

    def _output(self, block: DecoderLayer, number: int) -> Tensor:
        if self.mixed:
            return block.finish(self.residual(number), self._back(self.mixed[number]))
        out: Tensor = block.self_attn.o_proj(self._mix(block, number))
        return out

    def residual(self, number: int) -> Tensor:
        """A copy of batch ``number`` of the inputs on the device."""
        return self._back(self.inputs[number], copy=True)  # the block adds to it in place

    def _keep(self, x: Tensor) -> Tensor:
        # A copy that nobody waits for is pinned: on its way there and back the host goes on, and the device's stream
        # keeps the order.
        return x.to("cpu", non_blocking=True) if self.spill is None else in_file(x, self.spill)

    def _back(self, x: Tensor, *, copy: bool = False) -> Tensor:
        return x.to(self.device, non_blocking=True, copy=copy)


def in_file(x: Tensor, folder: Path) -> Tensor:
    """``x`` in a file without a name in ``folder``, which is mapped into memory and goes with the tensor. OSError when
    the disk has no room for it."""
    with TemporaryFile(dir=folder) as file:
        reserve(file.fileno(), x.nbytes)
        mapped = torch.frombuffer(mmap(file.fileno(), x.nbytes), dtype=x.dtype).view(x.shape)
    return mapped.copy_(x)


def squared_distance(outputs: Iterable[Tensor], targets: Iterable[Tensor]) -> float:
    """Σ (output − target)² over all batches."""
    pairs = zip(outputs, targets, strict=True)
    return float(torch.stack([(output - target).float().square().sum() for output, target in pairs]).sum())


def moments_at_once(in_features: int) -> int:
    """Layers with so many inputs whose second moments may be held together."""
    return max(1, MOMENT_BYTES // (4 * in_features**2))


def moment(x: Tensor) -> Tensor:
    """Σ x xᵀ in fp32 over the rows of ``x``. A GPU multiplies 16-bit numbers exactly and sums them in fp32."""
    if x.is_cuda and x.element_size() == 2:
        return torch.mm(x.t(), x, out_dtype=torch.float32)
    x = x.float()
    return x.t() @ x


def _mean_moment(total: Tensor, count: int, name: str) -> Tensor:
    if not total.diagonal().isfinite().all():  # which bounds the rest: |Σ xy|² ≤ Σ x² · Σ y²
        raise NotFinite(
            f"{name}: its inputs on the calibration text are not finite",
            "the model's weights are damaged: download or copy it again",
        )
    return total.mul_(2 / count)
