"""What the Triton kernels compile to for GPUs that are not here: matrix instructions, and no registers spilled."""

from __future__ import annotations

import math
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch

triton = pytest.importorskip("triton")
compiler = pytest.importorskip("triton.backends.compiler")
gluon = pytest.importorskip("triton.experimental.gluon._runtime")

from llmq.runtime.kernels import (  # noqa: E402
    angles_triton,
    attention_hopper_triton,
    attention_triton,
    dense_triton,
    grouped_triton,
    grouped_wna16_triton,
    gumbel_triton,
    megakernel_triton,
    norm_triton,
    rope_triton,
    round_columns_triton,
    routing_triton,
    silu_triton,
    skinny_hopper_triton,
    w8a8_hopper_triton,
    w8a8_triton,
    wna16_hopper_triton,
    wna16_triton,
)
from llmq.runtime.kernels.gumbel import GOLDEN, MIX_1, MIX_2, MOST  # noqa: E402
from llmq.runtime.kernels.megakernel import PROGRAMS  # noqa: E402
from llmq.runtime.kernels.split_k_triton import REDUCE_ROWS, Launch  # noqa: E402
from llmq.runtime.kernels.wna16 import STEP, PackedWeight  # noqa: E402
from llmq.scheme import E4M3, INT, NF4  # noqa: E402

CACHES = {"bf16": torch.bfloat16, "fp8e4nv": torch.float8_e4m3fn, "i8": torch.int8}
SKINNY = {"bf16": torch.bfloat16, "fp16": torch.float16, "i8": torch.int8, "fp8e4nv": torch.float8_e4m3fn}
SHARED_MEMORY = 227 * 1024
"""What a program can have of it on Hopper."""
MATRIX = {80: "mma.sync", 90: "wgmma.mma_async", 100: "tcgen05.mma"}


def compile_for(
    capability: int,
    kernel: Any,
    types: dict[str, str],
    warps: int,
    stages: int,
    source: Any = triton.compiler.ASTSource,
    registers: int | None = None,
    **constants: Any,
) -> Any:
    """Compile with pointers and strides that are multiples of 16, as they are in a model."""
    signature = {name: "constexpr" if name in constants else types.get(name, "i32") for name in kernel.arg_names}
    described = source(
        kernel,
        signature,
        {(kernel.arg_names.index(name),): value for name, value in constants.items()},
        {
            (index,): [["tt.divisibility", 16]]
            for index, name in enumerate(kernel.arg_names)
            if signature[name].startswith("*")
            or any(part in name for part in ("stride", "features", "hidden", "width", "vocabulary"))
        },
    )
    target = compiler.GPUTarget("cuda", capability, 32)
    options = {"num_warps": warps, "num_stages": stages, "maxnreg": registers}
    return triton.compile(described, target=target, options=options)


def spilled_bytes(compiled: Any, folder: Path) -> int:
    binary = folder / "kernel.cubin"
    binary.write_bytes(compiled.asm["cubin"])
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    report = subprocess.run([tool, "-res-usage", binary], capture_output=True, text=True, check=True).stdout
    found = re.search(r"STACK:(\d+)", report)
    assert found, report
    return int(found[1])


def instructions(compiled: Any, folder: Path) -> dict[int, str]:
    """Address → what the card runs, disassembled."""
    binary = folder / "kernel.cubin"
    binary.write_bytes(compiled.asm["cubin"])
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    listing = subprocess.run([tool, "-sass", binary], capture_output=True, text=True, check=True).stdout
    return {int(at, 16): text for at, text in re.findall(r"/\*([0-9a-f]{4,})\*/\s+(.*?);", listing)}


def loops(code: dict[int, str]) -> list[list[str]]:
    """The instructions of the loops that have matrix instructions and no such loop in them."""
    spans = []
    for end, text in code.items():
        found = re.match(r"@.* BRA\b.* 0x([0-9a-f]+)", text)
        if found and int(found[1], 16) < end:
            span = range(int(found[1], 16), end + 1)
            if any("MMA" in text for at, text in code.items() if at in span):
                spans.append(span)
    inner = [one for one in spans if not any(other != one and other[0] in one and other[-1] in one for other in spans)]
    return [[text for at, text in code.items() if at in span] for span in inner]


def loop(compiled: Any, folder: Path) -> list[str]:
    """The instructions of the innermost loop that has matrix instructions."""
    return min(loops(instructions(compiled, folder)), key=len)


def overwritten(body: list[str]) -> list[str]:
    """What a loop writes into registers that its matrix instructions still read, from one round to the next."""
    running: list[set[int]] = [set()]
    wrong = []
    for text in body * 2:
        written = re.match(r"(?:@!?U?P\d )?([A-Z]\S*) (?:U?P[T\d], )*R(\d+)", text)
        if matrix := re.match(r"HGMMA\S* R\d+, R(\d+), gdesc\S*, R\d+(, gsb0)?", text):
            running[-1] |= {int(matrix[1]) + index for index in range(4)}
            if matrix[2]:
                running.append(set())
        elif wait := re.match(r"WARPGROUP.DEPBAR.LE gsb0, 0x(\d+)", text):
            running = [*running[-1 - int(wait[1], 16) : -1], set()]
        elif written:
            width = 4 if re.search(r"\.128|\.M88\.4", written[1]) else 2 if re.search(r"\.64|WIDE", written[1]) else 1
            if set().union(*running) & {int(written[2]) + index for index in range(width)}:
                wrong.append(text)
    return wrong


