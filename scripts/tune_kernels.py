"""Find the launch parameters of the products on this card, and write them into the kernels' tables.

    PYTHONPATH=src python scripts/tune_kernels.py --only w4 --rows 16 128 --write

Each candidate takes the place of an entry, and multiplies the four weights of a block of an 8B model, drawn at random,
behind the kernel that comes before them; the sum of the four medians decides. Without --write it only prints.
"""

from __future__ import annotations

import argparse
import itertools
import os
import re
import sys
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import nullcontext
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
from bench_kernels import BF16, ROTATED, SHAPES
from check_gpu import draw_weight, w8a8_scheme

from llmq.bench.kernels import seconds_each
from llmq.runtime.kernels import skinny_hopper_triton, w8a8_triton, wna16_hopper_triton, wna16_triton
from llmq.runtime.kernels.quantize_rows import quantize_rows
from llmq.runtime.kernels.silu import silu_mul
from llmq.runtime.kernels.split_k_triton import Launch as SplitLaunch
from llmq.runtime.kernels.w8a8 import pack_w8a8, w8a8_matmul
from llmq.runtime.kernels.wna16 import pack_wna16, wna16_matmul
from llmq.scheme import E4M3, INT, Scheme

Launch = wna16_triton.Launch | w8a8_triton.Launch | SplitLaunch
NAMES = ["w4", "w8", "w8a8", "fp8"]


class Entry(NamedTuple):
    """An entry of a kernel's table: ``table[key]``, which ``pattern`` finds in the source of ``module``."""

    name: str
    rows: int
    module: Any
    table: dict[Any, Any]
    key: Any
    pattern: str

    @property
    def candidates(self) -> list[Launch]:
        """What it is now, first, and what it might be."""
        return [self.table[self.key], *(one for one in self._grid() if one != self.table[self.key])]

    def _grid(self) -> Iterator[Launch]:
        now = self.table[self.key]
        if self.module is wna16_triton:
            tiles = sorted({now.block_m, max(16, now.block_m)})  # from 16 rows on a step is one product
            for block_m, block_n, warps, stages in itertools.product(tiles, (64, 128, 256), (2, 4, 8), (3, 4)):
                yield now._replace(block_m=block_m, block_n=block_n, warps=warps, stages=stages)
        elif self.module is wna16_hopper_triton:
            tiles = sorted({now.block_m, 128})
            for block_m, block_n, warps, stages in itertools.product(tiles, (128, 256), (4, 8), (2, 3, 4)):
                yield now._replace(block_m=block_m, block_n=block_n, warps=warps, stages=stages)
        elif self.module is skinny_hopper_triton:
            for block_n, stages, programs in itertools.product((64, 128), (3, 4, 5, 6, 8), (132, 264)):
                yield now._replace(block_n=block_n, stages=stages, programs=programs)
        elif self.table in (w8a8_triton.LARGE, w8a8_triton.HUGE):
            for block_m, block_n, warps, stages in itertools.product((128, 256), (128, 256), (4, 8), (3, 4)):
                yield now._replace(block_m=block_m, block_n=block_n, warps=warps, stages=stages)
        else:
            sizes = (16, 32) if self.table is w8a8_triton.SLICED else (64, 128)
            for block_n, (block_k, stages) in itertools.product(sizes, ((256, 3), (256, 4), (128, 4), (128, 6))):
                yield now._replace(block_n=block_n, block_k=block_k, stages=stages)


