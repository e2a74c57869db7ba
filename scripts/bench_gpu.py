"""Speed of the engine on one GPU, on dummy weights, beside vLLM's on an H200 and what the hardware allows.

decode    tokens/s of 128 steps behind prompts of 1,024 tokens, at 1, 8, 32 and 128 sequences
prefill   tokens/s of 128 prompts of 1,024 tokens
workload  output tokens/s of nano-vllm's bench.py: 256 random prompts of 100 to 1,024 tokens, 100 to 1,024 tokens each
          behind them, temperature 0.6, end of text ignored, seed 0; the second run
kv        by type of the KV cache: the tokens that it has room for in KV_MEMORY, and decode at KV_LOADS
profile   where the time of one decode step goes, at 1 and 128 sequences
pressure  256 requests in a pool for 20 of them, by swap and by recompute, beside all at once: seconds, and whether the
          tokens are the same, as --deterministic has them

    python scripts/bench_gpu.py --shape qwen3-0.6b --only decode workload --json bench.json
"""

from __future__ import annotations

import argparse
import gc
import json
import random
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from llmq import LLM, SamplingParams
from llmq.bench.kernels import median_seconds
from llmq.checkpoint.config import ModelConfig
from llmq.engine.options import KV_CACHE_DTYPES, EngineOptions
from llmq.memory import block_linear_bytes, kv_bytes_per_token
from llmq.runtime.experts import GroupedExperts
from llmq.runtime.linear import resident_bytes

SHAPES: dict[str, dict[str, Any]] = {
    "llama-3.1-8b": {
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
        "rope_theta": 500000.0,
        "torch_dtype": "bfloat16",
    },
    "qwen3-0.6b": {
        "architectures": ["Qwen3ForCausalLM"],
        "hidden_size": 1024,
        "intermediate_size": 3072,
        "num_hidden_layers": 28,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "vocab_size": 151936,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1000000.0,
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
    },
    "qwen3-30b-a3b": {
        "architectures": ["Qwen3MoeForCausalLM"],
        "hidden_size": 2048,
        "intermediate_size": 6144,
        "moe_intermediate_size": 768,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "norm_topk_prob": True,
        "num_hidden_layers": 48,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "head_dim": 128,
        "vocab_size": 151936,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1000000.0,
        "torch_dtype": "bfloat16",
    },
}


def compressed(kind: str) -> dict[str, Any]:
    """compressed-tensors' description of 8-bit weights by channel and activations by token."""
    weights = {"num_bits": 8, "type": kind, "strategy": "channel", "symmetric": True, "dynamic": False}
    inputs = {"num_bits": 8, "type": kind, "strategy": "token", "symmetric": True, "dynamic": True}
    return {
        "quant_method": "compressed-tensors",
        "format": f"{kind}-quantized",
        "ignore": ["lm_head"],
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights, "input_activations": inputs}},
    }


SCHEMES: dict[str, dict[str, Any] | None] = {
    "bf16": None,
    "int4": {"quant_method": "gptq", "bits": 4, "group_size": 128, "sym": True, "desc_act": False},
    "w8a8": compressed("int"),
    "fp8": compressed("float"),
}
BATCHES = (1, 8, 32, 128)
PROMPT, STEPS = 1024, 128
LENGTHS = (100, 1024)
KV_MEMORY = 32 * 2**30
KV_LOADS = ((128, 1024), (8, 16384), (1, 65536))
"""Sequences, and tokens of the prompt of each."""

