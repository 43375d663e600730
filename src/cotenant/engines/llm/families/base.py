"""What a family says of itself, and what most of them share."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from cotenant.domain.errors import ModelError
from cotenant.engines.llm.decoder import Decoder
from cotenant.engines.llm.gguf import Gguf, floats
from cotenant.engines.llm.keys import Keys
from cotenant.engines.llm.vision import Vision

Floats = npt.NDArray[np.float32]
Rows = npt.NDArray[np.int64]


class Family(NamedTuple):
    """``architectures``: its names in GGUF files; ``model_types``: those in ``config.json``.

    ``from_gguf`` and ``from_config`` read a ``Decoder``. ``rows``: in which order the rows of a
    GGUF tensor are to be taken (None: as they are). ``names``: tensors of safetensors files that
    are called otherwise than by most, without number and prefix. ``given``: what a weight of a
    safetensors file means. ``root``: what most names begin with.

    Of models that see images ``vision`` reads the tower from ``config.json``, and
    ``vision_tensor`` says what a safetensors file calls a weight of it."""

    architectures: tuple[str, ...]
    model_types: tuple[str, ...]
    from_gguf: Callable[[Gguf, str], Decoder]
    from_config: Callable[[Keys, str], Decoder]
    rows: Callable[[Decoder, str, str], Rows | None] = lambda *_: None
    names: Mapping[str, str] = {}
    given: Callable[[str, Floats], Floats] = lambda _, weight: weight
    root: str = "model"
    vision: Callable[[Keys, str], Vision] | None = None
    vision_tensor: Callable[[str], str] = str

    def tensor(self, name: str) -> str:
        """What a safetensors file calls a weight."""
        number, _, part = name.rpartition(".")
        found = self.names.get(part) or _SAFETENSORS[part]
        if number:
            return f"{self.root}.layers.{number}.{found}"
        return found if part == "head" else f"{self.root}.{found}"


def no_gguf(file: Gguf, architecture: str) -> Decoder:  # noqa: ARG001
    """Of a family that has no GGUF files."""
    raise ModelError(f"{architecture} is not served from GGUF files; safetensors are")


def gguf_tensor(name: str) -> str:
    """What a GGUF file calls a weight."""
    number, _, part = name.rpartition(".")
    found = _GGUF[part]
    return f"blk.{number}.{found}" if number else found


def family(known: tuple[Family, ...], name: str, gguf: bool) -> Family:
    """The family of an architecture, or of a model type. Raises ModelError with those known."""
    names = [(f, n) for f in known for n in (f.architectures if gguf else f.model_types)]
    for each, has in names:
        if has == name:
            return each
    kind = "architecture" if gguf else "model_type"
    raise ModelError(f"{kind} {name!r} is not known; known are {', '.join(n for _, n in names)}")


def sizes_of_gguf(file: Gguf, architecture: str) -> dict[str, Any]:
    """Fields of a ``Decoder`` that all families give the same names."""
    keys = Keys(file.keys, architecture + ".")
    if keys.whole("expert_count", 0):
        raise ModelError(f"{architecture} with experts is not served; dense models are")
    embedding = file.tensors.get(gguf_tensor("embedding"))
    if embedding is None:
        raise ModelError(f"there is no tensor {gguf_tensor('embedding')}")
    heads, hidden = keys.whole("attention.head_count"), keys.whole("embedding_length")
    head_dim = keys.whole("attention.key_length", hidden // max(1, heads))
    if keys.whole("attention.value_length", head_dim) != head_dim:
        raise ModelError("keys and values of different length are not served")
    if keys.whole("rope.dimension_count", head_dim) != head_dim:
        raise ModelError("heads that are rotated in part are not served")
    return {
        "layers": keys.whole("block_count"),
        "hidden": hidden,
        "heads": heads,
        "kv_heads": keys.whole("attention.head_count_kv", heads),
        "head_dim": head_dim,
        "ffn": keys.whole("feed_forward_length"),
        "vocab": embedding.shape[0],
        "context": keys.whole("context_length"),
        "epsilon": keys.number("attention.layer_norm_rms_epsilon"),
        "qkv_bias": "blk.0.attn_q.bias" in file.tensors,
        "o_bias": "blk.0.attn_output.bias" in file.tensors,
        "head_norm": "blk.0.attn_q_norm.weight" in file.tensors,
        "after_norm": "blk.0.post_attention_norm.weight" in file.tensors,
        "tied": gguf_tensor("head") not in file.tensors,
    }


def divisors_of_gguf(file: Gguf, architecture: str) -> tuple[float, ...]:
    """What frequencies are divided by: a tensor of the file, or one factor for all."""
    stored = file.tensors.get("rope_freqs.weight")
    if stored is not None:
        return tuple(map(float, floats(stored).ravel()))
    keys = Keys(file.keys, architecture + ".rope.scaling.")
    kind = keys.text("type", "none")
    if kind == "none":
        return ()
    if kind != "linear":
        raise ModelError(f"{architecture}.rope.scaling.type {kind!r}; served are none and linear")
    half: int = sizes_of_gguf(file, architecture)["head_dim"] // 2
    return (keys.number("factor"),) * half


def sizes_of_config(keys: Keys) -> dict[str, Any]:
    """Fields of a ``Decoder`` that all families give the same names."""
    heads, hidden = keys.whole("num_attention_heads"), keys.whole("hidden_size")
    return {
        "layers": keys.whole("num_hidden_layers"),
        "hidden": hidden,
        "heads": heads,
        "kv_heads": keys.whole("num_key_value_heads", heads),
        "head_dim": keys.whole("head_dim", hidden // max(1, heads)),
        "ffn": keys.whole("intermediate_size"),
        "vocab": keys.whole("vocab_size"),
        "context": keys.whole("max_position_embeddings"),
        "epsilon": keys.number("rms_norm_eps", 1e-6),
    }


def windows_of_config(keys: Keys, window: int, layers: int) -> tuple[int, ...]:
    """By ``layer_types``, where the file lists them."""
    kinds = keys.values.get("layer_types")
    if kinds is None:
        return ()
    known = {"full_attention": 0, "sliding_attention": window}
    if not isinstance(kinds, list) or len(kinds) != layers or not set(kinds) <= set(known):
        raise ModelError(f"layer_types is not a list of {layers} of {', '.join(known)}")
    found = tuple(known[kind] for kind in kinds)
    return found if any(found) else ()


_GGUF = {
    "embedding": "token_embd.weight",
    "norm": "output_norm.weight",
    "head": "output.weight",
    "attention_norm": "attn_norm.weight",
    "q": "attn_q.weight",
    "k": "attn_k.weight",
    "v": "attn_v.weight",
    "o": "attn_output.weight",
    "q_bias": "attn_q.bias",
    "k_bias": "attn_k.bias",
    "v_bias": "attn_v.bias",
    "o_bias": "attn_output.bias",
    "q_norm": "attn_q_norm.weight",
    "k_norm": "attn_k_norm.weight",
    "attention_after": "post_attention_norm.weight",
    "ffn_norm": "ffn_norm.weight",
    "gate": "ffn_gate.weight",
    "up": "ffn_up.weight",
    "down": "ffn_down.weight",
    "ffn_after": "post_ffw_norm.weight",
}
_SAFETENSORS = {
    "embedding": "embed_tokens.weight",
    "norm": "norm.weight",
    "head": "lm_head.weight",
    "attention_norm": "input_layernorm.weight",
    "q": "self_attn.q_proj.weight",
    "k": "self_attn.k_proj.weight",
    "v": "self_attn.v_proj.weight",
    "o": "self_attn.o_proj.weight",
    "q_bias": "self_attn.q_proj.bias",
    "k_bias": "self_attn.k_proj.bias",
    "v_bias": "self_attn.v_proj.bias",
    "o_bias": "self_attn.o_proj.bias",
    "q_norm": "self_attn.q_norm.weight",
    "k_norm": "self_attn.k_norm.weight",
    "ffn_norm": "post_attention_layernorm.weight",
    "gate": "mlp.gate_proj.weight",
    "up": "mlp.up_proj.weight",
    "down": "mlp.down_proj.weight",
}
