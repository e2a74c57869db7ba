"""What is in a model folder, by its configs and headers alone: schemes, sizes, who wrote it, and what does not fit."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from llmq.checkpoint import folder as folders
from llmq.checkpoint.config import EMBEDDING, FINAL_NORM, HEAD, ModelConfig, read_config, read_json
from llmq.checkpoint.formats import Format, is_packed, open_format, packed_layers
from llmq.checkpoint.formats.compressed_tensors import CompressedTensors
from llmq.checkpoint.formats.packed import contradictions
from llmq.checkpoint.tensors import Tensors


@dataclass(frozen=True, slots=True)
class LayerInfo:
    """One linear layer of a decoder block, or a quantized ``lm_head``. ``scheme`` is its scheme, or else the type of
    its weight, or ``missing``; ``num_bytes`` counts all its tensors."""

    name: str
    out_features: int
    in_features: int
    scheme: str
    quantized: bool
    num_bytes: int


@dataclass(frozen=True, slots=True)
class Inspection:
    """A folder. ``effective_bits`` is what a quantized weight takes with its share of scales, zero points and index."""

    folder: str
    architecture: str
    dtype: str
    format: str | None
    written_by: str | None
    layers: tuple[LayerInfo, ...]
    num_bytes: int
    linear_bytes: int
    effective_bits: float | None
    problems: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def inspect(model: str, revision: str | None = None) -> Inspection:
    """Describe ``model`` (a folder, a hub id, or ``demo``). LlmqError when the folder, a header or a config cannot be
    read, or its format is none that llmq reads."""
    folder = folders.resolve(model, revision)
    config, tensors = read_config(folder), Tensors(folder)
    format = open_format(config)
    layers, problems = [], [*_config_problems(folder, config, format), *_model_problems(config, format, tensors)]
    shapes = config.all_linears
    if is_packed(format, HEAD, tensors) and not config.tied_embeddings:
        shapes[HEAD] = (config.vocab_size, config.hidden_size)
    sizes = _sizes(shapes, tensors)
    for name, shape in shapes.items():
        layers.append(_layer(name, shape, sizes[name], format, tensors))
        problems += _layer_problems(name, shape, format, tensors)
    strays = set() if format is None else packed_layers(format, tensors) - set(shapes)
    problems += [f"{name} is packed, and config.json has no such linear layer" for name in sorted(strays)]
    quantized = [layer for layer in layers if layer.quantized]
    weights = sum(layer.out_features * layer.in_features for layer in quantized)
    biases = sum(info.num_bytes for x in quantized if (info := tensors.infos.get(f"{x.name}.bias")) is not None)
    return Inspection(
        folder=model,
        architecture=config.model_type,
        dtype=config.dtype,
        format=None if format is None else format.name,
        written_by=_writer(config),
        layers=tuple(layers),
        num_bytes=tensors.num_bytes,
        linear_bytes=sum(layer.num_bytes for layer in layers),
        effective_bits=8 * (sum(layer.num_bytes for layer in quantized) - biases) / weights if quantized else None,
        problems=tuple(problems),
    )


def _sizes(layers: Collection[str], tensors: Tensors) -> Counter[str]:
    """Bytes of all tensors of each layer. Experts make tens of thousands of both: the tensors are walked once."""
    sizes: Counter[str] = Counter()
    for tensor, info in tensors.infos.items():
        name = tensor.rpartition(".")[0]
        while name and name not in layers:
            name = name.rpartition(".")[0]
        sizes[name] += info.num_bytes
    return sizes


def _layer(name: str, shape: tuple[int, int], num_bytes: int, format: Format | None, tensors: Tensors) -> LayerInfo:
    quantized = is_packed(format, name, tensors)
    if format is not None and quantized:
        scheme = str(format.scheme_of(name) or format.scheme or "unknown")
    else:
        weight = tensors.infos.get(f"{name}.weight")
        scheme = "missing" if weight is None else weight.dtype
    return LayerInfo(name, *shape, scheme, quantized, num_bytes)


def _layer_problems(name: str, shape: tuple[int, int], format: Format | None, tensors: Tensors) -> Iterator[str]:
    weight = tensors.infos.get(f"{name}.weight")
    scheme = None if format is None else format.scheme_of(name)
    if format is not None and is_packed(format, name, tensors):
        if scheme is None:
            yield f"{name} is packed, and quantization_config says that it is not"
        elif not scheme.divides(shape[1]):
            yield f"{name} has {shape[1]} inputs, which {scheme} does not divide"
        else:
            layout = format.layout(shape, scheme)
            if weight is not None and "weight" not in layout:
                yield f"{name} is there twice: packed, and as {weight.dtype}"
            yield from contradictions(name, tensors.infos, layout, scheme)
        return
    if weight is None:
        yield f"{name}.weight is missing"
        return
    if weight.shape != shape:
        yield f"{name}.weight is {list(weight.shape)}, and config.json makes it {list(shape)}"
    if scheme is not None:
        yield f"{name} is not packed, and quantization_config says that it is"


def _model_problems(config: ModelConfig, format: Format | None, tensors: Tensors) -> Iterator[str]:
    shape = (config.vocab_size, config.hidden_size)
    head = not config.tied_embeddings and not is_packed(format, HEAD, tensors)
    for name in (EMBEDDING, HEAD) if head else (EMBEDDING,):
        info = tensors.infos.get(f"{name}.weight")
        if info is None:
            yield f"{name}.weight is missing"
        elif info.shape != shape:
            yield f"{name}.weight is {list(info.shape)}, and config.json makes it {list(shape)}"
    if f"{FINAL_NORM}.weight" not in tensors:
        yield f"{FINAL_NORM}.weight is missing"


def _config_problems(folder: Path, config: ModelConfig, format: Format | None) -> Iterator[str]:
    """Files beside config.json that say otherwise than it does."""
    for name in () if format is None else format.config_files:
        if not (folder / name).exists() or config.quantization is None:
            continue
        other = read_json(folder / name)
        for key in ("bits", "group_size", "sym", "desc_act", "checkpoint_format"):
            here, there = config.quantization.get(key), other.get(key)
            if here is not None and there is not None and here != there:
                yield f"{key} is {here!r} in config.json and {there!r} in {name}"


def _writer(config: ModelConfig) -> str | None:
    """The program that wrote the folder, as GPTQModel, llmq and compressed-tensors say it; None where nobody does."""
    fields = config.quantization or {}
    meta, version = fields.get("meta"), fields.get("version")
    quantizer = meta.get("quantizer") if isinstance(meta, dict) else None
    if quantizer is None and fields.get("quant_method") == CompressedTensors.name and version is not None:
        return f"{CompressedTensors.name}:{version}"
    if isinstance(quantizer, list):
        return ", ".join(map(str, quantizer)) or None
    return None if quantizer is None else str(quantizer)
