"""Time the host's side of a step: schedule and update, for so many running sequences and contexts so long.

    python scripts/bench_scheduler.py
    python scripts/bench_scheduler.py --running 256 --context 1000 100000

The model is left out: every step draws one token for each sequence. One process, one core, median and 99th percentile.
"""

from __future__ import annotations

import argparse
import gc
import time
from statistics import median

from llmq.engine.blocks import BlockManager
from llmq.engine.options import EngineOptions
from llmq.engine.request import Request, SamplingParams, token_array
from llmq.engine.scheduler import Scheduler
from llmq.plan import SampledToken, StepOutput


def measure(running: int, context: int, steps: int, block_size: int, samples: int = 1) -> list[float]:
    """Seconds of schedule and update together, for each of ``steps`` steps."""
    requests = running // samples
    per_sequence = (context + steps + 2 * block_size) // block_size
    # All prompts in the first step, so that the sequences stand at the same place when the clock starts.
    options = EngineOptions(max_num_seqs=running, max_num_batched_tokens=running * context, block_size=block_size)
    manager = BlockManager(2 * running * (per_sequence + 2), block_size)
    scheduler = Scheduler(options, manager)
    for number in range(requests):
        # No two prompts begin alike: what is measured is the work of that many full contexts.
        prompt = token_array((number * 7 + at * at) % 30_000 for at in range(context))
        params = SamplingParams(max_tokens=None, n=samples, seed=0)
        scheduler.add(Request(number, prompt, params, 0, context + steps + block_size))
    while scheduler.waiting or any(sequence.pending != 1 for one in scheduler.running for sequence in one.live):
        _step(scheduler)
    gc.collect()
    return [_step(scheduler) for _ in range(steps)]


def _step(scheduler: Scheduler) -> float:
    started = time.perf_counter()
    plan = scheduler.schedule()
    scheduled = time.perf_counter()
    output = StepOutput(
        [
            SampledToken(row.sequence_id, 7, None, sample)
            for row in plan.sampled_rows
            for sample in range(row.sampling.samples if row.sampling else 0)
        ]
    )
    drawn = time.perf_counter()
    scheduler.update(plan, output)
    return time.perf_counter() - drawn + scheduled - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--running", type=int, nargs="+", default=[64, 256, 1024])
    parser.add_argument("--context", type=int, nargs="+", default=[100, 1000, 4000])
    parser.add_argument("--samples", type=int, default=1, help="sequences of one request")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--block-size", type=int, default=64)
    arguments = parser.parse_args()
    print(f"{'running':>8} {'context':>8} {'median ms':>10} {'p99 ms':>8} {'µs a sequence':>14}")
    for running in arguments.running:
        for context in arguments.context:
            times = sorted(measure(running, context, arguments.steps, arguments.block_size, arguments.samples))
            middle, late = median(times) * 1e3, times[int(len(times) * 0.99)] * 1e3
            print(f"{running:>8} {context:>8} {middle:>10.3f} {late:>8.3f} {middle * 1e3 / running:>14.2f}")


if __name__ == "__main__":
    main()
