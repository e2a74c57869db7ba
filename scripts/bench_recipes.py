"""What calibration texts and mixed bits are worth around 3 bits by GPTQ, on demo: the figures of the README.

    python scripts/bench_recipes.py --windows 8 --calib-samples 32

Bits are those of a quantized weight, with its share of scales; KL is the mean from the predictions of the model as it
was, on the first --windows held-out windows of 2,048 tokens.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Mapping
from pathlib import Path
from statistics import fmean

from bench_quality import held_out_windows

from llmq.checkpoint.folder import DEMO, resolve
from llmq.evals.divergence import predict, window_divergences
from llmq.quant.options import SELF, Calibration, Rule
from llmq.quant.pipeline import quantize
from llmq.quant.recipe import read_recipe
from llmq.scheme import Scheme

MIXED = "mixed-3-4-8"


def runs() -> Mapping[str, tuple[Scheme, dict[str, Scheme | None], str]]:
    """By what they are called: the scheme, the layers with another, and the calibration text."""
    rules = [Rule.parse(text) for text in read_recipe(MIXED).override or ()]
    mixed = {rule.pattern: rule.scheme for rule in rules}
    return {
        "int3 g128": (Scheme(3, 128), {}, DEMO),
        "int3 g128, on its own text": (Scheme(3, 128), {}, SELF),
        "int3 g64": (Scheme(3, 64), {}, DEMO),
        "int3 g32": (Scheme(3, 32), {}, DEMO),
        MIXED: (Scheme(3, 128), mixed, DEMO),
        f"{MIXED}, on its own text": (Scheme(3, 128), mixed, SELF),
        "int4 g128": (Scheme(4, 128), {}, DEMO),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--windows", type=int, help="score fewer than all")
    parser.add_argument("--calib-samples", type=int, default=128)
    arguments = parser.parse_args()
    windows = held_out_windows(arguments.windows)
    original = predict(resolve(DEMO), windows)
    print("| | bits | KL |\n|---|---|---|", flush=True)
    with tempfile.TemporaryDirectory() as scratch:
        for number, (name, (scheme, overrides, data)) in enumerate(runs().items()):
            output, calibration = Path(scratch) / str(number), Calibration(data, arguments.calib_samples)
            report = quantize(
                DEMO, output, scheme=scheme, method="gptq", format="compressed-tensors",
                overrides=overrides, calibration=calibration, device="cpu",
            )  # fmt: skip
            divergence = fmean(window_divergences(original, predict(output, windows)))
            print(f"| {name} | {report.effective_bits:.2f} | {divergence:.4f} |", flush=True)


if __name__ == "__main__":
    main()
