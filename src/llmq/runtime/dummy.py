"""A decoder of random weights: speed without a checkpoint. Only shapes, dtypes and schemes are those of config.json."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from llmq.checkpoint.config import ModelConfig, block_name
from llmq.checkpoint.formats import open_format
from llmq.checkpoint.quantized_weight import QuantizedWeight, numbers
from llmq.runtime.decoder import Decoder, DecoderLayer, RMSNorm
from llmq.runtime.kernels.quantize_rows import LARGEST
from llmq.runtime.linear import quantized_linear
from llmq.scheme import E4M3, INT, Scheme

DEVIATION = 0.02
"""Standard deviation of every weight; norms, which are 1, keep the activations finite at any depth."""
TAILS = 8
"""Standard deviations from the least code to the greatest: what lies outside is clipped."""


def dummy_decoder(config: ModelConfig, device: str, dtype: torch.dtype) -> Decoder:
    """A model of ``config`` with weights drawn on ``device``, the same for the same config and device; linear layers
    that config.json says are quantized are so. LlmqError on a quantization that llmq does not read."""
    format = open_format(config)
    noise = torch.Generator(device).manual_seed(0)
    with torch.device("meta"):
        model = Decoder(config)
    for number, block in enumerate(model.layers):
        for name in config.linears:
            scheme = None if format is None else format.scheme_of(f"{block_name(number)}.{name}")
            module = block.get_submodule(name)
            if isinstance(module, nn.Linear) and scheme is not None:
                weight = dummy_weight(scheme, (module.out_features, module.in_features), dtype, noise)
                bias = None if module.bias is None else torch.zeros(module.out_features, dtype=dtype, device=device)
                block.set_submodule(name, quantized_linear(weight, bias, dtype))
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if parameter.is_meta:
                wide = isinstance(module, RMSNorm) and module.offset  # a sum that loading makes in fp32
                made = _dense(parameter, torch.float32 if wide else dtype, noise)
                setattr(module, name, nn.Parameter(made, requires_grad=False))
    for block in model.layers:
        assert isinstance(block, DecoderLayer)
        block.merge()
    if config.tied_embeddings:
        model.lm_head.weight = model.embed_tokens.weight
    return model.eval().requires_grad_(False)


def dummy_weight(scheme: Scheme, shape: tuple[int, int], dtype: torch.dtype, noise: torch.Generator) -> QuantizedWeight:
    """A weight of ``shape`` (out_features, in_features), normally distributed as trained ones are, whose deviation is
    DEVIATION. A product of evenly distributed codes would heat a GPU more, and be slower."""
    device = noise.device
    groups = (shape[0], scheme.num_groups(shape[1]))
    normal = torch.randn(shape, device=device, generator=noise)
    if scheme.number == INT:
        codes = normal.mul_((scheme.max_code + 1) / TAILS).round_().add_(scheme.middle_code).clamp_(0, scheme.max_code)
        deviation = codes.std().item()
        codes = codes.to(torch.uint8)
    elif scheme.number == E4M3:
        of_code = normal.mul_(2 * LARGEST[E4M3] / TAILS).clamp_(-LARGEST[E4M3], LARGEST[E4M3])
        deviation = of_code.std().item()
        codes = of_code.to(torch.float8_e4m3fn).view(torch.uint8)
    else:  # whose codes are as likely, each as the other
        codes = torch.randint(0, scheme.max_code + 1, shape, dtype=torch.uint8, device=device, generator=noise)
        deviation = numbers(scheme.number, device).std().item()
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
