"""Random runs: whatever is added, forked, aborted, preempted and swapped, no block and no token is lost or doubled."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from simulated_model import SimulatedModel, make_request, make_scheduler

from llmq.engine.request import Request
from llmq.plan import StepOutput, StepPlan

SCRIPTS = Path(__file__).resolve().parents[1] / "scripts"


class Engine(RuleBasedStateMachine):
    """The simulated model checks every block that a step reads; see ``tests/simulated_model.py``."""

    @initialize(
        blocks=st.integers(6, 20),
        cpu_blocks=st.sampled_from([0, 2, 30]),
        window=st.sampled_from([None, None, 20]),
        tokens=st.sampled_from([8, 20, 64]),
        prefix_caching=st.booleans(),
        scheduler=st.sampled_from(["mixed", "prefill-first"]),
        preemption=st.sampled_from(["auto", "recompute", "swap"]),
        watermark=st.sampled_from([0.0, 0.2]),
        max_skips=st.sampled_from([0, 2]),
    )
    def start(self, *, blocks: int, cpu_blocks: int, window: int | None, tokens: int, **options: object) -> None:
        self.scheduler = make_scheduler(
            blocks, cpu_blocks=cpu_blocks, windows=(window,), max_num_batched_tokens=tokens, **options
        )  # fmt: skip
        self.model = SimulatedModel(self.scheduler, eos_every=9)
        self.requests: list[Request] = []
        self.planned: tuple[StepPlan, StepOutput] | None = None

    @rule(
        prompt=st.integers(1, 50),
        alike=st.integers(0, 40),
        new=st.integers(1, 40),
        width=st.integers(1, 4),
        beams=st.booleans(),
        min_tokens=st.integers(0, 3),
    )
    def add(self, prompt: int, alike: int, new: int, width: int, beams: bool, min_tokens: int) -> None:
        number = len(self.requests)
        ids = [5] * min(alike, prompt) + [1 + (number * 31 + at) % 90 for at in range(prompt - min(alike, prompt))]
        kind: dict[str, object] = {"beam_width" if beams else "n": width, "min_tokens": min(min_tokens, new)}
        request = make_request(number, ids, new, **kind)
        blocks, options = self.scheduler.blocks, self.scheduler.options
        fits = blocks.worst_case(prompt, request.max_total, width) <= blocks.total
        if fits and (options.scheduler == "mixed" or prompt <= options.batched_tokens):
            self.scheduler.add(request)
            self.requests.append(request)

    @precondition(lambda self: self.planned is None and not self.scheduler.idle)
    @rule()
    def plan(self) -> None:
        plan = self.scheduler.schedule()
        self.planned = plan, self.model.run(plan)

    @precondition(lambda self: self.planned is not None)
    @rule()
    def finish(self) -> None:
        assert self.planned is not None
        self.scheduler.update(*self.planned)
        self.planned = None

    @precondition(lambda self: self.planned is None and not self.scheduler.idle)
    @rule(steps=st.integers(1, 20))
    def run_on(self, steps: int) -> None:
        for _ in range(steps):
            if not self.scheduler.idle:
                plan = self.scheduler.schedule()
                self.scheduler.update(plan, self.model.run(plan))

    @precondition(lambda self: self.planned is None and self.scheduler.running)
    @rule(choice=st.integers(0, 100))
    def preempt(self, choice: int) -> None:
        self.scheduler.pressure = lambda running: running[choice % len(running)] if running else None
        plan = self.scheduler.schedule()
        self.scheduler.pressure = None
        self.scheduler.update(plan, self.model.run(plan))

    @rule(choice=st.integers(0, 100))
    def abort(self, choice: int) -> None:
        if self.requests:
            self.scheduler.abort(self.requests[choice % len(self.requests)].request_id)

    @rule(choice=st.integers(0, 100))
    def stop_one_sample(self, choice: int) -> None:
        live = [sequence for request in self.requests for sequence in request.live if not request.beams]
        if live:
            self.scheduler.finish(live[choice % len(live)], "stop")

    @invariant()
    def books_agree(self) -> None:
        if hasattr(self, "scheduler"):
            self.scheduler.check_integrity()

    def teardown(self) -> None:
        """Every request ends, and then the pool is empty, or only remembered."""
        if not hasattr(self, "scheduler"):
            return
        if self.planned is not None:
            self.finish()
        steps = 0
        while not self.scheduler.idle:
            plan = self.scheduler.schedule()
            self.scheduler.update(plan, self.model.run(plan))
            steps += 1
            assert steps < 10_000, self.scheduler.describe()
        self.scheduler.check_integrity()
        assert self.scheduler.blocks.used == 0
        assert self.scheduler.blocks.cpu_used == 0
        assert all(request.finished for request in self.requests)


Engine.TestCase.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
TestEngine = Engine.TestCase


def script(name: str, *arguments: object) -> str:
    done = subprocess.run(
        [sys.executable, str(SCRIPTS / name), *map(str, arguments)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_thousands_of_random_steps_answer_as_each_request_does_alone() -> None:
    assert "preemptions" in script("stress_scheduler.py", "--steps", 5000, "--seed", 1)


def test_the_trace_is_drawn(tmp_path: Path) -> None:
    from llmq.engine.trace import TraceFile

    scheduler = make_scheduler(6, cpu_blocks=20, preemption="swap", max_num_seqs=3)
    scheduler._trace = TraceFile(str(tmp_path / "trace.jsonl"))
    for number in range(4):
        scheduler.add(make_request(number, 20, 20))
    scheduler.reject()
    model = SimulatedModel(scheduler)
    while not scheduler.idle:
        plan = scheduler.schedule()
        scheduler.update(plan, model.run(plan))
    lines = [json.loads(line) for line in (tmp_path / "trace.jsonl").read_text().splitlines()]
    assert len(lines) == scheduler.stats.steps
    assert lines[0]["rejected"] == 1
    picture = script("show_trace.py", tmp_path / "trace.jsonl")
    assert all(mark in picture for mark in ("PPP", "!", "<", "waits: blocks", "1 rejected"))


def test_the_scheduler_s_speed_is_printed() -> None:
    printed = script("bench_scheduler.py", "--running", 8, "--context", 40, "--steps", 5)
    assert "median ms" in printed
