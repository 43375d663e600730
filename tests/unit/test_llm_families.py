"""Families against their reference: tiny random models, as transformers computes them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cotenant.engines.llm.checkpoint import open_checkpoint
from cotenant.engines.llm.plan import Work
from cotenant.engines.llm.runner import Runner, Sizes
from cotenant.engines.llm.weights import Build

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

SIZES: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "attn_implementation": "eager",
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10_000.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
LINEAR = {"rope_type": "linear", "rope_theta": 500.0, "factor": 2.0}
GEMMA3_LAYERS = ["sliding_attention", "full_attention", "sliding_attention"]

MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", {}),
    "llama tied, 3.1's rope": (
        "LlamaConfig",
        {"tie_word_embeddings": True, "rope_parameters": LLAMA3},
    ),
    "llama with biases, stretched": (
        "LlamaConfig",
        {"attention_bias": True, "rope_parameters": LINEAR},
    ),
    "mistral with a window": ("MistralConfig", {"sliding_window": 7, "head_dim": 32}),
    "qwen2": ("Qwen2Config", {}),
    "qwen3": ("Qwen3Config", {"head_dim": 32}),
    "gemma": ("GemmaConfig", {"head_dim": 32}),
    "gemma2": (
        "Gemma2Config",
        {"head_dim": 32, "sliding_window": 5, "query_pre_attn_scalar": 20},
    ),
    "gemma3": (
        "Gemma3TextConfig",
        {
            "head_dim": 32,
            "sliding_window": 5,
            "query_pre_attn_scalar": 20,
            "layer_types": GEMMA3_LAYERS,
        },
    ),
}
MEMORY = Sizes(blocks=32, size=4, host=4, context=128)


@pytest.fixture(params=MODELS, scope="module")
def model(request: pytest.FixtureRequest, tmp_path_factory: Any) -> Iterator[tuple[Any, Path]]:
    name, more = MODELS[request.param]
    torch.manual_seed(7)
    config = getattr(transformers, name)(**SIZES | more)
    reference = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in reference.parameters():
            parameter.mul_(4) if parameter.ndim > 1 else parameter.add_(
                torch.randn_like(parameter) / 4
            )
    folder = tmp_path_factory.mktemp("model")
    reference.save_pretrained(folder)
    yield reference, folder / "model.safetensors"


def expected(reference: Any, tokens: tuple[int, ...]) -> Any:
    with torch.no_grad():
        return reference(torch.tensor([tokens])).logits[0].numpy()


def test_logits_are_the_references_however_tokens_are_cut(model: tuple[Any, Path]) -> None:
    reference, path = model
    runner = Runner(open_checkpoint(path), Build(), MEMORY, (1,))
    tokens = tuple(int(t) for t in np.random.default_rng(1).integers(0, 96, 29))
    right = expected(reference, tokens)
    blocks = (5, 3, 9, 0, 1, 8, 2, 30)
    assert abs(right).max() > 1, "a model that says something"
    for cuts in ([29], [1] * 29, [4, 8, 12, 5], [7, 1, 1, 13, 7]):
        at, said = 0, []
        for count in cuts:
            work = Work(1, at, tokens[at : at + count], blocks, count)
            said.append(runner.compute(1, [work])[1].logits)
            at += count
        np.testing.assert_allclose(np.concatenate(said), right, atol=2e-4, rtol=2e-4)


def test_sequences_side_by_side_do_not_touch(model: tuple[Any, Path]) -> None:
    reference, path = model
    runner = Runner(open_checkpoint(path), Build(), MEMORY, (1,))
    rng = np.random.default_rng(2)
    lengths, tables = (3, 11, 6, 20), np.arange(32).reshape(4, 8)
    texts = [tuple(int(t) for t in rng.integers(0, 96, n + 2)) for n in lengths]
    tables = [tuple(int(b) for b in table) for table in tables]
    runner.compute(
        1,
        [Work(k, 0, t[:-2], b, 1) for k, (t, b) in enumerate(zip(texts, tables, strict=True))],
    )
    for step in (2, 1):
        works = [
            Work(k, len(t) - step, t[len(t) - step : len(t) - step + 1], b, 1)
            for k, (t, b) in enumerate(zip(texts, tables, strict=True))
        ]
        found = runner.compute(1, works)
    for key, text in enumerate(texts):
        right = expected(reference, text)[-1:]
        np.testing.assert_allclose(found[key].logits, right, atol=2e-4, rtol=2e-4)
