"""Scheduler: which sequences run in the next step, and with how many tokens each. No tensors.

Continuous batching. A request is in one of three queues, each in the order of arrival (or of priority):

    waiting ──admit──▶ running ──preempt──▶ swapped: its blocks are in main memory
       ▲                  │ │                  │
       └─────recompute────┘ └◀─────resume──────┘

A step, ``mixed``:

    1  room     every running request, oldest first, gets the blocks of its next tokens. While there are none left, the
                newest gives its own up: to main memory, or altogether, and is computed anew. It keeps its place and
                every token that it has produced
    2  decode   every sequence whose prompt is done gets its next token
    3  prefill  what is left of the step's tokens goes to chunks of prompts, oldest first
    4  resume   unless 1 preempted: the swapped come back, oldest first, as long as each fits
    5  admit    unless 1 preempted or somebody is swapped: the waiting are let in, oldest first, as long as each fits

``prefill-first`` makes a step of 5 and 3 alone as long as there is a prompt, but for every max_prefill_steps-th, and
otherwise one of 1, 2 and 4.

Nobody starves. Under ``mixed`` every running sequence whose prompt is done gets a token in each step (K = 1): as many
sequences run as a step has tokens, at most. Under ``prefill-first`` it gets one every K = max_prefill_steps + 1 steps.
The oldest request is never preempted for another, so it ends; then the next one is the oldest. A lone request always
finds room, because what it can come to need at most was compared with the whole pool when it was submitted.
"""

from __future__ import annotations

import time
from bisect import insort
from collections import deque
from collections.abc import Callable, Hashable, Iterable
from dataclasses import asdict, dataclass, field
from itertools import count
from typing import Literal

from llmq.engine.admission import Check
from llmq.engine.blocks import BlockManager
from llmq.engine.options import EngineOptions
from llmq.engine.request import MAX_SEQUENCES, FinishReason, Request, Sequence, alone, first_sequence, fork_sequence
from llmq.engine.trace import StepTrace
from llmq.errors import LlmqError
from llmq.plan import PlanRow, StepOutput, StepPlan, TokenLogprobs

Wait = Literal["", "blocks", "tokens", "sequences", "swapped", "preempted", "delay", "turn"]
"""Why the head of the line waits."""

BARREN_STEPS = 2 * MAX_SEQUENCES
"""Steps in a row that may move requests about and compute nothing, before that counts as a defect."""


@dataclass(slots=True)
class EngineStats:
    """Counts since the start, or since the last reset.

    tokens           computed in these steps, of prompts and new ones
    preemptions      of those, ``swapped_out`` went to main memory and the rest are computed anew
    rejected         requests refused at submission; rejected_* those of them that are over a limit, by the limit
    waits_*          steps in which the first in line was not let in, by the first check that it failed
    prefix_*         tokens looked up in the prefix cache, and found there
    """

    total_blocks: int
    steps: int = 0
    tokens: int = 0
    preemptions: int = 0
    peak_blocks: int = 0
    swapped_out: int = 0
    swapped_in: int = 0
    copies: int = 0
    rejected: int = 0
    rejected_context: int = 0
    rejected_step: int = 0
    rejected_sequences: int = 0
    rejected_blocks: int = 0
    waits_blocks: int = 0
    waits_tokens: int = 0
    waits_sequences: int = 0
    skips: int = 0
    prefix_queries: int = 0
    prefix_hits: int = 0


@dataclass(slots=True)
class Progress:
    """What a step brought: sequences with a token more, and requests that are done."""

    extended: list[Sequence]
    finished: list[Request]


@dataclass(slots=True)
class Draft:
    """A StepPlan in the making. ``tokens`` are what is left to hand out."""

    tokens: int
    rows: list[PlanRow] = field(default_factory=list)
    sequences: list[Sequence] = field(default_factory=list)
    swap_out: list[tuple[int, int]] = field(default_factory=list)
    swap_in: list[tuple[int, int]] = field(default_factory=list)
    copies: list[tuple[int, int]] = field(default_factory=list)
    grown: list[Request] = field(default_factory=list)
    preempted: list[Request] = field(default_factory=list)
    resumed: list[Request] = field(default_factory=list)
    admitted: list[Request] = field(default_factory=list)
    wait: Wait = ""
    prefill_started: float | None = None
    hangs: bool = False


