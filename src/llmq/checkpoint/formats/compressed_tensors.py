"""The compressed-tensors formats, as llm-compressor writes them and transformers, vLLM and SGLang read them.

For a linear layer P with N outputs, K inputs and G groups. Integers with 16-bit activations are ``pack-quantized``; in
place of ``P.weight``:

    P.weight_packed      int32 [N, ⌈K·bits/32⌉]   codes, packed along K
    P.weight_scale       floating [N, G]          of any 16-bit type, or fp32; [1] for one scale a tensor
    P.weight_shape       int64 [2]                N, K
    P.weight_zero_point  int32 [⌈N·bits/32⌉, G]   asymmetric only: zero points, packed along N; int8 [1] for one
    P.weight_g_idx       int32 [K]                group of each channel, where activation order scatters them; read only

Both other kinds hold weights of 8 bits, symmetric and by row or tensor, one an element: ``int-quantized`` with
activations of 8-bit integers, ``float-quantized`` with activations in e4m3 (``naive-quantized`` with those of 16 bits):

    P.weight             int8 or e4m3 [N, K]
    P.weight_scale       as above

``P.bias`` is as in the original, if it has one. The library thinks of codes and zero points as signed and packs them
plus 2^(bits−1): what is packed are our unsigned ones.  https://github.com/vllm-project/compressed-tensors
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from llmq.checkpoint.config import HEAD
from llmq.checkpoint.formats.packed import (
    DAMAGED,
    DAMAGED_CONFIG,
    ORIGINAL,
    SCALE_TYPES,
    WORD_BITS,
    Layout,
    Stored,
    check_layout,
    check_symmetric,
    compiled,
    natural_groups,
    num_words,
    pack_words,
    read_group_index,
    stated_names,
    stated_scheme,
    stored_scheme,
    stored_shape,
    unpack_words,
)
from llmq.checkpoint.quantized_weight import QuantizedWeight
from llmq.checkpoint.tensors import Tensors
from llmq.errors import LlmqError
from llmq.scheme import E4M3, INT, WHOLE_ROW, WHOLE_TENSOR, Scheme

if TYPE_CHECKING:
    from torch import Tensor

PACKED, INTEGERS, FLOATS, NAIVE = "pack-quantized", "int-quantized", "float-quantized", "naive-quantized"
MIXED, DENSE = "mixed-precision", "dense"
NUMBERS = {"int": INT, "float": E4M3}
"""``type`` → number. Floats of other widths than 8 bits are refused."""
ELEMENTS = {INT: "I8", E4M3: "F8_E4M3"}
"""The safetensors type of weights that are not packed."""
CLASS = "Linear"
"""How targets and the ignore list name all layers that llmq quantizes."""
KV_CACHE = {"num_bits": 8, "type": "float", "symmetric": True, "strategy": "tensor", "dynamic": False}
"""The one kind of KV-cache scales that is read: e4m3, one for all keys and one for all values of a layer."""


@dataclass(frozen=True, slots=True)
class CompressedTensors:
    """A compressed-tensors folder.

    targets    what layers are (``Linear``, a name, or ``re:`` and a regular expression) and their scheme; the first
               that matches counts
    ignore     the layers that are not quantized, said alike
    kv_scales  whether each attention has ``k_scale`` and ``v_scale`` for an e4m3 KV cache, which stay as they are
    """

    name: ClassVar[str] = "compressed-tensors"
    title: ClassVar[str] = "compressed-tensors"
    markers: ClassVar[tuple[str, ...]] = ("weight_packed", "weight_scale")
    multiple: ClassVar[int] = 1
    packs_head: ClassVar[bool] = True
    config_files: ClassVar[tuple[str, ...]] = ()

    targets: tuple[tuple[str, Scheme], ...]
    ignore: tuple[str, ...] = ()
    kv_scales: bool = False

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
        if self.scheme is None:
            return "transformers does not read compressed-tensors folders of several schemes, one of them asymmetric"
        return (
            "transformers reads asymmetric compressed-tensors folders only by "
            "quantization_config=CompressedTensorsConfig(dequantize=True)"
        )

    @staticmethod
    def why_not(*schemes: Scheme) -> str | None:
        """Why one folder cannot hold layers of all these schemes; None when it can."""
        for scheme in schemes:
            if scheme.number not in ELEMENTS:
                return f"the compressed-tensors format holds integers and e4m3, and not {scheme}"
            if scheme.number == E4M3 and scheme.group_size not in (WHOLE_ROW, WHOLE_TENSOR):
                return f"the compressed-tensors format holds e4m3 by row or tensor, and not {scheme}"
        return None

    @classmethod
    def for_schemes(cls, schemes: Mapping[str, Scheme]) -> CompressedTensors:
        """The format as it is written for layers, by their full names.

        Several schemes name all their layers: vLLM asks for the class of a layer before it asks for the parts that it
        has merged, and would find the class's scheme for all.
        """
        one, *others = dict.fromkeys(schemes.values())
        return cls(tuple(schemes.items()) if others else ((CLASS, one),))

    @classmethod
    def read(cls, quantization: Mapping[str, Any]) -> CompressedTensors:
        """Read ``quantization_config``. LlmqError on what llmq does not read."""
        kind = quantization.get("format")
        try:
            groups = list(quantization["config_groups"].values())
            ignore = stated_names("ignore", quantization.get("ignore"))
            targets = {
                target: _read_group(group, kind)
                for group in groups
                for target in stated_names("targets", group["targets"])
            }
            kv_scales = _read_rest(quantization)
        except (KeyError, TypeError, AttributeError) as error:
            raise LlmqError(f"quantization_config has no usable config_groups: {error!r}", DAMAGED_CONFIG) from None
        if not targets:
            raise LlmqError("quantization_config names no layers", DAMAGED_CONFIG)
        for pattern in (*targets, *ignore):
            if pattern.startswith("re:"):
                compiled(pattern.removeprefix("re:"))  # or it is refused
        # The library's own order: names, regular expressions, classes, each from a to z.
        ordered = sorted(targets.items(), key=lambda item: (item[0] == CLASS, item[0].startswith("re:"), item[0]))
        return cls(tuple(ordered), ignore, kv_scales)

    def scheme_of(self, name: str) -> Scheme | None:
        """What the config says of layer ``name``; None: it is not quantized."""
        if any(_matches(pattern, name) for pattern in self.ignore):
            return None
        return next((scheme for target, scheme in self.targets if _matches(target, name)), None)

    def layout(self, shape: tuple[int, int], scheme: Scheme) -> Layout:
        """The tensors of a layer of ``shape`` (out_features, in_features)."""
        out_features, in_features = shape
        groups, whole = scheme.num_groups(in_features), scheme.group_size == WHOLE_TENSOR
        scale = Stored((1,) if whole else (out_features, groups), SCALE_TYPES)
        if _kind(scheme) != PACKED:
            return {"weight": Stored(shape, (ELEMENTS[scheme.number],)), "weight_scale": scale}
        tensors = {
            "weight_packed": Stored((out_features, num_words(in_features, scheme.bits))),
            "weight_scale": scale,
            "weight_shape": Stored((2,), ("I64", "I32")),
        }
        if not scheme.symmetric:
            packed = Stored((num_words(out_features, scheme.bits), groups))
            tensors["weight_zero_point"] = Stored((1,), ("I8",)) if whole else packed
        return tensors

    def pack(self, name: str, weight: QuantizedWeight) -> Iterator[tuple[str, Tensor]]:
        """The tensors of layer ``name``, as (tensor name, tensor). LlmqError when they cannot hold it exactly."""
        import torch

        natural_groups(name, weight.group_index)
        check_symmetric(name, weight)
        scheme, scales, zeros = weight.scheme, weight.scales, weight.zero_points
        if scheme.group_size == WHOLE_TENSOR:
            if not ((scales == scales[:1]).all() and (zeros == zeros[:1]).all()):
                raise LlmqError(f"{name}: said to have one scale, but has several", DAMAGED)
            scales, zeros = scales[0], _signed(zeros[0], scheme)
        else:
            zeros = pack_words(zeros, scheme.bits)
        yield f"{name}.weight_scale", scales.contiguous()
        if _kind(scheme) == PACKED:
            yield f"{name}.weight_packed", pack_words(weight.codes.t(), scheme.bits).t().contiguous()
            yield f"{name}.weight_shape", torch.tensor(weight.shape)
            if not scheme.symmetric:
                yield f"{name}.weight_zero_point", zeros
        elif scheme.number == E4M3:
            yield f"{name}.weight", weight.codes.view(torch.float8_e4m3fn)
        else:
            yield f"{name}.weight", _signed(weight.codes, scheme)

    def unpack(self, name: str, tensors: Tensors, device: str = "cpu") -> QuantizedWeight:
        """Read layer ``name``. Raises LlmqError when its tensors contradict the config."""
        import torch

        scheme = stated_scheme(name, self.scheme_of(name))
        packed = _kind(scheme) == PACKED
        shape = _packed_shape(name, tensors, scheme) if packed else stored_shape(f"{name}.weight", tensors)
        if not scheme.divides(shape[1]):
            raise LlmqError(f"{name} has {shape[1]} inputs, which {scheme} does not divide", DAMAGED)
        check_layout(name, tensors, self.layout(shape, scheme), scheme)
        if packed:
            words = tensors.load(f"{name}.weight_packed", device)
            codes = unpack_words(words.t(), scheme.bits, shape[1]).t().contiguous()
        else:
            weight = tensors.load(f"{name}.weight", device)
            codes = weight.view(torch.uint8) if scheme.number == E4M3 else _unsigned(weight, scheme)
        grid = shape[0], scheme.num_groups(shape[1])
        scales = tensors.load(f"{name}.weight_scale", device).expand(grid).contiguous()
        if scheme.symmetric:
            zeros = torch.full(grid, scheme.middle_code, dtype=torch.uint8, device=scales.device)
        else:
            zeros = tensors.load(f"{name}.weight_zero_point", device)
            if scheme.group_size == WHOLE_TENSOR:
                zeros = _unsigned(zeros, scheme).expand(grid).contiguous()
            else:
                zeros = unpack_words(zeros, scheme.bits, shape[0])
        index = read_group_index(f"{name}.weight_g_idx", tensors, shape[1], scheme, device)
        return QuantizedWeight(scheme, codes, scales, zeros, index)

    def config_dict(self, *, quantized: Sequence[str], ignored: Sequence[str], writer: str) -> dict[str, Any]:
        """``quantization_config`` for config.json: a group for each scheme, layers named in full."""
        schemes = dict.fromkeys(scheme for _, scheme in self.targets)
        kinds = {_kind(scheme) for scheme in schemes}
        return {
            "quant_method": self.name,
            "format": kinds.pop() if len(kinds) == 1 else MIXED,
            "quantization_status": "compressed",
            "config_groups": {
                f"group_{number}": {
                    "targets": [target for target, its in self.targets if its == scheme],
                    **_group_fields(scheme),
                }
                for number, scheme in enumerate(schemes)
            },
            "ignore": [*([] if HEAD in quantized else [HEAD]), *ignored],
            "kv_cache_scheme": KV_CACHE if self.kv_scales else None,
            "meta": {"quantizer": [writer]},
        }


def _kind(scheme: Scheme) -> str:
    """Which of the formats a layer of ``scheme`` is in."""
    if scheme.number == E4M3:
        return FLOATS if scheme.activation_bits == 8 else NAIVE
    return INTEGERS if scheme.activation_bits == 8 else PACKED


def _signed(codes: Tensor, scheme: Scheme) -> Tensor:
    """Unsigned codes → int8, the middle code at 0."""
    import torch

    return (codes.int() - scheme.middle_code).to(torch.int8)


def _unsigned(values: Tensor, scheme: Scheme) -> Tensor:
    """The inverse of ``_signed``."""
    import torch

    return (values.int() + scheme.middle_code).to(torch.uint8)


def _group_fields(scheme: Scheme) -> dict[str, Any]:
    """What one of ``config_groups`` says of its layers."""
    number = {"num_bits": scheme.bits, "type": "int" if scheme.number == INT else "float"}
    strategy = {WHOLE_ROW: "channel", WHOLE_TENSOR: "tensor"}.get(scheme.group_size, "group")
    weights = {
        **number,
        "symmetric": scheme.symmetric,
        "strategy": strategy,
        "group_size": scheme.group_size if strategy == "group" else None,
        "dynamic": False,
        "actorder": None,
    }
    activations = {**number, "symmetric": True, "strategy": "token", "dynamic": True}
    return {
        "weights": weights,
        "input_activations": activations if scheme.activation_bits == 8 else None,
        "output_activations": None,
        "format": _kind(scheme),
    }


def _read_group(group: Mapping[str, Any], folder_kind: Any) -> Scheme:
    """The scheme of one of ``config_groups``, in a folder of ``folder_kind``. LlmqError when llmq does not read it."""
    weights, inputs = group["weights"], group.get("input_activations")
    if group.get("output_activations"):
        raise LlmqError("compressed-tensors folders with quantized outputs are not supported", ORIGINAL)
    kind, number = group.get("format") or folder_kind, weights.get("type", "int")
    if kind not in (None, MIXED, PACKED, INTEGERS, FLOATS, NAIVE):
        raise LlmqError(f"compressed-tensors folders in the format {kind!r} are not supported", ORIGINAL)
    if number not in NUMBERS or (number == "float" and weights["num_bits"] != 8):
        raise LlmqError(
            f"compressed-tensors weights of {weights['num_bits']} bits of {number!r} are not supported", ORIGINAL
        )
    token = {"num_bits": 8, "type": number, "symmetric": True, "strategy": "token", "dynamic": True}
    if inputs and not token.items() <= ({"type": "int", "symmetric": True} | inputs).items():
        raise LlmqError(
            "compressed-tensors folders are supported with 16-bit activations, or 8 bits of the weights' type, "
            "symmetric, with a dynamic scale for each token",
            ORIGINAL,
        )
    strategy = weights.get("strategy") or ("group" if weights.get("group_size") else "tensor")  # as the library does
    group_size = {"group": weights.get("group_size"), "channel": WHOLE_ROW, "tensor": WHOLE_TENSOR}.get(strategy)
    if strategy not in ("group", "channel", "tensor"):
        raise LlmqError(f"compressed-tensors weights with a scale for each {strategy!r} are not supported", ORIGINAL)
    scheme = stored_scheme(
        weights["num_bits"], group_size, weights.get("symmetric", True), NUMBERS[number], 8 if inputs else 16
    )
    if reason := CompressedTensors.why_not(scheme):
        raise LlmqError(f"the folder's weights: {reason}", ORIGINAL)
    if kind not in (None, MIXED, _kind(scheme)) and (kind != NAIVE or _kind(scheme) == PACKED):
        raise LlmqError(f"compressed-tensors folders of {scheme} in the format {kind!r} are not supported", ORIGINAL)
    return scheme


def _read_rest(quantization: Mapping[str, Any]) -> bool:
    """Whether there are scales for a KV cache. LlmqError for what else may stand beside the groups and is not read."""
    sparsity = quantization.get("sparsity_config") or {}
    if quantization.get("transform_config") or sparsity.get("format", DENSE) != DENSE:
        raise LlmqError("compressed-tensors folders of rotated or sparse weights are not supported", ORIGINAL)
    kv_cache = quantization.get("kv_cache_scheme")
    if kv_cache and not KV_CACHE.items() <= ({"symmetric": True, "dynamic": False} | kv_cache).items():
        raise LlmqError("a KV cache quantized otherwise than to e4m3, by one static scale, is not supported", ORIGINAL)
    return bool(kv_cache)


def _packed_shape(name: str, tensors: Tensors, scheme: Scheme) -> tuple[int, int]:
    """(out_features, in_features) of a packed layer.

    Raises LlmqError for the layout that version 0.18 of the library gave up, in which no code stands in two words: its
    shape alone tells it, and read as the later one it would be noise.
    """
    words = stored_shape(f"{name}.weight_packed", tensors)[1]
    sizes = tensors.load(f"{name}.weight_shape").tolist()
    if len(sizes) != 2:
        raise LlmqError(f"{name}.weight_shape has {len(sizes)} numbers in place of two", DAMAGED)
    out_features, in_features = sizes
    if num_words(in_features, scheme.bits) != words == -(-in_features // (WORD_BITS // scheme.bits)):
        raise LlmqError(
            f"{name}: codes of {scheme.bits} bits are packed as compressed-tensors did up to version 0.17",
            "quantize the original model again, by llmq or a later version",
        )
    return out_features, in_features


def _matches(pattern: str, name: str) -> bool:
    """Does a target or an ignored pattern cover the linear layer ``name``?"""
    if pattern.startswith("re:"):
        return compiled(pattern.removeprefix("re:")).match(name) is not None
    return pattern in (name, CLASS)
