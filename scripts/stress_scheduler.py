"""Run the scheduler through random steps under random pressure, with a model that checks every block it reads.

    python scripts/stress_scheduler.py --steps 1000000 --seed 0

Each world has random settings (policy, pool, swap space, windows, prefix cache, preemption) and random requests (one
sample, several, beams; prompts that begin alike). Every answer is compared with what the request gives alone in a large
pool. After each step: free and used blocks make up the pool, reference counts equal table entries, no block is both
free and used, and no slot is written that another sequence reads.
"""

from __future__ import annotations

import argparse
import importlib
import random
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

from llmq.engine.request import Request
from llmq.engine.scheduler import Scheduler

simulated = importlib.import_module("simulated_model")
FIELDS = ("steps", "preemptions", "swapped_out", "swapped_in", "copies", "prefix_hits")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    totals = dict.fromkeys((*FIELDS, "worlds", "requests", "aborts"), 0)
    started = time.perf_counter()
    while totals["steps"] < arguments.steps:
        seed = arguments.seed + totals["worlds"]
        try:
            counts = run_world(seed)
        except BaseException:
            print(f"failed: world {seed}", file=sys.stderr)
            raise
        for name, count in counts.items():
            totals[name] += count
        totals["worlds"] += 1
    print(", ".join(f"{count:,} {name}" for name, count in totals.items()), f"in {time.perf_counter() - started:.0f} s")


def run_world(seed: int) -> dict[str, int]:
    """One world from its first request to its last. Raises AssertionError or RuntimeError when anything is wrong."""
    chance = random.Random(seed)
    windows = chance.choice([(None,), (None,), (None,), (20,), (None, 20)])
    blocks = chance.randint(6, 24) * len(windows)
    eos_every = chance.choice([0, 7])
    scheduler = simulated.make_scheduler(
        blocks,
        windows=windows,
        cpu_blocks=chance.choice([0, 3, 12, 60]),
        max_num_seqs=chance.randint(4, 10),
        max_num_batched_tokens=chance.choice([8, 17, 64, 200]),
        prefix_caching=chance.random() < 0.6,
        scheduler=chance.choice(["mixed", "prefill-first"]),
        max_prefill_steps=chance.randint(1, 4),
        preemption=chance.choice(["auto", "recompute", "swap"]),
        queue=chance.choice(["fcfs", "priority"]),
        max_skips=chance.choice([0, 0, 3]),
        watermark=chance.choice([0.0, 0.01, 0.3]),
    )
    if chance.random() < 0.4:
        rate = chance.choice([0.05, 0.2])
        scheduler.pressure = lambda running: chance.choice(running) if running and chance.random() < rate else None
    pending = [_request(chance, number, scheduler) for number in range(chance.randint(3, 25))]
    submitted = [request for request in pending if request is not None]
    queue, aborted = list(submitted), set[object]()
    model = simulated.SimulatedModel(scheduler, eos_every=eos_every)
    steps = 0
    while queue or not scheduler.idle:
        for _ in range(chance.randint(0, 3)):
            if queue:
                scheduler.add(queue.pop(0))
        if scheduler.idle:
            continue
        plan = scheduler.schedule()
        assert plan.num_tokens <= scheduler.options.batched_tokens
        assert len(plan.rows) <= scheduler.options.seats
        output = model.run(plan)
        if chance.random() < 0.02:
            _abort(chance, submitted, queue, aborted, scheduler)
        scheduler.update(plan, output)
        scheduler.check_integrity()
        if chance.random() < 0.02:
            _abort(chance, submitted, queue, aborted, scheduler)
        steps += 1
        assert steps < 20_000, scheduler.describe()
    assert scheduler.blocks.used == 0
    assert scheduler.blocks.cpu_used == 0

    whole = [request for request in submitted if request.request_id not in aborted]
    for request in whole:
        alone = simulated.make_scheduler(2000, max_num_batched_tokens=4000, max_num_seqs=64)
        again = simulated.make_request(0, request.prompt_ids)
        again.params, again.seed, again.max_total = request.params, request.seed, request.max_total
        again.__post_init__()
        alone.add(again)
        reference = simulated.SimulatedModel(alone, eos_every=eos_every)
        while not alone.idle:
            plan = alone.schedule()
            alone.update(plan, reference.run(plan))
        assert simulated.answers([again]) == simulated.answers([request]), (seed, request.request_id)
    counts = {name: getattr(scheduler.stats, name) for name in FIELDS}
    return counts | {"requests": len(submitted), "aborts": len(aborted)}


def _request(chance: random.Random, number: int, scheduler: Scheduler) -> Request | None:
    """A random request, or None when it could never run."""
    size = simulated.BLOCK
    start = chance.choice([[], [5] * size, [5] * 2 * size, [5] * size + [6] * size])
    length = chance.choice([1, 15, 16, 17, chance.randint(1, 60)])
    prompt = [*start, *(1 + (number * 131 + at) % 89 for at in range(length))][: max(1, length)]
    width = chance.choice([1, 1, 1, 2, 3, 4])
    params: dict[str, object] = {"seed": number, "priority": chance.randint(-1, 1)}
    params["beam_width" if chance.random() < 0.3 else "n"] = width
    params["early_stopping"] = chance.choice(["true", "false", "never"])
    request: Request = simulated.make_request(number, prompt, chance.choice([1, 3, 17, 40]), **params)
    worst = scheduler.blocks.worst_case(len(prompt), request.max_total, width)
    fits = worst <= scheduler.blocks.total and width <= scheduler.options.seats
    if scheduler.options.scheduler == "prefill-first" and len(prompt) > scheduler.options.batched_tokens:
        fits = False
    return request if fits else None


def _abort(
    chance: random.Random, submitted: list[Request], queue: list[Request], aborted: set[object], scheduler: Scheduler
) -> None:
    there = [one for one in submitted if one not in queue and one.live]
    if there:
        victim = chance.choice(there)
        scheduler.abort(victim.request_id)
        aborted.add(victim.request_id)


if __name__ == "__main__":
    main()