@dataclass(slots=True)
class Flight:
    """A step that was handed out, and whose tokens are not known yet. ``presumed``: what it computes is booked.
    ``hangs``: what follows it cannot be planned before they are known."""

    sequences: list[Sequence]
    preempted: list[Request]
    prefill_started: float | None
    hangs: bool
    presumed: bool = False


class Scheduler:
    """The three queues, between which requests move step by step. ``clock`` gives seconds; ``trace`` is told of every
    step.

    ``schedule`` makes a step, ``update`` books what it gave. Between the two, ``presume`` books what is known of a step
    before it is done, so that the next one can be scheduled while it runs: only the drawn tokens are not, and the plan
    names them by their place (see ``plan.PlanRow``). At most one step more is scheduled before ``update``.

        schedule n ─ presume n ─ schedule n + 1 ─ update n ─ presume n + 1 ─ …

    A sequence that ends by a stop token is in one step too many; what it draws there is dropped.
    """

    def __init__(
        self,
        options: EngineOptions,
        blocks: BlockManager,
        *,
        clock: Callable[[], float] = time.monotonic,
        trace: Callable[[StepTrace], None] | None = None,
    ) -> None:
        self.options = options
        self.blocks = blocks
        self.waiting: list[Request] = []
        self.running: list[Request] = []
        self.swapped: list[Request] = []
        self.stats = EngineStats(blocks.total)
        self.pressure: Callable[[list[Request]], Request | None] | None = None
        """For tests: which running request to preempt at the start of a step, as if blocks had run out."""
        self._clock = clock
        self._trace = trace
        self._requests: dict[Hashable, Request] = {}
        self._numbers = count()
        self._sequence_ids = count()
        self._steps = 0
        self._barren = 0
        self._watermark = int(options.watermark * blocks.total)
        self._flights: deque[Flight] = deque()
        self._refused = 0
        # prefill-first
        self._prefill_steps = 0
        self._prefill_seconds = 0.0

    @property
    def idle(self) -> bool:
        return not self._requests

    @property
    def has_work(self) -> bool:
        """Whether there is anything to schedule: not, when all that is left waits for its last token."""
        return bool(self.running or self.waiting or self.swapped)

    @property
    def foresees(self) -> bool:
        """Whether the next step can be scheduled before the tokens of the last one are known."""
        return not (self._flights and self._flights[-1].hangs)

    def reset_stats(self) -> None:
        self.stats = EngineStats(self.blocks.total)
        self.blocks.prefix_stats.queries = self.blocks.prefix_stats.hits = 0

    # Requests come and go

    def add(self, request: Request) -> None:
        """Queue ``request``, which the pool must be able to hold when nothing else is there.

        Raises LlmqError when its id is taken, ValueError when it can never run: see ``engine.admission``.
        """
        if request.request_id in self._requests:
            raise LlmqError(f"there is a request {request.request_id!r} already", "give each request an id of its own")
        width = request.params.width
        worst = self.blocks.worst_case(len(request.prompt_ids), request.max_total, width)
        if worst > self.blocks.total or width > self.options.seats:
            raise ValueError(f"{worst} blocks and {width} sequences can never fit {self.blocks.total}")
        request.number = next(self._numbers)
        urgency = request.params.priority * self.options.ageing_steps + self._steps
        request.order = (urgency if self.options.queue == "priority" else 0, request.number)
        request.arrival_time = self._clock()
        first = first_sequence(request, next(self._sequence_ids), len(self.blocks.windows))
        request.sequences = [first]
        request.live = [first]
        self._requests[request.request_id] = request
        _enqueue(self.waiting, request)

    def reject(self, check: Check | None = None) -> None:
        """Count a request that was refused before it came here, by the ``check`` that it failed, if by one."""
        self.stats.rejected += 1
        if check is not None:
            counter = f"rejected_{check}"
            setattr(self.stats, counter, getattr(self.stats, counter) + 1)
        self._refused += 1

    def abort(self, request_id: Hashable) -> None:
        """End a request now, wherever it is, and free all it holds. An unknown id changes nothing."""
        request = self._requests.get(request_id)
        if request is not None:
            request.aborted = True
            for sequence in list(request.sequences):
                self.finish(sequence, "abort")

    def finish(self, sequence: Sequence, reason: FinishReason) -> None:
        """End ``sequence`` now, and free all it holds. A second call changes nothing."""
        if sequence.finish_reason is not None:
            return
        if self._leave(sequence, reason):
            self._unqueue(sequence.request)

    # A step

    def schedule(self) -> StepPlan:
        """The next step. Every sequence in it owns blocks for all the tokens it has.

        Raises RuntimeError when nothing can run although something waits: a defect, never a matter of load.
        """
        draft = Draft(self.options.batched_tokens)
        if self.pressure is not None and (victim := self.pressure(self.running)) is not None:
            self._preempt(victim, draft)
        if self.options.scheduler == "mixed":
            self._schedule_mixed(draft)
        else:
            self._schedule_prefill_first(draft)
        return self._conclude(draft)

    def presume(self, plan: StepPlan) -> None:
        """Book all but the tokens of ``plan``, which is the last one scheduled and is being computed."""
        blocks, block_size = self.blocks, self.blocks.block_size
        windowed = any(window is not None for window in blocks.windows)
        flight = self._flights[-1]
        flight.presumed = True
        retired = False
        place = 0
        for row, sequence in zip(plan.rows, flight.sequences, strict=False):  # padding has no sequence
            if sequence.finish_reason is None:
                computed = sequence.computed
                sequence.computed = now = computed + sequence.scheduled
                sequence.scheduled = 0
                if windowed or now // block_size > computed // block_size:
                    blocks.computed(sequence)
            sampling = row.sampling
            if sampling is None:
                continue
            request = sequence.request
            if request.foreseeable and sequence.finish_reason is None:
                sequence.token_ids.append(-1 - place)
                sequence.unknown = True
                if len(sequence.token_ids) >= request.max_total:
                    self._retire(sequence)
                    retired = True
            place += sampling.samples
        if retired:
            self.running = [request for request in self.running if request.live]

    def update(self, plan: StepPlan, output: StepOutput) -> Progress:
        """Book what the step computed and drew, the oldest that was scheduled and not booked yet. What ends, by a stop
        token or by length, gives its blocks back."""
        if not self._flights[0].presumed:
            self.presume(plan)
        flight = self._flights.popleft()
        displaced = self._flights[0].preempted if self._flights else []
        for sequence_id, logprobs in output.prompt_logprobs:
            self._book_prompt(flight, sequence_id, logprobs, displaced)
        progress = Progress([], [])
        sampled = iter(output.sampled)
        beams: dict[Request, list[tuple[tuple[int, float], ...]]] = {}
        for row, sequence in zip(plan.rows, flight.sequences, strict=False):
            sampling = row.sampling
            if sampling is None:
                continue
            token = next(sampled)
            if sampling.samples > 1:
                tokens = [token, *(next(sampled) for _ in range(sampling.samples - 1))]
                if sequence.finish_reason is None:
                    for child, drawn in zip(self._part(sequence), tokens, strict=True):
                        self._append(child, drawn.token_id, drawn.logprobs, progress)
            elif sequence.finish_reason is not None:
                continue  # it ended while the step ran
            elif sampling.beams:
                beams.setdefault(sequence.request, []).append(token.candidates)
            else:
                self._append(sequence, token.token_id, token.logprobs, progress)
        for request, candidates in beams.items():
            self._advance_beams(request, candidates, progress)
        if progress.finished:
            self.running = [request for request in self.running if request.live]
            for request in progress.finished:
                if request in displaced:
                    self._unqueue(request)
        if flight.prefill_started is not None:
            self._prefill_seconds = self._clock() - flight.prefill_started
        self.stats.prefix_queries = self.blocks.prefix_stats.queries
        self.stats.prefix_hits = self.blocks.prefix_stats.hits
        return progress

    def forget_flights(self) -> None:
        """Whatever is still being computed is of no interest any more."""
        self._flights.clear()

    def check_integrity(self) -> None:
        """Raise RuntimeError if a block was lost or is owned by somebody unknown, or a request is in no queue."""
        queued = [*self.running, *self.waiting, *self.swapped]
        if len(queued) != len(self._requests) or {*map(id, queued)} != {*map(id, self._requests.values())}:
            raise RuntimeError(f"{len(self._requests)} requests, and {len(queued)} in the queues")
        if any(request.swapped for request in (*self.running, *self.waiting)):
            raise RuntimeError("a swapped request is in another queue")
        if any(sequence.tables[0] for request in self.waiting for sequence in request.live):
            raise RuntimeError("a waiting request owns blocks")
        self.blocks.check_integrity(queued)

    def describe(self) -> str:
        """The state in words, for whoever has to find out why nothing moves."""
        blocks = self.blocks
        lines = [
            f"step {self._steps}: {len(self.running)} running, {len(self.waiting)} waiting, "
            f"{len(self.swapped)} swapped",
            f"blocks: {blocks.available} of {blocks.total} free, {blocks.cached} cached, watermark {self._watermark}; "
            f"main memory: {blocks.cpu_used} of {blocks.cpu_blocks} used",
        ]
        for name, queue in (("running", self.running), ("waiting", self.waiting), ("swapped", self.swapped)):
            for request in queue[:8]:
                counts = ", ".join(
                    f"{sequence.computed}/{sequence.total} tokens in {len(sequence.tables[0])} blocks"
                    for sequence in request.live[:4]
                )
                lines.append(f"{name}: request {request.request_id!r}, {request.seats} sequences: {counts}")
        return "\n".join((*lines, str(asdict(self.stats))))

    # The two policies

    def _schedule_mixed(self, draft: Draft) -> None:
        self._make_room(self.running, draft)
        behind: list[Request] = []
        for request in self.running:
            if not self._decode(request, draft):
                behind.append(request)
        for request in behind:
            if not draft.tokens:
                break
            self._prefill(request, draft)
        self._resume(draft)
        self._admit(draft)

    def _schedule_prefill_first(self, draft: Draft) -> None:
        ready = [request for request in self.running if _ready(request)]
        if not ready or self._prefill_steps < self.options.max_prefill_steps:
            behind = [request for request in self.running if not _ready(request)]
            self._make_room(behind, draft)
            for request in behind:
                if draft.tokens and not request.swapped and request in self.running:
                    self._prefill(request, draft)
            if not self._held_back():
                self._admit(draft)
            elif self.waiting:
                draft.wait = "delay"
            if draft.rows:
                self._prefill_steps += 1
                draft.prefill_started = self._clock()
                return
        elif self.waiting:
            draft.wait = "turn"
        self._prefill_steps = 0
        self._make_room(self.running, draft)
        for request in self.running:
            self._decode(request, draft)
        self._resume(draft)

    def _held_back(self) -> bool:
        """Whether new prompts wait a little, so that more of them come together."""
        factor = self.options.delay_factor
        if not factor or not self.running or not self.waiting:
            return False
        earliest = min(request.arrival_time for request in self.waiting)
        return self._clock() - earliest <= factor * self._prefill_seconds

    # The parts of a step

    def _make_room(self, requests: Iterable[Request], draft: Draft) -> None:
        """Give ``requests`` the blocks of their next tokens, and preempt the newest of all that run for it."""
        blocks, block_size = self.blocks, self.blocks.block_size
        for request in list(requests) if requests is self.running else requests:
            live = request.live
            if len(live) == 1:
                only = live[0]
                table = only.tables[0]
                if table and len(only.token_ids) <= len(table) * block_size:
                    continue
            if draft.preempted and request not in self.running:
                continue
            while (missing := blocks.missing(request)) > blocks.available:
                victim = self.running[-1]
                self._preempt(victim, draft)
                if victim is request:
                    break
            else:
                if missing:
                    draft.copies += blocks.grow(request)
                    draft.grown.append(request)

    def _decode(self, request: Request, draft: Draft) -> bool:
        """Plan the next token of each sequence, if all have caught up. Beams go on together or not at all."""
        live = request.live
        if len(live) == 1:
            sequence = live[0]
            if len(sequence.token_ids) - sequence.computed != 1:
                return False
            if draft.tokens:
                self._row(sequence, 1, draft)
            return True
        if not _ready(request):
            return False
        if len(live) <= draft.tokens:
            for sequence in live:
                self._row(sequence, 1, draft)
        return True

    def _prefill(self, request: Request, draft: Draft) -> None:
        """Plan a chunk of the first sequence that is behind. One of several leaves its last token to ``_decode``."""
        several = len(request.live) > 1
        for sequence in request.live:
            behind = sequence.pending - several
            if not sequence.tables[0]:
                return
            if behind > 0:
                self._row(sequence, min(behind, draft.tokens), draft)
                return
        self._decode(request, draft)

    def _resume(self, draft: Draft) -> None:
        while self.swapped and draft.tokens and not draft.preempted:
            request = self.swapped[0]
            if self._seats + request.seats > self.options.seats:
                draft.wait = "sequences"
                break
            cost = self.blocks.swap_in_cost(request)
            if cost > self.blocks.available - self._reserve:
                draft.wait = "blocks"
                break
            self.swapped.pop(0)
            draft.swap_in += self.blocks.swap_in(request)
            request.swapped = False
            draft.copies += self.blocks.grow(request)
            draft.resumed.append(request)
            self.stats.swapped_in += 1
            _enqueue(self.running, request)
            if not self._decode(request, draft):
                self._prefill(request, draft)

    def _admit(self, draft: Draft) -> None:
        """Let in who waits, as far as the checks allow. Who fails one stays where it is, and so do all behind it."""
        if not self.waiting:
            return
        if self.swapped or draft.preempted:
            # Whoever was just put back waits in front: letting it in again would be a step of nothing but churn.
            draft.wait = "swapped" if self.swapped else "preempted"
            return
        seats = self._seats
        position = 0
        while position < len(self.waiting):
            request = self.waiting[position]
            if self.blocks.admission_cost(request) > self.blocks.available - self._reserve:
                draft.wait = draft.wait or "blocks"
                if request.skips >= self.options.max_skips or position >= self.options.max_skips:
                    break
                position += 1
                continue
            if not self._affordable(request, draft):
                draft.wait = draft.wait or "tokens"
                break
            if seats + request.seats > self.options.seats:
                draft.wait = draft.wait or "sequences"
                break
            seats += request.seats
            del self.waiting[position]
            self.blocks.admit(request.live[0])
            if request.queue_seconds is None:
                request.queue_seconds = self._clock() - request.arrival_time
                request.cached_tokens = request.live[0].computed
            _enqueue(self.running, request)
            draft.admitted.append(request)
            self._prefill(request, draft)
            for passed in self.waiting[:position]:
                passed.skips += 1
                self.stats.skips += 1
            if any(passed.skips >= self.options.max_skips for passed in self.waiting[:position]):
                break
        stats = self.stats
        stats.waits_blocks += draft.wait == "blocks"
        stats.waits_tokens += draft.wait == "tokens"
        stats.waits_sequences += draft.wait == "sequences"

    def _affordable(self, request: Request, draft: Draft) -> bool:
        """Whether the step has tokens left for ``request``: one, or under prefill-first the whole prompt, unless it is
        the first of the step (one that starts over may have grown longer than a step)."""
        if self.options.scheduler == "mixed" or not draft.rows:
            return draft.tokens > 0
        return request.live[0].total <= draft.tokens

    def _preempt(self, victim: Request, draft: Draft) -> None:
        self.stats.preemptions += 1
        self.running.remove(victim)
        draft.preempted.append(victim)
        mode = self.options.preemption
        # Copies come after swaps: what was given a copy to make in this step has nothing to take along yet.
        if (mode == "swap" or (mode == "auto" and len(victim.live) > 1)) and victim not in draft.grown:
            moves = self.blocks.swap_out(victim)
            if moves is not None:
                self.stats.swapped_out += 1
                victim.swapped = True
                draft.swap_out += moves
                _enqueue(self.swapped, victim)
                return
        for sequence in victim.live:
            self.blocks.release(sequence)
        if not victim.looks_up_prefixes:
            victim.prompt_logprobs.clear()
        _enqueue(self.waiting, victim)

    def _row(self, sequence: Sequence, tokens: int, draft: Draft) -> None:
        """Plan the next ``tokens`` of ``sequence``."""
        start = sequence.computed
        token_ids = sequence.token_ids
        end = start + tokens
        sequence.scheduled = tokens
        draft.tokens -= tokens
        chunk = (token_ids[start],) if tokens == 1 else tuple(token_ids[start:end])
        sampling = sequence.sampling if end == len(token_ids) else None
        tables = sequence.tables
        request = sequence.request
        draft.hangs |= sampling is not None and not request.foreseeable
        if request.plain:
            row = PlanRow(sequence.sequence_id, start, chunk, tables, sampling)
        else:
            targets, top = request.prompt_targets(start, end), request.params.prompt_logprobs or 0
            row = PlanRow(
                sequence.sequence_id,
                start,
                chunk,
                tables,
                sampling,
                sequence.banned,
                sequence.history,
                targets,
                top,
                None if sampling is None else sequence.allowed,
            )
        draft.rows.append(row)
        draft.sequences.append(sequence)

    @property
    def _seats(self) -> int:
        return sum(request.seats for request in self.running)

    @property
    def _reserve(self) -> int:
        """Blocks to leave free. With nothing running there is nobody to leave them to."""
        return self._watermark if self.running else 0

    def _conclude(self, draft: Draft, padding: Iterable[PlanRow] = ()) -> StepPlan:
        """The plan of ``draft``, counted and traced. ``padding``: rows of nobody, behind the others."""
        self._barren = 0 if draft.rows or self.idle else self._barren + 1
        moved = draft.preempted or draft.resumed or draft.admitted or draft.grown
        if self._barren and (not moved or self._barren > BARREN_STEPS):
            raise RuntimeError(f"{self._barren} steps made no progress\n{self.describe()}")

        self._steps += 1
        self._flights.append(Flight(draft.sequences, draft.preempted, draft.prefill_started, draft.hangs))
        stats = self.stats
        stats.steps += 1
        stats.tokens += self.options.batched_tokens - draft.tokens
        stats.copies += len(draft.copies)
        stats.peak_blocks = max(stats.peak_blocks, self.blocks.used)
        if self._trace is not None:
            self._trace(self._describe_step(draft))
        # A copy for somebody who was preempted after all may name a block that has a new owner: the last one counts.
        copies = tuple((source, target) for target, source in {to: from_ for from_, to in draft.copies}.items())
        return StepPlan((*draft.rows, *padding), tuple(draft.swap_out), tuple(draft.swap_in), copies)

    # What a step brought

    def _append(self, sequence: Sequence, token_id: int, logprobs: TokenLogprobs | None, progress: Progress) -> None:
        token_ids = sequence.token_ids
        if sequence.unknown:
            token_ids[-1] = token_id
            sequence.unknown = False
        else:
            token_ids.append(token_id)
        if logprobs is not None:
            sequence.logprobs.append(logprobs)
            sequence.cumulative += logprobs.logprob
        progress.extended.append(sequence)
        request = sequence.request
        if sequence.grammar is not None and not sequence.grammar.consume_token(token_id):
            self._end(sequence, "error", progress)
        elif token_id in request.stop_ids:
            self._end(sequence, "stop", progress)
        elif len(token_ids) >= request.max_total:
            self._end(sequence, "length", progress)

    def _end(self, sequence: Sequence, reason: FinishReason, progress: Progress) -> None:
        if self._leave(sequence, reason):
            progress.finished.append(sequence.request)

    def _leave(self, sequence: Sequence, reason: FinishReason) -> bool:
        """Free what ``sequence`` holds; True when it was the last of its request, which is then known no more."""
        request = sequence.request
        sequence.finish_reason = reason
        if sequence.unknown:
            sequence.token_ids.pop()
            sequence.unknown = False
        if sequence in request.live:
            self._retire(sequence)
        if any(one.finish_reason is None for one in request.sequences):
            return False
        del self._requests[request.request_id]
        return True

    def _retire(self, sequence: Sequence) -> None:
        """Take all that it holds from a sequence that needs no more of it."""
        self.blocks.release(sequence)
        sequence.request.live.remove(sequence)

    def _unqueue(self, request: Request) -> None:
        for queue in (self.running, self.waiting, self.swapped):
            if request in queue:
                queue.remove(request)

    def _part(self, first: Sequence) -> list[Sequence]:
        """The samples of a request whose prompt is done: ``first``, and as many forks of it as it lacks."""
        request = first.request
        request.forked = True
        request.foreseeable = request.grammar is None
        children = [fork_sequence(first, next(self._sequence_ids), index) for index in range(1, request.params.width)]
        for child in children:
            self.blocks.fork(first, child)
        first.sampling = alone(first, 0)
        request.sequences.extend(children)
        request.live.extend(children)
        return [first, *children]

    def _advance_beams(
        self, request: Request, candidates: list[tuple[tuple[int, float], ...]], progress: Progress
    ) -> None:
        search, params, prompt = request.beams, request.params, len(request.prompt_ids)
        assert search is not None
        parents = list(request.live)
        survivors = search.advance(
            [parent.output_ids for parent in parents],
            [parent.cumulative for parent in parents],
            candidates,
            width=params.beam_width,
            stop_ids=request.stop_ids,
            max_length=request.max_total - prompt,
            length_penalty=params.length_penalty,
            early_stopping=params.early_stopping,
        )
        request.forked = True
        # All children are forked before any parent changes; then the parents that nobody continues go.
        heirs: list[Sequence] = []
        continued: set[int] = set()
        for place, (parent, _, _) in enumerate(survivors):
            if parent not in continued:
                continued.add(parent)
                heirs.append(parents[parent])
            else:
                heir = fork_sequence(parents[parent], next(self._sequence_ids), place)
                self.blocks.fork(parents[parent], heir)
                heirs.append(heir)
        for heir, (_, token_id, log_probability) in zip(heirs, survivors, strict=True):
            heir.token_ids.append(token_id)
            heir.cumulative = log_probability
        for place, beam in enumerate(parents):
            if place not in continued:
                beam.finish_reason = "stop"
                self.blocks.release(beam)
        request.live = heirs
        request.sequences = heirs.copy() or request.sequences
        if not heirs:
            del self._requests[request.request_id]
            progress.finished.append(request)
        progress.extended.append(request.sequences[0])

    def _book_prompt(
        self, flight: Flight, sequence_id: int, logprobs: list[TokenLogprobs], displaced: list[Request]
    ) -> None:
        for sequence in flight.sequences:
            request = sequence.request
            # Who is to start over scores all of its prompt again.
            if sequence.sequence_id == sequence_id and (request.swapped or request not in displaced):
                request.prompt_logprobs.extend(logprobs)

    def _describe_step(self, draft: Draft) -> StepTrace:
        refused, self._refused = self._refused, 0
        return StepTrace(
            step=self._steps,
            rows=[
                (row.sequence_id, len(row.tokens), row.end, sequence.request.request_id)
                for row, sequence in zip(draft.rows, draft.sequences, strict=True)
            ],
            running=len(self.running),
            waiting=len(self.waiting),
            swapped=len(self.swapped),
            blocks_free=self.blocks.available,
            blocks_total=self.blocks.total,
            admitted=[request.request_id for request in draft.admitted],
            preempted=[request.request_id for request in draft.preempted],
            resumed=[request.request_id for request in draft.resumed],
            swap_out=len(draft.swap_out),
            swap_in=len(draft.swap_in),
            copies=len(draft.copies),
            rejected=refused,
            head=next((request.request_id for request in (*self.swapped[:1], *self.waiting[:1])), None),
            wait=draft.wait,
        )


def _ready(request: Request) -> bool:
    """Whether all sequences have computed all but their newest token."""
    return all(sequence.pending == 1 for sequence in request.live)


def _enqueue(queue: list[Request], request: Request) -> None:
    if queue and queue[-1].order > request.order:
        insort(queue, request, key=lambda one: one.order)
    else:
        queue.append(request)
