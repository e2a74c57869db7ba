"""Recipes of llm-compressor, as far as llmq does the same: a document of theirs → the flags that ask for it.

    STAGE_stage:
      STAGE_modifiers:
        SmoothQuantModifier: {smoothing_strength: 0.8}
        QuantizationModifier: {targets: Linear, scheme: W8A8, ignore: [lm_head]}

What a key asks for and llmq does not do is an LlmqError that names it; what only says how to go about it (order,
offloading, sizes of chunks) is read over. https://github.com/vllm-project/llm-compressor
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from typing import Any, NoReturn

from llmq.checkpoint.config import HEAD
from llmq.errors import USAGE, LlmqError, either
from llmq.quant.options import DYNAMIC, FP8, OFF, STATIC, Rule
from llmq.quant.schemes import AWQ, GPTQ, PRESETS, RTN, SMOOTHQUANT, scheme_settings
from llmq.scheme import BITS, E4M3, INT, WHOLE_ROW, WHOLE_TENSOR, Scheme

Allowed = Mapping[str, Collection[Any]]
"""Keys → the values that mean what llmq does, the plainest first."""

ROUNDING, SMOOTHING, COMPENSATING, SCALING = (
    "QuantizationModifier",
    "SmoothQuantModifier",
    "GPTQModifier",
    "AWQModifier",
)
METHODS = {ROUNDING: RTN, COMPENSATING: GPTQ, SCALING: AWQ, SMOOTHING: SMOOTHQUANT}
SCHEMES = {
    "W4A16": Scheme(4, 128),
    "W4A16_ASYM": Scheme(4, 128, symmetric=False),
    "W8A16": Scheme(8, 128),
    "W8A8": PRESETS["w8a8"].scheme,
    "INT8": PRESETS["w8a8"].scheme,
    "FP8_DYNAMIC": PRESETS["fp8"].scheme,
}
"""Their presets that llmq has too."""
HOW = {
    "sequential_update", "sequential_targets", "offload_hessians", "offload_device", "block_size", "max_chunk_memory",
}  # fmt: skip
"""Keys that say how to go about it."""
DAMPENING = 0.01
"""Of their GPTQ by default, and of llmq's always."""
ORDERS = {None: OFF, False: OFF, "static": STATIC, "weight": STATIC, "dynamic": DYNAMIC, "group": DYNAMIC}
STORAGE = {
    "observer_kwargs", "scale_dtype", "zp_dtype", "block_structure", "group_size", "actorder", "format",
}  # fmt: skip
"""Keys beside the numbers, which say nothing where they are left to their defaults, or how numbers are stored."""
MINMAX = (None, "minmax", "memoryless_minmax")
TOKEN: Allowed = {
    "num_bits": (8,), "strategy": ("token",), "dynamic": (True,), "symmetric": (True, None), "observer": MINMAX,
}  # fmt: skip
KV_CACHE: Allowed = {
    "num_bits": (8,), "type": ("float",), "strategy": ("tensor",), "dynamic": (False, None), "symmetric": (True, None),
    "observer": MINMAX,
}  # fmt: skip
LINEAR = "Linear"


def is_recipe(document: Mapping[Any, Any]) -> bool:
    """Whether this is a recipe of theirs: it has stages."""
    return any(str(key).endswith("stage") for key in document)


def translate(document: Mapping[Any, Any]) -> dict[str, Any]:
    """The flags of ``llmq quantize``, with their values, that do what ``document`` asks for."""
    modifiers = dict(_modifiers(document))
    methods = [name for name in modifiers if name != ROUNDING] or [ROUNDING]
    if len(methods) > 1 or {COMPENSATING, ROUNDING} <= modifiers.keys():
        _refuse(" beside ".join(modifiers), f"keep one of them; {SMOOTHING} and {SCALING} go with {ROUNDING}")
    own = dict(modifiers[methods[0]])
    flags = {"method": METHODS[methods[0]], "format": "compressed-tensors"}
    if methods == [COMPENSATING]:
        flags |= _compensation(own)
    elif methods == [SMOOTHING]:
        flags["alpha"] = own.pop("smoothing_strength", 0.5)
    elif methods == [SCALING]:
        _same(SCALING, own, {"duo_scaling": (True, None), "n_grid": (20,)})
    layers = own if ROUNDING not in modifiers or methods == [ROUNDING] else own | modifiers[ROUNDING]
    return flags | _layers(layers)


