"""Model folder → decoder on a device: weights as stored, quantized linears through the format of the folder."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from llmq import memory
from llmq.checkpoint.config import EMBEDDING, FINAL_NORM, HEAD, ModelConfig, block_name, read_config
from llmq.checkpoint.formats import Format, is_packed, open_format
from llmq.checkpoint.tensors import Tensors
from llmq.errors import LlmqError
from llmq.runtime.decoder import Decoder, DecoderLayer, RMSNorm
from llmq.runtime.linear import quantized_linear


@dataclass(frozen=True, slots=True)
class Source:
    """An opened model folder, and where its tensors go."""

    config: ModelConfig
    format: Format | None
    tensors: Tensors
    device: str
    dtype: torch.dtype

    def load(self, name: str) -> Tensor:
        return self.tensors.load(name, self.device).to(self.dtype)


def open_source(folder: Path, device: str, dtype: torch.dtype, context: int | None = None) -> Source:
    """Read config and headers; no weight yet. LlmqError on whatever is wrong with the folder.

    context  tokens of the longest sequence that is to be run; None: as many as the model is made for
    """
    config = read_config(folder)
    config = config if context is None else config.for_context(context)
    return Source(config, open_format(config), Tensors(folder), device, dtype)


def resident_weight_bytes(config: ModelConfig, dtype: torch.dtype) -> int:
    """What the weights of a model will take on a GPU, by config.json alone. LlmqError on an unknown quantization."""
    format = open_format(config)
    total = memory.weight_bytes(config, None, dtype.itemsize) + memory.offset_norm_bytes(config, dtype.itemsize)
    for name, shape in config.all_linears.items():
        scheme = None if format is None else format.scheme_of(name)
        packed, dense = (memory.resident_linear_bytes(*shape, each, dtype.itemsize) for each in (scheme, None))
        total += packed - dense
    return total


def load_decoder(source: Source) -> Decoder:
    """The whole model. Raises LlmqError when a tensor is missing or its shape is not what config.json says."""
    with torch.device("meta"):
        model = Decoder(source.config)
    _fill(model.embed_tokens, EMBEDDING, source)
    for layer in range(source.config.num_layers):
        model.layers[layer] = block = load_layer(source, layer)
        block.merge()
    _fill(model.norm, FINAL_NORM, source)
    if source.config.tied_embeddings:
        model.lm_head.weight = model.embed_tokens.weight
    elif is_packed(source.format, HEAD, source.tensors):
        model.set_submodule(HEAD, _unpacked(model.lm_head, HEAD, source))
    else:
        _fill(model.lm_head, HEAD, source)
    return model.eval().requires_grad_(False)


def load_kv_scales(source: Source) -> Tensor | None:
    """Of keys and of values in e4m3, fp32 [layers, 2], as ``llmq quantize --kv-cache-scheme fp8`` and llm-compressor
    store them; None: the folder has none. LlmqError when a layer has not one for each."""
    layers = [f"{block_name(layer)}.self_attn" for layer in range(source.config.num_layers)]
    names = [f"{layer}.{which}_scale" for layer in layers for which in "kv"]
    if not any(name in source.tensors for name in names):
        return None
    scales = [source.tensors.load(name, source.device).float() for name in names]
    for name, scale in zip(names, scales, strict=True):
        if scale.numel() != 1:
            raise LlmqError(f"{name} is {list(scale.shape)}, not one number", "pass --kv-cache-dtype auto or int8")
    return torch.cat([scale.view(1) for scale in scales]).view(-1, 2)


def load_layer(source: Source, layer: int) -> DecoderLayer:
    """One decoder block, its linears dense or quantized as the folder has them."""
    if source.device != "cpu":  # which maps files
        source.tensors.fetch(block_name(layer), source.device)
    with torch.device("meta"):
        block = DecoderLayer(source.config, layer)
    for local_name, module in list(block.named_modules()):
        name = f"{block_name(layer)}.{local_name}"
        if isinstance(module, nn.Linear) and is_packed(source.format, name, source.tensors):
            block.set_submodule(local_name, _unpacked(module, name, source))
        else:
            _fill(module, name, source)
    return block.eval().requires_grad_(False)


def _unpacked(module: nn.Linear, name: str, source: Source) -> nn.Module:
    """The layer ``name`` that the folder has packed in its format, in place of ``module``."""
    assert source.format is not None
    weight = source.format.unpack(name, source.tensors, source.device)
    if weight.shape != (module.out_features, module.in_features):
        raise LlmqError(
            f"{name} is {list(weight.shape)}, and config.json makes it {[module.out_features, module.in_features]}",
            "the folder's config.json is another model's",
        )
    bias = source.load(f"{name}.bias") if f"{name}.bias" in source.tensors else None
    return quantized_linear(weight, bias, source.dtype)


def _fill(module: nn.Module, name: str, source: Source) -> None:
    """Give ``module`` its own parameters from the folder (children are filled on their own)."""
    for parameter_name, parameter in list(module.named_parameters(recurse=False)):
        tensor = source.load(f"{name}.{parameter_name}")
        if isinstance(module, RMSNorm) and module.offset:
            tensor = tensor.float() + module.offset
        if tensor.shape != parameter.shape:
            raise LlmqError(
                f"{name}.{parameter_name} is {list(tensor.shape)}, and config.json makes it {list(parameter.shape)}",
                "the folder's config.json is another model's",
            )
        setattr(module, parameter_name, nn.Parameter(tensor, requires_grad=False))
