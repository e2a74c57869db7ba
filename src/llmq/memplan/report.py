"""A MemoryPlan in words, in rows and in JSON."""

from __future__ import annotations

from typing import Any

from llmq.memory import format_bytes
from llmq.memplan.plan import MemoryPlan, changes_that_fit


def verdict(plan: MemoryPlan) -> str:
    """The answer in one line."""
    load = f"{format_bytes(plan.total)} for {_sequences(plan.batch_size)} of {plan.max_model_len:,} tokens"
    if plan.budget is None or plan.spare is None:
        return f"needs {load}; name a GPU with --gpu-memory to see whether it fits"
    if plan.fits:
        return f"fits: {load}, {format_bytes(plan.spare)} spare of {format_bytes(plan.budget)}"
    return f"does not fit: {load}, {format_bytes(-plan.spare)} more than the {format_bytes(plan.budget)} there are"


def memory_rows(plan: MemoryPlan) -> list[tuple[str, str, str]]:
    """(what, how much, why), the addends first."""
    blocks = f"{plan.blocks:,} blocks of {plan.block_size}, {format_bytes(plan.kv_bytes_per_token)} a token"
    rows = [
        ("weights", format_bytes(plan.weights.num_bytes), _weights_label(plan)),
        ("KV cache", format_bytes(plan.kv_cache), blocks),
        ("reserved block", format_bytes(plan.reserved_blocks), "where padding rows write"),
        ("activations", format_bytes(plan.activations), f"estimate, {plan.max_num_batched_tokens:,} tokens a step"),
        ("total", format_bytes(plan.total), ""),
    ]
    if plan.gpu_memory is not None and plan.budget is not None and plan.spare is not None:
        share = f"{plan.utilization:.0%} of {format_bytes(plan.gpu_memory)}"
        rows += [("budget", format_bytes(plan.budget), share), ("spare", format_bytes(plan.spare), "")]
    ratio = f"b·N·layers·d_model·2·bytes: {plan.textbook_ratio:.2f}× the real one"
    return [*rows, ("textbook KV", format_bytes(plan.textbook_kv_cache), ratio)]


def limit_rows(plan: MemoryPlan) -> list[tuple[str, str]]:
    """The inverse questions. Empty without a GPU."""
    if plan.max_sequences is None or plan.max_context is None:
        return []
    context = f"{min(plan.max_context, plan.config.context_length):,} tokens"
    if plan.max_context > plan.config.context_length:
        context += f" (the model's limit; memory holds {plan.max_context:,})"
    return [
        (f"sequences of {plan.max_model_len:,} tokens at once", f"{plan.max_sequences:,}"),
        (f"longest context for {_sequences(plan.batch_size)}", context),
    ]


def as_json(plan: MemoryPlan) -> dict[str, Any]:
    """Sizes are integer bytes. What depends on a GPU is null when none is named."""
    scheme = plan.weights.scheme
    return {
        "fits": plan.fits,
        "batch_size": plan.batch_size,
        "max_model_len": plan.max_model_len,
        "context_length": plan.config.context_length,
        "weights": {
            "bytes": plan.weights.num_bytes,
            "stored": plan.weights.stored,
            "dtype": plan.config.dtype,
            "scheme": None if scheme is None else str(scheme),
        },
        "kv_cache": {
            "bytes": plan.kv_cache,
            "dtype": plan.kv_dtype,
            "bytes_per_token": plan.kv_bytes_per_token,
            "blocks": plan.blocks,
            "block_size": plan.block_size,
            "block_bytes": plan.block_bytes,
            "reserved_bytes": plan.reserved_blocks,
            "textbook_bytes": plan.textbook_kv_cache,
            "textbook_ratio": plan.textbook_ratio,
        },
        "activations": {
            "bytes": plan.activations,
            "estimate": True,
            "max_num_seqs": plan.max_num_seqs,
            "max_num_batched_tokens": plan.max_num_batched_tokens,
        },
        "total_bytes": plan.total,
        "gpu_memory_bytes": plan.gpu_memory,
        "gpu_memory_utilization": plan.utilization,
        "budget_bytes": plan.budget,
        "spare_bytes": plan.spare,
        "max_sequences": plan.max_sequences,
        "max_context": plan.max_context,
        "changes_that_fit": [{"flag": change.flag, "total_bytes": change.total} for change in changes_that_fit(plan)],
    }


def _weights_label(plan: MemoryPlan) -> str:
    kind = plan.config.dtype if plan.weights.scheme is None else str(plan.weights.scheme)
    if plan.config.quantization is not None and plan.weights.scheme is None:
        kind = str(plan.config.quantization.get("quant_method"))
    return f"{kind}, {'as stored' if plan.weights.stored else 'computed'}"


def _sequences(number: int) -> str:
    return f"{number:,} sequence{'' if number == 1 else 's'}"
