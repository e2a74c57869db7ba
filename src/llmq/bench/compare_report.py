"""Schemes that have run the same work: ratios, from which batch one overtakes another, and which to take. No torch."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import median
from typing import TYPE_CHECKING, Any

from llmq.bench.comparison import Comparison
from llmq.bench.workload import Workload
from llmq.memory import format_bytes

if TYPE_CHECKING:
    from llmq.bench.engine import Run, Setup
    from llmq.evals.divergence import Comparison as Quality

MAX_INCREASE = 0.01
"""Of perplexity, up to which a scheme is recommended for its speed."""


@dataclass(frozen=True, slots=True)
class Speeds:
    """One round of one scheme. Tokens/s; ``decode`` by batch size."""

    prefill: float
    decode: dict[int, float]
    run: Run


@dataclass(frozen=True, slots=True)
class Row:
    """One scheme.

    weights_bytes  on a GPU, as the engine packs them
    kv_tokens      tokens of KV cache that fit beside them on the GPU here; None: there is none
    quality        beside the model as it is; None: of that itself, or nobody could measure it
    peer           beside another engine on the workload; None: nobody asked
    """

    scheme: str
    weights_bytes: int
    kv_tokens: int | None
    rounds: tuple[Speeds, ...]
    quality: Quality | None
    peer: Comparison | None = None

    def median_of(self, figure: Callable[[Speeds], float]) -> float:
        return median([figure(speeds) for speeds in self.rounds])

    def decode_throughput(self, batch: int) -> float:
        return self.median_of(lambda speeds: speeds.decode[batch])

    @property
    def output_throughput(self) -> float:
        """Tokens/s on the workload."""
        return self.median_of(lambda speeds: speeds.run.metrics.output_throughput)

    @property
    def failed(self) -> int:
        return sum(speeds.run.metrics.failed for speeds in self.rounds)

    def latency(self, name: str) -> float | None:
        """p50 in milliseconds of ``ttft`` or ``tpot``; None where no request had one."""
        every = (speeds.run.metrics.latencies[name] for speeds in self.rounds)
        found: list[float] = [latency.percentiles[50] for latency in every if latency is not None]
        return median(found) if found else None

    @property
    def joules_per_token(self) -> float | None:
        """Of output, on the workload; None where nobody measures it."""
        found = [one.run.joules_per_token for one in self.rounds if one.run.joules_per_token is not None]
        return median(found) if found else None

    def as_json(self) -> dict[str, Any]:
        return {
            "scheme": self.scheme,
            "weights_bytes": self.weights_bytes,
            "kv_tokens": self.kv_tokens,
            "prefill_throughput": self.median_of(lambda speeds: speeds.prefill),
            "decode_throughput": {str(batch): self.decode_throughput(batch) for batch in self.rounds[0].decode},
            "output_throughput": self.output_throughput,
            "median_ttft_ms": self.latency("ttft"),
            "median_tpot_ms": self.latency("tpot"),
            "joules_per_token": self.joules_per_token,
            "quality": None if self.quality is None else self.quality.as_json(),
            "peer": None if self.peer is None else self.peer.as_json(),
            "rounds": [
                {"prefill_throughput": one.prefill, "decode_throughput": one.decode, **one.run.as_json()}
                for one in self.rounds
            ],
        }


@dataclass(frozen=True, slots=True)
class CompareReport:
    """``side_by_side``: whether the schemes ran in turns, all loaded; else one after another."""

    setup: Setup
    workload_name: str
    workload: Workload
    side_by_side: bool
    rows: tuple[Row, ...]

    def row(self, scheme: str) -> Row:
        return next(row for row in self.rows if row.scheme == scheme)

    @property
    def batch_sizes(self) -> list[int]:
        return list(self.rows[0].rounds[0].decode)

    def ratio(self, scheme: str, other: str, figure: Callable[[Speeds], float]) -> float:
        """Of ``figure``, of ``scheme`` over ``other``: the median over the rounds."""
        pairs = zip(self.row(scheme).rounds, self.row(other).rounds, strict=True)
        return median(figure(one) / figure(two) for one, two in pairs)

    def decode_ratio(self, scheme: str, other: str, batch: int) -> float:
        return self.ratio(scheme, other, lambda speeds: speeds.decode[batch])

    @property
    def crossovers(self) -> dict[tuple[str, str], float]:
        """(faster in large batches, faster in small ones) → the batch size from which it is."""
        found = {}
        names = [row.scheme for row in self.rows]
        for scheme in names:
            for other in names:
                ratios = [self.decode_ratio(scheme, other, batch) for batch in self.batch_sizes]
                if ratios[0] < 1:
                    batch = crossover(self.batch_sizes, ratios)
                    if batch is not None:
                        found[scheme, other] = batch
        return found

    @property
    def requests(self) -> int:
        """Of each round: a file may have fewer than were asked for."""
        metrics = self.rows[0].rounds[0].run.metrics
        return metrics.completed + metrics.failed

    @property
    def recommendation(self) -> str:
        return recommend(self)

    def as_json(self) -> dict[str, Any]:
        return {
            **self.setup.as_json(),
            "workload": self.workload_name,
            **self.workload.as_json(),
            "side_by_side": self.side_by_side,
            "schemes": [row.as_json() for row in self.rows],
            "crossovers": [
                {"scheme": scheme, "overtakes": other, "batch_size": batch}
                for (scheme, other), batch in self.crossovers.items()
            ],
            "recommendation": self.recommendation,
        }


def crossover(batch_sizes: Sequence[int], ratios: Sequence[float]) -> float | None:
    """The batch size from which the ratio stays at 1 or above, between two measured ones in a straight line of
    logarithms; None when it is below 1 at the last."""
    if ratios[-1] < 1:
        return None
    points = list(zip(batch_sizes, ratios, strict=True))
    for (below, under), (above, over) in reversed(list(pairwise(points))):
        if under < 1:
            share = -math.log(under) / (math.log(over) - math.log(under))
            return float(below * (above / below) ** share)
    return float(batch_sizes[0])


def recommend(report: CompareReport) -> str:
    """Which scheme to take for the workload, and why: the fastest of those that keep perplexity within MAX_INCREASE."""
    first, *others = report.rows
    kept = [first, *(row for row in others if row.quality is None or row.quality.increase.value <= MAX_INCREASE)]
    best = max(kept, key=lambda row: row.output_throughput)
    where = f"on {report.workload_name}"
    parts = []
    if best is first:
        parts.append(f"stay with {best.scheme} {where}: nothing else that keeps its quality is faster")
    else:
        speed = report.ratio(best.scheme, first.scheme, _output_throughput)
        parts.append(
            f"take {best.scheme} {where}: {speed:.2f} × the output tokens/s of {first.scheme}, with weights of "
            f"{format_bytes(best.weights_bytes)} instead of {format_bytes(first.weights_bytes)}"
        )
    if best.quality is not None:
        parts.append(f"perplexity {best.quality.increase.value:+.1%}, KL {best.quality.kl.value:.4f}")
    for row in report.rows:
        if row not in kept and row.quality is not None:
            ratio = report.ratio(row.scheme, best.scheme, _output_throughput)
            parts.append(f"{row.scheme} costs {row.quality.increase.value:+.1%} perplexity at {ratio:.2f} × its speed")
    smallest = min(report.rows, key=lambda row: row.weights_bytes)
    if smallest is not best:
        batch = report.crossovers.get((best.scheme, smallest.scheme))
        few = "" if batch is None else f", and faster below {batch:.0f} sequences at once"
        size = format_bytes(smallest.weights_bytes)
        parts.append(f"{smallest.scheme} is the smallest, {size}{few}")
    if all(row.quality is None for row in report.rows):
        parts.append("quality was not measured")
    return "; ".join(parts)


def _output_throughput(speeds: Speeds) -> float:
    return speeds.run.metrics.output_throughput
