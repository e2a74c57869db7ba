"""What is asked of the engine, and where each answer stands.

A request is one sequence or several: samples that part after the prompt, or beams. A sequence has no phases, only three
counters:

    total      prompt tokens and generated tokens
    computed   of those, how many have their keys and values in the cache
    scheduled  of those, how many the current step computes

A chunk of a prompt, the newest token, a prefix found in the cache, and a sequence that starts over after a preemption
are all ``total − computed``.
"""

from __future__ import annotations

import math
from array import array
from collections.abc import Hashable, Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from llmq.engine.beam import BeamSearch
from llmq.engine.grammar import Matcher
from llmq.errors import USAGE, LlmqError
from llmq.plan import History, RowSampling, TokenLogprobs

if TYPE_CHECKING:
    from llmq.engine.prefix_cache import Entry

FinishReason = Literal["stop", "length", "abort", "error"]
Truncation = Literal["error", "left", "right"]
EarlyStopping = Literal["true", "false", "never"]
TRUNCATIONS: tuple[Truncation, ...] = ("error", "left", "right")
EARLY_STOPPINGS: tuple[EarlyStopping, ...] = ("true", "false", "never")
MAX_LOGPROBS = 50
MAX_SEED = 2**63 - 1
MAX_SEQUENCES = 1024
MAX_PENALTY = 100.0
COLDEST, HOTTEST = 1e-30, 1e30
"""Temperatures between which fp32 holds every score: the likeliest is drawn below, and above any that may be."""


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How a completion is drawn.

    max_tokens          tokens to generate at most; None: until the model's context or the KV cache is full
    temperature         0: always the likeliest token
    top_k               draw among the k likeliest; 0: among all
    top_p               draw among the likeliest whose probabilities reach p
    seed                of the noise: the same seed gives the same tokens, whatever else is in the batch
    stop                texts that end the completion, and are not part of it
    n                   completions of the prompt; sample i uses seed + i
    logprobs            log-probabilities of the drawn and of the k likeliest tokens, before temperature; None: none
    ignore_eos          go on past an end-of-text token
    min_p               draw among what is at least p times as likely as the likeliest
    repetition_penalty  divide the scores of tokens seen before, in the prompt too; 1: leave them
    presence_penalty    take this from the scores of tokens generated before
    frequency_penalty   take this from the scores of tokens for each time they were generated
    stop_token_ids      tokens that end the completion, as the model's own end-of-text tokens do
    include_stop        keep the stop text, or the text of the stop token, at the end of the completion
    min_tokens          generate this many before any token may end the completion
    prompt_logprobs     log-probabilities of the prompt's tokens and of the k likeliest in their places; None: none
    best_of             draw this many samples and return the n likeliest; None: n
    beam_width          search with this many beams and return the n best; 0: draw
    length_penalty      of beams: the score is log-probability / generated length ^ penalty, the end of text counted
    early_stopping      of beams, when beam_width have ended: true: stop; false: stop unless a live one scores better
                        now; never: stop when no live one can ever score better
    truncate            a prompt longer than the context: error, or drop tokens on its left or right
    priority            where the engine runs by priority: the smaller, the sooner
    json_schema         a JSON Schema, as a text: the completion is JSON that fits it, unless cut short; None: any text
    """

    max_tokens: int | None = 128
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    n: int = 1
    logprobs: int | None = None
    ignore_eos: bool = False
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    stop_token_ids: tuple[int, ...] = ()
    include_stop: bool = False
    min_tokens: int = 0
    prompt_logprobs: int | None = None
    best_of: int | None = None
    beam_width: int = 0
    length_penalty: float = 1.0
    early_stopping: EarlyStopping = "false"
    truncate: Truncation = "error"
    priority: int = 0
    json_schema: str | None = None

    def __post_init__(self) -> None:
        most = self.max_tokens if self.max_tokens is not None else math.inf
        counts = f"from 0 to {MAX_LOGPROBS}"
        penalty = f"from −{MAX_PENALTY:g} to {MAX_PENALTY:g}"
        stop: Iterable[str] = self.stop  # which one text is too: each of its characters would end the completion
        checks = (
            (self.max_tokens is None or self.max_tokens >= 1, "max_tokens", "1 or more"),
            (math.isfinite(self.temperature) and self.temperature >= 0, "temperature", "0 or more"),
            (self.top_k >= 0, "top_k", "0 (all) or more"),
            (0 < self.top_p <= 1, "top_p", "above 0 and at most 1"),
            (self.seed is None or 0 <= self.seed <= MAX_SEED - MAX_SEQUENCES, "seed", "0 or more, well below 2^63"),
            (not isinstance(stop, str) and all(stop), "stop", "a tuple of texts, none of them empty"),
            (1 <= self.n <= MAX_SEQUENCES, "n", f"from 1 to {MAX_SEQUENCES}"),
            (self.logprobs is None or 0 <= self.logprobs <= MAX_LOGPROBS, "logprobs", counts),
            (0 <= self.min_p <= 1, "min_p", "from 0 to 1"),
            (0 < self.repetition_penalty <= MAX_PENALTY, "repetition_penalty", f"above 0 and at most {MAX_PENALTY:g}"),
            (abs(self.presence_penalty) <= MAX_PENALTY, "presence_penalty", penalty),
            (abs(self.frequency_penalty) <= MAX_PENALTY, "frequency_penalty", penalty),
            (all(token >= 0 for token in self.stop_token_ids), "stop_token_ids", "made of token ids"),
            (0 <= self.min_tokens <= most, "min_tokens", "0 or more, and no more than max_tokens"),
            (self.prompt_logprobs is None or 0 <= self.prompt_logprobs <= MAX_LOGPROBS, "prompt_logprobs", counts),
            (self.best_of is None or self.n <= self.best_of <= MAX_SEQUENCES, "best_of", f"n ({self.n}) or more"),
            (self.best_of is None or not self.beam_width, "best_of", "left out of beam search: n counts its answers"),
            (
                self.beam_width == 0 or self.n <= self.beam_width <= MAX_SEQUENCES,
                "beam_width",
                f"0 (no beam search), or n ({self.n}) or more",
            ),
            (abs(self.length_penalty) <= MAX_PENALTY, "length_penalty", penalty),
            (self.early_stopping in EARLY_STOPPINGS, "early_stopping", f"one of {', '.join(EARLY_STOPPINGS)}"),
            (
                self.json_schema is None or not (self.beam_width or self.min_tokens or self.ignore_eos),
                "json_schema",
                "left out where beam_width, min_tokens or ignore_eos say when a completion ends",
            ),
            (self.truncate in TRUNCATIONS, "truncate", f"one of {', '.join(TRUNCATIONS)}"),
        )
        for valid, name, rule in checks:
            if not valid:
                flag = f"--{name.replace('_', '-')}"
                raise LlmqError(f"{name} must be {rule}, not {getattr(self, name)}", f"check {flag}", exit_code=USAGE)

    @property
    def width(self) -> int:
        """Sequences that the request becomes, and counts as from the moment it is admitted."""
        return self.beam_width or self.best_of or self.n


def token_array(token_ids: Iterable[int]) -> array[int]:
    """``token_ids`` in the form in which requests and sequences have them."""
    return array("i", token_ids)


@dataclass(slots=True, eq=False)
class Request:
    """A prompt and the sequences that continue it. Admission, preemption and counting act on it as a whole.

    ``number`` grows with arrival; ``order`` is where the request stands in every queue: the smaller, the sooner.
    Tokens are in arrays: millions of them in lists would be walked by every full garbage collection, which took up to
    a tenth of a second in the middle of a step.
    """

    request_id: Hashable
    prompt_ids: array[int]
    params: SamplingParams
    seed: int
    max_total: int
    """Tokens, prompt included, at which a completion is as long as it may get."""
    eos_token_ids: frozenset[int] = frozenset()
    grammar: Matcher | None = None
    """Of json_schema, at its beginning: the first sequence follows it, and others a copy each."""
    number: int = 0
    order: tuple[int, int] = (0, 0)
    arrival_time: float = 0.0
    queue_seconds: float | None = None
    """How long it waited to be let in, the first time."""
    cached_tokens: int = 0
    """Of its prompt, those that the prefix cache had then."""
    sequences: list[Sequence] = field(default_factory=list)
    live: list[Sequence] = field(default_factory=list)
    """Of ``sequences``, those that are not finished."""
    prompt_logprobs: list[TokenLogprobs] = field(default_factory=list)
    """Of the prompt's tokens from the second on."""
    beams: BeamSearch | None = None
    forked: bool = False
    swapped: bool = False
    skips: int = 0
    """How many requests have been let in before this one, which came first."""
    aborted: bool = False
    stop_ids: frozenset[int] = field(init=False)
    """Tokens that end a completion."""
    plain: bool = field(init=False)
    """Whether rows need nothing but their tokens: no penalties, no forbidden tokens, no grammar, no scores of the
    prompt."""
    foreseeable: bool = field(init=False)
    """Whether a step can be planned before the tokens of the one before are known: nothing but they hangs on them.
    Samples must have parted."""

    def __post_init__(self) -> None:
        params = self.params
        own = frozenset(params.stop_token_ids)
        self.stop_ids = own if params.ignore_eos else own | self.eos_token_ids
        self.beams = BeamSearch() if params.beam_width else None
        self.plain = not (
            _row_sampling(params, 0).penalized
            or params.min_tokens
            or self.grammar is not None
            or params.prompt_logprobs is not None
        )
        self.foreseeable = params.width == 1 and not params.beam_width and self.grammar is None

    @property
    def finished(self) -> bool:
        return bool(self.sequences) and not self.live

    @property
    def seats(self) -> int:
        """Sequences it counts as: all it is going to be, until it has parted into them."""
        return len(self.live) if self.forked and self.beams is None else self.params.width

    @property
    def looks_up_prefixes(self) -> bool:
        """A prompt whose tokens are to be scored must be computed, known or not."""
        return self.params.prompt_logprobs is None or len(self.prompt_logprobs) >= len(self.prompt_ids) - 1

    def prompt_targets(self, start: int, stop: int) -> tuple[int, ...]:
        """The prompt's tokens behind each of the positions ``start`` … ``stop − 1``, where they are to be scored."""
        return () if self.looks_up_prefixes else tuple(self.prompt_ids[start + 1 : stop + 1])


