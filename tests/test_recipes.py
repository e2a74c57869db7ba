"""Recipes: flags of `llmq quantize` in a file, checked, found by name, kept with what they made, and made from those of
llm-compressor."""

from __future__ import annotations

import hashlib
import inspect
import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest
import yaml
from command_line import llmq
from compressed_tensors.quantization import QuantizationArgs, preset_name_to_scheme
from hypothesis import given
from hypothesis import strategies as st
from tiny_models import save_tiny

from llmq.checkpoint.config import read_config
from llmq.checkpoint.folder import DEMO, resolve
from llmq.checkpoint.formats import open_format
from llmq.checkpoint.tokenizer import load_tokenizer
from llmq.cli.quantize import quantize as command
from llmq.errors import LlmqError
from llmq.evals.divergence import predict, window_divergences
from llmq.evals.held_out import held_out
from llmq.evals.perplexity import cut
from llmq.quant import llm_compressor
from llmq.quant.methods.gptq import DAMP_PERCENT
from llmq.quant.options import WEIGHT_SCHEMES, QuantizeOptions, Rule
from llmq.quant.recipe import RECIPE, Recipe, read_recipe, shipped_recipes
from llmq.quant.schemes import choose
from llmq.scheme import Scheme

REPOSITORY = Path(__file__).parents[1]
NAMES = (
    "fp8", "mixed-3-4-8", "w4a16-autoround", "w4a16-awq", "w4a16-gptq", "w4a16-rtn", "w8a8-smoothquant",
)  # fmt: skip
WRITTEN_BY_LLM_COMPRESSOR = sorted((Path(__file__).parent / "fixtures" / "llmcompressor").glob("*/config.json"))


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text("".join(f"{number:03x}, " for number in range(1000)))
    return path


def written(folder: Path, content: Any) -> Path:
    path = folder / "recipe.yaml"
    path.write_text(content if isinstance(content, str) else yaml.safe_dump(content))
    return path


def refusal(folder: Path, content: Any) -> LlmqError:
    with pytest.raises(LlmqError) as caught:
        read_recipe(str(written(folder, content)))
    assert caught.value.hint
    return caught.value


def options_of(recipe: Recipe) -> QuantizeOptions:
    """What the command line makes of the flags that concern layers."""
    choice = choose(
        recipe.scheme or "w4a16", recipe.method, recipe.format,
        bits=recipe.bits, group_size=recipe.group_size, symmetric=recipe.sym,
    )  # fmt: skip
    rules = [*map(Rule.parse, recipe.override or ()), *(Rule(name, None) for name in recipe.ignore or ())]
    return QuantizeOptions(choice, rules=tuple(rules))


def scheme_of(options: QuantizeOptions, layer: str) -> Scheme | None:
    scheme: Scheme | None = options.choice.scheme
    for rule in options.rules:
        if rule.covers(layer):
            scheme = rule.scheme
    return scheme


# Recipes that come with llmq


def test_the_recipes_of_the_issue_are_there() -> None:
    assert tuple(shipped_recipes()) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_a_shipped_recipe_says_what_it_is_for_and_quantizes(tmp_path: Path, tiny: Path, text: Path, name: str) -> None:
    listed = json.loads(llmq("recipe", "list", "--json").out)["recipes"]
    assert next(recipe["about"] for recipe in listed if recipe["name"] == name)
    small = ("--calib-data", text, "--calib-samples", 4, "--calib-seqlen", 64, "--device", "cpu")
    done = llmq("quantize", tiny, "-o", tmp_path / "out", "--recipe", name, *small, "--json")
    assert done.code == 0, done.err
    report, recipe = json.loads(done.out), read_recipe(name)
    assert (report["method"], report["scheme"]) == (recipe.method, str(options_of(recipe).choice.scheme))
    assert not [warning for warning in report["warnings"] if "cannot load" in warning]
    assert {layer["scheme"] for layer in report["layers"]} == {
        str(scheme_of(options_of(recipe), layer["name"])) for layer in report["layers"]
    }


def test_the_mixed_recipe_has_a_scheme_for_the_fused_layers_of_phi_3_too(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "phi3", "phi3", pad_token_id=0)
    text = tmp_path / "text.txt"
    text.write_text("0123456789 " * 200)
    small = ("--calib-data", text, "--calib-samples", 2, "--calib-seqlen", 32, "--device", "cpu")
    done = llmq("quantize", folder, "-o", tmp_path / "out", "--recipe", "mixed-3-4-8", *small, "--json")
    assert done.code == 0, done.err
    assert {layer["scheme"][:4] for layer in json.loads(done.out)["layers"]} == {"int3", "int4", "int8"}


