"""A MemoryPlan in words, in rows, as a bar and in JSON."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from llmq.engine.options import KV_CACHE_DTYPES
from llmq.memory import format_bytes
from llmq.memplan import engines
from llmq.memplan.architecture import LayerCache
from llmq.memplan.engines import ENGINES, IDEAL, LLMQ, VLLM
from llmq.memplan.hints import changes_that_fit
from llmq.memplan.plan import MemoryPlan
from llmq.memplan.source import widened_weight_bytes
from llmq.scheme import Scheme

BAR_WIDTH = 60
BAR_SIGNS = {"weights": "█", "KV cache": "▓", "activations": "▒", "context": "░"}
CONTEXTS = tuple(2**power for power in range(12, 21, 2))
KV_TABLE = ("bfloat16", "fp8")


def verdict(plan: MemoryPlan) -> str:
    """The answer in one line."""
    load = f"{format_bytes(plan.total)} for {_sequences(plan.batch_size)} of {plan.max_model_len:,} tokens"
    where = "" if plan.num_gpus == 1 else f" on each of {plan.num_gpus} GPUs"
    if plan.budget is None or plan.spare is None:
        return f"needs {load}{where}; name a GPU with --gpu or --gpu-memory to see whether it fits"
    if plan.fits:
        return f"fits: {load}{where}, {format_bytes(plan.spare)} spare of {format_bytes(plan.budget)}"
    return (
        f"does not fit: {load}{where}, {format_bytes(-plan.spare)} more than the {format_bytes(plan.budget)} there are"
    )


def start_line(plan: MemoryPlan, pool: int, *, widened_to: int | None) -> str:
    """What an engine that has just started holds, with a ``pool`` of so many bytes for keys and values.

    widened_to  bytes of a weight on a CPU, which computes with dense ones; None: they stay as they are
    """
    weights = plan.weights.resident
    if widened_to is not None:
        weights = widened_weight_bytes(plan.model, widened_to)
    number = (pool - plan.reserved) // plan.sequence_bytes
    return (
        f"weights {format_bytes(weights)}, KV cache {format_bytes(pool)} for {_sequences(number)} of "
        f"{plan.max_model_len:,} tokens, up to {format_bytes(plan.activations.likely)} for a step"
    )


def parts(plan: MemoryPlan) -> dict[str, int]:
    """The addends of the total."""
    return {
        "weights": plan.weights.resident,
        "KV cache": plan.kv_cache + plan.reserved,
        "activations": plan.activations.likely,
        "context": plan.context,
    }


def bar(plan: MemoryPlan) -> str:
    """The parts side by side, as wide as they are large, in the budget or, without one, in the total."""
    whole = max(plan.total, plan.budget or 0)
    drawn = ""
    so_far = 0
    for name, size in parts(plan).items():
        so_far += size
        drawn += BAR_SIGNS[name] * (round(BAR_WIDTH * so_far / whole) - len(drawn))
    legend = "  ".join(f"{BAR_SIGNS[name]} {name}" for name, size in parts(plan).items() if size)
    return f"[{drawn.ljust(BAR_WIDTH, '·')}]  {legend}"


def memory_rows(plan: MemoryPlan) -> list[tuple[str, str, str]]:
    """(what, how much, why), the addends first."""
    band, architecture = plan.activations, plan.architecture
    states = f", {format_bytes(plan.fixed_bytes_per_sequence)} a sequence" if plan.fixed_bytes_per_sequence else ""
    kept = f"{plan.kv_dtype}, {format_bytes(plan.kv_bytes_per_token)} a token{states}"
    if plan.engine != IDEAL:
        kept = f"{plan.blocks:,} blocks of {plan.block_size}, {kept}"
    rows = [
        ("weights", format_bytes(plan.weights.resident), _weights_label(plan)),
        ("KV cache", format_bytes(plan.kv_cache), kept),
        ("reserved block", format_bytes(plan.reserved), "where padding rows write"),
        (
            "activations",
            format_bytes(band.likely),
            f"estimate, {format_bytes(band.low)} to {format_bytes(band.high)}: "
            f"{plan.max_num_batched_tokens:,} tokens a step",
        ),
        ("context", format_bytes(plan.context), "estimate: driver and libraries"),
        ("total", format_bytes(plan.total), "" if plan.num_gpus == 1 else f"on each of {plan.num_gpus} GPUs"),
    ]
    if plan.gpu_memory is not None and plan.budget is not None and plan.spare is not None:
        share = f"{plan.utilization:.0%} of {format_bytes(plan.gpu_memory)}"
        rows += [("budget", format_bytes(plan.budget), share), ("spare", format_bytes(plan.spare), "")]
    ratio = f"b·N·layers·d_model·2·bytes: {plan.textbook_ratio:.2f}× the real one"
    reasons = textbook_reasons(plan)
    if reasons:
        ratio += f" ({'; '.join(reasons)})"
    rows.append(("textbook KV", format_bytes(plan.textbook_kv_cache), ratio))
    active = architecture.active_parameters
    some = f", {active:,} of them for one token" if active != architecture.parameters else ""
    return [*rows, ("parameters", f"{plan.weights.parameters:,}", architecture.model_type + some)]


def textbook_reasons(plan: MemoryPlan) -> list[str]:
    """Why the textbook's cache is not the real one."""
    kinds, hidden = plan.architecture.kinds, plan.architecture.hidden_size
    reasons = []
    by_heads = [layer for layer in kinds if layer.kv_heads]
    if any(layer.token_elements != 2 * hidden for layer in by_heads):
        layer = max(by_heads, key=lambda layer: layer.token_elements)
        width = layer.token_elements // 2 // layer.kv_heads
        reasons.append(f"{layer.kv_heads} heads of {width} are kept, not d_model = {hidden:,}")
    if any(layer.kind == "latent" for layer in kinds):
        reasons.append("one latent for keys and values of all heads")
    if plan.engine != LLMQ and any(layer.window is not None and layer.window < plan.max_model_len for layer in kinds):
        reasons.append("windows")
    for kind, text in (("state", "have a state instead"), ("shared", "read what others keep")):
        number = sum(count for layer, count in kinds.items() if layer.kind == kind)
        if number:
            reasons.append(f"{number} layers {text}")
    if plan.max_model_len % plan.block_size:
        reasons.append("whole blocks")
    return reasons


