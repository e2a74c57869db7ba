"""How the weights of a linear layer are stored: the noun that quantizer, formats, planner and engine share."""

from __future__ import annotations

from dataclasses import dataclass

from llmq.errors import USAGE, LlmqError

BITS = (4, 8)
GROUP_SIZES = (32, 64, 128, -1)
WHOLE_ROW = -1


@dataclass(frozen=True, slots=True)
class Scheme:
    """Weight-only integer quantization: ``weight ≈ scale · (code − zero_point)``, codes in ``[0, 2^bits)``.

    bits        width of a code
    group_size  consecutive input channels of one output row that share a scale; -1: the whole row
    symmetric   the zero point is the middle code, ``2^(bits−1)``, instead of one fitted to each group
    """

    bits: int = 4
    group_size: int = 128
    symmetric: bool = True

    def __post_init__(self) -> None:
        if self.bits not in BITS:
            raise LlmqError(
                f"codes of {self.bits} bits are not supported",
                f"choose --bits {' or '.join(map(str, BITS))}",
                exit_code=USAGE,
            )
        if self.group_size not in GROUP_SIZES:
            raise LlmqError(
                f"a group size of {self.group_size} is not supported",
                f"choose --group-size {', '.join(map(str, GROUP_SIZES))} (-1: one scale a row)",
                exit_code=USAGE,
            )

    @property
    def max_code(self) -> int:
        return (1 << self.bits) - 1

    @property
    def middle_code(self) -> int:
        """The zero point of a symmetric scheme."""
        return 1 << (self.bits - 1)

    def group_length(self, in_features: int) -> int:
        """Input channels in one group of a layer with ``in_features`` inputs."""
        return in_features if self.group_size == WHOLE_ROW else self.group_size

    def num_groups(self, in_features: int) -> int:
        return in_features // self.group_length(in_features)

    def divides(self, in_features: int) -> bool:
        return in_features % self.group_length(in_features) == 0

    def __str__(self) -> str:
        group = "row" if self.group_size == WHOLE_ROW else f"g{self.group_size}"
        return f"int{self.bits} {group} {'sym' if self.symmetric else 'asym'}"
