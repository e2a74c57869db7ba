"""The bitsandbytes format, as transformers saves it with ``BitsAndBytesConfig``, and it and vLLM read it.

For a linear layer P with N outputs and K inputs. Of 4 bits (nf4, fp4), in blocks of 64 of one row:

    P.weight                               uint8 [N·K/2, 1] codes, row after row
    P.weight.absmax                        fp32 [N·K/64]    scales; read also as uint8, quantized themselves:
    P.weight.nested_absmax                 fp32 [⌈N·K/64/256⌉]
    P.weight.nested_quant_map              fp32 [256]       scale[i] = map[absmax[i]] · nested_absmax[i // 256] + offset
    P.weight.quant_map                     fp32 [16]        what the codes stand for
    P.weight.quant_state.bitsandbytes__T   uint8            JSON of the type T, block size, shape, and the offset

    byte   | even code | odd code |
            7         4 3        0

Of 8 bits, integers by row:

    P.weight         int8 [N, K]     codes − 128
    P.SCB            fp32 [N]        the row's largest magnitude: 127 scales
    P.weight_format  uint8 []        0: by rows

``P.bias`` is as in the original, if it has one. The library computes with 8-bit layers by LLM.int8(), which rounds the
activations without outliers to 8 bits too; llmq keeps them as they are. Scales are never written quantized.
https://github.com/bitsandbytes-foundation/bitsandbytes
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from llmq.checkpoint.config import HEAD
from llmq.checkpoint.formats.packed import (
    DAMAGED,
    ORIGINAL,
    Layout,
    Stored,
    check_layout,
    check_symmetric,
    most_common,
    natural_groups,
    stated_names,
    stated_scheme,
    stored_shape,
    why_not_several,
)
from llmq.checkpoint.quantized_weight import QuantizedWeight, numbers
from llmq.checkpoint.tensors import Tensors
from llmq.errors import LlmqError
from llmq.scheme import FP4, NF4, WHOLE_ROW, Scheme

if TYPE_CHECKING:
    from torch import Tensor

BLOCK = 64
"""Weights that share a scale: the library's default, and the only size that a config does not have to state."""
NESTED_BLOCK = 256
INT8 = Scheme(8, WHOLE_ROW)
INT8_MAX = 127


