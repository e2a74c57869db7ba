"""Linear layers with weights as wide as the activations.

y[m, n] = Σ_k x[m, k] · weight[n, k]  +  bias[n]
"""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from llmq.runtime.kernels import capability, is_hopper, runs_triton

FEW_ROWS = 32
"""Up to here a product is the time it takes to read the weight, and the library's leaves bandwidth unused."""
SKINNY_ROWS = 64
"""Up to here it does so on Hopper where the weight is small."""
CHANNELS = 256
"""K is a multiple of this where the kernel of FEW_ROWS runs."""
CAPABILITIES = (0, 9, 10)
"""The interpreter, Hopper, Blackwell for servers: other cards lack the shared memory that the kernel's tiles take."""


def dense_matmul(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``x`` [M, K] times ``weight`` [N, K], transposed, plus ``bias`` [N] → [M, N].

    On a GPU of CAPABILITIES few rows of 16-bit numbers go through kernels that start to read the weight before the
    rows are there. Their sums are fp32. All else is the library's.
    """
    rows = x.shape[0]
    if not (0 < rows <= SKINNY_ROWS and x.element_size() == 2 and runs_triton(x)):
        return F.linear(x, weight, bias)
    if is_hopper(x.device):
        from llmq.runtime.kernels.skinny_hopper_triton import launch_for, skinny_matmul, takes

        launch = launch_for(rows, weight.shape[0], weight.shape[1], x.dtype)
        if launch is not None and takes(x, weight):
            return skinny_matmul(x, weight, None, None, bias, x.dtype, launch)
    few = rows <= FEW_ROWS and x.shape[1] % CHANNELS == 0
    if not (few and capability(x.device)[0] in CAPABILITIES):
        return F.linear(x, weight, bias)
    from llmq.runtime.kernels.dense_triton import dense_matmul_triton

    return dense_matmul_triton(x, weight, bias)
