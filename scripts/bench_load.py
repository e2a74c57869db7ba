"""How long an 8B shape of random weights takes from its files to a GPU: by llmq, and by safetensors, file by file.

    python scripts/bench_load.py
    python scripts/bench_load.py --layers 8 --rounds 5

The folder is written first, so that its files are in the page cache; both read it in turns.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from bench_quantize import LAYERS, write_model
from safetensors.torch import load_file

from llmq.checkpoint.tensors import Tensors
from llmq.runtime.loader import load_decoder, open_source


def ours(folder: Path) -> object:
    return load_decoder(open_source(folder, "cuda", torch.bfloat16))


def theirs(folder: Path) -> object:
    return [load_file(file, device="cuda") for file in sorted(folder.glob("*.safetensors"))]


def seconds(load: Callable[[Path], object], folder: Path) -> float:
    started = time.perf_counter()
    loaded = load(folder)
    torch.cuda.synchronize()
    spent = time.perf_counter() - started
    del loaded
    torch.cuda.empty_cache()
    return spent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=LAYERS)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("this measures a GPU, and there is none")
    with tempfile.TemporaryDirectory() as path:
        folder = Path(path)
        write_model(folder, arguments.layers)
        size = Tensors(folder).num_bytes
        turns = [(seconds(ours, folder), seconds(theirs, folder)) for _ in range(arguments.rounds)]
    print(f"{torch.cuda.get_device_name()}, {size / 1e9:.1f} GB\n\n| | s | GB/s |\n|---|---|---|")
    for name, spent in zip(("llmq", "safetensors"), zip(*turns, strict=True), strict=True):
        each = ", ".join(f"{one:.2f}" for one in spent)
        print(f"| {name} | {each} | {size / statistics.median(spent) / 1e9:.1f} |")


if __name__ == "__main__":
    main()