@dataclass(frozen=True, slots=True)
class BitsAndBytes:
    """A bitsandbytes folder. ``left_out``: dotted parts of the names of layers that are not quantized."""

    name: ClassVar[str] = "bitsandbytes"
    title: ClassVar[str] = "bitsandbytes"
    markers: ClassVar[tuple[str, ...]] = ("weight.absmax", "SCB")
    multiple: ClassVar[int] = 1
    packs_head: ClassVar[bool] = False
    config_files: ClassVar[tuple[str, ...]] = ()
    caveat: ClassVar[str | None] = None

    scheme: Scheme
    left_out: tuple[str, ...] = (HEAD,)

    @staticmethod
    def why_not(*schemes: Scheme) -> str | None:
        """Why one folder cannot hold layers of all these schemes; None when it can."""
        for scheme in schemes:
            if scheme != INT8 and not (scheme.number in (NF4, FP4) and scheme.group_size == BLOCK):
                return f"the bitsandbytes format holds nf4 and fp4 by {BLOCK}, and {INT8}, and not {scheme}"
        return why_not_several("bitsandbytes", schemes)

    @classmethod
    def for_schemes(cls, schemes: Mapping[str, Scheme]) -> BitsAndBytes:
        """The format as it is written for layers, by their full names, which all have one scheme."""
        return cls(most_common(schemes))

    @classmethod
    def read(cls, quantization: Mapping[str, Any]) -> BitsAndBytes:
        """Read ``quantization_config``. LlmqError on what llmq does not read."""
        four, eight = (bool(quantization.get(f"load_in_{bits}bit")) for bits in (4, 8))
        number = quantization.get("bnb_4bit_quant_type", FP4)
        if four == eight or number not in (NF4, FP4):
            raise LlmqError(
                f"quantization_config of bitsandbytes states 4 bits: {four}, 8 bits: {eight}, type: {number!r}",
                ORIGINAL,
            )
        left_out = stated_names("llm_int8_skip_modules", quantization.get("llm_int8_skip_modules")) or (HEAD,)
        return cls(Scheme(4, BLOCK, number=number) if four else INT8, left_out)

    def scheme_of(self, name: str) -> Scheme | None:
        """What the config says of layer ``name``; None: it is not quantized."""
        return None if any(f".{part}." in f".{name}." for part in self.left_out) else self.scheme

    def layout(self, shape: tuple[int, int], scheme: Scheme) -> Layout:
        """The tensors of a layer of ``shape`` (out_features, in_features)."""
        out_features, in_features = shape
        if scheme == INT8:
            return {
                "weight": Stored(shape, ("I8",)),
                "SCB": Stored((out_features,), ("F32",)),
                "weight_format": Stored((), ("U8",), optional=True),
            }
        return {
            "weight": Stored((out_features * in_features // 2, 1), ("U8",)),
            "weight.absmax": Stored((out_features * scheme.num_groups(in_features),), ("F32", "U8")),
            "weight.quant_map": Stored((16,), ("F32",)),
            _state_name(scheme): Stored((len(_state(shape, scheme)),), ("U8",), text=True),
        }

    def pack(self, name: str, weight: QuantizedWeight) -> Iterator[tuple[str, Tensor]]:
        """The tensors of layer ``name``, as (tensor name, tensor). LlmqError when they cannot hold it exactly."""
        import torch

        scheme, scales = weight.scheme, weight.scales.float()
        natural_groups(name, weight.group_index)
        check_symmetric(name, weight)
        if scheme == INT8:
            magnitudes = scales * INT8_MAX
            if not torch.equal(magnitudes / INT8_MAX, scales):
                raise LlmqError(
                    f"{name}: scales are not the 127th part of an fp32 number, as the format has them",
                    "choose --format compressed-tensors, which keeps them",
                )
            yield f"{name}.weight", (weight.codes ^ scheme.middle_code).view(torch.int8)
            yield f"{name}.SCB", magnitudes.flatten()
            yield f"{name}.weight_format", torch.tensor(0, dtype=torch.uint8)
            return
        pairs = weight.codes.reshape(-1, 2)
        yield f"{name}.weight", (pairs[:, :1] << 4) | pairs[:, 1:]
        yield f"{name}.weight.absmax", scales.flatten()
        yield f"{name}.weight.quant_map", numbers(scheme.number)
        yield f"{name}.{_state_name(scheme)}", torch.tensor(list(_state(weight.shape, scheme)), dtype=torch.uint8)

    def unpack(self, name: str, tensors: Tensors, device: str = "cpu") -> QuantizedWeight:
        """Read layer ``name``. Raises LlmqError when its tensors contradict the config."""
        import torch

        scheme = stated_scheme(name, self.scheme_of(name))
        if scheme == INT8:
            shape = stored_shape(f"{name}.weight", tensors)
            check_layout(name, tensors, self.layout(shape, scheme), scheme)
            codes = tensors.load(f"{name}.weight", device).view(torch.uint8) ^ scheme.middle_code
            scales = tensors.load(f"{name}.SCB", device).unsqueeze(1) / INT8_MAX
            return QuantizedWeight(scheme, codes, scales, torch.full_like(scales, scheme.middle_code).to(torch.uint8))
        state = _read_state(name, tensors, scheme)
        shape = (state["shape"][0], state["shape"][1])
        if not scheme.divides(shape[1]):
            raise LlmqError(f"{name} has {shape[1]} inputs: blocks of {BLOCK} would go from row to row", ORIGINAL)
        check_layout(name, tensors, self.layout(shape, scheme), scheme)
        if not torch.equal(tensors.load(f"{name}.weight.quant_map"), numbers(scheme.number)):
            raise LlmqError(f"{name}.weight.quant_map is not the table of {scheme.number}", DAMAGED)
        scales = tensors.load(f"{name}.weight.absmax", device)
        if scales.dtype == torch.uint8:
            table = tensors.load(f"{name}.weight.nested_quant_map", device)
            outer = tensors.load(f"{name}.weight.nested_absmax", device).repeat_interleave(NESTED_BLOCK)
            scales = table[scales.long()] * outer[: len(scales)] + state["nested_offset"]
        codes = split_bytes(tensors.load(f"{name}.weight", device), shape)
        scales = scales.view(shape[0], -1)
        return QuantizedWeight(scheme, codes, scales, torch.zeros_like(scales, dtype=torch.uint8))

    def config_dict(self, *, quantized: Sequence[str], ignored: Sequence[str], writer: str) -> dict[str, Any]:
        """``quantization_config`` for config.json, with the layers that are left out by their full names."""
        four = self.scheme != INT8
        fields: dict[str, Any] = {"quant_method": self.name, "load_in_4bit": four, "load_in_8bit": not four}
        if four:
            fields |= {
                "bnb_4bit_quant_type": self.scheme.number,
                "bnb_4bit_use_double_quant": False,
                "bnb_4bit_compute_dtype": COMPUTE_DTYPE,
                "bnb_4bit_quant_storage": "uint8",
            }
        return fields | {"llm_int8_skip_modules": [HEAD, *ignored], "meta": {"quantizer": [writer]}}


COMPUTE_DTYPE = "float16"
"""In which the library widens weights, and computes with fp16 activations; with others it computes in their type."""


def split_bytes(packed: Tensor, shape: tuple[int, int]) -> Tensor:
    """Codes uint8 of ``shape`` (out_features, in_features), from the bytes that hold two each."""
    import torch

    return torch.stack((packed >> 4, packed & 15), dim=-1).view(shape)


def _state_name(scheme: Scheme) -> str:
    return f"weight.quant_state.bitsandbytes__{scheme.number}"


def _state(shape: tuple[int, int], scheme: Scheme) -> bytes:
    """What is written of a layer besides tensors."""
    fields = {"quant_type": scheme.number, "blocksize": BLOCK, "dtype": COMPUTE_DTYPE, "shape": list(shape)}
    return json.dumps(fields).encode()


def _read_state(name: str, tensors: Tensors, scheme: Scheme) -> Mapping[str, Any]:
    """The JSON beside the tensors of a 4-bit layer. LlmqError when it is none, or not of ``scheme``."""
    stored = tensors.load(f"{name}.{_state_name(scheme)}")
    try:
        state: dict[str, Any] = json.loads(bytes(stored.tolist()))
        number, block, sides = state["quant_type"], state["blocksize"], len(state["shape"])
        if not all(isinstance(side, int) for side in state["shape"]):
            raise TypeError(f"shape {state['shape']}")
        nested = state.get("nested_blocksize", NESTED_BLOCK)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise LlmqError(f"{name}.{_state_name(scheme)} is not readable: {error!r}", DAMAGED) from None
    if (number, block, nested, sides) != (scheme.number, BLOCK, NESTED_BLOCK, 2):
        raise LlmqError(
            f"{name} is {number} in blocks of {block} and, of scales, {nested}; llmq reads {BLOCK} and {NESTED_BLOCK}",
            ORIGINAL,
        )
    return state
