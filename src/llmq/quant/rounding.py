"""Round layers that have the same inputs, by the method that was chosen, and say what it cost each of them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import suppress

from torch import Tensor

from llmq.checkpoint.quantized_weight import QuantizedWeight
from llmq.errors import LlmqError
from llmq.memory import STACKED_ROWS
from llmq.quant.affine import MAX_WEIGHT, energy, group_blocks
from llmq.quant.methods import awq, bnb, gptq, rtn
from llmq.quant.options import QuantizeOptions
from llmq.quant.report import LayerReport
from llmq.quant.schemes import AWQ, BNB, GPTQ, RTN
from llmq.runtime.loader import Source
from llmq.scheme import Scheme


def stacks(rows: Mapping[str, int], schemes: Mapping[str, Scheme]) -> list[list[str]]:
    """Layers that have the same inputs, each with so many ``rows``, cut into what is rounded in one go: layers of one
    scheme, with no more than ``STACKED_ROWS`` between them, or a single one."""
    runs: list[list[str]] = [[]]
    for name in rows:
        last = runs[-1]
        if last and (schemes[name] != schemes[last[0]] or sum(rows[one] for one in (*last, name)) > STACKED_ROWS):
            runs.append(last := [])
        last.append(name)
    return runs


def round_layers(
    weights: Mapping[str, Tensor],
    scheme: Scheme,
    hessian: Tensor | None,
    options: QuantizeOptions,
    made: Mapping[str, QuantizedWeight] | None = None,
) -> Iterator[tuple[QuantizedWeight, LayerReport]]:
    """Round the ``weights`` of a stack, fp32 [out, in] by the names of their layers, or take what is ``made`` of them
    already.

    hessian  the second moment of their inputs, fp32 [in, in]; None: the method has no data, or they saw no token

    A layer that GPTQ cannot round, or not better than to nearest, is rounded to nearest.
    """
    method, made = options.choice.method, made or _made(weights, scheme, hessian, options)
    for name, weight in weights.items():
        plain = made[name] if method == BNB else rtn.quantize_weight(weight, scheme)
        used, quantized = (method, made[name]) if name in made else (RTN, plain)
        error, rtn_error = (energy(rounded.dequantize().sub_(weight), hessian) for rounded in (quantized, plain))
        if used == GPTQ and error > rtn_error:
            used, quantized, error = RTN, plain, rtn_error
        whole = energy(weight, hessian) or 1.0
        yield quantized, LayerReport(name, used, str(quantized.scheme), error / whole, rtn_error / whole)


def load_weight(source: Source, name: str) -> Tensor:
    """The weight of layer ``name``, fp32 on the source's device. LlmqError as ``check_weight``."""
    weight = source.tensors.load(f"{name}.weight", source.device).float()
    check_weight(name, weight)
    return weight


def check_weight(name: str, weight: Tensor) -> None:
    """Raise LlmqError for a weight that has no scale: not finite, or too large."""
    if not weight.isfinite().all():
        raise LlmqError(f"{name}.weight holds NaN or infinite numbers", "download or copy the model again")
    if weight.abs().max() > MAX_WEIGHT:
        raise LlmqError(
            f"{name}.weight holds {weight.abs().max():.3g}, more than fp16 can: its scales would overflow",
            f"--ignore {name}",
        )


def _made(
    weights: Mapping[str, Tensor], scheme: Scheme, hessian: Tensor | None, options: QuantizeOptions
) -> dict[str, QuantizedWeight]:
    """What the method's rounding makes of ``weights``; nothing where it has to give up."""
    method = options.choice.method
    if method == GPTQ:
        if hessian is not None:
            with suppress(gptq.NotPositiveDefinite):
                made = gptq.quantize_weights(list(weights.values()), scheme, hessian, options.act_order)
                return dict(zip(weights, made, strict=True))
        return {}
    if method == BNB:
        return {name: bnb.quantize_weight(weight, scheme) for name, weight in weights.items()}
    return {
        name: rtn.quantize_weight(weight, scheme, _clipping(name, weight, scheme, hessian, options))
        for name, weight in weights.items()
    }


def _clipping(
    name: str, weight: Tensor, scheme: Scheme, hessian: Tensor | None, options: QuantizeOptions
) -> Tensor | None:
    """By what clipping is judged; None: there is none."""
    if options.clip:
        return weight.new_ones(weight.shape[1])
    if options.choice.method == AWQ and hessian is not None and not name.endswith(awq.UNCLIPPED):
        return group_blocks(hessian, scheme)
    return None
