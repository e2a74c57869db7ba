"""AWQ: scales that are worth their while, shared where channels are, and clipping that never costs what it saves."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny_models import save_tiny

from llmq.checkpoint.config import ModelConfig
from llmq.quant.activations import HiddenStates, squared_distance
from llmq.quant.affine import energy, group_blocks
from llmq.quant.folding import exact_scales, gather, linear_folds, norm_folds, spread, trial
from llmq.quant.methods import awq, rtn
from llmq.runtime.decoder import DecoderLayer
from llmq.runtime.loader import load_layer, open_source
from llmq.scheme import Scheme

W3 = Scheme(3, 32)


@pytest.fixture(autouse=True)
def _no_gradients() -> object:
    with torch.no_grad():
        yield


def entered(
    folder: Path, architecture: str = "llama", **fields: object
) -> tuple[DecoderLayer, ModelConfig, HiddenStates]:
    """The first block of a tiny model whose inputs have a few large channels, and windows at its entrance."""
    source = open_source(save_tiny(folder / "model", architecture, **fields), "cpu", torch.float32)
    block = load_layer(source, 0)
    for norm in (block.input_layernorm, block.post_attention_layernorm):
        norm.weight[::16] *= 20
    ids = torch.randint(0, 256, (4, 32), generator=torch.Generator().manual_seed(0))
    return block, source.config, HiddenStates(source, ids)


def test_what_a_block_loses_by_rounding_is_less_once_it_is_scaled(tmp_path: Path) -> None:
    block, config, states = entered(tmp_path)
    schemes = dict.fromkeys(config.linears, W3)

    def loss() -> float:
        def passed() -> list[torch.Tensor]:
            passing = states.sample(states.tokens)
            passing.mix(block)
            passing.finish(block)
            return passing.inputs

        targets = passed()
        with trial(block, schemes, {}):
            return squared_distance(passed(), targets)

    before = loss()
    awq.fold(block, config, states, schemes)
    assert loss() < 0.7 * before


def test_channels_with_large_inputs_get_large_weights(tmp_path: Path) -> None:
    block, config, states = entered(tmp_path)
    before = block.input_layernorm.weight.clone()
    awq.fold(block, config, states, dict.fromkeys(config.linears, W3))
    scales = before / block.input_layernorm.weight
    ordinary = torch.arange(128) % 16 != 0
    assert scales[~ordinary].abs().min() > 1.2 * scales[ordinary].abs().median()


def test_query_heads_that_share_values_share_their_scales(tmp_path: Path) -> None:
    block, config, _ = entered(tmp_path)
    (values,), _ = linear_folds(config)
    assert values.sharing == 2
    by_value = torch.arange(64.0)
    by_input = spread(values, block, by_value).view(4, 32)  # 4 query heads of 32 channels, 2 heads of values
    assert torch.equal(by_input[0], by_input[1])
    assert torch.equal(by_input[2], by_value[32:])
    assert torch.equal(gather(values, block, by_input.flatten()), by_value)


def test_a_router_is_multiplied_by_powers_of_two_which_rounds_nothing(tmp_path: Path) -> None:
    block, config, states = entered(tmp_path, "mixtral", num_local_experts=4)
    _, experts = norm_folds(config)
    assert experts.others == ("block_sparse_moe.gate",)
    scales = exact_scales(experts, torch.rand(128) + 0.1)
    assert torch.equal(scales.frexp().mantissa, torch.full((128,), 0.5))
    router = block.get_parameter("block_sparse_moe.gate.weight")
    before = router.clone()
    changed = awq.fold(block, config, states, dict.fromkeys(config.linears, W3))
    assert torch.equal(changed["block_sparse_moe.gate.weight"], router)
    ratios = (router / before).frexp().mantissa
    assert torch.equal(ratios, torch.full_like(ratios, 0.5))


def test_layers_that_stay_are_not_scaled(tmp_path: Path) -> None:
    block, config, states = entered(tmp_path)
    kept = "self_attn.k_proj", "mlp.up_proj"
    before = {name: parameter.clone() for name, parameter in block.named_parameters()}
    changed = awq.fold(block, config, states, {name: W3 for name in config.linears if name not in kept})
    assert changed == {}
    moved = {name for name, parameter in block.named_parameters() if not torch.equal(parameter, before[name])}
    assert moved == {"self_attn.v_proj.weight", "self_attn.o_proj.weight"}


@pytest.mark.parametrize("scheme", [Scheme(3, 32), Scheme(2, 64, False), Scheme(4, -1)], ids=str)
def test_clipping_by_the_hessian_costs_no_group_more_than_none(scheme: Scheme) -> None:
    generator = torch.Generator().manual_seed(0)
    weight = 0.05 * torch.randn(16, 128, generator=generator)
    weight[:, 3] *= 8
    inputs = torch.randn(256, 128, generator=generator) @ torch.randn(128, 128, generator=generator)
    hessian = inputs.t() @ inputs / 256
    length = scheme.group_length(128)
    clipped = rtn.quantize_weight(weight, scheme, group_blocks(hessian, scheme)).dequantize() - weight
    plain = rtn.quantize_weight(weight, scheme).dequantize() - weight
    for first in range(0, 128, length):
        group = slice(first, first + length)
        assert energy(clipped[:, group], hessian[group, group]) <= energy(plain[:, group], hessian[group, group])
    blocks = group_blocks(hessian, scheme)
    assert torch.equal(blocks[-1], hessian[-length:, -length:])
    assert energy(clipped, torch.block_diag(*blocks)) < 0.9 * energy(plain, torch.block_diag(*blocks))