def limit_rows(plan: MemoryPlan) -> list[tuple[str, str]]:
    """The inverse questions. Empty without a GPU."""
    if plan.max_concurrency is None or plan.max_context is None:
        return []
    return [
        (f"sequences of {plan.max_model_len:,} tokens at once", f"{plan.max_concurrency:,}"),
        (f"longest context for {_sequences(plan.batch_size)}", _longest(plan, plan.max_context)),
    ]


def explanation(plan: MemoryPlan) -> Iterator[str]:
    """What each kind of layer keeps, what the other engines would keep, and what was assumed."""
    for layer, count in plan.architecture.kinds.items():
        size = format_bytes(plan.layer_bytes(layer))
        yield f"{count} {_layer_label(layer)}: {size} each for {plan.max_model_len:,} tokens"
    for engine, cache in caches(plan).items():
        yield f"KV cache of {engine}: {format_bytes(cache)}{' (this plan)' if engine == plan.engine else ''}"
    yield from assumptions(plan)


def caches(plan: MemoryPlan) -> dict[str, int]:
    """What the cache takes in each engine."""
    return {engine: replace(plan, engine=engine, block_size=_block_size(plan, engine)).kv_cache for engine in ENGINES}


def warnings(plan: MemoryPlan) -> list[str]:
    """What whoever reads the plan should know before trusting it."""
    found = [] if plan.architecture.known else [plan.architecture.assumptions[0]]
    if plan.engine != LLMQ:
        return found
    if plan.model.config is None:
        reason = f"{plan.architecture.model_type} ({plan.model.obstacle})"
        found.append(f"llmq does not run {reason}: this is what its engine would hold")
    if plan.kv_dtype not in (plan.architecture.dtype, *KV_CACHE_DTYPES):
        found.append(
            f"llmq keeps keys and values in {plan.architecture.dtype}, fp8 or int8, and not in {plan.kv_dtype}"
        )
    if plan.num_gpus > 1:
        found.append("llmq's engine runs on one GPU today: this is what each would hold with tensor parallelism")
    return found