@pytest.mark.slow
def test_the_mixed_recipe_is_closer_to_the_original_than_3_bits_that_take_as_many(tmp_path: Path) -> None:
    """KL from demo on held-out text, from 8 windows of 512 tokens: against groups of 32, which take 3.50 bits."""
    token_ids = load_tokenizer(resolve(DEMO)).encode(held_out().text)
    windows = [list(window) for window in cut(token_ids, 512)][:16]
    original = predict(resolve(DEMO), windows)
    bits, kl = {}, {}
    runs = {"mixed": ["--recipe", "mixed-3-4-8"], "uniform": ["--scheme", "w3a16", "--group-size", 32]}
    for name, flags in runs.items():
        small = ("--calib-samples", 8, "--calib-seqlen", 512, "--device", "cpu", "--json")
        done = llmq("quantize", DEMO, "-o", tmp_path / name, *flags, *small)
        assert done.code == 0, done.err
        bits[name] = json.loads(done.out)["effective_bits"]
        kl[name] = fmean(window_divergences(original, predict(tmp_path / name, windows)))
    assert bits["mixed"] < bits["uniform"]
    assert kl["mixed"] < kl["uniform"]


@pytest.mark.slow
def test_a_wheel_has_the_recipes(tmp_path: Path) -> None:
    source = tmp_path / "source"  # building writes beside the sources
    for name in ("src", "recipes"):
        shutil.copytree(REPOSITORY / name, source / name, symlinks=True)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(REPOSITORY / name, source / name)
    pip = [sys.executable, "-m", "pip"]
    offline = ["--no-deps", "--no-index", "--no-build-isolation", "--quiet"]
    subprocess.run([*pip, "wheel", *offline, "--wheel-dir", str(tmp_path), str(source)], check=True)
    (wheel,) = tmp_path.glob("*.whl")
    assert {f"llmq/recipes/{name}.yaml" for name in NAMES} <= set(zipfile.ZipFile(wheel).namelist())
    site = tmp_path / "site"
    subprocess.run([*pip, "install", *offline, "--target", str(site), str(wheel)], check=True)
    environment = os.environ | {"PYTHONPATH": str(site)}
    program = "from llmq.quant.recipe import shipped_recipes; print(*shipped_recipes())"
    shown = subprocess.run([sys.executable, "-c", program], env=environment, cwd=tmp_path, capture_output=True)
    assert shown.stdout.decode().split() == list(NAMES)


# What a recipe may say


def test_every_key_is_a_flag_of_quantize() -> None:
    assert set(Recipe.model_fields) <= set(inspect.signature(command).parameters)


def test_a_flag_wins_over_the_recipe_and_the_recipe_over_the_default(tmp_path: Path, tiny: Path) -> None:
    recipe = written(tmp_path, {"method": "rtn", "bits": 8, "group-size": 64, "sym": False, "ignore": ["v_proj"]})
    done = llmq("quantize", tiny, "-o", tmp_path / "out", "--recipe", recipe, "--bits", 3, "--json")
    assert done.code == 0, done.err
    report = json.loads(done.out)
    assert (report["method"], report["scheme"]) == ("rtn", "int3 g64 asym")
    assert not [layer["name"] for layer in report["layers"] if "v_proj" in layer["name"]]


def test_of_overrides_that_cover_a_layer_the_last_counts_though_its_pattern_came_before(
    tmp_path: Path, tiny: Path
) -> None:
    rules = ("down_proj=w8a16", "re:.*=int4 g64 sym", "down_proj=none")
    flags = [part for rule in rules for part in ("--override", rule)]
    done = llmq("quantize", tiny, "-o", tmp_path / "out", "--method", "rtn", *flags, "--json")
    assert done.code == 0, done.err
    assert {name.rpartition(".")[2] for name in json.loads(done.out)["left_out"]} == {"down_proj"}


def test_flags_come_in_any_order(tmp_path: Path, tiny: Path) -> None:
    recipe = written(tmp_path, {"method": "rtn", "bits": 8})
    done = llmq("quantize", tiny, "-o", tmp_path / "out", "--bits", 3, "--recipe", recipe, "--json")
    assert json.loads(done.out)["scheme"] == "int3 g128 sym"


