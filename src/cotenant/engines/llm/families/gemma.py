"""Gemma 1, 2 and 3 (text): norms on both sides, gelu, scaled embeddings, windows in turns."""

from __future__ import annotations

from typing import Any, Final

import numpy as np

from cotenant.domain.errors import ModelError
from cotenant.engines.llm.decoder import Decoder, Rope
from cotenant.engines.llm.families.base import (
    Family,
    Floats,
    divisors_of_gguf,
    sizes_of_config,
    sizes_of_gguf,
    windows_of_config,
)
from cotenant.engines.llm.families.llama import BASE, rope_of_config
from cotenant.engines.llm.gguf import Gguf
from cotenant.engines.llm.keys import Keys

GROUPS: Final = {"gemma": 1, "gemma2": 2, "gemma3": 6, "gemma3_text": 6}
"""The last of so many layers looks at all; the others have a window, where there is one."""
SCALED_BY_WIDTH: Final = {"gemma2": 46, "gemma3": 62}
"""Models with so many layers (27B) scale scores by hidden / heads, not by head_dim."""


def _common(sizes: dict[str, Any], name: str) -> dict[str, Any]:
    later = name != "gemma"
    return sizes | {
        "activation": "gelu",
        "embedding_scale": float(np.float32(sizes["hidden"]) ** np.float32(0.5)),
        "after_norm": later,
        "head_norm": name.startswith("gemma3"),
    }


def _windows(name: str, window: int, layers: int) -> tuple[int, ...]:
    group = GROUPS[name]
    found = tuple(window * ((layer + 1) % group > 0) for layer in range(layers))
    return found if any(found) else ()


def _from_gguf(file: Gguf, architecture: str) -> Decoder:
    keys = Keys(file.keys, architecture + ".")
    sizes = sizes_of_gguf(file, architecture)
    base = keys.number("rope.freq_base", 1e6 if architecture == "gemma3" else BASE)
    wide = SCALED_BY_WIDTH.get(architecture) == sizes["layers"]
    return Decoder(
        **_common(sizes, architecture),
        rope=Rope(base, divisors_of_gguf(file, architecture)),
        local_rope=Rope(BASE) if architecture == "gemma3" else None,
        windows=_windows(architecture, keys.whole("attention.sliding_window", 0), sizes["layers"]),
        scale=(sizes["hidden"] / sizes["heads"]) ** -0.5 if wide else 0.0,
        attention_cap=keys.number("attn_logit_softcapping", 0.0),
        logit_cap=keys.number("final_logit_softcapping", 0.0),
    )


def _from_config(keys: Keys, model_type: str) -> Decoder:
    sizes = sizes_of_config(keys)
    activation = keys.text("hidden_activation", keys.text("hidden_act", "gelu_pytorch_tanh"))
    if activation not in ("gelu", "gelu_pytorch_tanh"):
        raise ModelError(f"hidden_activation {activation!r}; served is gelu_pytorch_tanh")
    if keys.flag("attention_bias", False):
        raise ModelError("attention_bias is not served with Gemma")
    scalar = keys.number("query_pre_attn_scalar", 0.0)
    window = keys.whole("sliding_window", 0)
    rope, local = _ropes(keys, model_type, sizes["head_dim"])
    return Decoder(
        **_common(sizes, model_type),
        rope=rope,
        local_rope=local,
        windows=windows_of_config(keys, window, sizes["layers"])
        or _windows(model_type, window, sizes["layers"]),
        scale=scalar**-0.5 if scalar else 0.0,
        attention_cap=keys.number("attn_logit_softcapping", 0.0),
        logit_cap=keys.number("final_logit_softcapping", 0.0),
        tied=keys.flag("tie_word_embeddings", True),
    )


def _ropes(keys: Keys, model_type: str, head_dim: int) -> tuple[Rope, Rope | None]:
    """Of layers that look at all, and of those with a window."""
    if not model_type.startswith("gemma3"):
        return rope_of_config(keys, head_dim), None
    given = keys.table("rope_parameters") or Keys({})
    if given.has("full_attention"):
        full, local = given.table("full_attention"), given.table("sliding_attention")
        return (
            rope_of_config(Keys({"rope_parameters": full and full.values}), head_dim),
            rope_of_config(Keys({"rope_parameters": local and local.values}), head_dim),
        )
    local_base = keys.number("rope_local_base_freq", BASE)
    return rope_of_config(keys, head_dim, base=1e6), Rope(local_base)


def _given(name: str, weight: Floats) -> Floats:
    """Weights of norms are stored less one."""
    is_norm = name.endswith(("norm", "_after"))
    return weight + np.float32(1) if is_norm else weight


GEMMA: Final = Family(
    architectures=("gemma",),
    model_types=("gemma",),
    from_gguf=_from_gguf,
    from_config=_from_config,
    given=_given,
)
LATER_GEMMAS: Final = GEMMA._replace(
    architectures=("gemma2", "gemma3"),
    model_types=("gemma2", "gemma3_text"),
    names={
        "attention_after": "post_attention_layernorm.weight",
        "ffn_norm": "pre_feedforward_layernorm.weight",
        "ffn_after": "post_feedforward_layernorm.weight",
    },
)
