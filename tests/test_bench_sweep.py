"""Where the knee is, what two reports have to have in common, and products against the roofline."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from command_line import llmq
from tiny_models import save_tiny

from llmq.bench import nvml
from llmq.bench.diff import ALIKE, Change, diff
from llmq.bench.environment import commit, setting
from llmq.bench.kernels import Product, Roofline, layer_shapes, measure_roofline
from llmq.bench.sweep import batch_knee, rate_knee
from llmq.checkpoint.config import read_config
from llmq.errors import CHECK_FAILED, FAILED, USAGE, LlmqError


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("tiny"))


# Sweep


@pytest.mark.parametrize(
    ("speeds", "knee"),
    [
        ([(1, 100), (2, 200), (4, 390)], 4),
        ([(1, 100), (2, 200), (4, 299)], 2),  # two more bring 99, less than half of 100 each
        ([(1, 100), (2, 149)], 1),
        ([(8, 80), (16, 120), (32, 130)], 16),  # 8 more bring 40: half of the 10 that each of the first has
        ([(1, 100), (2, 120), (4, 400)], 1),  # whatever comes after
    ],
)
def test_the_knee_of_batches_is_where_a_sequence_brings_half_of_what_one_alone_does(
    speeds: list[tuple[int, float]], knee: int
) -> None:
    assert batch_knee(speeds) == knee


@pytest.mark.parametrize(
    ("cells", "knee"),
    [
        ([(1, 1.0, 0), (2, 1.95, 0), (4, 3.0, 0)], 2),
        ([(1, 1.0, 0), (2, 2.0, 1), (4, 4.0, 0)], 1),  # a failure is no success, however fast
        ([(1, 0.9, 0), (2, 2.0, 0)], None),
        ([(1, None, 0)], None),
    ],
)
def test_the_knee_of_rates_is_the_last_that_is_kept_up_with(cells: list[Any], knee: float | None) -> None:
    assert rate_knee(cells) == knee


def test_a_sweep_of_batches_measures_each_with_fresh_prompts(tiny: Path, tmp_path: Path) -> None:
    flags = ("--batch-sizes", "4,1,2", "--input-len", 20, "--output-len", 4, "--block-size", 16, "--device", "cpu")
    plot = tmp_path / "sweep.png"
    result = llmq("bench", "sweep", tiny, *flags, "--plot", plot, "--json")
    report = json.loads(result.out)
    assert result.code == 0, result.err
    assert [cell["batch_size"] for cell in report["cells"]] == [1, 2, 4]
    assert [cell["total_output_tokens"] for cell in report["cells"]] == [4, 8, 16]
    assert [cell["cached_tokens"] for cell in report["cells"]] == [0, 0, 0]
    assert report["knee"] == batch_knee([(cell["batch_size"], cell["output_throughput"]) for cell in report["cells"]])
    assert plot.read_bytes().startswith(b"\x89PNG")


def test_the_table_says_what_the_knee_is(tiny: Path) -> None:
    printed = llmq("bench", "sweep", tiny, "--batch-sizes", "1,2", "--input-len", 4, "--output-len", 2).out
    assert printed.startswith("knee: batch ")
    assert "50% of the tokens/s" in printed
    assert max(map(len, printed.splitlines())) <= 100


@pytest.mark.parametrize("sizes", ["1", "0,1", "one,two", "1,2.5"])
def test_fewer_than_two_loads_are_no_sweep(tiny: Path, sizes: str) -> None:
    assert llmq("bench", "sweep", tiny, "--batch-sizes", sizes).code == USAGE


def test_a_plot_without_matplotlib_is_refused_before_anything_is_measured(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("llmq.cli.options.find_spec", lambda name: None)
    result = llmq("bench", "sweep", tiny, "--plot", tmp_path / "sweep.png")
    assert (result.code, result.out) == (FAILED, "")
    assert "llmq[plots]" in result.err


# Diff


def written(path: Path, /, **fields: Any) -> Path:
    report = {"schema": "llmq.bench.serve/1", "device_name": "card", "num_prompts": 4, "model_id": "a"}
    path.write_text(json.dumps({**report, **fields}))
    return path


def test_figures_are_told_as_the_second_over_the_first(tmp_path: Path) -> None:
    a = written(tmp_path / "a.json", output_throughput=100.0, p99_ttft_ms=50.0, errors=[])
    b = written(tmp_path / "b.json", output_throughput=150.0, p99_ttft_ms=60.0, errors=[], model_id="b")
    found = diff(a, b)
    assert found.about == (("model_id", "a", "b"),)
    assert [(one.name, one.ratio, one.better) for one in found.changes] == [
        ("output_throughput", 1.5, True),
        ("p99_ttft_ms", 1.2, False),
    ]


@pytest.mark.parametrize("field", ALIKE)
def test_unlike_runs_are_refused_and_the_field_is_named(tmp_path: Path, field: str) -> None:
    other = "llmq.bench.latency/1" if field == "schema" else 5
    result = llmq("bench", "diff", written(tmp_path / "a.json"), written(tmp_path / "b.json", **{field: other}))
    assert (result.code, result.out) == (CHECK_FAILED, "")
    assert f"not alike: {field} is " in result.err


def test_cells_of_a_sweep_are_compared_load_by_load(tmp_path: Path) -> None:
    a, b = (
        written(
            tmp_path / f"{name}.json",
            axis="batch_size",
            cells=[{"batch_size": size, "output_throughput": speed} for size, speed in cells],
        )
        for name, cells in (("a", [(1, 10.0), (2, 20.0)]), ("b", [(2, 30.0), (4, 40.0)]))
    )
    assert diff(a, b).changes == (Change("output_throughput", 20.0, 30.0, "batch_size 2"),)


@pytest.mark.parametrize(
    ("part", "known_by", "name"),
    [
        ("schemes", {"scheme": "w8a8"}, "scheme w8a8"),
        ("ways", {"way": "static"}, "way static"),
        ("products", {"layer": "o_proj", "scheme": "fp8", "rows": 16}, "layer o_proj scheme fp8 rows 16"),
    ],
)
def test_parts_of_other_reports_are_compared_by_what_they_are_known_by(
    tmp_path: Path, part: str, known_by: dict[str, Any], name: str
) -> None:
    a, b = (written(tmp_path / f"{speed}.json", **{part: [{**known_by, "gb_per_s": speed}]}) for speed in (10.0, 20.0))
    assert diff(a, b).changes == (Change("gb_per_s", 10.0, 20.0, name),)


def test_figures_by_batch_size_are_compared_one_by_one(tmp_path: Path) -> None:
    a, b = (
        written(tmp_path / f"{name}.json", decode_throughput=speeds)
        for name, speeds in (("a", {"1": 10.0, "2": 20.0}), ("b", {"2": 30.0, "4": 40.0}))
    )
    assert diff(a, b).changes == (Change("decode_throughput 2", 20.0, 30.0),)


def test_a_real_report_has_no_difference_from_itself(tiny: Path, tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    flags = ("--num-prompts", 2, "--input-len", 4, "--output-len", 2, "-o", path)
    assert llmq("bench", "throughput", tiny, *flags).code == 0
    found = json.loads(llmq("bench", "diff", path, path, "--json").out)
    assert found["differs"] == {}
    assert {"output_throughput", "p99_ttft_ms"} <= {one["figure"] for one in found["figures"]}
    assert {one["ratio"] for one in found["figures"]} <= {1.0, None}


@pytest.mark.parametrize("content", ["{", "[]", '{"schema": "llmq.memplan/1"}'])
def test_what_is_no_report_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / "a.json").write_text(content)
    with pytest.raises(LlmqError):
        diff(tmp_path / "a.json", tmp_path / "a.json")
    assert llmq("bench", "diff", tmp_path / "none.json", tmp_path / "a.json").code == FAILED


# Kernels


def test_the_layers_are_those_of_a_block_that_the_engine_runs(tiny: Path) -> None:
    """Query, key and value in one product, gate and up in another: 128 wide, 4 and 2 heads of 32, 256 inside."""
    shapes = {(128 + 2 * 64, 128), (128, 128), (2 * 256, 128), (128, 256)}
    assert set(layer_shapes(read_config(tiny)).values()) == shapes


def test_a_product_at_the_roofline_has_a_share_of_one() -> None:
    product = Product("down", (512, 256), "16bit", 8, seconds=2e-6, bytes=4000, floor=1e-6)
    assert product.share == 0.5
    assert product.bandwidth == pytest.approx(2e9)
    assert product.rate == pytest.approx(2 * 8 * 512 * 256 / 2e-6)


def test_the_roofline_is_measured_here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llmq.bench.kernels.LARGE", {"cpu": (2**20, 64)})
    roofline = measure_roofline("cpu", torch.float32)
    assert isinstance(roofline, Roofline)
    assert min(roofline.bandwidth, *roofline.rates.values()) > 0


def test_every_layer_scheme_and_number_of_rows_has_a_line(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llmq.bench.kernels.LARGE", {"cpu": (2**20, 64)})
    monkeypatch.setattr("llmq.bench.kernels.MOST", 2)
    flags = ("--schemes", "16bit,w4a16,w8a8", "--rows", "1,3", "--device", "cpu")
    report = json.loads(llmq("bench", "kernels", tiny, *flags, "--json").out)
    assert len(report["products"]) == 4 * 3 * 2
    assert {product["scheme"] for product in report["products"]} == {"16bit", "w4a16", "w8a8"}
    assert all(product["share_of_roofline"] > 0 for product in report["products"])
    printed = llmq("bench", "kernels", tiny, *flags).out
    assert max(map(len, printed.splitlines()[1:])) <= 100


@pytest.mark.gpu
def test_products_on_a_card_stay_below_the_roofline(tiny: Path) -> None:
    flags = ("--schemes", "16bit,w4a16,w8a8,fp8", "--rows", "1,64", "--device", "cuda", "--json")
    report = json.loads(llmq("bench", "kernels", tiny, *flags).out)
    assert len(report["products"]) == 4 * 4 * 2
    assert all(0 < product["share_of_roofline"] < 1 for product in report["products"])


@pytest.mark.parametrize("flags", [("--schemes", "w5a5"), ("--rows", "0"), ("--rows", "1.5"), ("--rows", "many")])
def test_products_that_are_none_are_usage_errors(tiny: Path, flags: tuple[str, ...]) -> None:
    assert llmq("bench", "kernels", tiny, *flags).code == USAGE


# What stands beside every figure


def test_a_measurement_says_on_what_it_was_made() -> None:
    found = setting("a processor", None)
    assert {"llmq", "commit", "python", "torch", "device_name", "driver", "sm_clock_mhz", "date"} <= set(found)
    assert (found["device_name"], found["driver"], found["power_limit_w"]) == ("a processor", None, None)


def test_a_checkout_names_its_commit() -> None:
    if not (Path(__file__).parents[1] / ".git").exists():
        pytest.skip("not a git checkout")
    assert (commit() or "").rstrip("+").isalnum()


def test_energy_is_what_the_cards_counter_grew_by() -> None:
    card: Any = SimpleNamespace(joules=1000.0)
    meter = nvml.start_meter(card)
    card.joules = 1012.5
    assert meter.joules == 12.5
    card.joules = None
    assert meter.joules is None
    assert nvml.start_meter(None).joules is None


def test_without_a_driver_there_is_no_card(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nvml, "LIBRARY", "libnone.so")
    assert nvml.open_card() is None
    assert nvml.card_of("cpu") is None


@pytest.mark.gpu
def test_a_card_tells_its_energy_and_clocks() -> None:
    card = nvml.card_of("cuda")
    assert card is not None
    before = card.joules
    a = torch.randn(8192, 8192, device="cuda")
    for _ in range(200):
        a @ a
    torch.cuda.synchronize()
    assert before is not None
    assert (card.joules or 0) > before
    assert (card.sm_clock or 0) > 0
    assert (card.power_limit or 0) > 0
