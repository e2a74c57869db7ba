"""One model in several schemes on one workload: speed over batch sizes, quality and memory, and what to take.

Each scheme runs the same requests, in turns with the others where all fit side by side, so that what the machine does
meanwhile it does to all; every ratio is the median over rounds of the ratios within a round. In a round:

    prefill   tokens/s of prompts of the workload's length, one token generated for each
    decode    tokens/s at each batch size: ``bench.staircase``
    workload  all requests there at the start; a peer's turn is after all schemes'
"""

from __future__ import annotations

import gc
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

import torch

from llmq import memory
from llmq.bench.candidates import BASE, BATCH_SIZES, ROUNDS, SCHEMES, WORKLOADS, workload_of
from llmq.bench.compare_report import CompareReport, Row, Speeds
from llmq.bench.comparison import Comparison as BesidePeer
from llmq.bench.comparison import Figures
from llmq.bench.datasets import items_of
from llmq.bench.engine import Setup, Subject
from llmq.bench.load import Progress
from llmq.bench.peers import PACKAGES, Peer, beside, check_peer, open_peer
from llmq.bench.staircase import decode_speeds, output_lengths
from llmq.bench.workload import Item, Workload, check_context, prompt_len, vocabulary_of
from llmq.checkpoint.config import read_config
from llmq.checkpoint.folder import DEMO, resolve
from llmq.checkpoint.formats import WRITER, format_for, write_configs
from llmq.engine.options import EngineOptions
from llmq.errors import CHECK_FAILED, USAGE, LlmqError, either
from llmq.evals.divergence import Comparison, Scored, compare, score
from llmq.evals.perplexity import prepare
from llmq.memplan.plan import plan
from llmq.memplan.source import open_model
from llmq.plan import layer_groups
from llmq.quant.pipeline import quantize
from llmq.quant.schemes import PRESETS, RTN, choose
from llmq.runtime.device import free_kv_cache_bytes, resolve_device, resolve_dtype, resolve_kv_dtype
from llmq.scheme import Scheme

if TYPE_CHECKING:
    from llmq.memplan.plan import MemoryPlan

QUALITY_WINDOWS = 16


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
    peer: str | None = None,
    progress: Progress | None = None,
) -> CompareReport:
    """Measure ``model`` in each of ``schemes``, the first of which the others are set beside.

    A scheme is taken from ``folders`` where that has it, and else made by rounding to nearest; for dummy weights, its
    name in config.json is enough. Quality is measured on the text ``data``, or the demo's for the demo. ``peer``: an
    engine or the URL of a server that runs the workload too, with the model as the first scheme has it.
    LlmqError before anything is made when there is no such scheme or peer, or the workload does not fit the model's
    context, and before anything is measured when a peer does not fit beside the schemes.
    """
    folders = folders or {}
    _check_schemes(schemes, folders)
    if not schemes or not batch_sizes or min(batch_sizes) < 1 or rounds < 1:
        raise LlmqError("nothing to measure", "check --schemes, --batch-sizes and --rounds", exit_code=USAGE)
    if peer is not None:
        check_peer(peer)
    source, device = resolve(model, revision), resolve_device(device)
    asked = workload_of(workload, num_prompts, seed)
    options = (options or EngineOptions()).on(device)
    load = _Load.of(source, asked, workload, tuple(sorted(set(batch_sizes))), rounds, options)
    dummy = load.options.load_format == "dummy"
    quality = not dummy and (data is not None or model == DEMO)
    if quality:
        prepare(model, data=data, dtype=dtype, device=device, revision=revision)
    elif data is not None:
        raise LlmqError("dummy weights have no quality to measure", "leave out --data", exit_code=USAGE)
    steps = _Steps(progress, len(schemes) * (rounds + 2 + quality) + (rounds + 1) * (peer is not None))
    with TemporaryDirectory() as scratch:
        found = {name: folders.get(name) or _make(source, name, Path(scratch), dummy, device) for name in schemes}
        plans = {name: plan(open_model(str(folder)), options=load.options) for name, folder in found.items()}
        steps.advance(len(schemes))
        of_peer = [plans[schemes[0]]] if peer in PACKAGES else []
        side_by_side = load.fit_together([*plans.values(), *of_peer], device, dtype)
        if peer is not None and not side_by_side:
            raise LlmqError(
                f"{', '.join(schemes)} and {peer} do not fit the GPU side by side, to run in turns",
                "compare fewer --schemes, or smaller --batch-sizes",
                exit_code=CHECK_FAILED,
            )
        groups = [list(schemes)] if side_by_side else [[name] for name in schemes]
        speeds: dict[str, list[Speeds]] = {}
        peers: dict[str, BesidePeer] = {}
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
            opponent = None if peer is None else open_peer(peer, subjects[group[0]], seed)
            measured, theirs = _in_turns(load, subjects, opponent, rounds, steps)
            speeds |= measured
            if opponent is not None:
                peers = {
                    name: beside(opponent, [one.run.metrics for one in own], theirs) for name, own in measured.items()
                }
            del subjects, opponent
            _free(device)
        judged = _judge(model, found, data, dtype, device, revision, steps) if quality else {}
    assert setup is not None
    rows = tuple(
        Row(
            name,
            plans[name].weights.resident,
            load.kv_tokens(plans[name], device, dtype),
            tuple(one),
            judged.get(name),
            peers.get(name),
        )
        for name, one in speeds.items()
    )
    return CompareReport(setup, Path(workload).stem, asked, side_by_side, rows)


