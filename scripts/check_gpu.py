"""Check every kernel on a GPU against float64, every architecture against transformers and ``demo`` in every scheme
against a CPU, then time the kernels.

    PYTHONPATH=src python scripts/check_gpu.py            both parts; exit code 1 if a check fails
    PYTHONPATH=src python scripts/check_gpu.py --checks   the checks alone
    PYTHONPATH=src python scripts/check_gpu.py --speed    the timings alone

A check draws fresh random inputs from a fixed seed, fills what the kernel must not read and what it has to write with
NaN, compares by ‖out − exact‖ / ‖exact‖, and runs the kernel twice for the same bits. A timing is the median over
replays of a CUDA graph that goes round several sets of inputs, together several times the L2 cache. The products are
timed by ``llmq bench kernels``.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "src"))
sys.path.insert(1, str(Path(__file__).resolve().parents[1] / "tests"))

from rounded_caches import empty_cache, rounded_caches
from tiny_models import VARIANTS, save_variant

from llmq import LLM, SamplingParams, quantize
from llmq.bench.kernels import median_seconds, seconds_each
from llmq.checkpoint.folder import DEMO, demo_folder
from llmq.checkpoint.quantized_weight import QuantizedWeight
from llmq.engine.options import EngineOptions
from llmq.quant.options import Calibration
from llmq.quant.schemes import PRESETS, RTN
from llmq.runtime.decoder import CausalAttention, Decoder
from llmq.runtime.kernels.angles import cos_and_sin
from llmq.runtime.kernels.attention import Fresh, paged_attention
from llmq.runtime.kernels.dense import dense_matmul
from llmq.runtime.kernels.embedding import embedding, embedding_reference
from llmq.runtime.kernels.gelu import gelu_mul, gelu_mul_reference
from llmq.runtime.kernels.grouped import GroupedWeight, block_m_for, grouped_matmul, grouped_matmul_reference
from llmq.runtime.kernels.gumbel import draw_gumbel, draw_gumbel_reference
from llmq.runtime.kernels.invariant import invariant_matmul
from llmq.runtime.kernels.kv_write import Scales, write_kv
from llmq.runtime.kernels.megakernel import Between, Weight, megakernel, megakernel_reference, takes
from llmq.runtime.kernels.norm import add_rms_norm, add_rms_norm_quantize, add_rms_norm_reference
from llmq.runtime.kernels.quantize_rows import QuantizedRows, quantize_rows, quantize_rows_reference
from llmq.runtime.kernels.rope import rope_and_write, rope_and_write_reference
from llmq.runtime.kernels.routing import choose, choose_reference, combine, sort_by_expert, sort_by_expert_reference
from llmq.runtime.kernels.silu import silu_mul, silu_mul_quantize, silu_mul_reference
from llmq.runtime.kernels.w8a8 import Weight8, pack_w8a8, w8a8_matmul
from llmq.runtime.kernels.w8a8_triton import kernel_for, large_kernel
from llmq.runtime.kernels.wna16 import PackedWeight, pack_wna16, wna16_matmul
from llmq.runtime.linear import Linear, input_number
from llmq.runtime.loader import load_decoder, open_source
from llmq.scheme import E4M3, FP4, INT, NF4, Scheme

TOLERANCE = {torch.bfloat16: 2.5e-3, torch.float16: 4e-4, torch.float32: 1e-5}
FP8_TOLERANCE = 4e-4  # whatever the type: Hopper's matrix unit has fewer bits than fp32 for sums of FP8
FP8_LIBRARY_TOLERANCE = 4e-3  # where they stay in it all along
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
NAN = float("nan")
Rows = Sequence[tuple[int, int]]  # (queries, tokens in the cache) of each row


@dataclass
class Outcome:
    error: float
    tolerance: float
    repeats: bool  # a second run gave the same bits; of a model: its tokens are transformers'

    @property
    def ok(self) -> bool:
        return self.repeats and self.error <= self.tolerance  # False for NaN


class Case(Protocol):
    def check(self) -> Outcome: ...


def compare(run: Callable[[], Tensor], exact: Tensor, slack: float = 1.0) -> Outcome:
    # Under this switch torch.empty fills its memory with NaN, so that whatever is not written shows.
    torch.use_deterministic_algorithms(True)
    first, second = run(), run()
    torch.use_deterministic_algorithms(False)
    # Of a few outputs the nearest numbers of the type may be further off than any mean of many.
    rounding = relative_error(exact.to(first.dtype), exact)
    tolerance = slack * max(TOLERANCE[first.dtype], 1.05 * rounding)
    return Outcome(relative_error(first, exact), tolerance, torch.equal(first, second))


def relative_error(out: Tensor, exact: Tensor) -> float:
    """‖out − exact‖ / ‖exact‖."""
    return float((out.double() - exact).norm() / exact.norm().clamp_min(1e-30))


@dataclass
class Paged:
    """A paged cache with random keys and values, NaN wherever no row has a token."""

    query: Tensor
    key_cache: Tensor
    value_cache: Tensor
    block_tables: Tensor
    query_starts: Tensor
    kv_lengths: Tensor
    rows: Rows
    scales: Scales | None = None
    numbers: tuple[Tensor, Tensor] | None = None
    """What a cache of 8 bits stands for."""
    fresh: Fresh | None = None

    @staticmethod
    def draw(
        rows: Rows, heads: int, kv_heads: int, head_dim: int, block_size: int, dtype: torch.dtype,
        num_blocks: int = 0, interleaved: bool = False, poisoned: bool = True, number: str | None = None,
    ) -> Paged:  # fmt: skip
        counts = [-(-kv // block_size) for _, kv in rows]
        num_blocks = max(num_blocks, sum(counts) + 1)
        used = sum(counts)
        # From the end of the pool, so that a big pool is addressed where offsets are big.
        ids = (num_blocks - 1 - torch.randperm(used)).int()
        tables = torch.zeros(len(rows), max(max(counts), 1), dtype=torch.int32)
        taken = 0
        for row, count in enumerate(counts):
            tables[row, :count] = ids[taken : taken + count]
            taken += count
        shape = (block_size, kv_heads, head_dim)
        if interleaved:
            pool = torch.empty(num_blocks, 2, *shape, dtype=dtype, device="cuda")
            key_cache, value_cache = pool[:, 0], pool[:, 1]
        else:
            key_cache, value_cache = (torch.empty(num_blocks, *shape, dtype=dtype, device="cuda") for _ in range(2))
        for cache in (key_cache, value_cache):
            low = num_blocks - used - 1
            cache[low:] = torch.randn(used + 1, *shape, dtype=dtype, device="cuda")
            cache[:low] = NAN
            if poisoned:
                cache[low] = NAN
        if poisoned:
            for row, (_, kv) in enumerate(rows):
                if kv % block_size:
                    page = int(tables[row, kv // block_size])
                    key_cache[page, kv % block_size :] = NAN
                    value_cache[page, kv % block_size :] = NAN
        scales = numbers = None
        if number is not None:
            codes, scales, stands_for = rounded_caches((key_cache, value_cache), number)
            (key_cache, value_cache), numbers = codes, (stands_for[0], stands_for[1])
        starts = torch.tensor([0] + [queries for queries, _ in rows]).cumsum(0).int()
        return Paged(
            torch.randn(int(starts[-1]), heads, head_dim, dtype=dtype, device="cuda"), key_cache, value_cache,
            tables.cuda(), starts.cuda(), torch.tensor([kv for _, kv in rows], dtype=torch.int32).cuda(), rows,
            scales, numbers,
        )  # fmt: skip

    def run(
        self, window: int | None = None, split: int | None = None,
        scale: float | None = None, softcap: float | None = None, loose: bool = False, batch_invariant: bool = False,
    ) -> Tensor:  # fmt: skip
        """``loose``: the bound is not the longest row but four times that, as in a CUDA graph for many lengths."""
        most = max(kv for _, kv in self.rows)
        return paged_attention(
            self.query, self.key_cache, self.value_cache, self.block_tables, self.query_starts, self.kv_lengths,
            window=window, min_query_length=min(queries for queries, _ in self.rows),
            max_query_length=max(queries for queries, _ in self.rows),
            max_kv_length=4 * most if loose else most, scale=scale, softcap=softcap, split=split,
            longest=self.kv_lengths.max()[None] if loose else None,
            order=self.kv_lengths.argsort(descending=True).int() if loose else None,
            batch_invariant=batch_invariant, scales=self.scales, fresh=self.fresh,
        )  # fmt: skip

    def exact(self, window: int | None, scale: float | None = None, softcap: float | None = None) -> Tensor:
        out = torch.zeros(self.query.shape, dtype=torch.float64, device="cuda")
        block_size, kv_heads, head_dim = self.key_cache.shape[1:]
        start = 0
        for row, (queries, kv) in enumerate(self.rows):
            if kv:
                blocks = self.block_tables[row, : -(-kv // block_size)].long()
                key, value = (
                    cache[blocks].flatten(0, 1)[:kv].double().transpose(0, 1)
                    for cache in self.numbers or (self.key_cache, self.value_cache)
                )
                query = self.query[start : start + queries].double().view(queries, kv_heads, -1, head_dim)
                scores = torch.einsum("qhgd,hkd->hgqk", query, key) * (scale or 1 / math.sqrt(head_dim))
                if softcap is not None:
                    scores = softcap * torch.tanh(scores / softcap)
                distance = torch.arange(kv - queries, kv, device="cuda")[:, None] - torch.arange(kv, device="cuda")
                seen = distance >= 0
                if window is not None:
                    seen &= distance < window
                weights = scores.masked_fill_(~seen, -math.inf).softmax(-1)
                mixed = torch.einsum("hgqk,hkd->qhgd", weights, value)
                out[start : start + queries] = mixed.reshape(queries, -1, head_dim)
            start += queries
        return out


@dataclass
class AttentionCase:
    rows: Rows
    heads: int
    kv_heads: int
    head_dim: int
    block_size: int
    dtype: torch.dtype
    window: int | None = None
    num_blocks: int = 0
    interleaved: bool = False
    split: int | None = None
    scale: float | None = None
    softcap: float | None = None
    loose: bool = False
    number: str | None = None  # of a cache of 8 bits

    def check(self) -> Outcome:
        paged = Paged.draw(
            self.rows, self.heads, self.kv_heads, self.head_dim, self.block_size, self.dtype,
            self.num_blocks, self.interleaved, number=self.number,
        )  # fmt: skip
        scores = (self.scale, self.softcap)
        return compare(
            lambda: paged.run(self.window, self.split, *scores, self.loose), paged.exact(self.window, *scores)
        )


def unturned(key: Tensor) -> tuple[Tensor, Tensor]:
    """The rotation that leaves the heads of ``key`` [tokens, kv_heads, head_dim] as they are."""
    turn = torch.ones(len(key), 1, key.shape[2] // 2, device=key.device)
    return turn, 0 * turn


@dataclass
class WriteCase:
    tokens: int
    kv_heads: int
    head_dim: int
    block_size: int
    dtype: torch.dtype
    num_blocks: int
    interleaved: bool = False

    def check(self) -> Outcome:
        pool = torch.full((self.num_blocks, 2, self.block_size, self.kv_heads, self.head_dim), NAN, dtype=self.dtype)
        pool = pool.cuda()
        caches = (pool[:, 0], pool[:, 1]) if self.interleaved else (pool[:, 0].clone(), pool[:, 1].clone())
        # Slices of a wider tensor, as the key and value of a fused projection are.
        wide = torch.randn(self.tokens, 3 * self.kv_heads, self.head_dim, device="cuda").to(self.dtype)
        key, value = wide[:, self.kv_heads : 2 * self.kv_heads], wide[:, 2 * self.kv_heads :]
        slots = self.num_blocks * self.block_size - 1 - torch.randperm(self.tokens, device="cuda")
        rope_and_write(key, key, value, unturned(key), *caches, slots)
        wrong = 0
        for cache, source in zip(caches, (key, value), strict=True):
            wrong += int((cache[slots // self.block_size, slots % self.block_size] != source).sum())
            wrong += int(cache.isfinite().sum()) - source.numel()
        return Outcome(float(wrong), 0.0, True)


@dataclass
class RoundedWriteCase:
    """Codes and scales of 8 bits are those of a CPU."""

    tokens: int
    kv_heads: int
    head_dim: int
    number: str
    dtype: torch.dtype

    def check(self) -> Outcome:
        blocks = self.tokens // 16 + 2
        wide = torch.randn(self.tokens, 3 * self.kv_heads, self.head_dim, device="cuda").to(self.dtype)
        query, key, value = wide.chunk(3, dim=1)
        slots = torch.randperm(16 * blocks, device="cuda")[: self.tokens]
        kept: list[tuple[Tensor, ...]] = []
        for device in ("cuda", "cpu"):
            codes, scales = empty_cache(self.number, blocks, 16, self.kv_heads, self.head_dim)
            codes, scales = codes.to(device), (scales[0].to(device), scales[1].to(device))
            if device == "cpu":
                write_kv(key.cpu(), value.cpu(), codes[0], codes[1], slots.cpu(), scales)
            else:
                rope_and_write(query, key, value, unturned(key), codes[0], codes[1], slots, scales=scales)
            kept.append((codes.view(torch.uint8).cpu(), scales[0].cpu(), scales[1].cpu()))
        wrong = sum(int((ours != right).sum()) for ours, right in zip(*kept, strict=True))
        return Outcome(float(wrong), 0.0, True)


@dataclass
class FreshCase:
    """Rows of one query that write their own tokens: what ``rope_and_write`` and attention over its cache give."""

    lengths: Sequence[int]
    heads: int
    kv_heads: int
    head_dim: int
    block_size: int
    dtype: torch.dtype
    rotated: int
    normed: bool = False
    window: int | None = None
    softcap: float | None = None
    number: str | None = None

    def check(self) -> Outcome:
        paged = Paged.draw(
            [(1, kv) for kv in self.lengths], self.heads, self.kv_heads, self.head_dim, self.block_size, self.dtype,
            number=self.number,
        )  # fmt: skip
        rows, kv_heads = len(self.lengths), self.kv_heads
        fused = torch.randn(rows, self.heads + 2 * kv_heads, self.head_dim, device="cuda").to(self.dtype)
        query, key, value = fused.tensor_split([self.heads, self.heads + kv_heads], dim=1)
        angles = torch.randn(rows, 1, self.rotated // 2, device="cuda")
        query_norm, key_norm = torch.randn(2, self.head_dim, device="cuda").to(self.dtype)
        norms = (query_norm, key_norm) if self.normed else None
        last = paged.kv_lengths.long() - 1
        blocks = paged.block_tables[torch.arange(rows, device="cuda"), last // self.block_size]
        slots = blocks * self.block_size + last % self.block_size
        fresh = Fresh(key, value, (angles.cos(), angles.sin()), slots, norms, 1e-5)

        def run(together: bool) -> tuple[Tensor, Tensor]:
            own = replace(paged, key_cache=paged.key_cache.clone(), value_cache=paged.value_cache.clone())
            if paged.scales is not None:
                own.scales = (paged.scales[0].clone(), paged.scales[1].clone())
            own.query, own.fresh = query, fresh
            if not together:
                own.fresh = None
                own.query = rope_and_write(
                    query, *fresh[:3], own.key_cache, own.value_cache, slots, norms=norms, eps=1e-5, scales=own.scales
                )
            out = own.run(self.window, softcap=self.softcap, loose=True)
            kept = (own.key_cache, own.value_cache, *(own.scales or ()))
            return out, torch.cat([each.flatten().double().nan_to_num(0.0) for each in kept])

        (first, wrote), (second, again), (apart, written) = run(True), run(True), run(False)
        error = max(relative_error(first, apart.double()), relative_error(wrote, written))
        tolerance = TOLERANCE[self.dtype if self.number is None else BF16]  # a code may be a step off
        return Outcome(error, tolerance, first.equal(second) and wrote.equal(again))


@dataclass
class SmallCase:
    """The kernels between the products, one after the other; the residual and the caches are outputs too."""

    tokens: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    dtype: torch.dtype
    normed: bool
    rotated: int = 0  # channels of a head; 0: all
    wide: bool = False  # norms' weights are fp32

    def check(self) -> Outcome:
        def draw(*shape: int, wide: bool = False) -> Tensor:
            return torch.randn(*shape, device="cuda").to(FP32 if wide else self.dtype)

        residual, x = draw(self.tokens, self.hidden), draw(self.tokens, self.hidden)
        weight = draw(self.hidden, wide=self.wide)
        gate, up = draw(self.tokens, 2 * self.hidden).chunk(2, dim=1)
        fused = draw(self.tokens, self.heads + 2 * self.kv_heads, self.head_dim)
        angles = torch.randn(self.tokens, 1, (self.rotated or self.head_dim) // 2, device="cuda")
        query_norm, key_norm = (draw(self.head_dim, wide=self.wide) for _ in range(2))
        norms = (query_norm, key_norm) if self.normed else None
        slots = torch.randperm(self.tokens + 64, device="cuda")[: self.tokens]
        query, key, value = fused.tensor_split([self.heads, self.heads + self.kv_heads], dim=1)

        def kernels() -> Tensor:
            total, pool = residual.clone(), self.pool(self.dtype)
            normal = add_rms_norm(total, x, weight, 1e-5)
            rotation = (angles.cos(), angles.sin())
            turned = rope_and_write(query, key, value, rotation, pool[0], pool[1], slots, norms=norms, eps=1e-5)
            gated = (silu_mul(gate, up), gelu_mul(gate, up))
            return torch.cat([y.flatten() for y in (normal, total, *gated, turned, pool)])

        total, pool = residual.double(), self.pool(torch.float64)
        normal = add_rms_norm_reference(total, x.double(), weight.double(), 1e-5)
        rotation = (angles.double().cos(), angles.double().sin())
        wide_norms = None if norms is None else (norms[0].double(), norms[1].double())
        turned = rope_and_write_reference(
            query.double(), key.double(), value.double(), rotation, pool[0], pool[1], slots, norms=wide_norms, eps=1e-5
        )  # fmt: skip
        gated = [reference(gate.double(), up.double()) for reference in (silu_mul_reference, gelu_mul_reference)]
        return compare(kernels, torch.cat([y.flatten() for y in (normal, total, *gated, turned, pool)]), 1.2)

    def pool(self, dtype: torch.dtype) -> Tensor:
        blocks = -(-(self.tokens + 64) // 64)
        return torch.zeros(2, blocks, 64, self.kv_heads, self.head_dim, dtype=dtype, device="cuda")


def draw_weight(out_features: int, in_features: int, scheme: Scheme, act_order: bool = False) -> QuantizedWeight:
    groups = scheme.num_groups(in_features)
    codes = torch.randint(0, 2**scheme.bits, (out_features, in_features), dtype=torch.uint8, device="cuda")
    if scheme.number == E4M3:
        codes[codes & 0x7F == 0x7F] = 0  # not a number
    scales = (torch.rand(out_features, groups, device="cuda") * 0.02 + 0.005).half()
    zeros = torch.randint(0, 2**scheme.bits, (out_features, groups), dtype=torch.uint8, device="cuda")
    if scheme.symmetric:
        zeros.fill_(scheme.middle_code)
    index = None
    if act_order:
        index = (torch.arange(in_features, device="cuda") // scheme.group_length(in_features))[
            torch.randperm(in_features, device="cuda")
        ]
    return QuantizedWeight(scheme, codes, scales, zeros, index)


@dataclass
class LinearCase:
    batch: int
    out_features: int
    in_features: int
    scheme: Scheme
    dtype: torch.dtype
    act_order: bool = False
    bias: bool = False

    def check(self) -> Outcome:
        weight = draw_weight(self.out_features, self.in_features, self.scheme, self.act_order)
        packed = pack_wna16(weight, self.dtype)
        # A slice of a wider tensor: rows apart, columns together.
        x = torch.randn(self.batch, 2 * self.in_features, device="cuda").to(self.dtype)[:, : self.in_features]
        bias = torch.randn(self.out_features, device="cuda").to(self.dtype) if self.bias else None
        exact = F.linear(x.double(), weight.dequantize().double(), None if bias is None else bias.double())
        # A long batch is multiplied by the weight in the type of x: the weight is rounded too, not the output alone.
        outcome = compare(lambda: wna16_matmul(x, packed, bias), exact, 1.2 if self.batch > 256 else 1.0)
        if self.out_features % 2 == 0:
            gate, up = wna16_matmul(x, packed, bias).chunk(2, dim=1)
            outcome.repeats &= wna16_matmul(x, packed, bias, gated=True).equal(silu_mul(gate, up))
        return outcome


@dataclass
class DenseCase:
    batch: int
    out_features: int
    in_features: int
    dtype: torch.dtype

    def check(self) -> Outcome:
        weight = torch.randn(self.out_features, self.in_features, device="cuda").to(self.dtype)
        x = torch.randn(self.batch, 2 * self.in_features, device="cuda").to(self.dtype)[:, : self.in_features]
        bias = torch.randn(self.out_features, device="cuda").to(self.dtype)
        return compare(lambda: dense_matmul(x, weight, bias), F.linear(x.double(), weight.double(), bias.double()))


@dataclass
class FirstCase:
    """What a step begins with: hidden states of tokens, to the bit, and the angles of positions far apart."""

    tokens: int
    hidden: int
    pairs: int
    dtype: torch.dtype

    def check(self) -> Outcome:
        weight = torch.randn(1000, self.hidden, device="cuda").to(self.dtype)
        token_ids = torch.randint(0, 1000, (self.tokens,), device="cuda", dtype=torch.int32)
        positions = torch.randint(0, 131_072, (self.tokens,), device="cuda", dtype=torch.int32)
        frequencies = torch.logspace(0, -5, self.pairs, device="cuda")
        same = all(
            torch.equal(embedding(token_ids, weight, scale), embedding_reference(token_ids, weight, scale))
            for scale in (1.0, 33.9)
        )
        angles = (positions[:, None, None] * frequencies).double()  # the product is rounded, as everywhere
        exact = torch.cat((angles.cos(), angles.sin())) * 1.5
        outcome = compare(lambda: torch.cat(cos_and_sin(positions, frequencies, 1.5)), exact)
        return replace(outcome, repeats=outcome.repeats and same)


@dataclass
class DrawCase:
    """Tokens, of which there is no error but another token; where noise is nearly equal, rounding may choose."""

    vocabulary: int
    dtype: torch.dtype

    def check(self) -> Outcome:
        logits = (3 * torch.randn(256, self.vocabulary, device="cuda")).to(self.dtype)
        heat = torch.rand(256, device="cuda") * (torch.arange(256, device="cuda") % 4 > 0)
        seeds = torch.randint(0, 2**62, (256,), device="cuda")
        positions = torch.arange(256, device="cuda")
        first, second = (draw_gumbel(logits, heat, seeds, positions) for _ in range(2))
        expected = draw_gumbel_reference(logits, heat, seeds, positions)
        return Outcome((first != expected).float().mean().item(), 0.01, torch.equal(first, second))


@dataclass
class RoutingCase:
    """Experts, order and tiles are those of a CPU; the weights and the sum of the answers nearly."""

    tokens: int
    experts: int
    per_token: int
    dtype: torch.dtype

    def check(self) -> Outcome:
        logits = torch.randn(self.tokens, self.experts, device="cuda")
        weights, chosen = choose(logits, self.per_token, True)
        exact, expected = choose_reference(logits.cpu(), self.per_token, True)
        block_m = block_m_for(chosen.numel(), [], self.experts)
        ours = sort_by_expert(chosen, self.experts, block_m)
        theirs = sort_by_expert_reference(chosen.cpu(), self.experts, block_m)
        wrong = int((chosen.cpu() != expected).sum())
        for part in ("order", "starts", "tile_experts", "tile_starts"):
            wrong += int((getattr(ours, part).cpu() != getattr(theirs, part)).sum())
        wrong += int((weights.cpu() - exact).abs().max() > 1e-6)
        answers = torch.randn(chosen.numel(), 2048, device="cuda").to(self.dtype)
        mixed = torch.einsum("tkw,tk->tw", answers.double().view(self.tokens, self.per_token, -1), weights.double())
        outcome = compare(lambda: combine(answers, weights), mixed)
        return outcome if wrong == 0 else Outcome(math.inf, 0.0, True)


@dataclass
class GroupedCase:
    """The products of all experts; one of them, with half of all tokens, the rest shared out by chance."""

    tokens: int
    experts: int
    per_token: int
    out_features: int
    in_features: int
    scheme: Scheme | None
    dtype: torch.dtype
    gated: bool

    def check(self) -> Outcome:
        logits = torch.randn(self.tokens, self.experts, device="cuda")
        logits[::2, 1] = 9.0
        chosen = choose(logits, self.per_token, True)[1]
        shape = (self.experts * self.out_features, self.in_features)
        drawn = torch.randn(self.tokens if self.gated else chosen.numel(), self.in_features, device="cuda")
        plain = drawn.to(self.dtype)
        x: Tensor | QuantizedRows = plain
        exact_x = plain.double()
        weight: GroupedWeight
        if self.scheme is None:
            weight = torch.randn(shape, device="cuda").to(self.dtype)
            exact_weight = weight.double()
        else:
            codes = draw_weight(*shape, self.scheme)
            exact_weight = codes.dequantize().double()
            if self.scheme.activation_bits == 8:
                weight, rows = pack_w8a8(codes), quantize_rows(plain, self.scheme.number)
                x, exact_x = rows, rows.codes.double() * rows.scales.double()
            else:
                weight = pack_wna16(codes, self.dtype)
        routing = sort_by_expert(chosen, self.experts, block_m_for(chosen.numel(), [weight], self.experts))
        exact = grouped_matmul_reference(exact_x, exact_weight, routing, torch.float64, gated=self.gated)
        outcome = compare(lambda: grouped_matmul(x, weight, routing, self.dtype, gated=self.gated), exact)
        # Gate, up and silu are rounded on the way.
        outcome.tolerance *= 2 if self.gated else 1
        if self.scheme is not None and self.scheme.number == E4M3:
            # The matrix unit's sums have so few bits; gated, they are two, multiplied.
            outcome.tolerance = max(outcome.tolerance, (2 if self.gated else 1) * FP8_TOLERANCE)
        return outcome


def w8a8_scheme(number: str) -> Scheme:
    return Scheme(8, -1, number=number, activation_bits=8)


@dataclass
class RoundedCase:
    """Products of 8-bit activations; those of integers are exact to the last bit before they are scaled."""

    batch: int
    out_features: int
    in_features: int
    number: str
    dtype: torch.dtype
    bias: bool = False

    def check(self) -> Outcome:
        weight = pack_w8a8(draw_weight(self.out_features, self.in_features, w8a8_scheme(self.number)))
        x = quantize_rows(torch.randn(self.batch, self.in_features, device="cuda"), self.number)
        bias = torch.randn(self.out_features, device="cuda").to(self.dtype) if self.bias else None
        sums = x.codes.double() @ weight.codes.double().t()
        if self.number == INT:
            unscaled = QuantizedRows(x.codes, torch.ones_like(x.scales))
            plain = Weight8(weight.codes, torch.ones_like(weight.scales))
            for dtype in {FP32, self.dtype}:
                if not w8a8_matmul(unscaled, plain, None, dtype).equal(sums.to(dtype)):
                    return Outcome(math.inf, 0.0, True)
        exact = sums * x.scales.double() * weight.scales.double() + (0 if bias is None else bias.double())
        outcome = compare(lambda: w8a8_matmul(x, weight, bias, self.dtype), exact)
        if self.number == E4M3:
            kernel, _ = kernel_for(self.batch, self.out_features, self.in_features, self.number)
            by_library = self.dtype == BF16 and kernel is large_kernel
            outcome.tolerance = max(outcome.tolerance, FP8_LIBRARY_TOLERANCE if by_library else FP8_TOLERANCE)
        return outcome


@dataclass
class BetweenCase:
    """From one attention to the next, for batches smaller than it takes too: no further from float64 than 1.2 × the
    kernels one by one are."""

    batch: int
    heads: int
    hidden: int
    inner: int
    qkv: int
    scheme: Scheme | None
    last: bool = False

    def check(self) -> Outcome:
        wide: list[Tensor] = []

        def draw(out_features: int, in_features: int) -> Weight | PackedWeight:
            if self.scheme is None:
                values = torch.randn(out_features, in_features, device="cuda").to(BF16) / 50
                wide.append(values.double())
                return Weight(values, None)
            weight = draw_weight(out_features, in_features, self.scheme)
            wide.append(weight.dequantize().double())
            if self.scheme.activation_bits == 16:
                return pack_wna16(weight, BF16)
            packed = pack_w8a8(weight)
            # The last of 32 MiB: most likely nothing is mapped behind them, so that a read past their end is an error.
            scales = torch.empty(2**23, device="cuda")[-out_features:].copy_(packed.scales)
            return Weight(packed.codes, scales)

        norm, next_norm = (torch.randn(self.hidden, device="cuda").to(BF16) for _ in range(2))
        between = Between(
            draw(self.hidden, self.heads), norm, draw(2 * self.inner, self.hidden), draw(self.hidden, self.inner),
            None if self.last else (next_norm, draw(self.qkv, self.hidden)), 1e-5,
        )  # fmt: skip
        mixed = torch.randn(self.batch, self.heads, device="cuda").to(BF16)
        residual = torch.randn(self.batch, self.hidden, device="cuda").to(BF16)
        assert takes(self.batch, BF16, between)
        exact = residual.double() + mixed.double() @ wide[0].t()
        gate, up = (F.rms_norm(exact, (self.hidden,), norm.double(), 1e-5) @ wide[1].t()).chunk(2, dim=1)
        exact = exact + (F.silu(gate) * up) @ wide[2].t()
        if not self.last:
            exact = torch.cat((exact, F.rms_norm(exact, (self.hidden,), next_norm.double(), 1e-5) @ wide[3].t()), 1)

        def run(kernels: Callable[[Tensor, Tensor, Between], Tensor | None]) -> Tensor:
            total = residual.clone()
            out = kernels(mixed, total, between)
            return total if out is None else torch.cat((total, out), 1)

        error = relative_error(run(megakernel_reference), exact)
        outcome = compare(lambda: run(megakernel), exact)
        return replace(outcome, error=outcome.error / error, tolerance=1.2)


@dataclass
class RowsCase:
    """Rounding to 8 bits, alone and in the pass that computes what is rounded: the codes are those of a CPU."""

    tokens: int
    width: int
    number: str
    dtype: torch.dtype

    def check(self) -> Outcome:
        residual, x = torch.randn(2, self.tokens, self.width, device="cuda").to(self.dtype)
        gate, up = torch.randn(self.tokens, 2 * self.width, device="cuda").to(self.dtype).chunk(2, dim=1)
        weight = torch.randn(self.width, device="cuda").to(self.dtype)
        total = residual.clone()
        normed = add_rms_norm_quantize(residual, x, weight, 1e-5, self.number)
        wrong = int((residual != total.add_(x)).sum())
        for ours, plain in (
            (quantize_rows(up, self.number), up),
            (silu_mul_quantize(gate, up, self.number), silu_mul(gate, up)),
        ):
            exact = quantize_rows_reference(plain.cpu(), self.number)
            wrong += int((ours.codes.cpu().view(torch.uint8) != exact.codes.view(torch.uint8)).sum())
            wrong += int((ours.scales.cpu() != exact.scales).sum())
        # A mean is summed in another order: a few codes may be a step off.
        exact = quantize_rows_reference(add_rms_norm(residual, None, weight, 1e-5), self.number)
        off = (normed.codes.double() * normed.scales - exact.codes.double() * exact.scales).norm()
        error = (off / (exact.codes.double() * exact.scales).norm()).item()
        return Outcome(error if wrong == 0 else math.inf, TOLERANCE[BF16], True)


@dataclass
class AloneCase:
    """With a fixed split, a row's result does not depend on the rest of the batch."""

    def check(self) -> Outcome:
        wrong = 0
        paged = Paged.draw([(1, 3000), (1, 17), (1, 8192), (1, 300)], 32, 8, 128, 64, BF16)
        together = paged.run(split=256)
        for row in range(4):
            alone = paged_attention(
                paged.query[row : row + 1], paged.key_cache, paged.value_cache, paged.block_tables[row : row + 1],
                paged.query_starts[:2], paged.kv_lengths[row : row + 1],
                window=None, max_query_length=1, max_kv_length=8192, split=256,
            )  # fmt: skip
            wrong += int((alone[0] != together[row]).sum())
        packed = pack_wna16(draw_weight(4096, 4096, Scheme()), BF16)
        for few in ((1, 8, 9, 16, 17, 32), (33, 50, 64), (65, 100, 129, 200)):
            x = torch.randn(max(few), 4096, device="cuda", dtype=BF16)
            together = wna16_matmul(x, packed)
            for batch in few:
                wrong += int((wna16_matmul(x[:batch], packed) != together[:batch]).sum())
        for number, batches in ((INT, (1, 8, 16, 17, 64, 65, 257, 400)), (E4M3, (1, 8)), (E4M3, (9, 16, 17, 32, 64))):
            weight = pack_w8a8(draw_weight(4096, 4096, w8a8_scheme(number)))
            rows = quantize_rows(torch.randn(max(batches), 4096, device="cuda"), number)
            together = w8a8_matmul(rows, weight, None, BF16)
            for batch in batches:
                part = QuantizedRows(rows.codes[:batch], rows.scales[:batch])
                wrong += int((w8a8_matmul(part, weight, None, BF16) != together[:batch]).sum())
        return Outcome(float(wrong), 0.0, True)


