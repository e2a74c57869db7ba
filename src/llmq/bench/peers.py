"""Other engines that run the same requests beside ours: transformers, vLLM, or whatever serves OpenAI's interface.

transformers   ``generate`` on static batches of as many sequences as ours may run at once, prompts padded on the left,
               each batch as long as its longest answer; only the tokens that were asked for count
vllm           its ``LLM``, in this process, with the share of the GPU's memory that ours has
URL            a server, given all requests at once
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, Protocol

import torch

from llmq.bench.comparison import Comparison, Figures, figures
from llmq.bench.endpoint import connect
from llmq.bench.environment import installed
from llmq.bench.http import is_url
from llmq.bench.load import Load, run_load
from llmq.bench.metrics import Metrics
from llmq.bench.workload import Item, warm_up
from llmq.errors import USAGE, LlmqError

if TYPE_CHECKING:
    from llmq.bench.engine import Subject

PACKAGES = ("transformers", "vllm")
REFUSALS = (ImportError, OSError, ValueError, RuntimeError)
"""What they raise where a model is unknown to them, or too large for what is left of the GPU."""


class Peer(Protocol):
    """Another engine. ``version`` is None where it does not say."""

    name: str
    version: str | None

    def run(self, items: Sequence[Item]) -> Figures:
        """The figures of all ``items``, there at the start. LlmqError when one fails."""
        ...


class Transformers:
    """transformers' ``generate``, with the weights and the type that ours has."""

    name = "transformers"

    def __init__(self, subject: Subject) -> None:
        from transformers import AutoConfig, AutoModelForCausalLM

        llm = subject.llm
        self.version = installed("transformers")
        self._batch_size, self._device = llm.options.seats, llm.device
        try:
            if llm.options.load_format == "dummy":
                with torch.device(llm.device):
                    config = AutoConfig.from_pretrained(llm.folder)
                    self._model: Any = AutoModelForCausalLM.from_config(config, dtype=llm.dtype)
            else:
                self._model = AutoModelForCausalLM.from_pretrained(llm.folder, dtype=llm.dtype).to(llm.device)
        except REFUSALS as error:
            raise _refusal(self.name, error) from None
        self._model.eval()

    def run(self, items: Sequence[Item]) -> Figures:
        started = time.perf_counter()
        try:
            for start in range(0, len(items), self._batch_size):
                self._generate(items[start : start + self._batch_size])
        except torch.OutOfMemoryError as error:
            raise _refusal(self.name, error) from None
        duration = time.perf_counter() - started
        return {"output_throughput": sum(item.output_len for item in items) / duration}

    @torch.inference_mode()
    def _generate(self, batch: Sequence[Item]) -> None:
        longest = max(len(item.prompt) for item in batch)
        ids = torch.zeros(len(batch), longest, dtype=torch.long)
        mask = torch.zeros_like(ids)
        for row, item in enumerate(batch):
            ids[row, longest - len(item.prompt) :] = torch.tensor(item.prompt)
            mask[row, longest - len(item.prompt) :] = 1
        new = max(item.output_len for item in batch)
        found = self._model.generate(
            ids.to(self._device),
            attention_mask=mask.to(self._device),
            do_sample=False,
            min_new_tokens=new,
            max_new_tokens=new,
            pad_token_id=0,
        )
        assert found.shape == (len(batch), longest + new)


class Vllm:
    """vLLM's offline engine."""

    name = "vllm"

    def __init__(self, subject: Subject) -> None:
        vllm: Any = import_module("vllm")
        self.version = installed("vllm")
        self._params = vllm.SamplingParams
        options = subject.llm.options
        try:
            self._llm = vllm.LLM(
                str(subject.llm.folder),
                dtype=str(subject.llm.dtype).removeprefix("torch."),
                load_format=options.load_format,
                skip_tokenizer_init=True,
                max_model_len=subject.llm.max_model_len,
                max_num_seqs=options.max_num_seqs,
                gpu_memory_utilization=options.gpu_memory_utilization,
            )
        except REFUSALS as error:
            raise _refusal(self.name, error) from None

    def run(self, items: Sequence[Item]) -> Figures:
        prompts = [{"prompt_token_ids": item.prompt} for item in items]
        params = [
            self._params(max_tokens=item.output_len, temperature=0.0, ignore_eos=True, detokenize=False)
            for item in items
        ]
        started = time.perf_counter()
        outputs = self._llm.generate(prompts, params, use_tqdm=False)
        duration = time.perf_counter() - started
        return {"output_throughput": sum(len(output.outputs[0].token_ids) for output in outputs) / duration}


class Server:
    """A server, with all requests at once."""

    version: str | None = None

    def __init__(self, url: str, seed: int) -> None:
        self.name = url
        self._seed = seed
        self._endpoint = asyncio.run(connect(url))

    def run(self, items: Sequence[Item]) -> Figures:
        lengths = [len(item.prompt) for item in items]
        outcome = asyncio.run(run_load(self._endpoint, items, Load(), seed=self._seed, lengths=lengths))
        if outcome.failed:
            raise LlmqError(f"{outcome.failed} of {len(items)} requests failed at {self.name}: {outcome.errors[0]}")
        return figures(outcome.metrics())


def _refusal(peer: str, error: Exception) -> LlmqError:
    reason = str(error).strip().splitlines() or [type(error).__name__]
    return LlmqError(
        f"{peer} cannot run the model: {reason[0]}",
        "leave it half of the GPU: --gpu-memory-utilization 0.45; or serve with it elsewhere, and pass --peer URL",
    )


def check_peer(peer: str) -> None:
    """LlmqError when there is no such engine, it is not installed, or a server does not answer."""
    if is_url(peer):
        asyncio.run(connect(peer))
        return
    if peer not in PACKAGES:
        raise LlmqError(
            f"there is no peer {peer!r}", f"name {', '.join(PACKAGES)} or the URL of a server", exit_code=USAGE
        )
    if find_spec(peer) is None:
        raise LlmqError(
            f"{peer} is not installed here", f"pip install {peer}, or serve with it elsewhere and pass --peer URL"
        )


def open_peer(peer: str, subject: Subject, seed: int) -> Peer:
    """The engine called ``peer``, ready to run what ``subject`` runs."""
    if is_url(peer):
        return Server(peer, seed)
    return Transformers(subject) if peer == "transformers" else Vllm(subject)


def compare(subject: Subject, peer: Peer, rounds: Sequence[Sequence[Item]], seed: int) -> Comparison:
    """Run each of ``rounds`` by both, one after the other. Theirs is warmed up with other prompts of the same shapes;
    ours is warm. LlmqError when a request fails."""
    peer.run(warm_up(rounds[0], subject.vocabulary, seed))
    ours, theirs = [], []
    for items in rounds:
        run = subject.run(items)
        if run.errors:
            raise LlmqError(f"{run.metrics.failed} of {len(items)} requests failed: {run.errors[0]}")
        ours.append(run.metrics)
        theirs.append(peer.run(items))
    return beside(peer, ours, theirs)


def beside(peer: Peer, ours: Sequence[Metrics], theirs: Sequence[Figures]) -> Comparison:
    """Rounds of ours, and of ``peer`` on the same requests."""
    pairs = zip(map(figures, ours), theirs, strict=True)
    return Comparison(peer.name, peer.version, tuple(pairs))
