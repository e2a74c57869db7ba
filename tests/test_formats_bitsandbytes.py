"""bitsandbytes: where its bytes lie, what the library itself makes of them, and what is said without it."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from llmq.checkpoint.config import read_config
from llmq.checkpoint.formats import format_for, open_format, packed_layers
from llmq.checkpoint.quantized_weight import QuantizedWeight
from llmq.checkpoint.tensors import ShardWriter, Tensors
from llmq.errors import LlmqError
from llmq.quant.methods import bnb
from llmq.scheme import FP4, NF4, Scheme

NAME = "model.layers.0.mlp.up_proj"
INT8 = Path(__file__).parent / "fixtures" / "bitsandbytes" / "int8"
SCHEMES = [Scheme(4, 64, number=NF4), Scheme(4, 64, number=FP4), Scheme(8, -1)]


def test_a_byte_has_the_even_code_above_the_odd_one(tmp_path: Path) -> None:
    scheme = Scheme(4, 64, number=NF4)
    codes = torch.randint(0, 16, (8, 128), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    weight = QuantizedWeight(scheme, codes, torch.rand(8, 2), torch.zeros(8, 2, dtype=torch.uint8))
    writer = ShardWriter(tmp_path)
    writer.add_all(format_for("bitsandbytes", {NAME: scheme}).pack(NAME, weight))
    writer.close()
    stored = Tensors(tmp_path).load(f"{NAME}.weight")
    assert stored.shape == (8 * 128 // 2, 1)
    for row, column in ((0, 0), (7, 126), (3, 64)):
        assert stored[(row * 128 + column) // 2] == codes[row, column] * 16 + codes[row, column + 1]


def test_int8_rows_are_the_library_s_to_the_last_bit() -> None:
    """It multiplies by the row's magnitude, then by 1/127: an order in which no scale can be said."""
    functional = pytest.importorskip("bitsandbytes").functional
    tensors, form = Tensors(INT8), open_format(read_config(INT8))
    assert form is not None
    for name in packed_layers(form, tensors):
        theirs = functional.int8_vectorwise_dequant(tensors.load(f"{name}.weight"), tensors.load(f"{name}.SCB"))
        torch.testing.assert_close(form.unpack(name, tensors).dequantize(), theirs, rtol=2**-22, atol=0)


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_no_weight_is_off_by_more_than_half_of_the_widest_step(scheme: Scheme) -> None:
    pytest.importorskip("bitsandbytes")
    weight = torch.randn(32, 128, generator=torch.Generator().manual_seed(0))
    quantized = bnb.quantize_weight(weight, scheme)
    steps = {NF4: 0.31, FP4: 1 / 3, "int": 1 / 127}
    magnitude = (
        weight.view(32, scheme.num_groups(128), -1)
        .abs()
        .amax(-1)
        .repeat_interleave(128 // quantized.scales.shape[1], 1)
    )
    # int8 rounds the weight to fp16 first.
    assert ((quantized.dequantize() - weight).abs() <= magnitude * (steps[scheme.number] / 2 + 2**-11)).all()
    assert quantized.scheme == scheme


def test_without_the_library_its_method_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(LlmqError, match="bitsandbytes is not installed") as caught:
        bnb.quantize_weight(torch.randn(32, 64), SCHEMES[0])
    assert caught.value.hint == "pip install 'llmq[bitsandbytes]'"


def test_blocks_that_go_from_row_to_row_are_refused(tmp_path: Path) -> None:
    """The library allows them, where the rows' length is no multiple of 64."""
    functional = pytest.importorskip("bitsandbytes").functional
    packed, state = functional.quantize_4bit(torch.randn(8, 96), blocksize=64, quant_type="nf4")
    writer = ShardWriter(tmp_path)
    writer.add(f"{NAME}.weight", packed)
    writer.add_all((f"{NAME}.weight.{part}", tensor) for part, tensor in state.as_dict(packed=True).items())
    writer.close()
    with pytest.raises(LlmqError, match="blocks of 64 would go from row to row"):
        format_for("bitsandbytes", {NAME: SCHEMES[0]}).unpack(NAME, Tensors(tmp_path))


@pytest.mark.parametrize("shape", ['["a", "b"]', "[1e999, 2]", "[8.5, 64]"])
def test_a_shape_that_is_none_is_refused(tmp_path: Path, shape: str) -> None:
    scheme = SCHEMES[0]
    text = f'{{"quant_type": "{scheme.number}", "blocksize": 64, "shape": {shape}}}'
    writer = ShardWriter(tmp_path)
    name = f"{NAME}.weight.quant_state.bitsandbytes__{scheme.number}"
    writer.add(name, torch.tensor(list(text.encode()), dtype=torch.uint8))
    writer.close()
    with pytest.raises(LlmqError, match="is not readable") as caught:
        format_for("bitsandbytes", {NAME: scheme}).unpack(NAME, Tensors(tmp_path))
    assert caught.value.hint


def test_blocks_of_another_length_are_refused(tmp_path: Path) -> None:
    functional = pytest.importorskip("bitsandbytes").functional
    packed, state = functional.quantize_4bit(torch.randn(8, 128), blocksize=128, quant_type="nf4")
    writer = ShardWriter(tmp_path)
    writer.add(f"{NAME}.weight", packed)
    writer.add_all((f"{NAME}.weight.{part}", tensor) for part, tensor in state.as_dict(packed=True).items())
    writer.close()
    with pytest.raises(LlmqError, match="in blocks of 128") as caught:
        format_for("bitsandbytes", {NAME: SCHEMES[0]}).unpack(NAME, Tensors(tmp_path))
    assert caught.value.hint
