"""What ``bench compare`` sets side by side, and on which requests. No torch."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from llmq.bench.workload import Workload
from llmq.errors import USAGE, LlmqError, either

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


def workload_of(name: str, num_prompts: int, seed: int) -> Workload:
    """One of WORKLOADS, or a .jsonl file of prompts. LlmqError when it is neither."""
    if name in WORKLOADS:
        return replace(WORKLOADS[name], num_prompts=num_prompts, seed=seed)
    if Path(name).suffix == ".jsonl":
        return Workload(dataset="jsonl", path=Path(name), num_prompts=num_prompts, seed=seed)
    raise LlmqError(f"there is no workload {name!r}", f"choose {either(WORKLOADS)}, or a .jsonl file", exit_code=USAGE)
