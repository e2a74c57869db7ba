"""The next token of each row, on the device, with parameters of its own for each row.

What is drawn depends on (seed, position) alone: see ``kernels.gumbel``.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from llmq.plan import PlanRow, RowSampling, SampledToken, TokenLogprobs
from llmq.runtime.device import ToHost, on_device
from llmq.runtime.kernels.gumbel import draw_gumbel

LEAST_TOP_P = 1e-30
"""Far below the share of any likeliest token, and above 0 in fp32, which would leave nothing to draw."""


@dataclass(frozen=True, slots=True)
class Samples:
    """What the rows of a step drew. ``token_ids`` int64 [draws], on the device, in the order of the rows and of the
    samples of each; ``collect`` waits for them."""

    token_ids: Tensor
    collect: Callable[[], list[SampledToken]]


def sample(logits: Tensor, rows: Sequence[PlanRow], before: Tensor | None = None) -> Samples:
    """Draw one token, or as many as it has samples, for each of ``rows`` from its ``logits`` [rows, vocabulary].
    ``before``: what the step before drew.

    In this order, as in transformers: penalties, banned tokens and grammars, temperature, top_k, top_p, min_p; beams
    have the first two on log-probabilities. Nothing waits for the device.
    """
    raw, logits = logits, restrict(logits, rows, before)
    candidates = _beam_candidates(raw, rows, before)
    draws = [(index, sample) for index, row in enumerate(rows) for sample in range(_sampling(row).samples)]
    samplings = [_sampling(rows[index]) for index, _ in draws]
    if len(draws) > len(rows):
        index = on_device([index for index, _ in draws], torch.int64, logits.device)
        raw, logits = raw[index], logits[index]
    seeds = [sampling.seed + sample for sampling, (_, sample) in zip(samplings, draws, strict=True)]
    token_ids = draw(logits, samplings, [rows[index].end for index, _ in draws], seeds)
    logprobs = _logprobs(raw, token_ids, [sampling.logprobs for sampling in samplings])
    on_host = ToHost(token_ids)

    def collect() -> list[SampledToken]:
        of_beams = candidates()
        drawn = zip(draws, on_host.tolist(), logprobs(), strict=True)
        return [
            SampledToken(rows[index].sequence_id, token_id, logprob, sample, of_beams.get(index, ()))
            for (index, sample), token_id, logprob in drawn
        ]

    return Samples(token_ids, collect)


def restrict(logits: Tensor, rows: Sequence[PlanRow], before: Tensor | None = None) -> Tensor:
    """``logits`` with the penalties of each row applied, and at −inf its banned tokens and what its grammar excludes.

    A token that the row has seen, prompt included, is divided by repetition_penalty where positive and multiplied
    where negative (Keskar et al., 2019); one that it has generated loses presence_penalty, and frequency_penalty for
    each time it did.
    """
    penalized = [index for index, row in enumerate(rows) if row.history is not None]
    banned = [(index, token) for index, row in enumerate(rows) for token in row.banned if token < logits.shape[1]]
    guided = [index for index, row in enumerate(rows) if row.allowed is not None]
    if penalized or banned or guided:
        logits = logits.clone()
    if penalized:
        histories = [row.history for row in rows if row.history is not None]
        samplings = [_sampling(rows[index]) for index in penalized]
        generated = _count([history.output_ids for history in histories], logits, before)
        seen = (_count([history.prompt_ids for history in histories], logits) + generated) > 0
        index = on_device(penalized, torch.int64, logits.device)
        part = logits[index]
        repetition = _column([sampling.repetition_penalty for sampling in samplings], torch.float32, logits)
        part = torch.where(seen, torch.where(part > 0, part / repetition, part * repetition), part)
        part -= _column([sampling.frequency_penalty for sampling in samplings], torch.float32, logits) * generated
        part -= _column([sampling.presence_penalty for sampling in samplings], torch.float32, logits) * (generated > 0)
        logits[index] = part
    if banned:
        at = on_device(banned, torch.int64, logits.device)
        logits[at[:, 0], at[:, 1]] = -torch.inf
    if guided:
        allowed = _unpack([row.allowed for row in rows if row.allowed is not None], logits)
        index = on_device(guided, torch.int64, logits.device)
        logits[index] = logits[index].masked_fill(~allowed, -torch.inf)
    return logits


def draw(
    logits: Tensor, samplings: Sequence[RowSampling], positions: Sequence[int], seeds: Sequence[int] | None = None
) -> Tensor:
    """Token ids [rows]: the likeliest where temperature is 0, else one drawn from softmax(logits / temperature),
    cut to the top_k likeliest, the smallest set that reaches top_p, and what is at least min_p times as likely as the
    likeliest. ``positions``: where each token will stand; ``seeds``: instead of those of ``samplings``."""
    own = [sampling.seed for sampling in samplings] if seeds is None else seeds
    temperatures = array("d", [sampling.temperature for sampling in samplings])
    # One copy takes all to the device: integers of 64 bits, and numbers of as many.
    whole = on_device(array("q", [*own, *positions, *array("q", temperatures.tobytes())]), torch.int64, logits.device)
    of_rows = whole.view(3, -1)
    heat = of_rows[2].view(torch.float64)
    if any(sampling.top_k or sampling.top_p < 1 or sampling.min_p for sampling in samplings):
        logits = _cut(logits, heat[:, None].float(), samplings)
    return draw_gumbel(logits, heat, of_rows[0], of_rows[1])


def score(logits: Tensor, targets: Sequence[int], top: int) -> Callable[[], list[TokenLogprobs]]:
    """Log-probabilities of ``targets`` [rows], and of the ``top`` likeliest tokens, under ``logits``; to be called for
    when they are needed."""
    found = _logprobs(logits, on_device(targets, torch.int64, logits.device), [top] * len(targets))
    return lambda: [one for one in found() if one is not None]


def _cut(logits: Tensor, temperatures: Tensor, samplings: Sequence[RowSampling]) -> Tensor:
    """``logits`` with −inf for what top_k, top_p and min_p leave out. The likeliest always stays."""
    scores = logits / torch.where(temperatures > 0, temperatures, 1.0)
    kept = scores
    if any(sampling.top_k or sampling.top_p < 1 for sampling in samplings):
        vocabulary = logits.shape[1]
        top_k = [min(sampling.top_k or vocabulary, vocabulary) for sampling in samplings]
        top_p = [max(sampling.top_p, LEAST_TOP_P) for sampling in samplings]
        kept = _keep_likeliest(scores, _column(top_k, torch.int64, logits), _column(top_p, torch.float32, logits))
    if any(sampling.min_p for sampling in samplings):
        least = _column([sampling.min_p for sampling in samplings], torch.float32, logits)
        kept = kept.masked_fill(kept - kept.amax(-1, keepdim=True) < least.log(), -torch.inf)
    return logits.masked_fill(kept == -torch.inf, -torch.inf)


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


def _logprobs(
    logits: Tensor, token_ids: Tensor, wanted: Sequence[int | None]
) -> Callable[[], list[TokenLogprobs | None]]:
    widest = max((count for count in wanted if count is not None), default=None)
    if widest is None:
        return lambda: [None] * len(wanted)
    logprobs = logits.log_softmax(dim=-1)
    drawn = ToHost(logprobs.gather(-1, token_ids[:, None]).squeeze(-1))
    top = logprobs.topk(min(widest, logits.shape[1]), dim=-1)
    values, indices = ToHost(top.values), ToHost(top.indices)

    def collect() -> list[TokenLogprobs | None]:
        found = zip(wanted, drawn.tolist(), indices.tolist(), values.tolist(), strict=True)
        return [
            None if count is None else TokenLogprobs(logprob, tuple(zip(ids, likeliest, strict=True))[:count])
            for count, logprob, ids, likeliest in found
        ]

    return collect


def _beam_candidates(
    logits: Tensor, rows: Sequence[PlanRow], before: Tensor | None
) -> Callable[[], dict[int, tuple[tuple[int, float], ...]]]:
    """For the rows that are beams, by index: their likeliest tokens, best first."""
    beams = {index: _sampling(row).beams for index, row in enumerate(rows) if _sampling(row).beams}
    if not beams:
        return dict
    index = on_device(list(beams), torch.int64, logits.device)
    logprobs = restrict(logits[index].log_softmax(dim=-1), [rows[row] for row in beams], before)
    top = logprobs.topk(min(max(beams.values()), logits.shape[1]), dim=-1)
    ids, values = ToHost(top.indices), ToHost(top.values)

    def collect() -> dict[int, tuple[tuple[int, float], ...]]:
        found = zip(beams.items(), ids.tolist(), values.tolist(), strict=True)
        return {
            row: tuple(zip(its_ids, its_values, strict=True))[:count] for (row, count), its_ids, its_values in found
        }

    return collect


def _count(lists: Sequence[Sequence[int]], logits: Tensor, before: Tensor | None = None) -> Tensor:
    """How often each token occurs in each of ``lists``: fp32 [lists, vocabulary]. −1 − i is the i-th of ``before``."""
    rows = on_device([row for row, ids in enumerate(lists) for _ in ids], torch.int64, logits.device)
    tokens = on_device([token for ids in lists for token in ids], torch.int64, logits.device)
    if before is not None:
        tokens = torch.where(tokens < 0, before[(-1 - tokens).clamp(min=0)], tokens)
    counts = torch.zeros(len(lists), logits.shape[1], device=logits.device)
    return counts.index_put_((rows, tokens), torch.ones((), device=logits.device), accumulate=True)


def _unpack(masks: Sequence[bytes], logits: Tensor) -> Tensor:
    """Bitmasks of the vocabulary as booleans: [masks, vocabulary]."""
    words = on_device(array("i", b"".join(masks)), torch.int32, logits.device).view(len(masks), -1, 1)
    bits = words >> torch.arange(32, dtype=torch.int32, device=logits.device) & 1
    return bits.bool().flatten(1)[:, : logits.shape[1]]


def _column(values: Sequence[float], dtype: torch.dtype, like: Tensor) -> Tensor:
    return on_device(values, dtype, like.device)[:, None]


def _sampling(row: PlanRow) -> RowSampling:
    if row.sampling is None:
        raise ValueError(f"sequence {row.sequence_id} draws no token in this step")
    return row.sampling
