"""Drawing tokens: the right distribution, cut where asked, and the same whatever else is in the batch."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from llmq.plan import History, PlanRow, RowSampling
from llmq.runtime.kernels.gumbel import exponential_noise
from llmq.runtime.sampler import draw, restrict, sample

GREEDY = RowSampling(temperature=0.0, top_k=0, top_p=1.0, seed=0, logprobs=None)


def sampling(seed: int = 0, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0) -> RowSampling:
    return RowSampling(temperature, top_k, top_p, seed, None)


def draw_many(logits: torch.Tensor, one: RowSampling, count: int = 20_000) -> torch.Tensor:
    """Draw from the same logits at ``count`` positions."""
    return draw(logits.expand(count, -1), [one] * count, range(count))


def test_temperature_zero_takes_the_likeliest_beside_rows_that_draw() -> None:
    logits = torch.randn(3, 50, generator=torch.Generator().manual_seed(0))
    drawn = draw(logits, [sampling(), GREEDY, sampling()], [4, 4, 4])
    assert drawn[1] == logits[1].argmax()


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_tokens_come_as_often_as_the_softmax_says(temperature: float) -> None:
    logits = torch.tensor([2.0, 1.0, 0.0, -1.0])
    counts = draw_many(logits, sampling(temperature=temperature)).bincount(minlength=4) / 20_000
    expected = (logits / temperature).softmax(-1)
    assert (counts - expected).abs().max() < 4 * (0.25 / 20_000) ** 0.5


def test_top_k_draws_only_among_the_k_likeliest() -> None:
    logits = torch.tensor([0.0, 3.0, 1.0, 2.0])
    assert set(draw_many(logits, sampling(top_k=2)).tolist()) == {1, 3}


def test_top_p_draws_only_among_the_smallest_set_that_reaches_p() -> None:
    logits = torch.tensor([0.5, 0.3, 0.15, 0.05]).log()
    assert set(draw_many(logits, sampling(top_p=0.75)).tolist()) == {0, 1}
    assert set(draw_many(logits, sampling(top_p=0.85)).tolist()) == {0, 1, 2}


@pytest.mark.parametrize("top_p", [1e-9, 1e-300])
def test_the_likeliest_token_survives_any_top_p(top_p: float) -> None:
    assert set(draw_many(torch.tensor([0.0, 9.0, 0.0]), sampling(top_p=top_p)).tolist()) == {1}


@given(st.integers(0, 2**62), st.integers(0, 10**6), st.integers(1, 5), st.integers(0, 4))
def test_a_row_draws_the_same_whatever_else_is_in_the_batch(seed: int, position: int, rows: int, place: int) -> None:
    generator = torch.Generator().manual_seed(seed % 1000)
    logits = torch.randn(rows, 40, generator=generator)
    place %= rows
    others = [sampling(seed=row + 1, top_k=row) for row in range(rows)]
    positions = [row * 7 for row in range(rows)]
    others[place], positions[place] = sampling(seed=seed), position
    alone = draw(logits[place : place + 1], [sampling(seed=seed)], [position])
    assert draw(logits, others, positions)[place] == alone[0]


def test_noise_is_uncorrelated_across_seeds_positions_and_tokens() -> None:
    seeds = torch.arange(64).repeat_interleave(64)[:, None]
    positions = torch.arange(64).repeat(64)[:, None]
    noise = exponential_noise(seeds, positions, 256)
    assert abs(noise.mean() - 1) < 0.01
    assert abs(noise.var() - 1) < 0.02
    cube = (noise - 1).view(64, 64, 256)
    for axis in range(3):
        shifted = cube.roll(1, dims=axis)
        assert (cube * shifted).mean().abs() < 0.01


def test_no_noise_lifts_an_unlikely_token_over_all_others() -> None:
    """There the random bits of token 65,933 are nearly all ones: a number that rounds up to 1."""
    logits = torch.zeros(1, 66_000)
    logits[0, 7] = 200.0
    assert draw(logits, [sampling(seed=0)], [254]) == 7
    noise = exponential_noise(torch.tensor([[0]]), torch.tensor([[254]]), 66_000)
    assert noise.isfinite().all()
    assert noise.min() > 0


def test_logprobs_are_those_of_the_raw_logits_best_first() -> None:
    logits = torch.randn(2, 30, generator=torch.Generator().manual_seed(1))
    hot = RowSampling(temperature=5.0, top_k=3, top_p=0.9, seed=1, logprobs=4)
    rows = [PlanRow(0, 0, (1,), ((1,),), hot), PlanRow(1, 0, (1,), ((1,),), GREEDY)]
    first, second = sample(logits, rows).collect()
    assert second.logprobs is None
    assert first.logprobs is not None
    expected = logits[0].log_softmax(-1)
    assert first.logprobs.logprob == pytest.approx(expected[first.token_id].item())
    best = expected.topk(4)
    assert [token for token, _ in first.logprobs.top] == best.indices.tolist()
    assert [value for _, value in first.logprobs.top] == pytest.approx(best.values.tolist())


def test_min_p_draws_only_among_what_is_likely_enough() -> None:
    logits = torch.tensor([0.5, 0.3, 0.15, 0.05]).log()
    assert set(draw_many(logits, RowSampling(1.0, 0, 1.0, 0, None, min_p=0.5)).tolist()) == {0, 1}
    assert set(draw_many(logits, RowSampling(1.0, 0, 1.0, 0, None, min_p=1.0)).tolist()) == {0}


def row(sampling: RowSampling, prompt: list[int], output: list[int], banned: tuple[int, ...] = ()) -> PlanRow:
    return PlanRow(0, 0, (1,), ((1,),), sampling, banned, History(prompt, output) if sampling.penalized else None)


@pytest.mark.parametrize("penalty", [0.5, 1.3, 10.0])
def test_the_repetition_penalty_is_that_of_transformers(penalty: float) -> None:
    from transformers import RepetitionPenaltyLogitsProcessor

    logits = torch.randn(2, 30, generator=torch.Generator().manual_seed(1))
    prompt, output = [3, 4, 4], [9, 3]
    plain = RowSampling(1.0, 0, 1.0, 0, None)
    found = restrict(
        logits, [row(RowSampling(1.0, 0, 1.0, 0, None, repetition_penalty=penalty), prompt, output), row(plain, [], [])]
    )
    expected = RepetitionPenaltyLogitsProcessor(penalty)(torch.tensor([prompt + output]), logits[:1].clone())
    assert torch.equal(found[:1], expected)
    assert torch.equal(found[1], logits[1])


def test_presence_and_frequency_count_what_was_generated_and_nothing_of_the_prompt() -> None:
    logits = torch.zeros(1, 6)
    sampling = RowSampling(1.0, 0, 1.0, 0, None, presence_penalty=0.5, frequency_penalty=0.25)
    found = restrict(logits, [row(sampling, [1, 1, 2], [2, 3, 3])])
    assert found[0].tolist() == [0, 0, -0.75, -1.0, 0, 0]


def test_a_banned_token_is_never_drawn() -> None:
    logits = torch.tensor([[9.0, 0.0, 0.0]]).expand(200, -1)
    rows = [PlanRow(0, place, (1,), ((1,),), sampling(), (0,)) for place in range(200)]
    assert {token.token_id for token in sample(logits, rows).collect()} == {1, 2}


def test_logprobs_are_those_before_penalties() -> None:
    logits = torch.randn(1, 30, generator=torch.Generator().manual_seed(1))
    penalized = RowSampling(0.0, 0, 1.0, 0, 0, repetition_penalty=50.0)
    (token,) = sample(logits, [row(penalized, [int(logits.argmax())], [])]).collect()
    assert token.token_id != logits.argmax()
    assert token.logprobs is not None
    assert token.logprobs.logprob == pytest.approx(logits[0].log_softmax(-1)[token.token_id].item())


def test_samples_of_one_row_are_what_their_seeds_draw_alone() -> None:
    logits = torch.randn(2, 40, generator=torch.Generator().manual_seed(2))
    several = RowSampling(1.0, 0, 1.0, 7, None, samples=3)
    found = sample(logits, [PlanRow(0, 0, (1,), ((1,),), several), PlanRow(1, 0, (1,), ((1,),), GREEDY)]).collect()
    assert [(token.sequence_id, token.sample) for token in found] == [(0, 0), (0, 1), (0, 2), (1, 0)]
    alone = [draw(logits[:1], [sampling(seed=7 + index)], [1]).item() for index in range(3)]
    assert [token.token_id for token in found[:3]] == alone
