"""Tasks of lm-evaluation-harness (github.com/EleutherAI/lm-evaluation-harness, 0.4) on llmq's engine.

    loglikelihood          ln p(continuation | context), and whether greedy decoding would have written it
    loglikelihood_rolling  ln p(text), in windows as long as the context, each token scored once
    generate_until         greedy, or as the task says, until one of its stop texts

All requests of a kind are one continuous batch.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmq.engine.options import EngineOptions
from llmq.engine.request import SamplingParams
from llmq.errors import USAGE, LlmqError
from llmq.evals.bootstrap import RESAMPLES
from llmq.llm import LLM, Prompt, RequestOutput

try:
    from lm_eval import simple_evaluate
    from lm_eval.api.model import TemplateLM
    from lm_eval.tasks import TaskManager
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
except ImportError:
    raise LlmqError("tasks need lm-evaluation-harness", 'install it: pip install "llmq[lm-eval]"') from None

MAX_GENERATED = 256
"""Tokens, where a task does not say how many: lm-eval's default."""
SCORE = SamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=1)


@dataclass(frozen=True, slots=True)
class TaskResult:
    """``metrics``: name → value and its standard error, where there is one."""

    task: str
    examples: int
    metrics: dict[str, tuple[float, float | None]]

    def as_json(self) -> dict[str, Any]:
        metrics = {name: {"value": value, "stderr": error} for name, (value, error) in self.metrics.items()}
        return {"task": self.task, "examples": self.examples, "metrics": metrics}


def evaluate_tasks(
    model: str,
    tasks: Sequence[str],
    *,
    folder: Path | None = None,
    limit: int | None = None,
    dtype: str = "auto",
    device: str = "auto",
    revision: str | None = None,
) -> list[TaskResult]:
    """Run ``tasks`` by their names: lm-eval's own, or those of the YAML files in ``folder``; of each, the first
    ``limit`` examples. LlmqError when there is no such task, or its dataset cannot be had."""
    manager = _task_manager(tasks, folder)
    unknown = [task for task in tasks if not manager.match_tasks([task])]
    if unknown:
        raise LlmqError(
            f"there is no task {unknown[0]!r}", "see: lm-eval ls tasks; your own: --task-folder", exit_code=USAGE
        )
    engine = EngineLM(LLM(model, revision=revision, dtype=dtype, device=device, options=EngineOptions()))
    try:
        found = simple_evaluate(
            engine,
            tasks=list(tasks),
            limit=limit,
            task_manager=manager,
            log_samples=False,
            bootstrap_iters=RESAMPLES,
        )
    except (OSError, ValueError) as error:  # what datasets raises without a network, or for a file that is not there
        reason = str(error).strip().splitlines()[0]
        raise LlmqError(
            f"the tasks cannot be run: {reason}", "their datasets come from the hub, or --task-folder"
        ) from None
    return [
        TaskResult(task, found["n-samples"][task]["effective"], _metrics(figures))
        for task, figures in found["results"].items()
        if task in found["n-samples"]
    ]


def _task_manager(tasks: Sequence[str], folder: Path | None) -> Any:
    """lm-eval's own tasks, which take seconds to find, are only looked through where ``folder`` does not have them."""
    if folder is not None:
        own = TaskManager(include_path=str(folder), include_defaults=False)
        if all(own.match_tasks([task]) for task in tasks):
            return own
    return TaskManager(include_path=None if folder is None else str(folder))


def _metrics(figures: dict[str, Any]) -> dict[str, tuple[float, float | None]]:
    """lm-eval's ``{"acc,none": 0.5, "acc_stderr,none": 0.1, …}``, the filter named where it is not ``none``."""
    metrics: dict[str, tuple[float, float | None]] = {}
    for key, value in figures.items():
        name, _, kind = key.partition(",")
        if kind and not name.endswith("_stderr"):
            error = figures.get(f"{name}_stderr,{kind}")
            title = name if kind == "none" else f"{name} ({kind})"
            metrics[title] = (float(value), error if isinstance(error, float) else None)
    return metrics


