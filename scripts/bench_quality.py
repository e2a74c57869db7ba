"""What every method of every scheme costs in quality, on demo and on its outlier twin: the table of the README.

    python scripts/bench_quality.py                          # all of it: hours on two cores
    python scripts/bench_quality.py --only demo w3a16        # the cells whose names have all of these words
    python scripts/bench_quality.py --json

A cell is what `llmq quantize MODEL --scheme SCHEME --method METHOD --sym --calib-data demo` writes, with all else at
its defaults, scored on the demo's held-out text in windows of 2,048 tokens, in fp32 on a CPU: perplexity, and mean KL
from the predictions of the model as it was. --device is where it is quantized. Each cell is kept in --results as it is
done, and not done again. The twin (tests/outlier_twin.py) computes the same function from activations that have the
outliers of large models.
"""

from __future__ import annotations

import argparse
import importlib
import json
import math
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean

from llmq.checkpoint.folder import DEMO, resolve
from llmq.checkpoint.tokenizer import load_tokenizer
from llmq.evals.divergence import Predictions, predict, window_divergences
from llmq.evals.held_out import held_out
from llmq.evals.perplexity import WINDOW, cut
from llmq.quant.options import Calibration
from llmq.quant.pipeline import quantize
from llmq.quant.schemes import PRESETS
from llmq.scheme import Scheme

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
twin = importlib.import_module("outlier_twin")

TWIN = "twin"
MODELS = (DEMO, TWIN)
SCHEMES = ("w4a16", "w3a16", "w2a16", "w8a8", "fp8")
ORIGINAL = "original"


@dataclass(frozen=True, slots=True)
class Score:
    """A model on the held-out windows: of each the mean loss, and the mean divergence from the original."""

    settings: str
    seconds: float
    losses: list[float]
    divergences: list[float]

    @property
    def perplexity(self) -> float:
        return math.exp(fmean(self.losses))

    @property
    def divergence(self) -> float:
        return fmean(self.divergences)


def cells() -> Iterator[tuple[str, str, str]]:
    """(model, scheme, method)"""
    for model in MODELS:
        for scheme in SCHEMES:
            for method in reversed(PRESETS[scheme].methods):
                yield model, scheme, method


def held_out_windows(windows: int | None) -> list[list[int]]:
    """The first ``windows`` windows of the demo's evaluation text, or all."""
    token_ids = load_tokenizer(resolve(DEMO)).encode(held_out().text)
    return [list(window) for window in cut(token_ids, WINDOW)][:windows]


def measure(
    folder: Path, scheme: Scheme, method: str, original: Predictions, windows: list[list[int]], device: str
) -> Score:
    """Quantize the model in ``folder`` and score what was written."""
    with tempfile.TemporaryDirectory() as scratch:
        output = Path(scratch) / "quantized"
        report = quantize(
            str(folder), output, scheme=scheme, method=method, calibration=Calibration(DEMO), device=device
        )
        found = predict(output, windows)
    return Score(str(scheme), report.seconds, found.losses, window_divergences(original, found))


def table(results: dict[str, Score]) -> str:
    """Markdown: a row for each scheme and method, columns for each model."""
    lines = [
        "| weights | method | demo: perplexity | mean KL | twin: perplexity | mean KL |",
        "|---|---|---|---|---|---|",
    ]
    rows = dict.fromkeys(name.split(" ", 1)[1] for name in results)
    for row in rows:
        scores = [results.get(f"{model} {row}") for model in MODELS]
        settings, method = next(score for score in scores if score).settings, row.split()[-1]
        numbers = [f"{score.perplexity:.3f} | {score.divergence:.4f}" if score else "– | –" for score in scores]
        lines.append(f"| {settings} | {method} | {' | '.join(numbers)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", default=[], metavar="WORD")
    parser.add_argument("--windows", type=int, help="score fewer than all")
    parser.add_argument("--results", type=Path, default=Path("quality.json"))
    parser.add_argument("--device", default="cpu", help="to quantize on")
    parser.add_argument("--json", action="store_true", help="print the results file instead of the table")
    arguments = parser.parse_args()
    windows = held_out_windows(arguments.windows)
    results: dict[str, Score] = {}
    if arguments.results.exists():
        results = {name: Score(**fields) for name, fields in json.loads(arguments.results.read_text()).items()}
    with tempfile.TemporaryDirectory() as scratch:
        folders = {DEMO: resolve(DEMO), TWIN: twin.save_twin(resolve(DEMO), Path(scratch) / TWIN)}
        originals: dict[str, Predictions] = {}
        for model, scheme, method in cells():
            name = f"{model} {scheme} {method}"
            if name in results or not all(word in name.split() for word in arguments.only):
                continue
            if model not in originals:
                originals[model] = predict(folders[model], windows)
                losses = originals[model].losses
                results[f"{model} {ORIGINAL}"] = Score("bf16, as shipped", 0.0, losses, [0.0] * len(losses))
            # A scheme as such, not by its name, by which AWQ would choose another symmetry than the rest.
            settings = PRESETS[scheme].scheme
            score = measure(folders[model], settings, method, originals[model], windows, arguments.device)
            results[name] = score
            print(
                f"{name}: {score.perplexity:.3f}, {score.divergence:.4f}, quantized in {score.seconds:.0f} s",
                file=sys.stderr,
                flush=True,
            )
            arguments.results.write_text(json.dumps({key: asdict(value) for key, value in results.items()}))
    if arguments.json:
        print(json.dumps({key: asdict(value) for key, value in results.items()}))
        return
    print(f"{len(windows) * (WINDOW - 1):,} held-out tokens\n")
    print(table(results))


if __name__ == "__main__":
    main()