def draw_grouped(out_features: int, in_features: int, scheme: Scheme | None, dtype: torch.dtype) -> GroupedWeight:
    if scheme is None:
        return torch.randn(out_features, in_features, device="cuda").to(dtype)
    weight = draw_weight(out_features, in_features, scheme)
    return pack_w8a8(weight) if scheme.activation_bits == 8 else pack_wna16(weight, dtype)


@dataclass
class InvariantCase:
    """What --deterministic runs: a row has the same bits in products of any number of rows, and a query in a step of
    any number of its row's tokens."""

    def check(self) -> Outcome:
        wrong = [
            *(self.products(scheme, BF16) for scheme in (Scheme(4), Scheme(4, 32, False), Scheme(8, -1),
                                                         w8a8_scheme(INT), w8a8_scheme(E4M3))),
            *(self.products(None, dtype) for dtype in (BF16, FP16, FP32)),
            *(self.attention(window, softcap) for window in (None, 300) for softcap in (None, 30.0)),
            *(self.experts(scheme) for scheme in (None, Scheme(4), w8a8_scheme(E4M3))),
        ]  # fmt: skip
        return Outcome(float(sum(wrong)), 0.0, True)

    @staticmethod
    def products(scheme: Scheme | None, dtype: torch.dtype) -> int:
        x = torch.randn(1000, 4096, device="cuda").to(dtype)
        weight = draw_grouped(1024, 4096, scheme, dtype)
        rows = quantize_rows(x, weight.number) if isinstance(weight, Weight8) else x
        together = invariant_matmul(rows, weight, None, dtype)
        wrong = 0
        for batch in (1, 8, 16, 17, 32, 33, 64, 65, 128, 129, 400):
            part = QuantizedRows(*(each[:batch] for each in rows)) if isinstance(rows, QuantizedRows) else rows[:batch]
            wrong += int((invariant_matmul(part, weight, None, dtype) != together[:batch]).sum())
        return wrong

    @staticmethod
    def attention(window: int | None, softcap: float | None) -> int:
        lengths = (3000, 17, 8192, 300)
        whole = Paged.draw([(kv, kv) for kv in lengths], 32, 8, 128, 64, BF16)
        together = whole.run(window, softcap=softcap, batch_invariant=True)
        ends = whole.query_starts.tolist()
        wrong = 0
        for queries in (1, 5, 200):
            rows = [(min(queries, kv), kv) for kv in lengths]
            at = torch.cat([torch.arange(end - own, end) for end, (own, _) in zip(ends[1:], rows, strict=True)]).cuda()
            starts = torch.tensor([0] + [own for own, _ in rows]).cumsum(0).int().cuda()
            part = replace(whole, query=whole.query[at], query_starts=starts, rows=rows)
            wrong += int((part.run(window, softcap=softcap, batch_invariant=True) != together[at]).sum())
        return wrong

    @staticmethod
    def experts(scheme: Scheme | None) -> int:
        x, logits = torch.randn(700, 512, device="cuda").to(BF16), torch.randn(700, 8, device="cuda")
        weight = draw_grouped(8 * 256, 512, scheme, BF16)

        def run(tokens: int, gated: bool) -> Tensor:
            chosen = choose(logits[:tokens], 2, True)[1]
            rows = quantize_rows(x[:tokens], weight.number) if isinstance(weight, Weight8) else x[:tokens]
            routing = sort_by_expert(chosen, 8, block_m_for(chosen.numel(), [weight], 8))
            return grouped_matmul(rows, weight, routing, BF16, gated=gated)

        wrong = 0
        for gated in (True, False):
            together = run(700, gated)
            for tokens in (1, 9, 70, 200):
                wrong += int((run(tokens, gated) != together[: 2 * tokens]).sum())
        return wrong


