"""What a model's weights take: as the headers of its files say, or counted from its config where there are none."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmq import memory
from llmq.checkpoint.config import DTYPE_BYTES, HEAD, ModelConfig
from llmq.checkpoint.formats import FORMATS, Format, open_format
from llmq.checkpoint.tensors import TensorInfo, Tensors
from llmq.errors import LlmqError
from llmq.memplan.architecture import Architecture, Weight
from llmq.scheme import Scheme

HEAD_WEIGHT = f"{HEAD}.weight"
NOT_LOADED = (".rotary_emb.inv_freq", ".k_scale", ".v_scale")
"""Tensors that are no weights: angles, which old folders store and the engine computes, and scales of the KV cache."""
FLOATS = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}
CODES = ("qweight", "weight_packed", "_blocks")
BESIDE_CODES = ("scales", "qzeros", "g_idx", "weight_", "input_scale", "k_scale", "v_scale", "SCB")
"""How the last part of a tensor's name ends, or begins, that is of a quantized weight. Codes may also have the plain
name of the weight, and a type of 8 bits; bitsandbytes names all else ``weight.…``."""


@dataclass(frozen=True, slots=True)
class Weights:
    """All sizes are bytes.

    parameters   of the model, whatever its scheme
    quantized    codes of quantized weights; scales: with them scales, zero points and group indices
    unquantized  all else, in its own type
    resident     on each GPU, or where the model runs, packed as its engine packs them
    scheme       None: not quantized, or in a way of which only the size is known
    stored       counted from files, not from the config
    """

    parameters: int
    quantized: int
    scales: int
    unquantized: int
    resident: int
    scheme: Scheme | None
    stored: bool

    @property
    def on_disk(self) -> int:
        return self.quantized + self.scales + self.unquantized


def planned_weights(
    architecture: Architecture,
    scheme: Scheme | None,
    config: ModelConfig | None = None,
    *,
    packed: bool = True,
    num_gpus: int = 1,
) -> Weights:
    """The weights as ``llmq quantize`` would write them in ``scheme``.

    ``packed``: resident as llmq's kernels lay them out, else as they are stored. ``config``: of a model that the engine
    runs.
    """
    dtype_bytes = DTYPE_BYTES[architecture.dtype]
    quantized = scales = unquantized = resident = 0
    for weight in architecture.weights:
        own = _scheme_of(weight, scheme)
        stored = memory.linear_bytes(weight.out_features, weight.in_features, own, dtype_bytes)
        kept = stored
        if own is None:
            unquantized += weight.copies * stored
        else:
            codes = weight.size * own.bits // 8
            quantized, scales = quantized + weight.copies * codes, scales + weight.copies * (stored - codes)
            if packed:
                kept = memory.resident_linear_bytes(weight.out_features, weight.in_features, own, dtype_bytes)
        resident += _share(weight, weight.copies * kept, num_gpus)
    if packed and config is not None:
        resident += memory.offset_norm_bytes(config, dtype_bytes)
    return Weights(architecture.parameters, quantized, scales, unquantized, resident, scheme, stored=False)


def stored_weights(
    tensors: Mapping[str, TensorInfo],
    architecture: Architecture,
    config: ModelConfig | None,
    *,
    packed: bool = True,
    num_gpus: int = 1,
) -> Weights:
    """The weights as the headers of files have them. ``config``: of a model that the engine runs."""
    parts = {"quantized": 0, "scales": 0, "unquantized": 0}
    parameters = 0
    for name, info in tensors.items():
        part = _part(name, info)
        parts[part] += info.num_bytes
        parameters += info.num_bytes // FLOATS.get(info.dtype, 1) if part == "unquantized" else 0
    tied = HEAD_WEIGHT in tensors and not any(weight.name == "head" for weight in architecture.weights)
    twice = tensors[HEAD_WEIGHT].num_bytes if tied else 0  # stored beside the embedding that it is, but loaded once
    resident = sum(parts.values()) - twice
    if packed and config is not None:
        resident = loaded_bytes(tensors, config, config.dtype_bytes, widened=False)
    if num_gpus > 1:
        whole = planned_weights(architecture, None)
        resident = -(-resident * planned_weights(architecture, None, num_gpus=num_gpus).resident // whole.resident)
    if parts["quantized"]:
        parameters = architecture.parameters
    elif tied:
        parameters -= twice // FLOATS.get(tensors[HEAD_WEIGHT].dtype, 1)
    try:
        scheme = stored_scheme(architecture.quantization)
    except LlmqError:  # llmq may not run the folder, but can plan by its size
        scheme = None
    return Weights(parameters, parts["quantized"], parts["scales"], parts["unquantized"], resident, scheme, stored=True)


def planned_widened_bytes(architecture: Architecture, scheme: Scheme | None, dtype_bytes: int) -> int:
    """The weights, all linear layers in ``scheme``, on a CPU: see ``loaded_bytes``."""
    return sum(
        weight.copies
        * memory.resident_linear_bytes(
            weight.out_features, weight.in_features, _kept_on_cpu(_scheme_of(weight, scheme)), dtype_bytes
        )
        for weight in architecture.weights
    )


def loaded_bytes(tensors: Mapping[str, TensorInfo], config: ModelConfig, dtype_bytes: int, *, widened: bool) -> int:
    """What the engine makes of a folder's tensors: linear layers packed for its kernels, and all else of
    ``dtype_bytes`` a number. ``widened``: on a CPU, which widens all but those that are multiplied as they are."""
    format = open_format(config)
    total, packed = 0, set[str]()
    for name, shape in (config.all_linears | {HEAD: (config.vocab_size, config.hidden_size)}).items():
        if format is not None and any(f"{name}.{marker}" in tensors for marker in format.markers):
            packed.add(name)
            scheme = _kept_on_cpu(format.scheme_of(name)) if widened else format.scheme_of(name)
            total += memory.resident_linear_bytes(*shape, scheme, dtype_bytes)
    for name, info in tensors.items():
        if name.endswith(NOT_LOADED) or (name == HEAD_WEIGHT and config.tied_embeddings):
            continue
        layer = name.partition(".weight.")[0] if ".weight." in name else name.rpartition(".")[0]
        if name.endswith(".bias") or layer not in packed:
            total += info.num_bytes // FLOATS.get(info.dtype, 1) * dtype_bytes
    return total + memory.offset_norm_bytes(config, dtype_bytes)


def read_headers(folder: Path) -> Mapping[str, TensorInfo] | None:
    """The tensors of the folder's files; None where it has none. LlmqError when a file is missing or cut short."""
    return Tensors(folder).infos if any(folder.glob("*.safetensors")) else None


