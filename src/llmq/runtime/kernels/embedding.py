"""The hidden states that tokens enter the first block with.

states[t] = weight[token_ids[t]] · scale
"""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from llmq.runtime.kernels import runs_triton


def embedding(token_ids: Tensor, weight: Tensor, scale: float) -> Tensor:
    """[tokens, hidden], of the type of ``weight`` [vocabulary, hidden].

    token_ids  integers [tokens]
    scale      rounded to the type of the weight before it multiplies, as the models were trained that have one
    """
    if not runs_triton(weight):
        return embedding_reference(token_ids, weight, scale)
    from llmq.runtime.kernels.embedding_triton import embedding_triton

    return embedding_triton(token_ids, weight, scale)


def embedding_reference(token_ids: Tensor, weight: Tensor, scale: float) -> Tensor:
    """``embedding`` in plain PyTorch."""
    states = F.embedding(token_ids, weight)
    return states * weight.new_full((), scale) if scale != 1 else states