@dataclass
class GraphCase:
    """One CUDA graph, captured with the bucket's bounds, serves steps of other lengths, padding rows among them."""

    def check(self) -> Outcome:
        paged = Paged.draw([(1, 2000), (1, 900), (1, 64), (1, 1)], 32, 8, 128, 64, BF16)
        key, value = torch.randn(2, 4, 8, 128, device="cuda", dtype=BF16)
        slots = torch.zeros(4, dtype=torch.int64, device="cuda")
        paged.key_cache[0], paged.value_cache[0] = 0.0, 0.0

        def step() -> Tensor:
            rope_and_write(paged.query, key, value, unturned(key), paged.key_cache, paged.value_cache, slots)
            return paged_attention(
                paged.query, paged.key_cache, paged.value_cache, paged.block_tables, paged.query_starts,
                paged.kv_lengths, window=None, max_query_length=1, max_kv_length=4096,
            )  # fmt: skip

        step()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = step()
        worst = 0.0
        for lengths in ([2000, 900, 64, 1], [5, 900, 0, 0], [1999, 257, 63, 1]):
            paged.rows = [(1, kv) for kv in lengths]
            paged.kv_lengths.copy_(torch.tensor(lengths))
            last = torch.tensor(lengths) - 1
            block = paged.block_tables.cpu()[torch.arange(4), last.clamp(min=0) // 64]
            slots.copy_(torch.where(last < 0, 0, block.long() * 64 + last % 64))
            out.fill_(NAN)
            graph.replay()
            exact = paged.exact(None)
            worst = max(worst, ((out.double() - exact).norm() / exact.norm()).item())
        return Outcome(worst, TOLERANCE[BF16], True)


def load(folder: Path, device: str, dtype: torch.dtype) -> Decoder:
    return load_decoder(open_source(folder, device, dtype))


def logits(model: Decoder, ids: Tensor) -> Tensor:
    """fp64 [tokens, vocabulary] of ``ids`` [tokens], where the model is."""
    device = model.norm.weight.device
    with torch.inference_mode():
        hidden = model(ids.to(device), torch.arange(len(ids), device=device), CausalAttention(len(ids)))
        return model.logits(hidden).double()


@dataclass
class ModelCase:
    """``demo``, or a tiny model of an architecture: in fp32 transformers' greedy tokens, in bf16 no more than 1.2 ×
    transformers' error in bf16."""

    name: str

    def check(self) -> Outcome:
        from transformers import AutoModelForCausalLM

        with TemporaryDirectory() as temporary:
            folder = demo_folder() / "model" if self.name == DEMO else save_variant(Path(temporary), self.name)
            theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=FP32, attn_implementation="eager").eval().cuda()
            prompts = [torch.randint(0, 250, (1, length), device="cuda") for length in (1, 17, 100, 450)]
            params = SamplingParams(max_tokens=24, temperature=0, ignore_eos=True)
            llm = LLM(str(folder), device="cuda", dtype="float32", options=EngineOptions(kv_cache_memory=2**24))
            answers = llm.generate([prompt[0].tolist() for prompt in prompts], params)
            same = True
            with torch.inference_mode():
                for prompt, answer in zip(prompts, answers, strict=True):
                    whole = theirs.generate(
                        prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=24, do_sample=False,
                        eos_token_id=None, pad_token_id=0,
                    )  # fmt: skip
                    same &= whole[0, prompt.shape[1] :].tolist() == answer.completions[0].token_ids
                ids = prompts[-1]
                exact = theirs(ids).logits[0].double()
                narrow = theirs.to(BF16)(ids).logits[0].double()
            ours = logits(load(folder, "cuda", BF16), ids[0])
        return Outcome(((ours - exact).norm() / (narrow - exact).norm()).item(), 1.2, same)


