"""The GPTQ format (``quant_method: gptq``), as auto-gptq wrote it and transformers, vLLM and SGLang read it.

For a linear layer P with N outputs, K inputs and G groups, in place of ``P.weight``:

    P.qweight  int32 [K·bits/32, N]   codes of one output, packed along K
    P.qzeros   int32 [G, N·bits/32]   zero points, packed along N
    P.scales   fp16  [G, N]
    P.g_idx    int32 [K]              group of each input channel
    P.bias                            as in the original, if it has one

    packed word   | value 32/bits − 1 | … | value 1 | value 0 |
                   31                                bits−1 … 0

Version 1 (``checkpoint_format: gptq``) stores ``zero − 1``; a zero point of 0 has no encoding that all readers agree
on. So symmetric weights, whose zero point is the middle code, are written as version 1, which every runtime has its
fastest kernel for; asymmetric ones as version 2 (``gptq_v2``), which stores the zero point itself.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from llmq.checkpoint.quantized_weight import QuantizedWeight
from llmq.checkpoint.tensors import Tensors
from llmq.errors import LlmqError
from llmq.scheme import Scheme

if TYPE_CHECKING:
    from torch import Tensor

METHOD = "gptq"
WORD_BITS = 32
V1, V2 = "gptq", "gptq_v2"


@dataclass(frozen=True, slots=True)
class GptqConfig:
    """What ``quantization_config`` says of the whole folder."""

    scheme: Scheme
    checkpoint_format: str

    @property
    def stored_zero_offset(self) -> int:
        """What is added to a stored zero point to get the real one."""
        return 1 if self.checkpoint_format == V1 else 0


def config_for(scheme: Scheme) -> GptqConfig:
    """The version of the format in which ``scheme`` is written."""
    return GptqConfig(scheme, V1 if scheme.symmetric else V2)


def read_gptq_config(quantization: Mapping[str, Any]) -> GptqConfig:
    """Read the ``quantization_config`` of a GPTQ folder. LlmqError on what llmq does not read."""
    try:
        bits, group_size = int(quantization["bits"]), int(quantization.get("group_size", 128))
        symmetric = bool(quantization.get("sym", True))
    except (KeyError, TypeError, ValueError) as error:
        raise LlmqError(f"quantization_config has no usable {error}", "the folder's config.json is damaged") from None
    # A missing field means version 1: auto-gptq never wrote it.
    checkpoint_format = quantization.get("checkpoint_format") or V1
    if checkpoint_format not in (V1, V2):
        raise LlmqError(f"GPTQ folders in the layout {checkpoint_format!r} are not supported", "convert to 'gptq'")
    return GptqConfig(Scheme(bits, group_size, symmetric), checkpoint_format)


def gptq_config_dict(
    config: GptqConfig, *, quantized: Sequence[str], ignored: Sequence[str], damp_percent: float | None, writer: str
) -> dict[str, Any]:
    """``quantization_config`` for config.json and quantize_config.json.

    ``quantized`` and ``ignored`` are the names of the decoder blocks' linear layers, ``damp_percent`` is None where the
    method has no such thing. ``desc_act`` tells loaders that groups are scattered by activation order; llmq leaves them
    in place.

    The format marks ignored layers in two ways, neither of which all loaders know: GPTQModel reads ``dynamic``,
    transformers ``modules_in_block_to_quantize``, vLLM both.
    """
    fields: dict[str, Any] = {
        "quant_method": METHOD,
        "bits": config.scheme.bits,
        "group_size": config.scheme.group_size,
        "sym": config.scheme.symmetric,
        "desc_act": False,
        "lm_head": False,
        "checkpoint_format": config.checkpoint_format,
        "pack_dtype": "int32",
        "meta": {"quantizer": [writer]},
    }
    if damp_percent is not None:
        fields |= {"damp_percent": damp_percent, "true_sequential": True}
    if ignored:
        left_out, prefix = _within_block(ignored), r".*\."
        if not left_out.isdisjoint(_within_block(quantized)):  # not the same in all blocks: whole names
            left_out, prefix = set(ignored), ""
        fields["dynamic"] = {f"-:{prefix}{re.escape(name)}$": {} for name in sorted(left_out)}
        fields["modules_in_block_to_quantize"] = [sorted(quantized if not prefix else _within_block(quantized))]
    return fields


def _within_block(names: Iterable[str]) -> set[str]:
    """``model.layers.7.mlp.up_proj`` → ``mlp.up_proj``, each once"""
    return {re.sub(r"^.*\.layers\.\d+\.", "", name) for name in names}


def pack_weight(name: str, weight: QuantizedWeight, config: GptqConfig) -> Iterator[tuple[str, Tensor]]:
    """The tensors of layer ``name``, as (tensor name, tensor)."""
    import torch

    in_features = weight.shape[1]
    index = weight.group_index
    if index is None:
        index = torch.arange(in_features) // weight.scheme.group_length(in_features)
    stored_zeros = weight.zero_points.int() - config.stored_zero_offset
    yield f"{name}.qweight", _pack(weight.codes.t(), weight.scheme.bits)
    yield f"{name}.qzeros", _pack(stored_zeros, weight.scheme.bits).t().contiguous()
    yield f"{name}.scales", weight.scales.t().to(torch.float16).contiguous()
    yield f"{name}.g_idx", index.to(torch.int32)


def is_packed(name: str, tensors: Tensors) -> bool:
    return f"{name}.qweight" in tensors


def unpack_weight(name: str, tensors: Tensors, config: GptqConfig, device: str = "cpu") -> QuantizedWeight:
    """Read layer ``name``. Raises LlmqError when the shapes of its tensors contradict the config."""
    import torch

    scheme, bits = config.scheme, config.scheme.bits
    qweight = tensors.load(f"{name}.qweight", device)
    qzeros = tensors.load(f"{name}.qzeros", device)
    scales = tensors.load(f"{name}.scales", device)
    in_features, out_features = qweight.shape[0] * WORD_BITS // bits, qweight.shape[1]
    groups = scheme.num_groups(in_features)
    if scales.shape != (groups, out_features) or qzeros.shape != (groups, out_features * bits // WORD_BITS):
        raise LlmqError(
            f"{name}: {bits} bits in groups of {scheme.group_size} do not match its tensors",
            "the folder's quantization_config contradicts its weights",
        )
    index: Tensor | None = None
    if f"{name}.g_idx" in tensors:
        index = tensors.load(f"{name}.g_idx", device).long()
        natural = torch.arange(in_features, device=index.device) // scheme.group_length(in_features)
        if torch.equal(index, natural):
            index = None
    zeros = (_unpack(qzeros.t(), bits).int() + config.stored_zero_offset).to(torch.uint8)
    return QuantizedWeight(scheme, _unpack(qweight, bits).t().contiguous(), scales.t(), zeros, index)


def _pack(values: Tensor, bits: int) -> Tensor:
    """Pack [rows, columns] of values in ``[0, 2^bits)`` along rows into int32 [rows·bits/32, columns]."""
    import torch

    per_word = WORD_BITS // bits
    rows, columns = values.shape
    fields = (values.long() & (2**bits - 1)).reshape(rows // per_word, per_word, columns)
    shifts = torch.arange(per_word, device=values.device).mul(bits).view(1, per_word, 1)
    words = (fields << shifts).sum(dim=1)
    # A word of 2^31 or more becomes the negative number of the same bits.
    packed: Tensor = (words - (words >= 2**31) * 2**32).to(torch.int32)
    return packed


def _unpack(words: Tensor, bits: int) -> Tensor:
    """The inverse of ``_pack``: int32 [rows, columns] → uint8 [rows·32/bits, columns]."""
    import torch

    per_word = WORD_BITS // bits
    rows, columns = words.shape
    shifts = torch.arange(per_word, device=words.device, dtype=torch.int32).mul(bits).view(1, per_word, 1)
    fields: Tensor = (words.unsqueeze(1) >> shifts) & (2**bits - 1)
    return fields.to(torch.uint8).reshape(rows * per_word, columns)
