"""Third-party quantizers, each in a virtual environment of its own: what they are, and what they can do.

Most of them cannot share an environment with current versions of transformers, nor with each other. So llmq makes each
one an environment with the versions that it works with (``environment``), starts a small program in it (``worker``),
talks to that over a pipe (``driver``), and checks what it has written like any folder it is given (``run``).
"""

from __future__ import annotations

from dataclasses import dataclass

from llmq.errors import USAGE, LlmqError, either
from llmq.quant.schemes import BNB, DEFAULT, Choice
from llmq.scheme import INT, NF4, WHOLE_ROW, Scheme

NATIVE = "native"
BITSANDBYTES = "bitsandbytes"
"""The one library that can share an environment with llmq: a native method calls it."""


@dataclass(frozen=True, slots=True)
class Backend:
    """A quantizer from PyPI.

    package     its name there; ``module``: what Python imports
    methods     of quantization, by llmq's names; the first is its default
    bits        widths of codes that it writes for weights alone
    formats     that it writes, by llmq's names
    devices     that it runs on
    pythons     minor versions of Python 3 that its pinned versions run on
    isolated    whether pip may build it apart: not where its build asks the installed torch
    symmetric   True: symmetric weights only; False: asymmetric only; None: either
    whole_rows  whether a whole row may share a scale
    note        what its user should know
    """

    name: str
    package: str
    module: str
    methods: tuple[str, ...]
    bits: tuple[int, ...]
    formats: tuple[str, ...]
    devices: tuple[str, ...]
    pythons: tuple[int, ...] = (11, 12, 13)
    isolated: bool = True
    symmetric: bool | None = None
    whole_rows: bool = True
    note: str = ""

    def check(self, choice: Choice, device: str) -> None:
        """Raise LlmqError unless the backend does what is asked."""
        scheme = choice.scheme
        asked = (
            (choice.method, self.methods, "--method"),
            (scheme.bits, self.bits, "--bits"),
            (choice.format, self.formats, "--format"),
            (device, (*self.devices, "auto"), "--device"),
        )
        for value, offered, flag in asked:
            if value not in offered:
                raise LlmqError(
                    f"{self.name} has no {flag} {value}", f"choose {flag} {either(offered)}", exit_code=USAGE
                )
        if scheme.number != INT or scheme.activation_bits != 16:
            raise LlmqError(f"{self.name} writes weight-only integers here", "leave --scheme out", exit_code=USAGE)
        if self.symmetric not in (None, scheme.symmetric):
            wanted = "--sym" if self.symmetric else "--asym"
            raise LlmqError(f"{self.name} writes no such zero points", f"pass {wanted}", exit_code=USAGE)
        if scheme.group_size == WHOLE_ROW and not self.whole_rows:
            raise LlmqError(f"{self.name} wants groups", "choose --group-size 32, 64 or 128", exit_code=USAGE)


BACKENDS = {
    backend.name: backend
    for backend in (
        Backend(
            "auto-gptq", "auto-gptq", "auto_gptq", ("gptq",), (2, 3, 4, 8), ("gptq",), ("cpu",), pythons=(11,),
            note="archived; runs with transformers 4.53 and older, here on a CPU only",
        ),
        Backend(
            "autoawq", "autoawq", "awq", ("awq",), (4,), ("awq",), ("cpu", "cuda"),
            isolated=False, symmetric=False, whole_rows=False,
            note="archived; llm-compressor and gptqmodel are its successors",
        ),
        Backend(
            "gptqmodel", "gptqmodel", "gptqmodel", ("gptq",), (2, 3, 4, 8), ("gptq",), ("cpu", "cuda"),
            note="the successor of auto-gptq",
        ),
        Backend(
            "llm-compressor", "llmcompressor", "llmcompressor", ("gptq", "awq", "rtn"), (4, 8),
            ("compressed-tensors",), ("cpu", "cuda"), note="vLLM's own",
        ),
    )
}  # fmt: skip


BACKEND_NAMES = (NATIVE, *BACKENDS, BITSANDBYTES)


def preferences(
    backend: str, scheme: Scheme | str | None, method: str | None, format: str | None
) -> tuple[Scheme | str, str | None, str | None]:
    """Scheme, method and format as they are asked for, or else what the backend does first."""
    if backend == BITSANDBYTES:
        return scheme or NF4, method or BNB, format
    own = third_party(backend)
    scheme = scheme or DEFAULT
    return (scheme, method, format) if own is None else (scheme, method or own.methods[0], format or own.formats[0])


def third_party(name: str) -> Backend | None:
    """The backend ``--backend NAME``; None where llmq does the work. LlmqError when there is none of that name."""
    if name not in BACKEND_NAMES:
        raise LlmqError(f"there is no backend {name!r}", f"choose --backend {either(BACKEND_NAMES)}", exit_code=USAGE)
    return BACKENDS.get(name)


def find_backend(name: str) -> Backend:
    """The backend ``name``, which has an environment of its own. LlmqError when there is none."""
    if name not in BACKENDS:
        raise LlmqError(
            f"there is no environment for a backend {name!r}", f"there are those of {either(BACKENDS)}", exit_code=USAGE
        )
    return BACKENDS[name]