@dataclass
class SchemeCase:
    """``demo``, quantized: on the GPU each layer's outputs are a CPU's, and the logits. Errors are in units of what is
    allowed: of logits as much as a CPU's differ when its layers' outputs are off by what the order of a sum makes. That
    is most where activations are rounded to 8 bits, some of which it moves to the next code. And in bf16, 1.2 × as much
    as a CPU's are off."""

    settings: dict[str, Any]

    def check(self) -> Outcome:
        text = (demo_folder() / "evaluation.txt").read_text()[:6000]
        ids = torch.tensor(LLM("demo", device="cpu").tokenizer.encode(text)[:450])
        with TemporaryDirectory() as temporary:
            folder = Path(temporary) / "out"
            quantize("demo", folder, device="cpu", **self.settings)
            exact = logits(load(folder, "cpu", FP32), ids)
            layers, number = self.layers(folder, ids)
            by_layer, off = (FP8_TOLERANCE, FP8_TOLERANCE) if number == E4M3 else (TOLERANCE[FP32], 1e-6)
            errors = [layers / by_layer]
            most = max(TOLERANCE[FP32], 1.5 * self.moved(folder, ids, exact, off))
            there = load(folder, "cuda", FP32)
            for rows in (7, len(ids)):  # the fused kernel, and the one that widens the weight first
                errors.append(relative_error(logits(there, ids[:rows]).cpu(), exact[:rows]) / most)
            if number is None:
                ours, theirs = (
                    relative_error(logits(load(folder, where, BF16), ids).cpu(), exact) for where in ("cuda", "cpu")
                )
                errors.append(ours / (1.2 * theirs))
        return Outcome(max(errors), 1.0, True)

    def layers(self, folder: Path, ids: Tensor) -> tuple[float, str | None]:
        """The worst error of a layer that is given what a CPU's is; what the quantized ones' inputs are rounded to."""
        there = dict(load(folder, "cuda", FP32).named_modules())
        here = load(folder, "cpu", FP32)
        worst, numbers = 0.0, set()

        def hold(name: str, layer: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> None:
            nonlocal worst
            x = inputs[0].cuda() if isinstance(inputs[0], Tensor) else QuantizedRows(*(t.cuda() for t in inputs[0]))
            worst = max(worst, relative_error(there[name](x).cpu(), output.double()))
            numbers.add(input_number(layer))

        for name, layer in here.named_modules():
            if isinstance(layer, Linear) and name != "lm_head":
                layer.register_forward_hook(partial(hold, name))
        logits(here, ids)
        (number,) = numbers
        return worst, number

    def moved(self, folder: Path, ids: Tensor, exact: Tensor, off: float) -> float:
        """How far from ``exact`` a CPU's logits are if each layer's outputs are ``off``, relatively, at random."""
        model = load(folder, "cpu", FP32)
        for layer in model.modules():
            if isinstance(layer, Linear):
                layer.register_forward_hook(lambda _, inputs, out: out * (1 + off * torch.randn_like(out)))
        return relative_error(logits(model, ids), exact)


DEMO_SCHEMES: tuple[dict[str, Any], ...] = (
    *({"scheme": name, "method": RTN} for name, preset in PRESETS.items() if RTN in preset.methods),
    *({"scheme": name} for name, preset in PRESETS.items() if RTN not in preset.methods),
    *({"scheme": scheme, "method": RTN} for scheme in (Scheme(4, 32), Scheme(4, -1), Scheme(4, 64, False),
                                                       Scheme(8, 32, False), Scheme(3, 32, False), Scheme(6, 128))),
    {"scheme": "w4a16", "method": RTN, "format": "awq"},
    {"scheme": "w4a16", "method": RTN, "format": "compressed-tensors"},
    {"scheme": "w4a16", "act_order": "dynamic", "format": "gptq", "calibration": Calibration(samples=4, seqlen=256)},
)  # fmt: skip


def all_cases() -> list[Case]:
    cases: list[Case] = []
    mixed = [(1, 1328), (5, 18), (129, 463)]
    decode = [(1, 523), (1, 37), (1, 2011)]
    # The grid of vLLM's unified-attention test.
    for heads, kv_heads in ((4, 4), (8, 2), (5, 1)):
        for head_dim in (128, 256):
            for rows in (mixed, decode):
                for window in (None, 64, 128, 256):
                    cases.append(AttentionCase(rows, heads, kv_heads, head_dim, 16, BF16, window))
    # FlashInfer's batch-decode shapes.
    for batch, lengths in ((12, (54, 97, 512, 16384)), (17, (54, 2048)), (128, (97, 512))):
        for kv in lengths:
            for heads, kv_heads in ((4, 4), (32, 4)):
                cases.append(AttentionCase([(1, kv)] * batch, heads, kv_heads, 128, 16, FP16))
    edges = [(1, kv) for kv in (1, 15, 16, 17, 63, 64, 65, 255, 256, 257, 511, 512, 513, 1024, 1025)] + [(1, 0)]
    chunks = [(1, 1000), (300, 300), (77, 1024), (1, 1), (2, 500), (1, 0), (128, 4096), (64, 64), (33, 97)]
    for block_size in (16, 32, 48, 64, 128):
        for rows in (edges, chunks):
            cases.append(AttentionCase(rows, 8, 2, 128, block_size, BF16))
            cases.append(AttentionCase(rows, 8, 2, 128, block_size, BF16, window=100))
    cases.append(AttentionCase([(5, 40), (30, 30), (1, 70)] * 100, 8, 2, 128, 64, BF16))
    for head_dim in (32, 64, 80, 96, 128, 256):
        cases.append(AttentionCase(chunks, 14, 2, head_dim, 64, BF16))
        for dtype in (BF16, FP16, FP32):
            cases.append(AttentionCase(chunks, 32, 8, head_dim, 64, dtype))
    for dtype in (BF16, FP16):
        cases.append(AttentionCase(chunks + edges, 32, 1, 128, 64, dtype))
        cases.append(AttentionCase([(1, 32768), (1, 32767), (1, 31000), (1, 5)], 32, 8, 128, 64, dtype))
        cases.append(AttentionCase([(256, 32768)], 32, 8, 128, 64, dtype))
        for heads, kv_heads, head_dim in ((32, 8, 128), (28, 4, 128), (24, 8, 128), (16, 2, 64)):  # all prompts
            cases.append(AttentionCase([(1024, 1024), (300, 900), (77, 77)], heads, kv_heads, head_dim, 64, dtype))
        cases.append(AttentionCase([(1, 32768), (200, 20000)], 32, 8, 128, 64, dtype, window=4096))
        cases.append(AttentionCase(chunks, 32, 8, 128, 64, dtype, interleaved=True))
    for split in (128, 256, 512, 1024):
        cases.append(AttentionCase(chunks + edges, 32, 8, 128, 64, BF16, split=split))
        cases.append(AttentionCase(chunks + edges, 32, 8, 128, 64, BF16, window=300, split=split))
    for softcap in (5.0, 50.0):  # Gemma-2's, and one that bends every score; its heads of 256 and windows
        for dtype in (BF16, FP16, FP32):
            for window in (None, 128):
                cases.append(AttentionCase(chunks, 8, 4, 256, 64, dtype, window, scale=0.15, softcap=softcap))
                cases.append(AttentionCase(decode, 8, 4, 256, 64, dtype, window, scale=0.15, softcap=softcap))
    for number in (E4M3, INT):
        for rows in (mixed, decode, edges, chunks, [(1, 1088)] * 128):
            for window in (None, 100):
                cases.append(AttentionCase(rows, 32, 8, 128, 64, BF16, window, loose=True, number=number))
                cases.append(AttentionCase(rows, 8, 2, 128, 16, BF16, window, number=number))
        for dtype in (BF16, FP16, FP32):
            for head_dim in (64, 80, 256):
                cases.append(AttentionCase(chunks, 14, 2, head_dim, 64, dtype, number=number))
        for softcap in (5.0, 50.0):
            cases.append(AttentionCase(chunks, 8, 4, 256, 64, BF16, 128, scale=0.15, softcap=softcap, number=number))
        cases.append(AttentionCase(chunks + edges, 32, 8, 128, 64, BF16, split=256, number=number))
        cases.append(AttentionCase([(1, 32768), (1, 32767), (1, 31000), (1, 5)], 32, 8, 128, 64, BF16, number=number))
        cases.append(AttentionCase([(256, 32768)], 32, 8, 128, 64, BF16, number=number))
        for dtype in (BF16, FP16, FP32):
            for tokens, kv_heads, head_dim in ((1, 8, 128), (300, 3, 64), (7, 2, 80)):
                cases.append(RoundedWriteCase(tokens, kv_heads, head_dim, number, dtype))
    cases.append(AttentionCase([(1, 131072)], 32, 8, 128, 64, BF16))
    cases.append(AttentionCase(chunks, 32, 8, 128, 64, BF16, num_blocks=40000))  # 2.6e9 elements
    for block_size, head_dim, kv_heads, interleaved in ((16, 128, 8, True), (64, 64, 3, False), (48, 80, 2, True)):
        for tokens in (1, 7, 300):
            cases.append(WriteCase(tokens, kv_heads, head_dim, block_size, BF16, 100, interleaved))
    cases.append(WriteCase(33, 8, 128, 64, BF16, 20000, True))  # 2.6e9 elements

    for dtype in (BF16, FP16, FP32):
        cases.append(SmallCase(1, 4096, 32, 8, 128, dtype, False))
        cases.append(SmallCase(67, 2048, 32, 8, 64, dtype, True))
        cases.append(SmallCase(5, 3000, 9, 3, 80, dtype, True))
        cases.append(SmallCase(300, 8192, 64, 8, 128, dtype, True))
        cases.append(SmallCase(67, 3072, 24, 8, 128, dtype, False, rotated=96))
        cases.append(SmallCase(67, 3000, 9, 3, 80, dtype, True, rotated=20, wide=True))
        cases.append(SmallCase(5, 2304, 8, 4, 256, dtype, True, wide=True))
        for lengths in ((1088,), (1, 64, 65, 1000, 3000), (700, *range(1, 128))):
            for kept in (None, INT, E4M3):
                cases.append(FreshCase(lengths, 32, 8, 128, 64, dtype, 128, number=kept))
                cases.append(FreshCase(lengths, 16, 8, 128, 16, dtype, 128, True, number=kept))
                cases.append(FreshCase(lengths, 9, 3, 80, 64, dtype, 20, True, window=100, number=kept))
                cases.append(FreshCase(lengths, 8, 4, 256, 64, dtype, 256, softcap=30.0, number=kept))
                cases.append(FreshCase(lengths, 32, 8, 64, 64, dtype, 64, number=kept))
    # Marlin's batches, then vLLM's Marlin factors, then odd sizes.
    for batch in (1, 2, 3, 4, 8, 12, 16, 24, 32, 48, 64, 118, 128, 152, 256, 257, 1024):
        for bits in (4, 8):
            for dtype in (BF16, FP16):
                cases.append(LinearCase(batch, 512, 1024, Scheme(bits), dtype))
    for m, n, k in ((1, 1, 1), (1, 4, 8), (26, 37, 13), (257, 13, 11)):
        for bits in (4, 8):
            for group in (32, 64, 128, -1):
                for width in (64, 256):
                    cases.append(LinearCase(m, n * width, k * 128, Scheme(bits, group, group == 64), BF16, bias=True))
    for out_features, in_features, group in ((7, 32, 32), (33, 96, 32), (100, 192, 64), (65, 320, 64), (63, 130, -1)):
        for bits in (4, 8):
            for symmetric in (True, False):
                for dtype in (BF16, FP16, FP32):
                    for batch in (1, 20, 70, 300):
                        scheme = Scheme(bits, group, symmetric)
                        cases.append(LinearCase(batch, out_features, in_features, scheme, dtype))
    cases.append(LinearCase(64, 1, 256, Scheme(), FP32))
    # What Hopper has a kernel of its own for.
    for out_features, in_features, group in (
        (40, 128, 128), (1000, 1024, 128), (65, 768, -1), (520, 4096, 128), (25352, 640, 128),
    ):  # fmt: skip
        for batch in (33, 80, 128, 129, 161, 200, 256, 300, 512):
            for dtype in (BF16, FP16):
                scheme = Scheme(4, group, batch == 200)
                cases.append(LinearCase(batch, out_features, in_features, scheme, dtype, bias=batch == 129))
    for batch in (1, 16, 70, 300):
        for dtype in (BF16, FP16, FP32):
            for scheme in (Scheme(2, 32), Scheme(3, 64, False), Scheme(5, 128), Scheme(6, -1, False),
                           Scheme(8, 128, number=E4M3), Scheme(8, -1, number=E4M3), Scheme(8, 0),
                           Scheme(4, 64, number=NF4), Scheme(4, 32, number=FP4)):  # fmt: skip
                cases.append(LinearCase(batch, 200, 1024, scheme, dtype))
    for bits in (4, 8):
        for dtype in (BF16, FP16):
            cases.append(LinearCase(5, 256, 1024, Scheme(bits), dtype, act_order=True))
            cases.append(LinearCase(300, 256, 1024, Scheme(bits, 64, False), dtype, act_order=True, bias=True))
            for out_features, in_features in ((6144, 4096), (4096, 4096), (28672, 4096), (4096, 14336)):
                for batch in (1, 16, 64, 130):
                    cases.append(LinearCase(batch, out_features, in_features, Scheme(bits), dtype))
    for number in (INT, E4M3):
        for dtype in (BF16, FP16, FP32):
            for batch in (1, 5, 9, 16, 17, 32, 33, 64, 65, 128, 200, 257, 1024):
                cases.append(RoundedCase(batch, 512, 1024, number, dtype, bias=batch % 2 == 1))
                cases.append(RoundedCase(batch, 65, 300, number, dtype, bias=batch % 2 == 0))
            cases.append(RoundedCase(300, 200, 208, number, dtype))
            cases.append(RoundedCase(20, 192, 4224, number, dtype))  # an odd number of boxes, split
            for tokens, width in ((1, 64), (7, 300), (3, 14336), (100, 4096), (2, 28672)):
                cases.append(RowsCase(tokens, width, number, dtype))
        for out_features, in_features in ((6144, 4096), (4096, 4096), (28672, 4096), (4096, 14336)):
            for batch in (1, 16, 32, 64, 128, 256, 1000, 4111):
                cases.append(RoundedCase(batch, out_features, in_features, number, BF16))
    for tokens in (1, 7, 130, 3000):
        for experts, per_token in ((8, 2), (128, 8), (60, 4)):
            cases.append(RoutingCase(tokens, experts, per_token, BF16))
    for tokens in (1, 30, 200, 1000, 3000):
        for dtype in (BF16, FP16, FP32):
            for kind in (None, Scheme(4), Scheme(4, 32, False), Scheme(8, -1), Scheme(4, 64, number=NF4),
                         w8a8_scheme(INT), w8a8_scheme(E4M3)):  # fmt: skip
                for gated in (True, False):
                    cases.append(GroupedCase(tokens, 16, 4, 200, 512, kind, dtype, gated))
    for tokens in (1, 32, 128, 1000):
        cases.append(GroupedCase(tokens, 128, 8, 1536, 2048, None, BF16, True))
        cases.append(GroupedCase(tokens, 128, 8, 2048, 768, Scheme(4), BF16, False))
    for kind in (None, Scheme(8, -1), w8a8_scheme(INT)):
        cases.append(GroupedCase(5, 3, 2, 90, 300, kind, BF16, True))
    for rows in (decode, edges, chunks, [(1, 1088)] * 128, [(1, 30_000), *[(1, 70)] * 40]):
        for window in (None, 100):
            cases.append(AttentionCase(rows, 32, 8, 128, 64, BF16, window, loose=True))
    for dtype in (BF16, FP16):
        for batch in (1, 7, 16, 17, 32, 50, 64):
            for out_features, in_features in ((6144, 4096), (28672, 4096), (4096, 14336), (4096, 1024), (1024, 2048),
                                              (1024, 3072), (33, 256)):  # fmt: skip
                cases.append(DenseCase(batch, out_features, in_features, dtype))
        cases += [FirstCase(tokens, 3000, 40, dtype) for tokens in (1, 200)]
        cases += [DrawCase(vocabulary, dtype) for vocabulary in (100, 4096, 128_256, 151_936)]
    for last in (False, True):
        cases += [BetweenCase(batch, 2048, 1024, 3072, 4096, None, last) for batch in (1, 2, 5, 8)]
        for shape in ((4096, 4096, 14336, 6144), (2048, 2048, 6144, 4096)):
            for one in (None, w8a8_scheme(INT), w8a8_scheme(E4M3)):
                cases += [BetweenCase(batch, *shape, one, last) for batch in (1, 2, 5, 8)]
        for inner, symmetric in ((14336, True), (12288, False)):
            scheme = Scheme(symmetric=symmetric)
            cases += [BetweenCase(batch, 4096, 4096, inner, 6144, scheme, last) for batch in (1, 2, 5, 8)]
    cases.append(BetweenCase(1, 4096, 2560, 9728, 6144, None))
    return [
        *map(ModelCase, (DEMO, *VARIANTS)), *map(SchemeCase, DEMO_SCHEMES), *cases, AloneCase(), InvariantCase(),
        GraphCase(),
    ]  # fmt: skip


def run_case(index: int) -> tuple[int, Outcome | str]:
    torch.manual_seed(index)
    try:
        return index, all_cases()[index].check()
    except Exception:
        return index, traceback.format_exc(limit=-3)
    finally:
        torch.cuda.empty_cache()  # the card is shared with other processes, whose kernels may need memory for a stack


def check(match: str) -> bool:
    """Run all cases in whose description ``match`` is, in several processes, for most of the time goes into compiling.
    True if all are well."""
    cases, begun = all_cases(), time.perf_counter()
    chosen = [index for index, case in enumerate(cases) if match in str(case)]
    worst: dict[tuple[str, str], float] = {}
    failed = 0
    with ProcessPoolExecutor(min(16, os.cpu_count() or 1), get_context("spawn")) as pool:
        for index, outcome in pool.map(run_case, chosen, chunksize=4):
            case = cases[index]
            key = (type(case).__name__, str(getattr(case, "dtype", "")).removeprefix("torch."))
            if isinstance(outcome, str) or not outcome.ok:
                failed += 1
                print(f"FAILED {case}\n    {outcome}", flush=True)
            else:
                worst[key] = max(worst.get(key, 0.0), outcome.error)
    print(
        f"{len(chosen) - failed} of {len(chosen)} checks passed in {time.perf_counter() - begun:.0f} s; worst errors:"
    )
    for (name, dtype), error in sorted(worst.items()):
        print(f"    {name:15} {dtype:9} {error:.2e}")
    return failed == 0


def copy_bandwidth() -> float:
    """Bytes a second, read and written, of a copy by a kernel: in a graph a copy may go to a slower engine."""
    source = torch.randn(2**30, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.nbytes / median_seconds(lambda: target.copy_(source), "cuda")


def decode_calls(
    batch: int, context: int, heads: int, kv_heads: int, head_dim: int, block: int, number: str | None = None
) -> list[Paged]:
    size = batch * context * kv_heads * head_dim * 4
    copies = max(1, min(40, 2**30 // size))
    shape = ([(1, context)] * batch, heads, kv_heads, head_dim, block, BF16)
    calls = [Paged.draw(*shape, poisoned=False, number=number) for _ in range(copies)]
    for paged in calls:
        paged.numbers = None  # they would fill the card
    return calls


def time_decode(bandwidth: float) -> None:
    print("\nattention, decode, bf16        batch  context      µs    GB/s   share of copy bandwidth")
    shapes = {
        "32/8 heads of 128": (32, 8, 128, 64),
        "block 16": (32, 8, 128, 16),
        "28/4 heads of 128": (28, 4, 128, 64),
    }
    shapes["32/8 heads of 64"] = (32, 8, 64, 64)
    for name, (heads, kv_heads, head_dim, block) in shapes.items():
        points: Sequence[tuple[int, int]] = ((1, 32768), (32, 1024), (64, 4096))
        if name == "32/8 heads of 128":
            points = ((1, 1024), (1, 8192), (1, 32768), (1, 131072), (8, 1024), (8, 4096), (32, 1024), (32, 4096),
                      (128, 1024), (128, 4096), (256, 1024))  # fmt: skip
        for batch, context in points:
            inputs = decode_calls(batch, context, heads, kv_heads, head_dim, block)
            spent = seconds_each([paged.run for paged in inputs], "cuda")
            rate = batch * context * kv_heads * head_dim * 4 / spent
            print(f"  {name:27} {batch:6} {context:8} {spent * 1e6:7.1f} {rate / 1e9:7.0f} {rate / bandwidth:8.0%}",
                  flush=True)  # fmt: skip
    for number in (E4M3, INT):
        for batch, context in ((128, 1024), (8, 16384), (1, 65536)):
            inputs = decode_calls(batch, context, 32, 8, 128, 64, number)
            spent = seconds_each([paged.run for paged in inputs], "cuda")
            rate = batch * context * 8 * (2 * 128 + 8 * (number == INT)) / spent
            print(f"  32/8 heads of 128, {number:8} {batch:6} {context:8} {spent * 1e6:7.1f} {rate / 1e9:7.0f} "
                  f"{rate / bandwidth:8.0%}", flush=True)  # fmt: skip


def visible(queries: int, kv: int) -> int:
    return sum(range(kv - queries + 1, kv + 1))


def time_prefill() -> None:
    print("\nattention, prefill, bf16, 32/8 heads of 128        ms   TFLOP/s   PyTorch's flash on contiguous keys")
    chats = [(1024, 1024)] * 8
    for rows in (chats, [(4096, 4096)], [(2048, 2048)] * 4, [(512, 8192)], [(2048, 32768)], [(16384, 16384)]):
        paged = Paged.draw(rows, 32, 8, 128, 64, BF16, poisoned=False)
        operations = 4 * 128 * 32 * sum(visible(*row) for row in rows)
        spent = seconds_each([paged.run] * 2, "cuda")
        other = ""
        if rows[0][0] == rows[0][1]:
            q, k, v = (torch.randn(len(rows), h, rows[0][0], 128, device="cuda", dtype=BF16) for h in (32, 8, 8))
            attend = partial(F.scaled_dot_product_attention, q, k, v, is_causal=True, enable_gqa=True)
            flash = seconds_each([attend] * 2, "cuda")
            other = f"{operations / flash / 1e12:9.0f}"
        name = f"{len(rows)} × {rows[0][0]} queries, {rows[0][1]} keys"
        print(f"  {name:44} {spent * 1e3:7.2f} {operations / spent / 1e12:9.0f} {other}", flush=True)


def time_small() -> None:
    print("\nbetween the products, bf16, 8B shapes       tokens   kernel µs   plain PyTorch µs")
    for tokens in (1, 64, 2048):
        residual, x = torch.randn(2, tokens, 4096, device="cuda", dtype=BF16)
        weight = torch.randn(4096, device="cuda", dtype=BF16)
        gate, up = torch.randn(tokens, 28672, device="cuda", dtype=BF16).chunk(2, dim=1)
        parts = torch.randn(tokens, 48, 128, device="cuda", dtype=BF16).tensor_split([32, 40], dim=1)
        rotation = tuple(torch.randn(2, tokens, 1, 64, device="cuda"))
        pool = torch.zeros(2, 64, 64, 8, 128, device="cuda", dtype=BF16)
        rope = (*parts, rotation, pool[0], pool[1], torch.arange(tokens, device="cuda"))
        pairs: dict[str, tuple[Callable[..., object], Callable[..., object], tuple[object, ...]]] = {
            "add_rms_norm": (add_rms_norm, add_rms_norm_reference, (residual, x, weight, 1e-5)),
            "silu_mul": (silu_mul, silu_mul_reference, (gate, up)),
            "rope_and_write": (rope_and_write, rope_and_write_reference, rope),
        }
        for name, (kernel, plain, arguments) in pairs.items():
            ours, theirs = (seconds_each([partial(run, *arguments)] * 20, "cuda") for run in (kernel, plain))
            print(f"  {name:41} {tokens:6} {ours * 1e6:11.1f} {theirs * 1e6:18.1f}", flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checks", action="store_true", help="the checks alone")
    parser.add_argument("--speed", action="store_true", help="the timings alone")
    parser.add_argument("--match", default="", help="only the checks in whose description this is: number='e4m3'")
    options = parser.parse_args()
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}")
    well = options.speed or check(options.match)
    if not options.checks:
        torch.manual_seed(0)
        bandwidth = copy_bandwidth()
        print(f"\ncopy bandwidth {bandwidth / 1e9:.0f} GB/s, read and written")
        time_decode(bandwidth)
        time_prefill()
        time_small()
    return 0 if well else 1


if __name__ == "__main__":
    sys.exit(main())