def assumptions(plan: MemoryPlan) -> list[str]:
    """What is taken for granted, and what is no more than an estimate; the warnings among it."""
    found = list(dict.fromkeys((*warnings(plan), *plan.architecture.assumptions)))
    if plan.weights.scheme is not None:
        found.append("embeddings, head, norms and biases keep the model's type")
    if plan.engine != IDEAL:
        graphs = format_bytes(engines.graph_bytes(plan.engine))
        found.append(f"CUDA graphs, about {graphs}, have their place beside the budget")
    if plan.engine == VLLM:
        found.append("activations and context as in vLLM 0.26's start-up log of Llama-3.1-8B on an H200")
        if any(layer.kind == "state" for layer in plan.architecture.kinds):
            found.append("vLLM pads the pages of states and of attention to one size, which is not counted")
    if plan.kv_dtype == "int8":
        found.append("int8: an fp32 scale for each token's keys of a head, and for its values")
    return found


def capacities(plan: MemoryPlan, schemes: Mapping[str, Scheme]) -> list[dict[str, Any]]:
    """How many sequences fit, for each scheme and KV type: ``sequences`` by the tokens of each. None without a GPU."""
    limit = plan.architecture.context_length or CONTEXTS[-1]
    contexts = sorted({min(tokens, limit) for tokens in CONTEXTS})
    rows = []
    for name, scheme in {"as it is": None, **schemes}.items():
        for kv_dtype in dict.fromkeys((plan.kv_dtype, *KV_TABLE)):
            changed = replace(plan, scheme=scheme or plan.scheme, kv_dtype=kv_dtype)
            users = {tokens: replace(changed, max_model_len=tokens).max_concurrency for tokens in contexts}
            weights = changed.weights.resident
            rows.append({"scheme": name, "kv_dtype": kv_dtype, "weights": weights, "sequences": users})
    return rows


def capacity_table(plan: MemoryPlan, schemes: Mapping[str, Scheme]) -> tuple[list[str], list[list[str]]]:
    """Columns and rows of ``capacities``; – is none."""
    found, rows = capacities(plan, schemes), []
    for row in found:
        cells = ["" if users is None else f"{users:,}" if users else "–" for users in row["sequences"].values()]
        rows.append([row["scheme"], row["kv_dtype"], format_bytes(row["weights"]), *cells])
    return ["scheme", "KV cache", "weights", *(f"{tokens:,} tokens" for tokens in found[0]["sequences"])], rows


