"""The GPTQ format (``quant_method: gptq``), as auto-gptq wrote it and transformers, vLLM and SGLang read it.

For a linear layer P with N outputs, K inputs and G groups, in place of ``P.weight``:

    P.qweight  int32 [K·bits/32, N]   codes of one output, packed along K
    P.qzeros   int32 [G, N·bits/32]   zero points, packed along N
    P.scales   fp16  [G, N]
    P.g_idx    int32 [K]              group of each input channel
    P.bias                            as in the original, if it has one

Version 1 (``checkpoint_format: gptq``) stores ``zero − 1``; a zero point of 0 has no encoding that all readers agree
on. So symmetric weights, whose zero point is the middle code, are written as version 1, which every runtime has its
fastest kernel for; asymmetric ones as version 2 (``gptq_v2``), which stores the zero point itself. Layers of another
scheme than most, and those that are not quantized, are named in ``dynamic``, as GPTQModel invented and vLLM reads it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from llmq.checkpoint.config import HEAD
from llmq.checkpoint.formats.merged import with_merged
from llmq.checkpoint.formats.packed import (
    DAMAGED_CONFIG,
    ORIGINAL,
    SCALE_TYPES,
    WORD_BITS,
    Layout,
    Stored,
    check_layout,
    check_symmetric,
    compiled,
    exact_fp16,
    most_common,
    pack_words,
    read_group_index,
    stated_scheme,
    stored_scheme,
    stored_shape,
    unpack_words,
    why_not_packed,
)
from llmq.checkpoint.quantized_weight import QuantizedWeight
from llmq.checkpoint.tensors import Tensors
from llmq.errors import LlmqError
from llmq.memory import GPTQ_BITS
from llmq.scheme import Scheme

if TYPE_CHECKING:
    from torch import Tensor

V1, V2 = "gptq", "gptq_v2"
WORDS = "int32"


@dataclass(frozen=True, slots=True)
class Gptq:
    """A GPTQ folder.

    default            the scheme of the layers of which no rule says otherwise
    checkpoint_format  V1 or V2
    rules              regular expressions, matched from the start of a layer's name, and its scheme; None: it is not
                       quantized. The first that matches counts
    within_block       the layers of a block that are quantized, as the ends of their names; empty: all
    head               whether ``lm_head`` is quantized

    Of a folder that is written, what its config says of the method:

    damp_percent       GPTQ's; None: another method's
    act_order          groups are scattered by activation order, and loaders are to heed the group index
    """

    name: ClassVar[str] = "gptq"
    title: ClassVar[str] = "GPTQ"
    markers: ClassVar[tuple[str, ...]] = ("qweight",)
    multiple: ClassVar[int] = 32
    packs_head: ClassVar[bool] = True
    config_files: ClassVar[tuple[str, ...]] = ("quantize_config.json",)

    default: Scheme
    checkpoint_format: str
    rules: tuple[tuple[str, Scheme | None], ...] = ()
    within_block: tuple[str, ...] = ()
    head: bool = False
    damp_percent: float | None = None
    act_order: bool = False

    @property
    def scheme(self) -> Scheme | None:
        """Of all layers; None when they have several."""
        return self.default if all(scheme in (None, self.default) for _, scheme in self.rules) else None

    @property
    def caveat(self) -> str | None:
        """What whoever writes such a folder should know of its readers."""
        if self.scheme is not None and not self.head:
            return None
        return "transformers reads GPTQ folders of one scheme, without a quantized head; GPTQModel and vLLM read this"

    @property
    def stored_zero_offset(self) -> int:
        """What is added to a stored zero point to get the real one."""
        return 1 if self.checkpoint_format == V1 else 0

    @staticmethod
    def why_not(*schemes: Scheme) -> str | None:
        """Why one folder cannot hold layers of all these schemes; None when it can."""
        for scheme in schemes:
            if reason := why_not_packed(scheme):
                return reason
            if scheme.bits not in GPTQ_BITS:
                return f"the GPTQ format holds codes of 2, 3, 4 or 8 bits, and these have {scheme.bits}"
        return None

    @classmethod
    def for_schemes(cls, schemes: Mapping[str, Scheme]) -> Gptq:
        """The version in which layers, by their full names, are written: one for all of a folder."""
        default = most_common(schemes)
        rules = [
            (f"{re.escape(name)}$", scheme)
            for scheme in dict.fromkeys(schemes.values())
            if scheme != default
            for name in with_merged([name for name, its in schemes.items() if its == scheme])
        ]
        symmetric = all(scheme.symmetric for scheme in schemes.values())
        return cls(default, V1 if symmetric else V2, tuple(rules), head=HEAD in schemes)

    @classmethod
    def read(cls, quantization: Mapping[str, Any]) -> Gptq:
        """Read ``quantization_config``. LlmqError on what llmq does not read."""
        # Without a field it is version 1: auto-gptq had no other for long. GPTQModel writes both of these.
        said = {str(quantization[key]) for key in ("checkpoint_format", "format") if quantization.get(key)} or {V1}
        if len(said) > 1:
            raise LlmqError(f"quantization_config states two formats: {' and '.join(sorted(said))}", DAMAGED_CONFIG)
        checkpoint_format = said.pop()
        if checkpoint_format not in (V1, V2):
            raise LlmqError(f"GPTQ folders in the layout {checkpoint_format!r} are not supported", "convert to 'gptq'")
        if quantization.get("pack_dtype", WORDS) != WORDS:
            raise LlmqError(f"GPTQ folders packed in {quantization['pack_dtype']} are not supported", ORIGINAL)
        try:
            rules = tuple(
                _read_rule(rule, fields, quantization) for rule, fields in (quantization.get("dynamic") or {}).items()
            )
            blocks = quantization.get("modules_in_block_to_quantize") or ()
            within_block = tuple(
                str(name) for names in blocks for name in (names if isinstance(names, list) else [names])
            )
        except (TypeError, AttributeError) as error:
            raise LlmqError(f"quantization_config: {error}", DAMAGED_CONFIG) from None
        head = bool(quantization.get("lm_head", False))
        return cls(_read_scheme(quantization), checkpoint_format, rules, within_block, head)

    def scheme_of(self, name: str) -> Scheme | None:
        """What the config says of layer ``name``; None: it is not quantized."""
        for pattern, scheme in self.rules:
            if compiled(pattern).match(name):
                return scheme
        if name == HEAD:
            return self.default if self.head else None
        if self.within_block and not any(f".{name}".endswith(f".{end}") for end in self.within_block):
            return None
        return self.default

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

        check_symmetric(name, weight)
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
        scheme = stated_scheme(name, self.scheme_of(name))
        bits = scheme.bits
        word_rows, out_features = stored_shape(f"{name}.qweight", tensors)
        in_features = word_rows * WORD_BITS // bits
        check_layout(name, tensors, self.layout((out_features, in_features), scheme), scheme)
        codes = unpack_words(tensors.load(f"{name}.qweight", device), bits, in_features).t().contiguous()
        stored_zeros = unpack_words(tensors.load(f"{name}.qzeros", device).t(), bits, out_features)
        if self.checkpoint_format == V1 and (stored_zeros == scheme.max_code).any():
            raise LlmqError(
                f"{name} has zero points of 0, which programs write and read in three ways in version 1 of GPTQ",
                "quantize the original model by llmq, which writes version 2 for asymmetric weights",
            )
        zeros = stored_zeros + self.stored_zero_offset
        scales = tensors.load(f"{name}.scales", device).t()
        index = read_group_index(f"{name}.g_idx", tensors, in_features, scheme, device)
        return QuantizedWeight(scheme, codes, scales, zeros, index)

    def config_dict(self, *, quantized: Sequence[str], ignored: Sequence[str], writer: str) -> dict[str, Any]:
        """``quantization_config`` for config.json and quantize_config.json.

        ``quantized`` and ``ignored`` are the names of the decoder blocks' linear layers, and of a quantized head.

        The format marks ignored layers in two ways, neither of which all loaders know: GPTQModel reads ``dynamic``,
        transformers ``modules_in_block_to_quantize``, vLLM both.
        """
        fields: dict[str, Any] = {
            "quant_method": self.name,
            **_scheme_fields(self.default),
            "desc_act": self.act_order,
            "lm_head": HEAD in quantized,
            "checkpoint_format": self.checkpoint_format,
            "pack_dtype": WORDS,
            "meta": {"quantizer": [writer]},
        }
        if self.damp_percent is not None:
            fields |= {"damp_percent": self.damp_percent, "true_sequential": True}
        dynamic: dict[str, dict[str, Any]] = {
            f"+:{pattern}": _scheme_fields(scheme) for pattern, scheme in self.rules if scheme is not None
        }
        quantized = [name for name in quantized if name != HEAD]
        if ignored:
            left_out, prefix = _within_block(ignored), r".*\."
            if not left_out.isdisjoint(_within_block(quantized)):  # not the same in all blocks: whole names
                left_out, prefix = set(ignored), ""
            dynamic |= {f"-:{prefix}{re.escape(name)}$": {} for name in with_merged(sorted(left_out))}
            fields["modules_in_block_to_quantize"] = [sorted(quantized if not prefix else _within_block(quantized))]
        return fields | ({"dynamic": dynamic} if dynamic else {})


def _scheme_fields(scheme: Scheme) -> dict[str, Any]:
    return {"bits": scheme.bits, "group_size": scheme.group_size, "sym": scheme.symmetric}


def _read_scheme(fields: Mapping[str, Any]) -> Scheme:
    scheme = stored_scheme(fields.get("bits"), fields.get("group_size", 128), fields.get("sym", True))
    if reason := Gptq.why_not(scheme):
        raise LlmqError(f"the folder's weights: {reason}", ORIGINAL)
    return scheme


def _read_rule(rule: str, fields: Mapping[str, Any], default: Mapping[str, Any]) -> tuple[str, Scheme | None]:
    """An entry of ``dynamic``: a pattern after ``-:`` (not quantized) or ``+:`` (or nothing), and what it changes."""
    pattern = rule.removeprefix("-:").removeprefix("+:")
    compiled(pattern)  # or it is refused
    return pattern, None if rule.startswith("-:") else _read_scheme({**default, **fields})


def _within_block(names: Iterable[str]) -> set[str]:
    """``model.layers.7.mlp.up_proj`` → ``mlp.up_proj``, each once"""
    return {re.sub(r"^.*\.layers\.\d+\.", "", name) for name in names}
