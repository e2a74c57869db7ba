"""What the Triton kernels compile to for GPUs that are not here: matrix instructions, and no registers spilled."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path
from typing import Any

import pytest

triton = pytest.importorskip("triton")
compiler = pytest.importorskip("triton.backends.compiler")

from llmq.runtime.kernels import attention_triton, gumbel_triton, norm_triton, rope_triton, wna16_triton  # noqa: E402
from llmq.runtime.kernels.gumbel import GOLDEN, MIX_1, MIX_2, MOST  # noqa: E402

MATRIX = {80: "mma.sync", 90: "wgmma.mma_async", 100: "tcgen05.mma"}


def compile_for(capability: int, kernel: Any, types: dict[str, str], warps: int, stages: int, **constants: Any) -> Any:
    """Compile with pointers and strides that are multiples of 16, as they are in a model."""
    signature = {name: "constexpr" if name in constants else types.get(name, "i32") for name in kernel.arg_names}
    source = triton.compiler.ASTSource(
        kernel,
        signature,
        {(kernel.arg_names.index(name),): value for name, value in constants.items()},
        {
            (index,): [["tt.divisibility", 16]]
            for index, name in enumerate(kernel.arg_names)
            if signature[name].startswith("*")
            or any(part in name for part in ("stride", "features", "hidden", "vocabulary"))
        },
    )
    target = compiler.GPUTarget("cuda", capability, 32)
    return triton.compile(source, target=target, options={"num_warps": warps, "num_stages": stages})


def spilled_bytes(compiled: Any, folder: Path) -> int:
    binary = folder / "kernel.cubin"
    binary.write_bytes(compiled.asm["cubin"])
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    report = subprocess.run([tool, "-res-usage", binary], capture_output=True, text=True, check=True).stdout
    found = re.search(r"STACK:(\d+)", report)
    assert found, report
    return int(found[1])


def attention(
    capability: int, head_dim: int, block_size: int, group: int, decode: bool, windowed: bool, *, capped: bool = False
) -> Any:
    launch = (attention_triton.decode_launch if decode else attention_triton.prefill_launch)(group, head_dim, 2)
    pointers = dict.fromkeys(("query", "key_cache", "value_cache", "out"), "*bf16")
    pointers |= dict.fromkeys(("block_tables", "query_starts", "kv_lengths"), "*i32")
    pointers |= dict.fromkeys(("means", "logsums"), "*fp32")
    return compile_for(
        capability, attention_triton.attention_kernel, pointers | {"scale": "fp32", "cap_scale": "fp32"},
        launch.warps, launch.stages,
        GROUP=group, HEAD_DIM=head_dim, DIM_PADDED=triton.next_power_of_2(head_dim), BLOCK_SIZE=block_size,
        WINDOWED=windowed, CAPPED=capped, SPLIT=256, DECODE=decode, BLOCK_M=launch.block_m, TILE=launch.tile,
    )  # fmt: skip


def wna16(capability: int, bits: int, rows: int, per_group: int, dtype: str) -> Any:
    launch = wna16_triton.launch_for(bits, rows, 2)
    pointers = dict.fromkeys(("x", "bias", "out"), f"*{dtype}") | {"words": "*i16", "meta": "*i32"}
    return compile_for(
        capability, wna16_triton.wna16_kernel, pointers | {"sums": "*fp32", "counters": "*i32"}, launch.warps, 3,
        WHOLE_STEPS=True, BITS=bits, PER_GROUP=per_group, BF16_SCALE=False, HAS_BIAS=True, SPLIT=True, REDUCED=False,
        ASM=True, BLOCK_M=launch.block_m, BLOCK_N=launch.block_n, STAGES=launch.stages,
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


@pytest.mark.parametrize("decode", [True, False])
def test_capped_attention_on_hopper(decode: bool, tmp_path: Path) -> None:
    compiled = attention(90, 256, 64, 2, decode, True, capped=True)
    assert ("mma.sync" if decode else MATRIX[90]) in compiled.asm["ptx"]
    assert spilled_bytes(compiled, tmp_path) == 0


@pytest.mark.parametrize(
    ("bits", "rows", "per_group", "dtype"),
    [(4, 1, 4, "bf16"), (4, 16, 4, "bf16"), (4, 64, 4, "bf16"), (4, 16, 1, "fp16"), (8, 1, 0, "bf16"),
     (8, 16, 2, "fp16"), (8, 64, 4, "bf16")],
)  # fmt: skip
def test_wna16_on_hopper(bits: int, rows: int, per_group: int, dtype: str, tmp_path: Path) -> None:
    compiled = wna16(90, bits, rows, per_group, dtype)
    assert (MATRIX[90] if rows > 8 else "mma.sync") in compiled.asm["ptx"]
    assert spilled_bytes(compiled, tmp_path) == 0


@pytest.mark.parametrize("capability", [80, 100])
def test_other_gpus(capability: int) -> None:
    assert MATRIX[capability] in attention(capability, 128, 64, 4, False, False).asm["ptx"]
    assert "mma.sync" in attention(capability, 128, 64, 4, True, False).asm["ptx"]
    assert "mma" in wna16(capability, 4, 16, 4, "bf16").asm["ptx"]


def test_the_small_kernels_move_16_bytes_at_a_time() -> None:
    pointers = dict.fromkeys(("residual", "x", "weight", "out"), "*bf16") | {"scales": "*fp32", "eps": "fp32"}
    kernel = norm_triton.add_rms_norm_kernel
    assert "st.global.v4" in compile_for(90, kernel, pointers, 8, 3, ADD=True, LARGEST=0.0, BLOCK=4096).asm["ptx"]
    pointers = dict.fromkeys(
        ("query", "key", "value", "query_norm", "key_norm", "out", "key_cache", "value_cache"), "*bf16"
    )
    pointers |= {"cos": "*fp32", "sin": "*fp32", "slots": "*i64", "eps": "fp32"}
    compiled = compile_for(
        90, rope_triton.rope_and_write_kernel, pointers, 2, 3,
        NORM=True, HALF=64, HALF_PADDED=64, REST=0, REST_PADDED=1, BLOCK_SIZE=64, BLOCK=8,
    )  # fmt: skip
    assert "st.global.v4" in compiled.asm["ptx"]


def test_drawing_takes_few_registers_and_stays_out_of_memory(tmp_path: Path) -> None:
    pointers = {"logits": "*bf16", "temperatures": "*fp32", "scores": "*fp32"}
    pointers |= dict.fromkeys(("seeds", "positions", "tokens"), "*i64")
    compiled = compile_for(
        90, gumbel_triton.draw_kernel, pointers, 4, 3, GOLDEN=GOLDEN, MIX_1=MIX_1, MIX_2=MIX_2, MOST=MOST,
        PART=gumbel_triton.PART, BLOCK=gumbel_triton.BLOCK,
    )  # fmt: skip
    assert "ld.global.v4" in compiled.asm["ptx"]
    assert spilled_bytes(compiled, tmp_path) == 0
