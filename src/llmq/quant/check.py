"""Does a folder that was just written load, and generate?"""

from __future__ import annotations

from pathlib import Path

import torch

from llmq.errors import LlmqError
from llmq.runtime.decoder import CausalAttention
from llmq.runtime.loader import load_decoder, open_source

NEW_TOKENS = 8


@torch.inference_mode()
def check_generates(folder: Path, device: str, dtype: torch.dtype) -> None:
    """Load ``folder`` and decode a few tokens greedily. Raises LlmqError when it does not, or logits are not finite."""
    source = open_source(folder, device, dtype)
    config = source.config
    model = load_decoder(source)
    ids = [config.bos_token_id or 0]
    for _ in range(min(NEW_TOKENS, config.context_length - 1)):
        tokens = torch.tensor(ids, device=device)
        hidden = model(tokens, torch.arange(len(ids), device=device), CausalAttention(len(ids)))
        logits = model.logits(hidden[-1:])
        if not logits.isfinite().all():
            raise LlmqError(
                "the quantized model computes NaN or infinite logits, so it was not kept",
                "try --bits 8, or --ignore the layers with the largest errors",
            )
        ids.append(int(logits.argmax()))
