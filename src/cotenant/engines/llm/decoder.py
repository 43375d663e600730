"""What a decoder-only transformer looks like: all that the graph, the pool and the weights need.

A family (``families/``) reads it from what a file says of the model; nothing else knows families.
"""

from __future__ import annotations

from math import prod
from typing import Final, Literal

import msgspec
import numpy as np
import numpy.typing as npt

from cotenant.domain.errors import ModelError

MOST: Final = {
    "layers": 512,
    "hidden": 65_536,
    "heads": 1024,
    "kv_heads": 1024,
    "head_dim": 1024,
    "ffn": 1 << 20,
    "vocab": 1 << 21,
    "context": 1 << 24,
}
"""Larger ones are taken for damage."""


class Rope(msgspec.Struct, frozen=True):
    """Rotary position embedding (Su et al., 2021), the two halves of a head rotated as pairs.
    ``divisors``: what each frequency is divided by, for contexts longer than those that the model
    was first trained with; empty: nothing."""

    base: float = 10_000.0
    divisors: tuple[float, ...] = ()

    def frequencies(self, head_dim: int) -> npt.NDArray[np.float64]:
        """Radians a token, [head_dim / 2]."""
        found = plain_frequencies(self.base, head_dim)
        if not self.divisors:
            return found
        if len(self.divisors) != len(found) or not min(self.divisors) > 0:
            raise ModelError(
                f"{len(self.divisors)} divisors of frequencies; head_dim {head_dim} has "
                f"{len(found)} of them, and each is above 0"
            )
        return np.asarray(found / np.array(self.divisors), np.float64)


def plain_frequencies(base: float, head_dim: int) -> npt.NDArray[np.float64]:
    """Radians a token, [head_dim / 2]."""
    if not 1 < base < 1e12:
        raise ModelError(f"the base of rotations is {base:g}, not between 1 and 1e12")
    exponents = np.arange(0, head_dim, 2, dtype=np.float64) / head_dim
    return np.asarray(base**-exponents, np.float64)


class Decoder(msgspec.Struct, frozen=True, kw_only=True):
    """Sizes in numbers, ``context`` in tokens. Each layer is attention, then a gated feed-forward
    network; both read the RMS-normalized stream and add to it."""

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    ffn: int
    vocab: int
    context: int
    epsilon: float
    rope: Rope = Rope()
    local_rope: Rope | None = None
    """Of layers with a window, where it differs."""
    windows: tuple[int, ...] = ()
    """By layer: how many tokens it looks at, itself included (0: all). Empty: all look at all."""
    activation: Literal["silu", "gelu"] = "silu"
    """Of the gate; gelu is its approximation by tanh."""
    scale: float = 0.0
    """Of attention; 0: one by the root of ``head_dim``."""
    embedding_scale: float = 1.0
    attention_cap: float = 0.0
    """Scores are bent by tanh to stay below it (0: not at all)."""
    logit_cap: float = 0.0
    qkv_bias: bool = False
    o_bias: bool = False
    head_norm: bool = False
    """Each head's query and key are normalized before they are rotated."""
    after_norm: bool = False
    """What attention and the network give is normalized before it is added."""
    tied: bool = False
    """The head is the embedding."""

    def __post_init__(self) -> None:
        for name, most in MOST.items():
            if not 1 <= getattr(self, name) <= most:
                raise ModelError(f"{name} is {getattr(self, name)}, not from 1 to {most}")
        if self.heads % self.kv_heads:
            raise ModelError(f"{self.heads} heads do not share {self.kv_heads} of keys evenly")
        if self.head_dim % 2:
            raise ModelError(f"head_dim {self.head_dim} is odd, and cannot be rotated in pairs")
        if not 0 < self.epsilon < 1:
            raise ModelError(f"epsilon {self.epsilon:g} is not between 0 and 1")
        if self.windows and len(self.windows) != self.layers:
            raise ModelError(f"{len(self.windows)} windows for {self.layers} layers")

    @property
    def query_scale(self) -> float:
        """What scores are multiplied by."""
        return self.scale or float(self.head_dim) ** -0.5

    def window(self, layer: int) -> int:
        """How many tokens a layer looks at; 0: all."""
        return self.windows[layer] if self.windows else 0

    def rope_of(self, layer: int) -> Rope:
        """How a layer rotates."""
        return self.local_rope if self.local_rope and self.window(layer) else self.rope

    def block(self, size: int) -> tuple[int, ...]:
        """Shape of a block of ``size`` tokens: layers, keys and values, heads, tokens, head_dim."""
        return (self.layers, 2, self.kv_heads, size, self.head_dim)

    def block_bytes(self, size: int) -> int:
        """What a block takes in FP32."""
        return 4 * prod(self.block(size))

    def tensors(self) -> dict[str, tuple[int, ...]]:
        """Name and shape of each weight; matrices are [out, in]. Those of a layer begin with its
        number."""
        q, kv = self.heads * self.head_dim, self.kv_heads * self.head_dim
        layer: dict[str, tuple[int, ...]] = {
            "attention_norm": (self.hidden,),
            "q": (q, self.hidden),
            "k": (kv, self.hidden),
            "v": (kv, self.hidden),
            "o": (self.hidden, q),
            "ffn_norm": (self.hidden,),
            "gate": (self.ffn, self.hidden),
            "up": (self.ffn, self.hidden),
            "down": (self.hidden, self.ffn),
        }
        if self.qkv_bias:
            layer |= {"q_bias": (q,), "k_bias": (kv,), "v_bias": (kv,)}
        if self.o_bias:
            layer["o_bias"] = (self.hidden,)
        if self.head_norm:
            layer |= {"q_norm": (self.head_dim,), "k_norm": (self.head_dim,)}
        if self.after_norm:
            layer |= {"attention_after": (self.hidden,), "ffn_after": (self.hidden,)}
        found: dict[str, tuple[int, ...]] = {
            "embedding": (self.vocab, self.hidden),
            "norm": (self.hidden,),
        }
        if not self.tied:
            found["head"] = (self.vocab, self.hidden)
        for number in range(self.layers):
            found |= {f"{number}.{name}": shape for name, shape in layer.items()}
        return found