def _modifiers(document: Mapping[Any, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """By their names, without the keys that do not matter."""
    for stage, groups in document.items():
        for group, modifiers in _mapping(stage, groups).items():
            if not group.endswith("modifiers"):
                _refuse(f"{stage}: {group}", "keep its modifiers alone")
            for name, fields in _mapping(group, modifiers).items():
                if name not in METHODS:
                    _refuse(name, f"there are {either(METHODS)}")
                yield name, {key: value for key, value in _mapping(name, fields or {}).items() if key not in HOW}


def _compensation(own: dict[str, Any]) -> dict[str, Any]:
    """The flags of GPTQ. Theirs too has groups in static order unless told otherwise."""
    _same(COMPENSATING, own, {"dampening_frac": (DAMPENING, None)})
    asked = [own.pop("actorder")] if "actorder" in own else []
    groups = [
        _mapping(name, group) for name, group in _mapping("config_groups", own.get("config_groups") or {}).items()
    ]
    weights = [_mapping("weights", group.get("weights") or {}) for group in groups]
    asked += [order for fields in weights if (order := fields.get("actorder")) is not None]
    orders = {ORDERS[order] for order in asked if order in list(ORDERS)} or {STATIC}
    if len(orders) > 1 or any(order not in list(ORDERS) for order in asked):
        _refuse(f"actorder: {either(asked)}", f"there are {either(filter(None, ORDERS))}, one for all layers")
    (order,) = orders
    return {"act-order": order} | ({"format": "gptq"} if order == DYNAMIC else {})


def _layers(fields: dict[str, Any]) -> dict[str, Any]:
    """The flags that say which layers have which scheme."""
    left_out = _names("ignore", fields.pop("ignore", []))
    groups = list(_groups(fields))
    flags: dict[str, Any] = {}
    cache = fields.pop("kv_cache_scheme", None)
    if cache is not None:
        _settled("kv_cache_scheme", dict(_mapping("kv_cache_scheme", cache)), KV_CACHE)
        flags["kv-cache-scheme"] = FP8
    _same("layers", fields, {"bypass_divisibility_checks": (False, None)})  # which every saved recipe has
    if fields:
        _refuse(next(iter(fields)))
    if not groups:
        _refuse("a recipe without scheme and config_groups", "say what the weights become: scheme: W4A16")
    general = [scheme for scheme, targets in groups if LINEAR in targets]
    overrides = [] if general else ["re:.*=none"]
    if general and HEAD not in left_out:
        overrides.append(str(Rule(HEAD, general[0])))
    # Of several groups that name a layer, theirs is the first; of several rules, llmq's is the last.
    for scheme, targets in reversed(groups):
        overrides += [str(Rule(target, scheme)) for target in targets if target != LINEAR]
    flags |= scheme_settings((general or [groups[0][0]])[0])
    flags |= {"override": overrides} if overrides else {}
    others = [name for name in left_out if name != HEAD]
    return flags | ({"ignore": others} if others else {})


def _groups(fields: dict[str, Any]) -> Iterator[tuple[Scheme, list[str]]]:
    """Schemes with the layers they are for."""
    named, groups = fields.pop("scheme", None), fields.pop("config_groups", None)
    targets = _names("targets", fields.pop("targets", None) or LINEAR)
    if isinstance(named, str):
        yield _preset(named), targets
    elif named is not None:
        for name, its_targets in _mapping("scheme", named).items():
            yield _preset(name), _names("targets", its_targets)
    for name, group in _mapping("config_groups", groups or {}).items():
        group = dict(_mapping(name, group))
        yield _scheme(group), _names("targets", group.pop("targets", LINEAR))


def _preset(name: str) -> Scheme:
    if name.upper() not in SCHEMES:
        _refuse(f"the scheme {name}", f"there are {either(SCHEMES)}, or write config_groups")
    return SCHEMES[name.upper()]


def _scheme(group: Mapping[str, Any]) -> Scheme:
    """What a group of ``config_groups`` asks for: ``weights`` and ``input_activations``, as QuantizationArgs of
    compressed-tensors."""
    if group.get("output_activations") is not None:
        _refuse("output_activations")
    weights, inputs = (dict(_mapping(key, group.get(key) or {})) for key in ("weights", "input_activations"))
    strategy, size = weights.pop("strategy", None), weights.pop("group_size", None)
    number, bits = weights.pop("type", "int"), weights.pop("num_bits", 8)
    symmetric = weights.pop("symmetric", True)
    sizes = {"channel": WHOLE_ROW, "tensor": WHOLE_TENSOR, "group": size, None: size or WHOLE_TENSOR}
    if strategy not in list(sizes) or (number, bits) not in [("float", 8), *(("int", bits) for bits in BITS[INT])]:
        _refuse(f"weights of type {number}, {bits} bits and strategy {strategy}")
    _settled("weights", weights, {"dynamic": (False, None), "observer": MINMAX})
    if inputs:
        _settled("input_activations", inputs, {**TOKEN, "type": (number,)})
    activation_bits = 8 if group.get("input_activations") else 16
    return Scheme(bits, sizes[strategy], symmetric, INT if number == "int" else E4M3, activation_bits)


def _same(where: str, fields: dict[str, Any], allowed: Allowed) -> None:
    """Take what is ``allowed`` out of ``fields``. Other values for these keys are refused."""
    for name, values in allowed.items():
        if name in fields and (found := fields.pop(name)) not in values:
            _refuse(f"{where}: {name}: {found}", f"llmq does {next(iter(values))}")


def _settled(where: str, fields: dict[str, Any], allowed: Allowed) -> None:
    """``_same``, after which nothing of importance may be left."""
    _same(where, fields, allowed)
    for name, value in fields.items():
        if value not in (None, {}) and name not in STORAGE:
            _refuse(f"{where}: {name}: {value}")


def _mapping(name: object, value: Any) -> Mapping[str, Any]:
    if not isinstance(value, Mapping) or not all(isinstance(key, str) for key in value):
        _refuse(f"{name}: {value}", "it should be a mapping")
    return value


def _names(key: str, value: Any) -> list[str]:
    """Layers by name or ``re:`` pattern; of classes, Linear alone."""
    names = [value] if isinstance(value, str) else value
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        _refuse(f"{key}: {value}", "it should be a list of names")
    for name in names:
        if name[:1].isupper() and name != LINEAR:
            _refuse(f"{key}: {name}", "name layers, or patterns behind re:, instead of a class")
    return names


def _refuse(what: str, hint: str = "leave it out, or write the recipe in llmq's own keys") -> NoReturn:
    raise LlmqError(f"llm-compressor's {what}: llmq does not do that", hint, exit_code=USAGE)