@pytest.mark.parametrize(
    ("content", "message", "hint"),
    [
        ({"grup-size": 64}, "no key 'grup-size'", "did you mean group-size?"),
        ({"group_size": 64}, "no key 'group_size'", "did you mean group-size?"),
        ({"xyzzy": 1}, "no key 'xyzzy'", "there are scheme, method"),
        ({"bits": "four"}, "bits is 'four'", "valid integer"),
        ({"sym": 1}, "sym is 1", "valid boolean"),
        ({"ignore": "lm_head"}, "ignore is 'lm_head'", "valid list"),
        ({"alpha": "some"}, "alpha is 'some'", "it should be"),
        ("- scheme\n- method\n", "not a mapping", "llmq recipe show"),
        ("just text", "not a mapping", "llmq recipe show"),
        ("", "not a mapping", "llmq recipe show"),
        ("scheme: [", "not YAML", "llmq recipe show"),
        ("[" * 10_000, "not YAML", "llmq recipe show"),
    ],
)
def test_a_recipe_that_is_not_understood(tmp_path: Path, content: Any, message: str, hint: str) -> None:
    error = refusal(tmp_path, content)
    assert message in error.message
    assert hint in str(error.hint)


def test_a_recipe_that_does_not_exist_is_answered_with_those_that_do(tmp_path: Path, tiny: Path) -> None:
    done = llmq("quantize", tiny, "-o", tmp_path / "out", "--recipe", "w4a16-gtpq")
    assert done.code == 2
    assert "there is no recipe 'w4a16-gtpq'" in done.err
    assert "did you mean w4a16-gptq?" in done.err
    assert all(name in done.err for name in NAMES)
    assert not (tmp_path / "out").exists()


def test_a_typo_in_a_recipe_ends_the_run_before_it_begins(tmp_path: Path, tiny: Path) -> None:
    done = llmq("quantize", tiny, "-o", tmp_path / "out", "--recipe", written(tmp_path, {"metod": "rtn"}))
    assert done.code == 2
    assert [line.split(":")[0] for line in done.err.splitlines()] == ["error", "hint"]
    assert "did you mean method?" in done.err


@given(st.sampled_from(sorted(WEIGHT_SCHEMES)), st.sampled_from(["down_proj", "re:.*=x", "a.b"]))
def test_a_rule_is_read_as_it_is_written(scheme: str, pattern: str) -> None:
    rule = Rule(pattern, WEIGHT_SCHEMES[scheme])
    assert Rule.parse(str(rule)) == rule


# The recipe of a folder


def digest(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}


