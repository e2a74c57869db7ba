"""What the formats of integer weights share: codes in 32-bit words, and tensors described before they are read.

packed word   | value 32/bits − 1 | … | value 1 | value 0 |
               31                                bits−1 … 0
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from llmq.checkpoint.tensors import TensorInfo, Tensors
from llmq.errors import LlmqError
from llmq.scheme import INT, WHOLE_TENSOR, Scheme

if TYPE_CHECKING:
    from torch import Tensor

WORD_BITS = 32
SCALE_TYPES = ("F16", "BF16", "F32")
DTYPE_BYTES = {"I32": 4, "I64": 8, "F16": 2}
DAMAGED = "the folder's quantization_config contradicts its weights, or is damaged"
DAMAGED_CONFIG = "the folder's config.json is damaged"


@dataclass(frozen=True, slots=True)
class Stored:
    """One tensor of a packed layer, as its header says it. ``dtypes`` are safetensors' names for the element types that
    are read; the first is the one that is written."""

    shape: tuple[int, ...]
    dtypes: tuple[str, ...] = ("I32",)
    optional: bool = False

    @property
    def num_bytes(self) -> int:
        count = DTYPE_BYTES[self.dtypes[0]]
        for size in self.shape:
            count *= size
        return count


Layout = Mapping[str, Stored]
"""The tensors of one layer: the last part of the name → what is stored under it."""


def contradictions(name: str, infos: Mapping[str, TensorInfo], layout: Layout, scheme: Scheme) -> Iterator[str]:
    """How the tensors of layer ``name`` differ from ``layout``, in words."""
    for suffix, stored in layout.items():
        info = infos.get(f"{name}.{suffix}")
        if info is None:
            if not stored.optional:
                yield f"{name}.{suffix} is missing"
        elif info.shape != stored.shape or info.dtype not in stored.dtypes:
            yield (
                f"{name}.{suffix} is {info.dtype} {list(info.shape)}, and {scheme} makes it "
                f"{' or '.join(stored.dtypes)} {list(stored.shape)}"
            )


def check_layout(name: str, tensors: Tensors, layout: Layout, scheme: Scheme) -> None:
    """Raise LlmqError when the tensors of layer ``name`` differ from ``layout``."""
    for contradiction in contradictions(name, tensors.infos, layout, scheme):
        raise LlmqError(contradiction, DAMAGED)


def stored_shape(name: str, tensors: Tensors) -> tuple[int, int]:
    """The shape of the tensor ``name``, which has to be a matrix."""
    info = tensors.infos.get(name)
    if info is None or len(info.shape) != 2:
        raise LlmqError(f"{tensors.folder} has no matrix {name}", DAMAGED)
    return info.shape[0], info.shape[1]


def why_not_packed(scheme: Scheme) -> str | None:
    """Why words of integer codes, with no more than a scale and a zero point for each group, cannot hold ``scheme``."""
    if scheme.number != INT or scheme.activation_bits != 16 or scheme.group_size == WHOLE_TENSOR:
        return f"the format holds integers with 16-bit activations, by group or row, and not {scheme}"
    return None if scheme.bits in (4, 8) else f"codes of {scheme.bits} bits are not supported"


def stored_scheme(bits: Any, group_size: Any, symmetric: Any) -> Scheme:
    """The scheme that a quantization_config states. LlmqError when it is none that llmq reads."""
    try:
        scheme = Scheme(int(bits), int(group_size), bool(symmetric))
    except (TypeError, ValueError):
        raise LlmqError(
            f"quantization_config states {bits!r} bits in groups of {group_size!r}", DAMAGED_CONFIG
        ) from None
    except LlmqError as error:
        raise LlmqError(f"the folder's weights: {error.message}", "quantize the original model by llmq") from None
    reason = why_not_packed(scheme)
    if reason is not None:
        raise LlmqError(f"the folder's weights: {reason}", "quantize the original model by llmq")
    return scheme


def check_regex(pattern: str) -> None:
    """Raise LlmqError unless ``pattern``, of a quantization_config, is a regular expression."""
    try:
        re.compile(pattern)
    except re.error as error:
        raise LlmqError(
            f"quantization_config: {pattern!r} is not a regular expression: {error}", DAMAGED_CONFIG
        ) from None


def exact_fp16(name: str, scales: Tensor) -> Tensor:
    """``scales`` as fp16. LlmqError where that would change one."""
    import torch

    narrow = scales.to(torch.float16)
    if not torch.equal(narrow.to(scales.dtype), scales):
        raise LlmqError(
            f"{name}: scales in {str(scales.dtype).removeprefix('torch.')} have no equal in fp16, which the format has",
            "choose --format compressed-tensors, which keeps their type",
        )
    return narrow


def natural_groups(name: str, group_index: Tensor | None) -> None:
    """Raise LlmqError unless groups are runs of consecutive channels, for formats that can say nothing else."""
    if group_index is not None:
        raise LlmqError(
            f"{name}: its groups are scattered by activation order, which the format cannot say",
            "only GPTQ can: quantize the original model by llmq, which leaves groups in place",
        )


def pack_words(values: Tensor, bits: int) -> Tensor:
    """Pack [rows, columns] of values in ``[0, 2^bits)`` along rows into int32 [⌈rows·bits/32⌉, columns]."""
    import torch
    from torch.nn import functional

    per_word = WORD_BITS // bits
    values = functional.pad(values.long() & (2**bits - 1), (0, 0, 0, -len(values) % per_word))
    fields = values.reshape(-1, per_word, values.shape[1])
    shifts = torch.arange(per_word, device=values.device).mul(bits).view(1, per_word, 1)
    words = (fields << shifts).sum(dim=1)
    # A word of 2^31 or more becomes the negative number of the same bits.
    packed: Tensor = (words - (words >= 2**31) * 2**32).to(torch.int32)
    return packed


def unpack_words(words: Tensor, bits: int, rows: int) -> Tensor:
    """The inverse of ``pack_words``: int32 [⌈rows·bits/32⌉, columns] → uint8 [rows, columns]."""
    import torch

    per_word = WORD_BITS // bits
    shifts = torch.arange(per_word, device=words.device, dtype=torch.int32).mul(bits).view(1, per_word, 1)
    fields: Tensor = (words.unsqueeze(1) >> shifts) & (2**bits - 1)
    return fields.to(torch.uint8).reshape(-1, words.shape[1])[:rows]


def read_group_index(tensor: str, tensors: Tensors, in_features: int, scheme: Scheme, device: str) -> Tensor | None:
    """The group of each input channel, int64 [in]; None without such a tensor, or where groups are in their places."""
    import torch

    if tensor not in tensors:
        return None
    index = tensors.load(tensor, device).long()
    natural = torch.arange(in_features, device=index.device) // scheme.group_length(in_features)
    return None if torch.equal(index, natural) else index
