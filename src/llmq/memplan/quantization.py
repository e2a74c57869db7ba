"""What ``llmq quantize`` will need: on the device, in main memory, and of the disk. Estimates, but for the disk."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from llmq import memory
from llmq.checkpoint.config import DTYPE_BYTES
from llmq.errors import USAGE, LlmqError
from llmq.memplan.source import Model
from llmq.memplan.weights import planned_weights
from llmq.scheme import Scheme

WORKING_COPIES = {"gptq": 4}
"""fp32 tensors of the size of what is rounded in one go that a method has beside its second moments, where they are not
five: the weights, the grid of each, and what becomes of them."""
LEARNING_COPIES = 5
"""The same of learned rounding, of all layers of a block: offsets, their gradients, and what these are made of."""
MOMENTS = {"gptq": 3}
"""Of a layer's inputs at once: the Hessian, its factor, and what that is made in; without a factor, two. Experts have
more Hessians."""


@dataclass(frozen=True, slots=True)
class QuantizationPlan:
    """Bytes.

    block        the linear layers of a decoder block, in the type that they compute in
    stack        the weights that are rounded in one go, fp32
    copies       the fp32 tensors that rounding takes beside the block
    moments      second moments of inputs, and what is made of them
    activations  of a forward pass of a few windows
    states       the hidden states of all windows, in main memory or in files
    pinned       what they take of main memory where they pass a GPU
    disk         the folder that is written
    """

    method: str
    block: int
    stack: int
    copies: int
    moments: int
    activations: int
    states: int
    pinned: int
    disk: int

    @property
    def device(self) -> int:
        """What is where the work is done."""
        return self.block + self.rounding + self.activations

    @property
    def rounding(self) -> int:
        """What is wherever layers are rounded: on each of several devices."""
        return self.copies + self.moments


def plan_quantization(
    model: Model,
    scheme: Scheme,
    method: str,
    *,
    calibrated: bool,
    samples: int,
    seqlen: int,
    dtype_bytes: int | None = None,
    batch_tokens: int = memory.MICRO_BATCH_TOKENS,
) -> QuantizationPlan:
    """What quantizing ``model`` takes. ``calibrated``: the method learns from ``samples`` windows of ``seqlen`` tokens,
    of which those of ``batch_tokens`` pass a block at once. ``dtype_bytes``: of a number in the type that it computes
    in; None: the model's.

    LlmqError when the model is quantized already.
    """
    architecture = model.architecture
    if architecture.quantization is not None:
        raise LlmqError("the model is quantized already", "plan the one that it was made from", exit_code=USAGE)
    dtype_bytes = dtype_bytes or DTYPE_BYTES[architecture.dtype]
    linears = [weight for weight in architecture.weights if weight.linear]
    length = min(seqlen, architecture.context_length or seqlen)
    tokens = samples * length if calibrated else 0
    passing = length * max(1, min(samples, batch_tokens // length))
    inputs = max((weight.in_features for weight in linears), default=0)
    total = sum(weight.copies * weight.size for weight in linears)
    widest = max((weight.size for weight in linears), default=0)
    widths, together = (architecture.hidden_size, architecture.hidden_size), 1
    if model.config is not None:
        widths = (model.config.hidden_size, model.config.num_heads * model.config.head_dim)
        if calibrated:
            shapes = model.config.linears
            groups = (group for stage in model.config.linear_stages for group in stage.groups)
            widest = max(_stacked([shapes[name] for name in group]) for group in groups)
        if model.config.experts is not None:
            together = min(model.config.experts.count, max(1, memory.MOMENT_BYTES // (4 * inputs**2)))
    batch = memory.activation_bytes(architecture, passing, 1, dtype_bytes)
    pinned = sum(memory.pinned_bytes(passing * width * dtype_bytes) for width in widths)
    block = total // len(architecture.layers)
    learning = LEARNING_COPIES * block if method == "autoround" else 0
    return QuantizationPlan(
        method=method,
        block=block * dtype_bytes,
        stack=widest * 4,
        copies=max(learning, WORKING_COPIES.get(method, 5) * widest) * 4,
        moments=(together + MOMENTS.get(method, 2) - 1) * inputs**2 * 4 if calibrated else 0,
        activations=batch if calibrated else 0,
        states=tokens * sum(widths) * dtype_bytes,
        pinned=-(-tokens // passing) * pinned,
        disk=planned_weights(architecture, scheme).on_disk,
    )


def _stacked(shapes: Sequence[tuple[int, int]]) -> int:
    """The most weights that are rounded in one go, of layers of these shapes that have the same inputs."""
    rows = [out for out, _ in shapes]
    return max(*rows, min(sum(rows), memory.STACKED_ROWS)) * shapes[0][1]
