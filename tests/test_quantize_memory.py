"""A quantization takes the memory of a block, however many there are, and says before how much."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from dataclasses import dataclass
from io import StringIO
from pathlib import Path

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file, save_file
from tiny_models import save_tiny

from llmq import quantize
from llmq.cli.progress import show_progress
from llmq.errors import CHECK_FAILED, LlmqError
from llmq.memory import MICRO_BATCH_TOKENS
from llmq.quant.activations import in_file
from llmq.quant.needs import Needs
from llmq.quant.options import Calibration
from llmq.quant.pipeline import Step
from llmq.scheme import Scheme

WIDTH = 512
BLOCK = 7 * WIDTH**2 * 4
"""Bytes of a decoder block whose MLP is as wide as its hidden states."""
LIMIT = 4 * BLOCK
PYTHON = 2**20
"""What the interpreter takes besides: reports, headers, buffers of files."""

MEASURE = """
import json, re, sys, threading
from pathlib import Path
import torch
from llmq import quantize
from llmq.quant.options import Calibration

def anonymous() -> int:
    return int(re.search(r"RssAnon:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) * 1024

torch.set_num_threads(1)
small, model, method, scheme, text, limit = sys.argv[1:]
options = {"method": method, "scheme": scheme, "calibration": Calibration(text, 16, 64), "device": "cpu"}
quantize(small, small + "-out", **options | {"calibration": Calibration(text, 1, 64)})  # whatever it imports
baseline, peak, done, needs = anonymous(), 0, threading.Event(), []

def watch() -> None:
    global peak
    while not done.wait(0.01):
        peak = max(peak, anonymous())

watcher = threading.Thread(target=watch, daemon=True)
watcher.start()
quantize(model, model + "-out-" + method, max_memory=int(limit), on_needs=needs.append, **options)
done.set()
watcher.join()
print(json.dumps({"peak": peak - baseline, **needs[0].to_json()}))
"""


def save_deep(folder: Path, layers: int) -> Path:
    """A model of so many blocks, in fp32."""
    save_tiny(folder, num_hidden_layers=1, hidden_size=WIDTH, intermediate_size=WIDTH, num_attention_heads=8,
              num_key_value_heads=8)  # fmt: skip
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": layers}))
    tensors = load_file(folder / "model.safetensors")
    block = {name: value for name, value in tensors.items() if ".layers.0." in name}
    for layer in range(layers):
        tensors |= {name.replace(".0.", f".{layer}.", 1): value.clone() for name, value in block.items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@dataclass(frozen=True)
class Bench:
    folder: Path

    def peak(self, layers: int, method: str, scheme: str, limit: int) -> int:
        """Anonymous memory above what it is after imports, of a run that may have ``limit`` bytes."""
        model, small = self.folder / f"{layers}-blocks", self.folder / f"small-{method}-{layers}"
        if not model.exists():
            save_deep(model, layers)
        save_tiny(small)
        text = self.folder / "text.txt"
        text.write_text("".join(f"def f{n}(x):\n    return x * {n} + {n * n}\n\n\n" for n in range(300)))
        command = [sys.executable, "-c", MEASURE, small, model, method, scheme, text, limit]
        # What is larger than this is a mapping of its own, as all tensors of a large model are: else what is measured
        # is how the C library fills the gaps of its heap.
        environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "262144"}
        run = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False, env=environment)
        assert run.returncode == 0, run.stderr
        result = json.loads(run.stdout.splitlines()[-1])
        assert result["spills"]
        assert result["peak"] <= result["places"][0]["needed"] + PYTHON <= limit + PYTHON
        buffer = result["batch_tokens"] * 7 * WIDTH * 4  # of a token, all that is in memory at the block's widest
        assert result["peak"] <= 3 * BLOCK + buffer + PYTHON
        return int(result["peak"])


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    return Bench(tmp_path_factory.mktemp("deep"))


@pytest.mark.slow
def test_a_model_six_times_larger_than_memory_is_quantized_within_it(bench: Bench) -> None:
    assert 24 * BLOCK >= 6 * LIMIT
    assert bench.peak(24, "gptq", "w4a16", LIMIT) <= LIMIT + PYTHON


@pytest.mark.slow
def test_more_blocks_take_no_more_memory(bench: Bench) -> None:
    few, many = (bench.peak(layers, "smoothquant", "w8a8", LIMIT) for layers in (12, 48))
    assert many <= few + BLOCK // 2


def test_hidden_states_in_files_leave_nothing_behind(tmp_path: Path) -> None:
    x = torch.randn(7, 5, dtype=torch.bfloat16)
    kept = in_file(x, tmp_path)
    assert kept.dtype == x.dtype
    assert torch.equal(kept, x)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("method", ["gptq", "awq", "smoothquant"])
def test_hidden_states_in_files_give_the_same_bytes(tmp_path: Path, method: str, device: str) -> None:
    model, needs = save_tiny(tmp_path / "model"), list[Needs]()
    text = tmp_path / "text.txt"
    text.write_text("".join(f"{n} squared is {n * n}. " for n in range(400)))
    options = {"method": method, "scheme": "w8a8" if method == "smoothquant" else Scheme(4, 32), "device": device,
               "calibration": Calibration(str(text), samples=64, seqlen=64), "on_needs": needs.append}  # fmt: skip
    quantize(str(model), tmp_path / "memory", **options)
    room = needs[0].places[-2].needed - 1
    quantize(str(model), tmp_path / "files", max_memory=room, **options)
    assert (needs[0].spills, needs[1].spills) == (False, True)
    assert needs[0].batch_tokens == needs[1].batch_tokens
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / "memory" / name).read_bytes() == (tmp_path / "files" / name).read_bytes()


def test_a_window_longer_than_the_context_takes_no_more_than_the_context(tmp_path: Path) -> None:
    model = save_tiny(tmp_path / "model", max_position_embeddings=64)
    text = tmp_path / "text.txt"
    text.write_text("".join(f"{n} squared is {n * n}. " for n in range(400)))
    needs: list[Needs] = []
    for number, seqlen in enumerate((64, 4096)):
        calibration = Calibration(str(text), samples=64, seqlen=seqlen)
        output, room = tmp_path / str(number), 4 * 2**20  # for fewer tokens than pass a block otherwise
        quantize(str(model), output, calibration=calibration, device="cpu", max_memory=room, on_needs=needs.append)
    assert needs[0].batch_tokens == needs[1].batch_tokens < MICRO_BATCH_TOKENS


def test_what_cannot_fit_is_refused_before_any_work(tmp_path: Path) -> None:
    model = save_tiny(tmp_path / "model")
    with pytest.raises(LlmqError, match=r"takes about .* of main memory, and there are 64.00 KiB") as caught:
        quantize(str(model), tmp_path / "out", method="rtn", device="cpu", max_memory=2**16)
    assert caught.value.exit_code == CHECK_FAILED
    assert "--max-memory" in str(caught.value.hint)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def llmq(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "llmq", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_a_dry_run_says_what_it_takes_and_stops(tmp_path: Path) -> None:
    out = tmp_path / "out"
    fits = llmq("quantize", "demo", "-o", out, "--method", "rtn", "--device", "cpu", "--dry-run", "--json")
    assert fits.returncode == 0
    assert json.loads(fits.stdout)["fits"]
    short = llmq(
        "quantize", "demo", "-o", out, "--method", "rtn", "--device", "cpu", "--dry-run", "--max-memory", "1MiB"
    )
    assert short.returncode == CHECK_FAILED
    assert "of main memory, which has 1.00 MiB" in short.stderr
    assert [line.split(":")[0] for line in short.stderr.splitlines()[-2:]] == ["error", "hint"]
    assert not out.exists()


def test_a_log_has_a_line_for_each_part(tmp_path: Path) -> None:
    lines = llmq("quantize", "demo", "-o", tmp_path / "out", "--method", "rtn", "--device", "cpu").stderr.splitlines()
    parts = [line for line in lines if " of 6 parts: " in line]
    assert [line[0] for line in parts] == list("123456")
    assert "model.layers.4 quantized, largest error" in parts[4]
    assert " left" in parts[3]


def test_a_terminal_shows_part_time_left_layer_and_its_error(tmp_path: Path) -> None:
    screen = Console(file=StringIO(), force_terminal=True, width=120)
    with pytest.raises(KeyboardInterrupt), show_progress(screen) as show:

        def progress(step: Step) -> None:
            show(step)
            if step.layers == 7 + 3:
                raise KeyboardInterrupt

        quantize(str(save_tiny(tmp_path / "model")), tmp_path / "out", method="rtn", device="cpu", progress=progress)
    shown = re.sub(r"\x1b\[[\d;?]*\w", "", screen.file.getvalue())
    left, layer = r"(\d+:\d\d:\d\d|-:--:--)", r"model\.layers\.1\.self_attn\.v_proj"
    assert re.search(rf"part 2 of 3 .* {left} {layer}, error \d\.\de[+-]\d\d", shown)
