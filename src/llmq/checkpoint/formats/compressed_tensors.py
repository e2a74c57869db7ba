"""The compressed-tensors format ``pack-quantized``, as llm-compressor writes it and transformers, vLLM and SGLang read.

For a linear layer P with N outputs, K inputs and G groups, in place of ``P.weight``:

    P.weight_packed      int32 [N, ⌈K·bits/32⌉]   codes, packed along K
    P.weight_scale       floating [N, G]          of any 16-bit type, or fp32
    P.weight_shape       int64 [2]                N, K
    P.weight_zero_point  int32 [⌈N·bits/32⌉, G]   asymmetric only: zero points, packed along N
    P.weight_g_idx       int32 [K]                group of each channel, where activation order scatters them; read only
    P.bias                                        as in the original, if it has one

The library thinks of codes and zero points as signed and stores them plus 2^(bits−1): what is stored are our unsigned
ones.  https://github.com/vllm-project/compressed-tensors
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from llmq.checkpoint.formats.packed import (
    DAMAGED,
    DAMAGED_CONFIG,
    SCALE_TYPES,
    WORD_BITS,
    Layout,
    Stored,
    check_layout,
    check_regex,
    natural_groups,
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
from llmq.scheme import WHOLE_ROW, Scheme

if TYPE_CHECKING:
    from torch import Tensor

PACKED = "pack-quantized"
CLASS = "Linear"
"""How targets and the ignore list name all layers that llmq quantizes."""
ORIGINAL = "quantize the original model by llmq, or use a folder of packed 4- or 8-bit weights"


@dataclass(frozen=True, slots=True)
class CompressedTensors:
    """A compressed-tensors folder.

    targets  what layers are (``Linear``, a name, or ``re:`` and a regular expression) and their scheme; the first that
             matches counts
    ignore   the layers that are not quantized, said alike
    """

    name: ClassVar[str] = "compressed-tensors"
    title: ClassVar[str] = "compressed-tensors"
    marker: ClassVar[str] = "weight_packed"
    multiple: ClassVar[int] = 1
    config_files: ClassVar[tuple[str, ...]] = ()

    targets: tuple[tuple[str, Scheme], ...]
    ignore: tuple[str, ...] = ()

    @property
    def scheme(self) -> Scheme | None:
        """Of all layers; None when they have several."""
        first = self.targets[0][1]
        return first if all(scheme == first for _, scheme in self.targets) else None

    @property
    def caveat(self) -> str | None:
        """What whoever writes such a folder should know of its readers."""
        if all(scheme.symmetric for _, scheme in self.targets):
            return None
        return (
            "transformers reads asymmetric compressed-tensors folders only by "
            "quantization_config=CompressedTensorsConfig(dequantize=True)"
        )

    @staticmethod
    def why_not(scheme: Scheme) -> str | None:
        """Why ``scheme`` cannot be held; None when it can."""
        return why_not_packed(scheme)

    @classmethod
    def for_scheme(cls, scheme: Scheme) -> CompressedTensors:
        """The format as it is written."""
        return cls(((CLASS, scheme),))

    @classmethod
    def read(cls, quantization: Mapping[str, Any]) -> CompressedTensors:
        """Read ``quantization_config``. LlmqError on what llmq does not read."""
        _check_format(quantization.get("format"))
        if quantization.get("kv_cache_scheme"):
            raise LlmqError("compressed-tensors folders with a quantized KV cache are not supported", ORIGINAL)
        try:
            groups = list(quantization["config_groups"].values())
            ignore = tuple(str(pattern) for pattern in quantization.get("ignore") or ())
            targets = {str(target): _read_group(group) for group in groups for target in group["targets"]}
        except (KeyError, TypeError, AttributeError) as error:
            raise LlmqError(f"quantization_config has no usable config_groups: {error!r}", DAMAGED_CONFIG) from None
        if not targets:
            raise LlmqError("quantization_config names no layers", DAMAGED_CONFIG)
        for pattern in (*targets, *ignore):
            if pattern.startswith("re:"):
                check_regex(pattern.removeprefix("re:"))
        # The library's own order: names, regular expressions, classes, each from a to z.
        ordered = sorted(targets.items(), key=lambda item: (item[0] == CLASS, item[0].startswith("re:"), item[0]))
        return cls(tuple(ordered), ignore)

    def scheme_of(self, name: str) -> Scheme | None:
        """What the config says of layer ``name``; None: it is not quantized."""
        if any(_matches(pattern, name) for pattern in self.ignore):
            return None
        return next((scheme for target, scheme in self.targets if _matches(target, name)), None)

    def layout(self, shape: tuple[int, int], scheme: Scheme) -> Layout:
        """The tensors of a layer of ``shape`` (out_features, in_features)."""
        out_features, in_features = shape
        groups = scheme.num_groups(in_features)
        tensors = {
            "weight_packed": Stored((out_features, _words(in_features, scheme))),
            "weight_scale": Stored((out_features, groups), SCALE_TYPES),
            "weight_shape": Stored((2,), ("I64", "I32")),
        }
        if not scheme.symmetric:
            tensors["weight_zero_point"] = Stored((_words(out_features, scheme), groups))
        return tensors

    def pack(self, name: str, weight: QuantizedWeight) -> Iterator[tuple[str, Tensor]]:
        """The tensors of layer ``name``, as (tensor name, tensor). LlmqError when they cannot hold it exactly."""
        import torch

        natural_groups(name, weight.group_index)
        bits = weight.scheme.bits
        yield f"{name}.weight_packed", pack_words(weight.codes.t(), bits).t().contiguous()
        yield f"{name}.weight_scale", weight.scales.contiguous()
        yield f"{name}.weight_shape", torch.tensor(weight.shape)
        if not weight.scheme.symmetric:
            yield f"{name}.weight_zero_point", pack_words(weight.zero_points, bits)
        elif not (weight.zero_points == weight.scheme.middle_code).all():
            raise LlmqError(f"{name}: said to be symmetric, but has zero points other than the middle code", DAMAGED)

    def unpack(self, name: str, tensors: Tensors, device: str = "cpu") -> QuantizedWeight:
        """Read layer ``name``. Raises LlmqError when its tensors contradict the config."""
        import torch

        scheme = self.scheme_of(name)
        if scheme is None:
            raise LlmqError(f"{name} is packed, and quantization_config says nothing of it", DAMAGED)
        stored_shape(f"{name}.weight_packed", tensors)
        out_features, in_features = (int(size) for size in tensors.load(f"{name}.weight_shape"))
        if not scheme.divides(in_features):
            raise LlmqError(f"{name} has {in_features} inputs, which {scheme} does not divide", DAMAGED)
        check_layout(name, tensors, self.layout((out_features, in_features), scheme), scheme)
        packed = tensors.load(f"{name}.weight_packed", device)
        codes = unpack_words(packed.t(), scheme.bits, in_features).t().contiguous()
        scales = tensors.load(f"{name}.weight_scale", device)
        if scheme.symmetric:
            zeros = torch.full(scales.shape, scheme.middle_code, dtype=torch.uint8, device=scales.device)
        else:
            zeros = unpack_words(tensors.load(f"{name}.weight_zero_point", device), scheme.bits, out_features)
        index = read_group_index(f"{name}.weight_g_idx", tensors, in_features, scheme, device)
        return QuantizedWeight(scheme, codes, scales, zeros, index)

    def config_dict(
        self, *, quantized: Sequence[str], ignored: Sequence[str], writer: str, damp_percent: float | None = None
    ) -> dict[str, Any]:
        """``quantization_config`` for config.json."""
        scheme = self.scheme
        assert scheme is not None, "llmq writes one scheme for all layers"
        channel = scheme.group_size == WHOLE_ROW
        return {
            "quant_method": self.name,
            "format": PACKED,
            "quantization_status": "compressed",
            "config_groups": {
                "group_0": {
                    "targets": [CLASS],
                    "weights": {
                        "num_bits": scheme.bits,
                        "type": "int",
                        "symmetric": scheme.symmetric,
                        "strategy": "channel" if channel else "group",
                        "group_size": None if channel else scheme.group_size,
                        "dynamic": False,
                        "actorder": None,
                    },
                    "input_activations": None,
                    "output_activations": None,
                }
            },
            "ignore": ["lm_head", *ignored],
            "kv_cache_scheme": None,
            "meta": {"quantizer": [writer]},
        }


def _words(values: int, scheme: Scheme) -> int:
    return -(-values * scheme.bits // WORD_BITS)


def _check_format(name: Any) -> None:
    if name not in (None, PACKED):
        raise LlmqError(f"compressed-tensors folders in the format {name!r} are not supported", ORIGINAL)


def _read_group(group: Mapping[str, Any]) -> Scheme:
    """One of ``config_groups``. LlmqError unless it is of weight-only integers by group or row."""
    _check_format(group.get("format"))
    for activations in ("input_activations", "output_activations"):
        if group.get(activations):
            raise LlmqError(
                f"compressed-tensors folders with quantized activations ({activations}) are not supported", ORIGINAL
            )
    weights = group["weights"]
    strategy, kind = weights.get("strategy"), weights.get("type", "int")
    if kind != "int":
        raise LlmqError(f"compressed-tensors folders of {kind!r} weights are not supported", ORIGINAL)
    if strategy is None:  # as the library infers it
        strategy = "group" if weights.get("group_size") else "tensor"
    if strategy not in ("group", "channel"):
        raise LlmqError(f"compressed-tensors weights with a scale for each {strategy!r} are not supported", ORIGINAL)
    bits = weights["num_bits"]
    if bits not in (4, 8):
        # Between versions 0.17 and 0.18 of the library the layout of 3, 5, 6 and 7 bits changed, and nothing in the
        # folder says which it is: an old one would be read as noise.
        raise LlmqError(f"compressed-tensors weights of {bits} bits are not supported", ORIGINAL)
    group_size = WHOLE_ROW if strategy == "channel" else weights.get("group_size")
    return stored_scheme(bits, group_size, weights.get("symmetric", True))


def _matches(pattern: str, name: str) -> bool:
    """Does a target or an ignored pattern cover the linear layer ``name``?"""
    if pattern.startswith("re:"):
        return re.match(pattern.removeprefix("re:"), name) is not None
    return pattern in (name, CLASS)
