"""Two that ran the same work in turns, as ratios: what the machine does meanwhile, it does to both. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from statistics import median
from typing import Any

from llmq.bench.metrics import Metrics

Figures = Mapping[str, float]
"""By vLLM's field names."""
ROUNDS = 3
"""Times that each runs."""
COMPARED = ("output_throughput", "mean_ttft_ms", "p99_ttft_ms", "mean_tpot_ms", "p99_tpot_ms", "mean_e2el_ms")


@dataclass(frozen=True, slots=True)
class Comparison:
    """``rounds``: the figures of both, ours first, a pair each time that both ran the same requests."""

    peer: str
    version: str | None
    rounds: tuple[tuple[Figures, Figures], ...]

    @property
    def ratios(self) -> dict[str, float]:
        """Ours over theirs, of each figure that both always have: the median over the rounds."""
        every = [figures for round in self.rounds for figures in round]
        common = [name for name in every[0] if all(figures.get(name) for figures in every)]
        return {name: median(ours[name] / theirs[name] for ours, theirs in self.rounds) for name in common}

    def as_json(self) -> dict[str, Any]:
        rounds = [{"llmq": dict(ours), "peer": dict(theirs)} for ours, theirs in self.rounds]
        return {"name": self.peer, "version": self.version, "ratios": self.ratios, "rounds": rounds}


def figures(metrics: Metrics) -> Figures:
    """What is compared of a run."""
    found = metrics.as_json()
    return {name: found[name] for name in COMPARED if found[name] is not None}