def _check_schemes(schemes: Sequence[str], folders: Mapping[str, Path]) -> None:
    for name in (*schemes, *folders):
        if name != BASE and name not in PRESETS:
            raise LlmqError(f"there is no scheme {name!r}", f"choose {either((BASE, *PRESETS))}", exit_code=USAGE)
    for path in folders.values():
        if not (path / "config.json").is_file():
            raise LlmqError(f"{path} is no model folder: it has no config.json", "check --folder", exit_code=USAGE)


def _in_turns(
    load: _Load, subjects: Mapping[str, Subject], opponent: Peer | None, rounds: int, steps: _Steps
) -> tuple[dict[str, list[Speeds]], list[Figures]]:
    """The rounds of each scheme, and those of the peer, if there is one."""
    speeds: dict[str, list[Speeds]] = {name: [] for name in subjects}
    theirs: list[Figures] = []
    for cell in range(rounds + 1):  # the first is the warm-up
        for name, subject in subjects.items():
            measured = load.measure(subject, cell)
            speeds[name] += [measured] if cell else []
            steps.advance()
        if opponent is not None:
            there = opponent.run(load.requests(subject, cell))
            theirs += [there] if cell else []
            steps.advance()
    return speeds, theirs


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
        items = [item for cell in cells for item in items_of(workload, vocabulary, cell)]
        try:
            check_context(items, vocabulary, context)
        except LlmqError as error:
            hint = f"choose another workload: {either(WORKLOADS)}, or a .jsonl file"
            raise LlmqError(f"{name}: {error.message}", hint, exit_code=USAGE) from None
        prompts = [prompt_len(item, vocabulary) for item in items]
        typical = round(sum(prompts) / len(prompts))
        lead = -(-batch_sizes[-1] * typical // options.batched_tokens) + 2
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
        number = -(-2 * self.options.batched_tokens // self.input_len)
        drawn = Workload(number, self.input_len, 1, self.workload.seed)
        prefill = subject.run(subject.items(drawn, 2 * cell))
        drawn = replace(drawn, num_prompts=len(self.lengths))
        prompts = subject.items(drawn, 2 * cell + 1)
        items = [Item(one.prompt, length) for one, length in zip(prompts, self.lengths, strict=True)]
        decode = decode_speeds(subject.token_times(items), self.batch_sizes)
        run = subject.run(self.requests(subject, cell))
        return Speeds(prefill.metrics.total_input_tokens / prefill.metrics.duration, decode, run)

    def requests(self, subject: Subject, cell: int) -> list[Item]:
        """Of the workload, in one round. Without a prefix cache a file's prompts are as good the second time."""
        return subject.items(self.workload, 0 if self.workload.path else cell)

    def kv_bytes(self, device: str, dtype: str) -> int:
        """Of a KV cache that has room for all sequences that run at once, at their longest."""
        config, size = read_config(self.folder), self.options.block_size
        kept_as = self._kv_dtype(device, dtype)
        pool = memory.pool_block_bytes(config, size, kept_as) * memory.RESERVED_BLOCKS
        return pool + memory.kv_bytes(config, self.options.max_num_seqs, self.longest + size, size, kept_as)

    def fit_together(self, plans: Sequence[MemoryPlan], device: str, dtype: str) -> bool:
        """Whether the schemes, each with a KV cache of its own, fit the device side by side."""
        if device == "cpu":
            return True
        each = self.kv_bytes(device, dtype) + max(plan.activations.likely for plan in plans)
        free = free_kv_cache_bytes(device, self.options.gpu_memory_utilization, 0)
        return sum(plan.weights.resident + each for plan in plans) <= free

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
        whole = int(torch.cuda.mem_get_info(torch.device(device))[1] * self.options.gpu_memory_utilization)
        budget = whole - plan.weights.resident - plan.activations.likely
        kept_as = self._kv_dtype(device, dtype)
        blocks = memory.pool_blocks(max(0, budget), config, size, kept_as) - memory.RESERVED_BLOCKS
        return max(0, blocks) * size // len(layer_groups(config.windows))

    def _kv_dtype(self, device: str, dtype: str) -> str:
        config = read_config(self.folder)
        return resolve_kv_dtype(self.options.kv_cache_dtype, resolve_dtype(dtype, config, device), device)


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
    shapes = config.all_linears
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
    gc.collect()
    if device != "cpu":
        torch.cuda.empty_cache()
