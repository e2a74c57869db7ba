"""What can be asked of the quantizer, and what it does when nothing is asked. No torch."""

from __future__ import annotations

import re
from dataclasses import dataclass, field, replace
from itertools import product, starmap

from llmq.checkpoint.folder import DEMO
from llmq.errors import USAGE, LlmqError
from llmq.quant.backends import NATIVE, Backend, third_party
from llmq.quant.schemes import CALIBRATED, GPTQ, PRESETS, RTN, SMOOTHQUANT, Choice, choose
from llmq.scheme import BITS, GROUP_SIZES, INT, Scheme

ACT_ORDERS = STATIC, DYNAMIC, OFF = "static", "dynamic", "off"
AUTO, FP8 = "auto", "fp8"
SELF = "self"
MAX_SEED = 2**31 - 1
"""Each document that the model writes has a seed of its own: this one's bits, and 32 below them."""
KEPT = ("none", "16")
"""How ``--override`` says that a layer stays as it is."""
SCHEMES = {name: preset.scheme for name, preset in PRESETS.items()}
WEIGHT_SCHEMES = {str(scheme): scheme for scheme in starmap(Scheme, product(BITS[INT], GROUP_SIZES, (True, False)))}
"""The schemes that ``--override`` takes beside the presets, by how they are written: ``int4 g64 sym``."""


@dataclass(frozen=True, slots=True)
class Calibration:
    """The text whose activations a method learns from.

    data     where it comes from: see ``quant.calibration``; None: ``self``, and for the demo model ``demo``
    samples  windows taken from it
    seqlen   tokens in a window, clipped to the model's context
    seed     decides which windows, and what the model writes
    """

    data: str | None = None
    samples: int = 128
    seqlen: int = 2048
    seed: int = 0

    def __post_init__(self) -> None:
        for flag, value in (("--calib-samples", self.samples), ("--calib-seqlen", self.seqlen)):
            if value < 1:
                raise LlmqError(f"{flag} is {value}", "give it a positive number", exit_code=USAGE)
        if not 0 <= self.seed <= MAX_SEED:
            raise LlmqError(f"--calib-seed is {self.seed}", f"give it a number from 0 to {MAX_SEED}", exit_code=USAGE)

    def of(self, model: str) -> Calibration:
        """The same for ``model``, its data decided."""
        return self if self.data is not None else replace(self, data=DEMO if model == DEMO else SELF)


@dataclass(frozen=True, slots=True)
class Rule:
    """``--override PATTERN=SCHEME``, or ``--ignore PATTERN``: the layers that ``pattern`` covers have ``scheme``; None:
    they stay as they are.

    A pattern is a name or whole dotted parts of one (``model.layers.0``, ``down_proj``), or ``re:`` and a regular
    expression that matches from the start of the name.
    """

    pattern: str
    scheme: Scheme | None

    def __post_init__(self) -> None:
        try:
            re.compile(self.pattern.removeprefix("re:"))
        except re.error as error:
            raise LlmqError(
                f"{self.pattern} is not a regular expression: {error}", "see Python's re", exit_code=USAGE
            ) from None

    @classmethod
    def parse(cls, text: str) -> Rule:
        """``re:.*down_proj=w8a16``, ``down_proj=int4 g64 sym``, or ``lm_head=none``"""
        pattern, equals, name = text.rpartition("=")
        if not equals or name not in (*SCHEMES, *WEIGHT_SCHEMES, *KEPT):
            raise LlmqError(
                f"--override {text} does not end in = and a scheme",
                f"write 're:.*down_proj=w8a16'; there are {', '.join((*SCHEMES, *KEPT))}, and such as 'int4 g64 sym'",
                exit_code=USAGE,
            )
        return cls(pattern, None if name in KEPT else (SCHEMES | WEIGHT_SCHEMES)[name])

    def __str__(self) -> str:
        names = (name for name, scheme in SCHEMES.items() if scheme == self.scheme)
        return f"{self.pattern}={next(names, self.scheme or KEPT[0])}"

    def covers(self, name: str) -> bool:
        """Does the pattern cover the layer ``name``?"""
        if self.pattern.startswith("re:"):
            return re.match(self.pattern.removeprefix("re:"), name) is not None
        return f".{self.pattern}." in f".{name}."


@dataclass(frozen=True, slots=True)
class QuantizeOptions:
    """How a model is quantized.

    choice     scheme and method of all layers that no rule is for, and the format of the folder
    rules      for layers of their own; of several that cover one, the last counts
    clip       of ``rtn``: clip ranges where that lessens the weights' squared error
    act_order  of ``gptq``: ``static``, ``dynamic`` or ``off``; see ``methods.gptq``
    alpha      of ``smoothquant``: how much of the activations' range moves to the weights, from 0 to 1; ``auto``:
               searched for, block by block; None: what has served the model's family best
    kv_cache   ``fp8``: measure scales for a KV cache in e4m3, one for the keys and one for the values of each layer
    device     ``cpu``, ``cuda``, or ``auto``: CUDA where there is one
    backend    whose quantizer does the work; see ``quant.backends``
    """

    choice: Choice = field(default_factory=choose)
    calibration: Calibration = field(default_factory=Calibration)
    rules: tuple[Rule, ...] = ()
    clip: bool = False
    act_order: str = STATIC
    alpha: float | str | None = None
    kv_cache: str | None = None
    device: str = AUTO
    backend: str = NATIVE

    def __post_init__(self) -> None:
        method = self.choice.method
        for flag, value, unset, only in (
            ("--clip", self.clip, False, RTN),
            ("--act-order", self.act_order, STATIC, GPTQ),
            ("--alpha", self.alpha, None, SMOOTHQUANT),
        ):
            if value != unset and method != only:
                raise LlmqError(f"{flag} is a setting of {only}", f"choose --method {only}", exit_code=USAGE)
        if self.act_order not in ACT_ORDERS:
            raise LlmqError(
                f"there is no order {self.act_order!r}", f"choose --act-order {', '.join(ACT_ORDERS)}", exit_code=USAGE
            )
        if self.act_order == DYNAMIC and self.choice.format != "gptq":
            raise LlmqError("groups in dynamic order have no place in it", "choose --format gptq", exit_code=USAGE)
        if (isinstance(self.alpha, str) and self.alpha != AUTO) or (
            isinstance(self.alpha, float) and not 0 <= self.alpha <= 1
        ):
            raise LlmqError(f"--alpha is {self.alpha}", "choose auto, or a number from 0 to 1", exit_code=USAGE)
        if self.kv_cache not in (None, FP8):
            raise LlmqError(
                f"there are no scales for a KV cache of {self.kv_cache!r}",
                f"choose --kv-cache-scheme {FP8}",
                exit_code=USAGE,
            )
        if self.kv_cache is not None and self.choice.format != "compressed-tensors":
            raise LlmqError(
                f"the format {self.choice.format} has no place for scales of the KV cache",
                "choose --format compressed-tensors",
                exit_code=USAGE,
            )
        for rule in self.rules:
            if rule.scheme is not None:
                choose(rule.scheme, method)
        if self.third_party is not None:
            if self.rules:
                raise LlmqError("backends treat all layers alike", "leave --override and --ignore out", exit_code=USAGE)
            self.third_party.check(self.choice, self.device)

    @property
    def third_party(self) -> Backend | None:
        """The backend in an environment of its own that does the work, if it is not llmq."""
        return third_party(self.backend)

    @property
    def calibrated(self) -> bool:
        """Whether anything is learnt from the calibration text."""
        return self.choice.method in CALIBRATED or self.third_party is not None or self.kv_cache is not None


DEFAULTS = QuantizeOptions()
