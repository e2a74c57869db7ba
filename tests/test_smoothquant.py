"""SmoothQuant: outliers move from activations to weights, and 8 bits suffice for both."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from outlier_twin import save_twin
from tiny_models import save_tiny

from llmq import quantize
from llmq.quant.activations import HiddenStates, squared_distance
from llmq.quant.folding import round_inputs, trial
from llmq.quant.methods import smoothquant
from llmq.quant.options import Calibration
from llmq.runtime.decoder import CausalAttention
from llmq.runtime.kernels.quantize_rows import quantize_rows
from llmq.runtime.loader import Source, load_decoder, load_layer, open_source
from llmq.scheme import Scheme

W8A8 = Scheme(8, -1, activation_bits=8)
IDS = torch.randint(0, 256, (4, 32), generator=torch.Generator().manual_seed(0))


@pytest.fixture(autouse=True)
def _no_gradients() -> object:
    with torch.no_grad():
        yield


@pytest.fixture
def twin(tmp_path: Path) -> Path:
    """A tiny model with channels that are far larger than the others."""
    return save_twin(save_tiny(tmp_path / "model"), tmp_path / "twin")


def opened(folder: Path) -> Source:
    return open_source(folder, "cpu", torch.float32)


def block_loss(source: Source, alpha: float | str, *, smooth: bool = True) -> float:
    """What the first block's output loses when its weights and their inputs are rounded to 8 bits."""
    block, states = load_layer(source, 0), HiddenStates(source, IDS)
    schemes = dict.fromkeys(source.config.linears, W8A8)
    if smooth:
        smoothquant.fold(block, source.config, states, schemes, alpha)

    def passed() -> list[torch.Tensor]:
        passing = states.sample(states.tokens)
        passing.mix(block)
        passing.finish(block)
        return passing.inputs

    targets = passed()
    with trial(block, schemes, {}):
        return squared_distance(passed(), targets)


def test_scales_are_those_of_the_paper(twin: Path) -> None:
    source = opened(twin)
    block, states = load_layer(source, 0), HiddenStates(source, IDS)
    norm, readers = block.input_layernorm, [block.self_attn.q_proj, block.self_attn.k_proj, block.self_attn.v_proj]
    x = norm(torch.cat(states.inputs)).abs().amax(0)
    w = torch.stack([reader.weight.abs().amax(0) for reader in readers]).amax(0)
    before = norm.weight.clone()
    smoothquant.fold(block, source.config, states, dict.fromkeys(source.config.linears, W8A8), 0.7)
    torch.testing.assert_close(before / norm.weight, x**0.7 / w**0.3, rtol=2**-8, atol=0)


def test_smoothing_saves_most_of_what_outliers_cost(twin: Path) -> None:
    source = opened(twin)
    assert block_loss(source, 0.8) < 0.2 * block_loss(source, 0.5, smooth=False)


def test_a_search_finds_about_the_best_strength_of_its_grid(twin: Path) -> None:
    source = opened(twin)
    found = block_loss(source, "auto")
    assert found <= 1.1 * min(block_loss(source, alpha) for alpha in smoothquant.ALPHAS[::5])


def test_the_strength_of_a_family_is_what_its_authors_publish() -> None:
    assert smoothquant.default_alpha("llama") == 0.85
    assert smoothquant.default_alpha("qwen3") == 0.5


def test_inputs_are_rounded_as_the_running_model_rounds_them() -> None:
    layer, x = torch.nn.Linear(64, 16), torch.randn(8, 64, generator=torch.Generator().manual_seed(1))
    codes, steps = quantize_rows(x, "int")
    expected = layer(codes.float() * steps)
    hook = round_inputs(layer, "int")
    torch.testing.assert_close(layer(x), expected)
    hook.remove()
    assert not torch.equal(layer(x), expected)


def logits(folder: Path) -> torch.Tensor:
    model = load_decoder(opened(folder))
    return model.logits(model(IDS.flatten(), torch.arange(32).repeat(4), CausalAttention(32)))


def test_on_outliers_the_written_folder_is_far_closer_than_one_rounded_to_nearest(tmp_path: Path, twin: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("".join(f"def f{n}(x):\n    return x * {n} + {n * n}\n\n\n" for n in range(100)))
    calibration = Calibration(str(text), samples=4, seqlen=64)

    def loss(method: str, alpha: float | str | None = None) -> float:
        out = tmp_path / f"{method}-{alpha}"
        quantize(str(twin), out, scheme="w8a8", method=method, alpha=alpha, calibration=calibration, device="cpu")
        return float((logits(out) - logits(twin)).square().mean())

    rounded = loss("rtn")
    assert loss("smoothquant", 0.8) < 0.2 * rounded
    assert loss("smoothquant", "auto") < 0.2 * rounded
