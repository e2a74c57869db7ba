"""Folders of any format and mix of schemes, written through the formats alone: what is in them is plainly rounded."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch

from llmq.checkpoint.config import read_config
from llmq.checkpoint.folder import copy_side_files
from llmq.checkpoint.formats import format_for, write_configs
from llmq.checkpoint.quantized_weight import QuantizedWeight, numbers
from llmq.checkpoint.tensors import ShardWriter, Tensors
from llmq.scheme import INT, WHOLE_TENSOR, Scheme


def linear_names(folder: Path) -> list[str]:
    """The linear layers of all decoder blocks."""
    config = read_config(folder)
    return [f"model.layers.{layer}.{linear}" for layer in range(config.num_layers) for linear in config.linears]


def rounded(weight: torch.Tensor, scheme: Scheme) -> QuantizedWeight:
    """``weight`` [out, in] to the nearest numbers of ``scheme``, its scales in fp16."""
    groups = weight.float().view(len(weight), scheme.num_groups(weight.shape[1]), -1)
    low, high = groups.amin(-1), groups.amax(-1)
    if scheme.group_size == WHOLE_TENSOR:
        low, high = low.min().expand_as(low), high.max().expand_as(high)
    magnitude = torch.maximum(-low, high)
    if scheme.number != INT:
        table = numbers(scheme.number).nan_to_num(torch.inf)
        scales = (magnitude / table[table.isfinite()].max()).half()
        codes = (groups.unsqueeze(-1) / scales[..., None, None] - table).abs().argmin(-1)
        zeros = torch.zeros_like(scales)
    else:
        span = 2 * magnitude if scheme.symmetric else high - low
        scales = (span / scheme.max_code).half()
        zeros = torch.full_like(scales, scheme.middle_code) if scheme.symmetric else (-low / scales).round()
        zeros = zeros.clamp(0, scheme.max_code)
        codes = ((groups / scales.unsqueeze(-1)).round() + zeros.unsqueeze(-1)).clamp(0, scheme.max_code)
    codes = codes.to(torch.uint8).view(weight.shape)
    return QuantizedWeight(scheme, codes, scales.contiguous(), zeros.to(torch.uint8).contiguous())


def write_packed(source: Path, folder: Path, form: str, schemes: Mapping[str, Scheme]) -> Path:
    """The model of ``source`` with layers by full name → scheme in the format ``form``. Returns ``folder``."""
    folder.mkdir()
    tensors, writer, format = Tensors(source), ShardWriter(folder), format_for(form, schemes)
    for name in tensors.infos:
        layer, weight = name.removesuffix(".weight"), tensors.load(name)
        if layer in schemes:
            writer.add_all(format.pack(layer, rounded(weight, schemes[layer])))
        else:
            writer.add(name, weight)
    writer.close()
    ignored = [name for name in linear_names(source) if name not in schemes]
    fields = format.config_dict(quantized=list(schemes), ignored=ignored, writer="llmq:0")
    write_configs(source, folder, format, fields)
    copy_side_files(source, folder)
    return folder