@dataclass(slots=True, eq=False)
class Sequence:
    """One completion in the making. ``index`` counts the samples of a request."""

    sequence_id: int
    request: Request
    index: int
    token_ids: array[int]
    """Of the prompt and of the completion. The last may be ``unknown`` as yet: then it stands for a drawn token's place
    in the step that runs, see ``plan.PlanRow``."""
    tables: tuple[list[int], ...]
    """For each group of layers, the blocks that hold the keys and values; see ``engine.blocks``. Plans hold these very
    lists: they are only appended to. Whatever else becomes of a table, it becomes another list."""
    sampling: RowSampling
    grammar: Matcher | None = None
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    cumulative: float = 0.0
    """Log-probability of a beam, or of a sample of best_of."""
    computed: int = 0
    scheduled: int = 0
    unknown: bool = False
    published: int = 0
    """Full blocks that the prefix cache has been told of, and its entry of the last one."""
    entry: Entry | None = None
    finish_reason: FinishReason | None = None

    @property
    def total(self) -> int:
        return len(self.token_ids)

    @property
    def pending(self) -> int:
        """Tokens whose keys and values are not in the cache yet."""
        return len(self.token_ids) - self.computed

    @property
    def output_ids(self) -> list[int]:
        return self.token_ids[len(self.request.prompt_ids) :].tolist()

    @property
    def num_output(self) -> int:
        return len(self.token_ids) - len(self.request.prompt_ids)

    @property
    def banned(self) -> tuple[int, ...]:
        """Tokens that must not be drawn yet."""
        return tuple(sorted(self.request.stop_ids)) if self.num_output < self.request.params.min_tokens else ()

    @property
    def allowed(self) -> bytes | None:
        """The tokens that may be drawn next, as a bitmask; None: all."""
        return None if self.grammar is None else self.grammar.compute_bitmask()

    @property
    def history(self) -> History | None:
        return History(self.request.prompt_ids, self.output_ids) if self.sampling.penalized else None


