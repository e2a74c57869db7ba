"""The GPTQ format (``quant_method: gptq``), as auto-gptq wrote it and transformers, vLLM and SGLang read it.

For a linear layer P with N outputs, K inputs and G groups, in place of ``P.weight``:

    P.qweight  int32 [K·bits/32, N]   codes of one output, packed along K
    P.qzeros   int32 [G, N·bits/32]   zero points, packed along N
    P.scales   fp16  [G, N]
    P.g_idx    int32 [K]              group of each input channel
    P.bias                            as in the original, if it has one

Version 1 (``checkpoint_format: gptq``) stores ``zero − 1``; a zero point of 0 has no encoding that all readers agree
on. So symmetric weights, whose zero point is the middle code, are written as version 1, which every runtime has its
fastest kernel for; asymmetric ones as version 2 (``gptq_v2``), which stores the zero point itself.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from llmq.checkpoint.formats.packed import (
    DAMAGED_CONFIG,
    SCALE_TYPES,
    WORD_BITS,
    Layout,
    Stored,
    check_layout,
    check_regex,
    exact_fp16,
    pack_words,
    read_group_index,
    stored_scheme,
    stored_shape,
    unpack_words,
    why_not_packed,
)
from llmq.checkpoint.quantized_weight import QuantizedWeight
from llmq.checkpoint.tensors import Tensors
from llmq.errors import LlmqError
from llmq.scheme import Scheme

if TYPE_CHECKING:
    from torch import Tensor

V1, V2 = "gptq", "gptq_v2"


@dataclass(frozen=True, slots=True)
class Gptq:
    """A GPTQ folder.

    checkpoint_format  V1 or V2
    left_out           regular expressions, matched from the start, of layers that are not quantized
    within_block       the layers that are, as the ends of their names; empty: all
    """

    name: ClassVar[str] = "gptq"
    title: ClassVar[str] = "GPTQ"
    marker: ClassVar[str] = "qweight"
    multiple: ClassVar[int] = 32
    config_files: ClassVar[tuple[str, ...]] = ("quantize_config.json",)
    caveat: ClassVar[str | None] = None

    scheme: Scheme
    checkpoint_format: str
    left_out: tuple[str, ...] = ()
    within_block: tuple[str, ...] = ()

    @property
    def stored_zero_offset(self) -> int:
        """What is added to a stored zero point to get the real one."""
        return 1 if self.checkpoint_format == V1 else 0

    @staticmethod
    def why_not(scheme: Scheme) -> str | None:
        """Why ``scheme`` cannot be held; None when it can."""
        return why_not_packed(scheme)

    @classmethod
    def for_scheme(cls, scheme: Scheme) -> Gptq:
        """The version of the format in which ``scheme`` is written."""
        return cls(scheme, V1 if scheme.symmetric else V2)

    @classmethod
    def read(cls, quantization: Mapping[str, Any]) -> Gptq:
        """Read ``quantization_config``. LlmqError on what llmq does not read."""
        scheme = stored_scheme(
            quantization.get("bits"), quantization.get("group_size", 128), quantization.get("sym", True)
        )
        # A missing field means version 1: auto-gptq never wrote it.
        checkpoint_format = quantization.get("checkpoint_format") or V1
        if checkpoint_format not in (V1, V2):
            raise LlmqError(f"GPTQ folders in the layout {checkpoint_format!r} are not supported", "convert to 'gptq'")
        try:
            rules = [str(rule) for rule in quantization.get("dynamic") or {}]
            blocks = quantization.get("modules_in_block_to_quantize") or ()
            within_block = tuple(
                str(name) for names in blocks for name in (names if isinstance(names, list) else [names])
            )
        except TypeError as error:
            raise LlmqError(f"quantization_config: {error}", DAMAGED_CONFIG) from None
        left_out = tuple(rule.removeprefix("-:") for rule in rules if rule.startswith("-:"))
        for pattern in left_out:
            check_regex(pattern)
        return cls(scheme, checkpoint_format, left_out, within_block)

    def scheme_of(self, name: str) -> Scheme | None:
        """What the config says of layer ``name``; None: it is not quantized."""
        if any(re.match(pattern, name) for pattern in self.left_out):
            return None
        if self.within_block and not any(f".{name}".endswith(f".{end}") for end in self.within_block):
            return None
        return self.scheme

    def layout(self, shape: tuple[int, int], scheme: Scheme) -> Layout:
        """The tensors of a layer of ``shape`` (out_features, in_features)."""
        (out_features, in_features), bits = shape, scheme.bits
        groups = scheme.num_groups(in_features)
        return {
            "qweight": Stored((in_features * bits // WORD_BITS, out_features)),
            "qzeros": Stored((groups, out_features * bits // WORD_BITS)),
            "scales": Stored((groups, out_features), SCALE_TYPES),
            "g_idx": Stored((in_features,), optional=True),
        }

    def pack(self, name: str, weight: QuantizedWeight) -> Iterator[tuple[str, Tensor]]:
        """The tensors of layer ``name``, as (tensor name, tensor). LlmqError when they cannot hold it exactly."""
        import torch

        in_features = weight.shape[1]
        index = weight.group_index
        if index is None:
            index = torch.arange(in_features) // weight.scheme.group_length(in_features)
        stored_zeros = weight.zero_points.int() - self.stored_zero_offset
        yield f"{name}.qweight", pack_words(weight.codes.t(), weight.scheme.bits)
        yield f"{name}.qzeros", pack_words(stored_zeros, weight.scheme.bits).t().contiguous()
        yield f"{name}.scales", exact_fp16(name, weight.scales).t().contiguous()
        yield f"{name}.g_idx", index.to(torch.int32)

    def unpack(self, name: str, tensors: Tensors, device: str = "cpu") -> QuantizedWeight:
        """Read layer ``name``. Raises LlmqError when its tensors contradict the config."""
        import torch

        scheme, bits = self.scheme, self.scheme.bits
        word_rows, out_features = stored_shape(f"{name}.qweight", tensors)
        in_features = word_rows * WORD_BITS // bits
        check_layout(name, tensors, self.layout((out_features, in_features), scheme), scheme)
        codes = unpack_words(tensors.load(f"{name}.qweight", device), bits, in_features).t().contiguous()
        qzeros = tensors.load(f"{name}.qzeros", device)
        zeros = (unpack_words(qzeros.t(), bits, out_features).int() + self.stored_zero_offset).to(torch.uint8)
        scales = tensors.load(f"{name}.scales", device).t()
        index = read_group_index(f"{name}.g_idx", tensors, in_features, scheme, device)
        return QuantizedWeight(scheme, codes, scales, zeros, index)

    def config_dict(
        self, *, quantized: Sequence[str], ignored: Sequence[str], writer: str, damp_percent: float | None = None
    ) -> dict[str, Any]:
        """``quantization_config`` for config.json and quantize_config.json.

        ``quantized`` and ``ignored`` are the names of the decoder blocks' linear layers, ``damp_percent`` is None where
        the method has no such thing. ``desc_act`` tells loaders that groups are scattered by activation order; llmq
        leaves them in place.

        The format marks ignored layers in two ways, neither of which all loaders know: GPTQModel reads ``dynamic``,
        transformers ``modules_in_block_to_quantize``, vLLM both.
        """
        fields: dict[str, Any] = {
            "quant_method": self.name,
            "bits": self.scheme.bits,
            "group_size": self.scheme.group_size,
            "sym": self.scheme.symmetric,
            "desc_act": False,
            "lm_head": False,
            "checkpoint_format": self.checkpoint_format,
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