@pytest.mark.parametrize(
    "flags",
    [
        ["--recipe", "mixed-3-4-8"],
        ["--recipe", "w4a16-awq"],
        ["--method", "rtn", "--bits", 5, "--group-size", 32, "--format", "compressed-tensors", "--clip"],
        ["--scheme", "w8a8", "--alpha", "0.6", "--calib-seed", 3, "--ignore", "re:.*layers.0.*v_proj"],
        ["--scheme", "fp8", "--kv-cache-scheme", "fp8", "--override", "lm_head=fp8"],
        ["--bits", 8, "--act-order", "dynamic", "--override", "o_proj=int8 g64 asym"],
    ],
    ids=lambda flags: " ".join(map(str, flags)),
)
def test_the_recipe_in_a_folder_makes_the_same_folder(
    tmp_path: Path, tiny: Path, text: Path, flags: list[object], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    small = ("--calib-data", text.name, "--calib-samples", 4, "--calib-seqlen", 64)
    first = llmq("quantize", tiny, "-o", tmp_path / "a" / "out", *flags, *small, "--device", "cpu")
    assert first.code == 0, first.err
    recipe = tmp_path / "a" / "out" / RECIPE
    second = llmq("quantize", tiny, "-o", tmp_path / "b" / "out", "--recipe", recipe, "--device", "cpu")
    assert second.code == 0, second.err
    assert digest(tmp_path / "a" / "out") == digest(tmp_path / "b" / "out")


def test_a_recipe_names_no_path_of_this_machine(tmp_path: Path, tiny: Path, text: Path) -> None:
    small = ("--calib-data", text, "--calib-samples", 2, "--calib-seqlen", 32)
    assert llmq("quantize", tiny, "-o", tmp_path / "out", *small).code == 0
    assert yaml.safe_load((tmp_path / "out" / RECIPE).read_text())["calib-data"] == "text.txt"


def test_show_prints_a_recipe_that_is_read_again(tmp_path: Path) -> None:
    shown = llmq("recipe", "show", "mixed-3-4-8")
    assert shown.code == 0
    assert read_recipe(str(written(tmp_path, shown.out))) == read_recipe("mixed-3-4-8")
    as_json = json.loads(llmq("recipe", "show", "mixed-3-4-8", "--json").out)
    assert as_json["recipe"] == yaml.safe_load(shown.out)


# Recipes of llm-compressor


def stage(**modifiers: Any) -> dict[str, Any]:
    return {"quant_stage": {"quant_modifiers": modifiers}}


def translated(folder: Path, **modifiers: Any) -> QuantizeOptions:
    return options_of(read_recipe(str(written(folder, stage(**modifiers)))))


def as_scheme(weights: QuantizationArgs, inputs: QuantizationArgs | None) -> Scheme:
    sizes = {"channel": -1, "tensor": 0, "group": weights.group_size}
    number = "int" if weights.type == "int" else "e4m3"
    return Scheme(weights.num_bits, sizes[weights.strategy], weights.symmetric, number, 8 if inputs else 16)


@pytest.mark.parametrize("name", llm_compressor.SCHEMES)
def test_a_scheme_s_name_means_what_it_means_there(tmp_path: Path, name: str) -> None:
    theirs = preset_name_to_scheme(name, ["Linear"])
    options = translated(tmp_path, QuantizationModifier={"targets": "Linear", "scheme": name, "ignore": ["lm_head"]})
    assert options.choice.scheme == as_scheme(theirs.weights, theirs.input_activations)
    assert (options.choice.method, options.rules) == ("rtn", ())


@pytest.mark.parametrize("config", WRITTEN_BY_LLM_COMPRESSOR, ids=lambda path: path.parent.name)
def test_the_groups_of_what_llm_compressor_wrote_are_the_schemes_read_from_it(tmp_path: Path, config: Path) -> None:
    quantization = json.loads(config.read_text())["quantization_config"]
    fields = {key: quantization[key] for key in ("config_groups", "ignore", "kv_cache_scheme")}
    options = translated(tmp_path, QuantizationModifier=fields)
    stored = open_format(read_config(config.parent))
    assert stored is not None
    for kind in ("self_attn.q_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.down_proj"):
        for layer in (f"model.layers.0.{kind}", f"model.layers.1.{kind}"):
            assert scheme_of(options, layer) == stored.scheme_of(layer)


@pytest.mark.parametrize(
    ("modifiers", "flags"),
    [
        (
            {"GPTQModifier": {"ignore": ["lm_head"], "scheme": "W4A16", "dampening_frac": 0.01, "block_size": 64}},
            {"method": "gptq", "scheme": "w4a16", "act-order": "static"},
        ),
        (
            {"GPTQModifier": {"ignore": ["lm_head"], "scheme": "W4A16", "actorder": None, "sequential_update": True}},
            {"method": "gptq", "act-order": "off"},
        ),
        (
            {"GPTQModifier": {"ignore": ["lm_head"], "scheme": "W4A16", "actorder": "group"}},
            {"act-order": "dynamic", "format": "gptq"},
        ),
        (
            {
                "AWQModifier": {"duo_scaling": True},
                "QuantizationModifier": {"ignore": ["lm_head"], "scheme": "W4A16_ASYM"},
            },
            {"method": "awq", "sym": False, "format": "compressed-tensors"},
        ),
        (
            {"AWQModifier": {"ignore": ["lm_head"], "scheme": "W4A16", "targets": ["Linear"]}},
            {"method": "awq", "sym": True},
        ),
        (
            {
                "SmoothQuantModifier": {"smoothing_strength": 0.8},
                "QuantizationModifier": {"ignore": ["lm_head"], "scheme": "W8A8"},
            },
            {"method": "smoothquant", "scheme": "w8a8", "alpha": 0.8},
        ),
        (  # as llm-compressor saves it beside a model
            {
                "GPTQModifier": {"targets": ["Linear"], "ignore": ["lm_head"], "scheme": "W4A16"}
                | {"block_size": 128, "dampening_frac": 0.01, "actorder": "static", "offload_hessians": False}
                | {"bypass_divisibility_checks": False}
            },
            {"method": "gptq", "scheme": "w4a16", "act-order": "static"},
        ),
        (
            {"QuantizationModifier": {"ignore": ["lm_head", "re:.*o_proj"], "scheme": "FP8_DYNAMIC"}},
            {"method": "rtn", "scheme": "fp8", "ignore": ["re:.*o_proj"]},
        ),
        (
            {"QuantizationModifier": {"scheme": {"W8A16": ["re:.*down_proj"], "W4A16": ["Linear"]}}},
            {"override": ["lm_head=w4a16", "re:.*down_proj=w8a16"]},
        ),
    ],
)
def test_a_recipe_of_theirs_comes_to_these_flags(
    tmp_path: Path, modifiers: dict[str, Any], flags: dict[str, Any]
) -> None:
    found = read_recipe(str(written(tmp_path, stage(**modifiers)))).flags
    assert flags.items() <= found.items()


@pytest.mark.parametrize(
    ("modifiers", "named"),
    [
        ({"SparseGPTModifier": {"sparsity": 0.5}}, "SparseGPTModifier"),
        ({"GPTQModifier": {"scheme": "W4A16", "dampening_frac": 0.1}}, "dampening_frac: 0.1"),
        ({"GPTQModifier": {"scheme": "NVFP4"}}, "NVFP4"),
        ({"GPTQModifier": {"scheme": "W4A16", "actorder": "sideways"}}, "sideways"),
        ({"GPTQModifier": {"scheme": "W4A16", "actorder": ["group"]}}, "['group']"),
        ({"GPTQModifier": {"config_groups": {"g": {"weights": [4]}}}}, "weights: [4]"),
        ({"QuantizationModifier": {"config_groups": {"g": {"weights": {"num_bits": [4]}}}}}, "[4] bits"),
        (
            {"QuantizationModifier": {"config_groups": {"g": {"weights": {"strategy": ["group"]}}}}},
            "strategy ['group']",
        ),
        ({"GPTQModifier": {"scheme": "W4A16", "bypass_divisibility_checks": True}}, "bypass_divisibility_checks: True"),
        ({"QuantizationModifier": {"scheme": "FP8"}}, "FP8"),
        ({"QuantizationModifier": {"scheme": "W4A16", "ignore": ["LlamaMLP"]}}, "LlamaMLP"),
        ({"QuantizationModifier": {"scheme": "W4A16", "surprise": 1}}, "surprise"),
        ({"QuantizationModifier": {"ignore": ["lm_head"]}}, "without scheme"),
        ({"SmoothQuantModifier": {"mappings": []}, "QuantizationModifier": {"scheme": "W8A8"}}, "mappings"),
        ({"SmoothQuantModifier": {}, "GPTQModifier": {"scheme": "W8A8"}}, "GPTQModifier beside SmoothQuantModifier"),
        (
            {"QuantizationModifier": {"config_groups": {"g": {"weights": {"num_bits": 4, "observer": "mse"}}}}},
            "observer: mse",
        ),
        (
            {"QuantizationModifier": {"config_groups": {"g": {"weights": {"num_bits": 4, "type": "float"}}}}},
            "type float, 4 bits",
        ),
        (
            {"QuantizationModifier": {"scheme": "W8A8", "kv_cache_scheme": {"num_bits": 4, "type": "float"}}},
            "num_bits: 4",
        ),
    ],
)
def test_what_llmq_does_not_do_is_refused_by_name(tmp_path: Path, modifiers: dict[str, Any], named: str) -> None:
    assert named in refusal(tmp_path, stage(**modifiers)).message


def test_their_dampening_is_read_as_what_llmq_dampens_by() -> None:
    assert llm_compressor.DAMPENING == DAMP_PERCENT


def test_a_recipe_of_theirs_quantizes(tmp_path: Path, tiny: Path) -> None:
    recipe = written(tmp_path, stage(QuantizationModifier={"ignore": ["lm_head"], "scheme": "W4A16"}))
    done = llmq("quantize", tiny, "-o", tmp_path / "out", "--recipe", recipe, "--json")
    assert done.code == 0, done.err
    assert (json.loads(done.out)["scheme"], json.loads(done.out)["format"]) == ("int4 g128 sym", "compressed-tensors")
