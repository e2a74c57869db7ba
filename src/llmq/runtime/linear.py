"""Linear layers behind one call, ``layer(x) → y``: dense (``nn.Linear``), weight-only, and with 8-bit activations."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields

import torch
from torch import Tensor, nn

from llmq.checkpoint.quantized_weight import QuantizedWeight
from llmq.errors import note
from llmq.runtime.device import multiplies_fp8
from llmq.runtime.kernels import triton_runs_on
from llmq.runtime.kernels.dense import dense_matmul
from llmq.runtime.kernels.invariant import invariant_matmul
from llmq.runtime.kernels.megakernel import Weight
from llmq.runtime.kernels.quantize_rows import QuantizedRows, quantize_rows
from llmq.runtime.kernels.silu import silu_mul
from llmq.runtime.kernels.w8a8 import Weight8, merge_w8a8, pack_w8a8, w8a8_matmul
from llmq.runtime.kernels.wna16 import PackedWeight, merge_wna16, pack_wna16, wna16_matmul
from llmq.scheme import INT


class DenseLinear(nn.Linear):
    """Weights as wide as the activations."""

    batch_invariant = False

    def forward(self, x: Tensor) -> Tensor:
        if self.batch_invariant:
            return invariant_matmul(x, self.weight, self.bias, x.dtype)
        return dense_matmul(x, self.weight, self.bias)


class WeightOnlyLinear(nn.Module):
    """Weights of few bits that stay packed in memory and are widened in the registers of the product."""

    batch_invariant = False

    def __init__(self, packed: PackedWeight, bias: Tensor | None) -> None:
        super().__init__()
        self.packed = packed
        self.bias = bias
        self.in_features, self.out_features = packed.in_features, packed.out_features

    def forward(self, x: Tensor) -> Tensor:
        if self.batch_invariant:
            return invariant_matmul(x, self.packed, self.bias, x.dtype)
        return wna16_matmul(x, self.packed, self.bias)

    def gated(self, x: Tensor) -> Tensor:
        """``silu_mul`` of the halves of ``forward``, in one kernel where that is faster."""
        if self.batch_invariant:
            return silu_mul(*self(x).chunk(2, dim=1))
        return wna16_matmul(x, self.packed, self.bias, gated=True)


class W8A8Linear(nn.Module):
    """Weights and activations of 8 bits, multiplied as they are; results are of ``dtype``.

    Takes activations as they come, or in 8 bits already, from a kernel that has rounded what it computed.
    """

    batch_invariant = False

    def __init__(self, packed: Weight8, bias: Tensor | None, dtype: torch.dtype) -> None:
        super().__init__()
        self.packed = packed
        self.bias = bias
        self.dtype = dtype
        self.out_features, self.in_features = packed.codes.shape

    def forward(self, x: Tensor | QuantizedRows) -> Tensor:
        rows = quantize_rows(x, self.packed.number) if isinstance(x, Tensor) else x
        if self.batch_invariant:
            return invariant_matmul(rows, self.packed, self.bias, self.dtype)
        return w8a8_matmul(rows, self.packed, self.bias, self.dtype)


Linear = nn.Linear | WeightOnlyLinear | W8A8Linear


def quantized_linear(weight: QuantizedWeight, bias: Tensor | None, dtype: torch.dtype) -> Linear:
    """A layer that multiplies by ``weight``; results are of ``dtype``.

    Weight-only, it stays packed on a GPU: fewer bytes to hold, and to read for each token. A CPU gains no speed from
    that, so there the codes are widened to ``dtype`` once. On a GPU that cannot multiply FP8, its weights are taken as
    weight-only, and activations left as they come; and a weight whose groups no kernel takes is widened too.
    """
    scheme = weight.scheme
    if scheme.activation_bits == 8 and (scheme.number == INT or multiplies_fp8(weight.codes.device)):
        return W8A8Linear(pack_w8a8(weight), bias, dtype)
    if triton_runs_on(weight.codes.device.type):
        try:
            return WeightOnlyLinear(pack_wna16(weight, dtype), bias)
        except ValueError as error:
            note(f"{error}: there is no kernel for such layers, and they are widened to {dtype} as they are loaded")
    return _dense(weight.dequantize().to(dtype), bias)


def input_number(layer: nn.Module) -> str | None:
    """The number that ``layer`` rounds its inputs to; None if it takes them as they come."""
    return layer.packed.number if isinstance(layer, W8A8Linear) else None


def plain_weight(layer: nn.Module) -> Weight | PackedWeight | None:
    """The weight of ``layer`` if there is nothing else to it; None with a bias, or batch-invariant."""
    if isinstance(layer, DenseLinear):
        weight: Weight | PackedWeight = Weight(layer.weight, None)
    elif isinstance(layer, W8A8Linear):
        weight = Weight(layer.packed.codes, layer.packed.scales)
    elif isinstance(layer, WeightOnlyLinear):
        weight = layer.packed
    else:
        return None
    return None if layer.bias is not None or layer.batch_invariant else weight


def merge(layers: Sequence[nn.Module]) -> Linear | None:
    """One layer whose output is the outputs of ``layers``, side by side: one product instead of several.

    None if they are not of one kind: dense and quantized, say, or of schemes or channel orders that differ.
    """
    biases = [layer.bias for layer in layers if isinstance(layer.bias, Tensor)]
    if len(biases) not in (0, len(layers)):
        return None
    bias = torch.cat(biases) if biases else None
    dense = [layer.weight for layer in layers if isinstance(layer, nn.Linear)]
    if len(dense) == len(layers):
        alike = all((w.shape[1], w.dtype) == (dense[0].shape[1], dense[0].dtype) for w in dense)
        return _dense(torch.cat(dense), bias) if alike else None
    weight_only = [layer.packed for layer in layers if isinstance(layer, WeightOnlyLinear)]
    if len(weight_only) == len(layers):
        packed = merge_wna16(weight_only)
        return None if packed is None else WeightOnlyLinear(packed, bias)
    rounded = [layer for layer in layers if isinstance(layer, W8A8Linear)]
    if len(rounded) == len(layers):
        weight = merge_w8a8([layer.packed for layer in rounded])
        return None if weight is None else W8A8Linear(weight, bias, rounded[0].dtype)
    return None


def _dense(weight: Tensor, bias: Tensor | None) -> DenseLinear:
    out_features, in_features = weight.shape
    with torch.device("meta"):
        layer = DenseLinear(in_features, out_features, bias=bias is not None)
    layer.weight = nn.Parameter(weight, requires_grad=False)
    if bias is not None:
        layer.bias = nn.Parameter(bias, requires_grad=False)
    return layer


def make_batch_invariant(model: nn.Module) -> None:
    """Let no product of ``model`` depend on the rows that are multiplied with one: see ``invariant_matmul``."""
    for name, layer in list(model.named_modules()):
        if isinstance(layer, DenseLinear | WeightOnlyLinear | W8A8Linear):
            layer.batch_invariant = True
        elif isinstance(layer, nn.Linear):
            made = _dense(layer.weight, layer.bias)
            made.weight, made.batch_invariant = layer.weight, True
            model.set_submodule(name, made)


def resident_bytes(model: nn.Module) -> int:
    """What the weights of ``model`` take where it runs; a weight that two layers share counts once."""
    layers = [layer for layer in model.modules() if isinstance(layer, WeightOnlyLinear | W8A8Linear)]
    packed = [getattr(layer.packed, field.name) for layer in layers for field in fields(layer.packed)]
    biases = [layer.bias for layer in layers]
    tensors = [*model.parameters(), *(value for value in (*packed, *biases) if isinstance(value, Tensor))]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
