"""The kernels for Hopper alone, which are written in Gluon, against their references, on a CPU: see
``gluon_interpreter``."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from unittest import mock

import pytest
import torch
from test_kernels_reference import Rows, draw_paged, draw_weight
from torch import Tensor
from torch.nn import functional as F

pytest.importorskip("triton")

import gluon_interpreter
from gluon_interpreter import interpreted, value

from llmq.runtime.kernels import (
    attention_hopper_triton,
    megakernel,
    megakernel_triton,
    quantize_rows_triton,
    silu_triton,
    skinny_hopper_triton,
    split_k_triton,
    w8a8_hopper_triton,
    wna16_hopper_triton,
)
from llmq.runtime.kernels.attention import paged_attention_reference
from llmq.runtime.kernels.megakernel import Between, Weight, megakernel_reference
from llmq.runtime.kernels.quantize_rows import quantize_rows
from llmq.runtime.kernels.split_k_triton import Launch
from llmq.runtime.kernels.w8a8 import pack_w8a8
from llmq.runtime.kernels.wna16 import PackedWeight, pack_wna16, wna16_matmul_reference
from llmq.scheme import E4M3, INT, Scheme

TOLERANCE = {torch.bfloat16: 2.5e-3, torch.float16: 4e-4}
WEIGHTS = ("at_weight", "weight_scales", "at_words", "meta", "bias")


def error(out: Tensor, exact: Tensor) -> float:
    return float((out.double() - exact.double()).norm() / exact.double().norm())


def scheme_of_8_bits(number: str) -> Scheme:
    return Scheme(8, -1, number=number, activation_bits=8)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(
    ("rows", "out_features", "in_features", "launch"),
    [
        (20, 96, 512, Launch(32, 64, 4, 3, 4)),
        (70, 200, 768, Launch(64, 128, 4, 4, 2)),
        (1, 7, 64, Launch(16, 64, 4, 4, 1)),
    ],
)
def test_products_of_few_rows(
    rows: int, out_features: int, in_features: int, launch: Launch, dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    x, weight, bias = (
        torch.randn(*shape).to(dtype) for shape in ((rows, in_features), (out_features, in_features), (out_features,))
    )
    with interpreted({"skinny_kernel": skinny_hopper_triton, "reduce_kernel": split_k_triton}, WEIGHTS):
        out = skinny_hopper_triton.skinny_matmul(x, weight, None, None, bias, dtype, launch)
    assert error(out, x.double() @ weight.double().t() + bias) <= TOLERANCE[dtype]


@pytest.mark.parametrize("number", [INT, E4M3])
@pytest.mark.parametrize(
    ("rows", "out_features", "in_features", "launch"),
    [
        (20, 96, 512, Launch(32, 64, 4, 3, 8)),
        (5, 64, 640, Launch(16, 128, 8, 4, 2, 2)),
        (130, 200, 1024, Launch(128, 64, 4, 4, 2)),
    ],
)
def test_products_of_few_rows_in_8_bits(
    rows: int, out_features: int, in_features: int, launch: Launch, number: str
) -> None:
    torch.manual_seed(0)
    weight = pack_w8a8(draw_weight((out_features, in_features), scheme_of_8_bits(number)))
    x = quantize_rows(torch.randn(rows, in_features), number)
    exact = (x.codes.double() @ weight.codes.double().t()) * x.scales.double() * weight.scales.double()
    with interpreted({"skinny_kernel": skinny_hopper_triton, "reduce_kernel": split_k_triton}, WEIGHTS):
        out = skinny_hopper_triton.skinny_matmul(
            x.codes, weight.codes, x.scales, weight.scales, None, torch.float32, launch
        )  # fmt: skip
    assert error(out, exact) <= 1e-6


@pytest.mark.parametrize("launch", [w8a8_hopper_triton.TWO, w8a8_hopper_triton.THREE])
@pytest.mark.parametrize(
    ("rows", "out_features", "in_features", "programs"), [(300, 528, 272, 3), (400, 272, 640, 2), (257, 16, 128, 5)]
)
def test_products_of_many_rows_in_8_bits(
    rows: int, out_features: int, in_features: int, programs: int, launch: w8a8_hopper_triton.Launch
) -> None:
    torch.manual_seed(0)
    weight = pack_w8a8(draw_weight((out_features, in_features), scheme_of_8_bits(INT)))
    x = quantize_rows(torch.randn(rows, in_features), INT)
    bias = torch.randn(out_features).bfloat16() if launch is w8a8_hopper_triton.TWO else None
    exact = (x.codes.double() @ weight.codes.double().t()) * x.scales.double() * weight.scales.double()
    with (
        mock.patch.object(w8a8_hopper_triton, "multiprocessors", return_value=programs),
        mock.patch.object(w8a8_hopper_triton, "launch_for", return_value=launch),
        interpreted({"w8a8_hopper_kernel": w8a8_hopper_triton}, WEIGHTS),
    ):
        out = w8a8_hopper_triton.w8a8_matmul_hopper(x, weight, bias, torch.bfloat16)
    assert error(out, exact if bias is None else exact + bias) <= TOLERANCE[torch.bfloat16]


def unpacked(planes: tuple[int, int], magic: int, dtype: torch.dtype) -> Callable[[Tensor, Tensor], tuple[Tensor, ...]]:
    """What ``unpack_asm`` does to words of 16 bits: a number of ``dtype`` that ends in a code, plus the offset."""

    def run(words: Tensor, offsets: Tensor) -> tuple[Tensor, ...]:
        codes = (((words.int() >> 4 * plane) & 15 | magic).to(torch.int16) for plane in planes)
        return tuple(value(code.view(dtype) + offsets.view(dtype)) for code in codes)

    return run


UNPACKED = {
    wna16_hopper_triton.LOW_BF16.value: unpacked((0, 1), 0x4300, torch.bfloat16),
    wna16_hopper_triton.HIGH_BF16.value: unpacked((2, 3), 0x4300, torch.bfloat16),
    wna16_hopper_triton.LOW_FP16.value: unpacked((0, 1), 0x6400, torch.float16),
    wna16_hopper_triton.HIGH_FP16.value: unpacked((2, 3), 0x6400, torch.float16),
}


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(
    ("rows", "out_features", "in_features", "scheme"),
    [
        (40, 130, 512, Scheme(4)),
        (100, 300, 768, Scheme(4, 128, False)),
        (161, 200, 1024, Scheme(4, -1)),
        (300, 140, 512, Scheme(4)),
    ],
)
def test_packed_products_of_many_rows(
    rows: int, out_features: int, in_features: int, scheme: Scheme, dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    packed = pack_wna16(draw_weight((out_features, in_features), scheme), dtype)
    x, bias = torch.randn(rows, in_features).to(dtype), torch.randn(out_features).to(dtype)
    exact = wna16_matmul_reference(x.double(), packed, bias.double())
    kernels = {"wna16_hopper_kernel": wna16_hopper_triton, "reduce_kernel": split_k_triton}
    with interpreted(kernels, WEIGHTS, UNPACKED):
        out = wna16_hopper_triton.wna16_matmul_hopper(x, packed, bias)
    assert error(out, exact) <= TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(
    ("rows", "heads", "block_size", "programs"),
    [
        ([(300, 300), (1, 70), (77, 200)], (8, 2), 64, 3),
        ([(130, 470), (40, 40), (0, 5)], (4, 1), 16, 2),
        ([(33, 97), (200, 333)], (6, 2), 128, 4),
    ],
)
def test_attention_of_prompts(
    rows: Rows, heads: tuple[int, int], block_size: int, programs: int, dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    few, (query, keys, values, *tables) = 4, draw_paged(rows, *heads, 128, block_size)
    narrow = [x.to(dtype) for x in (query, keys, values)]
    bounds = {"max_query_length": max(q for q, _ in rows), "max_kv_length": max(kv for _, kv in rows)}
    exact = paged_attention_reference(*(x.double() for x in narrow), *tables, window=None, **bounds)
    out = torch.full_like(narrow[0], math.nan)
    settle = {attention_hopper_triton.SETTLE.value: lambda x: x}
    tables_of_step = ("block_tables", "query_starts", "kv_lengths")
    with (
        mock.patch.object(attention_hopper_triton, "multiprocessors", return_value=programs),
        interpreted({"attention_hopper_kernel": attention_hopper_triton}, tables_of_step, settle),
    ):
        attention_hopper_triton.attend_hopper(
            *narrow, *tables, out, few_queries=few, scale=math.log2(math.e) / math.sqrt(128)
        )
    many = torch.cat([torch.full((queries,), queries > few) for queries, _ in rows])
    assert error(out[many], exact[many]) <= TOLERANCE[dtype]
    assert out[~many].isnan().all()


def codes_of(words: Tensor) -> tuple[Tensor, ...]:
    """What ``UNPACK`` of the megakernel does to words of 16 bits: codes as subnormal numbers."""
    parts = (words.int() & 0x0F, words.int() & 0xF0, words.int() >> 8 & 0x0F, words.int() >> 8 & 0xF0)
    return tuple(value(part.to(torch.int16).view(torch.bfloat16)) for part in parts)


BETWEEN = {
    megakernel_triton.UNPACK.value: codes_of,
    silu_triton.SILU.value: F.silu,
    quantize_rows_triton.ROUND.value: lambda x: value((x + 12582912.0).view(torch.int32)),
}
BETWEEN_WEIGHTS = (
    "o", "o_scales", "norm", "gate_up", "gate_up_scales", "down", "down_scales", "next_norm", "qkv", "qkv_scales"
)  # fmt: skip


def draw_between(heads: int, hidden: int, inner: int, qkv: int | None, scheme: Scheme | None) -> Between:
    def draw(out_features: int, in_features: int) -> Weight | PackedWeight:
        if scheme is None:
            return Weight((torch.randn(out_features, in_features) / math.sqrt(in_features)).bfloat16(), None)
        weight = draw_weight((out_features, in_features), scheme)
        weight = replace(weight, scales=(weight.scales / math.sqrt(in_features) / 3).to(weight.scales.dtype))
        if scheme.activation_bits == 16:
            return pack_wna16(weight, torch.bfloat16)
        packed = pack_w8a8(weight)
        return Weight(packed.codes, packed.scales)

    norm = torch.rand(hidden).bfloat16()
    following = None if qkv is None else (norm, draw(qkv, hidden))
    return Between(draw(hidden, heads), norm, draw(2 * inner, hidden), draw(hidden, inner), following, 1e-5)


@contextmanager
def programs_at_once(number: int) -> Iterator[None]:
    """The megakernel on a card of so many multiprocessors."""
    with (
        mock.patch.object(megakernel, "PROGRAMS", number),
        mock.patch.object(megakernel_triton, "PROGRAMS", number),
        mock.patch.object(megakernel, "has_room", return_value=True),
        interpreted({"megakernel": megakernel_triton}, BETWEEN_WEIGHTS, BETWEEN, together=True),
    ):
        megakernel_triton.ticket.cache_clear()
        yield
    megakernel_triton.ticket.cache_clear()


@pytest.mark.parametrize(
    ("scheme", "heads", "hidden", "inner", "qkv"),
    [
        (None, 1024, 512, 4096, 768),
        (None, 1024, 512, 4096, None),
        (scheme_of_8_bits(INT), 2048, 1024, 6144, 1152),
        (scheme_of_8_bits(E4M3), 2048, 1024, 6144, 1152),
        pytest.param(Scheme(4), 4096, 2048, 8192, 4096, marks=pytest.mark.slow),
    ],
    ids=str,
)
@pytest.mark.parametrize("rows", [1, 5])
def test_from_one_attention_to_the_next(
    rows: int, scheme: Scheme | None, heads: int, hidden: int, inner: int, qkv: int | None
) -> None:
    torch.manual_seed(0)
    between = draw_between(heads, hidden, inner, qkv, scheme)
    mixed, residual = torch.randn(rows, heads).bfloat16(), torch.randn(rows, hidden).bfloat16()
    expected_residual = residual.clone()
    expected = megakernel_reference(mixed, expected_residual, between)
    with programs_at_once(hidden // 32):
        assert megakernel.takes(rows, torch.bfloat16, between)
        out = megakernel_triton.megakernel_triton(mixed, residual, between)
    # Where rows are rounded together, the scale is known before the norm's roundings are: a few codes are a step off.
    most = {INT: 2e-2, E4M3: 5e-2}.get(between.number or "", 1e-3) if rows > 1 else 1e-3
    assert error(residual, expected_residual) <= most
    assert (out is None) == (expected is None) == (qkv is None)
    if out is not None and expected is not None:
        assert error(out, expected) <= most


def product(constants: tuple[str, ...] = WEIGHTS, missing_scales: int = 0) -> float:
    """The error of a product of 8 bits."""
    torch.manual_seed(0)
    weight = pack_w8a8(draw_weight((96, 1024), scheme_of_8_bits(INT)))
    x = quantize_rows(torch.randn(20, 1024), INT)
    exact = (x.codes.double() @ weight.codes.double().t()) * x.scales.double() * weight.scales.double()
    scales = weight.scales[: len(weight.scales) - missing_scales]
    with interpreted({"skinny_kernel": skinny_hopper_triton}, constants):
        out = skinny_hopper_triton.skinny_matmul(
            x.codes, weight.codes, x.scales, scales, None, torch.float32, Launch(32, 64, 4, 3, 1)
        )  # fmt: skip
    return error(out, exact)


class TestWhatACardMayDoShows:
    def test_as_it_is_the_product_is_right(self) -> None:
        assert product() <= 1e-6

    def test_who_does_not_wait(self) -> None:
        with mock.patch.object(gluon_interpreter.mbarrier, "wait"), pytest.raises(RuntimeError, match="more arrive"):
            product()

    def test_what_is_overwritten_while_it_is_used(self) -> None:
        def less(outstanding: int, deps: list[object]) -> object:
            return wait(outstanding + 3 if outstanding else 0, deps)

        wait = gluon_interpreter.warpgroup_mma_wait
        with mock.patch.object(gluon_interpreter, "warpgroup_mma_wait", less):
            assert not product() <= 0.1

    def test_bytes_that_do_not_come(self) -> None:
        arrive = gluon_interpreter.Barrier.arrive
        with (
            mock.patch.object(gluon_interpreter.Barrier, "arrive", lambda self, n, size=0: arrive(self, n, size + 1)),
            mock.patch.object(gluon_interpreter, "PATIENCE", 0.5),
            pytest.raises(RuntimeError, match="wait for others"),
        ):
            product()

    def test_what_the_kernel_before_may_still_write(self) -> None:
        with pytest.raises(RuntimeError, match="before wait"):
            product(constants=())

    def test_a_tensor_that_is_too_short(self) -> None:
        with pytest.raises(IndexError, match="address 95 of a tensor of 95 numbers"):
            product(missing_scales=1)
