"""The decoder against transformers, architecture by architecture: logits in fp32, and what bf16 loses of them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny_models import VARIANTS, save_tiny, save_variant
from torch import Tensor

from llmq import LLM, SamplingParams
from llmq.engine.options import EngineOptions
from llmq.runtime import decoder
from llmq.runtime.decoder import CausalAttention
from llmq.runtime.loader import load_decoder, open_source

SEQUENCES, LENGTH = 4, 100


def token_ids(length: int) -> Tensor:
    return torch.randint(0, 250, (SEQUENCES, length), generator=torch.Generator().manual_seed(0))


@torch.inference_mode()
def our_logits(folder: Path, dtype: torch.dtype, ids: Tensor) -> Tensor:
    length = ids.shape[1]
    model = load_decoder(open_source(folder, "cpu", dtype, length))
    hidden = model(ids.flatten(), torch.arange(length).repeat(len(ids)), CausalAttention(length))
    return model.logits(hidden).view(*ids.shape, -1)


@torch.inference_mode()
def their_logits(folder: Path, dtype: torch.dtype, ids: Tensor) -> Tensor:
    from transformers import AutoModelForCausalLM

    logits: Tensor = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()(ids).logits
    return logits.float()


def error(logits: Tensor, exact: Tensor) -> float:
    return float((logits - exact).norm() / exact.norm())


@pytest.fixture(scope="module", params=VARIANTS)
def variant(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Tensor]:
    """A tiny model, and transformers' fp32 logits."""
    folder = save_variant(tmp_path_factory.mktemp(request.param), request.param)
    return folder, their_logits(folder, torch.float32, token_ids(LENGTH))


def test_fp32_logits_are_those_of_transformers(variant: tuple[Path, Tensor]) -> None:
    folder, exact = variant
    assert error(our_logits(folder, torch.float32, token_ids(LENGTH)), exact) < 1e-5


def test_so_they_are_where_products_add_the_hidden_state(
    variant: tuple[Path, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(decoder, "ADDING_TOKENS", 1)
    folder, exact = variant
    assert error(our_logits(folder, torch.float32, token_ids(LENGTH)), exact) < 1e-5


@torch.inference_mode()
def test_hidden_states_of_some_tokens_are_theirs_among_all(variant: tuple[Path, Tensor]) -> None:
    model = load_decoder(open_source(variant[0], "cpu", torch.float32, LENGTH))
    step = token_ids(LENGTH).flatten(), torch.arange(LENGTH).repeat(SEQUENCES), CausalAttention(LENGTH)
    wanted = torch.arange(1, SEQUENCES + 1, dtype=torch.int32) * LENGTH - 1
    assert error(model(*step, wanted), model(*step)[wanted]) < 1e-6


def test_bf16_logits_err_no_more_than_those_of_transformers(variant: tuple[Path, Tensor]) -> None:
    folder, exact = variant
    ids = token_ids(LENGTH)
    ours, theirs = (logits(folder, torch.bfloat16, ids) for logits in (our_logits, their_logits))
    assert error(ours, exact) <= 1.2 * error(theirs, exact)


ORIGINAL = 64


def save_scaled(folder: Path, scaling: str) -> Path:
    """A tiny model whose angles depend on whether sequences are longer than ORIGINAL."""
    fields = {"rope_type": scaling, "rope_theta": 10_000.0, "factor": 4.0}
    if scaling == "dynamic":
        return save_tiny(folder, max_position_embeddings=ORIGINAL, rope_parameters=fields)
    fields |= {"short_factor": [1.0] * 16, "long_factor": [1.0 + n for n in range(16)]}
    original = {"original_max_position_embeddings": ORIGINAL}
    return save_tiny(folder, "phi3", pad_token_id=0, rope_parameters=fields, **original)


@pytest.mark.parametrize("length", [32, 100], ids=["within", "beyond"])
@pytest.mark.parametrize("scaling", ["longrope", "dynamic"])
def test_scalings_that_depend_on_the_length_follow_that_of_the_sequences(
    tmp_path: Path, scaling: str, length: int
) -> None:
    folder, ids = save_scaled(tmp_path, scaling), token_ids(length)
    assert error(our_logits(folder, torch.float32, ids), their_logits(folder, torch.float32, ids)) < 1e-5


@pytest.mark.parametrize(("length", "longest"), [(32, ORIGINAL), (100, None)], ids=["within", "beyond"])
def test_an_engine_scales_for_the_longest_sequence_that_it_may_run(
    tmp_path: Path, length: int, longest: int | None
) -> None:
    folder, prompts = save_scaled(tmp_path, "longrope"), token_ids(length)
    llm = LLM(str(folder), device="cpu", options=EngineOptions(max_model_len=longest))
    outputs = llm.generate(prompts.tolist(), SamplingParams(max_tokens=1, temperature=0))
    theirs = their_logits(folder, torch.float32, prompts)[:, -1].argmax(-1)
    assert [output.completions[0].token_ids[0] for output in outputs] == theirs.tolist()
