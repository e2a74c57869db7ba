"""transformers, with gptqmodel and optimum, reads the GPTQ folders that llmq writes, and computes the same logits."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from tiny_models import save_tiny

from llmq.quant.options import Calibration
from llmq.scheme import Scheme

pytestmark = [pytest.mark.peer, pytest.mark.slow]

LINEARS = 7 * 2
ONE = "model.layers.1.mlp.down_proj"


@pytest.fixture(scope="module", autouse=True)
def _gptqmodel() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GPTQMODEL_CPU_WORKERS", "2")  # its default refuses machines of two cores
        patch.setenv("TORCHDYNAMO_DISABLE", "1")  # it compiles its kernels, which takes longer than running them
        pytest.importorskip("optimum")
        pytest.importorskip("gptqmodel")
        yield


@pytest.mark.parametrize(
    ("architecture", "scheme", "ignore", "packed"),
    [
        ("llama", Scheme(4, 128, True), (), LINEARS),
        ("qwen2", Scheme(4, 32, False), (), LINEARS),
        ("qwen3", Scheme(8, 64, True), ("down_proj",), LINEARS - 2),
        ("mistral", Scheme(8, -1, False), (ONE, "re:.*layers.0.*q_proj"), LINEARS - 2),
    ],
    ids=str,
)
def test_transformers_computes_the_same_logits(
    tmp_path: Path, architecture: str, scheme: Scheme, ignore: tuple[str, ...], packed: int
) -> None:
    import torch
    from transformers import AutoModelForCausalLM, GPTQConfig

    from llmq.quant.pipeline import quantize
    from llmq.runtime.decoder import CausalAttention
    from llmq.runtime.loader import load_decoder, open_source

    text = tmp_path / "text.txt"
    text.write_text("def f(x):\n    return x + 1\n" * 100)
    source = save_tiny(tmp_path / "model", architecture)
    folder = tmp_path / "quantized"
    calibration = Calibration(str(text), samples=4, seqlen=64)
    quantize(str(source), folder, scheme=scheme, calibration=calibration, ignore=ignore, device="cpu")

    # Its plain kernel, as the fast ones compute in fewer bits than are to be compared.
    plain = GPTQConfig(bits=scheme.bits, backend="torch")
    peer = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, device_map="cpu", quantization_config=plain
    )
    opened = open_source(folder, "cpu", torch.float32)
    assert opened.format is not None
    ours = load_decoder(opened)
    layers = {name: module for name, module in peer.named_modules() if hasattr(module, "qweight")}
    assert len(layers) == packed
    for name, layer in layers.items():
        weight = opened.format.unpack(name, opened.tensors).dequantize()
        torch.testing.assert_close(layer.dequantize_weight().t().float(), weight, rtol=2**-10, atol=0)

    ids = torch.randint(0, 256, (48,), generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        theirs = peer(ids[None]).logits[0]
        hidden = ours(ids, torch.arange(len(ids)), CausalAttention(len(ids)))
        torch.testing.assert_close(ours.logits(hidden), theirs, rtol=0, atol=0.02)