def loop_instructions(compiled: Any, folder: Path) -> int:
    """How many they are."""
    return len(loop(compiled, folder))


def attention(
    capability: int,
    head_dim: int,
    block_size: int,
    group: int,
    decode: bool,
    windowed: bool,
    *,
    capped: bool = False,
    cache: str = "bf16",
    fresh: bool = False,
) -> Any:
    launch = attention_triton.prefill_launch(group, head_dim, 2)
    if decode:
        launch = attention_triton.decode_launch(group, head_dim, 2, CACHES[cache], fresh)
    pointers = {"query": "*bf16", "key_cache": f"*{cache}", "value_cache": f"*{cache}", "out": "*bf16"}
    scales = dict.fromkeys(("key_scales", "value_scales"))
    pointers |= dict.fromkeys(scales, "*fp32") | dict.fromkeys(
        ("block_tables", "query_starts", "kv_lengths", "longest", "order"), "*i32"
    )
    numbers = dict.fromkeys(("scale", "cap_scale", "eps"), "fp32")
    pointers |= dict.fromkeys(("means", "logsums", "cos", "sin"), "*fp32") | {"slots": "*i32"}
    brought = dict.fromkeys(("key", "value", "query_norm", "key_norm"), "*bf16")
    absent = {} if fresh else dict.fromkeys((*brought, "cos", "sin", "slots"))
    return compile_for(
        capability, attention_triton.attention_kernel, pointers | brought | numbers, launch.warps, launch.stages,
        **absent, HALF=head_dim // 2 if fresh else 0, GROUP=group, HEAD_DIM=head_dim,
        DIM_PADDED=triton.next_power_of_2(head_dim), BLOCK_SIZE=block_size,
        PAIRED=cache != "bf16" and attention_triton.in_pairs(head_dim, decode),
        WINDOWED=windowed, CAPPED=capped,
        DECODE=decode, BLOCK_M=launch.block_m, TILE=launch.tile,
        PDL=capability >= 90, **(scales if cache == "bf16" else {}),
    )  # fmt: skip


