"""The next token of each row, on the device, with parameters of its own for each row.

Noise is a pure function of (seed, position, token id), not the state of a generator: a request draws the same tokens
whatever else is in the batch, in whatever order, also when it is computed again after a preemption.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from llmq.plan import PlanRow, RowSampling, SampledToken, TokenLogprobs

_MIX_1, _MIX_2, _GOLDEN = -0x40A7B892E31B1A47, -0x6B2FB644ECCEEE15, -0x61C8864680B583EB
"""splitmix64's odd constants (Steele, Lea & Flood, 2014), as signed 64-bit integers."""


def sample(logits: Tensor, rows: Sequence[PlanRow]) -> list[SampledToken]:
    """Draw one token for each of ``rows`` from its fp32 ``logits`` [rows, vocabulary]."""
    samplings = [_sampling(row) for row in rows]
    token_ids = draw(logits, samplings, [row.end for row in rows])
    logprobs = _logprobs(logits, token_ids, samplings)
    ids = zip(rows, token_ids.tolist(), logprobs, strict=True)
    return [SampledToken(row.sequence_id, token_id, logprob) for row, token_id, logprob in ids]


def draw(logits: Tensor, samplings: Sequence[RowSampling], positions: Sequence[int]) -> Tensor:
    """Token ids [rows]: the likeliest where temperature is 0, else one drawn from softmax(logits / temperature),
    cut to the top_k likeliest and the smallest set that reaches top_p. ``positions``: where each token will stand."""
    greedy = logits.argmax(dim=-1)
    if all(sampling.greedy for sampling in samplings):
        return greedy

    def column(values: list[float] | list[int], dtype: torch.dtype) -> Tensor:
        return torch.tensor(values, dtype=dtype).to(logits.device, non_blocking=True)[:, None]

    temperatures = column([sampling.temperature or 1.0 for sampling in samplings], torch.float32)
    scores = logits / temperatures
    if any(sampling.top_k or sampling.top_p < 1 for sampling in samplings):
        vocabulary = logits.shape[1]
        top_k = column([min(sampling.top_k or vocabulary, vocabulary) for sampling in samplings], torch.int64)
        scores = _keep_likeliest(scores, top_k, column([sampling.top_p for sampling in samplings], torch.float32))
    seeds = column([sampling.seed for sampling in samplings], torch.int64)
    # Dividing probabilities by exponential noise and taking the largest draws from them (Gumbel-max, in other words)
    # without a cumulative sum, and without waiting for the device.
    noise = exponential_noise(seeds, column(list(positions), torch.int64), logits.shape[1])
    drawn = (scores.softmax(dim=-1) / noise).argmax(dim=-1)
    is_greedy = torch.tensor([sampling.greedy for sampling in samplings]).to(logits.device, non_blocking=True)
    return torch.where(is_greedy, greedy, drawn)


def exponential_noise(seeds: Tensor, positions: Tensor, vocabulary: int) -> Tensor:
    """Exp(1) noise, fp32 [rows, vocabulary], from int64 ``seeds`` and ``positions`` [rows, 1]."""
    tokens = torch.arange(vocabulary, device=seeds.device)
    state = _mix(_mix(seeds * _GOLDEN + positions) + tokens * _GOLDEN)
    uniform = ((state >> 40) & 0xFFFFFF).float().add_(0.5).mul_(2.0**-24)
    return uniform.log_().neg_()


def _mix(x: Tensor) -> Tensor:
    """splitmix64's finalizer. int64 products wrap as unsigned ones do; right shifts have their sign bits masked."""
    x = (x ^ ((x >> 30) & ((1 << 34) - 1))) * _MIX_1
    x = (x ^ ((x >> 27) & ((1 << 37) - 1))) * _MIX_2
    return x ^ ((x >> 31) & ((1 << 33) - 1))


def _keep_likeliest(scores: Tensor, top_k: Tensor, top_p: Tensor) -> Tensor:
    """Set to −inf what is neither among the ``top_k`` likeliest nor in the smallest set that reaches ``top_p``."""
    ordered, order = scores.sort(dim=-1, descending=True, stable=True)
    rank = torch.arange(scores.shape[1], device=scores.device)
    ordered = ordered.masked_fill(rank >= top_k, -torch.inf)
    probabilities = ordered.softmax(dim=-1)
    before = probabilities.cumsum(dim=-1) - probabilities
    # The likeliest token always stays: nothing comes before it.
    ordered = ordered.masked_fill(before >= top_p, -torch.inf)
    return torch.empty_like(scores).scatter_(-1, order, ordered)


def _logprobs(logits: Tensor, token_ids: Tensor, samplings: Sequence[RowSampling]) -> list[TokenLogprobs | None]:
    widest = max((sampling.logprobs for sampling in samplings if sampling.logprobs is not None), default=None)
    if widest is None:
        return [None] * len(samplings)
    logprobs = logits.log_softmax(dim=-1)
    drawn = logprobs.gather(-1, token_ids[:, None]).squeeze(-1).tolist()
    top = logprobs.topk(widest, dim=-1)
    values, indices = top.values.tolist(), top.indices.tolist()
    return [
        None
        if sampling.logprobs is None
        else TokenLogprobs(drawn[row], tuple(zip(indices[row], values[row], strict=True))[: sampling.logprobs])
        for row, sampling in enumerate(samplings)
    ]


def _sampling(row: PlanRow) -> RowSampling:
    if row.sampling is None:
        raise ValueError(f"sequence {row.sequence_id} draws no token in this step")
    return row.sampling
