"""What runs in a backend's environment: ``python worker.py REQUEST_FD EVENTS_FD``. Needs no llmq there.

A request, one line of JSON on REQUEST_FD:

    backend, model, output    which, the folder to read, the folder to write
    method, bits, group_size, symmetric, device
    windows                   a JSON file of calibration windows, each a list of token ids

Events, one JSON object a line on EVENTS_FD: ``{"stage": "loading"}``, then quantizing, saving, and ``{"done": true}``.
The libraries print on stdout and stderr, which is why nothing else does.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from typing import Any

Tell = Callable[[str], None]


def main() -> None:
    """Read the request, carry it out, tell how far it is."""
    with os.fdopen(int(sys.argv[1]), encoding="utf-8") as requests:
        request: dict[str, Any] = json.loads(requests.readline())
    with open(request["windows"], encoding="utf-8") as stream:
        windows: list[list[int]] = json.load(stream)
    events = os.fdopen(int(sys.argv[2]), "w", encoding="utf-8", buffering=1)

    def tell(stage: str) -> None:
        print(json.dumps({"stage": stage}), file=events)

    RUNS[request["backend"]](request, windows, tell)
    print(json.dumps({"done": True}), file=events)


def auto_gptq(request: dict[str, Any], windows: list[list[int]], tell: Tell) -> None:
    """GPTQ by auto-gptq, which stops at transformers 4.53."""
    import torch

    tell("loading")
    # The library refuses a machine without CUDA, though its algorithm runs there. It asks for it when it loads a model,
    # names the device to quantize on by a constant, and waits for it.
    torch.cuda.is_available = lambda: True
    torch.cuda.synchronize = lambda *_: None
    import auto_gptq.modeling._base as base
    from auto_gptq import AutoGPTQForCausalLM, BaseQuantizeConfig

    base.CUDA_0 = torch.device("cpu")
    config = BaseQuantizeConfig(
        bits=request["bits"], group_size=request["group_size"], sym=request["symmetric"], desc_act=False
    )
    model = AutoGPTQForCausalLM.from_pretrained(request["model"], config, torch_dtype=torch.float16)
    torch.cuda.is_available = lambda: False
    tell("quantizing")
    examples = [{"input_ids": window, "attention_mask": [1] * len(window)} for window in windows]
    model.quantize(examples, batch_size=1, use_triton=False, cache_examples_on_gpu=False)
    tell("saving")
    model.save_quantized(request["output"], use_safetensors=True)


def autoawq(request: dict[str, Any], windows: list[list[int]], tell: Tell) -> None:
    """AWQ by AutoAWQ."""
    tell("loading")
    from awq import AutoAWQForCausalLM

    model = AutoAWQForCausalLM.from_pretrained(
        request["model"], device_map=request["device"], safetensors=True, use_cache=False
    )
    tell("quantizing")
    length = len(windows[0])
    config = {"w_bit": request["bits"], "q_group_size": request["group_size"], "zero_point": True, "version": "GEMM"}
    # Windows of token ids are taken as they are: the tokenizer is only asked about text.
    model.quantize(None, config, calib_data=windows, max_calib_samples=len(windows), max_calib_seq_len=length)
    tell("saving")
    model.save_quantized(request["output"])


def gptqmodel(request: dict[str, Any], windows: list[list[int]], tell: Tell) -> None:
    """GPTQ by GPTQModel."""
    # On a machine of two cores its pool of workers would otherwise be too small for itself.
    os.environ.setdefault("GPTQMODEL_CPU_WORKERS", str(max(2, os.cpu_count() or 2)))
    tell("loading")
    from gptqmodel import GPTQModel, QuantizeConfig

    config = QuantizeConfig(
        bits=request["bits"], group_size=request["group_size"], sym=request["symmetric"], desc_act=False
    )
    model = GPTQModel.load(request["model"], config, device=request["device"])
    tell("quantizing")
    model.quantize([{"input_ids": window, "attention_mask": [1] * len(window)} for window in windows], batch_size=1)
    tell("saving")
    model.save(request["output"])


def llm_compressor(request: dict[str, Any], windows: list[list[int]], tell: Tell) -> None:
    """GPTQ, AWQ or rounding by llm-compressor."""
    tell("loading")
    import torch
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
    from datasets import Dataset
    from llmcompressor import oneshot
    from llmcompressor.modifiers.quantization import GPTQModifier, QuantizationModifier
    from transformers import AutoModelForCausalLM

    whole_row = request["group_size"] < 0
    weights = QuantizationArgs(
        num_bits=request["bits"],
        type="int",
        symmetric=request["symmetric"],
        strategy="channel" if whole_row else "group",
        group_size=None if whole_row else request["group_size"],
    )
    scheme = QuantizationScheme(targets=["Linear"], weights=weights)
    groups = {"config_groups": {"group_0": scheme}, "ignore": ["lm_head"]}
    recipe: list[Any]
    if request["method"] == "gptq":
        recipe = [GPTQModifier(**groups)]
    elif request["method"] == "rtn":
        recipe = [QuantizationModifier(**groups)]
    else:
        from llmcompressor.modifiers.awq import AWQModifier

        recipe = [AWQModifier(**groups)]
    model = AutoModelForCausalLM.from_pretrained(request["model"], dtype="auto")
    if request["device"] == "cpu":
        # Its AWQ pins memory for an accelerator, which is not here.
        torch.Tensor.pin_memory = lambda self, *_: self
    data = Dataset.from_dict({"input_ids": windows, "attention_mask": [[1] * len(window) for window in windows]})
    tell("quantizing")
    oneshot(
        model=model,
        dataset=data,
        recipe=recipe,
        max_seq_length=len(windows[0]),
        num_calibration_samples=len(windows),
        shuffle_calibration_samples=False,
    )
    tell("saving")
    model.save_pretrained(request["output"], save_compressed=True)


RUNS: dict[str, Callable[[dict[str, Any], list[list[int]], Tell], None]] = {
    "auto-gptq": auto_gptq,
    "autoawq": autoawq,
    "gptqmodel": gptqmodel,
    "llm-compressor": llm_compressor,
}

if __name__ == "__main__":
    main()
