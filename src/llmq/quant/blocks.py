"""The decoder blocks of a model, one after another, with the calibration windows on their way through them.

A block is quantized in two steps. Some methods first scale its channels, so that less is lost (``fold``), which
leaves what it computes as it is. Then its linears are rounded in the order in which they compute: each sees its inputs
as those before it will really produce them, quantized (true-sequential). Layers that do not wait for one another are
rounded on several devices at once, where there are.

A block that an earlier run has done is passed again as it was written, which costs a forward pass and no disk, where
hidden states kept block by block would cost gigabytes of writing each; to the bit it leaves what it left then.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from llmq.checkpoint.config import HEAD, LinearStage, block_name
from llmq.checkpoint.quantized_weight import QuantizedWeight
from llmq.checkpoint.tensors import Tensors
from llmq.quant.activations import HiddenStates, moments_at_once
from llmq.quant.affine import MAX_E4M3
from llmq.quant.folding import linear, round_inputs
from llmq.quant.job import Job
from llmq.quant.methods import autoround, awq, smoothquant
from llmq.quant.report import LayerReport
from llmq.quant.rounding import check_weight, round_layers, stacks
from llmq.quant.schemes import AUTOROUND, AWQ, SMOOTHQUANT
from llmq.quant.spread import spread
from llmq.runtime.decoder import DecoderLayer, RMSNorm
from llmq.runtime.loader import load_layer
from llmq.scheme import Scheme


class Walk:
    """The way of the calibration windows through the model, block by block.

    states    hidden states as the quantized blocks leave them
    original  as the model's own blocks leave them, for learned rounding, which brings the others back to them
    """

    def __init__(self, job: Job, spill: Path | None) -> None:
        """Embed the windows. Their hidden states are kept in files in the folder ``spill``, or in memory."""
        assert job.windows is not None
        self._job = job
        self.states = HiddenStates(job.source, job.windows, job.batch_tokens, spill)
        learns = job.options.choice.method == AUTOROUND
        self.original = self.states.sample(self.states.tokens) if learns else None

    def quantize(self, number: int, changed: dict[str, Tensor]) -> Iterator[tuple[QuantizedWeight, LayerReport]]:
        """Quantize block ``number``, layer by layer. Tensors beside the layers that are new, or not as they were, come
        into ``changed``."""
        job, states, prefix = self._job, self.states, block_name(number)
        block, schemes = load_layer(job.source, number), _local(job, prefix)
        for name in schemes:
            check_weight(f"{prefix}.{name}", linear(block, name).weight)
        if self.original is not None:
            self.original.mix(block)
            self.original.finish(block)
        for name, tensor in _fold(job, block, states, schemes).items():
            stored = job.source.tensors.load(f"{prefix}.{name}").dtype
            changed[f"{prefix}.{name}"] = tensor.to(stored)
            _give(block, name, tensor.to(stored))
        learned: Mapping[str, QuantizedWeight] = {}
        if self.original is not None:
            seed = job.options.calibration.seed
            learned = autoround.quantize_block(block, schemes, states, self.original.inputs, seed=seed)
        for stage in job.source.config.linear_stages:
            if stage.half == "finish" and not states.mixed:
                if job.options.kv_cache is not None:
                    for letter, largest in zip("kv", states.kv_ranges(block), strict=True):
                        changed[f"{prefix}.self_attn.{letter}_scale"] = _e4m3_scale(largest)
                states.mix(block)
            yield from self._quantize_stage(prefix, block, stage, schemes, learned)
        self._leave(block, number)

    def replay(self, number: int, written: Tensors) -> None:
        """Pass block ``number`` as it was ``written``."""
        job, prefix = self._job, block_name(number)
        block = load_layer(job.source, number)
        if self.original is not None:
            self.original.mix(block)
            self.original.finish(block)
        kept, format = set(job.kept_tensors), job.format
        for name, _ in list(block.named_parameters()):
            if f"{prefix}.{name}" in kept:
                _give(block, name, written.load(f"{prefix}.{name}", job.source.device))
        for name in _local(job, prefix):
            _round_in_place(linear(block, name), format.unpack(f"{prefix}.{name}", written, job.source.device))
        self.states.mix(block)
        self._leave(block, number)

    def _leave(self, block: DecoderLayer, number: int) -> None:
        if number + 1 < self._job.source.config.num_layers or HEAD in self._job.schemes:
            self.states.finish(block)

    def _quantize_stage(
        self,
        prefix: str,
        block: DecoderLayer,
        stage: LinearStage,
        schemes: Mapping[str, Scheme],
        learned: Mapping[str, QuantizedWeight],
    ) -> Iterator[tuple[QuantizedWeight, LayerReport]]:
        """Quantize those layers of ``stage`` that are to be, in ``block`` too: what follows sees what was lost."""
        wanted = [[name for name in group if name in schemes] for group in stage.groups]
        groups = [group for group in wanted if group]
        while groups:
            together = moments_at_once(linear(block, groups[0][0]).in_features)
            yield from self._quantize_groups(prefix, block, groups[:together], schemes, learned)
            groups = groups[together:]

    def _quantize_groups(
        self,
        prefix: str,
        block: DecoderLayer,
        groups: Sequence[Sequence[str]],
        schemes: Mapping[str, Scheme],
        learned: Mapping[str, QuantizedWeight],
    ) -> Iterator[tuple[QuantizedWeight, LayerReport]]:
        """Quantize ``groups`` of layers, each with inputs of its own, whose second moments are held together."""
        job = self._job
        hessians = self.states.second_moments(block, [group[0] for group in groups], prefix)

        def round_on(device: str, stack: _Stack) -> list[tuple[QuantizedWeight, LayerReport]]:
            weights = {f"{prefix}.{name}": linear(block, name).weight.to(device).float() for name in stack.layers}
            made = {f"{prefix}.{name}": learned[name].to(device) for name in stack.layers if name in learned}
            hessian = None if stack.hessian is None else stack.hessian.to(device)
            rounded = round_layers(weights, schemes[stack.layers[0]], hessian, job.options, made)
            return [(quantized.to(job.devices[0]), report) for quantized, report in rounded]

        work = [
            _Stack(layers, hessians.get(group[0]))
            for group in groups
            for layers in stacks({name: linear(block, name).out_features for name in group}, schemes)
        ]
        for rounded in spread(round_on, work, job.devices):
            for quantized, report in rounded:
                _round_in_place(linear(block, report.name.removeprefix(f"{prefix}.")), quantized)
                yield quantized, report


@dataclass(frozen=True, slots=True)
class _Stack:
    """Layers that are rounded in one go, and the second moment of their inputs; None: they had hardly any."""

    layers: list[str]
    hessian: Tensor | None


def _local(job: Job, prefix: str) -> dict[str, Scheme]:
    """The schemes of the layers of a block that are to be quantized, by their names within it."""
    names = {name: f"{prefix}.{name}" for name in job.source.config.linears}
    return {name: job.schemes[full] for name, full in names.items() if full in job.schemes}


def _fold(job: Job, block: DecoderLayer, states: HiddenStates, schemes: Mapping[str, Scheme]) -> dict[str, Tensor]:
    """Scale channels of ``block`` as the method does. Returns what changed beside the linears to be quantized."""
    config, method, alpha = job.source.config, job.options.choice.method, job.options.alpha
    if method in (AWQ, AUTOROUND):  # without, learned rounding would not reach the channels of outliers
        return awq.fold(block, config, states, schemes)
    if method == SMOOTHQUANT:
        alpha = smoothquant.default_alpha(config.model_type) if alpha is None else alpha
        return smoothquant.fold(block, config, states, schemes, alpha)
    return {}


def _give(block: DecoderLayer, name: str, stored: Tensor) -> None:
    """Have ``block`` compute with a parameter as it is stored."""
    owner, _, own_name = name.rpartition(".")
    module = block.get_submodule(owner)
    value = stored.float() + module.offset if isinstance(module, RMSNorm) and module.offset else stored
    module.get_parameter(own_name).copy_(value)


def _round_in_place(module: nn.Linear, quantized: QuantizedWeight) -> None:
    """Have ``module`` compute as the quantized layer will."""
    module.weight.copy_(quantized.dequantize())
    if quantized.scheme.activation_bits == 8:
        round_inputs(module, quantized.scheme.number)


def _e4m3_scale(largest: Tensor) -> Tensor:
    """fp32 [1], by which numbers up to ``largest`` fill the range of e4m3."""
    return (largest / MAX_E4M3).clamp(min=torch.finfo(torch.float32).tiny).view(1)
