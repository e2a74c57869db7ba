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
    """Draw one token, or as many as it has samples, for each of ``rows`` from its fp32 ``logits`` [rows, vocabulary].

    In this order, as in transformers: penalties, banned tokens, temperature, top_k, top_p, min_p.
    """
    raw, logits = logits, restrict(logits, rows)
    candidates = _beam_candidates(logits, rows)
    draws = [(index, sample) for index, row in enumerate(rows) for sample in range(_sampling(row).samples)]
    samplings = [_sampling(rows[index]) for index, _ in draws]
    if len(draws) > len(rows):
        index = torch.tensor([index for index, _ in draws]).to(logits.device, non_blocking=True)
        raw, logits = raw[index], logits[index]
    seeds = [sampling.seed + sample for sampling, (_, sample) in zip(samplings, draws, strict=True)]
    token_ids = draw(logits, samplings, [rows[index].end for index, _ in draws], seeds)
    logprobs = _logprobs(raw, token_ids, [sampling.logprobs for sampling in samplings])
    drawn = zip(draws, token_ids.tolist(), logprobs, strict=True)
    return [
        SampledToken(rows[index].sequence_id, token_id, logprob, sample, candidates.get(index, ()))
        for (index, sample), token_id, logprob in drawn
    ]


def restrict(logits: Tensor, rows: Sequence[PlanRow]) -> Tensor:
    """``logits`` with the penalties of each row applied and its banned tokens at −inf.

    A token that the row has seen, prompt included, is divided by repetition_penalty where positive and multiplied
    where negative (Keskar et al., 2019); one that it has generated loses presence_penalty, and frequency_penalty for
    each time it did.
    """
    penalized = [index for index, row in enumerate(rows) if row.history is not None]
    banned = [(index, token) for index, row in enumerate(rows) for token in row.banned if token < logits.shape[1]]
    if penalized or banned:
        logits = logits.clone()
    if penalized:
        histories = [row.history for row in rows if row.history is not None]
        samplings = [_sampling(rows[index]) for index in penalized]
        generated = _count([history.output_ids for history in histories], logits)
        seen = (_count([history.prompt_ids for history in histories], logits) + generated) > 0
        index = torch.tensor(penalized).to(logits.device, non_blocking=True)
        part = logits[index]
        repetition = _column([sampling.repetition_penalty for sampling in samplings], torch.float32, logits)
        part = torch.where(seen, torch.where(part > 0, part / repetition, part * repetition), part)
        part -= _column([sampling.frequency_penalty for sampling in samplings], torch.float32, logits) * generated
        part -= _column([sampling.presence_penalty for sampling in samplings], torch.float32, logits) * (generated > 0)
        logits[index] = part
    if banned:
        at = torch.tensor(banned).to(logits.device, non_blocking=True)
        logits[at[:, 0], at[:, 1]] = -torch.inf
    return logits


def draw(
    logits: Tensor, samplings: Sequence[RowSampling], positions: Sequence[int], seeds: Sequence[int] | None = None
) -> Tensor:
    """Token ids [rows]: the likeliest where temperature is 0, else one drawn from softmax(logits / temperature),
    cut to the top_k likeliest, the smallest set that reaches top_p, and what is at least min_p times as likely as the
    likeliest. ``positions``: where each token will stand; ``seeds``: instead of those of ``samplings``."""
    greedy = logits.argmax(dim=-1)
    if all(sampling.greedy for sampling in samplings):
        return greedy

    def column(values: Sequence[float], dtype: torch.dtype) -> Tensor:
        return _column(values, dtype, logits)

    temperatures = column([sampling.temperature or 1.0 for sampling in samplings], torch.float32)
    scores = logits / temperatures
    if any(sampling.top_k or sampling.top_p < 1 for sampling in samplings):
        vocabulary = logits.shape[1]
        top_k = column([min(sampling.top_k or vocabulary, vocabulary) for sampling in samplings], torch.int64)
        scores = _keep_likeliest(scores, top_k, column([sampling.top_p for sampling in samplings], torch.float32))
    probabilities = scores.softmax(dim=-1)
    if any(sampling.min_p for sampling in samplings):
        least = column([sampling.min_p for sampling in samplings], torch.float32)
        probabilities = probabilities.masked_fill(probabilities < least * probabilities.amax(-1, keepdim=True), 0.0)
    own = column([sampling.seed for sampling in samplings] if seeds is None else seeds, torch.int64)
    # Dividing probabilities by exponential noise and taking the largest draws from them (Gumbel-max, in other words)
    # without a cumulative sum, and without waiting for the device.
    noise = exponential_noise(own, column(positions, torch.int64), logits.shape[1])
    drawn = (probabilities / noise).argmax(dim=-1)
    is_greedy = torch.tensor([sampling.greedy for sampling in samplings]).to(logits.device, non_blocking=True)
    return torch.where(is_greedy, greedy, drawn)