# (shape, scheme) → decode at BATCHES, prefill, workload: vLLM 0.26's tokens/s on an H200, and what is asked of llmq.
VLLM = {
    ("llama-3.1-8b", "bf16"): (205, 1532, 5063, 12124, 43602, 9808),
    ("llama-3.1-8b", "int4"): (264, 1934, 5906, 12016, 40170, 9406),
    ("llama-3.1-8b", "w8a8"): (266, 1982, 6460, 14101, 81878, 12345),
    ("llama-3.1-8b", "fp8"): (281, 2085, 5941, 14224, 77758, 12270),
    ("qwen3-0.6b", "bf16"): (607, 4505, 12293, 22283, 437677, 22780),
}
ASKED = {
    ("llama-3.1-8b", "bf16"): (230, 1720, 5700, 12800, 45000, 10800),
    ("llama-3.1-8b", "int4"): (500, 3500, 8500, 12500, 44000, 10800),
    ("llama-3.1-8b", "w8a8"): (380, 2750, 8000, 15000, 70000, 13000),
    ("llama-3.1-8b", "fp8"): (380, 2750, 8000, 15000, 78000, 13200),
    ("qwen3-0.6b", "bf16"): (1000, 7000, 17000, 24000, 440000, 25000),
}
NAMES = (*(f"decode {batch}" for batch in BATCHES), "prefill", "workload")


class Roofline:
    """What the card can do: bytes/s of a copy, reads and writes counted, and operations/s of a product."""

    def __init__(self) -> None:
        big = torch.empty(2**31, dtype=torch.uint8, device="cuda").random_()
        self.bandwidth = 2 * big.numel() / median_seconds(lambda: big.clone(), "cuda")
        a, b = torch.randn(2, 8192, 8192, dtype=torch.bfloat16, device="cuda")
        self.rates = {16: 2 * 8192**3 / median_seconds(lambda: a @ b, "cuda")}
        ints = torch.randint(-127, 127, (2, 8192, 8192), dtype=torch.int8, device="cuda")
        self.rates[8] = 2 * 8192**3 / median_seconds(lambda: torch._int_mm(ints[0], ints[1].t()), "cuda")

    def decode(self, llm: LLM, batch: int, tokens: float) -> float:
        """Tokens/s of ``batch`` sequences of ``tokens`` tokens, if the device only read what it must, or only
        multiplied."""
        config = llm.config
        itemsize = llm.dtype.itemsize
        read = resident_bytes(llm.decoder) - idle_expert_bytes(llm, batch)
        read += batch * tokens * kv_bytes_per_token(config, llm.kv_dtype)
        if not config.tied_embeddings:
            read -= config.vocab_size * config.hidden_size * itemsize  # of the embedding only a row each is read
        return float(batch / max(read / self.bandwidth, batch * self._operations(config) / self.rates[16]))

    def prefill(self, llm: LLM, bits: int) -> float:
        return float(self.rates[bits] / self._operations(llm.config, head=False))

    @staticmethod
    def _operations(config: ModelConfig, *, head: bool = True) -> float:
        weights: float = config.num_layers * block_linear_bytes(config, None, 1)
        if config.experts is not None:
            own = 3 * config.hidden_size * config.experts.intermediate_size
            weights -= config.num_layers * own * (config.experts.count - config.experts.per_token)
        return 2.0 * (weights + (config.vocab_size * config.hidden_size if head else 0))


def idle_expert_bytes(llm: LLM, batch: int) -> float:
    """Of experts that no token of a batch is sent to, if each is as likely as any other."""
    experts = llm.config.experts
    if experts is None:
        return 0.0
    idle = (1 - experts.per_token / experts.count) ** batch
    return idle * sum(resident_bytes(each) for each in llm.decoder.modules() if isinstance(each, GroupedExperts))


def load(shape: str, scheme: str, fields: dict[str, Any] | None = None, **options: Any) -> LLM:
    """A model of dummy weights, and on stderr, how long it took."""
    gc.collect()  # the model before, which holds most of the card
    torch.cuda.empty_cache()
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        quantization = {"quantization_config": SCHEMES[scheme]} if SCHEMES[scheme] else {}
        (Path(folder) / "config.json").write_text(json.dumps(SHAPES[shape] | quantization | (fields or {})))
        llm = LLM(
            folder,
            device="cuda",
            options=EngineOptions(
                load_format="dummy",
                prefix_caching=False,
                max_num_seqs=256,
                **options,
            ),
        )
    llm.generate([[1, 2, 3]], SamplingParams(max_tokens=4, temperature=0, ignore_eos=True))
    torch.cuda.synchronize()
    print(f"{shape} {scheme}: ready, first tokens drawn, after {time.perf_counter() - started:.1f} s", file=sys.stderr)
    return llm


