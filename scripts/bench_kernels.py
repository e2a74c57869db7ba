"""Time the linear layers of an 8B model on a GPU beside those of humming-kernels, the yardstick for W4A16 and W8A8.

    pip install humming-kernels
    PYTHONPATH=src python scripts/bench_kernels.py

humming-kernels: Apache-2.0, https://pypi.org/project/humming-kernels. Both are timed as ``llmq bench kernels`` does,
which has the roofline and all other schemes; activations are rounded to 8 bits beforehand for both.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec

import torch

from llmq.bench.kernels import draw_layers, seconds_each
from llmq.quant.schemes import PRESETS
from llmq.runtime.kernels.quantize_rows import QuantizedRows, quantize_rows
from llmq.scheme import INT

SHAPES = {"qkv": (6144, 4096), "o": (4096, 4096), "gate, up": (28672, 4096), "down": (4096, 14336)}
ROWS = (1, 8, 16, 32, 64, 128, 256, 2048)
SCHEMES = ("w4a16", "w8a8")
BF16 = torch.bfloat16
ROTATED = 180_000_000  # bytes of weights to go round: three times an H200's L2
Product = Callable[[torch.Tensor | QuantizedRows], object]


def humming_layers(shape: tuple[int, int], scheme: str, count: int) -> list[Product]:
    """So many of humming's, each of which multiplies activations in bf16, or rounded ones."""
    from humming.layer import HummingLayer

    four = {"weight_config": {"dtype": "int4", "group_size": 128}}
    eight = {"weight_config": {"dtype": "int8"}, "input_config": {"dtype": "int8"}}
    layers = []
    for _ in range(count):
        layer = HummingLayer(*shape, **(four if scheme == "w4a16" else eight), torch_dtype=BF16).cuda()
        layer.load_from_unquantized(torch.randn(shape, device="cuda", dtype=BF16))
        layer.transform()
        layers.append(layer)
    if scheme == "w4a16":
        return layers
    return [partial(lambda layer, x: layer(x.codes, input_scale=x.scales), layer) for layer in layers]


def main() -> int:
    if not torch.cuda.is_available() or find_spec("humming") is None:
        sys.exit("this needs a GPU and humming-kernels")
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}")
    print(f"\n{'':28}{'llmq, µs':>10}{'humming':>10}{'ratio':>8}")
    for title, shape in SHAPES.items():
        for scheme in SCHEMES:
            ours: list[Product] = list(draw_layers(PRESETS[scheme].scheme, shape, BF16, "cuda"))
            theirs = humming_layers(shape, scheme, len(ours))
            for rows in ROWS:
                x = torch.randn(rows, shape[1], device="cuda", dtype=BF16)
                inputs = x if scheme == "w4a16" else quantize_rows(x, INT)
                one, other = (
                    seconds_each([partial(layer, inputs) for layer in each], "cuda") for each in (ours, theirs)
                )
                print(
                    f"{title:>9} {scheme} {rows:6} rows{one * 1e6:12.1f}{other * 1e6:10.1f}{one / other:8.2f}",
                    flush=True,
                )
    return 0


if __name__ == "__main__":
    sys.exit(main())