def first_sequence(request: Request, sequence_id: int, num_groups: int) -> Sequence:
    """The sequence that computes the prompt, and draws the first token of every sample."""
    sampling = _row_sampling(
        request.params,
        request.seed,
        samples=1 if request.beams else request.params.width,
        beams=request.params.beam_width * (1 + max(1, len(request.stop_ids))),
    )
    tables: tuple[list[int], ...] = tuple([] for _ in range(num_groups))
    return Sequence(sequence_id, request, 0, request.prompt_ids[:], tables, sampling, request.grammar)


def fork_sequence(parent: Sequence, sequence_id: int, index: int) -> Sequence:
    """A sequence with the tokens of ``parent``, and noise of its own. Its blocks are the BlockManager's to fork."""
    grammar = None if parent.grammar is None else parent.grammar.deep_copy()
    child = Sequence(sequence_id, parent.request, index, parent.token_ids[:], (), alone(parent, index), grammar)
    child.logprobs = parent.logprobs.copy()
    child.cumulative = parent.cumulative
    return child


def alone(sequence: Sequence, index: int) -> RowSampling:
    """How sample ``index`` draws once it has parted from the others."""
    request = sequence.request
    return _row_sampling(request.params, request.seed + index, beams=sequence.sampling.beams)


def _row_sampling(params: SamplingParams, seed: int, *, samples: int = 1, beams: int = 0) -> RowSampling:
    ranked = params.best_of is not None and params.best_of > params.n
    # What a beam draws is not looked at.
    greedy = params.beam_width > 0 or params.temperature == 0
    return RowSampling(
        temperature=0.0 if greedy else min(max(params.temperature, COLDEST), HOTTEST),
        top_k=params.top_k,
        top_p=params.top_p,
        seed=seed,
        logprobs=0 if ranked and params.logprobs is None else params.logprobs,
        min_p=params.min_p,
        repetition_penalty=params.repetition_penalty,
        presence_penalty=params.presence_penalty,
        frequency_penalty=params.frequency_penalty,
        samples=samples,
        beams=beams if params.beam_width else 0,
    )
