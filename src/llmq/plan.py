"""StepPlan: what one step runs. The only thing that the engine's host side and the device side share.

Plain data, no torch. A row is one sequence's share of the step: a chunk of its prompt, or its newest token.

        tokens of one sequence   [ already in the KV cache | computed in this step | not yet ]
                                 0                       start           start + len(tokens)
        block_tables[g][i] holds the keys and values of positions i·block_size … (i + 1)·block_size − 1
        in the layers of group g; block 0 where no query of the row will look

The side effects of a step happen in this order: swap out, swap in, copy, forward, sample, publish.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple


@dataclass(frozen=True, slots=True)
class RowSampling:
    """How the next token of a row is drawn. Noise depends on (seed, position) alone, never on the batch.

    samples    tokens drawn from the same logits, sample i with seed + i: how a prompt becomes several completions
    beams      report this many of the likeliest tokens with their log-probabilities, for a beam search; 0: none
    """

    temperature: float
    top_k: int
    top_p: float
    seed: int
    logprobs: int | None
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    samples: int = 1
    beams: int = 0

    @property
    def plain(self) -> bool:
        """Whether one token is drawn from all of the vocabulary, and nothing else is asked for."""
        cut = self.top_k or self.top_p < 1 or self.min_p
        return not (cut or self.penalized or self.beams or self.logprobs is not None) and self.samples == 1

    @property
    def penalized(self) -> bool:
        return self.repetition_penalty != 1.0 or self.presence_penalty != 0.0 or self.frequency_penalty != 0.0


@dataclass(frozen=True, slots=True)
class LayerGroup:
    """Layers that share block tables: all see ``window`` tokens, or, at None, all."""

    window: int | None
    layers: tuple[int, ...]


def layer_groups(windows: Sequence[int | None]) -> tuple[LayerGroup, ...]:
    """Layers by what they see (``windows``: one for each layer), all groups of one size, so that any block serves any
    group: a model of 21 full and 7 sliding layers has four groups of 7."""
    kinds: dict[int | None, list[int]] = {}
    for layer, window in enumerate(windows):
        kinds.setdefault(window, []).append(layer)
    size = math.gcd(*map(len, kinds.values()))
    return tuple(
        LayerGroup(window, tuple(layers[start : start + size]))
        for window, layers in kinds.items()
        for start in range(0, len(layers), size)
    )


class History(NamedTuple):
    """What a row has said so far, for the penalties of what it says again. The last id may be that of a token which the
    step before draws, see ``PlanRow.tokens``."""

    prompt_ids: Sequence[int]
    output_ids: Sequence[int]


class PlanRow(NamedTuple):
    """One sequence in one step. A named tuple: a step makes hundreds, and they must cost little.

    tokens          their ids; −1 − i stands for the i-th token that the step before draws, all samples of all its rows
                    counted
    block_tables    as long as the sequence keeps its blocks the same list in every plan, which grows at its end: who
                    remembers how much of it was read has to read no more than that
    sampling        None while the prompt is not complete: nothing is drawn
    banned          tokens that must not be drawn now
    history         None unless the row is penalized
    prompt_targets  the tokens that follow ``tokens`` in the prompt, where their log-probabilities are asked for
    prompt_top      and for how many of the likeliest, beside them
    allowed         a bit a token, in 32-bit words, the least first: what a grammar lets come next; None: all
    """

    sequence_id: int
    start: int
    tokens: tuple[int, ...]
    block_tables: tuple[Sequence[int], ...]
    sampling: RowSampling | None
    banned: tuple[int, ...] = ()
    history: History | None = None
    prompt_targets: tuple[int, ...] = ()
    prompt_top: int = 0
    allowed: bytes | None = None

    @property
    def plain(self) -> bool:
        """Whether it draws a token by its logits alone, or none."""
        return not any(self[5:]) and (self.sampling is None or self.sampling.plain)

    @property
    def end(self) -> int:
        """Tokens of the sequence that are in the KV cache once the step has run."""
        return self.start + len(self.tokens)


@dataclass(frozen=True, slots=True)
class StepPlan:
    """The rows of a step, and the moves of blocks before it.

    ``swap_out`` (pool, main memory), ``swap_in`` (main memory, pool) and ``copies`` (from, to) are pairs of blocks.

    All copies read what the blocks held before any of them; no block is written twice.
    """

    rows: tuple[PlanRow, ...]
    swap_out: tuple[tuple[int, int], ...] = ()
    swap_in: tuple[tuple[int, int], ...] = ()
    copies: tuple[tuple[int, int], ...] = ()

    @property
    def num_tokens(self) -> int:
        return sum(len(row.tokens) for row in self.rows)

    @property
    def sampled_rows(self) -> list[PlanRow]:
        return [row for row in self.rows if row.sampling is not None]


class TokenLogprobs(NamedTuple):
    """Log-probabilities before penalties and temperature: of the drawn token, and of the likeliest ones, best first."""

    logprob: float
    top: tuple[tuple[int, float], ...]


class SampledToken(NamedTuple):
    """What a row drew. ``candidates``: of a beam, its likeliest tokens with their log-probabilities, best first."""

    sequence_id: int
    token_id: int
    logprobs: TokenLogprobs | None
    sample: int = 0
    candidates: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, slots=True)
class StepOutput:
    """What a step gave: drawn tokens in the order of the rows, and log-probabilities of prompt tokens by sequence."""

    sampled: Sequence[SampledToken]
    prompt_logprobs: Sequence[tuple[int, list[TokenLogprobs]]] = ()
