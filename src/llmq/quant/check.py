"""Does a folder that was just written load, and run? Block by block: it may be larger than memory."""

from __future__ import annotations

from pathlib import Path

import torch

from llmq.checkpoint.config import EMBEDDING, HEAD
from llmq.checkpoint.formats import is_packed
from llmq.errors import LlmqError
from llmq.quant.activations import HiddenStates
from llmq.runtime.loader import Source, load_layer, open_source

TOKENS = 8
ROWS = 8192
"""Tokens of the vocabulary whose logits are computed at once."""


@torch.inference_mode()
def check_runs(folder: Path, device: str, dtype: torch.dtype) -> None:
    """Load ``folder`` and have it say what follows each token of a short text. Raises LlmqError when it does not load,
    or logits are not finite."""
    source = open_source(folder, device, dtype)
    config = source.config
    length = min(TOKENS, config.context_length)
    text = torch.arange(length).add_(config.bos_token_id or 0).remainder_(config.vocab_size)
    states = HiddenStates(source, text.unsqueeze(0))
    for number in range(config.num_layers):
        block = load_layer(source, number)
        block.merge()
        states.mix(block)
        states.finish(block)
    (hidden,) = states.normed(source)
    for rows in torch.split(_head(source), ROWS):
        if not (hidden @ rows.to(hidden).t()).isfinite().all():
            raise LlmqError(
                "the quantized model computes NaN or infinite logits, so it was not kept",
                "try --bits 8, or --ignore the layers with the largest errors",
            )


def _head(source: Source) -> torch.Tensor:
    """What logits are made by, [vocabulary, hidden]; mapped, unless it is packed, for it may be larger than a block."""
    if is_packed(source.format, HEAD, source.tensors):
        assert source.format is not None
        return source.format.unpack(HEAD, source.tensors, source.device).dequantize()
    name = EMBEDDING if source.config.tied_embeddings else HEAD
    return source.tensors.load(f"{name}.weight")