class EngineLM(TemplateLM):  # type: ignore[misc]
    """What lm-eval calls a model: an ``LLM``. Encoding of contexts and continuations is its TemplateLM's."""

    def __init__(self, llm: LLM) -> None:
        super().__init__()
        self.llm = llm
        self.tokenizer = llm.tokenizer

    @property
    def max_length(self) -> int:
        """Tokens that a scored one may have before it: the engine scores a prompt and generates one token more."""
        return self.llm.max_model_len - 2

    @property
    def eot_token_id(self) -> int:
        return self.llm.config.eos_token_ids[0]

    @property
    def prefix_token_id(self) -> int:
        """Before a text that has nothing before it."""
        bos = self.llm.config.bos_token_id
        return self.eot_token_id if bos is None else bos

    @property
    def tokenizer_name(self) -> str:
        return str(self.llm.folder)

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """With a BOS where the tokenizer puts one, unless told otherwise, or the text has one already."""
        ids = self.tokenizer.encode(string, add_special_tokens=add_special_tokens is not False)
        bos = self.llm.config.bos_token_id
        return ids[1:] if add_special_tokens is None and ids[:2] == [bos, bos] else ids

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """A conversation as the model's template writes it."""
        text = self.tokenizer.apply_chat_template(
            chat_history, tokenize=False, add_generation_prompt=add_generation_prompt
        )
        return str(text)

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], disable_tqdm: bool = False
    ) -> list[tuple[float, bool]]:
        """(ln p, whether greedy) of each continuation; a context too long loses its beginning."""
        prompts = [(context + continuation)[-(self.max_length + 1) :] for _, context, continuation in requests]
        scored: list[tuple[float, bool]] = []
        outputs = self._generate(prompts, [SCORE] * len(prompts))
        for output, (_, _, continuation) in zip(outputs, requests, strict=True):
            ids = output.prompt_token_ids[1:][-len(continuation) :]
            logprobs = output.prompt_logprobs[-len(continuation) :]
            greedy = all(one.top[0][0] == token for token, one in zip(ids, logprobs, strict=True))
            scored.append((sum(one.logprob for one in logprobs), greedy))
        return scored

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """ln p of each text: all that the tokenizer makes of it, a BOS too, as in lm-eval's adapter of transformers."""
        windows: list[tuple[Any, list[int], list[int]]] = []
        owners: list[int] = []
        for number, request in enumerate(requests):
            ids = self.tok_encode(request.args[0])
            for window in get_rolling_token_windows(ids, self.prefix_token_id, self.max_length, 1):
                windows.append((None, *make_disjoint_window(window)))
                owners.append(number)
        sums = [0.0] * len(requests)
        for owner, (logprob, _) in zip(owners, self._loglikelihood_tokens(windows), strict=True):
            sums[owner] += logprob
        return sums

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """The completions, without the stop text."""
        params = [_sampling(request.args[1]) for request in requests]
        prompts = [
            self.tok_encode(request.args[0])[-(self.llm.max_model_len - (own.max_tokens or 1)) :]
            for request, own in zip(requests, params, strict=True)
        ]
        return [output.completions[0].text for output in self._generate(prompts, params)]

    def _generate(self, prompts: Sequence[Prompt], params: Sequence[SamplingParams]) -> Iterable[RequestOutput]:
        outputs = self.llm.generate(prompts, params)
        for output in outputs:
            if output.error is not None:
                raise output.error
        return outputs


def _sampling(asked: dict[str, Any]) -> SamplingParams:
    """A task's ``generation_kwargs``, which have transformers' names."""
    until = asked.get("until") or ()
    temperature = float(asked.get("temperature") or 0.0)
    return SamplingParams(
        max_tokens=int(asked.get("max_gen_toks") or asked.get("max_new_tokens") or MAX_GENERATED),
        temperature=temperature if asked.get("do_sample", temperature > 0) else 0.0,
        top_p=float(asked.get("top_p") or 1.0),
        top_k=int(asked.get("top_k") or 0),
        stop=tuple(text for text in ((until,) if isinstance(until, str) else until) if text),
        seed=0,
    )
