"""A quantization that is stopped goes on where it was, and ends with the same bytes as one that was not."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import random
import sys
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import save_tiny

from llmq import quantize
from llmq.checkpoint.folder import journal_of, partial_of, write_folder
from llmq.checkpoint.shards import Shards
from llmq.errors import LlmqError
from llmq.quant.journal import Journal
from llmq.quant.methods import autoround
from llmq.quant.options import Calibration
from llmq.quant.report import LayerReport
from llmq.quant.schemes import AUTOROUND, AWQ, GPTQ, RTN, SMOOTHQUANT
from llmq.scheme import Scheme

W4, W8, W8A8 = Scheme(4, 32), Scheme(8, 32), Scheme(8, -1, activation_bits=8)
FP8 = Scheme(8, -1, number="e4m3", activation_bits=8)
KILLS = 10
STEP = "llmq.step"
EVENTS = {STEP, "open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.truncate"}
"""Moments at which a process may be killed: a layer is done, or a file is opened, made, renamed or removed."""


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)  # a process that is forked has no others
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def calibration(tmp_path_factory: pytest.TempPathFactory) -> Calibration:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("".join(f"def f{n}(x):\n    return x * {n} + {n * n}\n\n\n" for n in range(100)))
    return Calibration(str(path), samples=4, seqlen=64)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With biases in bf16, which a CPU widens: what is scaled has to be rounded as it is stored."""
    folder = tmp_path_factory.mktemp("models") / "llama"
    return save_tiny(folder, num_hidden_layers=4, attention_bias=True, dtype="bfloat16")


def digest(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}


def run_until(kill_at: int | None, work: Callable[[], object]) -> bool:
    """Do ``work`` in a process of its own, which is killed as by ``kill -9`` at its so manieth event. Did it live?"""
    process = os.fork()
    if process == 0:
        left = kill_at

        def hook(event: str, _: tuple[object, ...]) -> None:
            nonlocal left
            if left is not None and event in EVENTS:
                left -= 1
                if left < 0:
                    os.kill(os.getpid(), 9)

        try:
            sys.addaudithook(hook)
            work()
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    _, status = os.waitpid(process, 0)
    assert status in (0, 9), "the run failed by itself"
    return status == 0


METHODS: dict[str, dict[str, Any]] = {
    "rtn": {"method": RTN, "scheme": W4},
    "gptq": {"method": GPTQ, "scheme": W4, "overrides": {"down_proj": W8}, "format": "compressed-tensors"},
    "gptq-dynamic": {"method": GPTQ, "scheme": W4, "act_order": "dynamic"},
    "awq": {"method": AWQ, "scheme": W4},
    "smoothquant": {"method": SMOOTHQUANT, "scheme": W8A8},
    "autoround": {"method": AUTOROUND, "scheme": W4},
    "fp8-kv-cache": {"method": RTN, "scheme": FP8, "kv_cache": "fp8"},
    "nf4": {"scheme": "nf4"},
    "head": {"method": GPTQ, "scheme": W4, "overrides": {"lm_head": W8}, "format": "compressed-tensors"},
}


@pytest.mark.parametrize("name", METHODS)
def test_a_run_killed_at_ten_random_moments_writes_the_same_bytes(
    tmp_path: Path, model: Path, calibration: Calibration, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if name == "nf4":
        pytest.importorskip("bitsandbytes")
    original = autoround.quantize_block
    monkeypatch.setattr(autoround, "quantize_block", lambda *args, **options: original(*args, **options, steps=3))

    def work(output: Path) -> None:
        options = {"calibration": calibration, "device": "cpu", "progress": lambda _: sys.audit(STEP), **METHODS[name]}
        quantize(str(model), output, resume=True, **options)

    work(tmp_path / "whole" / "model")
    output, noise = tmp_path / "killed" / "model", random.Random(name)
    kills = 0
    while kills < KILLS and not run_until(noise.randrange(40), lambda: work(output)):
        kills += 1
        assert not output.exists()
    if not output.exists():
        work(output)
    assert kills == KILLS
    assert digest(output) == digest(tmp_path / "whole" / "model")
    assert {path.name for path in output.parent.iterdir()} == {"model"}


def stop_after(parts: int) -> Callable[[Any], None]:
    """A progress that ends the run, as somebody at the keyboard would, once so many parts are done."""

    def progress(step: Any) -> None:
        if step.parts == parts:
            raise KeyboardInterrupt

    return progress


@pytest.fixture
def stopped(tmp_path: Path, model: Path) -> Path:
    """An output of which two parts are done."""
    with pytest.raises(KeyboardInterrupt):
        quantize(str(model), tmp_path / "out", method=RTN, scheme=W4, device="cpu", progress=stop_after(2))
    return tmp_path / "out"


def refused(model: Path, output: Path, **options: Any) -> LlmqError:
    with pytest.raises(LlmqError) as caught:
        quantize(str(model), output, **{"method": RTN, "scheme": W4, "device": "cpu", **options})
    assert caught.value.hint
    return caught.value


def test_what_is_done_is_not_done_again(model: Path, stopped: Path) -> None:
    steps: list[Any] = []
    report = quantize(str(model), stopped, method=RTN, scheme=W4, device="cpu", resume=True, progress=steps.append)
    assert {step.layer.name.split(".")[2] for step in steps if step.layer} == {"2", "3"}
    assert len(report.layers) == 4 * 7
    assert [path.name for path in stopped.parent.iterdir()] == ["out"]


def test_what_was_being_written_when_a_run_was_killed_is_not_in_the_folder(model: Path, stopped: Path) -> None:
    (partial_of(stopped) / ".config.json.partial-1").write_text("{")
    quantize(str(model), stopped, method=RTN, scheme=W4, device="cpu", resume=True)
    assert not list(stopped.glob(".*"))


def test_a_run_that_can_go_on_is_not_thrown_away_by_mistake(model: Path, stopped: Path) -> None:
    error = refused(model, stopped)
    assert "was stopped, and can go on" in error.message
    assert "--resume" in str(error.hint)
    assert "--overwrite" in str(error.hint)
    assert len(journal_of(stopped).read_text().splitlines()) == 1 + 2
    quantize(str(model), stopped, method=RTN, scheme=W8, device="cpu", overwrite=True)
    assert [path.name for path in stopped.parent.iterdir()] == ["out"]


def test_that_a_run_can_go_on_is_said_before_any_text_is_read_or_written(model: Path, stopped: Path) -> None:
    error = refused(model, stopped, method=GPTQ, calibration=Calibration("missing.txt"))
    assert "was stopped, and can go on" in error.message


@pytest.mark.parametrize(
    ("options", "difference"),
    [
        ({"scheme": Scheme(4, 64)}, "--group-size is 64 now, and was 32"),
        ({"scheme": Scheme(8, 32)}, "--bits is 8 now, and was 4"),
        ({"clip": True}, "--clip is True now, and was False"),
        ({"ignore": ["down_proj"]}, "--override and --ignore is down_proj=none now, and was none"),
        ({"calibration": Calibration(seed=1)}, "--calib-seed is 1 now, and was 0"),
    ],
)
def test_other_settings_are_named_and_refused(
    model: Path, stopped: Path, options: dict[str, Any], difference: str
) -> None:
    assert difference in refused(model, stopped, resume=True, **options).message
    quantize(str(model), stopped, method=RTN, scheme=W4, device="cpu", resume=True)


def test_a_model_that_has_changed_since_is_refused(model: Path, stopped: Path) -> None:
    file = model / "model.safetensors"
    before = file.stat()
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns + 1))
    try:
        assert "the model is" in refused(model, stopped, resume=True).message
    finally:
        os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))


