"""What ``llmq quantize`` will need: on the device, in main memory, and of the disk. Estimates, but for the disk."""

from __future__ import annotations

from dataclasses import dataclass

from llmq import memory
from llmq.checkpoint.config import DTYPE_BYTES
from llmq.checkpoint.tensors import DEFAULT_SHARD_BYTES
from llmq.errors import USAGE, LlmqError
from llmq.memplan.source import Model
from llmq.memplan.weights import planned_weights
from llmq.scheme import Scheme

WORKING_COPIES = {"autoround": 6}
"""fp32 tensors of a weight's size that a method has at once, where they are not four: the weight, its codes, what they
stand for and the error. AutoRound also has a rounding offset, its gradient and its best."""


@dataclass(frozen=True, slots=True)
class QuantizationPlan:
    """Bytes. ``states``: the calibration's hidden states, on the device if they take no more than a quarter of what is
    free there, else in main memory."""

    method: str
    weights: int
    states: int
    moments: int
    activations: int
    check: int
    """The quantized model, loaded whole to see whether it generates."""
    shard: int
    disk: int

    @property
    def device(self) -> int:
        return max(self.weights + self.moments + self.activations, self.check)

    @property
    def host(self) -> int:
        return self.states + self.shard


def plan_quantization(
    model: Model, scheme: Scheme, method: str, *, calibrated: bool, samples: int, seqlen: int
) -> QuantizationPlan:
    """What quantizing ``model`` takes. ``calibrated``: the method learns from ``samples`` windows of ``seqlen`` tokens.

    LlmqError when the model is quantized already.
    """
    architecture = model.architecture
    if architecture.quantization is not None:
        raise LlmqError("the model is quantized already", "plan the one that it was made from", exit_code=USAGE)
    dtype_bytes = DTYPE_BYTES[architecture.dtype]
    linears = [weight for weight in architecture.weights if weight.linear]
    blocks = len(architecture.layers)
    widest = max((weight.size for weight in linears), default=0)
    planned = planned_weights(architecture, scheme)
    tokens = samples * min(seqlen, architecture.context_length or seqlen)
    copies = WORKING_COPIES.get(method, 4)
    block = sum(weight.copies * weight.size for weight in linears) // blocks * dtype_bytes if calibrated else 0
    inputs = max((weight.in_features for weight in linears), default=0)
    return QuantizationPlan(
        method=method,
        weights=block + copies * widest * 4,
        states=2 * tokens * architecture.hidden_size * dtype_bytes if calibrated else 0,
        moments=3 * inputs**2 * 4 if calibrated else 0,  # the Hessian, its factor, and what that is made in
        activations=memory.activation_bytes(architecture, min(memory.MICRO_BATCH_TOKENS, tokens), 1, dtype_bytes)
        if calibrated
        else 0,
        check=planned.resident,
        shard=min(planned.on_disk, DEFAULT_SHARD_BYTES),
        disk=planned.on_disk,
    )
