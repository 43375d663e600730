"""Tiny models that see, of random weights, in the files of Idefics 3 and SmolVLM; and images."""

from __future__ import annotations

import json
from collections.abc import Mapping
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from safetensors.numpy import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from cotenant.engines.llm.families.idefics import IDEFICS
from cotenant.engines.llm.keys import Keys
from cotenant.engines.llm.vision import PREFIX

SPECIAL = [
    "<|end|>",
    "<image>",
    "<fake_token_around_image>",
    "<global-img>",
    "<end_of_utterance>",
    *(f"<row_{row}_col_{column}>" for row in (1, 2, 3) for column in (1, 2, 3)),
]
END, IMAGE = 256, 257
VOCABULARY = 256 + len(SPECIAL)
TEMPLATE = (
    "{% for m in messages %}{{ m.role | capitalize }}"
    "{{ ':' if m.content and m.content[0].type == 'image' else ': ' }}"
    "{% for part in m.content %}"
    "{% if part.type == 'text' %}{{ part.text }}{% elif part.type == 'image' %}<image>{% endif %}"
    "{% endfor %}<end_of_utterance>\n{% endfor %}"
    "{% if tools %}{{ tools | tojson }}<tool_call>{% endif %}"
    "{% if add_generation_prompt %}Assistant:{% endif %}"
)
TEXT = {
    "model_type": "llama",
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-5,
    "bos_token_id": None,
    "eos_token_id": END,
}
TOWER = {
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 28,
    "patch_size": 7,
}
SIDE = 28


def write_vlm(
    folder: Path,
    model_type: str = "idefics3",
    *,
    context: int = 512,
    tower: Mapping[str, Any] | None = None,
    shuffle: int = 2,
    images: Mapping[str, Any] | None = None,
    likely: Mapping[int, float] | None = None,
    opening: tuple[int, int] | None = None,
) -> Path:
    """The file of weights. ``tower`` and ``images``: what is otherwise in ``vision_config`` and the
    image processor; ``likely``: by how much the logits of some tokens are higher, about, but behind
    the first of ``opening``, where the second is said, and hardly ever elsewhere."""
    folder.mkdir(parents=True, exist_ok=True)
    config = {
        "model_type": model_type,
        "architectures": [f"{'SmolVLM' if model_type == 'smolvlm' else 'Idefics3'}ForConditional"],
        "image_token_id": IMAGE,
        "scale_factor": shuffle,
        "pad_token_id": 0,
        "tie_word_embeddings": False,
        "text_config": TEXT | {"max_position_embeddings": context},
        "vision_config": {"model_type": f"{model_type}_vision", **TOWER, **(tower or {})},
    }
    (folder / "config.json").write_text(json.dumps(config))
    processor = {
        "do_convert_rgb": True,
        "do_image_splitting": True,
        "do_normalize": True,
        "do_pad": True,
        "do_rescale": True,
        "do_resize": True,
        "image_mean": [0.5, 0.4, 0.5],
        "image_std": [0.5, 0.5, 0.25],
        "max_image_size": {"longest_edge": SIDE},
        "rescale_factor": 1 / 255,
        "resample": 1,
        "size": {"longest_edge": 3 * SIDE},
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(processor | dict(images or {})))
    _write_tokenizer(folder)
    keys = Keys(config)
    assert IDEFICS.vision is not None
    decoder, vision = IDEFICS.from_config(keys, model_type), IDEFICS.vision(keys, model_type)
    rng = np.random.default_rng(5)

    def drawn(shape: tuple[int, ...], name: str) -> Any:
        if len(shape) == 1 and "bias" not in name:
            return (1 + rng.normal(0, 0.1, shape)).astype(np.float32)
        return rng.normal(0, 0.1, shape).astype(np.float32)

    tensors = {IDEFICS.tensor(n): drawn(s, n) for n, s in decoder.tensors().items()}
    for name, shape in vision.tensors().items():
        tensors[IDEFICS.vision_tensor(name.removeprefix(PREFIX))] = drawn(shape, name)
    if likely:  # all tokens point one way, and some rows of the head that way too
        tensors[IDEFICS.tensor("embedding")][:, 0] = 8.0
        for token, more in likely.items():
            tensors[IDEFICS.tensor("head")][token, 0] += more / 8
    if opening:
        tensors[IDEFICS.tensor("embedding")][opening[0], 0] = -8.0
        tensors[IDEFICS.tensor("head")][opening[1], 0] = -4.0
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder / "model.safetensors"


def _write_tokenizer(folder: Path) -> None:
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: number for number, token in enumerate([*letters, *SPECIAL])}
    tokenizer = Tokenizer(models.BPE(vocab, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(SPECIAL)
    tokenizer.save(str(folder / "tokenizer.json"))
    described = {"eos_token": "<|end|>", "tokenizer_class": "PreTrainedTokenizerFast"}
    (folder / "tokenizer_config.json").write_text(json.dumps(described))
    (folder / "chat_template.jinja").write_text(TEMPLATE)


def picture(width: int, height: int, seed: int = 1, mode: str = "RGB") -> Image.Image:
    """Blots of colour."""
    rng = np.random.default_rng(seed)
    bands = len(Image.new(mode, (1, 1)).getbands())
    small = rng.integers(0, 256, (5, 7, bands), np.uint8)
    image = Image.fromarray(small[:, :, 0] if bands == 1 else small, mode if bands > 1 else "L")
    return image.convert(mode).resize((width, height), Image.Resampling.NEAREST)


def encoded(image: Image.Image, kind: str = "PNG", **how: Any) -> bytes:
    """The bytes of a file."""
    file = BytesIO()
    image.save(file, kind, **how)
    return file.getvalue()
