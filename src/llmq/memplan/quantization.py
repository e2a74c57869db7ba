"""What ``llmq quantize`` will need: on the device, in main memory, and of the disk. Estimates, but for the disk."""

from __future__ import annotations

from dataclasses import dataclass

from llmq import memory
from llmq.checkpoint.config import DTYPE_BYTES
from llmq.errors import USAGE, LlmqError
from llmq.memplan.source import Model
from llmq.memplan.weights import planned_weights
from llmq.scheme import Scheme

WORKING_COPIES = {"gptq": 4, "autoround": 6}
"""fp32 tensors of the size of the layers that are rounded together that a method has at once, where they are not three:
the weights, what their codes stand for and the error. GPTQ has also those that are left to round, AutoRound offsets,
their gradients and what these are made of."""
MOMENTS = 3
"""Of a layer's inputs at once: the Hessian, its factor, and what that is made in."""


@dataclass(frozen=True, slots=True)
class QuantizationPlan:
    """Bytes.

    block        the linear layers of a decoder block, in the type that they compute in
    copies       the fp32 tensors that rounding takes beside it
    moments      second moments of inputs, and what is made of them
    activations  of a forward pass of a few windows
    states       the hidden states of all windows: on the device if they take no more than a quarter of what is free
                 there, else in main memory, or in files
    disk         the folder that is written
    """

    method: str
    block: int
    copies: int
    moments: int
    activations: int
    states: int
    disk: int

    @property
    def device(self) -> int:
        """What is where the work is done, wherever the hidden states are."""
        return self.block + self.copies + self.moments + self.activations


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
    tokens = samples * min(seqlen, architecture.context_length or seqlen) if calibrated else 0
    inputs = max((weight.in_features for weight in linears), default=0)
    total = sum(weight.copies * weight.size for weight in linears)
    widest = max((weight.size for weight in linears), default=0)
    states = 2 * architecture.hidden_size
    if model.config is not None:
        states = model.config.hidden_size + model.config.num_heads * model.config.head_dim
        if calibrated:  # those of a group are rounded together
            shapes = model.config.linears
            groups = (group for stage in model.config.linear_stages for group in stage.groups)
            widest = max(sum(shapes[name][0] * shapes[name][1] for name in group) for group in groups)
    batch = memory.activation_bytes(architecture, min(batch_tokens, tokens), 1, dtype_bytes)
    return QuantizationPlan(
        method=method,
        block=total // len(architecture.layers) * dtype_bytes if calibrated else 0,
        copies=WORKING_COPIES.get(method, 3) * widest * 4,
        moments=MOMENTS * inputs**2 * 4 if calibrated else 0,
        activations=batch if calibrated else 0,
        states=tokens * states * dtype_bytes,
        disk=planned_weights(architecture, scheme).on_disk,
    )
