"""The outlier twin of a Llama-like model: the same function, with activations such as large models have.

In large models a few channels of the hidden state are tens of times larger than the rest, in every layer, and that is
what defeats rounding to nearest; small models have none. Here they are made: at each norm before linears,

    norm.weight[c] · FACTOR        column c of the linears after it / FACTOR        for the same few channels c

so that the products stay what they were. FACTOR is a power of two: no float of any type changes but in its exponent.
"""

from __future__ import annotations

import shutil
from pathlib import Path

FACTOR = 32.0
CHANNELS = 4
READERS = {
    "input_layernorm": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "post_attention_layernorm": ("mlp.gate_proj", "mlp.up_proj"),
}
"""The norms of a block, and the linears that read what each of them writes."""


def save_twin(source: Path, folder: Path) -> Path:
    """Write the twin of ``source``, a model folder of a single safetensors file, to ``folder``. Returns ``folder``."""
    from safetensors.torch import load_file, save_file

    shutil.copytree(source, folder)
    path = folder / "model.safetensors"
    tensors = load_file(path)
    for name in [name for name in tensors if name.removesuffix(".weight").endswith(tuple(READERS))]:
        block, norm, _ = name.rsplit(".", 2)
        hidden = len(tensors[name])
        channels = [hidden * (2 * number + 1) // (2 * CHANNELS) for number in range(CHANNELS)]
        tensors[name][channels] *= FACTOR
        for linear in READERS[norm]:
            tensors[f"{block}.{linear}.weight"][:, channels] /= FACTOR
    save_file(tensors, path, metadata={"format": "pt"})
    return folder
