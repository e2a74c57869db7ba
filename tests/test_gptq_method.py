"""GPTQ: better than rounding where inputs are correlated, the same where they are not, and sound where they are odd."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from llmq.checkpoint.quantized_weight import QuantizedWeight
from llmq.quant.affine import decode, encode, fit_grid, per_channel
from llmq.quant.methods import gptq, rtn
from llmq.quant.options import DYNAMIC, OFF, STATIC
from llmq.scheme import Scheme

SCHEMES = st.builds(Scheme, st.sampled_from((2, 3, 4, 8)), st.sampled_from((32, 64, -1)), st.booleans())


def correlated_hessian(size: int, seed: int, samples: int = 512) -> Tensor:
    """2/n Σ x xᵀ of inputs in which a few directions, and a few channels, carry most of the energy."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(size // 4, size, generator=generator)
    inputs = torch.randn(samples, size // 4, generator=generator) @ mixing
    inputs += 0.3 * torch.randn(samples, size, generator=generator)
    inputs *= torch.rand(size, generator=generator).mul(3).exp()
    return 2 / samples * inputs.t() @ inputs


def random_weight(rows: int, columns: int, seed: int) -> Tensor:
    return 0.05 * torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def output_error(weight: Tensor, quantized: QuantizedWeight, hessian: Tensor) -> float:
    """tr(E H Eᵀ): what the layer's output is off by, squared and summed, on the inputs that H was made of."""
    error = (quantized.dequantize() - weight).double()
    return float((error @ hessian.double() * error).sum())


def is_rounded_to_nearest(weight: Tensor, quantized: QuantizedWeight) -> Tensor:
    """Whether each weight has the code nearest to it on the grid that was chosen."""
    scales, zeros = (per_channel(grid, weight.shape[1]) for grid in (quantized.scales, quantized.zero_points))
    return encode(weight, scales, zeros, quantized.scheme.max_code) == quantized.codes


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 10_000), SCHEMES, st.sampled_from((64, 192)))
def test_on_correlated_inputs_its_output_error_is_below_that_of_rounding(seed: int, scheme: Scheme, size: int) -> None:
    weight, hessian = random_weight(16, size, seed), correlated_hessian(size, seed)
    ours = output_error(weight, gptq.quantize_weight(weight, scheme, hessian), hessian)
    assert ours < 0.8 * output_error(weight, rtn.quantize_weight(weight, scheme), hessian)


@settings(deadline=None, max_examples=20)
@given(st.integers(0, 10_000), SCHEMES)
def test_it_rounds_to_nearest_where_inputs_are_uncorrelated(seed: int, scheme: Scheme) -> None:
    weight = random_weight(8, 128, seed)
    energies = torch.rand(128, generator=torch.Generator().manual_seed(seed)) + 0.1
    for hessian in (torch.eye(128), energies.diag()):
        assert is_rounded_to_nearest(weight, gptq.quantize_weight(weight, scheme, hessian)).all()


@pytest.mark.parametrize("size", [32, 160])
@pytest.mark.parametrize("symmetric", [True, False])
def test_it_is_optimal_brain_surgery_one_column_at_a_time(size: int, symmetric: bool) -> None:
    """Against the definition: in fp64, with the inverse of what is left of H taken anew for every column."""
    scheme = Scheme(4, 32, symmetric)
    weight, hessian = random_weight(8, size, 1), correlated_hessian(size, 1)
    scales, zeros = (per_channel(grid, size).double() for grid in fit_grid(weight, scheme, hessian.diagonal()))
    damped = hessian.double() + gptq.DAMP_PERCENT * hessian.diagonal().double().mean() * torch.eye(size)
    left, remaining = weight.double(), torch.argsort(hessian.diagonal(), descending=True).tolist()
    codes = torch.empty_like(left)
    while remaining:
        inverse = torch.linalg.inv(damped[remaining][:, remaining])
        column = remaining[0]
        codes[:, column] = encode(left[:, column], scales[:, column], zeros[:, column], scheme.max_code)
        error = left[:, column] - decode(codes[:, column], scales[:, column], zeros[:, column])
        left[:, remaining] -= torch.outer(error / inverse[0, 0], inverse[0])
        remaining = remaining[1:]
    quantized = gptq.quantize_weight(weight, scheme, hessian)
    # In fp32 a value on the edge between two codes may fall to the other side, and move those after it.
    assert (quantized.codes != codes).float().mean() < 0.01
    assert is_rounded_to_nearest(weight, quantized).float().mean() < 0.9


@pytest.mark.parametrize("scheme", [Scheme(4, 32, True), Scheme(4, 64, False), Scheme(8, -1, True)], ids=str)
def test_act_order_leaves_codes_and_grids_in_natural_order(scheme: Scheme) -> None:
    weight, hessian = random_weight(8, 128, 2), correlated_hessian(128, 2)
    quantized = gptq.quantize_weight(weight, scheme, hessian)
    scales, zeros = fit_grid(weight, scheme, hessian.diagonal())
    assert quantized.group_index is None
    assert torch.equal(quantized.scales, scales)
    assert torch.equal(quantized.zero_points, zeros)
    assert (quantized.dequantize() - weight).abs().max() < 10 * scales.max()


