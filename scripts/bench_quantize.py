"""What quantizing takes of GPUs: seconds, memory, and where the time goes, on random weights of an 8B shape.

    python scripts/bench_quantize.py --methods gptq rtn awq --layers 8
    python scripts/bench_quantize.py --device cuda:0 --profile

A folder with so many decoder blocks is written first, and not timed. All blocks of a model cost the same, so that the
time of all 32 is that of the rest and 32 times the median block's. 128 windows of 2,048 random tokens calibrate. Memory
is that of the first GPU, beside what the run has said before that it would take.
"""

from __future__ import annotations

import argparse
import functools
import json
import shutil
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch

from llmq.checkpoint.config import read_config
from llmq.checkpoint.folder import DEMO, demo_folder
from llmq.checkpoint.shards import Place, Shards, lay_out
from llmq.memory import format_bytes
from llmq.quant import activations, blocks, pipeline, rounding
from llmq.quant.activations import HiddenStates
from llmq.quant.methods import autoround, awq, gptq
from llmq.quant.needs import Needs
from llmq.quant.options import Calibration
from llmq.quant.pipeline import Step, quantize
from llmq.runtime.device import cards_like

SHAPE: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "torch_dtype": "bfloat16",
}
LAYERS = 32
WINDOWS, TOKENS = 128, 2048
GOALS = {"gptq": 180, "awq": 300, "rtn": 45, "autoround": 600}
"""Seconds for the whole model."""
PHASES: dict[str, list[tuple[Any, str]]] = {
    "load": [(blocks, "load_layer"), (pipeline, "load_weight")],
    "forward": [(HiddenStates, name) for name in ("mix", "finish", "_output", "_mix")],
    "moments": [(activations, "moment")],
    "scales (AWQ)": [(awq, "fold")],
    "learning": [(autoround, "quantize_block")],
    "grids": [(gptq, "fit_grid")],
    "Cholesky": [(gptq, "_compensation")],
    "columns": [(gptq, "round_columns")],
    "GPTQ's other products": [(gptq, "quantize_weight")],
    "errors": [(rounding, "energy")],
    "pack and write": [(Shards, "fill")],
    "sync": [(Shards, "sync")],
    "check": [(pipeline, "check_runs")],
}


def write_model(folder: Path, layers: int) -> None:
    """A folder of ``layers`` decoder blocks."""
    (folder / "config.json").write_text(json.dumps(SHAPE | {"num_hidden_layers": layers}))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(demo_folder() / "model" / name, folder / name)
    config = read_config(folder)
    hidden, vocabulary = config.hidden_size, config.vocab_size
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocabulary, hidden)}
    for layer in range(layers):
        prefix = f"model.layers.{layer}"
        shapes |= {f"{prefix}.{name}.weight": shape for name, shape in config.linears.items()}
        shapes |= {f"{prefix}.{name}.weight": (hidden,) for name in ("input_layernorm", "post_attention_layernorm")}
    shapes |= {"model.norm.weight": (hidden,), "lm_head.weight": (vocabulary, hidden)}
    lay_out(folder, {name: Place("BF16", shape, 2 * torch.Size(shape).numel()) for name, shape in shapes.items()})
    with Shards(folder) as shards:
        for name, shape in shapes.items():
            made = torch.randn(shape, device="cuda").mul_(0.02) if len(shape) == 2 else torch.ones(shape)
            shards.fill([(name, made.bfloat16())])


@contextmanager
def phases() -> Iterator[dict[str, float]]:
    """Meanwhile the time of each phase is summed, without that of those within it. The device is waited for at every
    border, which costs a little."""
    spent: dict[str, float] = defaultdict(float)
    running = ["other"]
    since = [time.perf_counter()]

    def turn(phase: str | None) -> None:
        torch.cuda.synchronize()
        now = time.perf_counter()
        spent[running[-1]] += now - since[0]
        since[0] = now
        running.pop() if phase is None else running.append(phase)

    def timed(phase: str, inner: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(inner)
        def outer(*arguments: Any, **options: Any) -> Any:
            turn(phase)
            try:
                return inner(*arguments, **options)
            finally:
                turn(None)

        return outer

    with ExitStack() as undo:
        for phase, functions in PHASES.items():
            for owner, name in functions:
                inner = getattr(owner, name)
                undo.callback(setattr, owner, name, inner)
                setattr(owner, name, timed(phase, inner))
        yield spent
        turn(None)


def measure(model: Path, method: str, device: str, profile: bool) -> dict[str, Any]:
    """Seconds a block, of the rest and of the whole model; bytes of the device."""
    output, needs = model.with_name("out"), list[Needs]()
    parts: list[float] = []
    marks = [0.0]

    def progress(step: Step) -> None:
        if step.layer is None:
            torch.cuda.synchronize()
            parts.append(time.perf_counter() - marks[-1])
            marks.append(time.perf_counter())

    torch.cuda.empty_cache()
    with ExitStack() as stack:
        spent = stack.enter_context(phases()) if profile else {}
        started = time.perf_counter()
        marks[0] = started
        report = quantize(
            str(model), output, method=method, calibration=Calibration(DEMO), device=device, overwrite=True,
            on_needs=needs.append, progress=progress,
        )  # fmt: skip
        seconds = time.perf_counter() - started
    *blocks_seconds, _ = parts
    block = statistics.median(blocks_seconds)
    whole = seconds + (LAYERS - len(blocks_seconds)) * block
    found: dict[str, Any] = {
        "block": block,
        "first block": blocks_seconds[0],
        "rest": seconds - sum(blocks_seconds),
        "whole": whole,
        "devices": needs[0].devices,
        "device": report.peak_memory_bytes,
        "device, said before": needs[0].places[0].needed,
        "phases": dict(spent),
    }
    goal = GOALS[method]
    print(f"{method} on {', '.join(needs[0].devices)}: {block:.2f} s a block, {found['rest']:.1f} s for the rest, "
          f"{whole:.0f} s for {LAYERS} blocks (goal {goal}), {format_bytes(found['device'])} of the device, "
          f"{format_bytes(found['device, said before'])} said before, median error "
          f"{statistics.median(layer.error for layer in report.layers):.1e}")  # fmt: skip
    if spent:
        print(f"\n| {method}, {len(blocks_seconds)} blocks | seconds | share |\n|---|---|---|")
        for phase, value in sorted(spent.items(), key=lambda pair: -pair[1]):
            print(f"| {phase} | {value:.2f} | {value / seconds:.0%} |")
    sys.stdout.flush()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+", choices=GOALS, default=list(GOALS))
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--device", default="cuda", help="every GPU like the first, or cuda:NUMBER")
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("this measures a GPU, and there is none")
    if arguments.profile and len(cards_like(arguments.device)) > 1:
        sys.exit("a profile is of one GPU: --device cuda:0")
    generator = torch.Generator().manual_seed(0)
    windows = torch.randint(0, SHAPE["vocab_size"], (WINDOWS, TOKENS), generator=generator)
    setattr(pipeline, "draw_windows", lambda *_: windows)  # noqa: B010
    results = {}
    with tempfile.TemporaryDirectory() as place:
        model = Path(place) / "model"
        model.mkdir()
        started = time.perf_counter()
        write_model(model, arguments.layers)
        print(f"{arguments.layers} blocks written in {time.perf_counter() - started:.1f} s", flush=True)
        for method in arguments.methods:
            results[method] = measure(model, method, arguments.device, arguments.profile)
            if arguments.json:
                arguments.json.write_text(json.dumps(results, indent=2))


if __name__ == "__main__":
    main()
