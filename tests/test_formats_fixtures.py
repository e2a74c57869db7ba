"""Folders that other programs wrote are read to the bit: see fixtures/make.py for the programs and their versions."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
import torch

from llmq.checkpoint.config import read_config
from llmq.checkpoint.formats import open_format, packed_layers
from llmq.checkpoint.inspect import inspect
from llmq.checkpoint.tensors import Tensors
from llmq.runtime.decoder import CausalAttention
from llmq.runtime.loader import load_decoder, open_source

FIXTURES = Path(__file__).parent / "fixtures"
FOLDERS = sorted(path.parent for path in FIXTURES.glob("*/*/oracle.json"))
every_folder = pytest.mark.parametrize("folder", FOLDERS, ids=lambda path: f"{path.parent.name}-{path.name}")


@every_folder
def test_the_numbers_are_those_that_the_writer_reads(folder: Path) -> None:
    """The oracle is the SHA-256 of each layer as the writer's own code dequantizes it, in the type that it uses."""
    tensors, form = Tensors(folder), open_format(read_config(folder))
    assert form is not None
    oracle = json.loads((folder / "oracle.json").read_text())
    assert packed_layers(form, tensors) == set(oracle)
    for name, expected in oracle.items():
        weight = form.unpack(name, tensors).dequantize()
        if expected is None:  # rounded twice: test_formats_bitsandbytes.py asks the library itself
            continue
        dtype, digest = expected
        weight = weight.to(getattr(torch, dtype)) + 0.0  # no zero has a sign
        assert hashlib.sha256(weight.contiguous().view(torch.uint8).numpy().tobytes()).hexdigest() == digest, name


@every_folder
def test_nothing_is_found_wrong_with_it_and_it_runs(folder: Path) -> None:
    inspection = inspect(str(folder))
    assert inspection.problems == ()
    model = load_decoder(open_source(folder, "cpu", torch.float32))
    tokens = torch.arange(8)
    with torch.inference_mode():
        assert model.logits(model(tokens, tokens, CausalAttention(8))).isfinite().all()
