"""Is our quantizer as good as another's, from the same calibration tokens? Both folders of demo, scored by our reader.

    python scripts/compare_quality.py --write-tokens tokens.json
    PEER/bin/python scripts/quantize_by_peer.py gptqmodel src/llmq/demo/model tokens.json theirs
    llmq quantize demo -o ours
    python scripts/compare_quality.py ours theirs

The measure is the mean KL from the original's predictions on held-out windows, ours over theirs; its interval is that
of a paired bootstrap over the windows, 95 %.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean

import torch
from bench_quality import held_out_windows

from llmq.checkpoint.config import read_config
from llmq.checkpoint.folder import DEMO, resolve
from llmq.evals.divergence import predict, window_divergences
from llmq.quant.calibration import draw_windows
from llmq.quant.options import DEFAULTS, Calibration

RESAMPLES = 10_000


def ratio_interval(ours: Sequence[float], theirs: Sequence[float]) -> tuple[float, float]:
    """The middle 95 % of Σ ours / Σ theirs over windows drawn again, with replacement, for both alike."""
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randint(len(ours), (RESAMPLES, len(ours)), generator=generator)
    ratios = torch.tensor(ours)[drawn].sum(1) / torch.tensor(theirs)[drawn].sum(1)
    low, high = ratios.quantile(torch.tensor([0.025, 0.975])).tolist()
    return low, high


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="*", type=Path, metavar="OURS THEIRS")
    parser.add_argument("--write-tokens", type=Path, metavar="FILE", help="the windows that llmq calibrates on")
    parser.add_argument("--calib-samples", type=int, default=DEFAULTS.calibration.samples)
    parser.add_argument("--calib-seqlen", type=int, default=DEFAULTS.calibration.seqlen)
    parser.add_argument("--windows", type=int, help="score fewer than all")
    arguments = parser.parse_args()
    demo = resolve(DEMO)
    if arguments.write_tokens:
        calibration = Calibration(samples=arguments.calib_samples, seqlen=arguments.calib_seqlen)
        tokens = draw_windows(demo, read_config(demo), calibration)
        arguments.write_tokens.write_text(json.dumps(tokens.tolist()))
        return
    if len(arguments.folders) != 2:
        parser.error("two folders are to be compared")
    windows = held_out_windows(arguments.windows)
    original = predict(demo, windows)
    divergences = []
    for folder in arguments.folders:
        found = predict(folder, windows)
        divergences.append(window_divergences(original, found))
        print(f"{folder}: mean KL {fmean(divergences[-1]):.5f}, perplexity {math.exp(fmean(found.losses)):.4f}")
    ours, theirs = divergences
    low, high = ratio_interval(ours, theirs)
    print(f"ours / theirs: {fmean(ours) / fmean(theirs):.3f} ({low:.3f} to {high:.3f}) over {len(windows)} windows")


if __name__ == "__main__":
    main()