def score(logits: Tensor, targets: Sequence[int], top: int) -> list[TokenLogprobs]:
    """Log-probabilities of ``targets`` [rows], and of the ``top`` likeliest tokens, under ``logits``."""
    token_ids = torch.tensor(targets).to(logits.device, non_blocking=True)
    return [found for found in _logprobs(logits, token_ids, [top] * len(targets)) if found is not None]


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


def _logprobs(logits: Tensor, token_ids: Tensor, wanted: Sequence[int | None]) -> list[TokenLogprobs | None]:
    widest = max((count for count in wanted if count is not None), default=None)
    if widest is None:
        return [None] * len(wanted)
    logprobs = logits.log_softmax(dim=-1)
    drawn = logprobs.gather(-1, token_ids[:, None]).squeeze(-1).tolist()
    top = logprobs.topk(min(widest, logits.shape[1]), dim=-1)
    values, indices = top.values.tolist(), top.indices.tolist()
    return [
        None if count is None else TokenLogprobs(drawn[row], tuple(zip(indices[row], values[row], strict=True))[:count])
        for row, count in enumerate(wanted)
    ]


def _beam_candidates(logits: Tensor, rows: Sequence[PlanRow]) -> dict[int, tuple[tuple[int, float], ...]]:
    """For the rows that are beams, by index: their likeliest tokens, best first."""
    beams = {index: _sampling(row).beams for index, row in enumerate(rows) if _sampling(row).beams}
    if not beams:
        return {}
    index = torch.tensor(list(beams)).to(logits.device, non_blocking=True)
    top = logits[index].log_softmax(dim=-1).topk(min(max(beams.values()), logits.shape[1]), dim=-1)
    found = zip(beams.items(), top.indices.tolist(), top.values.tolist(), strict=True)
    return {row: tuple(zip(ids, values, strict=True))[:count] for (row, count), ids, values in found}


def _count(lists: Sequence[Sequence[int]], logits: Tensor) -> Tensor:
    """How often each token occurs in each of ``lists``: fp32 [lists, vocabulary]."""
    rows = torch.tensor([row for row, ids in enumerate(lists) for _ in ids], dtype=torch.int64)
    tokens = torch.tensor([token for ids in lists for token in ids], dtype=torch.int64)
    counts = torch.zeros(len(lists), logits.shape[1], device=logits.device)
    at = (rows.to(logits.device, non_blocking=True), tokens.to(logits.device, non_blocking=True))
    return counts.index_put_(at, torch.ones((), device=logits.device), accumulate=True)


def _column(values: Sequence[float], dtype: torch.dtype, like: Tensor) -> Tensor:
    return torch.tensor(list(values), dtype=dtype).to(like.device, non_blocking=True)[:, None]


def _sampling(row: PlanRow) -> RowSampling:
    if row.sampling is None:
        raise ValueError(f"sequence {row.sequence_id} draws no token in this step")
    return row.sampling
