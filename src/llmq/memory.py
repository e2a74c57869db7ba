"""Every byte formula. The planner prints what the KV pool allocates by and the quantizer writes: one home for each.

All results are bytes unless the name says otherwise. No torch.
"""

from __future__ import annotations

import math
import re
from math import prod
from typing import TYPE_CHECKING, Protocol

from llmq.errors import USAGE, LlmqError
from llmq.plan import layer_groups
from llmq.scheme import E4M3, FP4, NF4, WHOLE_TENSOR, Scheme

if TYPE_CHECKING:  # the formulas read its numbers; the module stays below the checkpoint package
    from llmq.checkpoint.config import ModelConfig

RESERVED_BLOCKS = 1
"""Block 0 of every pool is where padding rows read and write; no sequence ever owns it."""
SCALE_BYTES = 2
ABSMAX_BYTES = 4
"""A scale of bitsandbytes."""
TABLE_BYTES = 16 * 4
"""What bitsandbytes' codes stand for, which it stores with each layer."""
SHAPE_BYTES = 2 * 8
"""The shape that compressed-tensors stores with each packed layer."""
GROUP_INDEX_BYTES = 4
KERNEL_CHANNELS = 128
"""Channels that the weight-only product takes at a time: ``runtime.kernels.wna16.STEP``."""
GPTQ_BITS = (2, 3, 4, 8)
MAX_BYTES = 2**63
_UNITS = {"": 1, "b": 1} | {
    prefix + suffix: base ** (power + 1)
    for power, prefix in enumerate("kmgt")
    for suffix, base in (("ib", 1024), ("b", 1000), ("", 1024))
}


# Units


def parse_bytes(text: str) -> int:
    """``512MiB``, ``80GB``, ``24GiB``, ``1048576`` → bytes. A bare K, M, G, T counts in 1024s."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", text)
    size = float(match[1]) * _UNITS.get(match[2].lower(), math.nan) if match else math.nan
    if not size < MAX_BYTES:
        raise LlmqError(f"{text!r} is not a size of memory", "write it like 512MiB or 80GB", exit_code=USAGE)
    return int(size)


def format_bytes(count: float) -> str:
    """1536 → ``1.50 KiB``"""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(count) < 1024 or unit == "GiB":
            break
        count /= 1024
    return f"{count:.0f} B" if unit == "B" else f"{count:.2f} {unit}"


# KV cache


def textbook_kv_bytes(batch: int, max_tokens: int, layers: int, d_model: int, dtype_bytes: int) -> int:
    """``b × N_max × layers × d_model × 2 × bytes``: the keys and values of plain multi-head attention."""
    return batch * max_tokens * layers * d_model * 2 * dtype_bytes


KV_DTYPE_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2, "fp8": 1, "int8": 1}
KV_SCALE_BYTES = {"int8": 4}
"""int8: for each token an fp32 scale for each head's keys, and one for its values. fp8 has two for a whole layer."""


def kv_token_bytes(elements: int, scales: int, kv_dtype: str) -> int:
    """``elements`` numbers that one layer keeps of one token, ``scales`` of which there is one if they have any."""
    return elements * KV_DTYPE_BYTES[kv_dtype] + scales * KV_SCALE_BYTES.get(kv_dtype, 0)


def kv_bytes_per_token(config: ModelConfig, kv_dtype: str) -> int:
    """Keys and values of one token in all layers, for the heads that the model really caches."""
    heads = 2 * config.num_kv_heads
    return config.num_layers * kv_token_bytes(heads * config.head_dim, heads, kv_dtype)


