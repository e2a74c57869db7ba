"""Time the linear layers of an 8B model on a GPU: ours, cuBLAS in bf16, and other kernels where they are installed.

    PYTHONPATH=src python scripts/bench_kernels.py

humming-kernels (Apache-2.0, https://pypi.org/project/humming-kernels) is the yardstick for W4A16 and W8A8; without it
its columns are empty. A time is that of one product: the median over replays of a CUDA graph that goes round several
weights, together several times the L2 cache. Activations are rounded to 8 bits beforehand, for all alike. The share is
that of the bandwidth of a copy, counting the bytes of the weight alone.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from typing import Any

import torch
from check_gpu import copy_bandwidth, draw_weight, seconds, w8a8_scheme
from torch.nn import functional as F

from llmq.runtime.kernels.quantize_rows import quantize_rows
from llmq.runtime.kernels.w8a8 import pack_w8a8, w8a8_matmul
from llmq.runtime.kernels.wna16 import pack_wna16, wna16_matmul
from llmq.scheme import E4M3, INT, Scheme

SHAPES = {"qkv": (6144, 4096), "o": (4096, 4096), "gate, up": (28672, 4096), "down": (4096, 14336)}
BATCHES = (1, 8, 16, 32, 64, 128, 256, 2048)
BF16 = torch.bfloat16
ROTATED = 180_000_000  # bytes of weights to go round: three times an H200's L2
Product = Callable[[Any], object]  # of one weight, and activations in bf16 or rounded
BITS = {"cuBLAS bf16": 16, "W4": 4.25, "humming W4": 4.125, "W8": 8.25, "W8A8": 8, "humming W8A8": 8, "FP8": 8}


def our_products(shape: tuple[int, int], name: str, count: int) -> list[Product]:
    if name == "cuBLAS bf16":
        dense = [torch.randn(shape, device="cuda", dtype=BF16) for _ in range(count)]
        return [partial(lambda weight, x: F.linear(x, weight), weight) for weight in dense]
    if name in ("W4", "W8"):
        schemes = [draw_weight(*shape, Scheme(int(name[1]))) for _ in range(count)]
        return [partial(lambda packed, x: wna16_matmul(x, packed), pack_wna16(weight, BF16)) for weight in schemes]
    number = INT if name == "W8A8" else E4M3
    rounded = [pack_w8a8(draw_weight(*shape, w8a8_scheme(number))) for _ in range(count)]
    return [partial(lambda weight, x: w8a8_matmul(x, weight, None, BF16), weight) for weight in rounded]


def humming_products(shape: tuple[int, int], name: str, count: int) -> list[Product]:
    from humming.layer import HummingLayer

    four = {"weight_config": {"dtype": "int4", "group_size": 128}}
    eight = {"weight_config": {"dtype": "int8"}, "input_config": {"dtype": "int8"}}
    layers = []
    for _ in range(count):
        layer = HummingLayer(*shape, **(four if name == "humming W4" else eight), torch_dtype=BF16).cuda()
        layer.load_from_unquantized(torch.randn(shape, device="cuda", dtype=BF16))
        layer.transform()
        layers.append(layer)
    if name == "humming W4":
        return [partial(lambda layer, x: layer(x), layer) for layer in layers]
    return [partial(lambda layer, x: layer(x.codes, input_scale=x.scales), layer) for layer in layers]


def main() -> int:
    bandwidth = copy_bandwidth()
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, copy bandwidth {bandwidth / 1e9:.0f} GB/s")
    names = [name for name in BITS if find_spec("humming") or "humming" not in name]
    print(f"\nµs, and share of the bandwidth\n{'':21}" + "".join(f"{name:>16}" for name in names))
    for title, (out_features, in_features) in SHAPES.items():
        weights = out_features * in_features
        products = {}
        for name in names:
            make = humming_products if "humming" in name else our_products
            count = max(2, round(ROTATED / (weights * BITS[name] / 8)))
            products[name] = make((out_features, in_features), name, count)
        for batch in BATCHES:
            x = torch.randn(batch, in_features, device="cuda", dtype=BF16)
            line = f"{title:>9} {batch:6} rows"
            for name in names:
                rounded = x if name[-2:] not in ("A8", "P8") else quantize_rows(x, E4M3 if name == "FP8" else INT)
                spent = seconds([partial(product, rounded) for product in products[name]])
                line += f"{spent * 1e6:10.1f} {weights * BITS[name] / 8 / spent / bandwidth:5.0%}"
            print(line, flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
