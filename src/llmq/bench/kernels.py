"""The linear layers of a model, one product at a time, against what the machine can do.

A product reads its weight and its inputs and writes its outputs once, and multiplies; the roofline is the longer of the
two, bytes over the bandwidth of a large copy and operations over the rate of a large product, both measured first. Each
call has another weight, so that together they are several times the cache (but MOST at most), and a time is the median
over rounds: on a GPU, of replays of a CUDA graph. Activations of 8 bits are rounded beforehand, as the kernels before
most products do. Weights are random. Few rows come before many: what draws all the power there is slows the card down
for a while. A share may be over 1: of many rows, by as much as that slowed down the large product, and on a CPU, whose
caches hold small layers.

Roofline: Williams, Waterman, Patterson, 2009, https://doi.org/10.1145/1498765.1498785
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain, product
from typing import Any

import torch
from torch import nn

from llmq.bench.environment import device_name, setting
from llmq.bench.load import Progress
from llmq.bench.nvml import card_of
from llmq.checkpoint.config import ModelConfig, read_config
from llmq.checkpoint.folder import resolve
from llmq.runtime.decoder import Decoder, DecoderLayer
from llmq.runtime.device import multiplies_fp8, resolve_device, resolve_dtype
from llmq.runtime.dummy import DEVIATION, dummy_weight
from llmq.runtime.kernels.quantize_rows import QuantizedRows, quantize_rows
from llmq.runtime.kernels.w8a8 import Weight8, w8a8_matmul
from llmq.runtime.linear import DenseLinear, Linear, input_number, quantized_linear, resident_bytes
from llmq.scheme import E4M3, INT, Scheme

ROUNDS = 10
CACHES = 3
"""Times the last cache that the weights of a round are together."""
MOST = 32
"""Weights of a round, however small."""
CALLS = 16
"""Products of a CUDA graph, at least: beside them its launch takes no time."""
CPU_CACHE = 2**25
LARGE = {"cpu": (2**26, 1024), "cuda": (2**31, 8192)}
"""Bytes that are copied and rows of the square matrices that are multiplied, for the roofline."""


@dataclass(frozen=True, slots=True)
class Roofline:
    """Bytes a second, read and written, of a copy; operations a second of a product, by the number that its factors
    are: ``int`` and ``e4m3`` of 8 bits, None: the type that is computed in."""

    bandwidth: float
    rates: Mapping[str | None, float]


@dataclass(frozen=True, slots=True)
class Product:
    """``rows`` inputs times a weight of ``shape`` (out_features, in_features). Seconds, bytes, operations a second."""

    layer: str
    shape: tuple[int, int]
    scheme: str
    rows: int
    seconds: float
    bytes: int
    floor: float
    """Seconds at the roofline."""

    @property
    def bandwidth(self) -> float:
        return self.bytes / self.seconds

    @property
    def rate(self) -> float:
        return 2.0 * self.rows * self.shape[0] * self.shape[1] / self.seconds

    @property
    def share(self) -> float:
        """Of the roofline."""
        return self.floor / self.seconds

    def as_json(self) -> dict[str, Any]:
        return {
            "layer": self.layer,
            "out_features": self.shape[0],
            "in_features": self.shape[1],
            "scheme": self.scheme,
            "rows": self.rows,
            "seconds": self.seconds,
            "gb_per_s": self.bandwidth / 1e9,
            "tflop_per_s": self.rate / 1e12,
            "share_of_roofline": self.share,
        }


@dataclass(frozen=True, slots=True)
class KernelsReport:
    """Products by layer, scheme and rows."""

    model: str
    dtype: str
    setting: Mapping[str, Any]
    roofline: Roofline
    products: tuple[Product, ...]

    def as_json(self) -> dict[str, Any]:
        return {
            "model_id": self.model,
            "dtype": self.dtype,
            **self.setting,
            "copy_gb_per_s": self.roofline.bandwidth / 1e9,
            "tflop_per_s": {number or self.dtype: rate / 1e12 for number, rate in self.roofline.rates.items()},
            "products": [product.as_json() for product in self.products],
        }


def bench_kernels(
    model: str,
    schemes: Mapping[str, Scheme | None],
    rows: Sequence[int],
    *,
    revision: str | None = None,
    dtype: str = "auto",
    device: str = "auto",
    progress: Progress | None = None,
) -> KernelsReport:
    """Time every linear layer of a block of ``model``, whose config.json is all that is read, in each scheme, by name;
    None: as wide as activations. A layer that a scheme's groups do not divide is left out of it."""
    device = resolve_device(device)
    config = read_config(resolve(model, revision))
    torch_dtype = resolve_dtype(dtype, config, device)
    roofline = measure_roofline(device, torch_dtype)
    every = [
        (layer, shape, name, scheme)
        for layer, shape in layer_shapes(config).items()
        for name, scheme in schemes.items()
        if scheme is None or scheme.divides(shape[1])
    ]
    found: list[list[Product]] = [[] for _ in every]
    counts = sorted(set(rows))
    for done, (count, (number, (layer, shape, name, scheme))) in enumerate(product(counts, enumerate(every)), 1):
        weights = list(draw_layers(scheme, shape, torch_dtype, device))
        found[number].append(_time(layer, name, weights, count, torch_dtype, device, roofline))
        if progress is not None:
            progress(done, len(counts) * len(every))
    about = setting(device_name(device), card_of(device))
    products = tuple(chain.from_iterable(found))
    return KernelsReport(model, str(torch_dtype).removeprefix("torch."), about, roofline, products)


