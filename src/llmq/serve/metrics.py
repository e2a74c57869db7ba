"""What a server counts and measures, in the text format of Prometheus, under vLLM's names with ``llmq:`` before them.

Format: https://prometheus.io/docs/instrumenting/exposition_formats/
"""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import accumulate

from llmq.serve.messages import Load

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
FIRST_TOKEN_SECONDS = (
    *(0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0),
    *(20.0, 40.0, 80.0, 160.0, 640.0, 2560.0),
)
TOKEN_SECONDS = (
    *(0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0),
    *(20.0, 40.0, 80.0),
)
"""vLLM's begin at 0.01: small models are faster."""
REQUEST_SECONDS = (
    *(0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0),
    *(120.0, 240.0, 480.0, 960.0, 1920.0, 7680.0),
)
STEP_TOKENS = (1, *(2**power for power in range(3, 15)))
REQUEST_TOKENS = tuple(digit * 10**power for power in range(6) for digit in (1, 2, 5))
NUMBER = (1, 2, 5, 10, 20)


class Histogram:
    """Counts of values up to each of ``bounds``, and beyond the last."""

    def __init__(self, name: str, explanation: str, bounds: Sequence[float]) -> None:
        self.name = name
        self.explanation = explanation
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.sum = 0.0

    def observe(self, value: float) -> None:
        self.counts[bisect_left(self.bounds, value)] += 1
        self.sum += value


class Metrics:
    """Of one server, since its start. Times are seconds."""

    def __init__(self, model: str) -> None:
        self.model = model
        self.finished: Counter[str] = Counter()
        self.prompt_tokens = 0
        self.generation_tokens = 0
        self.refused = 0
        self.histograms: list[Histogram] = []
        add = self._add
        self.time_to_first_token = add("time_to_first_token_seconds", "Arrival to first token.", FIRST_TOKEN_SECONDS)
        self.inter_token_latency = add("inter_token_latency_seconds", "Token to next token.", TOKEN_SECONDS)
        self.e2e_request_latency = add("e2e_request_latency_seconds", "Arrival to last token.", REQUEST_SECONDS)
        self.request_queue_time = add("request_queue_time_seconds", "Arrival to being let in.", REQUEST_SECONDS)
        self.request_prefill_time = add("request_prefill_time_seconds", "Let in to first token.", REQUEST_SECONDS)
        self.request_decode_time = add("request_decode_time_seconds", "First to last token.", REQUEST_SECONDS)
        self.request_inference_time = add("request_inference_time_seconds", "Let in to last token.", REQUEST_SECONDS)
        self.iteration_tokens = add("iteration_tokens_total", "Tokens computed in a step.", STEP_TOKENS)
        self.request_prompt_tokens = add("request_prompt_tokens", "Tokens of a prompt.", REQUEST_TOKENS)
        self.request_generation_tokens = add("request_generation_tokens", "Tokens generated.", REQUEST_TOKENS)
        self.request_params_n = add("request_params_n", "Answers asked for of a prompt.", NUMBER)
        self.request_params_max_tokens = add("request_params_max_tokens", "Tokens asked for at most.", REQUEST_TOKENS)

    def _add(self, name: str, explanation: str, bounds: Sequence[float]) -> Histogram:
        self.histograms.append(Histogram(name, explanation, bounds))
        return self.histograms[-1]

    def render(self, load: Load, waiting: int, total_blocks: int, block_size: int) -> str:
        """The page that Prometheus reads. ``waiting``: requests that are not let in, here and in the engine."""
        return "".join(f"{line}\n" for line in self._lines(load, waiting, total_blocks, block_size))

    def _lines(self, load: Load, waiting: int, total_blocks: int, block_size: int) -> Iterator[str]:
        gauges = (
            ("num_requests_running", "Requests that the engine computes.", load.running),
            ("num_requests_waiting", "Requests that wait to be let in.", waiting),
            ("kv_cache_usage_perc", "Share of the KV cache's blocks in use, 0 to 1.", load.used_blocks / total_blocks),
        )
        counters = (
            ("num_preemptions_total", "Requests that gave up their blocks for others.", load.preemptions),
            ("prefix_cache_queries_total", "Prompt tokens looked up in the prefix cache.", load.prefix_queries),
            ("prefix_cache_hits_total", "Prompt tokens found in the prefix cache.", load.prefix_hits),
            ("engine_steps_total", "Steps of the engine.", load.steps),
            ("prompt_tokens_total", "Tokens of prompts.", self.prompt_tokens),
            ("generation_tokens_total", "Tokens generated.", self.generation_tokens),
            ("request_refused_total", "Requests refused because the queue was full.", self.refused),
        )
        for kind, group in (("gauge", gauges), ("counter", counters)):
            for name, explanation, value in group:
                yield from _head(name, kind, explanation)
                yield self._sample(name, value)
        yield from _head("request_success_total", "counter", "Answers that ended, by the reason.")
        for reason in ("stop", "length", "abort", "error"):
            yield self._sample("request_success_total", self.finished[reason], finished_reason=reason)
        yield from _head("cache_config_info", "gauge", "The KV cache.")
        yield self._sample("cache_config_info", 1, block_size=block_size, num_gpu_blocks=total_blocks)
        for histogram in self.histograms:
            yield from self._histogram(histogram)

    def _histogram(self, histogram: Histogram) -> Iterator[str]:
        name = histogram.name
        yield from _head(name, "histogram", histogram.explanation)
        cumulative = list(accumulate(histogram.counts))
        for bound, number in zip((*histogram.bounds, "+Inf"), cumulative, strict=True):
            yield self._sample(f"{name}_bucket", number, le=bound)
        yield self._sample(f"{name}_sum", histogram.sum)
        yield self._sample(f"{name}_count", cumulative[-1])

    def _sample(self, name: str, value: float, **labels: object) -> str:
        inside = ",".join(
            f'{label}="{_escape(str(text))}"' for label, text in {"model_name": self.model, **labels}.items()
        )
        return f"llmq:{name}{{{inside}}} {value}"


def _head(name: str, kind: str, explanation: str) -> Iterator[str]:
    yield f"# HELP llmq:{name} {explanation}"
    yield f"# TYPE llmq:{name} {kind}"


def _escape(text: str) -> str:
    return text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
