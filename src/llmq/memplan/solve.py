"""A plan turned around: the longest context, the most sequences, the best scheme or the fewest GPUs that fit."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from llmq.errors import USAGE, LlmqError
from llmq.memory import format_bytes
from llmq.memplan.hints import fitting_schemes
from llmq.memplan.plan import MOST, MemoryPlan
from llmq.scheme import Scheme


@dataclass(frozen=True, slots=True)
class Answer:
    """``value`` is the number, or the scheme's name; None: nothing fits. ``plan`` is the one that it makes."""

    question: str
    value: int | str | None
    text: str
    plan: MemoryPlan


def solve(plan: MemoryPlan, question: str, schemes: Mapping[str, Scheme]) -> Answer:
    """The answer to one of ``QUESTIONS``. LlmqError when there is no such question, or no GPU to ask it of."""
    if question not in QUESTIONS:
        raise LlmqError(f"{question!r} cannot be solved for", f"choose --solve {', '.join(QUESTIONS)}", exit_code=USAGE)
    if plan.gpu_memory is None:
        raise LlmqError("nothing can be solved for without a GPU", "name one: --gpu h100, or --gpu-memory 24GiB")
    return QUESTIONS[question](plan, schemes)


def _context(plan: MemoryPlan, schemes: Mapping[str, Scheme]) -> Answer:
    memory_holds = plan.max_context or 0
    tokens = min(memory_holds, plan.architecture.context_length or MOST)
    limit = ", the model's limit" if tokens < memory_holds else ""
    text = f"{tokens:,} tokens for each of {plan.batch_size:,} at once{limit}" if tokens else "not even one block fits"
    return Answer("context", tokens or None, text, replace(plan, max_model_len=tokens or plan.max_model_len))


def _concurrency(plan: MemoryPlan, schemes: Mapping[str, Scheme]) -> Answer:
    users = plan.max_concurrency or 0
    text = f"{users:,} sequences of {plan.max_model_len:,} tokens at once" if users else "not even one sequence fits"
    return Answer("concurrency", users or None, text, replace(plan, batch_size=users or plan.batch_size))


def _scheme(plan: MemoryPlan, schemes: Mapping[str, Scheme]) -> Answer:
    if plan.fits:
        return Answer("scheme", "as it is", "it fits as it is", plan)
    fitting = fitting_schemes(plan, schemes)
    if not fitting:
        return Answer("scheme", None, f"none of {', '.join(schemes)} is small enough", plan)
    names = [f"{name} ({format_bytes(changed.weights.resident)})" for name, changed in fitting.items()]
    best, changed = next(iter(fitting.items()))
    return Answer("scheme", best, f"{', '.join(names)} fit", changed)


def _gpus(plan: MemoryPlan, schemes: Mapping[str, Scheme]) -> Answer:
    count = plan.gpus_needed
    if count is None:
        return Answer("gpus", None, "no number of such GPUs is enough: each would have copies that do not fit", plan)
    text = f"{count} GPU{'s' if count > 1 else ''} of {format_bytes(plan.gpu_memory or 0)}"
    return Answer("gpus", count, text, replace(plan, num_gpus=count))


QUESTIONS: dict[str, Callable[[MemoryPlan, Mapping[str, Scheme]], Answer]] = {
    "context": _context,
    "concurrency": _concurrency,
    "scheme": _scheme,
    "gpus": _gpus,
}
