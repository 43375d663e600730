"""Idefics 3 and SmolVLM: a SigLIP tower, a connector, and a decoder of Llama's family."""

from __future__ import annotations

from typing import Final

from cotenant.domain.errors import ModelError
from cotenant.engines.llm.decoder import Decoder
from cotenant.engines.llm.families.base import Family, no_gguf
from cotenant.engines.llm.families.llama import LLAMA
from cotenant.engines.llm.keys import Keys
from cotenant.engines.llm.vision import Vision

_TENSORS: Final = {
    "patches": "model.vision_model.embeddings.patch_embedding",
    "positions": "model.vision_model.embeddings.position_embedding",
    "norm": "model.vision_model.post_layernorm",
    "connector": "model.connector.modality_projection.proj",
    "first_norm": "layer_norm1",
    "second_norm": "layer_norm2",
    "q": "self_attn.q_proj",
    "k": "self_attn.k_proj",
    "v": "self_attn.v_proj",
    "o": "self_attn.out_proj",
    "up": "mlp.fc1",
    "down": "mlp.fc2",
}


def _from_config(keys: Keys, model_type: str) -> Decoder:
    text = _part(keys, model_type, "text_config")
    kind = text.text("model_type", "llama")
    if kind not in LLAMA.model_types:
        raise ModelError(
            f"text_config.model_type {kind!r} is not served with {model_type}; served are"
            f" {', '.join(LLAMA.model_types)}"
        )
    tied = keys.flag("tie_word_embeddings", False)
    return LLAMA.from_config(Keys({**text.values, "tie_word_embeddings": tied}), kind)


def _vision(keys: Keys, model_type: str) -> Vision:
    """What ``config.json`` leaves out is as the reference has it."""
    given, text = (_part(keys, model_type, name) for name in ("vision_config", "text_config"))
    activation = given.text("hidden_act", "gelu_pytorch_tanh")
    if activation != "gelu_pytorch_tanh":
        raise ModelError(f"vision_config.hidden_act is {activation!r}; served is gelu_pytorch_tanh")
    if given.whole("num_channels", 3) != 3:
        raise ModelError("vision_config.num_channels is not 3; served are images of three colours")
    return Vision(
        side=given.whole("image_size", 224),
        patch=given.whole("patch_size", 32),
        layers=given.whole("num_hidden_layers", 12),
        hidden=given.whole("hidden_size", 1152),
        heads=given.whole("num_attention_heads", 16),
        ffn=given.whole("intermediate_size", 3072),
        epsilon=given.number("layer_norm_eps", 1e-6),
        shuffle=keys.whole("scale_factor", 2),
        out=text.whole("hidden_size"),
        token=keys.whole("image_token_id"),
    )


def _part(keys: Keys, model_type: str, name: str) -> Keys:
    found = keys.table(name)
    if found is None:
        raise ModelError(f"config.json of {model_type} has no {name}")
    return found


def _vision_tensor(name: str) -> str:
    """What a safetensors file calls a weight of the tower."""
    number, _, part = name.rpartition(".")
    kind = "bias" if part.endswith("_bias") else "weight"
    found = f"{_TENSORS[part.removesuffix('_bias')]}.{kind}"
    return f"model.vision_model.encoder.layers.{number}.{found}" if number else found


IDEFICS: Final = Family(
    architectures=(),
    model_types=("idefics3", "smolvlm"),
    from_gguf=no_gguf,
    from_config=_from_config,
    root="model.text_model",
    vision=_vision,
    vision_tensor=_vision_tensor,
)
