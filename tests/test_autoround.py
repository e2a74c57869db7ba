"""Learned rounding: closer than the methods that cannot look at the block's output, and served exactly as learned."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from outlier_twin import save_twin
from tiny_models import VARIANTS, save_tiny, save_variant
from torch import Tensor, nn
from torch.nn import functional as F

from llmq.checkpoint.config import read_config
from llmq.checkpoint.folder import DEMO, resolve
from llmq.checkpoint.quantized_weight import QuantizedWeight
from llmq.memory import MICRO_BATCH_TOKENS
from llmq.quant.activations import HiddenStates
from llmq.quant.affine import encode, fit_grid, per_channel
from llmq.quant.calibration import draw_windows
from llmq.quant.methods import awq, gptq, rtn
from llmq.quant.methods.autoround import Rounding, quantize_block
from llmq.quant.options import Calibration
from llmq.runtime.decoder import DecoderLayer
from llmq.runtime.loader import load_layer, open_source
from llmq.scheme import Scheme

INTEGERS = st.builds(Scheme, st.sampled_from((2, 3, 4, 5, 6, 8)), st.sampled_from((32, 64, -1)), st.booleans())


class Example:
    """A model's first block, calibration windows at its entrance, and its outputs."""

    def __init__(
        self,
        folder: Path,
        windows: Tensor,
        device: str = "cpu",
        dtype: torch.dtype = torch.float32,
        batch_tokens: int = MICRO_BATCH_TOKENS,
    ) -> None:
        source = open_source(folder, device, dtype)
        self.config = source.config
        self.linears = tuple(source.config.linears)
        self.block = load_layer(source, 0)
        self.states = HiddenStates(source, windows, batch_tokens)
        self.targets = outputs(self.block, self.states)

    def learn(self, scheme: Scheme, *, steps: int, seed: int = 0) -> dict[str, QuantizedWeight]:
        schemes = dict.fromkeys(self.linears, scheme)
        return quantize_block(self.block, schemes, self.states, self.targets, seed=seed, steps=steps)

    def weight(self, name: str) -> Tensor:
        linear = self.block.get_submodule(name)
        assert isinstance(linear, nn.Linear)
        return linear.weight

    def hessian(self, name: str) -> Tensor:
        if name.startswith("mlp") or name.endswith("o_proj"):
            self.states.mix(self.block)
        hessian = self.states.second_moments(self.block, [name], "block")[name]
        self.states.mixed = []
        return hessian

    def error(self, quantized: dict[str, QuantizedWeight]) -> float:
        """Mean square of what the block's outputs are off by with those weights."""
        originals = {name: self.weight(name).clone() for name in quantized}
        for name, weight in quantized.items():
            self.weight(name).copy_(weight.dequantize())
        found = outputs(self.block, self.states)
        for name, original in originals.items():
            self.weight(name).copy_(original)
        return float(F.mse_loss(torch.cat(found).float(), torch.cat(self.targets).float()))


def outputs(block: DecoderLayer, states: HiddenStates) -> list[Tensor]:
    inputs = list(states.inputs)
    states.mix(block)
    states.finish(block)
    states.inputs, after = inputs, states.inputs
    return after


def random_windows() -> Tensor:
    return torch.randint(0, 256, (16, 32), generator=torch.Generator().manual_seed(0))


