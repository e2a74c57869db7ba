"""Which device runs the model, and what is said where the one there is falls short of what was asked."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from test_kernels_reference import draw_weight
from tiny_models import save_tiny

from llmq import LLM
from llmq.checkpoint.config import read_config
from llmq.engine.options import EngineOptions
from llmq.errors import LlmqError, note
from llmq.memory import format_bytes
from llmq.runtime import device, linear
from llmq.runtime.device import GPU, cards_like, check_weights_fit, gpu, multiplies_fp8, resolve_device
from llmq.runtime.dummy import dummy_decoder
from llmq.runtime.linear import DenseLinear, quantized_linear, resident_bytes
from llmq.runtime.loader import resident_weight_bytes
from llmq.scheme import Scheme

V100 = GPU("Tesla V100", (7, 0), 16 * 2**30)
A100 = GPU("NVIDIA A100", (8, 0), 40 * 2**30)
H200 = GPU("NVIDIA H200", (9, 0), 139 * 2**30)
TOO_OLD = "The NVIDIA driver on your system is too old (found version 11040)"
NO_DRIVER = "Found no NVIDIA driver on your system"


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Callable[[GPU | str], None]:
    """Puts a card into the machine, or the reason why there is none. Notes of other tests are forgotten."""
    note.cache_clear()
    return lambda found: monkeypatch.setattr(device, "gpu", lambda _: found)


@pytest.mark.parametrize(("found", "expected"), [(H200, "cuda"), (A100, "cuda"), (V100, "cpu"), (NO_DRIVER, "cpu")])
def test_auto_is_a_card_that_the_kernels_run_on(
    found: GPU | str, expected: str, machine: Callable[[GPU | str], None]
) -> None:
    machine(found)
    assert resolve_device("auto") == expected


@pytest.mark.parametrize("found", [V100, TOO_OLD])
def test_a_card_that_cannot_be_used_is_named_once(
    found: GPU | str, machine: Callable[[GPU | str], None], capsys: pytest.CaptureFixture[str]
) -> None:
    machine(found)
    assert [resolve_device("auto") for _ in range(2)] == ["cpu", "cpu"]
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 1
    assert said[0].startswith("note: running on the CPU: ")
    assert ("compute capability 7.0, and kernels need 8.0" if found is V100 else "driver") in said[0]


def test_a_machine_without_a_card_says_nothing(
    machine: Callable[[GPU | str], None], capsys: pytest.CaptureFixture[str]
) -> None:
    machine(NO_DRIVER)
    resolve_device("auto")
    assert capsys.readouterr().err == ""


def test_cuda_stands_for_every_card_that_is_as_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    cards = {"cuda:0": H200, "cuda:1": A100, "cuda:2": H200}
    monkeypatch.setattr(device, "gpu", cards.__getitem__)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(cards))
    assert cards_like("cuda") == ("cuda:0", "cuda:2")
    assert [cards_like(one) for one in ("cuda:1", "cpu")] == [("cuda:1",), ("cpu",)]


@pytest.mark.parametrize(("found", "why"), [(V100, "Tesla V100"), (TOO_OLD, "too old"), (NO_DRIVER, "no NVIDIA")])
def test_a_card_that_is_asked_for_and_cannot_be_used_is_an_error(
    found: GPU | str, why: str, machine: Callable[[GPU | str], None]
) -> None:
    machine(found)
    with pytest.raises(LlmqError, match=f"no CUDA device: .*{why}") as caught:
        resolve_device("cuda")
    assert "--device cpu" in str(caught.value.hint)


def test_why_there_is_no_card_is_what_torch_says(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_: torch.device) -> None:
        raise RuntimeError(f"{TOO_OLD}. Please update your GPU driver by …")

    monkeypatch.setattr(torch.version, "cuda", None)
    assert "has no CUDA" in str(gpu("cuda"))
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "get_device_properties", refuse)
    assert gpu("cuda") == TOO_OLD


def test_fp8_is_for_ada_and_later(machine: Callable[[GPU | str], None], capsys: pytest.CaptureFixture[str]) -> None:
    cuda = torch.device("cuda")
    machine(H200)
    assert multiplies_fp8(cuda)
    machine(A100)
    assert not multiplies_fp8(cuda)
    assert not multiplies_fp8(cuda)
    said = capsys.readouterr().err
    assert said.count("note: NVIDIA A100 has compute capability 8.0, and products of FP8 need 8.9") == 1
    assert multiplies_fp8(torch.device("cpu"))


def test_a_scheme_that_no_kernel_takes_is_widened_and_named_once(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    note.cache_clear()
    monkeypatch.setattr(linear, "triton_runs_on", lambda _: True)  # as on a card
    # What an act-order that is not GPTQ's may leave: groups of 40 and 24 channels.
    weight = replace(draw_weight((8, 64), Scheme(4, 32)), group_index=torch.tensor([0] * 40 + [1] * 24))
    x = torch.randn(3, 64)
    for _ in range(2):
        layer = quantized_linear(weight, None, torch.float32)
        assert isinstance(layer, DenseLinear)
        torch.testing.assert_close(layer(x), x @ weight.dequantize().t())
    assert capsys.readouterr().err.count("note: the groups of a weight do not all have 32 channels") == 1


def test_a_model_larger_than_the_card_is_refused_before_it_is_read(
    machine: Callable[[GPU | str], None], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    folder = save_tiny(tmp_path / "model", "llama")
    weights = resident_weight_bytes(read_config(folder), torch.float32)
    (folder / "model.safetensors").unlink()
    monkeypatch.setattr("llmq.llm.has_tokenizer", lambda _: True)
    machine(GPU("Small card", (9, 0), weights))
    with pytest.raises(LlmqError, match="the weights take .* and Small card has") as caught:
        LLM(str(folder), device="cuda", dtype="float32", options=EngineOptions(gpu_memory_utilization=0.9))
    assert caught.value.hint is not None
    assert format_bytes(weights) in caught.value.message


def test_weights_that_just_fit_are_let_in(machine: Callable[[GPU | str], None]) -> None:
    machine(GPU("Card", (9, 0), 1000))
    check_weights_fit("cuda", 900, 0.9)
    with pytest.raises(LlmqError):
        check_weights_fit("cuda", 901, 0.9)
    check_weights_fit("cpu", 10**15, 0.9)


@pytest.mark.parametrize("architecture", ["llama", "gemma3", "qwen3-moe"])
def test_the_weights_of_a_config_are_those_that_are_loaded(architecture: str, tmp_path: Path) -> None:
    config = read_config(save_tiny(tmp_path / "model", architecture))
    assert resident_weight_bytes(config, torch.float32) == resident_bytes(dummy_decoder(config, "cpu", torch.float32))