def test_without_act_order_columns_are_rounded_from_the_first_to_the_last() -> None:
    weight, hessian = random_weight(8, 128, 2), correlated_hessian(128, 2)
    ordered = hessian.diagonal().argsort(descending=True)
    by_energy = gptq.quantize_weight(weight[:, ordered], Scheme(4, -1), hessian[ordered][:, ordered], OFF)
    static = gptq.quantize_weight(weight, Scheme(4, -1), hessian, STATIC)
    assert (by_energy.codes == static.codes[:, ordered]).float().mean() > 0.99
    off = gptq.quantize_weight(weight, Scheme(4, -1), hessian, OFF)
    assert (off.codes != static.codes).any()


@settings(deadline=None, max_examples=20)
@given(st.integers(0, 10_000), st.booleans())
def test_dynamic_order_groups_columns_of_like_energy_and_says_where_they_are(seed: int, symmetric: bool) -> None:
    scheme = Scheme(3, 32, symmetric)
    weight, hessian = random_weight(8, 128, seed), correlated_hessian(128, seed)
    quantized = gptq.quantize_weight(weight, scheme, hessian, DYNAMIC)
    assert quantized.group_index is not None
    assert quantized.group_index.bincount().tolist() == [32] * 4
    energies = [hessian.diagonal()[quantized.group_index == group] for group in range(4)]
    assert all(energies[group].min() >= energies[group + 1].max() for group in range(3))
    assert output_error(weight, quantized, hessian) < 0.8 * output_error(
        weight, rtn.quantize_weight(weight, scheme), hessian
    )


def test_groups_that_act_order_leaves_in_place_need_no_index() -> None:
    weight, energies = random_weight(4, 64, 1), torch.arange(64, 0, -1.0).diag()
    assert gptq.quantize_weight(weight, Scheme(4, 32), energies, DYNAMIC).group_index is None


@pytest.mark.parametrize("scheme", [Scheme(4, 32), Scheme(8, -1, activation_bits=8), Scheme(8, 0)], ids=str)
def test_layers_together_are_quantized_as_each_alone(scheme: Scheme) -> None:
    weights, hessian = [random_weight(rows, 128, rows) for rows in (8, 24)], correlated_hessian(128, 2)
    for weight, together in zip(weights, gptq.quantize_weights(weights, scheme, hessian), strict=True):
        alone = gptq.quantize_weight(weight, scheme, hessian)
        assert torch.equal(together.scales, alone.scales)
        assert (together.codes == alone.codes).float().mean() > 0.99


def test_channels_without_input_are_rounded_and_move_nothing() -> None:
    scheme, dead = Scheme(4, 32), torch.arange(0, 128, 5)
    alive = torch.tensor([channel for channel in range(128) if channel % 5])
    weight, hessian = random_weight(8, 128, 3), correlated_hessian(128, 3)
    weight[:, dead] *= 0.1  # so that the grids are those of the living
    hessian[dead] = 0
    hessian[:, dead] = 0
    quantized, rounded = gptq.quantize_weight(weight, scheme, hessian), rtn.quantize_weight(weight, scheme)
    assert is_rounded_to_nearest(weight, quantized)[:, dead].all()
    assert output_error(weight, quantized, hessian) < output_error(weight, rounded, hessian)
    weight[:, dead] *= -1
    assert torch.equal(gptq.quantize_weight(weight, scheme, hessian).codes[:, alive], quantized.codes[:, alive])


def test_inputs_of_no_energy_at_all_mean_rounding() -> None:
    weight = random_weight(4, 64, 4)
    quantized = gptq.quantize_weight(weight, Scheme(4, 32), torch.zeros(64, 64))
    assert torch.equal(quantized.codes, rtn.quantize_weight(weight, Scheme(4, 32)).codes)


def test_fewer_samples_than_channels_are_enough() -> None:
    weight, hessian = random_weight(8, 128, 5), correlated_hessian(128, 5, samples=8)
    ours = output_error(weight, gptq.quantize_weight(weight, Scheme(4, 32), hessian), hessian)
    assert ours < output_error(weight, rtn.quantize_weight(weight, Scheme(4, 32)), hessian)


def test_dampening_grows_until_the_hessian_can_be_factored() -> None:
    hessian = correlated_hessian(64, 6)
    hessian -= 0.05 * hessian.diagonal().mean() * torch.eye(64)  # 1 % does not make it positive definite, 10 % do
    assert torch.linalg.eigvalsh(hessian).min() < -0.01 * hessian.diagonal().mean()
    gptq.quantize_weight(random_weight(4, 64, 6), Scheme(4, 32), hessian)


def test_a_hessian_beyond_repair_is_refused() -> None:
    with pytest.raises(gptq.NotPositiveDefinite):
        gptq.quantize_weight(random_weight(4, 64, 7), Scheme(4, 32), torch.eye(64) - 3 * torch.ones(64, 64) / 64)
