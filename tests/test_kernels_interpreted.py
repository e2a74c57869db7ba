"""The Triton kernels against their references, on a CPU, through Triton's interpreter.

The interpreter is chosen by an environment variable that Triton reads when it is imported. So, without it, this module
has one test, which runs the module again in a process that has it. The interpreter computes no bf16.
"""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

if os.environ.get("TRITON_INTERPRET") != "1":

    def test_the_kernels_agree_with_their_references() -> None:
        environment = os.environ | {"TRITON_INTERPRET": "1"}
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__]
        run = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        assert run.returncode == 0, run.stdout + run.stderr

else:
    from rounded_caches import empty_cache, rounded_caches
    from test_kernels_reference import Rows, draw_paged, draw_weight

    from llmq.runtime.kernels.angles import cos_and_sin, cos_and_sin_reference
    from llmq.runtime.kernels.attention import Fresh, paged_attention, paged_attention_reference
    from llmq.runtime.kernels.dense import CHANNELS, dense_matmul
    from llmq.runtime.kernels.embedding import embedding, embedding_reference
    from llmq.runtime.kernels.gelu import gelu_mul, gelu_mul_reference
    from llmq.runtime.kernels.grouped import GroupedWeight, grouped_matmul, grouped_matmul_reference
    from llmq.runtime.kernels.gumbel import draw_gumbel, draw_gumbel_reference
    from llmq.runtime.kernels.kv_write import read_pages
    from llmq.runtime.kernels.norm import add_rms_norm, add_rms_norm_quantize, add_rms_norm_reference
    from llmq.runtime.kernels.quantize_rows import LARGEST, QuantizedRows, quantize_rows, quantize_rows_reference
    from llmq.runtime.kernels.rope import rope_and_write, rope_and_write_reference
    from llmq.runtime.kernels.round_columns import round_columns, round_columns_reference
    from llmq.runtime.kernels.routing import (
        choose,
        choose_reference,
        combine,
        combine_reference,
        sort_by_expert,
        sort_by_expert_reference,
    )
    from llmq.runtime.kernels.silu import silu_mul, silu_mul_quantize, silu_mul_reference
    from llmq.runtime.kernels.w8a8 import pack_w8a8, w8a8_matmul, w8a8_matmul_reference
    from llmq.runtime.kernels.wna16 import pack_wna16, wna16_matmul, wna16_matmul_reference
    from llmq.scheme import E4M3, FP4, INT, NF4, Scheme

    TOLERANCE = {torch.float16: 4e-4, torch.float32: 1e-6}
    EDGES: Rows = [(1, kv) for kv in (1, 15, 16, 17, 33, 0)]
    MIXED: Rows = [(1, 17), (5, 18), (1, 0), (3, 3), (40, 70)]
    LONG: Rows = [(1, 300), (1, 128), (1, 129), (2, 200)]
    CHUNKS: Rows = [(100, 170), (1, 70), (66, 66)]  # more queries than one tile holds, before and after a page's end

    def draw_rows(tokens: int, width: int, number: str, dtype: torch.dtype) -> Tensor:
        """Random; for e4m3 of its numbers, up to the largest, as the interpreter rounds to it wrongly."""
        x = torch.randn(tokens, width)
        if number == E4M3:
            x = (x * 100).to(torch.float8_e4m3fn).float()
            x[:, 0] = LARGEST[number]
        return x.to(dtype)

    @pytest.mark.parametrize("dtype", TOLERANCE)
    @pytest.mark.parametrize("window", [None, 5, 40])
    @pytest.mark.parametrize(
        ("rows", "heads", "head_dim", "block_size"),
        [
            (EDGES, (4, 2), 16, 16),
            (MIXED, (4, 4), 32, 16),
            (MIXED, (7, 1), 80, 64),
            (LONG, (4, 2), 16, 64),
            (CHUNKS, (4, 1), 16, 48),
            (CHUNKS, (4, 2), 16, 64),
        ],
    )
    def test_attention(
        rows: Rows, heads: tuple[int, int], head_dim: int, block_size: int, window: int | None, dtype: torch.dtype
    ) -> None:
        torch.manual_seed(0)
        query, keys, values, *tables = draw_paged(rows, *heads, head_dim, block_size)
        narrow = [x.to(dtype) for x in (query, keys, values)]
        bounds = {"max_query_length": max(q for q, _ in rows), "max_kv_length": max(kv for _, kv in rows)}
        exact = paged_attention_reference(*(x.double() for x in narrow), *tables, window=window, **bounds)
        # Splits of a length that is given, or shared out by the bound, or by the longest row within a looser bound.
        longest = torch.tensor([bounds["max_kv_length"]], dtype=torch.int32)
        order = torch.tensor(sorted(range(len(rows)), key=lambda row: -rows[row][1]), dtype=torch.int32)
        loose = bounds | {"max_kv_length": 1024, "longest": longest, "order": order}
        for split in (bounds | {"split": 128}, loose) if dtype == torch.float32 else (bounds,):
            out = paged_attention(*narrow, *tables, window=window, **split)
            assert (out - exact).norm() <= TOLERANCE[dtype] * exact.norm()

    def test_attention_of_more_rows_than_are_searched_at_once() -> None:
        torch.manual_seed(0)
        query, keys, values, *tables = draw_paged([(1, 1)] * 130 + [(40, 50), (1, 2), (6, 9)], 4, 1, 16, 16)
        rest = {"window": None, "max_query_length": 40, "max_kv_length": 50}
        exact = paged_attention_reference(query, keys, values, *tables, **rest)
        out = paged_attention(query.float(), keys.float(), values.float(), *tables, **rest)
        assert (out - exact).norm() <= TOLERANCE[torch.float32] * exact.norm()

    def test_attention_of_rows_none_of_which_has_few_queries() -> None:
        torch.manual_seed(0)
        query, keys, values, *tables = draw_paged([(5, 70), (66, 66)], 4, 1, 16, 16)
        rest = {"window": None, "max_query_length": 66, "max_kv_length": 70}
        exact = paged_attention_reference(query, keys, values, *tables, **rest)
        for min_query_length in (4, 5):  # with and without the grid of rows of up to four
            narrow = (query.float(), keys.float(), values.float())
            out = paged_attention(*narrow, *tables, **rest, min_query_length=min_query_length)
            assert (out - exact).norm() <= TOLERANCE[torch.float32] * exact.norm()

    @pytest.mark.parametrize("dtype", TOLERANCE)
    @pytest.mark.parametrize("window", [None, 40])
    @pytest.mark.parametrize("rows", [MIXED, LONG, CHUNKS])
    @pytest.mark.parametrize(("scale", "softcap"), [(0.5, None), (0.5, 3.0), (None, 50.0)])
    def test_attention_of_scaled_and_capped_scores(
        scale: float | None, softcap: float | None, rows: Rows, window: int | None, dtype: torch.dtype
    ) -> None:
        torch.manual_seed(0)
        query, keys, values, *tables = draw_paged(rows, 4, 2, 16, 16)
        narrow = [x.to(dtype) for x in (query, keys, values)]
        rest = {"window": window, "scale": scale, "softcap": softcap}
        rest |= {"max_query_length": max(q for q, _ in rows), "max_kv_length": max(kv for _, kv in rows)}
        out = paged_attention(*narrow, *tables, **rest, split=128)
        exact = paged_attention_reference(*(x.double() for x in narrow), *tables, **rest)
        # What tanh loses near 0 is small against the cap, not against the score.
        assert (out - exact).norm() <= (TOLERANCE[dtype] + 1e-7 * (softcap or 0.0)) * exact.norm()

    @pytest.mark.parametrize("number", [INT, E4M3])
    @pytest.mark.parametrize(("rows", "window", "softcap"), [(EDGES, None, None), (MIXED, 5, None), (LONG, 40, 3.0),
                                                            (CHUNKS, None, 3.0), (CHUNKS, 40, None)])  # fmt: skip
    @pytest.mark.parametrize(
        ("heads", "head_dim", "block_size", "dtype"),
        [((4, 2), 16, 16, torch.float32), ((3, 1), 72, 64, torch.float16)],
    )
    def test_attention_over_8_bits(
        heads: tuple[int, int], head_dim: int, block_size: int, rows: Rows, window: int | None, softcap: float | None,
        number: str, dtype: torch.dtype,
    ) -> None:  # fmt: skip
        torch.manual_seed(0)
        query, keys, values, *tables = draw_paged(rows, *heads, head_dim, block_size)
        query = query.to(dtype)
        codes, scales, _ = rounded_caches((keys, values), number)
        rest = {"window": window, "softcap": softcap, "scales": scales}
        rest |= {"max_query_length": max(q for q, _ in rows), "max_kv_length": max(kv for _, kv in rows)}
        exact = paged_attention_reference(query.double(), *codes, *tables, **rest)
        out = paged_attention(query, *codes, *tables, **rest, split=128)
        assert (out - exact).norm() <= (TOLERANCE[dtype] + 1e-7 * (softcap or 0.0)) * exact.norm()

    def draw_kv(number: str, *shape: int) -> Tensor:
        """Random; for e4m3 multiples of its numbers, as the interpreter rounds to it wrongly."""
        x = torch.randn(*shape)
        return x if number == INT else (x * 40).to(torch.float8_e4m3fn).float() / 128

    DECODE: Rows = [(1, kv) for kv in (130, 64, 65, 1, 17)]

    @pytest.mark.parametrize(("window", "softcap"), [(None, None), (40, 3.0)])
    @pytest.mark.parametrize(
        ("rows", "heads", "head_dim", "rotated", "block_size", "number"),
        [
            (DECODE, (4, 2), 128, 128, 16, None),
            (DECODE, (9, 3), 80, 40, 64, None),
            (DECODE, (16, 1), 72, 72, 48, None),
            ([(1, 17), (5, 18), (3, 3)], (4, 2), 80, 80, 16, None),
            (DECODE, (4, 2), 16, 16, 16, INT),
            (DECODE, (9, 3), 20, 14, 64, E4M3),
        ],
    )
    def test_attention_that_writes_its_tokens(
        rows: Rows, heads: tuple[int, int], head_dim: int, rotated: int, block_size: int, number: str | None,
        window: int | None, softcap: float | None,
    ) -> None:  # fmt: skip
        torch.manual_seed(0)
        dtype = torch.float16 if number is None else torch.float32
        _, keys, values, tables, starts, lengths = draw_paged(rows, *heads, head_dim, block_size)
        caches, scales = [keys.to(dtype), values.to(dtype)], None
        if number is not None:
            caches, scales, _ = rounded_caches((keys, values), number)
        if number == E4M3:
            _, scales = empty_cache(number, 0, 1, 1, 1)  # those that draw_kv draws for
        tokens = int(starts[-1])
        fused = draw_kv(number or INT, tokens, heads[0] + 2 * heads[1], head_dim).to(dtype)
        query, key, value = fused.split([*heads, heads[1]], dim=1)
        angles = torch.randn(tokens, 1, rotated // 2)
        rotation, norms = (angles.cos(), angles.sin()), tuple(torch.randn(2, head_dim).to(dtype))
        if number == E4M3:  # turned by right angles, its numbers stay numbers of e4m3
            rotation, norms = (angles.sign().clamp(0), angles.sign().clamp(max=0)), None
        places = [(tables[row], kv - queries + i) for row, (queries, kv) in enumerate(rows) for i in range(queries)]
        slots = torch.tensor([int(table[at // block_size]) * block_size + at % block_size for table, at in places])
        fresh = Fresh(key, value, rotation, slots, norms, 1e-5)
        longest = max(kv for _, kv in rows)
        rest = {"window": window, "softcap": softcap, "max_query_length": max(queries for queries, _ in rows)}
        loose = rest | {"max_kv_length": 1024, "longest": torch.tensor([longest], dtype=torch.int32)}
        results = []
        for attention, bounds in (
            (paged_attention, loose),
            (paged_attention_reference, rest | {"max_kv_length": longest}),
        ):
            own, own_scales = [cache.clone() for cache in caches], None
            if scales is not None:
                own_scales = (scales[0].clone(), scales[1].clone())
            out = attention(query, *own, tables, starts, lengths, **bounds, scales=own_scales, fresh=fresh)
            kept = zip(own, own_scales or (None, None), strict=True)
            results.append((out, *(read_pages(*each, torch.arange(len(keys)), dtype) for each in kept)))
        for ours, theirs in zip(*results, strict=True):
            assert theirs.isnan().equal(ours.isnan())  # it is in the cache where no token is
            ours, theirs = ours.double().nan_to_num(), theirs.double().nan_to_num()
            # A norm summed in another order may make another code, a step off.
            tolerance = {None: 2 * TOLERANCE[torch.float16], INT: 1e-3, E4M3: 1e-5}[number]
            assert (ours - theirs).norm() <= tolerance * theirs.norm()

    @pytest.mark.parametrize("dtype", TOLERANCE)
    @pytest.mark.parametrize("bits", [4, 8])
    @pytest.mark.parametrize(
        ("batch", "shape", "group", "symmetric", "act_order"),
        [
            (1, (64, 256), 128, True, False),
            (3, (96, 1024), 128, False, False),  # splits, summed by the last program
            (17, (40, 1024), 128, True, True),  # splits, summed by a kernel of their own
            (5, (72, 160), 32, False, False),
            (9, (33, 192), 64, True, False),
            (40, (33, 200), -1, False, False),
            (70, (65, 1024), 64, False, False),  # two tiles of rows
            (260, (65, 130), -1, True, False),  # too many rows to fuse: widened, then multiplied
            (260, (64, 256), 64, False, True),
        ],
    )
    def test_wna16(
        batch: int, shape: tuple[int, int], group: int, symmetric: bool, act_order: bool, bits: int, dtype: torch.dtype
    ) -> None:
        torch.manual_seed(0)
        weight = draw_weight(shape, Scheme(bits, group, symmetric), act_order=act_order)
        packed = pack_wna16(weight, dtype)
        x, bias = torch.randn(batch, shape[1]).to(dtype), torch.randn(shape[0]).to(dtype)
        exact = wna16_matmul_reference(x.double(), packed, bias.double())
        assert (wna16_matmul(x, packed, bias) - exact).norm() <= TOLERANCE[dtype] * exact.norm()

    @pytest.mark.parametrize("dtype", TOLERANCE)
    @pytest.mark.parametrize(
        "scheme",
        [Scheme(3, 32, False), Scheme(5, 64), Scheme(8, 128, number=E4M3), Scheme(8, -1, number=E4M3),
         Scheme(4, 64, number=NF4), Scheme(4, 128, number=FP4)],
        ids=str,
    )  # fmt: skip
    @pytest.mark.parametrize("batch", [3, 260])
    def test_wna16_of_other_numbers(batch: int, scheme: Scheme, dtype: torch.dtype) -> None:
        torch.manual_seed(0)
        packed = pack_wna16(draw_weight((40, 256), scheme), dtype)
        x = torch.randn(batch, 256).to(dtype)
        exact = wna16_matmul_reference(x.double(), packed)
        assert (wna16_matmul(x, packed) - exact).norm() <= TOLERANCE[dtype] * exact.norm()

    @pytest.mark.parametrize("number", [INT, E4M3])
    @pytest.mark.parametrize(
        ("batch", "shape"),
        [
            (1, (48, 2048)),  # slices
            (13, (65, 1100)),
            (20, (40, 2048)),  # splits
            (70, (70, 300)),
            (70, (40, 8192)),  # splits of a long sum
            (260, (80, 304)),  # big tiles
            (260, (65, 300)),  # rows that the copy engine cannot address
        ],
    )
    def test_w8a8(batch: int, shape: tuple[int, int], number: str) -> None:
        torch.manual_seed(0)
        weight = pack_w8a8(draw_weight(shape, Scheme(8, -1, number=number, activation_bits=8)))
        x, bias = quantize_rows(draw_rows(batch, shape[1], number, torch.float32), number), torch.randn(shape[0])
        exact = w8a8_matmul_reference(x, weight, bias, torch.float64)
        assert (w8a8_matmul(x, weight, bias, torch.float32) - exact).norm() <= 1e-6 * exact.norm()

    @pytest.mark.parametrize(("experts", "per_token"), [(6, 3), (33, 8)])
    def test_choosing_experts_and_combining_their_answers(experts: int, per_token: int) -> None:
        torch.manual_seed(0)
        logits, answers = torch.randn(5, experts), torch.randn(5 * per_token, 70)
        for renormalized in (True, False):
            (weights, chosen), (exact, expected) = (
                each(logits, per_token, renormalized) for each in (choose, choose_reference)
            )
            assert chosen.equal(expected)
            torch.testing.assert_close(weights, exact)
            torch.testing.assert_close(combine(answers, weights), combine_reference(answers, weights))

    @pytest.mark.parametrize(("tokens", "experts", "per_token", "block_m"), [(1, 8, 2, 16), (700, 5, 3, 64)])
    def test_sorting_by_expert(tokens: int, experts: int, per_token: int, block_m: int) -> None:
        torch.manual_seed(0)
        chosen = torch.randint(0, experts, (tokens, per_token)).int()
        ours, theirs = (each(chosen, experts, block_m) for each in (sort_by_expert, sort_by_expert_reference))
        for part in ("order", "starts", "tile_experts", "tile_starts"):
            assert getattr(ours, part).equal(getattr(theirs, part))

    @pytest.mark.parametrize("gated", [True, False])
    @pytest.mark.parametrize(
        ("scheme", "shape", "block_m", "dtype"),
        [
            (None, (48, 200), 16, torch.float16),
            (None, (70, 256), 64, torch.float16),
            (None, (40, 256), 16, torch.float32),
            (Scheme(4, 128), (40, 256), 16, torch.float32),
            (Scheme(4, 128), (70, 256), 64, torch.float16),
            (Scheme(4, 32, False), (48, 160), 16, torch.float16),
            (Scheme(4, 64, number=NF4), (48, 192), 16, torch.float16),
            (Scheme(8, -1, False), (48, 200), 64, torch.float16),
            (Scheme(8, 128, number=E4M3), (48, 256), 16, torch.float16),
        ],
        ids=str,
    )
    def test_grouped(
        scheme: Scheme | None, shape: tuple[int, int], block_m: int, dtype: torch.dtype, gated: bool
    ) -> None:
        torch.manual_seed(0)
        tokens, experts, per_token = 20, 3, 2
        routing = sort_by_expert(choose(torch.randn(tokens, experts), per_token, True)[1], experts, block_m)
        x = torch.randn(tokens if gated else tokens * per_token, 2 * shape[1]).to(dtype)[:, : shape[1]]
        stacked = (experts * shape[0], shape[1])
        wide = torch.randn(stacked).to(dtype)
        weight: GroupedWeight = wide
        exact_weight: GroupedWeight = wide.double()
        if scheme is not None:
            weight = exact_weight = pack_wna16(draw_weight(stacked, scheme, act_order=scheme.group_size == 128), dtype)
        exact = grouped_matmul_reference(x.double(), exact_weight, routing, torch.float64, gated=gated)
        out = grouped_matmul(x, weight, routing, dtype, gated=gated)
        assert (out - exact).norm() <= (2 if gated else 1) * TOLERANCE[dtype] * exact.norm()

    @pytest.mark.parametrize("number", [INT, E4M3])
    @pytest.mark.parametrize("gated", [True, False])
    def test_grouped_products_of_8_bits(number: str, gated: bool) -> None:
        torch.manual_seed(0)
        routing = sort_by_expert(choose(torch.randn(20, 5), 2, True)[1], 5, 16)
        weight = pack_w8a8(draw_weight((5 * 70, 300), Scheme(8, -1, number=number, activation_bits=8)))
        x = quantize_rows(draw_rows(20 if gated else 40, 300, number, torch.float32), number)
        exact = grouped_matmul_reference(x, weight, routing, torch.float64, gated=gated)
        out = grouped_matmul(x, weight, routing, torch.float32, gated=gated)
        assert (out - exact).norm() <= 1e-6 * exact.norm()

    @pytest.mark.parametrize("dtype", TOLERANCE)
    @pytest.mark.parametrize("kind", ["narrow", "fp32"])
    @pytest.mark.parametrize("added", [True, False])
    @pytest.mark.parametrize("hidden", [64, 100])
    def test_add_rms_norm(hidden: int, added: bool, kind: str, dtype: torch.dtype) -> None:
        torch.manual_seed(0)
        residual, x, weight = (torch.randn(3, hidden).to(dtype), torch.randn(3, 2 * hidden).to(dtype)[:, :hidden],
                               torch.randn(hidden).to(dtype if kind == "narrow" else torch.float32))  # fmt: skip
        ours, theirs = residual.clone(), residual.clone()
        out = add_rms_norm(ours, x if added else None, weight, 1e-5)
        expected = add_rms_norm_reference(theirs, x if added else None, weight, 1e-5)
        assert ours.equal(theirs)
        assert (out - expected).norm() <= TOLERANCE[dtype] * expected.norm()

    @pytest.mark.parametrize("dtype", TOLERANCE)
    def test_silu_mul(dtype: torch.dtype) -> None:
        gate, up = torch.randn(3, 2 * 1100).to(dtype).chunk(2, dim=1)
        expected = silu_mul_reference(gate, up)
        assert (silu_mul(gate, up) - expected).norm() <= TOLERANCE[dtype] * expected.norm()

    @pytest.mark.parametrize("dtype", TOLERANCE)
    def test_gelu_mul(dtype: torch.dtype) -> None:
        gate, up = torch.randn(3, 2 * 1100).to(dtype).chunk(2, dim=1)
        expected = gelu_mul_reference(gate, up)
        assert (gelu_mul(gate, up) - expected).norm() <= TOLERANCE[dtype] * expected.norm()

    @pytest.mark.parametrize("dtype", TOLERANCE)
    @pytest.mark.parametrize("normed", [None, "narrow", "fp32"])
    @pytest.mark.parametrize(
        ("heads", "kv_heads", "head_dim", "rotated"), [(4, 2, 16, 16), (9, 3, 20, 20), (9, 3, 20, 14), (4, 2, 16, 8)]
    )
    def test_rope_and_write(
        heads: int, kv_heads: int, head_dim: int, rotated: int, normed: str | None, dtype: torch.dtype
    ) -> None:
        torch.manual_seed(0)
        fused = torch.randn(4, heads + 2 * kv_heads, head_dim).to(dtype)
        parts = fused.split([heads, kv_heads, kv_heads], dim=1)
        angles = torch.randn(4, 1, rotated // 2)
        norms = tuple(torch.randn(2, head_dim).to(dtype if normed == "narrow" else torch.float32)) if normed else None
        slots = torch.tensor([3, 17, 4, 47])
        ours, theirs = torch.zeros(2, 3, 2, 16, kv_heads, head_dim, dtype=dtype)
        rotation = (angles.cos(), angles.sin())
        out = rope_and_write(*parts, rotation, ours[:, 0], ours[:, 1], slots, norms=norms, eps=1e-5)
        expected = rope_and_write_reference(*parts, rotation, theirs[:, 0], theirs[:, 1], slots, norms=norms, eps=1e-5)
        assert (out - expected).norm() <= TOLERANCE[dtype] * expected.norm()
        assert (ours - theirs).norm() <= TOLERANCE[dtype] * theirs.norm()

    @pytest.mark.parametrize("number", [INT, E4M3])
    @pytest.mark.parametrize("rotated", [20, 14])
    @pytest.mark.parametrize("normed", [True, False])
    def test_rope_and_write_in_8_bits(normed: bool, rotated: int, number: str) -> None:
        torch.manual_seed(0)
        parts = draw_kv(number, 4, 15, 20).split([9, 3, 3], dim=1)
        # Turned by right angles, numbers of e4m3 stay numbers of e4m3.
        quarters = torch.randint(0, 4, (4, 1, rotated // 2)) if number == E4M3 else torch.randn(4, 1, rotated // 2)
        angles = quarters * torch.pi / 2
        rotation = (angles.cos().round(), angles.sin().round()) if number == E4M3 else (angles.cos(), angles.sin())
        norms = (torch.ones(20), torch.ones(20)) if normed and number == INT else None
        slots = torch.tensor([3, 17, 4, 47])
        written = []
        for write in (rope_and_write, rope_and_write_reference):
            cache, scales = empty_cache(number, 3, 16, 3, 20)
            out = write(*parts, rotation, *cache, slots, norms=norms, eps=1e-5, scales=scales)
            kept = zip(cache, scales, strict=True)
            written.append((out, *(read_pages(*each, torch.arange(3), torch.float32) for each in kept)))
        for ours, theirs in zip(*written, strict=True):
            # A sum in another order may make another code, a step off.
            assert (ours - theirs).norm() <= (1e-2 if normed else 1e-6) * theirs.norm()

    @pytest.mark.parametrize("number", [None, INT, E4M3])
    @pytest.mark.parametrize(("kv_heads", "head_dim"), [(2, 16), (3, 20)])
    def test_rope_and_write_of_tokens_that_do_not_turn_stores_the_same_bits(
        kv_heads: int, head_dim: int, number: str | None
    ) -> None:
        torch.manual_seed(0)
        parts = draw_kv(number or INT, 5, 3 * kv_heads, head_dim).chunk(3, dim=1)
        turn = torch.ones(5, 1, head_dim // 2)
        slots = torch.tensor([3, 17, 4, 47, 16])
        written = []
        for write in (rope_and_write, rope_and_write_reference):
            cache, scales = empty_cache(number or INT, 3, 16, kv_heads, head_dim)
            if number is None:
                cache, scales = torch.zeros(3, 2, 16, kv_heads, head_dim).movedim(1, 0), None
            write(*parts, (turn, 0 * turn), cache[0], cache[1], slots, scales=scales)
            written.append((cache.contiguous().view(torch.uint8), *(scales or ())))
        assert all(ours.equal(theirs) for ours, theirs in zip(*written, strict=True))

    def same_rows(ours: QuantizedRows, theirs: QuantizedRows) -> bool:
        return ours.scales.equal(theirs.scales) and ours.codes.view(torch.uint8).equal(theirs.codes.view(torch.uint8))

    @pytest.mark.parametrize("dtype", TOLERANCE)
    @pytest.mark.parametrize("number", [INT, E4M3])
    def test_quantize_rows(number: str, dtype: torch.dtype) -> None:
        torch.manual_seed(0)
        x = draw_rows(100, 200, number, dtype)[:, :150]  # enough for ties in half precision
        x[2] = 0
        assert same_rows(quantize_rows(x, number), quantize_rows_reference(x, number))

    @pytest.mark.parametrize("number", [INT, E4M3])
    def test_the_fused_kernels_quantize_what_the_others_return(number: str) -> None:
        torch.manual_seed(0)
        residual, x, weight = torch.randn(3, 100).half(), torch.randn(3, 100).half(), torch.randn(100).half()
        total = residual.clone()
        normed = quantize_rows(add_rms_norm(total, x, weight, 1e-5), number)
        assert same_rows(add_rms_norm_quantize(residual, x, weight, 1e-5, number), normed)
        assert residual.equal(total)
        gate, up = torch.randn(3, 2 * 1100).half().chunk(2, dim=1)
        assert same_rows(silu_mul_quantize(gate, up, number), quantize_rows(silu_mul(gate, up), number))

    @pytest.mark.parametrize(("count", "out"), [(128, 40), (37, 32), (1, 5)])
    def test_round_columns(count: int, out: int) -> None:
        torch.manual_seed(0)
        columns, factor = torch.randn(count, out), torch.randn(count, count).triu().mul_(0.05)
        factor.diagonal().abs_().add_(1)
        scales, zeros = torch.rand(3, out).add_(0.2), torch.randint(0, 15, (3, out)).float()
        groups = torch.arange(count) % 3
        codes, errors = round_columns(columns, factor, scales, zeros, groups, 15)
        expected_codes, expected_errors = round_columns_reference(columns, factor, scales, zeros, groups, 15)
        same = (codes == expected_codes).all(0)  # of a row with a tie, all that follows differs
        assert same.float().mean() > 0.9
        assert (errors - expected_errors)[:, same].norm() <= 1e-5 * expected_errors.norm()

    @pytest.mark.parametrize("vocabulary", [5, 1024, 9000])
    def test_draw_gumbel(vocabulary: int) -> None:
        generator = torch.Generator().manual_seed(0)
        logits = torch.randn(6, vocabulary, generator=generator) * 3
        logits[1, :] = 1.0  # of equals the first
        logits[2, 3:] = -torch.inf
        temperatures = torch.tensor([0.0, 0.0, 1.0, 0.6, 5.0, 1.0])
        seeds = torch.tensor([0, 1, 2**62, 3, 4, 2**40])
        positions = torch.tensor([0, 1, 2, 2**20, 4, 5])
        for narrow in (logits, logits.half()):
            expected = draw_gumbel_reference(narrow, temperatures, seeds, positions)
            assert draw_gumbel(narrow, temperatures, seeds, positions).equal(expected)

    @pytest.mark.parametrize("scale", [1.0, 7.3])
    @pytest.mark.parametrize("dtype", TOLERANCE)
    def test_embedding(dtype: torch.dtype, scale: float) -> None:
        weight = torch.randn(50, 1500).to(dtype)
        token_ids = torch.tensor([49, 0, 7, 7], dtype=torch.int32)
        assert embedding(token_ids, weight, scale).equal(embedding_reference(token_ids, weight, scale))

    @pytest.mark.parametrize("factor", [1.0, 1.5])
    def test_cos_and_sin(factor: float) -> None:
        positions, frequencies = torch.tensor([0, 1, 100_000], dtype=torch.int32), torch.rand(48)
        for ours, expected in zip(
            cos_and_sin(positions, frequencies, factor),
            cos_and_sin_reference(positions, frequencies, factor),
            strict=True,
        ):
            torch.testing.assert_close(ours, expected, rtol=1e-5, atol=2e-5)

    @pytest.mark.parametrize(
        ("rows", "shape"),
        [
            (1, (40, 256)),
            (5, (100, 2048)),  # splits
            (17, (64, 1280)),
            (20, (70, 2048)),  # splits of narrow tiles
            (32, (2081, 256)),
            (3, (8500, 256)),  # wide
        ],
    )
    def test_dense(rows: int, shape: tuple[int, int]) -> None:
        torch.manual_seed(0)
        x, weight, bias = (
            torch.randn(rows, 2 * shape[1]).half()[:, : shape[1]],
            *(torch.randn(size).half() for size in (shape, shape[:1])),
        )
        assert shape[1] % CHANNELS == 0
        exact = x.double() @ weight.double().t() + bias.double()
        assert (dense_matmul(x, weight, bias) - exact).norm() <= TOLERANCE[torch.float16] * exact.norm()
