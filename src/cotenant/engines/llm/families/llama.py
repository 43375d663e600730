"""Llama and those built like it: Mistral, Qwen 2 and 3, SmolLM."""

from __future__ import annotations

from math import pi
from typing import Final

import numpy as np

from cotenant.domain.errors import ModelError
from cotenant.engines.llm.decoder import Decoder, Rope, plain_frequencies
from cotenant.engines.llm.families.base import (
    Family,
    Rows,
    divisors_of_gguf,
    sizes_of_config,
    sizes_of_gguf,
    windows_of_config,
)
from cotenant.engines.llm.gguf import Gguf
from cotenant.engines.llm.keys import Keys

BASE: Final = 10_000.0


def _from_gguf(file: Gguf, architecture: str) -> Decoder:
    keys = Keys(file.keys, architecture + ".")
    sizes = sizes_of_gguf(file, architecture)
    window = keys.whole("attention.sliding_window", 0)
    return Decoder(
        **sizes,
        rope=Rope(keys.number("rope.freq_base", BASE), divisors_of_gguf(file, architecture)),
        windows=(window,) * sizes["layers"] if window else (),
    )


def _rows(decoder: Decoder, architecture: str, name: str) -> Rows | None:
    """Of architecture "llama" the rows of each head lie as pairs that are rotated together."""
    part = name.rpartition(".")[2]
    heads = {"q": decoder.heads, "k": decoder.kv_heads}.get(part.removesuffix("_bias"))
    if architecture != "llama" or heads is None:
        return None
    pairs = np.arange(heads * decoder.head_dim).reshape(heads, decoder.head_dim // 2, 2)
    return np.ascontiguousarray(pairs.swapaxes(1, 2)).ravel()


def _from_config(keys: Keys, model_type: str) -> Decoder:
    sizes = sizes_of_config(keys)
    if keys.flag("mlp_bias", False):
        raise ModelError("mlp_bias is not served")
    if keys.text("hidden_act", "silu") != "silu":
        raise ModelError(f"hidden_act {keys.text('hidden_act')!r}; served is silu")
    bias = keys.flag("attention_bias", False)
    return Decoder(
        **sizes,
        rope=rope_of_config(keys, sizes["head_dim"]),
        windows=_windows(keys, model_type, sizes["layers"]),
        qkv_bias=bias or model_type == "qwen2",
        o_bias=bias,
        head_norm=model_type == "qwen3",
        tied=keys.flag("tie_word_embeddings", False),
    )


def _windows(keys: Keys, model_type: str, layers: int) -> tuple[int, ...]:
    if model_type.startswith("qwen") and not keys.flag("use_sliding_window", False):
        return ()
    window = keys.whole("sliding_window", 0)
    if not window or keys.has("layer_types"):
        return windows_of_config(keys, window, layers)
    first = keys.whole("max_window_layers", 0) if model_type.startswith("qwen") else 0
    return tuple(window * (layer >= first) for layer in range(layers))


def rope_of_config(keys: Keys, head_dim: int, base: float = BASE) -> Rope:
    """From ``rope_parameters``, or from ``rope_theta`` and ``rope_scaling`` as older files have
    it."""
    given = keys.table("rope_parameters") or keys.table("rope_scaling") or Keys({})
    base = given.number("rope_theta", keys.number("rope_theta", base))
    if given.number("partial_rotary_factor", keys.number("partial_rotary_factor", 1.0)) != 1:
        raise ModelError("heads that are rotated in part are not served")
    kind = given.text("rope_type", given.text("type", "default"))
    if kind == "default":
        return Rope(base)
    if kind == "linear":
        return Rope(base, (given.number("factor"),) * (head_dim // 2))
    if kind == "llama3":
        return Rope(base, _llama3(given, base, head_dim))
    raise ModelError(f"rope_type {kind!r} is not served; served are default, linear and llama3")


def _llama3(keys: Keys, base: float, head_dim: int) -> tuple[float, ...]:
    """Llama 3.1: only frequencies that turn less than ``high`` times within what the model was
    first trained with are divided, those below ``low`` wholly."""
    low, high = keys.number("low_freq_factor"), keys.number("high_freq_factor")
    if not 0 < low < high:
        raise ModelError(f"low_freq_factor {low:g} is not below high_freq_factor {high:g}")
    turns = keys.whole("original_max_position_embeddings") * plain_frequencies(base, head_dim)
    keep = np.clip((turns / (2 * pi) - low) / (high - low), 0.0, 1.0)
    return tuple(map(float, 1 / (keep + (1 - keep) / keys.number("factor"))))


LLAMA: Final = Family(
    architectures=("llama", "qwen2", "qwen3"),
    model_types=("llama", "mistral", "qwen2", "qwen3"),
    from_gguf=_from_gguf,
    from_config=_from_config,
    rows=_rows,
)
