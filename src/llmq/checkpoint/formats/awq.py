"""The AWQ format, version GEMM (``quant_method: awq``), as AutoAWQ wrote it and transformers, vLLM and SGLang read it.

For a linear layer P with N outputs, K inputs and G groups, in place of ``P.weight``:

    P.qweight  int32 [K, N/8]   codes, packed along N
    P.qzeros   int32 [G, N/8]   zero points, packed along N
    P.scales   fp16  [G, N]
    P.bias                      as in the original, if it has one

    packed word   | 7 | 5 | 3 | 1 | 6 | 4 | 2 | 0 |     which of eight consecutive outputs is in which four bits
                   31          16 15             0

The order is that in which the GEMM kernel, unpacking two halves of a word at once, wants them. Codes have four bits;
zero points are always there, so symmetric weights have the middle code, 8, in all of them.
https://github.com/casper-hansen/AutoAWQ
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from llmq.checkpoint.config import HEAD
from llmq.checkpoint.formats.merged import with_merged
from llmq.checkpoint.formats.packed import (
    SCALE_TYPES,
    Layout,
    Stored,
    check_layout,
    exact_fp16,
    most_common,
    natural_groups,
    pack_words,
    stated_names,
    stated_scheme,
    stored_scheme,
    stored_shape,
    unpack_words,
    why_not_packed,
    why_not_several,
)
from llmq.checkpoint.quantized_weight import QuantizedWeight
from llmq.checkpoint.tensors import Tensors
from llmq.errors import LlmqError
from llmq.scheme import Scheme

if TYPE_CHECKING:
    from torch import Tensor

BITS = 4
OCTET = (0, 2, 4, 6, 1, 3, 5, 7)
"""The output, of eight consecutive ones, that is in the i-th four bits of a word, from the lowest."""
NIBBLE = tuple(OCTET.index(output) for output in range(8))
"""The inverse: in which four bits the j-th of eight outputs is."""
VERSION = "gemm"


@dataclass(frozen=True, slots=True)
class Awq:
    """An AWQ folder. ``left_out``: parts of the names of layers that are not quantized."""

    name: ClassVar[str] = "awq"
    title: ClassVar[str] = "AWQ"
    markers: ClassVar[tuple[str, ...]] = ("qweight",)
    multiple: ClassVar[int] = 8
    packs_head: ClassVar[bool] = False
    config_files: ClassVar[tuple[str, ...]] = ()
    caveat: ClassVar[str | None] = None

    scheme: Scheme
    left_out: tuple[str, ...] = ()

    @staticmethod
    def why_not(*schemes: Scheme) -> str | None:
        """Why one folder cannot hold layers of all these schemes; None when it can."""
        for scheme in schemes:
            if scheme.bits != BITS:
                return f"the AWQ format holds codes of {BITS} bits, and these have {scheme.bits}"
            if reason := why_not_packed(scheme):
                return reason
        return why_not_several("AWQ", schemes)

    @classmethod
    def for_schemes(cls, schemes: Mapping[str, Scheme]) -> Awq:
        """The format as it is written for layers, by their full names, which all have one scheme."""
        return cls(most_common(schemes))

    @classmethod
    def read(cls, quantization: Mapping[str, Any]) -> Awq:
        """Read ``quantization_config``, by transformers' names or AutoAWQ's. LlmqError on what llmq does not read."""
        version = str(quantization.get("version", VERSION)).lower()
        if version != VERSION:
            raise LlmqError(f"AWQ folders of version {version!r} are not supported", "llmq reads version 'gemm'")
        if not quantization.get("zero_point", True):
            raise LlmqError("AWQ folders without zero points are not supported", "quantize the original model by llmq")
        bits = quantization.get("bits", quantization.get("w_bit"))
        group_size = quantization.get("group_size", quantization.get("q_group_size", 128))
        # Zero points are stored, so they may be anything: nothing says that all of them are the middle code.
        scheme = stored_scheme(bits, group_size, False)
        if scheme.bits != BITS:
            raise LlmqError(f"AWQ folders of {scheme.bits} bits are not supported", "the format has 4 bits a code")
        left_out = "modules_to_not_convert"
        return cls(scheme, stated_names(left_out, quantization.get(left_out)))

    def scheme_of(self, name: str) -> Scheme | None:
        """What the config says of layer ``name``; None: it is not quantized."""
        return None if any(part in name for part in self.left_out) else self.scheme

    def layout(self, shape: tuple[int, int], scheme: Scheme) -> Layout:
        """The tensors of a layer of ``shape`` (out_features, in_features)."""
        out_features, in_features = shape
        groups = scheme.num_groups(in_features)
        return {
            "qweight": Stored((in_features, out_features // 8)),
            "qzeros": Stored((groups, out_features // 8)),
            "scales": Stored((groups, out_features), SCALE_TYPES),
        }

    def pack(self, name: str, weight: QuantizedWeight) -> Iterator[tuple[str, Tensor]]:
        """The tensors of layer ``name``, as (tensor name, tensor). LlmqError when they cannot hold it exactly."""
        natural_groups(name, weight.group_index)
        yield f"{name}.qweight", pack_words(_permuted(weight.codes, OCTET), BITS).t().contiguous()
        yield f"{name}.qzeros", pack_words(_permuted(weight.zero_points, OCTET), BITS).t().contiguous()
        yield f"{name}.scales", exact_fp16(name, weight.scales).t().contiguous()

    def unpack(self, name: str, tensors: Tensors, device: str = "cpu") -> QuantizedWeight:
        """Read layer ``name``. Raises LlmqError when its tensors contradict the config."""
        in_features, words = stored_shape(f"{name}.qweight", tensors)
        out_features = words * 8
        scheme = stated_scheme(name, self.scheme_of(name))
        check_layout(name, tensors, self.layout((out_features, in_features), scheme), scheme)
        codes, zeros = (
            _permuted(unpack_words(tensors.load(f"{name}.{suffix}", device).t(), BITS, out_features), NIBBLE)
            for suffix in ("qweight", "qzeros")
        )
        return QuantizedWeight(scheme, codes, tensors.load(f"{name}.scales", device).t(), zeros)

    def config_dict(self, *, quantized: Sequence[str], ignored: Sequence[str], writer: str) -> dict[str, Any]:
        """``quantization_config`` for config.json. Layers are left out by their full names: transformers matches those
        from the start, vLLM as any part of a name."""
        return {
            "quant_method": self.name,
            "bits": BITS,
            "group_size": self.scheme.group_size,
            "zero_point": True,
            "version": VERSION,
            "modules_to_not_convert": [HEAD, *with_merged(ignored)],
            "meta": {"quantizer": [writer]},
        }


def _permuted(rows: Tensor, order: tuple[int, ...]) -> Tensor:
    """[N, columns] with every eight consecutive rows in ``order``."""
    return rows.reshape(-1, 8, rows.shape[1])[:, list(order)].reshape(rows.shape)