def _scheme_of(weight: Weight, scheme: Scheme | None) -> Scheme | None:
    """A linear layer whose groups do not divide its channels stays as it is."""
    return scheme if weight.linear and scheme is not None and scheme.divides(weight.in_features) else None


def _kept_on_cpu(scheme: Scheme | None) -> Scheme | None:
    return scheme if scheme is not None and scheme.activation_bits == 8 else None


def _share(weight: Weight, num_bytes: int, num_gpus: int) -> int:
    """Of one GPU."""
    if not weight.sharded:
        return num_bytes
    if weight.kv_heads is None:
        return -(-num_bytes // num_gpus)
    return num_bytes * -(-weight.kv_heads // num_gpus) // weight.kv_heads


def stored_scheme(quantization: Mapping[str, Any] | None) -> Scheme | None:
    """Of a folder with this ``quantization_config``; None: not quantized. LlmqError where it is not one scheme that
    llmq knows."""
    if quantization is None:
        return None
    reason = "not every layer has the same scheme"
    try:
        format = _format(quantization)
    except LlmqError as error:
        reason, format = str(error), None
    if format is None or format.scheme is None:
        raise LlmqError(
            f"the model has no weights here, and llmq cannot compute their size: {reason}",
            "point at the folder with its *.safetensors files, or plan a scheme of llmq's: --scheme w4a16",
        )
    return format.scheme


def _format(quantization: Mapping[str, Any]) -> Format:
    method = str(quantization.get("quant_method"))
    if method not in FORMATS:
        raise LlmqError(f"it does not run the format {method!r}")
    return FORMATS[method].read(quantization)


def _part(name: str, info: TensorInfo) -> str:
    last = name.rpartition(".")[2]
    if last.endswith(CODES) or (last == "weight" and info.dtype not in FLOATS):
        return "quantized"
    beside = last.startswith(BESIDE_CODES) or last.endswith("_scales") or ".weight." in name
    return "scales" if beside else "unquantized"