def test_one_process_at_a_time_writes_an_output(tmp_path: Path, model: Path) -> None:
    with pytest.raises(KeyboardInterrupt), write_folder(tmp_path / "out"):
        error = refused(model, tmp_path / "out")
        raise KeyboardInterrupt
    assert f"being written by another process, {os.getpid()}" in error.message
    (tmp_path / ".out.lock").write_text("12345")  # of one that was killed
    quantize(str(model), tmp_path / "out", method=RTN, scheme=W4, device="cpu")


def test_a_disk_that_fills_loses_nothing(tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    quantize(str(model), tmp_path / "whole" / "out", method=RTN, scheme=W4, device="cpu")
    calls, sync = iter(range(100)), Shards.sync

    def full(shards: Shards) -> None:
        if next(calls) == 2:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        sync(shards)

    output = tmp_path / "full" / "out"
    monkeypatch.setattr(Shards, "sync", full)
    error = refused(model, output)
    assert "No space left on device" in error.message
    assert "--resume" in str(error.hint)
    quantize(str(model), output, method=RTN, scheme=W4, device="cpu", resume=True)
    assert digest(output) == digest(tmp_path / "whole" / "out")


@pytest.mark.parametrize(
    "mistake",
    [
        {"method": GPTQ, "calibration": Calibration("short.txt")},
        {"method": GPTQ, "calibration": Calibration("missing.txt")},
        {"overrides": {"no_such_layer": W8}},
        {"max_memory": 1},
    ],
    ids=["a text shorter than a window", "no text", "a layer that is not there", "no memory"],
)
def test_a_mistake_in_between_loses_nothing(
    model: Path, stopped: Path, mistake: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(stopped.parent)
    Path("short.txt").write_text("short")
    refused(model, stopped, **{"resume": True, **mistake})
    steps: list[Any] = []
    quantize(str(model), stopped, method=RTN, scheme=W4, device="cpu", resume=True, progress=steps.append)
    assert {step.layer.name.split(".")[2] for step in steps if step.layer} == {"2", "3"}


def test_a_run_that_would_fail_again_is_not_kept(tmp_path: Path) -> None:
    source = save_tiny(tmp_path / "model")
    tensors = load_file(source / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][0, 0] = float("nan")
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    assert "holds NaN" in refused(source, tmp_path / "out").message
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


LAYER = LayerReport("model.layers.0.mlp.up_proj", GPTQ, "int4 g32 sym", 1 / 3, float("nan"))


def test_a_journal_cut_anywhere_has_its_whole_parts(tmp_path: Path) -> None:
    path = tmp_path / "journal"
    journal = Journal(path, {"--bits": "4"}, "float32")
    for name in "abc":
        journal.add(name, [LAYER], 0.1)
    whole = path.read_bytes()
    ends = [place for place, byte in enumerate(whole) if byte == ord("\n")]
    for length in range(len(whole) + 1):
        path.write_bytes(whole[:length])
        again = Journal(path, {"--bits": "4"}, "float32")
        done = max(sum(end < length for end in ends) - 1, 0)
        assert [part.name for part in again.parts] == list("abc"[:done])
        assert [layer.error for layer in again.layers] == [1 / 3] * done
        if length % 50 == 0:
            for name in "abc"[done:]:
                again.add(name, [LAYER], 0.1)
            assert path.read_bytes() == whole


def test_a_journal_of_another_version_is_refused(tmp_path: Path) -> None:
    (tmp_path / "journal").write_text(json.dumps({"journal": 99}) + "\n")
    with pytest.raises(LlmqError, match="this version"):
        Journal(tmp_path / "journal", {}, "float32")
