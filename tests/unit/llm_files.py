"""Tiny models of random weights, as GGUF files; tokenizers of bytes."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

HIDDEN, HEADS, KV_HEADS, FFN, LAYERS = 256, 4, 2, 256, 2
TYPES = gguf.GGMLQuantizationType
_OTHERS = [b for b in range(256) if not (33 <= b < 127 or 161 <= b < 173 or b >= 174)]
TOKENS = [
    *(chr(256 + _OTHERS.index(b)) if b in _OTHERS else chr(b) for b in range(256)),
    "he",
    "ll",
    "<|end|>",
]
"""Each byte, in the alphabet of GPT-2's tokenizer; two merged ones; and one that ends answers."""


def add_text(writer: gguf.GGUFWriter, template: str = "") -> None:
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(TOKENS)
    writer.add_token_types([1] * (len(TOKENS) - 1) + [3])
    writer.add_token_merges(["h e", "l l"])
    writer.add_eos_token_id(len(TOKENS) - 1)
    if template:
        writer.add_chat_template(template)


def weights(
    vocab: int, likely: Mapping[int, float] | None = None, seed: int = 5
) -> dict[str, np.ndarray[Any, Any]]:
    """Random ones; ``likely``: by how much the logits of some tokens are higher, about."""
    rng = np.random.default_rng(seed)
    kv = HIDDEN // HEADS * KV_HEADS
    shapes: dict[str, tuple[int, ...]] = {
        "token_embd.weight": (vocab, HIDDEN),
        "output_norm.weight": (HIDDEN,),
    }
    for n in range(LAYERS):
        shapes |= {
            f"blk.{n}.attn_norm.weight": (HIDDEN,),
            f"blk.{n}.attn_q.weight": (HIDDEN, HIDDEN),
            f"blk.{n}.attn_k.weight": (kv, HIDDEN),
            f"blk.{n}.attn_v.weight": (kv, HIDDEN),
            f"blk.{n}.attn_output.weight": (HIDDEN, HIDDEN),
            f"blk.{n}.ffn_norm.weight": (HIDDEN,),
            f"blk.{n}.ffn_gate.weight": (FFN, HIDDEN),
            f"blk.{n}.ffn_up.weight": (FFN, HIDDEN),
            f"blk.{n}.ffn_down.weight": (HIDDEN, FFN),
        }
    found = {
        name: (rng.normal(0, 0.1, shape) if len(shape) > 1 else 1 + rng.normal(0, 0.1, shape))
        .astype(np.float32)
        for name, shape in shapes.items()
    }  # fmt: skip
    if likely:
        embedding = found["token_embd.weight"]  # all tokens point one way, these more so
        embedding[:, 0] = 8.0
        for token, more in likely.items():
            embedding[token, 0] += more / 8
    return found


def write(
    path: Path,
    kind: TYPES = TYPES.F32,
    architecture: str = "llama",
    text: bool = False,
    template: str = "",
    likely: Mapping[int, float] | None = None,
    seed: int = 5,
    **more: int,
) -> Path:
    """A model of random weights; ``text``: with a tokenizer of bytes; ``template``: for chats;
    ``likely`` and ``seed``: see ``weights``."""
    writer = gguf.GGUFWriter(path, architecture)
    keys = {
        "block_count": LAYERS,
        "embedding_length": HIDDEN,
        "attention.head_count": HEADS,
        "attention.head_count_kv": KV_HEADS,
        "feed_forward_length": FFN,
        "context_length": 64,
    }
    for name, value in (keys | more).items():
        writer.add_uint32(f"{architecture}.{name}", value)
    writer.add_float32(f"{architecture}.attention.layer_norm_rms_epsilon", 1e-5)
    if text:
        add_text(writer, template)
    for name, tensor in weights(len(TOKENS) if text else 64, likely, seed).items():
        if tensor.ndim == 1:
            writer.add_tensor(name, tensor)
        else:
            writer.add_tensor(name, gguf.quants.quantize(tensor, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


END = 256


def write_tokenizer(folder: Path) -> None:
    """A ``tokenizer.json`` of bytes (in another order than ASCII's) and of one token that ends
    answers."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {letter: token for token, letter in enumerate(letters)} | {"<|end|>": END}
    tokenizer = Tokenizer(models.BPE(vocab, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|end|>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(
        '{"eos_token": "<|end|>", "tokenizer_class": "PreTrainedTokenizerFast"}'
    )
