"""Weights as files have them: what is repacked is not changed, and multiplies as FP32 does."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cotenant.domain.errors import ModelError
from cotenant.engines.llm.checkpoint import open_checkpoint
from cotenant.engines.llm.gguf import KINDS, Stored, floats
from cotenant.engines.llm.language import LlmLanguage
from cotenant.engines.llm.plan import Work
from cotenant.engines.llm.runner import Runner, Sizes
from cotenant.engines.llm.weights import Build, quantize, repack
from tests.unit.llm_files import HEADS, HIDDEN, KV_HEADS, TYPES, write

MEMORY = Sizes(blocks=8, size=4, host=2, context=32)
TOKENS = (5, 9, 60, 3, 3, 17, 22, 8, 41)


def random_blocks(name: str, shape: tuple[int, ...]) -> Stored:
    """Any bytes, but scales that are small numbers."""
    kind = next(kind for kind in KINDS.values() if kind.name == name)
    rng = np.random.default_rng(3)
    count = shape[0] * shape[1] // kind.numbers
    data = rng.integers(0, 256, (count, kind.size)).astype(np.uint8)
    halves = 1 if name in ("Q4_0", "Q8_0") else 2
    scales = rng.normal(0, 0.02, (count, halves)).astype(np.float16)
    data[:, : 2 * halves] = scales.view(np.uint8).reshape(count, -1)
    return Stored("w", shape, kind, data.ravel())


def logits(path: Path, build: Build) -> np.ndarray[Any, Any]:
    runner = Runner(open_checkpoint(path), build, MEMORY, (1,))
    works = [Work(1, 0, TOKENS[:5], (3, 1, 4), 5), Work(1, 5, TOKENS[5:], (3, 1, 4), 4)]
    return np.concatenate([runner.compute(1, [work])[1].logits for work in works])


@pytest.mark.parametrize("name", ["Q4_0", "Q4_1", "Q4_K", "Q8_0"])
def test_what_is_repacked_is_the_same_weights(name: str) -> None:
    stored = random_blocks(name, (6, 512))
    found = repack(stored).floats()
    np.testing.assert_allclose(found, floats(stored), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("bits", [4, 8])
def test_rounding_is_off_by_less_than_a_step(bits: Any) -> None:
    weight = np.random.default_rng(1).normal(0, 1, (8, 96)).astype(np.float32)
    weight[3, 32:64] = 0
    found = quantize(weight, bits)
    steps = np.repeat(np.abs(found.scales), 32, axis=1)
    assert (np.abs(found.floats() - weight) <= steps * 1.001).all()
    assert not found.floats()[3, 32:64].any()


@pytest.mark.parametrize("kind", ["F32", "F16", "Q4_0", "Q4_1", "Q8_0"])
def test_a_build_as_stored_computes_what_fp32_does(kind: str, tmp_path: Path) -> None:
    path = write(tmp_path / "model.gguf", TYPES[kind])
    exact = logits(path, Build(bits=32))
    found = logits(path, Build())
    assert abs(exact).max() > 0.5
    np.testing.assert_allclose(found, exact, atol=1e-4 * abs(exact).max())


@pytest.mark.parametrize("build", [Build(bits=8), Build(bits=8, rounded=True), Build(rounded=True)])
def test_other_builds_are_near(build: Build, tmp_path: Path) -> None:
    path = write(tmp_path / "model.gguf", TYPES.Q4_0)
    exact, found = logits(path, Build(bits=32)), logits(path, build)
    alike = np.corrcoef(exact.ravel(), found.ravel())[0, 1]
    assert alike > 0.99


def test_heads_of_llama_are_paired_otherwise_than_those_of_qwen(tmp_path: Path) -> None:
    """The same numbers in a file: the one architecture's rows are those of the other, moved."""
    llama = open_checkpoint(write(tmp_path / "a.gguf", TYPES.F32))
    qwen = open_checkpoint(write(tmp_path / "b.gguf", TYPES.F32, architecture="qwen2"))
    head = HIDDEN // HEADS
    for name, heads in (("1.q", HEADS), ("1.k", KV_HEADS)):
        mine, other = (c.floats(name).reshape(heads, head, -1) for c in (llama, qwen))
        np.testing.assert_array_equal(mine[:, : head // 2], other[:, 0::2])
        np.testing.assert_array_equal(mine[:, head // 2 :], other[:, 1::2])


@pytest.mark.parametrize(
    ("architecture", "changed", "named"),
    [
        ("mamba", {}, "mamba"),
        ("llama", {"attention.head_count": 0}, "heads"),
        ("llama", {"attention.head_count_kv": 3}, "heads"),
        ("llama", {"feed_forward_length": 128}, "ffn_gate"),
        ("llama", {"block_count": 3}, "blk.2"),
        ("llama", {"block_count": 1}, "blk.1"),
        ("llama", {"block_count": 4_000_000_000}, "layers"),
        ("llama", {"expert_count": 8}, "experts"),
        ("llama", {"rope.dimension_count": 32}, "rotated"),
    ],
)
def test_a_file_that_does_not_hold_what_it_says_is_refused(
    architecture: str, changed: dict[str, int], named: str, tmp_path: Path
) -> None:
    path = write(tmp_path / "model.gguf", TYPES.F32, architecture, **changed)
    with pytest.raises(ModelError, match=named):
        open_checkpoint(path)


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model") / "model.gguf"
    return write(path, text=True, template="{{ messages[0].content }}")


DESCRIBED = 5000
"""Bytes in which a model that was ``written`` says what it is, before its weights."""
DAMAGE = st.tuples(st.integers(0, DESCRIBED) | st.integers(0, 300), st.integers(0, 255))


@settings(max_examples=100, deadline=None)
@given(st.lists(DAMAGE, min_size=1, max_size=3))
def test_a_damaged_model_is_refused_or_opened_but_nothing_else(
    written: Path, damage: list[tuple[int, int]]
) -> None:
    """All that is made of a file before anybody asks: what it looks like, its text, its chats."""
    with written.open("r+b") as file:
        whole = file.read(DESCRIBED + 1)
        changed = bytearray(whole)
        for at, value in damage:
            changed[at] = value
        file.seek(0)
        file.write(changed)
        file.flush()
        try:
            for opened in (open_checkpoint, LlmLanguage):
                with contextlib.suppress(ModelError):
                    opened(written)
        finally:
            file.seek(0)
            file.write(whole)