def blocks_for(tokens: int, block_size: int) -> int:
    return -(-tokens // block_size)


def block_bytes(config: ModelConfig, block_size: int, kv_dtype: str) -> int:
    """One block of the pool: ``block_size`` tokens in all layers."""
    return block_size * kv_bytes_per_token(config, kv_dtype)


def kv_bytes(config: ModelConfig, batch: int, tokens: int, block_size: int, kv_dtype: str) -> int:
    """What ``batch`` sequences of ``tokens`` tokens take of the pool, whole blocks each."""
    return batch * blocks_for(tokens, block_size) * block_bytes(config, block_size, kv_dtype)


def pool_block_bytes(config: ModelConfig, block_size: int, kv_dtype: str) -> int:
    """One block of the pool as the engine hands them out: ``block_size`` tokens in the layers of one group."""
    return block_bytes(config, block_size, kv_dtype) // len(layer_groups(config.windows))


def pool_blocks(budget: int, config: ModelConfig, block_size: int, kv_dtype: str) -> int:
    """Blocks in a pool of ``budget`` bytes, the reserved one among them; or in the swap space of as many."""
    return budget // pool_block_bytes(config, block_size, kv_dtype)


# Weights


def linear_bytes(out_features: int, in_features: int, scheme: Scheme | None, dtype_bytes: int) -> int:
    """One linear layer; in a scheme, as it is stored: integers with 16-bit activations in GPTQ, or compressed-tensors
    where GPTQ has none such; 8-bit activations and e4m3 in that too; nf4 and fp4 in bitsandbytes."""
    if scheme is None or not scheme.divides(in_features):
        return out_features * in_features * dtype_bytes
    one_scale = scheme.group_size == WHOLE_TENSOR
    groups = 1 if one_scale else scheme.num_groups(in_features) * out_features
    codes = out_features * -(-in_features * scheme.bits // 32) * 4
    if scheme.number in (NF4, FP4):
        return codes + groups * ABSMAX_BYTES + TABLE_BYTES
    if scheme.number == E4M3 or scheme.activation_bits == 8:
        return codes + groups * SCALE_BYTES
    zero_points = 1 if one_scale else groups * scheme.bits // 8
    if scheme.bits in GPTQ_BITS and not one_scale:
        return codes + zero_points + groups * SCALE_BYTES + in_features * GROUP_INDEX_BYTES
    return codes + (not scheme.symmetric) * zero_points + groups * SCALE_BYTES + SHAPE_BYTES


def resident_linear_bytes(out_features: int, in_features: int, scheme: Scheme | None, dtype_bytes: int) -> int:
    """One linear layer on the engine's GPU, as ``runtime.kernels`` pack it.

    8-bit activations: codes of 8 bits, fp32 scales of rows. Else codes of 4 or 8 bits, whose channels are padded to
    whole steps, and 4 bytes of scale and zero point for each group.
    """
    if scheme is None:
        return out_features * in_features * dtype_bytes
    if scheme.activation_bits == 8:
        return out_features * (in_features + 4)
    code_bits = 4 if scheme.bits <= 4 else 8
    length = scheme.group_length(in_features)
    groups = in_features // length
    if length < in_features:
        groups = _round_up(groups, max(KERNEL_CHANNELS // length, 1))
    return out_features * (_round_up(in_features, KERNEL_CHANNELS) * code_bits // 8 + 4 * groups)


def _round_up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple


def block_linear_bytes(config: ModelConfig, scheme: Scheme | None, dtype_bytes: int) -> int:
    """The linear layers of one decoder block."""
    return sum(linear_bytes(out, inp, scheme, dtype_bytes) for out, inp in config.linears.values())


def weight_bytes(config: ModelConfig, scheme: Scheme | None, dtype_bytes: int) -> int:
    """The whole model: quantized linears of the blocks; embeddings, head, norms, routers and biases in the model's
    dtype."""
    embedding = config.vocab_size * config.hidden_size
    embeddings = embedding if config.tied_embeddings else 2 * embedding
    rest = embeddings + config.hidden_size + config.num_layers * _block_rest(config)
    return rest * dtype_bytes + config.num_layers * block_linear_bytes(config, scheme, dtype_bytes)


def offset_norm_bytes(config: ModelConfig, dtype_bytes: int) -> int:
    """What the engine's norms take beyond the model's dtype: with an offset, they are kept in fp32."""
    numbers = config.hidden_size + config.num_layers * _block_norms(config)
    return numbers * (4 - dtype_bytes) if config.norm_offset else 0


def _block_norms(config: ModelConfig) -> int:
    return (4 if config.post_norms else 2) * config.hidden_size + 2 * config.head_dim * config.qk_norm


def _block_rest(config: ModelConfig) -> int:
    """Norms, router and biases of one decoder block."""
    router = 0 if config.experts is None else config.experts.count * config.hidden_size
    qkv = (config.num_heads + 2 * config.num_kv_heads) * config.head_dim
    mlp = 2 * config.intermediate_size + config.hidden_size
    return (
        _block_norms(config)
        + router
        + config.qkv_bias * qkv
        + config.o_bias * config.hidden_size
        + config.mlp_bias * mlp
    )


# Activations


class Widths(Protocol):
    """What of a model its activations depend on: a ModelConfig, or the planner's description of any architecture."""

    @property
    def hidden_size(self) -> int: ...

    @property
    def vocab_size(self) -> int: ...

    @property
    def mlp_elements(self) -> int:
        """Numbers that the MLP of a block has for one token at once."""


def activation_bytes(model: Widths, batched_tokens: int, sampled_rows: int, dtype_bytes: int) -> int:
    """The widest moment of a step: a block's hidden states and MLP, or the fp32 logits and their sampling copies."""
    mlp = batched_tokens * (3 * model.hidden_size + model.mlp_elements) * dtype_bytes
    logits = sampled_rows * model.vocab_size * 4 * LOGITS_COPIES
    return max(mlp, logits) + batched_tokens * model.hidden_size * dtype_bytes


FUSED_ROWS = 256
"""Rows up to which a product unpacks weights of few bits in registers. For more, widening the weight once and
multiplying through the library is faster."""


def widened_bytes(config: ModelConfig, scheme: Scheme | None, batched_tokens: int, dtype_bytes: int) -> int:
    """What a step widens at once, on a GPU, of a quantized model's weights of few bits: the largest of the layers that
    are multiplied as one. Experts are unpacked in registers in steps of any length.

    scheme  of its layers; None: they have several, of which that of the largest may be one of few bits
    """
    if batched_tokens <= FUSED_ROWS or (scheme is not None and scheme.activation_bits == 8):
        return 0
    shapes = config.linears
    groups = [group for stage in config.linear_stages for group in stage.groups if ".experts." not in group[0]]
    return dtype_bytes * max(sum(prod(shapes[name]) for name in group) for group in groups)


MICRO_BATCH_TOKENS = 4096
"""Tokens in one forward pass of a quantization: what a block's activations take, whatever the number of windows."""
STACKED_ROWS = 4096
"""Rows of weights that are rounded in one go: layers with fewer between them take the steps of one."""
MOMENT_BYTES = 2 * 2**30
"""What second moments of experts' inputs may take at once; more of them, or wider, take several passes."""
LOGITS_COPIES = 5
"""fp32 [rows, vocabulary] tensors that sampling holds at once: logits, sorted, order, probabilities, noise."""


def pinned_bytes(num_bytes: int) -> int:
    """What torch takes of main memory to pin so much of it: a power of two."""
    return 1 << (num_bytes - 1).bit_length()
