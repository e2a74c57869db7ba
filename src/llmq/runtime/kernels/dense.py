"""Linear layers with weights as wide as the activations.

y[m, n] = Σ_k x[m, k] · weight[n, k]  +  bias[n]

Or, of a weight that is a gate's rows over those of an input: silu(y[m, n]) · y[m, N/2 + n]
"""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from llmq.runtime.kernels import runs_triton
from llmq.runtime.kernels.silu import silu_mul

FEW_ROWS = 32
"""Up to here a product is the time it takes to read the weight, and the library's leaves bandwidth unused."""
CHANNELS = 256
"""K is a multiple of this where the kernel runs."""


def dense_matmul(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``x`` [M, K] times ``weight`` [N, K], transposed, plus ``bias`` [N] → [M, N].

    On a GPU up to FEW_ROWS rows of 16-bit numbers go through a kernel that starts to read the weight before the rows
    are there. Its sums are fp32, and their order depends on N and K alone. All else is the library's.
    """
    if not _is_for_kernel(x):
        return F.linear(x, weight, bias)
    from llmq.runtime.kernels.dense_triton import dense_matmul_triton

    return dense_matmul_triton(x, weight, bias)


def dense_gated(x: Tensor, weight: Tensor) -> Tensor:
    """``silu_mul`` of the halves of ``dense_matmul(x, weight)``, gate over up, → [M, N / 2]: the same bits, in one
    kernel where that has one."""
    if not _is_for_kernel(x):
        return silu_mul(*F.linear(x, weight).chunk(2, dim=1))
    from llmq.runtime.kernels.dense_triton import dense_matmul_triton

    return dense_matmul_triton(x, weight, None, gated=True)


def _is_for_kernel(x: Tensor) -> bool:
    few = 0 < x.shape[0] <= FEW_ROWS and x.element_size() == 2 and x.shape[1] % CHANNELS == 0
    return few and runs_triton(x)
