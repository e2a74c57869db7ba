"""Scales that move, within a block, from an operation to the linears that read it, and leave what it computes as it is.

    linear(x) = W x = (W diag(s)) (x / s)

Dividing by s costs nothing where the operation before can do it: a norm by its weight, a linear by its rows.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from llmq.checkpoint.config import ModelConfig
from llmq.quant.methods import rtn
from llmq.runtime.decoder import DecoderLayer, RMSNorm
from llmq.runtime.kernels.quantize_rows import quantize_rows
from llmq.scheme import Scheme


@dataclass(frozen=True, slots=True)
class Fold:
    """An operation whose outputs are the inputs of ``readers``, as they are or after what scaling passes through.

    previous  a norm; or a linear, of which the last outputs are meant
    others    what reads the same outputs and is not quantized: routers
    sharing   inputs of a reader that are one output: query heads that share a head of values
    """

    previous: str
    readers: tuple[str, ...]
    others: tuple[str, ...] = ()
    sharing: int = 1


def norm_folds(config: ModelConfig) -> tuple[Fold, Fold]:
    """From the norms before attention and before the MLP, or the experts."""
    qkv, _, gate_up, _ = config.linear_stages
    mlp_norm = "pre_feedforward_layernorm" if config.post_norms else "post_attention_layernorm"
    routers = () if config.experts is None else (f"{config.names.feed_forward}.gate",)
    return (
        Fold("input_layernorm", qkv.groups[0]),
        Fold(mlp_norm, tuple(name for group in gate_up.groups for name in group), routers),
    )


def linear_folds(config: ModelConfig) -> tuple[tuple[Fold, ...], tuple[Fold, ...]]:
    """From values to the attention's output; and from ``up`` to ``down`` in the MLP, or in each expert."""
    qkv, out, gate_up, down = config.linear_stages
    values = Fold(qkv.groups[0][-1], out.groups[0], sharing=config.num_heads // config.num_kv_heads)
    pairs = zip(gate_up.groups, down.groups, strict=True)
    return (values,), tuple(Fold(group[-1], readers) for group, readers in pairs)


def linear(block: DecoderLayer, name: str) -> nn.Linear:
    """The layer ``name`` of ``block``."""
    module = block.get_submodule(name)
    assert isinstance(module, nn.Linear)
    return module


def foldable(fold: Fold, block: DecoderLayer, schemes: Mapping[str, Scheme]) -> bool:
    """Are all linears that folding would change to be quantized, but for routers?"""
    previous_may = fold.previous in schemes or isinstance(block.get_submodule(fold.previous), RMSNorm)
    return previous_may and all(name in schemes for name in fold.readers)


def exact_scales(fold: Fold, scales: Tensor) -> Tensor:
    """Scales near ``scales`` by which a router can be multiplied without rounding it: powers of two."""
    return scales.log2().round().exp2() if fold.others else scales


def apply(fold: Fold, block: DecoderLayer, scales: Tensor) -> dict[str, Tensor]:
    """Divide the outputs of ``fold.previous`` by ``scales``, fp32 [outputs], and multiply its readers' inputs.

    Returns what changed beside the weights of ``fold.readers`` and of other linears that are to be quantized: names in
    ``block`` → tensors as checkpoints have them. A norm's weight is rounded to bfloat16, which every dtype of
    checkpoints holds, and the scales take up what that changes.
    """
    previous = block.get_submodule(fold.previous)
    changed: dict[str, Tensor] = {}
    if isinstance(previous, nn.Linear):
        previous.weight[-len(scales) :].div_(scales[:, None])
        if previous.bias is not None:
            previous.bias[-len(scales) :].div_(scales)
            changed[f"{fold.previous}.bias"] = previous.bias
    else:
        assert isinstance(previous, RMSNorm)
        stored = previous.weight / scales - previous.offset
        if not fold.others:  # for a router scales are exact as they are
            stored = stored.bfloat16().float()
        divided = stored + previous.offset
        scales = torch.where(divided == 0, scales, previous.weight / divided)
        previous.weight.copy_(divided)
        changed[f"{fold.previous}.weight"] = stored
    for name in (*fold.readers, *fold.others):
        linear(block, name).weight.mul_(spread(fold, block, scales))
    return changed | {f"{name}.weight": linear(block, name).weight for name in fold.others}


def spread(fold: Fold, block: DecoderLayer, outputs: Tensor) -> Tensor:
    """Numbers of the outputs of ``fold.previous`` for each input of a reader."""
    if fold.sharing == 1:
        return outputs
    return outputs.view(-1, 1, block.self_attn.head_dim).expand(-1, fold.sharing, -1).flatten()


def gather(fold: Fold, block: DecoderLayer, inputs: Tensor) -> Tensor:
    """The other way: the mean of numbers of a reader's inputs over those that are one output."""
    if fold.sharing == 1:
        return inputs
    return inputs.view(-1, fold.sharing, block.self_attn.head_dim).mean(1).flatten()


@contextmanager
def trial(block: DecoderLayer, schemes: Mapping[str, Scheme], scales: Mapping[str, Tensor]) -> Iterator[None]:
    """``block`` computes as if the linears of ``schemes`` were rounded to nearest, and their inputs where the scheme
    says so, once their input channels were scaled by ``scales``, [in] for each linear that has some."""
    with ExitStack() as undo:
        for name, scheme in schemes.items():
            layer, scale = linear(block, name), scales.get(name)
            weight = layer.weight
            undo.callback(setattr, layer, "weight", weight)
            rounded = scaled_rounding(weight.float(), scheme, scale)
            layer.weight = nn.Parameter(rounded.to(weight.dtype), requires_grad=False)
            if scheme.activation_bits == 8:
                undo.callback(round_inputs(layer, scheme.number, scale).remove)
        yield


def scaled_rounding(weight: Tensor, scheme: Scheme, scales: Tensor | None) -> Tensor:
    """``weight`` fp32 [out, in], multiplied by ``scales`` [in], rounded to nearest, and divided by them."""
    if scales is None:
        return rtn.quantize_weight(weight, scheme).dequantize()
    return rtn.quantize_weight(weight * scales, scheme).dequantize().div_(scales)


def round_inputs(layer: nn.Linear, number: str, scales: Tensor | None = None) -> RemovableHandle:
    """From now on ``layer`` sees each token's inputs in 8 bits of ``number``, as it will when the model runs; with
    ``scales`` [in], as if they had been divided by them."""

    def rounded(_: nn.Module, inputs: tuple[Any, ...]) -> tuple[Tensor]:
        x = inputs[0] if scales is None else inputs[0] / scales
        codes, steps = quantize_rows(x, number)
        values = codes.float().mul_(steps)
        return ((values if scales is None else values.mul_(scales)).to(inputs[0].dtype),)

    return layer.register_forward_pre_hook(rounded)
