"""bitsandbytes: weights rounded by the library's own functions, so that they are what it makes of the model itself.

4 bits: blocks of 64 scaled by their largest magnitude, to the nearest of nf4's or fp4's 16 numbers (Dettmers et al.,
"QLoRA", 2023). 8 bits: rows scaled by theirs (Dettmers et al., "LLM.int8()", 2022). Needs no data.
"""

from __future__ import annotations

import torch
from torch import Tensor

from llmq.checkpoint.formats.bitsandbytes import BLOCK, INT8, INT8_MAX, split_bytes
from llmq.checkpoint.quantized_weight import QuantizedWeight
from llmq.errors import LlmqError
from llmq.scheme import Scheme


def check_installed() -> None:
    """Raise LlmqError unless bitsandbytes can be imported."""
    try:
        import bitsandbytes  # noqa: F401
    except ImportError as error:
        raise LlmqError(f"bitsandbytes is not installed ({error})", "pip install 'llmq[bitsandbytes]'") from None


def quantize_weight(weight: Tensor, scheme: Scheme, hessian: Tensor | None = None) -> QuantizedWeight:
    """Quantize ``weight`` fp32 [out, in] to a ``scheme`` that the bitsandbytes format holds. ``hessian`` is not looked
    at. Raises LlmqError when bitsandbytes is not installed."""
    check_installed()
    from bitsandbytes import functional

    if scheme == INT8:
        rounded, magnitudes, _ = functional.int8_vectorwise_quant(weight.half())
        codes, scales = rounded.view(torch.uint8) ^ scheme.middle_code, magnitudes.unsqueeze(1) / INT8_MAX
    else:
        packed, state = functional.quantize_4bit(weight, blocksize=BLOCK, quant_type=scheme.number)
        codes, scales = split_bytes(packed, (weight.shape[0], weight.shape[1])), state.absmax.view(len(weight), -1)
    return QuantizedWeight(scheme, codes, scales, torch.full_like(scales, scheme.middle_code).to(torch.uint8))
