"""What the formats share: codes in 32-bit words, and tensors described before they are read.

Codes are one stream of bits from the lowest bit of the first word; a code of 3, 5 or 6 bits may stand in two words.

word 0   | 10, its low 2 bits | 9 | … | 1 | 0 |      word 1   | … | 11 | 10, its high bit |     (3 bits)
          31               30          5   2 … 0                   3   1                 0
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from math import prod
from typing import TYPE_CHECKING, Any

from llmq.checkpoint.quantized_weight import QuantizedWeight
from llmq.checkpoint.tensors import TensorInfo, Tensors, element_bits
from llmq.errors import LlmqError
from llmq.scheme import INT, WHOLE_TENSOR, Scheme

if TYPE_CHECKING:
    from torch import Tensor

WORD_BITS = 32
SCALE_TYPES = ("F16", "BF16", "F32")
DAMAGED = "the folder's quantization_config contradicts its weights, or is damaged"
DAMAGED_CONFIG = "the folder's config.json is damaged"
ORIGINAL = "quantize the original model by llmq"


@dataclass(frozen=True, slots=True)
class Stored:
    """One tensor of a packed layer, as its header says it. ``dtypes`` are safetensors' names for the element types that
    are read; the first is the one that is written. A ``text`` may be of any length when it is read."""

    shape: tuple[int, ...]
    dtypes: tuple[str, ...] = ("I32",)
    optional: bool = False
    text: bool = False

    @property
    def num_bytes(self) -> int:
        return prod(self.shape) * element_bits(self.dtypes[0]) // 8


Layout = Mapping[str, Stored]
"""The tensors of one layer: what follows the name → what is stored under it."""


def contradictions(name: str, infos: Mapping[str, TensorInfo], layout: Layout, scheme: Scheme) -> Iterator[str]:
    """How the tensors of layer ``name`` differ from ``layout``, in words."""
    for suffix, stored in layout.items():
        info = infos.get(f"{name}.{suffix}")
        if info is None:
            if not stored.optional:
                yield f"{name}.{suffix} is missing"
        elif (info.shape != stored.shape and not stored.text) or info.dtype not in stored.dtypes:
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
    return None


def why_not_several(title: str, schemes: Collection[Scheme]) -> str | None:
    """Why a format cannot hold layers of all these schemes, if it has one scheme for all."""
    several = sorted(set(map(str, schemes)))
    return f"the {title} format holds one scheme a folder, and not {', '.join(several)}" if len(several) > 1 else None


def most_common(schemes: Mapping[str, Scheme]) -> Scheme:
    """The scheme of most layers; of as many layers, the one that comes first."""
    return Counter(schemes.values()).most_common(1)[0][0]


def stored_scheme(bits: Any, group_size: Any, symmetric: Any, number: str = INT, activation_bits: int = 16) -> Scheme:
    """The scheme that a quantization_config states. LlmqError when it is none that llmq reads."""
    try:
        return Scheme(int(bits), int(group_size), bool(symmetric), number, activation_bits)
    except (TypeError, ValueError):
        raise LlmqError(
            f"quantization_config states {bits!r} bits in groups of {group_size!r}", DAMAGED_CONFIG
        ) from None
    except LlmqError as error:
        raise LlmqError(f"the folder's weights: {error.message}", ORIGINAL) from None


def stated_scheme(name: str, scheme: Scheme | None) -> Scheme:
    """What the config says of layer ``name``, which is packed. LlmqError when that is None."""
    if scheme is None:
        raise LlmqError(f"{name} is packed, and quantization_config says that it is not", DAMAGED)
    return scheme


def check_symmetric(name: str, weight: QuantizedWeight) -> None:
    """Raise LlmqError when a scheme says symmetric and a zero point is not the middle code, which it then has to be."""
    if weight.scheme.symmetric and not (weight.zero_points == weight.scheme.middle_code).all():
        raise LlmqError(f"{name}: said to be symmetric, but has zero points other than the middle code", DAMAGED)


@cache
def compiled(pattern: str) -> re.Pattern[str]:
    """``pattern``, of a quantization_config. LlmqError when it is no regular expression.

    ``re`` keeps 512 by itself, and a model of experts may have more rules than that, each asked of every layer.
    """
    try:
        return re.compile(pattern)
    except re.error as error:
        raise LlmqError(
            f"quantization_config: {pattern!r} is not a regular expression: {error}", DAMAGED_CONFIG
        ) from None


def stated_names(field: str, value: Any) -> tuple[str, ...]:
    """The layers that ``field`` of a quantization_config lists. LlmqError when it is no list of names."""
    names = [] if value is None else value
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise LlmqError(f"quantization_config: {field} is {value!r}, and no list of names", DAMAGED_CONFIG)
    return tuple(names)


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
            f"only GPTQ can: {ORIGINAL}, which leaves groups in place",
        )


def num_words(values: int, bits: int) -> int:
    """Words that so many values of ``bits`` bits fill, the last perhaps in part."""
    return -(-values * bits // WORD_BITS)


def pack_words(values: Tensor, bits: int) -> Tensor:
    """Pack [rows, columns] of values in ``[0, 2^bits)`` along rows into int32 [⌈rows·bits/32⌉, columns]."""
    import torch
    from torch.nn import functional

    rows, columns = values.shape
    values = functional.pad(values, (0, 0, 0, -rows % WORD_BITS)).view(-1, WORD_BITS, columns)
    words = torch.zeros(len(values), bits, columns, dtype=torch.int64, device=values.device)
    for i in range(WORD_BITS):  # 32 values fill as many words as a value has bits
        word, shift = divmod(i * bits, WORD_BITS)
        words[:, word] |= (values[:, i].long() & (2**bits - 1)) << shift
    words[:, 1:] |= words[:, :-1] >> WORD_BITS  # what stands in two words
    words &= 2**WORD_BITS - 1
    # A word of 2^31 or more becomes the negative number of the same bits.
    packed: Tensor = (words - (words >= 2**31) * 2**WORD_BITS).to(torch.int32)
    return packed.view(-1, columns)[: num_words(rows, bits)]


def unpack_words(words: Tensor, bits: int, rows: int) -> Tensor:
    """The inverse of ``pack_words``: int32 [⌈rows·bits/32⌉, columns] → uint8 [rows, columns]."""
    import torch
    from torch.nn import functional

    columns = words.shape[1]
    words = functional.pad(words, (0, 0, 0, -len(words) % bits)).view(-1, bits, columns).long() & (2**WORD_BITS - 1)
    values = torch.empty(len(words), WORD_BITS, columns, dtype=torch.uint8, device=words.device)
    for i in range(WORD_BITS):
        word, shift = divmod(i * bits, WORD_BITS)
        value = words[:, word] >> shift
        if shift + bits > WORD_BITS:
            value |= words[:, word + 1] << WORD_BITS - shift
        values[:, i] = value & (2**bits - 1)
    return values.view(-1, columns)[:rows]


def read_group_index(tensor: str, tensors: Tensors, in_features: int, scheme: Scheme, device: str) -> Tensor | None:
    """The group of each input channel, int64 [in]; None without such a tensor, or where groups are in their places.

    LlmqError unless it has one of the groups for each channel.
    """
    import torch

    if tensor not in tensors:
        return None
    index = tensors.load(tensor, device).long()
    groups = scheme.num_groups(in_features)
    if index.shape != (in_features,) or not ((index >= 0) & (index < groups)).all():
        raise LlmqError(f"{tensor} does not give each of {in_features} channels one of {groups} groups", DAMAGED)
    natural = torch.arange(in_features, device=index.device) // scheme.group_length(in_features)
    return None if torch.equal(index, natural) else index