def layer_shapes(config: ModelConfig) -> dict[str, tuple[int, int]]:
    """(out_features, in_features) of the linear layers of a block, those of one input merged, each shape once."""
    with torch.device("meta"):
        block = Decoder(config).layers[0]
    assert isinstance(block, DecoderLayer)
    block.merge()
    found: dict[tuple[int, int], str] = {}
    for name, module in block.named_modules():
        if isinstance(module, nn.Linear):
            found.setdefault((module.out_features, module.in_features), name.rpartition(".")[2])
    return {name: shape for shape, name in found.items()}


def measure_roofline(device: str, dtype: torch.dtype) -> Roofline:
    """What a copy and a product of large square matrices reach here, of integers the faster of PyTorch's and ours; on a
    CPU, one of 8 bits is taken to be as fast as any other."""
    kind = torch.device(device).type
    size, side = LARGE[kind]
    source = torch.empty(size, dtype=torch.uint8, device=device).random_()
    target = torch.empty_like(source)
    bandwidth = 2 * size / median_seconds(lambda: target.copy_(source), device)
    a, b = torch.randn(2, side, side, dtype=dtype, device=device)
    operations = 2.0 * side**3
    rate = operations / median_seconds(lambda: a @ b, device)
    if kind == "cpu":
        return Roofline(bandwidth, {None: rate, INT: rate, E4M3: rate})
    x, weight = torch.randint(-127, 128, (2, side, side), dtype=torch.int8, device=device)
    scales = torch.ones(side, device=device)
    ours = partial(w8a8_matmul, QuantizedRows(x, scales[:, None]), Weight8(weight, scales), None, torch.bfloat16)
    of_ints = min(median_seconds(multiply, device) for multiply in (ours, partial(torch._int_mm, x, weight.t())))
    rates = {None: rate, INT: operations / of_ints}
    if multiplies_fp8(torch.device(device)):
        one, floats = torch.ones((), device=device), torch.randn(2, side, side, device=device).to(torch.float8_e4m3fn)
        multiply = partial(torch._scaled_mm, floats[0], floats[1].t(), one, one, out_dtype=torch.bfloat16)
        rates[E4M3] = operations / median_seconds(partial(multiply, use_fast_accum=True), device)
    return Roofline(bandwidth, rates)


def median_seconds(run: Callable[[], object], device: str) -> float:
    """Of ROUNDS calls, after one more."""
    clock = _clock if torch.device(device).type == "cpu" else _device_clock
    return statistics.median([clock(run) for _ in range(ROUNDS + 1)][1:])


def _clock(run: Callable[[], object]) -> float:
    started = time.perf_counter()
    run()
    return time.perf_counter() - started


def _device_clock(run: Callable[[], object]) -> float:
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    begin.record()
    run()
    end.record()
    end.synchronize()
    return float(begin.elapsed_time(end)) / 1e3


def seconds_each(calls: Sequence[Callable[[], object]], device: str) -> float:
    """Of one of ``calls``, one after another: on a GPU in a CUDA graph, so that launches take no time."""
    if torch.device(device).type == "cuda":
        calls = [*calls] * -(-CALLS // len(calls))

    def run() -> None:
        for call in calls:
            call()

    if torch.device(device).type == "cpu":
        return median_seconds(run, device) / len(calls)
    run()
    torch.cuda.synchronize(device)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return median_seconds(graph.replay, device) / len(calls)


def draw_layers(scheme: Scheme | None, shape: tuple[int, int], dtype: torch.dtype, device: str) -> Iterator[Linear]:
    """As many layers of ``shape`` (out_features, in_features) as several caches hold, of random weights in ``scheme``;
    None: in ``dtype``."""
    cache = CPU_CACHE if device == "cpu" else torch.cuda.get_device_properties(torch.device(device)).L2_cache_size
    noise = torch.Generator(device).manual_seed(0)
    taken = 0
    for _ in range(MOST):
        layer = _layer(scheme, shape, dtype, noise)
        yield layer
        taken += resident_bytes(layer)
        if taken > CACHES * cache:
            break


def _layer(scheme: Scheme | None, shape: tuple[int, int], dtype: torch.dtype, noise: torch.Generator) -> Linear:
    if scheme is not None:
        return quantized_linear(dummy_weight(scheme, shape, dtype, noise), None, dtype)
    with torch.device("meta"):
        layer = DenseLinear(shape[1], shape[0], bias=False)
    weight = torch.empty(shape, dtype=dtype, device=noise.device).normal_(0.0, DEVIATION, generator=noise)
    layer.weight = nn.Parameter(weight, requires_grad=False)
    return layer


@torch.inference_mode()
def _time(
    layer: str,
    scheme: str,
    weights: Sequence[Linear],
    rows: int,
    dtype: torch.dtype,
    device: str,
    roofline: Roofline,
) -> Product:
    shape, number = (weights[0].out_features, weights[0].in_features), input_number(weights[0])
    x = torch.randn(rows, shape[1], dtype=dtype, device=device)
    inputs = x if number is None else quantize_rows(x, number)
    seconds = seconds_each([partial(weight, inputs) for weight in weights], device)
    read = sum(part.nbytes for part in inputs) if isinstance(inputs, QuantizedRows) else inputs.nbytes
    moved = resident_bytes(weights[0]) + read + rows * shape[0] * dtype.itemsize
    floor = max(moved / roofline.bandwidth, 2.0 * rows * shape[0] * shape[1] / roofline.rates[number])
    return Product(layer, shape, scheme, rows, seconds, moved, floor)
