"""Third-party quantizers for real, each in the environment that `llmq backends install` made; skipped where it is not.

llmq backends install gptqmodel && scripts/test -m peer tests/test_backends_peer.py
"""

from __future__ import annotations

from pathlib import Path

import pytest

from llmq import LLM, SamplingParams, quantize
from llmq.checkpoint.inspect import inspect
from llmq.engine.options import EngineOptions
from llmq.quant.backends import BACKENDS, Backend
from llmq.quant.backends.environment import is_installed
from llmq.quant.options import Calibration

pytestmark = [pytest.mark.peer, pytest.mark.slow]
PROMPTS = ("def ", "import ", "class Stack:\n    def push(self, item):\n")
NEW_TOKENS = 24


def transformers_tokens(folder: Path) -> list[list[int]]:
    """What transformers generates from the folder, greedily, in fp32."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, AwqConfig, GPTQConfig

    from llmq.checkpoint.config import read_config

    method = (read_config(folder).quantization or {})["quant_method"]
    # Their plain kernels: the fast ones compute in fewer bits.
    plain = {"gptq": GPTQConfig(bits=4, backend="torch"), "awq": AwqConfig(backend="torch_awq")}.get(method)
    asked = {} if plain is None else {"quantization_config": plain}
    dtype = torch.float16 if method == "awq" else torch.float32
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, device_map="cpu", **asked)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    found = []
    for prompt in PROMPTS:
        ids = tokenizer(prompt, return_tensors="pt")
        out = model.generate(**ids, max_new_tokens=NEW_TOKENS, do_sample=False, eos_token_id=None, pad_token_id=0)
        found.append(out[0, ids["input_ids"].shape[1] :].tolist())
    return found


@pytest.mark.parametrize("backend", BACKENDS.values(), ids=list(BACKENDS))
def test_what_a_backend_makes_is_whole_and_generates_as_in_transformers(tmp_path: Path, backend: Backend) -> None:
    if not is_installed(backend):
        pytest.skip(f"llmq backends install {backend.name}")
    folder = tmp_path / "quantized"
    scheme = "w4a16"
    report = quantize(
        "demo", folder, scheme=scheme, backend=backend.name, calibration=Calibration(samples=4, seqlen=256)
    )
    assert report.backend == backend.name
    assert inspect(str(folder)).problems == ()
    llm = LLM(str(folder), device="cpu", dtype="float32", options=EngineOptions(kv_cache_memory=2**25))
    params = SamplingParams(max_tokens=NEW_TOKENS, temperature=0, ignore_eos=True)
    ours = [output.completions[0].token_ids for output in llm.generate(PROMPTS, params)]
    assert ours == transformers_tokens(folder)
