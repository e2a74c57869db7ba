"""What an architecture consists of, in numbers: the parameters it has, and what its layers keep of a sequence.

The planner answers for many more architectures than the engine runs. What the two share must come out the same
(``tests/test_architecture.py``).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal

CacheKind = Literal["full", "sliding", "chunked", "latent", "state", "shared"]


@dataclass(frozen=True, slots=True)
class LayerCache:
    """What one layer keeps of a sequence.

    kind            full       keys and values of every token
                    sliding    of the last ``window`` tokens, the newest included
                    chunked    of the tokens since the last multiple of ``window``
                    latent     one compressed row for each token, which all heads share (MLA)
                    state      nothing for each token, and a state for the sequence (state spaces, linear attention)
                    shared     nothing: the layer reads what another one keeps
    kv_heads        that the keys and values are split into, on as many GPUs at most; 0: not by heads
    token_elements  numbers for each token
    window          tokens of which they are kept; None: all
    conv_elements   numbers for the sequence, whatever its length, in the cache's type: inputs of a convolution
    state_elements  the same, of the recurrence itself, in the type that the architecture has for it
    """

    kind: CacheKind
    kv_heads: int = 0
    token_elements: int = 0
    window: int | None = None
    conv_elements: int = 0
    state_elements: int = 0

    @property
    def token_scales(self) -> int:
        """Of a cache that is quantized token by token: one for each head's keys, and one for its values."""
        return 2 * self.kv_heads if self.kv_heads else int(self.token_elements > 0)


@dataclass(frozen=True, slots=True)
class Weight:
    """``copies`` matrices [out_features, in_features] of one kind; a vector is one of one column.

    active     of the copies, those that one token meets
    linear     a linear layer of a decoder block: what a scheme quantizes
    sharded    tensor parallelism gives each GPU its part; else each GPU has all of it
    kv_heads   of keys' and values' projections: they are split by these heads, on as many GPUs at most
    """

    name: str
    out_features: int
    in_features: int = 1
    copies: int = 1
    active: int = 1
    linear: bool = False
    sharded: bool = False
    kv_heads: int | None = None

    @property
    def size(self) -> int:
        """Numbers in one of them."""
        return self.out_features * self.in_features


@dataclass(frozen=True, eq=False)
class Architecture:
    """A model as its config.json describes it. One is not compared with another: what is counted once is kept.

    layers          what each decoder layer keeps
    weights         all there are; a tied head is none of them
    mlp_elements    numbers that the MLP, or the experts of one token, have for it at once
    context_length  tokens that it was made for; None: it does not say, or has no limit
    state_dtype     of ``state_elements``; None: as the cache
    quantization    ``quantization_config`` as the folder has it, or None
    assumptions     what config.json leaves open, and how it was taken
    known           False where the parameters are counted as if it were a Llama
    """

    model_type: str
    hidden_size: int
    vocab_size: int
    mlp_elements: int
    layers: tuple[LayerCache, ...]
    weights: tuple[Weight, ...]
    dtype: str
    context_length: int | None
    state_dtype: str | None = None
    quantization: Mapping[str, Any] | None = None
    assumptions: tuple[str, ...] = ()
    known: bool = True

    @cached_property
    def parameters(self) -> int:
        return sum(weight.copies * weight.size for weight in self.weights)

    @property
    def active_parameters(self) -> int:
        """Those that one token meets: all, but for a mixture of experts."""
        return sum(weight.active * weight.size for weight in self.weights)

    @cached_property
    def windows(self) -> tuple[int | None, ...]:
        """Of each layer."""
        return tuple(layer.window for layer in self.layers)

    @cached_property
    def kinds(self) -> dict[LayerCache, int]:
        """The different layers and how many there are of each, in the order of their first."""
        return dict(Counter(self.layers))


def merge(weights: Iterable[Weight]) -> tuple[Weight, ...]:
    """Those that differ in nothing but their number as one, in the order of their first."""
    copies: Counter[Weight] = Counter()
    active: Counter[Weight] = Counter()
    for weight in weights:
        kind = replace(weight, copies=1, active=1)
        copies[kind] += weight.copies
        active[kind] += weight.active
    return tuple(replace(kind, copies=number, active=active[kind]) for kind, number in copies.items())
