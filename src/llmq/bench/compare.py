"""One model in several schemes on one workload: speed over batch sizes, quality and memory, and what to take.

Each scheme runs the same requests, in turns with the others where all fit side by side, so that what the machine does
meanwhile it does to all; every ratio is the median over rounds of the ratios within a round. In a round:

    prefill   tokens/s of prompts of the workload's length, one token generated for each
    decode    tokens/s at each batch size: ``bench.staircase``
    workload  all requests there at the start
"""

from __future__ import annotations

import gc
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from llmq import memory
from llmq.bench.engine import Run, Setup, Subject
from llmq.bench.load import Progress
from llmq.bench.staircase import decode_speeds, output_lengths
from llmq.bench.workload import Item, Workload, check_context, prompt_len, vocabulary_of
from llmq.checkpoint.config import read_config
from llmq.checkpoint.folder import DEMO, resolve
from llmq.checkpoint.formats import WRITER, format_for, write_configs
from llmq.checkpoint.tokenizer import has_tokenizer
from llmq.engine.options import EngineOptions
from llmq.errors import USAGE, LlmqError, either
from llmq.evals.divergence import Comparison, Scored, compare, score
from llmq.evals.perplexity import prepare
from llmq.memplan.plan import plan
from llmq.memplan.source import open_model
from llmq.plan import layer_groups
from llmq.quant.pipeline import quantize
from llmq.quant.schemes import PRESETS, RTN, choose
from llmq.runtime.device import resolve_device, resolve_dtype
from llmq.runtime.loader import block_name
from llmq.scheme import Scheme

if TYPE_CHECKING:
    from llmq.memplan.plan import MemoryPlan

