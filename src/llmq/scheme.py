"""How the weights of a linear layer are stored: the noun that quantizer, formats, planner and engine share."""

from __future__ import annotations

from dataclasses import dataclass

from llmq.errors import USAGE, LlmqError

INT, E4M3, NF4, FP4 = "int", "e4m3", "nf4", "fp4"
BITS = {INT: (2, 3, 4, 5, 6, 8), E4M3: (8,), NF4: (4,), FP4: (4,)}
"""The numbers that a code can stand for, and the widths that it can have."""
GROUP_SIZES = (32, 64, 128, -1, 0)
WHOLE_ROW, WHOLE_TENSOR = WHOLE = -1, 0
ACTIVATION_BITS = (16, 8)


@dataclass(frozen=True, slots=True)
class Scheme:
    """``weight ≈ scale · (number(code) − zero_point)``, codes in ``[0, 2^bits)``.

    bits             width of a code
    group_size       consecutive input channels of one output row that share a scale; -1: the whole row; 0: all rows,
                     whose scales are then the same
    symmetric        the zero point is the middle code, ``2^(bits−1)``, instead of one fitted to each group
    number           what a code stands for: ``int``, itself; ``e4m3``, the float of 8 bits that it is; ``nf4`` or
                     ``fp4``, an entry of bitsandbytes' table of that name. Only integers have zero points
    activation_bits  16: inputs as they come; 8: each token's inputs are rounded to 8 bits of the weights' number, by
                     a scale of its own, when the layer is computed
    """

    bits: int = 4
    group_size: int = 128
    symmetric: bool = True
    number: str = INT
    activation_bits: int = 16

    def __post_init__(self) -> None:
        if self.number not in BITS:
            raise LlmqError(f"there is no number {self.number!r}", f"there are {', '.join(BITS)}", exit_code=USAGE)
        if self.bits not in BITS[self.number]:
            raise LlmqError(
                f"codes of {self.bits} bits are not supported",
                f"choose --bits {' or '.join(map(str, BITS[self.number]))}",
                exit_code=USAGE,
            )
        if self.group_size not in GROUP_SIZES:
            raise LlmqError(
                f"a group size of {self.group_size} is not supported",
                f"choose --group-size {', '.join(map(str, GROUP_SIZES))} (-1: one scale a row, 0: one for all)",
                exit_code=USAGE,
            )
        if self.number != INT and not self.symmetric:
            raise LlmqError(f"{self.number} weights have no zero points", "choose --sym", exit_code=USAGE)
        if self.activation_bits not in ACTIVATION_BITS:
            raise LlmqError(
                f"activations of {self.activation_bits} bits are not supported", "choose 16 or 8", exit_code=USAGE
            )
        if self.activation_bits == 8 and not (self.bits == 8 and self.symmetric and self.group_size in WHOLE):
            raise LlmqError(
                "activations of 8 bits go with symmetric weights of 8 bits and a scale for each row",
                "choose --scheme w8a8 or fp8, and leave out --bits, --group-size and --asym",
                exit_code=USAGE,
            )

    @property
    def max_code(self) -> int:
        return (1 << self.bits) - 1

    @property
    def middle_code(self) -> int:
        """The zero point of a symmetric scheme."""
        return 1 << (self.bits - 1) if self.number == INT else 0

    def group_length(self, in_features: int) -> int:
        """Input channels in one group of a layer with ``in_features`` inputs."""
        return in_features if self.group_size in WHOLE else self.group_size

    def num_groups(self, in_features: int) -> int:
        return in_features // self.group_length(in_features)

    def divides(self, in_features: int) -> bool:
        return in_features % self.group_length(in_features) == 0

    def __str__(self) -> str:
        name = f"int{self.bits}" if self.number == INT else self.number
        group = {WHOLE_ROW: "row", WHOLE_TENSOR: "tensor"}.get(self.group_size, f"g{self.group_size}")
        symmetry = "" if self.number != INT else " sym" if self.symmetric else " asym"
        activations = "" if self.activation_bits == 16 else f", {self.activation_bits}-bit activations"
        return f"{name} {group}{symmetry}{activations}"
