"""Affine grids: what a scale and a zero point promise of every group of weights."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llmq.quant.affine import MAX_WEIGHT, decode, encode, fit_grid, per_channel
from llmq.quant.methods import rtn
from llmq.scheme import BITS, E4M3, GROUP_SIZES, INT, WHOLE_TENSOR, Scheme

SCHEMES = st.builds(Scheme, st.sampled_from(BITS[INT]), st.sampled_from(GROUP_SIZES), st.booleans())
EXACT = 1 + 2**-20
"""Room for fp32's own rounding."""


@st.composite
def weights(draw: st.DrawFn) -> torch.Tensor:
    """[out, 128]: of any magnitude and offset, some groups zero or constant, some with outliers."""
    seed, rows = draw(st.integers(0, 2**32 - 1)), draw(st.integers(1, 4))
    magnitude, offset = draw(st.sampled_from((1e-9, 1e-4, 0.02, 1.0, 1e3))), draw(st.sampled_from((0.0, 1.0, -3.0)))
    generator = torch.Generator().manual_seed(seed)
    weight = magnitude * (torch.randn(rows, 128, generator=generator) + offset)
    match draw(st.sampled_from(("plain", "outlier", "zero group", "constant"))):
        case "outlier":
            weight[:, 5] *= 50
        case "zero group":
            weight[:, :32] = 0
        case "constant":
            weight[:] = weight[0, 0]
    return weight.clamp(-MAX_WEIGHT, MAX_WEIGHT)


@settings(deadline=None)
@given(weights(), SCHEMES)
def test_no_weight_is_off_by_more_than_half_a_step(weight: torch.Tensor, scheme: Scheme) -> None:
    quantized = rtn.quantize_weight(weight, scheme)
    step = per_channel(quantized.scales, weight.shape[1])
    assert ((quantized.dequantize() - weight).abs() <= step / 2 * EXACT).all()


@settings(deadline=None)
@given(weights(), SCHEMES)
def test_what_was_quantized_stays_when_it_is_quantized_on_the_same_grid(weight: torch.Tensor, scheme: Scheme) -> None:
    scales, zeros = (per_channel(grid, weight.shape[1]) for grid in fit_grid(weight, scheme))
    codes = encode(weight, scales, zeros, scheme.max_code)
    assert torch.equal(encode(decode(codes, scales, zeros), scales, zeros, scheme.max_code), codes)


@settings(deadline=None)
@given(weights(), SCHEMES)
def test_grids_are_what_formats_can_store(weight: torch.Tensor, scheme: Scheme) -> None:
    quantized = rtn.quantize_weight(weight, scheme)
    groups = scheme.num_groups(weight.shape[1])
    assert quantized.scales.dtype == torch.float16
    assert quantized.scales.shape == quantized.zero_points.shape == (len(weight), groups)
    assert quantized.scales.isfinite().all()
    assert (quantized.scales > 0).all()
    assert int(quantized.codes.max()) <= scheme.max_code
    if scheme.symmetric:
        assert (quantized.zero_points == scheme.middle_code).all()


@pytest.mark.parametrize("symmetric", [True, False])
def test_zero_is_exact(symmetric: bool) -> None:
    weight = torch.randn(4, 128, generator=torch.Generator().manual_seed(0))
    weight[:, ::3] = 0
    weight[2] = 0
    restored = rtn.quantize_weight(weight, Scheme(4, 32, symmetric)).dequantize()
    assert (restored[weight == 0] == 0).all()


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
def test_the_largest_weights_do_not_overflow_and_the_smallest_do_not_vanish(bits: int, symmetric: bool) -> None:
    for magnitude in (MAX_WEIGHT, 1e-8):
        weight = torch.linspace(-magnitude, magnitude, 32).view(1, 32)
        quantized = rtn.quantize_weight(weight, Scheme(bits, 32, symmetric))
        assert quantized.scales.isfinite().all()
        assert (quantized.dequantize() - weight).abs().max() <= quantized.scales.float().max() / 2 * EXACT


def test_an_asymmetric_grid_is_finer_where_weights_are_of_one_sign() -> None:
    weight = torch.rand(8, 128, generator=torch.Generator().manual_seed(0)) + 0.5
    errors = [
        (rtn.quantize_weight(weight, Scheme(4, 32, symmetric)).dequantize() - weight).square().mean()
        for symmetric in (True, False)
    ]
    assert errors[1] < errors[0] / 2


@settings(deadline=None)
@given(weights(), st.sampled_from((-1, 0)))
def test_e4m3_weights_are_torch_s_own_of_the_nearest_scale_that_loses_nothing_at_the_ends(
    weight: torch.Tensor, group_size: int
) -> None:
    quantized = rtn.quantize_weight(weight, Scheme(8, group_size, number=E4M3))
    values = (weight / quantized.scales.float()).to(torch.float8_e4m3fn)
    assert torch.equal(quantized.dequantize(), values.float() * quantized.scales.float())
    assert quantized.dequantize().isfinite().all()
    # Four bits of mantissa with the leading one; below the smallest normal number steps are even.
    error = (quantized.dequantize() - weight).abs()
    assert (error <= (weight.abs() / 16).maximum(quantized.scales.float() * 2**-10) * EXACT).all()
    assert (weight.abs().amax(1) <= 448 * quantized.scales[:, 0].float()).all()


@settings(deadline=None)
@given(weights(), st.sampled_from((2, 4, 8)), st.booleans())
def test_one_scale_for_a_whole_layer_is_that_of_its_widest_row(
    weight: torch.Tensor, bits: int, symmetric: bool
) -> None:
    scales, zeros = fit_grid(weight, Scheme(bits, WHOLE_TENSOR, symmetric))
    flat, middle = fit_grid(weight.view(1, -1), Scheme(bits, -1, symmetric))
    assert (scales == flat).all()
    assert (zeros == middle).all()
    assert scales.shape == zeros.shape == (len(weight), 1)


@settings(deadline=None)
@given(weights(), SCHEMES, st.integers(0, 1000))
def test_a_grid_fitted_to_input_energies_weighs_errors_by_them(weight: torch.Tensor, scheme: Scheme, seed: int) -> None:
    energy = torch.rand(128, generator=torch.Generator().manual_seed(seed)).pow(4)

    def loss(scales: torch.Tensor, zeros: torch.Tensor) -> torch.Tensor:
        wide, shifts = per_channel(scales, 128), per_channel(zeros, 128)
        error = decode(encode(weight, wide, shifts, scheme.max_code), wide, shifts) - weight
        return (error.square() * energy).sum(1)

    plain, fitted = fit_grid(weight, scheme), fit_grid(weight, scheme, energy)
    assert (loss(*fitted) <= loss(*plain) * EXACT).all()
    assert (fitted[0] <= plain[0]).all()
    assert (fitted[0].float() >= 0.4 * plain[0].float() - 2**-24).all()
