"""What would make a plan fit: the smallest changes, each with its price."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

from llmq.memory import KV_DTYPE_BYTES
from llmq.memplan.engines import LLMQ
from llmq.memplan.gpu import GIB, USABLE_GIB
from llmq.memplan.plan import MemoryPlan
from llmq.scheme import Scheme


@dataclass(frozen=True, slots=True)
class Change:
    """A flag, what it costs in words, and the bytes that each GPU then holds."""

    flag: str
    price: str
    total: int


def changes_that_fit(plan: MemoryPlan, schemes: Mapping[str, Scheme]) -> list[Change]:
    """For a plan that does not fit: the single changes after which it does, a larger GPU the last; of weights and cache
    both, where neither is enough alone.

    ``schemes``: those that there are, by their names.
    """
    if plan.fits is not False:
        return []
    return [Change(flag, price, changed.total) for flag, price, changed in _candidates(plan, schemes) if changed.fits]


def fitting_schemes(plan: MemoryPlan, schemes: Mapping[str, Scheme]) -> dict[str, MemoryPlan]:
    """Of ``schemes`` those in which the plan fits, the one that keeps most of the weights' bits first."""
    plans = {name: replace(plan, scheme=scheme) for name, scheme in schemes.items()}
    fitting = {name: changed for name, changed in plans.items() if changed.fits}
    return dict(sorted(fitting.items(), key=lambda item: -item[1].weights.on_disk))


def _candidates(plan: MemoryPlan, schemes: Mapping[str, Scheme]) -> Iterator[tuple[str, str, MemoryPlan]]:
    context, users = plan.max_context, plan.max_concurrency
    if context:
        price = f"{context:,} tokens a sequence instead of {plan.max_model_len:,}"
        yield f"--max-model-len {context}", price, replace(plan, max_model_len=context)
    if users:
        yield (
            f"--batch-size {users}",
            f"{users:,} sequences at once instead of {plan.batch_size:,}",
            replace(plan, batch_size=users),
        )
    alone = [*_fewer_bits(plan, schemes), *[found for found in _narrower_caches(plan) if found[2].fits][:1]]
    yield from alone
    if not alone:
        for cache_flag, cache_price, narrower in list(_narrower_caches(plan))[-1:]:
            for flag, price, changed in _fewer_bits(narrower, schemes):
                yield f"{flag} {cache_flag}", f"{price}, and {cache_price}", changed
    gpus = None if plan.engine == LLMQ else plan.gpus_needed
    if gpus is not None:
        yield f"--num-gpus {gpus}", f"{gpus} GPUs instead of {plan.num_gpus}", replace(plan, num_gpus=gpus)
    yield from _larger_gpu(plan)


def _fewer_bits(plan: MemoryPlan, schemes: Mapping[str, Scheme]) -> Iterator[tuple[str, str, MemoryPlan]]:
    """The scheme of most bits that fits, of a model that has none yet."""
    if plan.scheme is not None or plan.architecture.quantization is not None:
        return
    own = plan.weights
    for name, changed in list(fitting_schemes(plan, schemes).items())[:1]:
        bits = 8 * changed.weights.on_disk / own.parameters
        price = f"{bits:.1f} bits a weight instead of {8 * own.on_disk / own.parameters:.1f}"
        yield f"--scheme {name}", price, changed


def _narrower_caches(plan: MemoryPlan) -> Iterator[tuple[str, str, MemoryPlan]]:
    """Whether they fit or not, the widest first; of llmq's engine those that it has."""
    for name in ("fp8",) if plan.engine == LLMQ else ("bfloat16", "fp8"):
        if KV_DTYPE_BYTES[name] < KV_DTYPE_BYTES[plan.kv_dtype]:
            price = f"keys and values of {8 * KV_DTYPE_BYTES[name]} bits"
            yield f"--kv-cache-dtype {name}", price, replace(plan, kv_dtype=name)


def _larger_gpu(plan: MemoryPlan) -> Iterator[tuple[str, str, MemoryPlan]]:
    """The smallest in the table that is large enough, or else its size."""
    total = plan.total
    for name, gib in sorted(USABLE_GIB.items(), key=lambda item: item[1]):
        if total <= gib * GIB * plan.utilization:
            yield f"--gpu {name}", f"a GPU of {gib:.0f} GiB", replace(plan, gpu_memory=int(gib * GIB))
            return
    size = plan.gpu_gib_needed
    yield f"--gpu-memory {size}GiB", "a GPU larger than there are", replace(plan, gpu_memory=size * GIB)