def attention_hopper(block_size: int, group: int, dtype: str) -> Any:
    kernel = attention_hopper_triton.attention_hopper_kernel
    tile, group_padded = attention_hopper_triton.TILE, triton.next_power_of_2(group)
    piece = math.gcd(block_size, tile)
    types = dict.fromkeys(("block_tables", "query_starts", "kv_lengths"), "*i32")
    types |= {"out": f"*{dtype}", "scale": "fp32"}
    box = [64 // group_padded, 1, group_padded, 64]
    types["at_query"] = f"tensordesc<{dtype}{box},{attention_hopper_triton.QUERIES!r}>"
    pages = f"tensordesc<{dtype}[{piece}, 64],{attention_hopper_triton.PAGES!r}>"
    return compile_for(
        90, kernel, types | {"at_keys": pages, "at_values": pages}, 4, 3, source=gluon.GluonASTSource,
        KV_HEADS=8, GROUP=group, GROUP_PADDED=group_padded, HEAD_DIM=128, BLOCK_SIZE=block_size, PIECE=piece,
        BLOCK_M=attention_hopper_triton.BLOCK_M, TILE=tile, STAGES=attention_hopper_triton.STAGES,
    )  # fmt: skip


def wna16(
    capability: int, bits: int, rows: int, per_group: int, dtype: str, number: str = INT, *, gated: bool = False
) -> Any:
    launch = wna16_triton.launch_for(bits, rows, 2)
    pointers = dict.fromkeys(("x", "bias", "out"), f"*{dtype}") | {"words": "*i16", "meta": "*i32", "table": "*fp32"}
    constants = {} if number == NF4 else {"table": None}
    return compile_for(
        capability, wna16_triton.wna16_kernel, pointers | {"sums": "*fp32", "counters": "*i32"}, launch.warps, 3,
        **constants, WHOLE_STEPS=True, BITS=bits, NUMBER=number, PER_GROUP=per_group, BF16_SCALE=False,
        SPLIT=not gated, REDUCED=not gated and rows > REDUCE_ROWS, GATED=gated, ASM=True,
        JOINED=bits == 4 and rows > 8 and per_group in (0, 4),
        BLOCK_M=launch.block_m, BLOCK_N=launch.block_n, STAGES=launch.stages, AHEAD=wna16_triton.AHEAD,
        PDL=capability >= 90,
    )  # fmt: skip


def wna16_hopper(launch: Launch, tile_m: int, dtype: str) -> Any:
    kernel = wna16_hopper_triton.wna16_hopper_kernel
    turns = launch.warps == 8
    constants = {"sums": None, "STEPS_PER_GROUP": 1, "BF16_SCALE": False, "STAGES": launch.stages}
    constants |= {"TILE_M": tile_m, "TURNS": turns, "BLOCK_M": launch.block_m}
    types = dict.fromkeys(("bias", "out"), f"*{dtype}") | {"meta": "*i32"}
    box = wna16_hopper_triton.BOX if turns else launch.block_m
    types["at_x"] = f"tensordesc<{dtype}[{box}, 64],{wna16_hopper_triton.X!r}>"
    types["at_words"] = f"tensordesc<i16[{launch.block_n}, 32],{wna16_hopper_triton.WORDS!r}>"
    registers = wna16_hopper_triton.AVERAGE if turns else None
    return compile_for(
        90, kernel, types, 4, launch.stages, source=gluon.GluonASTSource, registers=registers, **constants
    )


def skinny_hopper(launch: Launch, code: str, split: bool) -> Any:
    kernel = skinny_hopper_triton.skinny_kernel
    bits, total = (16, "fp32") if code in ("bf16", "fp16") else (8, "i32" if code == "i8" else "fp32")
    tile = f"{1024 // bits}],{skinny_hopper_triton.tile_layout(bits)!r}>"
    types = dict.fromkeys(("bias", "out"), "*fp16" if code == "fp16" else "*bf16") | {"sums": f"*{total}"}
    types |= dict.fromkeys(("x_scales", "weight_scales"), "*fp32")
    types |= {f"at_{name}": f"tensordesc<{code}[{size}, {tile}"
              for name, size in (("x", launch.block_m), ("weight", launch.block_n))}  # fmt: skip
    constants: dict[str, Any] = dict.fromkeys(("x_scales", "weight_scales") if bits == 16 else ())
    constants |= {} if split else {"sums": None}
    constants |= {"BLOCK_M": launch.block_m, "BLOCK_N": launch.block_n, "STAGES": launch.stages, "BOXES": launch.boxes}
    return compile_for(90, kernel, types, launch.warps, launch.stages, source=gluon.GluonASTSource, **constants)


def megakernel(number: str | None, rows: int, hidden: int, inner: int, last: bool) -> Any:
    code, bits, scale, largest = {
        None: ("bf16", 16, "fp32", 0.0), INT: ("i8", 8, "fp32", 127.0), E4M3: ("fp8e4nv", 8, "fp32", 448.0),
        "int4": ("i16", 4, "i32", 0.0),
    }[number]  # fmt: skip
    weights = dict.fromkeys(("o", "gate_up", "down", "qkv"), f"*{code}")
    scales = dict.fromkeys(("o_scales", "gate_up_scales", "down_scales", "qkv_scales"))
    constants: dict[str, Any] = {} if number else scales
    if bits != 8:
        constants = constants | {"codes": None}
    if last:
        constants |= {"next_norm": None, "qkv": None, "qkv_scales": None}
    pointers = dict.fromkeys(("mixed", "residual", "gated", "out", "norm", "next_norm"), "*bf16")
    pointers |= (
        weights
        | {"codes": f"*{code}"}
        | dict.fromkeys(scales, f"*{scale}")
        | {"found": "*fp32", "ticket": "*i32", "eps": "fp32"}
    )
    return compile_for(
        90, megakernel_triton.megakernel, pointers, megakernel_triton.WARPS.value, 1, source=gluon.GluonASTSource,
        HEADS=hidden, HIDDEN=hidden, INNER=inner, QKV=0 if last else 6144, BLOCK_M=rows, LARGEST=largest,
        BF16_SCALE=True, STAGES=megakernel_triton.STAGES[bits], PROGRAMS=PROGRAMS, PDL=True, **constants,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("number", "rows", "hidden", "inner", "last"),
    [(None, 1, 4096, 14336, False), (None, 8, 1024, 3072, False), (INT, 1, 4096, 14336, True),
     (INT, 1, 4096, 14336, False), (E4M3, 1, 4096, 14336, False), ("int4", 1, 4096, 14336, False),
     ("int4", 8, 4096, 14336, True), (None, 8, 4096, 14336, True), (INT, 8, 4096, 14336, True),
     (INT, 8, 4096, 14336, False), (E4M3, 8, 4096, 14336, True)],
)  # fmt: skip
def test_from_attention_to_attention_each_multiprocessor_has_one_program(
    number: str | None, rows: int, hidden: int, inner: int, last: bool, tmp_path: Path
) -> None:
    compiled = megakernel(number, rows, hidden, inner, last)
    assert SHARED_MEMORY // 2 < compiled.metadata.shared <= SHARED_MEMORY
    # By Triton 3.7 two registers; by 3.6 none.
    assert spilled_bytes(compiled, tmp_path) <= (8 if (number, rows) == ("int4", 8) else 0)
    ptx = compiled.asm["ptx"]
    # The first weights are asked for before the activations are there, and by 16 bytes.
    assert ptx.index("cp.async.cg.shared.global") < ptx.index("griddepcontrol.wait")
    assert "cp.async.ca" not in ptx


def w8a8(capability: int, kernel: Any, launch: w8a8_triton.Launch, number: str) -> Any:
    code, total = ("i8", "i32") if number == INT else ("fp8e4nv", "fp32")
    types = {"x": f"*{code}", "weight": f"*{code}", "sums": f"*{total}", "bias": "*bf16", "out": "*bf16"}
    types |= {"x_scales": "*fp32", "weight_scales": "*fp32"}
    constants: dict[str, Any] = {}
    if kernel is w8a8_triton.large_kernel:
        types |= {"x": f"tensordesc<{code}[{launch.block_m},{launch.block_k}]>"}
        types |= {"weight": f"tensordesc<{code}[{launch.block_n},{launch.block_k}]>"}
        constants = {"GROUP": w8a8_triton.GROUP}
    else:
        constants = {"WHOLE_STEPS": True}
    if kernel is w8a8_triton.sliced_kernel:
        constants["SLICES"] = w8a8_triton.SLICES
    if kernel is w8a8_triton.split_kernel:
        constants["SPLIT"] = False
    return compile_for(
        capability, kernel, types, launch.warps, 3, **constants, BLOCK_M=launch.block_m, BLOCK_N=launch.block_n,
        BLOCK_K=launch.block_k, STAGES=launch.stages, PDL=capability >= 90,
    )  # fmt: skip


def w8a8_hopper(dtype: str, launch: w8a8_hopper_triton.Launch) -> Any:
    types = {"x_scales": "*fp32", "weight_scales": "*fp32"}
    biased: dict[str, Any] = {"bias": None} if launch == w8a8_hopper_triton.THREE else {}
    types |= {} if biased else {"bias": f"*{dtype}"}
    types["at_x"] = f"tensordesc<i8[64, 128],{w8a8_hopper_triton.CODES!r}>"
    types["at_weight"] = f"tensordesc<i8[128, 128],{w8a8_hopper_triton.CODES!r}>"
    types["at_out"] = f"tensordesc<{dtype}[64, 64],{w8a8_hopper_triton.OUT!r}>"
    return compile_for(
        90, w8a8_hopper_triton.w8a8_hopper_kernel, types, 4, 3, source=gluon.GluonASTSource,
        CONSUMERS=launch.consumers, STAGES=launch.stages, registers=launch.registers, **biased,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("head_dim", "block_size", "group", "decode", "windowed"),
    [
        (128, 64, 4, True, False),
        (128, 16, 4, True, True),
        (256, 64, 2, True, False),
        (64, 64, 8, True, False),
        (128, 64, 4, False, False),
        (128, 64, 4, False, True),
        (256, 64, 2, False, False),
        (80, 64, 7, False, False),
    ],
)
def test_attention_on_hopper(
    head_dim: int, block_size: int, group: int, decode: bool, windowed: bool, tmp_path: Path
) -> None:
    compiled = attention(90, head_dim, block_size, group, decode, windowed)
    # A decode tile has 16 rows, too few for the warpgroup's instruction.
    assert ("mma.sync" if decode else MATRIX[90]) in compiled.asm["ptx"]
    assert spilled_bytes(compiled, tmp_path) == 0


@pytest.mark.parametrize(("block_size", "group", "dtype"), [(64, 4, "bf16"), (16, 7, "fp16"), (48, 1, "bf16")])
def test_exponentials_of_prompts_are_taken_while_the_matrix_unit_has_the_next_products(
    block_size: int, group: int, dtype: str, tmp_path: Path
) -> None:
    compiled = attention_hopper(block_size, group, dtype)
    assert spilled_bytes(compiled, tmp_path) == 0
    body = loop(compiled, tmp_path)
    waits = [at for at, text in enumerate(body) if "WARPGROUP.DEPBAR" in text]
    assert len(waits) == 2  # for the scores, and for the values
    exponentials = [at for at, text in enumerate(body) if "MUFU.EX2" in text]
    assert len(exponentials) >= 64
    assert all(waits[0] < at < waits[1] for at in exponentials)


@pytest.mark.parametrize(("cache", "most"), [("fp8e4nv", 3.5), ("i8", 4)])
@pytest.mark.parametrize("decode", [True, False])
def test_attention_over_8_bits_on_hopper(decode: bool, cache: str, most: float, tmp_path: Path) -> None:
    compiled = attention(90, 128, 64, 4, decode, False, cache=cache)
    assert ("mma.sync" if decode else MATRIX[90]) in compiled.asm["ptx"]
    assert spilled_bytes(compiled, tmp_path) == 0
    launch = attention_triton.decode_launch(4, 128, 2, CACHES[cache], False)
    if decode:
        # Reading 8 bits at full bandwidth leaves time for 7.8 of them, if nothing ever waits.
        assert loop_instructions(compiled, tmp_path) * 32 * launch.warps <= most * 2 * launch.tile * 128


@pytest.mark.parametrize(("head_dim", "group"), [(80, 7), (128, 2), (128, 4), (128, 16)])
def test_attention_that_writes_its_tokens_on_hopper(head_dim: int, group: int, tmp_path: Path) -> None:
    compiled = attention(90, head_dim, 64, group, True, False, fresh=True)
    ptx = compiled.asm["ptx"]
    # The first tiles are asked for before the kernel that computes the query has ended.
    assert ptx.index("cp.async.cg") < ptx.index("griddepcontrol.wait")
    assert spilled_bytes(compiled, tmp_path) == 0


@pytest.mark.parametrize("decode", [True, False])
def test_capped_attention_on_hopper(decode: bool, tmp_path: Path) -> None:
    compiled = attention(90, 256, 64, 2, decode, True, capped=True)
    assert ("mma.sync" if decode else MATRIX[90]) in compiled.asm["ptx"]
    assert spilled_bytes(compiled, tmp_path) == 0


@pytest.mark.parametrize(
    ("bits", "rows", "per_group", "dtype", "number", "most"),
    [(4, 1, 4, "bf16", INT, 3), (4, 16, 4, "bf16", INT, 3), (4, 64, 4, "bf16", INT, 3.5), (4, 16, 1, "fp16", INT, 4.5),
     (8, 1, 0, "bf16", INT, 4.5), (8, 16, 2, "fp16", INT, 4.5), (8, 64, 4, "bf16", INT, 5),
     (8, 1, 0, "bf16", E4M3, 8), (8, 16, 4, "fp16", E4M3, 8), (4, 8, 2, "bf16", NF4, 9)],
)  # fmt: skip
def test_wna16_on_hopper(
    bits: int, rows: int, per_group: int, dtype: str, number: str, most: float, tmp_path: Path
) -> None:
    compiled = wna16(90, bits, rows, per_group, dtype, number)
    assert (MATRIX[90] if rows > 8 else "mma.sync") in compiled.asm["ptx"]
    assert spilled_bytes(compiled, tmp_path) == 0
    launch = wna16_triton.launch_for(bits, rows, 2)
    assert loop_instructions(compiled, tmp_path) * 32 * launch.warps <= most * launch.block_n * wna16_triton.STEP


@pytest.mark.parametrize("rows", [16, 32])
def test_the_gate_of_an_int4_product_takes_no_memory(rows: int, tmp_path: Path) -> None:
    compiled = wna16(90, 4, rows, 4, "bf16", gated=True)
    assert spilled_bytes(compiled, tmp_path) == 0
    assert compiled.metadata.shared == wna16(90, 4, rows, 4, "bf16").metadata.shared


@pytest.mark.parametrize("shape", [(6144, 4096), (4096, 4096), (28672, 4096), (4096, 14336)])
def test_the_splits_of_an_8b_model_s_int4_weights_are_of_one_length(shape: tuple[int, int]) -> None:
    words, meta = torch.empty(1, shape[0], 32, device="meta"), torch.empty(1, shape[0], device="meta")
    packed = PackedWeight(words, meta, None, INT, 4, torch.bfloat16, 128, shape[1])
    assert shape[1] // STEP % wna16_triton.split_length(packed) == 0


def test_a_step_of_int4_is_one_product() -> None:
    assert wna16(90, 4, 32, 4, "bf16").asm["ptx"].count("wgmma.wait_group") == 1


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
@pytest.mark.parametrize(
    ("rows", "out_features"), [(64, 4096), (64, 28672), (96, 4096), (128, 4096), (128, 28672), (160, 4096), (256, 4096)]
)
def test_int4_of_many_rows_is_unpacked_while_others_are_multiplied(
    rows: int, out_features: int, dtype: str, tmp_path: Path
) -> None:
    launch = wna16_hopper_triton.launch_for(rows, out_features)
    compiled = wna16_hopper(launch, rows, dtype)
    assert spilled_bytes(compiled, tmp_path) == 0
    assert compiled.metadata.shared <= SHARED_MEMORY
    ptx, code = compiled.asm["ptx"], instructions(compiled, tmp_path)
    # The first weights are asked for before the activations are there.
    assert ptx.index("cp.async.bulk.tensor") < ptx.index("griddepcontrol.wait")
    # The assembler has nobody wait for products who did not ask to: see its C7512.
    assert ptx.count("wgmma.wait_group") == sum("WARPGROUP.DEPBAR" in text for text in code.values())
    assert [overwritten(body) for body in loops(code)] == [[]] * (launch.warps // 4)


@pytest.mark.parametrize("out_features", [4096, 28672])
def test_tiles_of_int4_hold_all_rows_as_one_power_of_two_or_two(out_features: int) -> None:
    for rows in range(wna16_hopper_triton.FEWEST_ROWS, wna16_hopper_triton.MOST_ROWS + 1):
        most = wna16_hopper_triton.launch_for(rows, out_features).block_m
        tiles = -(-rows // most)
        tile = wna16_hopper_triton.rows_of_tile(rows, tiles)
        assert rows <= tile * tiles
        assert tile <= most
        assert tile.bit_count() <= 2


@pytest.mark.parametrize("split", [True, False])
@pytest.mark.parametrize(
    ("code", "launch"),
    [(code, launch) for code, dtype in SKINNY.items() for rows in (16, *skinny_hopper_triton.LAUNCHES)
     for out_features in (1024, 28672)
     if (launch := skinny_hopper_triton.launch_for(rows, out_features, 1024, dtype)) is not None],
)  # fmt: skip
def test_weights_of_few_rows_are_asked_for_before_the_rows_are_there(
    code: str, launch: Launch, split: bool, tmp_path: Path
) -> None:
    compiled = skinny_hopper(launch, code, split)
    assert spilled_bytes(compiled, tmp_path) == 0
    ptx = compiled.asm["ptx"]
    assert ptx.index("cp.async.bulk.tensor") < ptx.index("griddepcontrol.wait") < ptx.index("wgmma.mma_async")
    # A step's product runs while the next step's tiles are waited for, but of FP8, whose sums go to fp32 each step.
    assert (f"wgmma.wait_group.sync.aligned {launch.boxes};" in ptx) == (code != "fp8e4nv")


@pytest.mark.parametrize("number", [INT, E4M3])
@pytest.mark.parametrize(
    ("rows", "shape"),
    [(1, (4096, 4096)), (16, (4096, 4096)), (32, (4096, 4096)), (64, (4096, 4096)), (128, (4096, 4096)),
     (128, (4096, 14336)), (128, (28672, 4096)), (1000, (4096, 4096)), (1000, (28672, 4096))],
)  # fmt: skip
def test_w8a8_on_hopper(rows: int, shape: tuple[int, int], number: str, tmp_path: Path) -> None:
    kernel, launch = w8a8_triton.kernel_for(rows, *shape, number)
    compiled = w8a8(90, kernel, launch, number)
    if kernel is w8a8_triton.sliced_kernel:
        product = "mma.sync.*s8" if number == INT else "mma.sync.*f16"  # the small instruction has no FP8 on Hopper
    else:
        product = "wgmma.mma_async.*s8" if number == INT else "wgmma.mma_async.*e4m3"
    assert re.search(product, compiled.asm["ptx"])
    assert spilled_bytes(compiled, tmp_path) == 0
    weights = launch.block_n * launch.block_k * (w8a8_triton.SLICES if kernel is w8a8_triton.sliced_kernel else 1)
    products = weights * max(1, launch.block_m // 64)
    assert loop_instructions(compiled, tmp_path) * 32 * launch.warps <= 2.2 * products


@pytest.mark.parametrize("launch", [w8a8_hopper_triton.TWO, w8a8_hopper_triton.THREE])
@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_w8a8_of_many_rows_keeps_the_matrix_unit_busy(
    dtype: str, launch: w8a8_hopper_triton.Launch, tmp_path: Path
) -> None:
    compiled = w8a8_hopper(dtype, launch)
    assert spilled_bytes(compiled, tmp_path) == 0
    ptx = compiled.asm["ptx"]
    assert re.search("wgmma.mma_async.*n128.*s8", ptx)
    # Of the two waits in a tile, that of a step leaves the step's products running.
    assert (
        ptx.count("wgmma.wait_group.sync.aligned 1") == ptx.count("wgmma.wait_group.sync.aligned 0") == launch.consumers
    )
    # Outputs leave by the copy engine: 16 bytes of a thread to shared memory, and not one of its own to global.
    assert "stmatrix.sync.aligned.m8n8.x4" in ptx
    assert "st.global" not in ptx
    registers = [int(number) for number in re.findall(r"setmaxnreg.inc.sync.aligned.u32 \t?(\d+)", ptx)]
    assert {2: 240, 3: 160}[launch.consumers] in registers


def grouped(capability: int, gated: bool, block_m: int, code: str) -> tuple[Any, float]:
    """The kernel of dense weights, or of 8 bits; and the instructions of its loop for each product of a weight."""
    size = 2 if code == "bf16" else 1
    launch = grouped_triton.launch_for(gated, block_m, size)
    types = dict.fromkeys(("order", "starts", "tile_experts", "tile_starts"), "*i32")
    types |= {"x": f"*{code}", "weight": f"*{code}", "x_scales": "*fp32", "weight_scales": "*fp32", "out": "*bf16"}
    scales: dict[str, Any] = {"x_scales": None, "weight_scales": None} if code == "bf16" else {}
    scales["bias"] = None
    compiled = compile_for(
        capability, grouped_triton.grouped_kernel, types, launch.warps, 3, **scales, GATED=gated, WHOLE_STEPS=True,
        BLOCK_M=block_m, BLOCK_N=launch.block_n, BLOCK_K=launch.block_k // size, STAGES=launch.stages,
        PDL=capability >= 90,
    )  # fmt: skip
    return compiled, (1 + gated) * launch.block_n * launch.block_k / size / launch.warps / 32


def grouped_wna16(
    capability: int, gated: bool, block_m: int, bits: int, per_group: int, dtype: str = "bf16"
) -> tuple[Any, float]:
    wide = dtype == "fp32"
    launch = grouped_wna16_triton.launch_for(gated, block_m, 4 if wide else 2)
    types = dict.fromkeys(("order", "starts", "tile_experts", "tile_starts", "meta"), "*i32")
    types |= {"x": f"*{dtype}", "words": "*i16", "out": f"*{dtype}"}
    compiled = compile_for(
        capability, grouped_wna16_triton.grouped_wna16_kernel, types, launch.warps, 3, table=None, bias=None,
        GATED=gated, WHOLE_STEPS=True, BITS=bits, NUMBER=INT, PER_GROUP=per_group, BF16_SCALE=False, ASM=not wide,
        BLOCK_M=block_m, BLOCK_N=launch.block_n, STAGES=launch.stages, PDL=capability >= 90,
    )  # fmt: skip
    return compiled, (1 + gated) * launch.block_n * wna16_triton.STEP / launch.warps / 32


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize(("block_m", "code"), [(16, "bf16"), (64, "bf16"), (128, "bf16"), (16, "i8"), (64, "fp8e4nv")])
def test_products_of_all_experts_on_hopper(gated: bool, block_m: int, code: str, tmp_path: Path) -> None:
    compiled, weights = grouped(90, gated, block_m, code)
    assert (MATRIX[90] if block_m >= 64 else "mma") in compiled.asm["ptx"]
    assert spilled_bytes(compiled, tmp_path) == 0
    assert loop_instructions(compiled, tmp_path) <= 3 * weights * max(1, block_m // 64)


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize(
    ("block_m", "bits", "per_group", "most"), [(16, 4, 4, 4), (16, 4, 1, 5.5), (64, 4, 4, 4.5), (64, 8, 0, 5.5)]
)
def test_packed_products_of_all_experts_on_hopper(
    gated: bool, block_m: int, bits: int, per_group: int, most: float, tmp_path: Path
) -> None:
    compiled, weights = grouped_wna16(90, gated, block_m, bits, per_group)
    assert MATRIX[90] in compiled.asm["ptx"]
    assert spilled_bytes(compiled, tmp_path) == 0
    assert loop_instructions(compiled, tmp_path) <= most * weights


def test_packed_products_of_all_experts_in_fp32_spill_little(tmp_path: Path) -> None:
    # A card keeps room for what all threads that it could hold spill: 19 KB a thread were 5 GB, more than was left.
    assert spilled_bytes(grouped_wna16(90, True, 64, 8, 0, "fp32")[0], tmp_path) <= 1024


def test_sorting_by_expert_stays_out_of_memory(tmp_path: Path) -> None:
    types = dict.fromkeys(("chosen", "order", "starts", "tile_experts", "tile_starts"), "*i32")
    constants = {"BLOCK_M": 16, "BINS": 256, "CHUNK": routing_triton.CHUNK, "PDL": True}
    assert spilled_bytes(compile_for(90, routing_triton.sort_kernel, types, 4, 3, **constants), tmp_path) == 0
    types = {"logits": "*bf16", "weights": "*fp32", "chosen": "*i32"}
    constants = {"PER_TOKEN": 8, "RENORMALIZED": True, "SLOTS": 8, "BLOCK": 128, "PDL": True}
    assert spilled_bytes(compile_for(90, routing_triton.choose_kernel, types, 1, 3, **constants), tmp_path) == 0


@pytest.mark.parametrize("launch", [dense_triton.WIDE, dense_triton.MIDDLE, dense_triton.NARROW])
@pytest.mark.parametrize("block_m", [16, 32])
def test_a_dense_product_is_read_ahead_and_stays_out_of_memory(
    launch: dense_triton.Launch, block_m: int, tmp_path: Path
) -> None:
    pointers = dict.fromkeys(("x", "weight", "bias", "out"), "*bf16") | {"sums": "*fp32", "counters": "*i32"}
    compiled = compile_for(
        90, dense_triton.dense_kernel, pointers, launch.warps, 3, SPLIT=True, BLOCK_M=block_m, BLOCK_N=launch.block_n,
        BLOCK_K=launch.block_k, STAGES=launch.stages, PREFETCHED=dense_triton.PREFETCHED,
        PIECES=launch.warps * 32 // launch.block_n, PDL=True,
    )  # fmt: skip
    assert "mma" in compiled.asm["ptx"]
    assert "cp.async.cg" in compiled.asm["ptx"]
    assert spilled_bytes(compiled, tmp_path) == 0


@pytest.mark.parametrize("chunk", [8, 32])
def test_joining_splits_stays_out_of_memory(chunk: int, tmp_path: Path) -> None:
    pointers = dict.fromkeys(("means", "logsums"), "*fp32") | {"out": "*bf16"}
    pointers |= dict.fromkeys(("query_starts", "kv_lengths", "longest"), "*i32")
    compiled = compile_for(
        90, attention_triton.merge_kernel, pointers, 4, 3,
        HEAD_DIM=128, DIM_PADDED=128, WINDOWED=True, TILE=64, CHUNK=chunk, PDL=True,
    )  # fmt: skip
    assert spilled_bytes(compiled, tmp_path) == 0


@pytest.mark.parametrize("capability", [80, 100])
def test_other_gpus(capability: int) -> None:
    assert MATRIX[capability] in attention(capability, 128, 64, 4, False, False).asm["ptx"]
    for cache in ("bf16", "i8", *(["fp8e4nv"] if capability > 80 else [])):
        assert "mma.sync" in attention(capability, 128, 64, 4, True, False, cache=cache).asm["ptx"]
    assert "mma" in wna16(capability, 4, 16, 4, "bf16").asm["ptx"]
    assert "mma" in wna16(capability, 8, 16, 4, "bf16", E4M3).asm["ptx"]
    for block_m in (16, 64):
        assert "mma" in grouped(capability, True, block_m, "bf16")[0].asm["ptx"]
        assert "mma" in grouped_wna16(capability, True, block_m, 4, 4)[0].asm["ptx"]
    for rows in (16, 64, 1000):
        assert "mma" in w8a8(capability, *w8a8_triton.kernel_for(rows, 4096, 4096, INT), INT).asm["ptx"]


def test_kernels_of_hopper_start_before_the_one_before_has_ended() -> None:
    kernels = [w8a8(90, *w8a8_triton.kernel_for(rows, 4096, 4096, INT), INT) for rows in (1, 32, 1000)]
    for compiled in (*kernels, wna16(90, 4, 1, 4, "bf16")):
        ptx = compiled.asm["ptx"]
        assert ptx.index("griddepcontrol.wait") < ptx.index("griddepcontrol.launch_dependents") < ptx.index("mma")


def test_the_small_kernels_move_16_bytes_at_a_time() -> None:
    pointers = dict.fromkeys(("residual", "x", "weight", "out"), "*bf16") | {"scales": "*fp32", "eps": "fp32"}
    constants = {"ADD": True, "BLOCK": 4096, "PDL": True}
    kernel = norm_triton.add_rms_norm_kernel
    assert "st.global.v4" in compile_for(90, kernel, pointers, 8, 3, LARGEST=0.0, **constants).asm["ptx"]
    pointers["out"] = "*i8"
    assert "ld.global.v4" in compile_for(90, kernel, pointers, 8, 3, LARGEST=127.0, **constants).asm["ptx"]
    pointers = dict.fromkeys(("gate", "up"), "*bf16") | {"codes": "*fp8e4nv", "scales": "*fp32"}
    kernel = silu_triton.silu_mul_quantize_kernel
    assert "ld.global.v4" in compile_for(90, kernel, pointers, 16, 3, LARGEST=448.0, BLOCK=16384, PDL=True).asm["ptx"]
    pointers = dict.fromkeys(
        ("query", "key", "value", "query_norm", "key_norm", "out", "key_cache", "value_cache"), "*bf16"
    )
    pointers |= {"cos": "*fp32", "sin": "*fp32", "slots": "*i64", "eps": "fp32"}
    constants = {"HALF": 64, "HEAD_DIM": 128, "DIM_PADDED": 128, "BLOCK_SIZE": 64, "BLOCK": 8}
    scales = dict.fromkeys(("key_scales", "value_scales"))
    compiled = compile_for(90, rope_triton.rope_and_write_kernel, pointers, 2, 3, **constants, **scales, PDL=True)
    assert "st.global.v4" in compiled.asm["ptx"]
    for cache in ("i8", "fp8e4nv"):
        pointers |= dict.fromkeys(scales, "*fp32") | dict.fromkeys(("key_cache", "value_cache"), f"*{cache}")
        compiled = compile_for(90, rope_triton.rope_and_write_kernel, pointers, 2, 3, **constants, PDL=True)
        assert "st.global.v4" in compiled.asm["ptx"]


def test_drawing_takes_few_registers_and_stays_out_of_memory(tmp_path: Path) -> None:
    pointers = {"logits": "*bf16", "temperatures": "*fp32", "scores": "*fp32"}
    pointers |= dict.fromkeys(("seeds", "positions", "drawn"), "*i64") | dict.fromkeys(("tokens", "counters"), "*i32")
    compiled = compile_for(
        90, gumbel_triton.draw_kernel, pointers, 4, 3, GOLDEN=GOLDEN, MIX_1=MIX_1, MIX_2=MIX_2, MOST=MOST,
        PART=gumbel_triton.PART, BLOCK=gumbel_triton.BLOCK, PARTS=64,
    )  # fmt: skip
    assert "ld.global.v4" in compiled.asm["ptx"]
    assert spilled_bytes(compiled, tmp_path) == 0


def test_angles_are_taken_far_from_zero(tmp_path: Path) -> None:
    pointers = {"positions": "*i32"} | dict.fromkeys(("frequencies", "cos", "sin"), "*fp32") | {"factor": "fp32"}
    compiled = compile_for(90, angles_triton.cos_and_sin_kernel, pointers, 1, 3, BLOCK=64)
    assert "cos.approx" not in compiled.asm["ptx"]  # wrong by 1e-2 at an angle of 1e5


def test_the_errors_of_all_columns_stay_in_registers(tmp_path: Path) -> None:
    pointers = dict.fromkeys(("columns", "factor", "scales", "zeros", "errors"), "*fp32")
    compiled = compile_for(
        90, round_columns_triton.round_columns_kernel, pointers | {"groups": "*i64", "codes": "*u8"}, 1, 3,
        MAX_CODE=15, COLUMNS=128, ROWS=32,
    )  # fmt: skip
    assert spilled_bytes(compiled, tmp_path) == 0
    assert "shfl" not in compiled.asm["ptx"]  # each thread sums what it has
