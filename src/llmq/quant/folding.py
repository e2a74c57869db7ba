"""Scales that move, within a block, from an operation to the linears that read it, and leave what it computes as it is.

    linear(x) = W x = (W diag(s)) (x / s)

Dividing by s costs nothing where the operation before can do it: a norm by its weight, a linear by its rows.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from llmq.quant.methods import rtn
from llmq.runtime.decoder import DecoderLayer
from llmq.runtime.kernels.quantize_rows import quantize_rows
from llmq.scheme import Scheme


@dataclass(frozen=True, slots=True)
class Fold:
    """The outputs of ``previous`` are the inputs of ``linears``, as they are or after what scaling passes through."""

    previous: str
    linears: tuple[str, ...]


ATTENTION_NORM = Fold("input_layernorm", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"))
VALUES = Fold("self_attn.v_proj", ("self_attn.o_proj",))
MLP_NORM = Fold("post_attention_layernorm", ("mlp.gate_proj", "mlp.up_proj"))
UP = Fold("mlp.up_proj", ("mlp.down_proj",))


def linear(block: nn.Module, name: str) -> nn.Linear:
    """The layer ``name`` of ``block``."""
    module = block.get_submodule(name)
    assert isinstance(module, nn.Linear)
    return module


def foldable(fold: Fold, block: DecoderLayer, schemes: Mapping[str, Scheme]) -> bool:
    """Would folding change no weight but those that are to be quantized, and norms?"""
    previous_may = fold.previous in schemes or not isinstance(block.get_submodule(fold.previous), nn.Linear)
    return previous_may and all(name in schemes for name in fold.linears)


def apply(fold: Fold, block: DecoderLayer, scales: Tensor) -> dict[str, Tensor]:
    """Divide the outputs of ``fold.previous`` by ``scales`` fp32 [its outputs], and multiply its readers' inputs.

    Returns the parameters that have changed and are no weights of linears, by their names in ``block``. A norm's weight
    is rounded to bfloat16, which every dtype of checkpoints holds, and the scales take up what that changes.
    """
    previous = block.get_submodule(fold.previous)
    weight, bias = previous.weight, getattr(previous, "bias", None)
    assert isinstance(weight, Tensor)
    if isinstance(previous, nn.Linear):
        weight.div_(scales[:, None])
    else:
        divided = (weight / scales).bfloat16().float()
        scales = torch.where(divided == 0, scales, weight / divided)
        weight.copy_(divided)
    for name in fold.linears:
        reader = linear(block, name)
        reader.weight.mul_(spread(scales, block, reader.in_features))
    if isinstance(previous, nn.Linear):
        return {} if bias is None else {f"{fold.previous}.bias": bias.div_(scales)}
    return {f"{fold.previous}.weight": weight}


def spread(scales: Tensor, block: DecoderLayer, inputs: int) -> Tensor:
    """``scales`` of values, [kv_heads · head_dim], for each of the query heads that share them: [``inputs``]."""
    if len(scales) == inputs:
        return scales
    return scales.view(-1, 1, block.self_attn.head_dim).expand(-1, inputs // len(scales), -1).flatten()


def gather(channels: Tensor, block: DecoderLayer, outputs: int) -> Tensor:
    """The other way: the mean of ``channels`` [inputs] over the query heads that share a value, [``outputs``]."""
    if len(channels) == outputs:
        return channels
    return channels.view(-1, len(channels) // outputs, block.self_attn.head_dim).mean(1).flatten()


@contextmanager
def trial(block: DecoderLayer, schemes: Mapping[str, Scheme], scales: Mapping[str, Tensor]) -> Iterator[None]:
    """``block`` computes as if the linears of ``schemes`` were rounded to nearest, and their inputs where the scheme
    says so, once their input channels were scaled by ``scales``, [in] for each linear that has some."""
    originals = {name: linear(block, name).weight for name in schemes}
    handles: list[RemovableHandle] = []
    try:
        for name, scheme in schemes.items():
            layer, scale = linear(block, name), scales.get(name)
            weight = layer.weight.float() if scale is None else layer.weight * scale
            rounded = rtn.quantize_weight(weight, scheme).dequantize()
            rounded = rounded if scale is None else rounded.div_(scale)
            layer.weight = nn.Parameter(rounded.to(layer.weight.dtype), requires_grad=False)
            if scheme.activation_bits == 8:
                handles.append(round_inputs(layer, scheme.number, scale))
        yield
    finally:
        for handle in handles:
            handle.remove()
        for name, weight in originals.items():
            linear(block, name).weight = weight


def round_inputs(layer: nn.Linear, number: str, scale: Tensor | None = None) -> RemovableHandle:
    """From now on ``layer`` sees each token's inputs in 8 bits of ``number``, as it will when the model runs; with
    ``scale`` [in], as if they were divided by it."""

    def rounded(_: nn.Module, inputs: tuple[Any, ...]) -> tuple[Tensor]:
        x = inputs[0] if scale is None else inputs[0] / scale
        codes, scales = quantize_rows(x, number)
        values = codes.float() * scales
        return ((values if scale is None else values * scale).to(inputs[0].dtype),)

    return layer.register_forward_pre_hook(rounded)
