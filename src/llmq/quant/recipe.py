"""Recipes: how to quantize, as a file. The keys are flags of ``llmq quantize``, the values what would follow them.

    # GPTQ, 4 bits, groups of 128
    scheme: w4a16
    method: gptq
    override: [down_proj=w8a16]

The first comment says what the recipe is for. What is not said is left to the flags and their defaults. Files of
llm-compressor are read as well: see ``quant.llm_compressor``.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from difflib import get_close_matches
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from llmq.errors import USAGE, LlmqError, either
from llmq.quant import llm_compressor
from llmq.quant.backends import NATIVE
from llmq.quant.options import QuantizeOptions
from llmq.quant.schemes import GPTQ, scheme_settings

RECIPE = "recipe.yaml"
"""What the recipe of a folder is called in it."""


def flag(name: str) -> str:
    """``group_size`` → ``group-size``"""
    return name.replace("_", "-")


class Recipe(BaseModel):
    """The flags that a recipe may set, by their names on the command line. Types are checked, values by ``choose`` and
    ``QuantizeOptions``. Where to work and where to write is no part of a recipe."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, alias_generator=flag)

    scheme: str | None = None
    method: str | None = None
    format: str | None = None
    bits: int | None = None
    group_size: int | None = None
    sym: bool | None = None
    override: list[str] | None = None
    ignore: list[str] | None = None
    clip: bool | None = None
    act_order: str | None = None
    alpha: float | Literal["auto"] | None = None
    kv_cache_scheme: str | None = None
    calib_data: str | None = None
    calib_samples: int | None = None
    calib_seqlen: int | None = None
    calib_seed: int | None = None
    backend: str | None = None

    @property
    def flags(self) -> dict[str, Any]:
        """Flags → values, of those that are set."""
        return self.model_dump(by_alias=True, exclude_unset=True)


KEYS = tuple(map(flag, Recipe.model_fields))
LOOK = "llmq recipe show w4a16-gptq shows what one looks like"


def shipped_recipes() -> dict[str, Path]:
    """The recipes that come with llmq, by name."""
    return {path.stem: path for path in sorted((Path(str(files("llmq"))) / "recipes").glob("*.yaml"))}


def read_recipe(recipe: str) -> Recipe:
    """The recipe of that name, or in that file. LlmqError when there is none, or it says what nobody understands."""
    path = find_recipe(recipe)
    try:
        document = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
        raise LlmqError(
            f"{path} cannot be read: {reason}", "llmq recipe list shows those that come with llmq"
        ) from None
    except (yaml.YAMLError, RecursionError) as error:
        raise LlmqError(f"{path.name} is not YAML: {' '.join(str(error).split())}", LOOK) from None
    if not isinstance(document, Mapping):
        raise LlmqError(f"{path.name} is not a mapping of flags to values", LOOK)
    if llm_compressor.is_recipe(document):
        document = llm_compressor.translate(document)
    try:
        return Recipe.model_validate(document)
    except ValidationError as error:
        raise _explained(path.name, error.errors()[0]) from None


def find_recipe(recipe: str) -> Path:
    """Where the recipe of that name, or the file, is. LlmqError when it is neither."""
    shipped = shipped_recipes()
    if recipe in shipped:
        return shipped[recipe]
    path = Path(recipe).expanduser()
    if not path.exists():
        near = get_close_matches(recipe, shipped, n=1)
        meant = f"did you mean {near[0]}? there are" if near else "there are"
        raise LlmqError(
            f"there is no recipe {recipe!r}, and no file of that name", f"{meant} {either(shipped)}", exit_code=USAGE
        )
    return path


def about(path: Path) -> str:
    """What the recipe in ``path`` is for: its first line, if that is a comment."""
    first = path.read_text(encoding="utf-8").partition("\n")[0]
    return first.removeprefix("#").strip() if first.startswith("#") else ""


def _explained(name: str, error: Mapping[str, Any]) -> LlmqError:
    """What pydantic found wrong first."""
    key = str(error["loc"][0])
    if error["type"] == "extra_forbidden":
        near = get_close_matches(key.replace("_", "-"), KEYS, n=1)
        hint = f"did you mean {near[0]}?" if near else f"there are {either(KEYS)}"
        return LlmqError(f"{name}: there is no key {key!r}", hint, exit_code=USAGE)
    return LlmqError(
        f"{name}: {key} is {error['input']!r}", error["msg"].replace("Input should", "it should"), exit_code=USAGE
    )


def settings(options: QuantizeOptions) -> dict[str, Any]:
    """The recipe that asks for ``options``, whatever the defaults: flags → values. Of the calibration text it has the
    file's name, and no path of this machine."""
    choice, calibration = options.choice, options.calibration
    found = scheme_settings(choice.scheme) | {"method": choice.method, "format": choice.format}
    if options.backend != NATIVE:
        found["backend"] = options.backend
    if options.rules:
        found["override"] = [str(rule) for rule in options.rules]
    if options.clip:
        found["clip"] = True
    if choice.method == GPTQ:
        found["act-order"] = options.act_order
    if options.alpha is not None:
        found["alpha"] = options.alpha
    if options.kv_cache is not None:
        found["kv-cache-scheme"] = options.kv_cache
    if options.calibrated:
        found |= {} if calibration.data is None else {"calib-data": data_name(calibration.data)}
        found |= {"calib-samples": calibration.samples, "calib-seqlen": calibration.seqlen}
        found |= {"calib-seed": calibration.seed}
    return found


def data_name(data: str) -> str:
    """What ``--calib-data`` says without the paths of this machine: a dataset's id, or a file's name."""
    path = Path(data).expanduser()
    return path.name if path.exists() else data


def words(found: Mapping[str, Any]) -> list[str]:
    """The flags as they are typed."""
    typed: list[str] = []
    for name, value in found.items():
        if name == "sym":
            typed.append("--sym" if value else "--asym")
        elif value is True:
            typed.append(f"--{name}")
        else:
            for each in value if isinstance(value, list) else [value]:
                typed += [f"--{name}", shlex.quote(str(each))]
    return typed


def recipe_text(options: QuantizeOptions) -> str:
    """The file that asks for ``options``."""
    return to_yaml(settings(options))


def to_yaml(flags: Mapping[str, Any]) -> str:
    """The file that sets ``flags``."""
    return yaml.safe_dump(dict(flags), sort_keys=False, allow_unicode=True)
