"""The kernels' PyTorch references against the plainest loops, in float64."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rounded_caches import empty_cache, rounded_caches
from torch import Tensor

from llmq.checkpoint.quantized_weight import QuantizedWeight
from llmq.runtime.kernels.attention import paged_attention_reference
from llmq.runtime.kernels.gelu import gelu_mul
from llmq.runtime.kernels.kv_write import read_pages, write_kv
from llmq.runtime.kernels.norm import add_rms_norm, add_rms_norm_quantize
from llmq.runtime.kernels.quantize_rows import LARGEST, quantize_rows
from llmq.runtime.kernels.rope import rope_and_write
from llmq.runtime.kernels.silu import silu_mul, silu_mul_quantize
from llmq.runtime.kernels.wna16 import pack_wna16, wna16_matmul_reference
from llmq.scheme import E4M3, INT, Scheme

Rows = list[tuple[int, int]]  # (queries, tokens in the cache) of each row


def draw_paged(rows: Rows, heads: int, kv_heads: int, head_dim: int, block_size: int) -> tuple[Tensor, ...]:
    """Arguments of paged_attention, with NaN in the cache wherever no row has a token."""
    counts = [-(-kv // block_size) for _, kv in rows]
    blocks = torch.randperm(sum(counts)) + 1
    tables = torch.zeros(len(rows), max([*counts, 1]), dtype=torch.int32)
    caches = torch.full((2, sum(counts) + 1, block_size, kv_heads, head_dim), math.nan, dtype=torch.float64)
    taken = 0
    for row, (count, (_, kv)) in enumerate(zip(counts, rows, strict=True)):
        tables[row, :count] = blocks[taken : taken + count]
        taken += count
        for position in range(kv):
            block = tables[row, position // block_size]
            caches[:, block, position % block_size] = torch.randn(2, kv_heads, head_dim, dtype=torch.float64)
    starts = torch.tensor([0] + [queries for queries, _ in rows]).cumsum(0).int()
    query = torch.randn(int(starts[-1]), heads, head_dim, dtype=torch.float64)
    return query, caches[0], caches[1], tables, starts, torch.tensor([kv for _, kv in rows], dtype=torch.int32)


def attention_by_loops(
    arguments: tuple[Tensor, ...], window: int | None, scale: float | None = None, softcap: float | None = None
) -> Tensor:
    query, keys, values, tables, starts, lengths = arguments
    block_size, group = keys.shape[1], query.shape[1] // keys.shape[2]
    out = torch.zeros_like(query)
    for row in range(len(lengths)):
        for token in range(int(starts[row]), int(starts[row + 1])):
            position = int(lengths[row]) - int(starts[row + 1]) + token
            seen = [p for p in range(position + 1) if window is None or p > position - window]
            for head in range(query.shape[1] if seen else 0):
                at = [(tables[row, p // block_size], p % block_size, head // group) for p in seen]
                key, value = (torch.stack([cache[place] for place in at]) for cache in (keys, values))
                scores = key @ query[token, head] * (1 / math.sqrt(query.shape[2]) if scale is None else scale)
                weights = (scores if softcap is None else softcap * (scores / softcap).tanh()).softmax(0)
                out[token, head] = weights @ value
    return out


def close(got: Tensor, expected: Tensor) -> bool:
    return bool((got - expected).norm() <= 1e-12 * expected.norm())


a_row = st.integers(0, 21).flatmap(lambda kv: st.tuples(st.integers(min(kv, 1), max(kv, 1)), st.just(kv)))


@settings(deadline=None, max_examples=30)
@given(
    rows=st.lists(a_row, min_size=1, max_size=6),
    heads=st.sampled_from([(4, 4), (4, 2), (3, 1)]),
    block_size=st.sampled_from([4, 7, 16]),
    window=st.sampled_from([None, 1, 5]),
    scale=st.sampled_from([None, 0.5]),
    softcap=st.sampled_from([None, 2.0]),
)
def test_attention_is_the_softmax_over_the_positions_seen(
    rows: Rows,
    heads: tuple[int, int],
    block_size: int,
    window: int | None,
    scale: float | None,
    softcap: float | None,
) -> None:
    torch.manual_seed(0)
    arguments = draw_paged(rows, *heads, 8, block_size)
    bounds: dict[str, Any] = {"max_query_length": max(q for q, _ in rows), "max_kv_length": max(kv for _, kv in rows)}
    out = paged_attention_reference(*arguments, window=window, scale=scale, softcap=softcap, **bounds)
    assert close(out, attention_by_loops(arguments, window, scale, softcap))


@pytest.mark.parametrize("number", [INT, E4M3])
def test_attention_over_8_bits_is_that_over_the_numbers_they_stand_for(number: str) -> None:
    torch.manual_seed(0)
    rows = [(1, 9), (3, 7), (5, 5)]
    query, keys, values, *tables = draw_paged(rows, 4, 2, 8, 4)
    codes, scales, numbers = rounded_caches((keys, values), number)
    bounds: dict[str, Any] = {"max_query_length": 5, "max_kv_length": 9}
    out = paged_attention_reference(query, *codes, *tables, window=None, scales=scales, **bounds)
    assert close(out, attention_by_loops((query, *numbers, *tables), None))


def test_a_row_of_length_zero_is_padding_and_its_output_zero() -> None:
    arguments = draw_paged([(1, 0), (1, 3)], 2, 1, 8, 4)
    out = paged_attention_reference(*arguments, window=None, max_query_length=1, max_kv_length=3)
    assert out[0].eq(0).all()
    assert out[1].ne(0).any()


@pytest.mark.parametrize("interleaved", [False, True])
def test_keys_and_values_land_in_their_slots_and_nowhere_else(interleaved: bool) -> None:
    pool = torch.zeros(5, 2, 4, 3, 8)
    key_cache, value_cache = (pool[:, 0], pool[:, 1]) if interleaved else torch.zeros(2, 5, 4, 3, 8)
    key, value = torch.randn(2, 6, 3, 8)
    slots = torch.tensor([19, 4, 5, 6, 7, 8])
    write_kv(key, value, key_cache, value_cache, slots)
    for token, slot in enumerate(slots.tolist()):
        assert key_cache[slot // 4, slot % 4].equal(key[token])
        assert value_cache[slot // 4, slot % 4].equal(value[token])
    assert key_cache.count_nonzero() == key.count_nonzero()


@pytest.mark.parametrize(("number", "most"), [(INT, 1 / 254), (E4M3, 1 / 16)])
def test_a_rounded_key_is_off_by_half_a_step_at_most(number: str, most: float) -> None:
    """Of a head of a token: a step of int8 is a 127th of its largest, one of e4m3 an eighth of the number itself."""
    cache, scales = empty_cache(number, 3, 4, 2, 8)
    key, value = torch.randn(2, 5, 2, 8) * torch.logspace(-2, 0, 5)[:, None, None]
    slots = torch.tensor([11, 4, 5, 6, 7])
    write_kv(key, value, cache[0], cache[1], slots, scales)
    for x, codes, scale in zip((key, value), cache, scales, strict=True):
        kept = read_pages(codes, scale, torch.arange(3), torch.float32)
        of = x.abs().amax(-1, keepdim=True) if number == INT else x.abs().clamp_min(2**-6 * float(scale))
        assert ((kept.flatten(0, 1)[slots] - x).abs() <= most * 1.001 * of).all()
        assert kept.count_nonzero() <= x.numel()


def test_numbers_beyond_the_range_of_e4m3_become_its_largest() -> None:
    cache, scales = empty_cache(E4M3, 1, 4, 1, 2)
    key, value = torch.tensor([[[7.0, -1e9]]]), torch.zeros(1, 1, 2)
    write_kv(key, value, cache[0], cache[1], torch.tensor([2]), scales)
    assert cache[0, 0, 2, 0].float().tolist() == [448.0, -448.0]


def draw_weight(shape: tuple[int, int], scheme: Scheme, *, act_order: bool = False) -> QuantizedWeight:
    groups = scheme.num_groups(shape[1])
    codes = torch.randint(0, 2**scheme.bits, shape, dtype=torch.uint8)
    if scheme.number == E4M3:
        codes[codes & 0x7F == 0x7F] = 0  # not a number
    zeros = torch.randint(0, 2**scheme.bits, (shape[0], groups), dtype=torch.uint8)
    if scheme.symmetric:
        zeros.fill_(scheme.middle_code)
    index = torch.arange(shape[1]) // scheme.group_length(shape[1])
    return QuantizedWeight(
        scheme,
        codes,
        (torch.rand(shape[0], groups) / 50 + 0.005).half(),
        zeros,
        index[torch.randperm(shape[1])] if act_order else None,
    )


@settings(deadline=None, max_examples=60)
@given(
    bits=st.sampled_from([4, 8]),
    group=st.sampled_from([32, 64, 128, -1]),
    groups=st.integers(1, 5),
    out_features=st.integers(1, 9),
    symmetric=st.booleans(),
    act_order=st.booleans(),
)
def test_a_packed_weight_multiplies_as_the_weight_it_was_packed_from(
    bits: int, group: int, groups: int, out_features: int, symmetric: bool, act_order: bool
) -> None:
    torch.manual_seed(0)
    in_features = groups * (group if group > 0 else 37)
    weight = draw_weight((out_features, in_features), Scheme(bits, group, symmetric), act_order=act_order)
    packed = pack_wna16(weight, torch.float64)
    assert packed.out_features == out_features
    x, bias = torch.randn(3, in_features).double(), torch.randn(out_features).double()
    expected = x @ weight.dequantize().double().t() + bias
    assert (wna16_matmul_reference(x, packed, bias) - expected).norm() <= 1e-6 * expected.norm()
    codes, scales, zeros = packed.unpack()
    order = slice(None) if packed.order is None else packed.order
    assert codes.equal(weight.codes[:, order])
    assert scales.equal(weight.scales)
    assert zeros.equal(weight.zero_points)


def test_a_packed_weight_takes_bits_a_weight_and_four_bytes_a_group() -> None:
    packed = pack_wna16(draw_weight((64, 1024), Scheme(4, 128)), torch.bfloat16)
    assert packed.words.nbytes == 64 * 1024 // 2
    assert packed.meta.nbytes == 64 * 8 * 4


def test_scales_that_are_bf16_stay_bf16() -> None:
    weight = draw_weight((8, 64), Scheme(4, 32))
    wide = QuantizedWeight(weight.scheme, weight.codes, weight.scales.bfloat16(), weight.zero_points)
    assert pack_wna16(wide, torch.float16).unpack()[1].equal(wide.scales)


def test_groups_of_unequal_length_are_refused() -> None:
    weight = draw_weight((4, 64), Scheme(4, 32))
    index = torch.tensor([0] * 40 + [1] * 24)
    uneven = QuantizedWeight(weight.scheme, weight.codes, weight.scales, weight.zero_points, index)
    with pytest.raises(ValueError, match="groups"):
        pack_wna16(uneven, torch.float16)


def test_add_rms_norm_leaves_the_sum_and_returns_it_with_mean_square_one() -> None:
    residual, x = torch.randn(2, 5, 64, dtype=torch.float64)
    total = residual + x
    out = add_rms_norm(residual, x, torch.full((64,), 2.0, dtype=torch.float64), 0.0)
    assert residual.equal(total)
    assert close(out.square().mean(-1), torch.full((5,), 4.0, dtype=torch.float64))
    assert close(out / out[:, :1], total / total[:, :1])
    assert add_rms_norm(residual, None, torch.ones(64), 0.0).equal(out / 2)


def test_silu_mul_gates() -> None:
    gate, up = torch.tensor([[-100.0, 0.0, 100.0]]), torch.tensor([[5.0, 6.0, 7.0]])
    assert silu_mul(gate, up).equal(torch.tensor([[0.0, 0.0, 700.0]]))


@pytest.mark.parametrize(("number", "most"), [(INT, 0.5), (E4M3, 16.0)])
def test_a_quantized_row_is_off_by_half_a_step_and_its_largest_is_exact(number: str, most: float) -> None:
    """A step of e4m3 is widest at the top: 32."""
    x = torch.randn(7, 300, dtype=torch.float64) * torch.logspace(-3, 3, 7, dtype=torch.float64)[:, None]
    codes, scales = quantize_rows(x, number)
    assert scales.shape == (7, 1)
    assert codes.double().abs().amax(-1).eq(LARGEST[number]).all()
    assert ((codes.double() - x / scales.double()).abs() <= most + 1e-4).all()


@pytest.mark.parametrize("number", [INT, E4M3])
def test_a_row_of_zeros_stays_zero(number: str) -> None:
    codes, scales = quantize_rows(torch.zeros(2, 8), number)
    assert codes.float().eq(0).all()
    assert scales.gt(0).all()


@pytest.mark.parametrize("number", [INT, E4M3])
def test_quantizing_in_the_same_pass_changes_nothing(number: str) -> None:
    residual, x, weight = torch.randn(3, 64), torch.randn(3, 64), torch.randn(64)
    total = residual.clone()
    for ours, theirs in zip(
        add_rms_norm_quantize(residual, x, weight, 1e-5, number),
        quantize_rows(add_rms_norm(total, x, weight, 1e-5), number),
        strict=True,
    ):
        assert ours.view(torch.uint8).equal(theirs.view(torch.uint8))
    assert residual.equal(total)
    for ours, theirs in zip(
        silu_mul_quantize(residual, x, number), quantize_rows(silu_mul(residual, x), number), strict=True
    ):
        assert ours.view(torch.uint8).equal(theirs.view(torch.uint8))


def test_gelu_mul_gates() -> None:
    gate, up = torch.tensor([[-100.0, 0.0, 100.0]]), torch.tensor([[5.0, 6.0, 7.0]])
    assert gelu_mul(gate, up).equal(torch.tensor([[0.0, 0.0, 700.0]]))


def test_a_norm_s_fp32_weight_is_not_rounded_before_it_multiplies() -> None:
    x, weight = torch.randn(5, 64).bfloat16(), 1 + torch.randn(64) / 1000
    exact = add_rms_norm(x.double(), None, weight.double(), 1e-6)
    out = add_rms_norm(x.clone(), None, weight, 1e-6)
    assert out.dtype == torch.bfloat16
    assert out.equal(exact.float().bfloat16())


def test_rope_leaves_the_channels_past_the_rotated_ones_as_they_are() -> None:
    query, key, value = torch.randn(3, 4, 2, 8)
    angles, slots = torch.randn(4, 1, 2), torch.tensor([4, 5, 11, 8])
    rotation = (angles.cos(), angles.sin())
    caches, part = torch.zeros(2, 3, 4, 2, 8), torch.zeros(2, 3, 4, 2, 4)
    out = rope_and_write(query, key, value, rotation, caches[0], caches[1], slots)
    turned = rope_and_write(query[..., :4], key[..., :4], value[..., :4], rotation, part[0], part[1], slots)
    assert out.equal(torch.cat((turned, query[..., 4:]), -1))
    assert caches[0].flatten(0, 1)[slots].equal(torch.cat((part[0].flatten(0, 1)[slots], key[..., 4:]), -1))


def test_rope_turns_pairs_as_complex_numbers_and_writes_key_and_value() -> None:
    query, key, value = torch.randn(3, 4, 2, 8, dtype=torch.float64)
    angles = torch.randn(4, 1, 4, dtype=torch.float64)
    caches = torch.zeros(2, 3, 4, 2, 8, dtype=torch.float64)
    slots = torch.tensor([4, 5, 11, 8])
    out = rope_and_write(query, key, value, (angles.cos(), angles.sin()), caches[0], caches[1], slots)
    for x, turned in ((query, out), (key, caches[0].flatten(0, 1)[slots])):
        complex_x = torch.complex(x[..., :4], x[..., 4:]) * torch.polar(torch.ones_like(angles), angles)
        assert close(turned, torch.cat((complex_x.real, complex_x.imag), -1))
    assert caches[1].flatten(0, 1)[slots].equal(value)
