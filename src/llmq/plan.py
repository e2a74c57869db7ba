"""StepPlan: what one step runs. The only thing that the engine's host side and the device side share.

Plain data, no torch. A row is one sequence's share of the step: a chunk of its prompt, or its newest token.

        tokens of one sequence   [ already in the KV cache | computed in this step | not yet ]
                                 0                       start           start + len(tokens)
        block_table[i] holds the keys and values of positions i·block_size … (i + 1)·block_size − 1
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class RowSampling:
    """How the next token of a row is drawn. Noise depends on (seed, position) alone, never on the batch."""

    temperature: float
    top_k: int
    top_p: float
    seed: int
    logprobs: int | None

    @property
    def greedy(self) -> bool:
        return self.temperature == 0.0


@dataclass(frozen=True, slots=True)
class PlanRow:
    """One sequence in one step. ``sampling`` is None while its prompt is not complete: nothing is drawn."""

    sequence_id: int
    start: int
    tokens: tuple[int, ...]
    block_table: tuple[int, ...]
    sampling: RowSampling | None

    @property
    def end(self) -> int:
        """Tokens of the sequence that are in the KV cache once the step has run."""
        return self.start + len(self.tokens)


@dataclass(frozen=True, slots=True)
class StepPlan:
    """The rows of a step: those that were running first, in the order of their arrival."""

    rows: tuple[PlanRow, ...]

    @property
    def num_tokens(self) -> int:
        return sum(len(row.tokens) for row in self.rows)

    @property
    def sampled_rows(self) -> list[PlanRow]:
        return [row for row in self.rows if row.sampling is not None]


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """Log-probabilities before temperature: of the drawn token, and of the likeliest ones, best first."""

    logprob: float
    top: tuple[tuple[int, float], ...]


@dataclass(frozen=True, slots=True)
class SampledToken:
    """What the step drew for one sequence."""

    sequence_id: int
    token_id: int
    logprobs: TokenLogprobs | None
