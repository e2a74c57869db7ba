"""A decoder of random weights: speed without a checkpoint. Only shapes, dtypes and schemes are those of config.json."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from llmq.checkpoint.config import ModelConfig
from llmq.checkpoint.formats import open_format
from llmq.checkpoint.quantized_weight import QuantizedWeight, numbers
from llmq.runtime.decoder import Decoder, DecoderLayer
from llmq.runtime.linear import quantized_linear
from llmq.runtime.loader import block_name
from llmq.scheme import INT, Scheme

DEVIATION = 0.02
"""Standard deviation of every weight; norms, which are 1, keep the activations finite at any depth."""


def dummy_decoder(config: ModelConfig, device: str, dtype: torch.dtype) -> Decoder:
    """A model of ``config`` with weights drawn on ``device``, the same for the same config and device; linear layers
    that config.json says are quantized are so. LlmqError on a quantization that llmq does not read."""
    format = open_format(config)
    noise = torch.Generator(device).manual_seed(0)
    with torch.device("meta"):
        model = Decoder(config)
    for number, block in enumerate(model.layers):
        for local_name, module in list(block.named_modules()):
            scheme = None if format is None else format.scheme_of(f"{block_name(number)}.{local_name}")
            if isinstance(module, nn.Linear) and scheme is not None:
                weight = dummy_weight(scheme, (module.out_features, module.in_features), dtype, noise)
                bias = None if module.bias is None else torch.zeros(module.out_features, dtype=dtype, device=device)
                block.set_submodule(local_name, quantized_linear(weight, bias, dtype))
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if parameter.is_meta:
                setattr(module, name, nn.Parameter(_dense(parameter, dtype, noise), requires_grad=False))
    for block in model.layers:
        assert isinstance(block, DecoderLayer)
        block.merge()
    if config.tied_embeddings:
        model.lm_head.weight = model.embed_tokens.weight
    return model.eval().requires_grad_(False)


def dummy_weight(scheme: Scheme, shape: tuple[int, int], dtype: torch.dtype, noise: torch.Generator) -> QuantizedWeight:
    """A weight of ``shape`` (out_features, in_features) whose codes are uniform and whose deviation is DEVIATION."""
    device = noise.device
    groups = (shape[0], scheme.num_groups(shape[1]))
    codes = torch.randint(0, scheme.max_code + 1, shape, dtype=torch.uint8, device=device, generator=noise)
    if scheme.number == INT:
        deviation = (scheme.max_code + 1) / math.sqrt(12)
    else:
        of_code = numbers(scheme.number, device)
        # The codes of e4m3 that are no numbers.
        codes.masked_fill_(of_code.isnan()[codes.int()], 0)
        deviation = of_code.nan_to_num(0.0).std().item()
    return QuantizedWeight(
        scheme,
        codes,
        torch.full(groups, DEVIATION / deviation, dtype=dtype, device=device),
        torch.full(groups, scheme.middle_code, dtype=torch.uint8, device=device),
    )


def _dense(parameter: Tensor, dtype: torch.dtype, noise: torch.Generator) -> Tensor:
    """A matrix is drawn. A vector is a norm's weight, 1, or a bias, which does no harm at 1."""
    made = torch.ones(parameter.shape, dtype=dtype, device=noise.device)
    return made if made.dim() == 1 else made.normal_(0.0, DEVIATION, generator=noise)
