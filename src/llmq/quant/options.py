"""What can be asked of the quantizer, and what it does when nothing is asked. No torch."""

from __future__ import annotations

from dataclasses import dataclass, field

from llmq.checkpoint.formats import check_holds
from llmq.errors import USAGE, LlmqError
from llmq.scheme import Scheme

RTN, GPTQ = "rtn", "gptq"
METHODS = (RTN, GPTQ)


@dataclass(frozen=True, slots=True)
class Calibration:
    """The text whose activations a method learns from.

    data     a ``.txt`` file, or a ``.jsonl`` file with a ``text`` in each line; None: the text shipped with llmq
    samples  windows taken from it
    seqlen   tokens in a window, clipped to the model's context
    seed     decides which windows
    """

    data: str | None = None
    samples: int = 128
    seqlen: int = 2048
    seed: int = 0

    def __post_init__(self) -> None:
        for flag, value in (("--calib-samples", self.samples), ("--calib-seqlen", self.seqlen)):
            if value < 1:
                raise LlmqError(f"{flag} is {value}", "give it a positive number", exit_code=USAGE)


@dataclass(frozen=True, slots=True)
class QuantizeOptions:
    """How a model is quantized.

    format  of the folder that is written, by its name in ``checkpoint.formats.FORMATS``
    ignore  linear layers to leave as they are: a name or whole dotted parts of one (``model.layers.0``,
            ``down_proj``), or ``re:`` and a regular expression that matches from the start of the name
    device  ``cpu``, ``cuda``, or ``auto``: CUDA where there is one
    """

    method: str = GPTQ
    scheme: Scheme = field(default_factory=Scheme)
    calibration: Calibration = field(default_factory=Calibration)
    format: str = "gptq"
    ignore: tuple[str, ...] = ()
    device: str = "auto"

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise LlmqError(
                f"there is no method {self.method!r}", f"choose --method {' or '.join(METHODS)}", exit_code=USAGE
            )
        check_holds(self.format, self.scheme)


DEFAULTS = QuantizeOptions()
