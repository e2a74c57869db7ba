"""All experts of a mixture as two linear layers, whose rows are the experts' one after the other.

tokens → router → assignments by expert → gate, up and silu of all → down of all → each token's weighted sum

Nothing waits for the host, so a CUDA graph can replay it.
"""

from __future__ import annotations

from torch import Tensor, nn

from llmq.runtime.kernels.grouped import GroupedWeight, block_m_for, grouped_matmul
from llmq.runtime.kernels.quantize_rows import quantize_rows
from llmq.runtime.kernels.routing import Routing, combine, sort_by_expert
from llmq.runtime.linear import Linear, W8A8Linear, input_number


class GroupedExperts(nn.Module):
    """gate_up  [experts · 2 · inner, hidden]: of each expert the gate's rows, then up's
    down     [experts · hidden, inner]
    """

    def __init__(self, gate_up: Linear, down: Linear) -> None:
        super().__init__()
        self.gate_up, self.down = gate_up, down

    def forward(self, x: Tensor, weights: Tensor, chosen: Tensor) -> Tensor:
        """``x`` [tokens, hidden]; ``weights`` and ``chosen`` as ``choose`` gives them → [tokens, hidden]"""
        experts = self.down.out_features // x.shape[1]
        block_m = block_m_for(chosen.numel(), [_weight(self.gate_up), _weight(self.down)], experts)
        routing = sort_by_expert(chosen, experts, block_m)
        inner = _multiply(self.gate_up, x, routing, gated=True)
        return combine(_multiply(self.down, inner, routing, gated=False), weights)


def _weight(layer: Linear) -> GroupedWeight:
    return layer.weight if isinstance(layer, nn.Linear) else layer.packed


def _multiply(layer: Linear, x: Tensor, routing: Routing, *, gated: bool) -> Tensor:
    number = input_number(layer)
    rows = x if number is None else quantize_rows(x, number)
    dtype = layer.dtype if isinstance(layer, W8A8Linear) else x.dtype
    return grouped_matmul(rows, _weight(layer), routing, dtype, bias=layer.bias, gated=gated)
