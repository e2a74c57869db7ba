"""Linear layers with weights as wide as the activations.

y[m, n] = Σ_k x[m, k] · weight[n, k]  +  bias[n]
"""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from llmq.runtime.kernels import capability, runs_triton

FEW_ROWS = 32
"""Up to here a product is the time it takes to read the weight, and the library's leaves bandwidth unused."""
CHANNELS = 256
"""K is a multiple of this where the kernel runs."""
CAPABILITIES = (0, 9, 10)
"""The interpreter, Hopper, Blackwell for servers: other cards lack the shared memory that the kernel's tiles take."""


def dense_matmul(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``x`` [M, K] times ``weight`` [N, K], transposed, plus ``bias`` [N] → [M, N].

    On a GPU of CAPABILITIES up to FEW_ROWS rows of 16-bit numbers go through a kernel that starts to read the weight
    before the rows are there. Its sums are fp32. All else is the library's.
    """
    few = 0 < x.shape[0] <= FEW_ROWS and x.element_size() == 2 and x.shape[1] % CHANNELS == 0
    if not (few and runs_triton(x) and capability(x.device)[0] in CAPABILITIES):
        return F.linear(x, weight, bias)
    from llmq.runtime.kernels.dense_triton import dense_matmul_triton

    return dense_matmul_triton(x, weight, bias)