def random_weight(seed: int, magnitude: float = 0.05) -> Tensor:
    return magnitude * torch.randn(8, 128, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def example(tmp_path_factory: pytest.TempPathFactory) -> Example:
    return Example(save_tiny(tmp_path_factory.mktemp("models") / "tiny"), random_windows())


# What it is for


def test_on_text_not_seen_a_trained_block_is_closer_than_by_gptq_or_rounding() -> None:
    folder, scheme = resolve(DEMO), Scheme(2, 64, symmetric=False)
    windows = draw_windows(folder, read_config(folder), Calibration(DEMO, samples=24, seqlen=128))
    seen, unseen = Example(folder, windows[:16]), Example(folder, windows[16:])
    rounded = {name: rtn.quantize_weight(seen.weight(name), scheme) for name in seen.linears}
    compensated = {name: gptq.quantize_weight(seen.weight(name), scheme, seen.hessian(name)) for name in seen.linears}
    learned = unseen.error(seen.learn(scheme, steps=25))
    assert learned < 0.9 * unseen.error(compensated)
    assert learned < 0.5 * unseen.error(rounded)


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_architecture_s_block_learns(tmp_path: Path, variant: str) -> None:
    example = Example(save_variant(tmp_path, variant), random_windows())
    begun, learned = (example.learn(Scheme(3, 32), steps=steps) for steps in (0, 15))
    assert all((learned[name].codes != begun[name].codes).any() for name in learned)
    assert example.error(learned) < 0.9 * example.error(begun)


def test_awq_s_scales_spare_it_the_outliers_of_the_inputs(tmp_path: Path) -> None:
    source, scheme = save_tiny(tmp_path / "model"), Scheme(4, 32)
    plain = Example(source, random_windows())
    twin = Example(save_twin(source, tmp_path / "twin"), random_windows())
    alone = twin.error(twin.learn(scheme, steps=15))
    awq.fold(twin.block, twin.config, twin.states, dict.fromkeys(twin.linears, scheme))
    folded = twin.error(twin.learn(scheme, steps=15))
    assert folded < 1.5 * plain.error(plain.learn(scheme, steps=15))
    assert folded < 0.7 * alone


# What it writes


def test_without_a_step_it_rounds_to_nearest_on_the_grid_that_the_inputs_energy_asks_for(example: Example) -> None:
    scheme, name = Scheme(3, 32, symmetric=False), "self_attn.q_proj"
    weight, energy = example.weight(name), example.hessian(name).diagonal()
    quantized = example.learn(scheme, steps=0)[name]
    scales, zeros = fit_grid(weight, scheme, energy)
    torch.testing.assert_close(quantized.scales, scales, rtol=2**-10, atol=0)
    assert (quantized.zero_points == zeros).float().mean() > 0.99
    nearest = encode(weight, *(per_channel(grid, 128) for grid in (quantized.scales, quantized.zero_points)), 7)
    assert torch.equal(quantized.codes, nearest.to(torch.uint8))


def learn_alone(weight: Tensor, scheme: Scheme, seed: int) -> Rounding:
    """A rounding that has followed some gradients."""
    generator = torch.Generator().manual_seed(seed)
    rounding = Rounding(weight, scheme, torch.ones(weight.shape[1]))
    for _ in range(4):
        rounding(weight).mul(torch.randn(weight.shape, generator=generator)).sum().backward()
        rounding.step(0.2)
    return rounding


@settings(max_examples=40)
@given(st.integers(0, 10_000), INTEGERS, st.sampled_from((1e-7, 0.05, 100.0)))
def test_what_was_learned_is_what_is_served(seed: int, scheme: Scheme, magnitude: float) -> None:
    weight = random_weight(seed, magnitude)
    rounding = learn_alone(weight, scheme, seed)
    quantized = rounding.result(weight)
    assert torch.equal(rounding(weight), quantized.dequantize())
    assert quantized.scales.dtype == torch.float16
    assert (quantized.scales > 0).all()
    assert quantized.codes.max() <= scheme.max_code
    if scheme.symmetric:
        assert (quantized.zero_points == scheme.middle_code).all()


@settings(max_examples=40)
@given(st.integers(0, 10_000), INTEGERS)
def test_no_weight_goes_further_than_to_a_neighbouring_code(seed: int, scheme: Scheme) -> None:
    weight = random_weight(seed)
    quantized = learn_alone(weight, scheme, seed).result(weight)
    scales, zeros = (per_channel(grid, 128) for grid in (quantized.scales, quantized.zero_points))
    moved = (quantized.codes - encode(weight, scales, zeros, scheme.max_code)).abs()
    assert moved.max() == 1


def test_a_group_of_zeros_stays_zero() -> None:
    weight = random_weight(1)
    weight[:, 32:64] = 0
    assert (learn_alone(weight, Scheme(4, 32, symmetric=False), 1).result(weight).dequantize()[:, 32:64] == 0).all()


# How it learns


def test_a_rounding_passes_the_gradient_of_the_value_that_it_rounds() -> None:
    """scale · slope where the value is on the grid, and nothing where it is cut off."""
    scheme, weight, slope = Scheme(3, 32), random_weight(2), random_weight(3)
    rounding = Rounding(weight, scheme, torch.ones(128))
    scales = per_channel(rounding.result(weight).scales, 128)
    places = (weight / scales).round() + scheme.middle_code
    rounding(weight).mul(slope).sum().backward()
    on_grid = (places >= 0) & (places <= scheme.max_code)
    assert 0 < on_grid.float().mean() < 1
    assert rounding.offset.grad is not None
    torch.testing.assert_close(rounding.offset.grad.view(8, 128), torch.where(on_grid, scales * slope, 0.0))


def test_the_same_seed_gives_the_same_bytes_and_another_seed_others(tmp_path: Path) -> None:
    # the seed decides the order of batches
    example = Example(save_tiny(tmp_path / "model"), random_windows(), batch_tokens=64)
    scheme = Scheme(3, 32, symmetric=False)
    first, again, other = (example.learn(scheme, steps=5, seed=seed) for seed in (1, 1, 2))
    for name in first:
        assert torch.equal(first[name].codes, again[name].codes)
        assert torch.equal(first[name].scales, again[name].scales)
        assert torch.equal(first[name].zero_points, again[name].zero_points)
    assert any(not torch.equal(first[name].codes, other[name].codes) for name in first)


def test_the_block_and_its_inputs_are_left_as_they_were(example: Example) -> None:
    before = {name: (value, value.clone()) for name, value in example.block.named_parameters()}
    inputs = [part.clone() for part in example.states.inputs]
    example.learn(Scheme(2, 32), steps=2)
    assert dict(example.block.named_parameters()).keys() == before.keys()
    for name, value in example.block.named_parameters():
        assert value is before[name][0]
        assert torch.equal(value, before[name][1])
        assert not value.requires_grad
    assert all(map(torch.equal, inputs, example.states.inputs))


def test_layers_that_no_scheme_names_take_part_as_they_are(example: Example) -> None:
    schemes = {"mlp.down_proj": Scheme(2, 32), "self_attn.v_proj": Scheme(8, -1)}
    quantized = quantize_block(example.block, schemes, example.states, example.targets, seed=0, steps=2)
    assert {name: weight.scheme for name, weight in quantized.items()} == schemes


@pytest.mark.gpu
@pytest.mark.parametrize("variant", ["llama", "gemma2", "mixtral"])
def test_a_gpu_learns_under_autocast_and_gives_the_same_bytes_each_time(tmp_path: Path, variant: str) -> None:
    """Through the references: kernels have no gradients."""
    example, scheme = Example(save_variant(tmp_path, variant), random_windows(), "cuda", torch.bfloat16), Scheme(3, 32)
    begun, learned, again = (example.learn(scheme, steps=steps) for steps in (0, 30, 30))
    assert all(torch.equal(learned[name].codes, again[name].codes) for name in learned)
    assert example.error(learned) < 0.8 * example.error(begun)
