"""Beam search: the width best continuations, step by step. The rules are those of transformers' ``_beam_search``.

A step looks at the best (1 + number of ending tokens) · width continuations of all beams. Of those, the best width that
do not end live on; those that end are answers if they are among the best width. An answer's score is its
log-probability divided by its generated length, ending token included, to the power of length_penalty.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple


class Continuation(NamedTuple):
    """Beam ``parent``, by its place among the live ones, with one token more."""

    parent: int
    token_id: int
    log_probability: float


@dataclass(frozen=True, slots=True)
class Hypothesis:
    """A whole answer."""

    token_ids: list[int]
    log_probability: float
    score: float
    reason: Literal["stop", "length"]


@dataclass(slots=True)
class BeamSearch:
    """``answers`` are the best ones so far, best first; at the end of the search, the answers of the request."""

    answers: list[Hypothesis] = field(default_factory=list)

    def advance(
        self,
        outputs: Sequence[list[int]],
        log_probabilities: Sequence[float],
        candidates: Sequence[Sequence[tuple[int, float]]],
        *,
        width: int,
        stop_ids: frozenset[int],
        max_length: int,
        length_penalty: float,
        early_stopping: str,
    ) -> list[Continuation]:
        """The continuations that live on, best first; none when the search is over.

        outputs            for each live beam, the tokens it has generated
        log_probabilities  and their sums
        candidates         and its likeliest next tokens with their log-probabilities
        max_length         tokens that an answer may have
        """
        length = len(outputs[0]) + 1
        found = [
            Continuation(beam, token_id, log_probabilities[beam] + logprob)
            for beam, row in enumerate(candidates)
            for token_id, logprob in row
            if logprob > -math.inf
        ]
        found.sort(key=lambda one: -one.log_probability)
        found = found[: (1 + max(1, len(stop_ids))) * width]
        for rank, one in enumerate(found):
            reason: Literal["stop", "length"] = "stop" if one.token_id in stop_ids else "length"
            if rank < width and (reason == "stop" or length >= max_length):
                answer = [*outputs[one.parent], one.token_id]
                score = one.log_probability / length**length_penalty
                self.answers.append(Hypothesis(answer, one.log_probability, score, reason))
        self.answers.sort(key=lambda answer: -answer.score)
        del self.answers[width:]

        living = [one for one in found if one.token_id not in stop_ids][:width]
        if length >= max_length or not living:
            return []
        if len(self.answers) == width:
            if early_stopping == "true":
                return []
            # The best that a live beam can come to: at its length now or, where longer scores better, at the longest.
            best_length = max_length if early_stopping == "never" and length_penalty > 0 else length
            if living[0].log_probability / best_length**length_penalty <= self.answers[-1].score:
                return []
        return living
