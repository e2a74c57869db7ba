"""Round the layers that have the same inputs, by the method that was chosen, and say what it cost each of them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import suppress

from torch import Tensor

from llmq.checkpoint.quantized_weight import QuantizedWeight
from llmq.errors import LlmqError
from llmq.quant.affine import MAX_WEIGHT, energy, group_blocks
from llmq.quant.methods import awq, bnb, gptq, rtn
from llmq.quant.options import QuantizeOptions
from llmq.quant.report import LayerReport
from llmq.quant.schemes import AWQ, BNB, GPTQ, RTN
from llmq.scheme import Scheme


def round_layers(
    weights: Mapping[str, Tensor],
    schemes: Mapping[str, Scheme],
    hessian: Tensor | None,
    options: QuantizeOptions,
    made: Mapping[str, QuantizedWeight] | None = None,
) -> Iterator[tuple[QuantizedWeight, LayerReport]]:
    """Round ``weights``, fp32 [out, in] by the names of their layers, or take what is ``made`` of them already.

    hessian  the second moment of their inputs, fp32 [in, in]; None: the method has no data, or they saw no token

    A layer that GPTQ cannot round, or not better than to nearest, is rounded to nearest.
    """
    method, made = options.choice.method, made or _made(weights, schemes, hessian, options)
    for name, weight in weights.items():
        plain = made[name] if method == BNB else rtn.quantize_weight(weight, schemes[name])
        used, quantized = (method, made[name]) if name in made else (RTN, plain)
        error, rtn_error = (energy(rounded.dequantize().sub_(weight), hessian) for rounded in (quantized, plain))
        if used == GPTQ and error > rtn_error:
            used, quantized, error = RTN, plain, rtn_error
        whole = energy(weight, hessian) or 1.0
        yield quantized, LayerReport(name, used, str(quantized.scheme), error / whole, rtn_error / whole)


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
    weights: Mapping[str, Tensor], schemes: Mapping[str, Scheme], hessian: Tensor | None, options: QuantizeOptions
) -> dict[str, QuantizedWeight]:
    """What the method's rounding makes of ``weights``; nothing where it has to give up."""
    method = options.choice.method
    if method == GPTQ:
        return {} if hessian is None else _made_by_gptq(weights, schemes, hessian, options.act_order)
    if method == BNB:
        return {name: bnb.quantize_weight(weight, schemes[name]) for name, weight in weights.items()}
    return {
        name: rtn.quantize_weight(weight, schemes[name], _clipping(name, weight, schemes[name], hessian, options))
        for name, weight in weights.items()
    }


def _made_by_gptq(
    weights: Mapping[str, Tensor], schemes: Mapping[str, Scheme], hessian: Tensor, act_order: str
) -> dict[str, QuantizedWeight]:
    together: dict[Scheme, list[str]] = {}
    for name in weights:
        together.setdefault(schemes[name], []).append(name)
    made: dict[str, QuantizedWeight] = {}
    with suppress(gptq.NotPositiveDefinite):
        for scheme, names in together.items():
            layers = [weights[name] for name in names]
            made |= zip(names, gptq.quantize_weights(layers, scheme, hessian, act_order), strict=True)
    return made


def _clipping(
    name: str, weight: Tensor, scheme: Scheme, hessian: Tensor | None, options: QuantizeOptions
) -> Tensor | None:
    """By what clipping is judged; None: there is none."""
    if options.clip:
        return weight.new_ones(weight.shape[1])
    if options.choice.method == AWQ and hessian is not None and not name.endswith(awq.UNCLIPPED):
        return group_blocks(hessian, scheme)
    return None