BASE = "bf16"
"""The model as it is, whatever its dtype."""
SCHEMES = (BASE, "w8a8", "fp8", "w4a16")
WATCHED = ("w8a8", "w4a16")
"""The two whose ratio is printed: which is faster depends on the batch."""
WORKLOADS = {
    "chat": Workload(input_len=512, output_len=256, range_ratio=0.25),
    "rag": Workload(input_len=4096, output_len=512, range_ratio=0.125),
    "batch": Workload(input_len=1024, output_len=128, range_ratio=0.25),
}
"""chat and rag: the lengths of guidellm's scenarios; batch: long documents, short answers."""
BATCH_SIZES = (1, 2, 4, 8, 16, 32, 64)
ROUNDS = 3
MAX_INCREASE = 0.01
"""Of perplexity, up to which a scheme is recommended for its speed."""
QUALITY_WINDOWS = 16


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
    """

    scheme: str
    weights_bytes: int
    kv_tokens: int | None
    rounds: tuple[Speeds, ...]
    quality: Comparison | None

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
            "quality": None if self.quality is None else self.quality.as_json(),
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
            f"{memory.format_bytes(best.weights_bytes)} instead of {memory.format_bytes(first.weights_bytes)}"
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
        size = memory.format_bytes(smallest.weights_bytes)
        parts.append(f"{smallest.scheme} is the smallest, {size}{few}")
    if all(row.quality is None for row in report.rows):
        parts.append("quality was not measured")
    return "; ".join(parts)


def _output_throughput(speeds: Speeds) -> float:
    return speeds.run.metrics.output_throughput


def workload_of(name: str, num_prompts: int, seed: int) -> Workload:
    """One of WORKLOADS, or a .jsonl file of prompts. LlmqError when it is neither."""
    if name in WORKLOADS:
        return replace(WORKLOADS[name], num_prompts=num_prompts, seed=seed)
    if Path(name).suffix == ".jsonl":
        return Workload(dataset="jsonl", path=Path(name), num_prompts=num_prompts, seed=seed)
    raise LlmqError(f"there is no workload {name!r}", f"choose {either(WORKLOADS)}, or a .jsonl file", exit_code=USAGE)


def bench_compare(
    model: str,
    *,
    schemes: Sequence[str] = SCHEMES,
    workload: str = "chat",
    num_prompts: int = Workload().num_prompts,
    batch_sizes: Sequence[int] = BATCH_SIZES,
    rounds: int = ROUNDS,
    folders: Mapping[str, Path] | None = None,
    data: str | None = None,
    seed: int = 0,
    revision: str | None = None,
    dtype: str = "auto",
    device: str = "auto",
    options: EngineOptions | None = None,
    progress: Progress | None = None,
) -> CompareReport:
    """Measure ``model`` in each of ``schemes``, the first of which the others are set beside.

    A scheme is taken from ``folders`` where that has it, and else made by rounding to nearest; for dummy weights, its
    name in config.json is enough. Quality is measured on the text ``data``, or the demo's for the demo.
    LlmqError before anything is made when there is no such scheme, or the workload does not fit the model's context.
    """
    folders = folders or {}
    for name in (*schemes, *folders):
        if name != BASE and name not in PRESETS:
            raise LlmqError(f"there is no scheme {name!r}", f"choose {either((BASE, *PRESETS))}", exit_code=USAGE)
    if not schemes or not batch_sizes or min(batch_sizes) < 1 or rounds < 1:
        raise LlmqError("nothing to measure", "check --schemes, --batch-sizes and --rounds", exit_code=USAGE)
    source, device = resolve(model, revision), resolve_device(device)
    asked = workload_of(workload, num_prompts, seed)
    load = _Load.of(source, asked, workload, tuple(sorted(set(batch_sizes))), rounds, options or EngineOptions())
    dummy = load.options.load_format == "dummy"
    quality = not dummy and has_tokenizer(source) and (data is not None or model == DEMO)
    steps = _Steps(progress, len(schemes) * (rounds + 2 + quality))
    with TemporaryDirectory() as scratch:
        found = {name: folders.get(name) or _make(source, name, Path(scratch), dummy, device) for name in schemes}
        plans = {name: plan(open_model(str(folder)), options=load.options) for name, folder in found.items()}
        steps.advance(len(schemes))
        side_by_side = load.fit_together(list(plans.values()), device, dtype)
        groups = [list(schemes)] if side_by_side else [[name] for name in schemes]
        speeds: dict[str, list[Speeds]] = {name: [] for name in schemes}
        setup: Setup | None = None
        for group in groups:
            subjects = {
                name: Subject(
                    str(found[name]),
                    [asked],
                    revision=None,
                    dtype=dtype,
                    device=device,
                    options=load.engine_options(device, dtype, shared=side_by_side),
                )
                for name in group
            }
            setup = setup or replace(next(iter(subjects.values())).setup(), model=model)
            for cell in range(rounds + 1):  # the first is the warm-up
                for name, subject in subjects.items():
                    measured = load.measure(subject, cell)
                    speeds[name] += [measured] if cell else []
                    steps.advance()
            del subjects, subject
            _free(device)
        judged = _judge(model, found, data, dtype, device, revision, steps) if quality else {}
    assert setup is not None
    rows = tuple(
        Row(
            name, plans[name].weights.resident, load.kv_tokens(plans[name], device, dtype), tuple(one), judged.get(name)
        )
        for name, one in speeds.items()
    )
    return CompareReport(setup, Path(workload).stem, asked, side_by_side, rows)


class _Steps:
    def __init__(self, progress: Progress | None, total: int) -> None:
        self._progress, self._total, self._done = progress, total, 0

    def advance(self, number: int = 1) -> None:
        self._done += number
        if self._progress is not None:
            self._progress(self._done, self._total)


@dataclass(frozen=True, slots=True)
class _Load:
    """What each scheme is to run, in a model of ``folder``.

    longest   tokens of the longest sequence of all
    lengths   of what is generated for each prompt of ``input_len``, to measure decoding with
    """

    folder: Path
    workload: Workload
    batch_sizes: tuple[int, ...]
    options: EngineOptions
    input_len: int
    lengths: tuple[int, ...]
    longest: int

    @classmethod
    def of(
        cls,
        folder: Path,
        workload: Workload,
        name: str,
        batch_sizes: tuple[int, ...],
        rounds: int,
        options: EngineOptions,
    ) -> _Load:
        """LlmqError when the workload does not fit the model's context."""
        context, vocabulary = read_config(folder).context_length, vocabulary_of(folder)
        cells = range(1) if workload.path else range(rounds + 1)
        items = [item for cell in cells for item in workload.items(vocabulary, cell)]
        try:
            check_context(items, vocabulary, context)
        except LlmqError as error:
            hint = f"choose another workload: {either(WORKLOADS)}, or a .jsonl file"
            raise LlmqError(f"{name}: {error.message}", hint, exit_code=USAGE) from None
        prompts = [prompt_len(item, vocabulary) for item in items]
        typical = round(sum(prompts) / len(prompts))
        lead = -(-batch_sizes[-1] * typical // options.max_num_batched_tokens) + 2
        lengths = output_lengths(batch_sizes, lead)
        typical = min(typical, context - max(lengths))
        if typical < 1:
            raise LlmqError(
                f"{len(batch_sizes)} batch sizes take {max(lengths)} tokens, and the model's context is {context}",
                "measure fewer: --batch-sizes 1,8,64",
                exit_code=USAGE,
            )
        ends = [length + item.output_len for length, item in zip(prompts, items, strict=True)]
        options = replace(
            options,
            prefix_caching=False,
            max_num_seqs=max(batch_sizes[-1], min(workload.num_prompts, options.max_num_seqs)),
        )
        longest = max(*ends, typical + max(lengths))
        return cls(folder, workload, batch_sizes, options, typical, tuple(lengths), longest)

    def measure(self, subject: Subject, cell: int) -> Speeds:
        """One round, with prompts that no other has."""
        number = -(-2 * self.options.max_num_batched_tokens // self.input_len)
        drawn = Workload(number, self.input_len, 1, self.workload.seed)
        prefill = subject.run(subject.items(drawn, 2 * cell))
        drawn = replace(drawn, num_prompts=len(self.lengths))
        prompts = subject.items(drawn, 2 * cell + 1)
        items = [Item(one.prompt, length) for one, length in zip(prompts, self.lengths, strict=True)]
        decode = decode_speeds(subject.token_times(items), self.batch_sizes)
        # Without a prefix cache a file's prompts are as good the second time.
        run = subject.run(subject.items(self.workload, 0 if self.workload.path else cell))
        return Speeds(prefill.metrics.total_input_tokens / prefill.metrics.duration, decode, run)

    def kv_bytes(self, device: str, dtype: str) -> int:
        """Of a KV cache that has room for all sequences that run at once, at their longest."""
        config, size = read_config(self.folder), self.options.block_size
        itemsize = resolve_dtype(dtype, config, device).itemsize
        pool = memory.pool_block_bytes(config, size, itemsize) * memory.RESERVED_BLOCKS
        return pool + memory.kv_bytes(config, self.options.max_num_seqs, self.longest + size, size, itemsize)

    def fit_together(self, plans: Sequence[MemoryPlan], device: str, dtype: str) -> bool:
        """Whether the schemes, each with a KV cache of its own, fit the device side by side."""
        if device == "cpu":
            return True
        each = self.kv_bytes(device, dtype) + max(plan.activations.likely for plan in plans)
        return sum(plan.weights.resident + each for plan in plans) <= self._gpu_bytes(device)

    def engine_options(self, device: str, dtype: str, *, shared: bool) -> EngineOptions:
        """``shared``: the device has other models too."""
        options = replace(self.options, max_model_len=self.options.max_model_len or self.longest)
        if not shared or options.kv_cache_memory is not None:
            return options
        return replace(options, kv_cache_memory=self.kv_bytes(device, dtype))

    def kv_tokens(self, plan: MemoryPlan, device: str, dtype: str) -> int | None:
        """Tokens that fit beside the weights of ``plan``, alone on the GPU."""
        if device == "cpu":
            return None
        config, size = read_config(self.folder), self.options.block_size
        itemsize = resolve_dtype(dtype, config, device).itemsize
        budget = self._gpu_bytes(device) - plan.weights.resident - plan.activations.likely
        blocks = memory.pool_blocks(max(0, budget), config, size, itemsize) - memory.RESERVED_BLOCKS
        return max(0, blocks) * size // len(layer_groups(config.windows))

    def _gpu_bytes(self, device: str) -> int:
        import torch

        _, total = torch.cuda.mem_get_info(torch.device(device))
        return int(total * self.options.gpu_memory_utilization)


def _make(source: Path, name: str, scratch: Path, dummy: bool, device: str) -> Path:
    """A folder with the model of ``source`` in scheme ``name``."""
    if name == BASE:
        return source
    if read_config(source).quantization is not None:
        raise LlmqError(f"{source} is quantized already", "compare the model that it was made from", exit_code=USAGE)
    target, methods = scratch / name, PRESETS[name].methods
    method = RTN if RTN in methods else methods[0]
    if dummy:
        choice = choose(name, method)
        _describe(source, target, choice.scheme, choice.format)
    else:
        quantize(str(source), target, scheme=name, method=method, device=device)
    return target


def _describe(source: Path, target: Path, scheme: Scheme, form: str) -> None:
    """A folder without weights, whose config.json says that all layers are in ``scheme``."""
    config = read_config(source)
    shapes = {
        f"{block_name(layer)}.{linear}": shape
        for layer in range(config.num_layers)
        for linear, shape in config.linears.items()
    }
    quantized = [name for name, (_, in_features) in shapes.items() if scheme.divides(in_features)]
    ignored = [name for name in shapes if name not in quantized]
    format = format_for(form, dict.fromkeys(quantized, scheme))
    target.mkdir()
    write_configs(source, target, format, format.config_dict(quantized=quantized, ignored=ignored, writer=WRITER))


def _judge(
    model: str,
    folders: Mapping[str, Path],
    data: str | None,
    dtype: str,
    device: str,
    revision: str | None,
    steps: _Steps,
) -> dict[str, Comparison]:
    """Each scheme's predictions beside those of the model as it is, on the first windows of the text."""

    def scored(name: str, revision: str | None = None) -> Scored:
        subject = prepare(name, data=data, dtype=dtype, device=device, revision=revision)
        return score(replace(subject, windows=subject.windows[:QUALITY_WINDOWS]))

    original, judged = scored(model, revision), {}
    for name, folder in folders.items():
        if name != BASE:
            judged[name] = compare(original, scored(str(folder)))
            _free(device)
        steps.advance()
    return judged


def _free(device: str) -> None:
    """Give back what a model had."""
    import torch

    gc.collect()
    if device != "cpu":
        torch.cuda.empty_cache()
