"""A mixture of experts: where tokens go, and all experts' layers as one product."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_kernels_reference import draw_weight
from tiny_models import save_tiny
from torch import Tensor, nn
from torch.nn import functional as F

from llmq.checkpoint.config import ModelConfig, read_config
from llmq.runtime.decoder import MLP, Decoder, MixtureOfExperts
from llmq.runtime.dummy import dummy_decoder
from llmq.runtime.kernels.grouped import BLOCKS_M, LARGEST_PACKED, block_m_for
from llmq.runtime.kernels.routing import choose, combine, most_tiles, sort_by_expert
from llmq.runtime.kernels.wna16 import pack_wna16
from llmq.runtime.linear import Linear, WeightOnlyLinear, quantized_linear
from llmq.scheme import E4M3, Scheme


@settings(deadline=None, max_examples=60)
@given(
    experts=st.integers(1, 20),
    tokens=st.integers(1, 50),
    per_token=st.integers(1, 4),
    block_m=st.sampled_from([1, 3, 16]),
    one_for_all=st.booleans(),
)
def test_tiles_cover_every_assignment_once_and_each_has_one_expert(
    experts: int, tokens: int, per_token: int, block_m: int, one_for_all: bool
) -> None:
    torch.manual_seed(0)
    chosen = torch.randint(0, experts, (tokens, min(per_token, experts))).int()
    if one_for_all:
        chosen.fill_(experts - 1)
    routing = sort_by_expert(chosen, experts, block_m)
    assert len(routing.tile_experts) == most_tiles(chosen.numel(), experts, block_m)
    seen: list[int] = []
    for expert, start in zip(routing.tile_experts.tolist(), routing.tile_starts.tolist(), strict=True):
        if expert >= 0:
            end = min(start + block_m, int(routing.starts[expert + 1]))
            assert start < end
            own = routing.order[start:end]
            assert chosen.flatten()[own].eq(expert).all()
            assert own.equal(own.sort().values)
            seen += own.tolist()
    assert sorted(seen) == list(range(chosen.numel()))


def test_no_tile_more_is_allowed_for_than_the_worst_batch_needs() -> None:
    """That one: a tile is full, and each other expert has a single token."""
    for experts, block_m in ((4, 16), (8, 3), (1, 2)):
        counts = torch.tensor([block_m, *[1] * (experts - 1)])
        assert most_tiles(int(counts.sum()), experts, block_m) == experts


def test_experts_are_chosen_by_probability_and_answers_weigh_as_much() -> None:
    logits = torch.tensor([[0.0, 2.0, 1.0, -1.0]]).log_softmax(-1)
    weights, chosen = choose(logits, 2, False)
    assert chosen.tolist() == [[1, 2]]
    torch.testing.assert_close(weights, logits.exp()[:, [1, 2]])
    weights, _ = choose(logits, 2, True)
    torch.testing.assert_close(weights.sum(1), torch.ones(1))
    answers = torch.randn(2, 8)
    torch.testing.assert_close(combine(answers, weights), weights @ answers)


def test_a_tile_grows_with_the_assignments_of_an_expert() -> None:
    dense, packed = torch.empty(8, 8), pack_wna16(draw_weight((8, 32), Scheme(4, 32)), torch.float32)
    assert [block_m_for(8 * mean, [dense], 8) for mean in (1, 16, 17, 64, 1000)] == [16, 16, 32, 64, BLOCKS_M[-1]]
    assert block_m_for(8000, [dense, packed], 8) == LARGEST_PACKED


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> ModelConfig:
    """Six experts of 128 by 64 channels, three to a token."""
    sizes = {"num_experts": 6, "num_experts_per_tok": 3, "moe_intermediate_size": 64, "norm_topk_prob": True}
    return read_config(save_tiny(tmp_path_factory.mktemp("model"), "qwen3-moe", **sizes))


def expert_layers(config: ModelConfig, scheme: Scheme | None, packed: bool) -> MixtureOfExperts:
    """Experts with random layers of their own; ``packed``: as a GPU has them."""
    mixture = MixtureOfExperts(config)
    for module in [*mixture.modules()]:
        if isinstance(module, nn.Linear):
            module.weight = nn.Parameter(torch.randn_like(module.weight) / 8, requires_grad=False)
        if isinstance(module, MLP) and scheme is not None:
            for name in ("gate_proj", "up_proj", "down_proj"):
                layer = module.get_submodule(name)
                weight = draw_weight((layer.out_features, layer.in_features), scheme)  # type: ignore[arg-type]
                made: Linear = quantized_linear(weight, None, torch.float32)
                if packed:
                    made = WeightOnlyLinear(pack_wna16(weight, torch.float32), None)
                module.set_submodule(name, made)
    return mixture


@pytest.mark.parametrize(
    ("scheme", "packed"),
    [(None, False), (Scheme(4, 32), False), (Scheme(4, 32), True), (Scheme(8, -1, False), True),
     (Scheme(8, -1, activation_bits=8), False), (Scheme(8, -1, number=E4M3, activation_bits=8), False)],
    ids=str,
)  # fmt: skip
def test_merged_experts_give_what_they_give_one_by_one(
    config: ModelConfig, scheme: Scheme | None, packed: bool
) -> None:
    torch.manual_seed(0)
    mixture = expert_layers(config, scheme, packed)
    x = torch.randn(20, 128)
    apart = mixture(x)
    mixture.merge()
    assert mixture.grouped is not None
    torch.testing.assert_close(mixture(x), apart, rtol=1e-4, atol=1e-4 * float(apart.abs().max()))


def test_experts_of_several_schemes_stay_apart(config: ModelConfig) -> None:
    torch.manual_seed(0)
    mixture = expert_layers(config, None, False)
    mixture.experts[3].set_submodule(  # type: ignore[union-attr]
        "down_proj", WeightOnlyLinear(pack_wna16(draw_weight((128, 64), Scheme(4, 32)), torch.float32), None)
    )
    x = torch.randn(20, 128)
    apart = mixture(x)
    mixture.merge()
    assert mixture.grouped is None
    torch.testing.assert_close(mixture(x), apart)


@pytest.mark.parametrize("architecture", ["mixtral", "qwen3-moe"])
def test_no_step_of_a_mixture_waits_for_the_host(architecture: str, tmp_path: Path) -> None:
    config = read_config(save_tiny(tmp_path / "model", architecture))
    assert not dummy_decoder(config, "cpu", torch.float32).waits_for_host
    with torch.device("meta"):
        assert Decoder(config).waits_for_host  # its experts are still apart


def test_each_token_gets_the_weighted_sum_of_its_experts(config: ModelConfig) -> None:
    torch.manual_seed(0)
    mixture = expert_layers(config, None, False)
    x = torch.randn(7, 128)
    expected = torch.zeros_like(x)
    for token in range(7):
        p = mixture.gate(x[token]).softmax(-1)
        best = p.argsort(descending=True)[:3].tolist()
        for expert in best:
            layers = mixture.experts[expert]
            gate, up, down = (layers.get_submodule(f"{name}_proj").weight for name in ("gate", "up", "down"))
            assert all(isinstance(weight, Tensor) for weight in (gate, up, down))
            hidden = F.silu(gate @ x[token]) * (up @ x[token])  # type: ignore[operator,arg-type]
            expected[token] += p[expert] / p[best].sum() * (down @ hidden)  # type: ignore[operator]
    mixture.merge()
    torch.testing.assert_close(mixture(x), expected, rtol=1e-4, atol=1e-5)
