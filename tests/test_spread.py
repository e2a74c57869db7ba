"""Layers of a block are rounded on several devices at once, to the bits that one device gives."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from threading import Barrier, active_count, get_ident
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny_models import save_variant

from llmq import quantize
from llmq.memory import STACKED_ROWS
from llmq.quant import rounding
from llmq.quant.blocks import Walk
from llmq.quant.calibration import draw_windows
from llmq.quant.methods import autoround
from llmq.quant.needs import Needs
from llmq.quant.options import Calibration, QuantizeOptions, Rule
from llmq.quant.pipeline import Step
from llmq.quant.prepare import prepare
from llmq.quant.rounding import stacks
from llmq.quant.schemes import choose
from llmq.quant.spread import spread
from llmq.scheme import Scheme

TWO = ("cpu", "cpu")
W4, W8 = Scheme(4, 32), Scheme(8, 32)
two_gpus = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="there is one GPU at most")


@given(st.lists(st.integers()), st.integers(1, 4))
def test_results_come_in_the_order_of_the_items(items: list[int], devices: int) -> None:
    assert list(spread(lambda _, item: item, items, ["cpu"] * devices)) == items


def test_items_are_dealt_to_the_devices_in_turn() -> None:
    first, second, *others = spread(lambda _device, _item: get_ident(), range(5), TWO)
    assert first != second
    assert others == [first, second, first]


def test_two_devices_work_at_the_same_time() -> None:
    both = Barrier(2, timeout=60)  # which one alone would never pass
    assert sorted(spread(lambda _device, _item: both.wait(), "ab", TWO)) == [0, 1]


def test_no_device_keeps_track_of_gradients() -> None:
    weight = torch.ones(1, requires_grad=True)
    with torch.no_grad():
        doubled = list(spread(lambda _, factor: weight * factor, (2, 2), TWO))
    assert not any(one.requires_grad for one in doubled)


def test_what_an_item_raises_is_raised_and_no_thread_is_left() -> None:
    before = active_count()
    with pytest.raises(ZeroDivisionError):
        list(spread(lambda _, item: 1 // item, (1, 0, 1, 0, 1), TWO))
    assert active_count() == before


@given(st.lists(st.tuples(st.integers(1, STACKED_ROWS), st.sampled_from((W4, W8))), min_size=1))
def test_stacks_are_neighbours_of_one_scheme_and_no_more_rows_than_are_rounded_in_one_go(
    layers: list[tuple[int, Scheme]],
) -> None:
    rows = {str(number): count for number, (count, _) in enumerate(layers)}
    schemes = {str(number): scheme for number, (_, scheme) in enumerate(layers)}
    made = stacks(rows, schemes)
    assert [name for stack in made for name in stack] == list(rows)
    assert all(len({schemes[name] for name in stack}) == 1 for stack in made)
    assert all(sum(rows[name] for name in stack) <= STACKED_ROWS for stack in made)
    for stack, (following, *_) in pairwise(made):  # which would not have gone in
        alike = schemes[following] == schemes[stack[0]]
        assert not alike or sum(rows[name] for name in (*stack, following)) > STACKED_ROWS


def test_a_layer_with_more_rows_is_a_stack_of_its_own() -> None:
    rows = {"q": STACKED_ROWS, "k": 1, "v": 1, "gate": STACKED_ROWS + 1, "up": 1}
    assert stacks(rows, dict.fromkeys(rows, W4)) == [["q"], ["k", "v"], ["gate"], ["up"]]


@pytest.fixture
def calibration(tmp_path: Path) -> Calibration:
    text = tmp_path / "text.txt"
    text.write_text("".join(f"{n} squared is {n * n}. " for n in range(400)))
    return Calibration(str(text), samples=8, seqlen=64)


@pytest.mark.parametrize(("variant", "method"), [("llama", "gptq"), ("llama", "autoround"), ("mixtral", "gptq")])
def test_two_devices_give_the_bits_of_one(
    tmp_path: Path, variant: str, method: str, calibration: Calibration, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(autoround, "quantize_block", partial(autoround.quantize_block, steps=2))
    monkeypatch.setattr(rounding, "STACKED_ROWS", 64)  # so that layers of a tiny block are stacks of their own
    rules = (Rule("k_proj", None), Rule("layers.1.mlp.up_proj", W8)) if variant == "llama" else ()
    options = QuantizeOptions(choose(W4, method), calibration, rules, device="cpu")
    job = prepare("tiny", save_variant(tmp_path / "model", variant), options)
    windows = draw_windows(job.folder, job.source.config, calibration)

    def quantized(devices: tuple[str, ...]) -> list[Any]:
        walk = Walk(replace(job, windows=windows, devices=devices), None)
        with torch.no_grad():
            made = [one for number in range(job.source.config.num_layers) for one in walk.quantize(number, {})]
        return [(report, weight.codes.tolist(), weight.scales.tolist()) for weight, report in made]

    assert quantized(TWO) == quantized(TWO[:1])


@pytest.mark.gpu
@two_gpus
@pytest.mark.parametrize("method", ["gptq", "awq"])
@pytest.mark.parametrize("variant", ["llama", "mixtral"])
def test_two_gpus_write_the_bytes_of_one(
    tmp_path: Path, variant: str, method: str, calibration: Calibration, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rounding, "STACKED_ROWS", 64)
    model, needs = save_variant(tmp_path / "model", variant), list[Needs]()
    for output, device in (("two", "cuda"), ("one", "cuda:0")):
        quantize(
            str(model), tmp_path / output, scheme=W4, method=method, calibration=calibration, device=device,
            on_needs=needs.append,
        )  # fmt: skip
    assert [one.devices for one in needs] == [("cuda:0", "cuda:1"), ("cuda:0",)]
    written = sorted((tmp_path / "one").glob("*.safetensors"))
    assert written
    assert all(file.read_bytes() == (tmp_path / "two" / file.name).read_bytes() for file in written)


@pytest.mark.gpu
@two_gpus
def test_a_run_on_two_gpus_that_was_stopped_goes_on_on_one(tmp_path: Path, calibration: Calibration) -> None:
    model = save_variant(tmp_path / "model", "llama")
    options = {"scheme": W4, "method": "gptq", "calibration": calibration}

    def stop(step: Step) -> None:
        if step.parts == 1:
            raise KeyboardInterrupt

    quantize(str(model), tmp_path / "whole", device="cuda:0", **options)
    with pytest.raises(KeyboardInterrupt):
        quantize(str(model), tmp_path / "stopped", device="cuda", progress=stop, **options)
    quantize(str(model), tmp_path / "stopped", device="cuda:0", resume=True, **options)
    weights = "model.safetensors"
    assert (tmp_path / "stopped" / weights).read_bytes() == (tmp_path / "whole" / weights).read_bytes()
