"""A memory plan against what a running engine holds: load the model, run a full batch, compare line by line."""

from __future__ import annotations

import gc
import random
from dataclasses import dataclass, replace

import torch

from llmq.engine.options import KV_CACHE_DTYPES, EngineOptions, KVCacheDtype, LoadFormat
from llmq.engine.request import SamplingParams
from llmq.errors import USAGE, LlmqError
from llmq.llm import LLM
from llmq.memory import format_bytes
from llmq.memplan.engines import LLMQ
from llmq.memplan.plan import MemoryPlan
from llmq.memplan.source import widened_weight_bytes
from llmq.runtime.device import resolve_device, resolve_dtype, resolve_kv_dtype
from llmq.runtime.linear import resident_bytes

TOLERANCE, TOLERANCE_BYTES = 0.15, 200 * 2**20
"""An estimate may be off by the larger of the two."""
NEW_TOKENS = 4


@dataclass(frozen=True, slots=True)
class Line:
    """One line of a plan. ``exact``: it may not be off by a byte; ``measured`` is None where nothing can tell."""

    name: str
    predicted: int
    measured: int | None
    exact: bool

    @property
    def holds(self) -> bool:
        if self.measured is None:
            return True
        allowed = 0 if self.exact else max(TOLERANCE * self.measured, TOLERANCE_BYTES)
        return abs(self.predicted - self.measured) <= allowed

    def row(self) -> list[str]:
        """Name, predicted, measured, and by how much they differ."""
        if self.measured is None:
            return [self.name, format_bytes(self.predicted), "–", ""]
        off = format_bytes(self.predicted - self.measured) if self.predicted != self.measured else "exact"
        return [self.name, format_bytes(self.predicted), format_bytes(self.measured), off]


def verify(
    model: str,
    plan: MemoryPlan,
    *,
    revision: str | None = None,
    device: str = "auto",
    load_format: LoadFormat = "auto",
) -> list[Line]:
    """Run ``plan``, a plan of ``model``, and compare. The engine's KV cache gets as much as was planned, and a batch
    of as many sequences as long as was planned is decoded.

    Of a GPU, context is what the driver has given and torch does not know of; what torch keeps of tensors that are gone
    is in no line. On a CPU, weights are widened and activations cannot be told from all else. LlmqError when the engine
    cannot run it.
    """
    if plan.engine != LLMQ or plan.num_gpus > 1 or plan.scheme is not None:
        raise LlmqError(
            "only what llmq's engine runs on one GPU, with the weights as they are, can be verified",
            "leave out --engine, --num-gpus and --scheme",
            exit_code=USAGE,
        )
    if plan.model.config is None:
        raise LlmqError(f"llmq does not run {plan.architecture.model_type}", "its plan can only be computed")
    if plan.model.tensors is None and load_format != "dummy":
        raise LlmqError(f"{model} has no weights to load", "take random ones: --load-format dummy")
    device = resolve_device(device)
    dtype = resolve_dtype("auto", plan.model.config, device)
    # Keys and values have the type that the engine computes in, or 8 bits, and no step is larger than the batch is.
    kv_cache_dtype: KVCacheDtype = next((name for name in KV_CACHE_DTYPES if name == plan.kv_dtype), "auto")
    plan = replace(
        plan,
        kv_dtype=resolve_kv_dtype(kv_cache_dtype, dtype, device),
        max_num_seqs=plan.batch_size,
        max_num_batched_tokens=min(plan.max_num_batched_tokens, plan.batch_size * plan.max_model_len),
    )
    options = EngineOptions(
        max_num_seqs=plan.batch_size,
        max_num_batched_tokens=plan.max_num_batched_tokens,
        block_size=plan.block_size,
        kv_cache_dtype=kv_cache_dtype,
        kv_cache_memory=plan.kv_cache + plan.reserved,
        max_model_len=plan.max_model_len,
        prefix_caching=False,
        load_format=load_format,
    )
    gc.collect()  # what another engine left
    held = 0 if device == "cpu" else torch.cuda.memory_allocated(device)
    llm = LLM(model, revision=revision, device=device, options=options)
    if llm.device != "cpu":
        torch.cuda.reset_peak_memory_stats(llm.device)
    _run_batch(llm, plan)
    weights, pool = resident_bytes(llm.decoder), llm.kv_cache_bytes
    if llm.device == "cpu":
        widened = widened_weight_bytes(plan.model, llm.dtype.itemsize)
        return [
            Line("weights", widened, weights, exact=True),
            Line("KV cache", plan.kv_cache + plan.reserved, pool, exact=True),
            Line("activations", plan.activations.likely, None, exact=False),
        ]
    free, total = torch.cuda.mem_get_info(llm.device)
    activations = torch.cuda.max_memory_allocated(llm.device) - held - weights - pool
    return [
        Line("weights", plan.weights.resident, weights, exact=True),
        Line("KV cache", plan.kv_cache + plan.reserved, pool, exact=True),
        Line("activations", plan.activations.likely, activations, exact=False),
        Line("context", plan.context, total - free - torch.cuda.memory_reserved(llm.device), exact=False),
    ]


def _run_batch(llm: LLM, plan: MemoryPlan) -> None:
    """Sequences of random tokens, the last of which are generated."""
    draw = random.Random(0)
    new = min(NEW_TOKENS, plan.max_model_len - 1)
    prompts = [
        [draw.randrange(plan.architecture.vocab_size) for _ in range(plan.max_model_len - new)]
        for _ in range(plan.batch_size)
    ]
    for output in llm.generate(prompts, SamplingParams(max_tokens=new, temperature=0.0, ignore_eos=True)):
        if output.error is not None:
            raise output.error
