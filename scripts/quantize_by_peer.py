"""Quantize a model by another project's quantizer, run by a Python that has it, on given calibration tokens.

    PEER/bin/python scripts/quantize_by_peer.py gptqmodel demo-folder tokens.json OUT
    PEER/bin/python scripts/quantize_by_peer.py llmcompressor-awq …

The settings are the peer's own defaults, at 4 bits in groups of 128. ``tokens.json`` holds the windows, lists of token
ids of one length, as ``compare_quality.py --tokens`` writes them. No llmq here: its dependencies are not theirs.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path


def gptqmodel(model: str, windows: list[list[int]], output: str) -> None:
    """GPTQ by gptqmodel: symmetric, GPTQ format. Machines of two cores need GPTQMODEL_CPU_WORKERS=2."""
    from gptqmodel import GPTQModel, QuantizeConfig

    quantizer = GPTQModel.load(model, QuantizeConfig(bits=4, group_size=128), device="cpu")
    quantizer.quantize([{"input_ids": window, "attention_mask": [1] * len(window)} for window in windows], batch_size=1)
    quantizer.save(output)


def llmcompressor(model: str, windows: list[list[int]], output: str, *, awq: bool = False) -> None:
    """GPTQ by llm-compressor, symmetric; or AWQ, asymmetric. In compressed-tensors."""
    import torch
    from datasets import Dataset
    from llmcompressor import oneshot
    from llmcompressor.modifiers.awq import AWQModifier
    from llmcompressor.modifiers.quantization import GPTQModifier

    if awq:
        if not torch.accelerator.is_available():
            torch.Tensor.pin_memory = lambda tensor: tensor  # type: ignore[assignment,method-assign,misc]  # it always does
        recipe = AWQModifier(targets="Linear", scheme="W4A16_ASYM", ignore=["lm_head"])
    else:
        recipe = GPTQModifier(targets="Linear", scheme="W4A16", ignore=["lm_head"])
    dataset = Dataset.from_dict({"input_ids": windows, "attention_mask": [[1] * len(window) for window in windows]})
    oneshot(
        model=model,
        dataset=dataset,
        recipe=recipe,
        num_calibration_samples=len(windows),
        max_seq_length=len(windows[0]),
        output_dir=output,
        save_compressed=True,
    )


def autoawq(model: str, windows: list[list[int]], output: str) -> None:
    """AWQ by AutoAWQ: asymmetric, its GEMM format."""
    from awq import AutoAWQForCausalLM
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    quantizer = AutoAWQForCausalLM.from_pretrained(model, device_map="cpu")
    config = {"zero_point": True, "q_group_size": 128, "w_bit": 4, "version": "GEMM"}
    limits = {"max_calib_samples": len(windows), "max_calib_seq_len": len(windows[0])}
    quantizer.quantize(tokenizer, quant_config=config, calib_data=windows, **limits)
    quantizer.save_quantized(output)
    tokenizer.save_pretrained(output)


PEERS = {
    "gptqmodel": gptqmodel,
    "llmcompressor": llmcompressor,
    "llmcompressor-awq": lambda *arguments: llmcompressor(*arguments, awq=True),
    "autoawq": autoawq,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("peer", choices=PEERS)
    parser.add_argument("model", help="a folder")
    parser.add_argument("tokens", type=Path, help="a JSON file")
    parser.add_argument("output", help="a folder that is not there yet")
    arguments = parser.parse_args()
    PEERS[arguments.peer](arguments.model, json.loads(arguments.tokens.read_text()), arguments.output)


if __name__ == "__main__":
    main()
