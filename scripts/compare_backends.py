"""Quality, time and memory of llmq's own quantizer and of every installed backend, from the same calibration tokens.

    llmq backends install gptqmodel
    python scripts/compare_backends.py demo
    python scripts/compare_backends.py MODEL --data held-out.txt --calib-samples 32

Each pair is quantized to 4 bits in groups of 128 by the same method into the same format, and scored on held-out
windows: perplexity, and the mean KL from the original's predictions. The last column is the native mean KL over the
backend's, with its interval by ``llmq.evals.bootstrap``.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

import torch

from llmq.checkpoint.folder import DEMO, resolve
from llmq.checkpoint.tokenizer import load_tokenizer
from llmq.evals.bootstrap import Interval, interval
from llmq.evals.divergence import predict, window_divergences
from llmq.evals.held_out import held_out
from llmq.evals.perplexity import WINDOW, cut
from llmq.memory import format_bytes
from llmq.quant.backends import BACKENDS, BITSANDBYTES, NATIVE
from llmq.quant.backends.environment import is_installed

W4 = ("--scheme", "w4a16")
GPTQ, AWQ = (*W4, "--sym", "--method", "gptq"), (*W4, "--asym", "--method", "awq")
RUNS = (
    ("auto-gptq", GPTQ, "gptq"),
    ("gptqmodel", GPTQ, "gptq"),
    ("llm-compressor", GPTQ, "compressed-tensors"),
    ("autoawq", AWQ, "awq"),
    ("llm-compressor", AWQ, "compressed-tensors"),
    (BITSANDBYTES, ("--scheme", "nf4"), "bitsandbytes"),
)
"""Backend, settings and format. One native run serves all backends with the same settings."""


@dataclass(frozen=True, slots=True)
class Score:
    """What a quantizer made: mean loss and mean divergence of each window, and what making it took."""

    losses: list[float]
    divergences: list[float]
    seconds: float
    peak_memory: int


def ratio_interval(ours: Sequence[float], theirs: Sequence[float]) -> Interval:
    """Of Σ ours / Σ theirs, both over the same windows."""
    own, other = torch.tensor(ours), torch.tensor(theirs)
    return interval(lambda drawn: own[drawn].sum() / other[drawn].sum(), len(own))


def row(backend: str, settings: Sequence[str], score: Score, native: Score | None) -> str:
    """A line of the table."""
    ratio = ""
    if native is not None:
        low, high = ratio_interval(native.divergences, score.divergences)
        ratio = f"{sum(native.divergences) / sum(score.divergences):.3f} ({low:.3f}–{high:.3f})"
    figures = f"{math.exp(fmean(score.losses)):.3f} | {fmean(score.divergences):.4f} | {score.seconds:.0f} s"
    return f"| {' '.join(settings)} | {backend} | {figures} | {format_bytes(score.peak_memory)} | {ratio} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default=DEMO)
    parser.add_argument("--data", help="held-out text")
    parser.add_argument("--windows", type=int, help="score fewer than all")
    parser.add_argument("--calib-samples", type=int, default=128)
    parser.add_argument("--calib-seqlen", type=int, default=512, help="AutoAWQ leaves out windows that are longer")
    parser.add_argument("--device", default="cpu", help="to quantize on")
    parser.add_argument("--only", nargs="+", default=[], metavar="BACKEND")
    arguments = parser.parse_args()
    folder = resolve(arguments.model)
    token_ids = load_tokenizer(folder).encode(held_out(arguments.data).text)
    windows = [list(window) for window in cut(token_ids, WINDOW)][: arguments.windows]
    original = predict(folder, windows)

    def score(backend: str, settings: Sequence[str]) -> Score:
        with tempfile.TemporaryDirectory() as scratch:
            output = Path(scratch) / "quantized"
            command = [sys.executable, "-m", "llmq", "quantize", arguments.model, "-o", str(output), "--json"]
            command += ["--backend", backend, *settings, "--calib-samples", str(arguments.calib_samples)]
            command += ["--calib-seqlen", str(arguments.calib_seqlen), "--device", arguments.device]
            # A process of its own: the most memory that one has had is never less than what it had before.
            report = json.loads(subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout)
            found = predict(output, windows)
        divergences = window_divergences(original, found)
        return Score(found.losses, divergences, report["seconds"], report["peak_memory_bytes"])

    print(f"{arguments.model}, {len(windows) * (WINDOW - 1):,} held-out tokens\n")
    print("| settings | backend | perplexity | mean KL | time | peak memory | native / backend |")
    print("|---|---|---|---|---|---|---|")
    natives: dict[tuple[str, ...], Score] = {}
    for backend, settings, format in RUNS:
        if arguments.only and backend not in arguments.only:
            continue
        if backend in BACKENDS and not is_installed(BACKENDS[backend]):
            continue
        native = None
        if backend != BITSANDBYTES:
            if settings not in natives:
                natives[settings] = score(NATIVE, settings)
                print(row(NATIVE, settings, natives[settings], None), flush=True)
            native = natives[settings]
        print(row(backend, settings, score(backend, (*settings, "--format", format)), native), flush=True)


if __name__ == "__main__":
    main()