def as_json(plan: MemoryPlan, schemes: Mapping[str, Scheme]) -> dict[str, Any]:
    """Sizes are integer bytes of one GPU, those of a token or a sequence alone of the whole model. What depends on a
    GPU is null when none is named."""
    weights, band, architecture = plan.weights, plan.activations, plan.architecture
    return {
        "fits": plan.fits,
        "engine": plan.engine,
        "model_type": architecture.model_type,
        "known_architecture": architecture.known,
        "context_length": architecture.context_length,
        "batch_size": plan.batch_size,
        "max_model_len": plan.max_model_len,
        "num_gpus": plan.num_gpus,
        "parameters": weights.parameters,
        "active_parameters": architecture.active_parameters,
        "weights": {
            "on_disk": weights.on_disk,
            "resident": weights.resident,
            "quantized": weights.quantized,
            "unquantized": weights.unquantized,
            "scales": weights.scales,
            "dtype": architecture.dtype,
            "scheme": None if weights.scheme is None else str(weights.scheme),
            "stored": weights.stored,
        },
        "kv": {
            "total": plan.kv_cache,
            "dtype": plan.kv_dtype,
            "bytes_per_token": plan.kv_bytes_per_token,
            "bytes_per_sequence_fixed": plan.fixed_bytes_per_sequence,
            "bytes_per_sequence": plan.sequence_bytes,
            "reserved": plan.reserved,
            "blocks": plan.blocks,
            "block_size": plan.block_size,
            "naive_total": plan.textbook_kv_cache,
            "naive_ratio": plan.textbook_ratio,
            "tokens": plan.kv_tokens,
            "engines": caches(plan),
            "layers": [
                {
                    "kind": layer.kind,
                    "count": count,
                    "kv_heads": layer.kv_heads,
                    "elements_per_token": layer.token_elements,
                    "elements_per_sequence": layer.conv_elements + layer.state_elements,
                    "window": layer.window,
                    "bytes": plan.layer_bytes(layer),
                }
                for layer, count in architecture.kinds.items()
            ],
        },
        "activations": {
            "low": band.low,
            "likely": band.likely,
            "high": band.high,
            "max_num_seqs": plan.max_num_seqs,
            "max_num_batched_tokens": plan.max_num_batched_tokens,
        },
        "context": plan.context,
        "graphs": engines.graph_bytes(plan.engine),
        "total": plan.total,
        "gpu_memory": plan.gpu_memory,
        "gpu_memory_utilization": plan.utilization,
        "budget": plan.budget,
        "spare": plan.spare,
        "max_concurrency": plan.max_concurrency,
        "max_context": plan.max_context,
        "changes_that_fit": [
            {"flag": change.flag, "price": change.price, "total": change.total}
            for change in changes_that_fit(plan, schemes)
        ],
        "assumptions": assumptions(plan),
    }


def _layer_label(layer: LayerCache) -> str:
    width = f"{layer.kv_heads} × {layer.token_elements // 2 // layer.kv_heads}" if layer.kv_heads else ""
    label = {
        "full": f"layers with keys and values of {width}",
        "sliding": f"layers with a window of {layer.window} tokens, {width}",
        "chunked": f"layers with chunks of {layer.window} tokens, {width}",
        "latent": f"layers with a latent of {layer.token_elements} numbers a token",
        "state": f"layers with a state of {layer.conv_elements + layer.state_elements:,} numbers",
        "shared": "layers that read what others keep",
    }[layer.kind]
    beside = layer.kind != "state" and layer.state_elements
    return f"{label} and a state of {layer.conv_elements + layer.state_elements:,} numbers" if beside else label


def _longest(plan: MemoryPlan, tokens: int) -> str:
    limit = plan.architecture.context_length
    if limit is None or tokens <= limit:
        return f"{tokens:,} tokens"
    return f"{limit:,} tokens (the model's limit; memory holds {tokens:,})"


def _block_size(plan: MemoryPlan, engine: str) -> int:
    if engine == plan.engine:
        return plan.block_size
    return 1 if engine == IDEAL else engines.VLLM_BLOCK_SIZE


def _weights_label(plan: MemoryPlan) -> str:
    weights, architecture = plan.weights, plan.architecture
    kind = architecture.dtype if weights.scheme is None else str(weights.scheme)
    if architecture.quantization is not None and weights.scheme is None:
        kind = str(architecture.quantization.get("quant_method"))
    where = "as stored" if weights.stored else "computed"
    if weights.resident != weights.on_disk and plan.num_gpus == 1:
        where += f", {format_bytes(weights.on_disk)} on disk"
    return f"{kind}, {where}"


def _sequences(number: int) -> str:
    return f"{number:,} sequence{'' if number == 1 else 's'}"
