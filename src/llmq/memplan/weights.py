"""What a model's weights take: as the headers of its files say, or counted from its config where there are none."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmq import memory
from llmq.checkpoint.config import DTYPE_BYTES, ModelConfig, read_config
from llmq.checkpoint.formats import FORMATS, Format
from llmq.checkpoint.tensors import TensorInfo, Tensors
from llmq.errors import LlmqError
from llmq.memplan.architecture import Architecture, Weight
from llmq.scheme import Scheme

HEAD = "lm_head.weight"
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
    architecture: Architecture, scheme: Scheme | None, *, packed: bool = True, num_gpus: int = 1
) -> Weights:
    """The weights as ``llmq quantize`` would write them in ``scheme``.

    ``packed``: resident as llmq's kernels lay them out, else as they are stored.
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
    format = _format(architecture.quantization)
    parts = {"quantized": 0, "scales": 0, "unquantized": 0}
    parameters = 0
    for name, info in tensors.items():
        part = _part(name, info)
        parts[part] += info.num_bytes
        parameters += info.num_bytes // FLOATS.get(info.dtype, 1) if part == "unquantized" else 0
    tied = HEAD in tensors and not any(weight.name == "head" for weight in architecture.weights)
    twice = tensors[HEAD].num_bytes if tied else 0  # stored beside the embedding that it is, but loaded once
    resident = sum(parts.values()) - twice
    if packed and config is not None:
        resident = _resident(tensors, config, format) - twice
    if num_gpus > 1:
        whole = planned_weights(architecture, None)
        resident = -(-resident * planned_weights(architecture, None, num_gpus=num_gpus).resident // whole.resident)
    if parts["quantized"]:
        parameters = architecture.parameters
    elif tied:
        parameters -= twice // FLOATS.get(tensors[HEAD].dtype, 1)
    scheme = None if format is None else format.scheme
    return Weights(parameters, parts["quantized"], parts["scales"], parts["unquantized"], resident, scheme, stored=True)


def dense_bytes(architecture: Architecture, scheme: Scheme | None, dtype_bytes: int) -> int:
    """The weights on a CPU, where the engine widens all but those that are multiplied as they are."""
    packed = scheme if scheme is not None and scheme.activation_bits == 8 else None
    return sum(
        weight.copies
        * memory.resident_linear_bytes(weight.out_features, weight.in_features, _scheme_of(weight, packed), dtype_bytes)
        for weight in architecture.weights
    )


def read_headers(folder: Path) -> Mapping[str, TensorInfo] | None:
    """The tensors of the folder's files; None where it has none. LlmqError when a file is missing or cut short."""
    return Tensors(folder).infos if any(folder.glob("*.safetensors")) else None


def runnable_config(folder: Path) -> ModelConfig | None:
    """The config of a model that llmq's own engine runs, else None."""
    try:
        return read_config(folder)
    except LlmqError:
        return None


def _scheme_of(weight: Weight, scheme: Scheme | None) -> Scheme | None:
    """A linear layer whose groups do not divide its channels stays as it is."""
    return scheme if weight.linear and scheme is not None and scheme.divides(weight.in_features) else None


def _share(weight: Weight, num_bytes: int, num_gpus: int) -> int:
    """Of one GPU."""
    if not weight.sharded:
        return num_bytes
    if weight.kv_heads is None:
        return -(-num_bytes // num_gpus)
    return num_bytes * -(-weight.kv_heads // num_gpus) // weight.kv_heads


def stored_scheme(quantization: Mapping[str, Any] | None) -> Scheme | None:
    """Of a folder with this ``quantization_config``; None: not quantized, or in no one scheme that llmq knows."""
    format = _format(quantization)
    return None if format is None else format.scheme


def _format(quantization: Mapping[str, Any] | None) -> Format | None:
    method = None if quantization is None else quantization.get("quant_method")
    if quantization is None or method not in FORMATS:
        return None
    try:
        return FORMATS[method].read(quantization)
    except LlmqError:  # llmq does not run the folder, but can plan by its size
        return None


def _part(name: str, info: TensorInfo) -> str:
    module, _, last = name.rpartition(".")
    if last.endswith(CODES) or (last == "weight" and info.dtype not in FLOATS):
        return "quantized"
    beside = last.startswith(BESIDE_CODES) or last.endswith("_scales") or module.endswith(".weight")
    return "scales" if beside else "unquantized"


def _resident(tensors: Mapping[str, TensorInfo], config: ModelConfig, format: Format | None) -> int:
    """Of the engine, on a GPU: linear layers packed for its kernels, all else in the model's type."""
    packed_linears: dict[str, tuple[int, int]] = {
        f"model.layers.{block}.{linear}": shape
        for block in range(config.num_layers)
        for linear, shape in config.linears.items()
        if format is not None and any(f"model.layers.{block}.{linear}.{marker}" in tensors for marker in format.markers)
    }
    total = 0
    for name, shape in packed_linears.items():
        scheme = None if format is None else format.scheme_of(name)
        total += memory.resident_linear_bytes(*shape, scheme, config.dtype_bytes)
    for name, info in tensors.items():
        module = name.rpartition(".")[0].removesuffix(".weight")
        if module not in packed_linears or name.endswith(".bias"):
            total += info.num_bytes // FLOATS.get(info.dtype, 1) * config.dtype_bytes
    return total