def prompts(llm: LLM, number: int, length: int) -> list[list[int]]:
    noise = random.Random(f"{number} {length}")
    return [noise.choices(range(10_000), k=length) for _ in range(number)]


def greedy(tokens: int) -> SamplingParams:
    return SamplingParams(max_tokens=tokens, temperature=0, ignore_eos=True)


def decode(llm: LLM, batch: int) -> float:
    """Tokens/s over STEPS steps, the last of which all sequences share."""
    # Under chunked prefill the first prompts have a few tokens when the last one is done.
    extra = -(-batch * PROMPT // llm.options.batched_tokens) + 2
    outputs = llm.generate(prompts(llm, batch, PROMPT), greedy(STEPS + extra))
    times = [output.completions[0].token_times for output in outputs]
    first = max(own[0] for own in times)
    steps = sorted({at for own in times for at in own if at >= first})
    return batch * STEPS / (steps[STEPS] - steps[0])


def kv(shape: str, scheme: str, roofline: Roofline) -> None:
    """Print one line for each type of the KV cache and each load: tokens in the same memory, and tokens/s over the
    last STEPS steps."""
    print(f"\n| {shape} {scheme}, KV cache | tokens in {KV_MEMORY >> 30} GiB | sequences × prompt | tokens/s "
          "| of the roofline |\n|---|---|---|---|---|")  # fmt: skip
    context = {"max_position_embeddings": max(prompt for _, prompt in KV_LOADS) + 2 * STEPS}
    for kv_cache_dtype in KV_CACHE_DTYPES:
        llm = load(shape, scheme, context, kv_cache_dtype=kv_cache_dtype, kv_cache_memory=KV_MEMORY)
        room = llm.stats.total_blocks * llm.options.block_size
        for batch, prompt in KV_LOADS:
            extra = -(-batch * prompt // llm.options.batched_tokens) + 16
            outputs = llm.generate(prompts(llm, batch, prompt), greedy(STEPS + extra))
            times = min((output.completions[0].token_times for output in outputs), key=min)
            speed = batch * STEPS / (times[-1] - times[-1 - STEPS])
            share = speed / roofline.decode(llm, batch, prompt + STEPS)
            print(f"| {kv_cache_dtype} | {room:,} | {batch} × {prompt:,} | {speed:,.0f} | {share:.0%} |", flush=True)
        del llm


def prefill(llm: LLM) -> float:
    asked = prompts(llm, BATCHES[-1], PROMPT)
    started = time.perf_counter()
    llm.generate(asked, greedy(1))
    return BATCHES[-1] * PROMPT / (time.perf_counter() - started)


def workload(llm: LLM) -> float:
    """nano-vllm's bench.py, draw by draw."""
    noise = random.Random(0)
    asked = [[noise.randint(0, 10_000) for _ in range(noise.randint(*LENGTHS))] for _ in range(256)]
    params = [SamplingParams(temperature=0.6, ignore_eos=True, max_tokens=noise.randint(*LENGTHS)) for _ in asked]
    started = time.perf_counter()
    outputs = llm.generate(asked, params)
    duration = time.perf_counter() - started
    return sum(len(output.completions[0].token_ids) for output in outputs) / duration


def pressure(shape: str, scheme: str) -> dict[str, float]:
    """Seconds of the second run of each; the tokens of all are to be the same."""
    noise = random.Random(0)
    asked = [[noise.randint(0, 10_000) for _ in range(noise.randint(100, 300))] for _ in range(256)]
    params = [SamplingParams(temperature=0.6, ignore_eos=True, max_tokens=noise.randint(100, 300)) for _ in asked]
    spent: dict[str, float] = {}
    bytes_of_20 = 0
    first: list[list[int]] = []
    for preemption in ("none", "swap", "recompute"):
        options: dict[str, Any] = {"deterministic": True, "watermark": 0.0}
        if preemption != "none":
            options |= {"preemption": preemption, "swap_space": 2**34, "kv_cache_memory": bytes_of_20}
        llm = load(shape, scheme, **options)
        bytes_of_20 = 20 * (-(-400 // llm.options.block_size)) * llm.limits.block_bytes
        for _ in range(2):  # the first also captures graphs
            llm.reset_stats()
            started = time.perf_counter()
            tokens = [output.completions[0].token_ids for output in llm.generate(asked, params)]
            spent[preemption] = time.perf_counter() - started
            first = first or tokens
            same = "the same tokens" if tokens == first else "OTHER TOKENS"
            times = f"{spent[preemption]:.2f} s, {llm.stats.preemptions} preemptions"
            print(f"{shape} {scheme}, preemption {preemption}: {times}, {same}", flush=True)
        del llm
    return spent


def measure(
    shape: str, scheme: str, parts: list[str], roofline: Roofline, *, deterministic: bool = False
) -> dict[str, Any]:
    """The row of ``shape`` and ``scheme``: name → tokens/s, and its share of the roofline."""
    found: dict[str, Any] = {}
    if "pressure" in parts:
        found["pressure"] = pressure(shape, scheme)
    if "kv" in parts:
        kv(shape, scheme, roofline)
    if not set(parts) - {"pressure", "kv"}:
        return found
    llm = load(shape, scheme, deterministic=deterministic)
    if "decode" in parts:
        for batch in BATCHES:
            decode(llm, batch)
            speed = statistics.median(decode(llm, batch) for _ in range(3 if batch < 128 else 2))
            found[f"decode {batch}"] = {"tokens_per_s": speed, "roofline": roofline.decode(llm, batch, PROMPT + 64)}
    if "prefill" in parts:
        prefill(llm)
        bits = 8 if scheme in ("w8a8", "fp8") else 16
        found["prefill"] = {"tokens_per_s": prefill(llm), "roofline": roofline.prefill(llm, bits)}
    if "workload" in parts:
        found["workload"] = {"first run": workload(llm), "tokens_per_s": workload(llm), "roofline": None}
    if "profile" in parts:
        for batch in (BATCHES[0], BATCHES[-1]):
            profile(llm, batch, shape, scheme)
    return found


def profile(llm: LLM, batch: int, shape: str, scheme: str) -> None:
    """Print where the time of a step of prompts goes, and of a decode step."""
    steps = 10
    for index, prompt in enumerate(prompts(llm, batch, PROMPT)):
        llm._submit(index, prompt, greedy(100), index)

    def advance(number: int) -> float:
        torch.cuda.synchronize()
        started = time.perf_counter()
        for _ in range(number):
            list(llm._step(streaming=False))
        torch.cuda.synchronize()
        return (time.perf_counter() - started) / number

    def traced(number: int, name: str) -> None:
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as trace:
            advance(number)
        kernels = [event for event in trace.key_averages() if event.self_device_time_total]
        busy = sum(event.self_device_time_total for event in kernels) / number
        print(f"\n{shape} {scheme}, {batch} sequences, {name}: kernels {busy:.0f} µs a step")
        print("| kernel | a step | µs each | µs a step | share |\n|---|---|---|---|---|")
        for event in sorted(kernels, key=lambda event: -event.self_device_time_total)[:20]:
            total = event.self_device_time_total
            print(
                f"| {event.key[:70]} | {event.count / number:.1f} | {total / event.count:.2f} | {total / number:.0f} "
                f"| {total / number / busy:.1%} |"
            )

    if batch == BATCHES[-1]:
        advance(2)
        traced(4, "prompts")
    advance(-(-batch * PROMPT // llm.options.batched_tokens) + 8)
    wall = advance(steps)
    traced(steps, "decode")
    print(f"wall {wall * 1e6:.0f} µs a step")
    host(llm, steps)
    for index in range(batch):
        llm.abort(index)
    while llm._live:
        list(llm._step(streaming=False))
    llm._flights.clear()
    llm._scheduler.forget_flights()


def host(llm: LLM, steps: int) -> None:
    """Print what the host does in a step, in µs."""
    spent: dict[str, float] = defaultdict(float)

    def timed(owner: object, name: str) -> Callable[..., Any]:
        inner: Callable[..., Any] = getattr(owner, name)

        def outer(*arguments: Any, **options: Any) -> Any:
            started = time.perf_counter()
            try:
                return inner(*arguments, **options)
            finally:
                spent[name] += time.perf_counter() - started

        setattr(owner, name, outer)
        return inner

    hooks = [(owner, name, timed(owner, name)) for owner, name in (
        (llm._scheduler, "presume"), (llm._scheduler, "schedule"), (llm._runner, "launch"), (llm._runner, "_run"),
        (llm._scheduler, "update"))]  # fmt: skip
    started = time.perf_counter()
    for _ in range(steps):
        list(llm._step(streaming=False))
    whole = time.perf_counter() - started
    for owner, name, inner in hooks:
        setattr(owner, name, inner)
    print("host, µs a step: " + ", ".join(f"{name} {1e6 * seconds / steps:.0f}" for name, seconds in spent.items())
          + f", the whole {1e6 * whole / steps:.0f}")  # fmt: skip


def table(results: dict[tuple[str, str], dict[str, Any]]) -> None:
    """Print one line a figure: ours, vLLM's, what is asked, and the share of the roofline."""
    print("\n| shape, scheme | | llmq | vLLM 0.26 | asked | of the roofline |\n|---|---|---|---|---|---|")
    for key, row in results.items():
        for index, name in enumerate(NAMES):
            if name in row:
                ours, roof = row[name]["tokens_per_s"], row[name]["roofline"]
                theirs, asked = (known[key][index] if key in known else 0 for known in (VLLM, ASKED))
                share = f"{ours / roof:.0%}" if roof else ""
                mark = "" if ours >= asked else " (missed)"
                print(f"| {' '.join(key)} | {name} | {ours:,.0f} | {theirs:,} | {asked:,}{mark} | {share} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", nargs="+", choices=SHAPES, default=["llama-3.1-8b", "qwen3-0.6b"])
    parser.add_argument("--scheme", nargs="+", choices=SCHEMES, default=["bf16"])
    parts = ["decode", "prefill", "workload", "kv", "profile"]
    parser.add_argument("--only", nargs="+", choices=[*parts, "pressure"], default=parts)
    parser.add_argument("--deterministic", action="store_true", help="run so, to see what it costs")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("this measures a GPU, and there is none")
    roofline = Roofline()
    print(f"{torch.cuda.get_device_name()}: copy {roofline.bandwidth / 1e12:.2f} TB/s, products of 8192³ "
          f"bf16 {roofline.rates[16] / 1e12:.0f}, int8 {roofline.rates[8] / 1e12:.0f} T operations/s")  # fmt: skip
    results = {}
    for shape in arguments.shape:
        for scheme in arguments.scheme:
            results[shape, scheme] = measure(
                shape, scheme, arguments.only, roofline, deterministic=arguments.deterministic
            )
            table({(shape, scheme): results[shape, scheme]})
            gc.collect()
            torch.cuda.empty_cache()
    table(results)
    if arguments.json:
        arguments.json.write_text(json.dumps({" ".join(key): row for key, row in results.items()}, indent=2))


if __name__ == "__main__":
    main()