def entries() -> list[Entry]:
    """All of them; of LARGE the one for integers, as FP8 is PyTorch's there."""
    found = [
        Entry(f"w{bits}", rows, wna16_triton, wna16_triton.LAUNCHES, (bits, rows), rf"\({bits}, {rows}\): ")
        for bits, rows in wna16_triton.LAUNCHES
    ]
    for name in ("LAUNCHES", "WIDE"):
        table = getattr(wna16_hopper_triton, name)
        found += [
            Entry("w4", rows, wna16_hopper_triton, table, rows, rf"{name} = {{[^}}]*\b{rows}: ") for rows in table
        ]
    found += [Entry("w8a8", 8, w8a8_triton, w8a8_triton.SLICED, 8, r"SLICED = \{8: ")]
    for name, number, label in (("w8a8", INT, "INT"), ("fp8", E4M3, "E4M3")):
        table = w8a8_triton.SPLIT[number]
        found += [Entry(name, rows, w8a8_triton, table, rows, rf"{label}: {{[^}}]*\b{rows}: ") for rows in table]
    for rows in [rows for rows in skinny_hopper_triton.LAUNCHES if rows > 64]:  # fewer only of 16 bits
        found.append(Entry("w8a8", rows, skinny_hopper_triton, skinny_hopper_triton.LAUNCHES, rows, rf"\b{rows}: "))
    for label, few in (("FEW", skinny_hopper_triton.FEW), ("FEW_WIDE", skinny_hopper_triton.FEW_WIDE)):
        found += [Entry("w8a8", r, skinny_hopper_triton, few, r, rf"{label} = {{[^}}]*\b{r}: ") for r in few]
    return [
        *found,
        Entry("w8a8", 256, w8a8_triton, w8a8_triton.LONG_SPLIT, 256, r"LONG_SPLIT = \{256: "),
        Entry("w8a8", 128, w8a8_triton, w8a8_triton.LARGE, INT, r"LARGE = \{INT: "),
        Entry("w8a8", 256, w8a8_triton, w8a8_triton.HUGE, INT, r"HUGE = \{INT: "),
    ]


def time_of(entry: Entry, launch: Launch, rotated: int) -> float:
    """µs of a block's four products with ``launch`` in place of ``entry``, each with the kernel before it; of 8 bits
    those of the entry's kernel alone."""
    before, total = entry.table[entry.key], 0.0
    entry.table[entry.key] = launch
    for out_features, in_features in SHAPES.values():
        gate, up = torch.randn(2, entry.rows, in_features, device="cuda", dtype=BF16)
        count = max(2, rotated // (out_features * in_features))
        if entry.name in ("w8a8", "fp8"):
            scheme = w8a8_scheme(INT if entry.name == "w8a8" else E4M3)
            rounded = [pack_w8a8(draw_weight(out_features, in_features, scheme)) for _ in range(count)]
            calls = [
                partial(
                    lambda weight, x: w8a8_matmul(quantize_rows(x, weight.number), weight, None, BF16), weight, gate
                )
                for weight in rounded
            ]
        else:
            packed = [
                pack_wna16(draw_weight(out_features, in_features, Scheme(int(entry.name[1]))), BF16)
                for _ in range(count)
            ]
            calls = [
                partial(lambda weight, x, y: wna16_matmul(silu_mul(x, y), weight), weight, gate, up)
                for weight in packed
            ]
        alone = patch.object(skinny_hopper_triton, "takes", lambda *_: False)
        with alone if entry.module is w8a8_triton else nullcontext():
            total += seconds_each(calls, "cuda") * 1e6
    entry.table[entry.key] = before
    return total


def compiles(number: int, launch: Launch) -> bool:
    """Whether a candidate of the entry of that number runs here at all; afterwards it is compiled."""
    try:
        time_of(entries()[number], launch, 1)
    except Exception:
        return False
    return True


def write(entry: Entry, launch: Launch) -> None:
    path = Path(entry.module.__file__)
    text = f"Launch({', '.join(map(str, launch))})"
    path.write_text(re.sub(rf"({entry.pattern})Launch\([^)]*\)", rf"\g<1>{text}", path.read_text(), count=1))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=NAMES, default=NAMES)
    parser.add_argument("--rows", nargs="+", type=int, help="the entries for so many rows; default: all")
    parser.add_argument("--write", action="store_true", help="put the best into the tables")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("this measures a GPU, and there is none")
    wanted = [
        (number, entry)
        for number, entry in enumerate(entries())
        if entry.name in arguments.only and (arguments.rows is None or entry.rows in arguments.rows)
    ]
    trials = [(number, launch) for number, entry in wanted for launch in entry.candidates]
    with ProcessPoolExecutor(min(14, os.cpu_count() or 1), get_context("spawn")) as pool:
        run = dict(zip(trials, pool.map(compiles, *zip(*trials, strict=True)), strict=True))
    for number, entry in wanted:
        times = {launch: time_of(entry, launch, ROTATED) for launch in entry.candidates if run[number, launch]}
        best = min(times, key=times.__getitem__)
        print(f"{entry.name} up to {entry.rows} rows: now {times[entry.table[entry.key]]:.1f} µs a block")
        for launch in sorted(times, key=times.__getitem__)[:5]:
            print(f"    {times[launch]:7.1f}  {', '.join(f'{name} {size}' for name, size in launch._asdict().items())}")
        if arguments.write and best != entry.table[entry.key]:
            write(entry, best)


if __name__ == "__main__":
    main()
