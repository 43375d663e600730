"""GGUF files: what is in them is read, and what is wrong with one is a ModelError that says so."""

from __future__ import annotations

import contextlib
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import gguf as reference
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cotenant.domain.errors import ModelError
from cotenant.engines.llm.gguf import KINDS, Gguf, Kind, Stored, floats

TYPES = {"u8": (0, "<B"), "u32": (4, "<I"), "f32": (6, "<f"), "bool": (7, "<?"), "u64": (10, "<Q")}


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value.encode())) + value.encode()


def key(name: str, value: Any, kind: str = "u32") -> bytes:
    if isinstance(value, str):
        return text(name) + struct.pack("<I", 8) + text(value)
    if isinstance(value, list) and value and isinstance(value[0], str):
        body = b"".join(map(text, value))
        return text(name) + struct.pack("<IIQ", 9, 8, len(value)) + body
    number, code = TYPES[kind]
    if isinstance(value, list):
        body = b"".join(struct.pack(code, each) for each in value)
        return text(name) + struct.pack("<IIQ", 9, number, len(value)) + body
    return text(name) + struct.pack("<I", number) + struct.pack(code, value)


def tensor(name: str, shape: tuple[int, ...], kind: int, offset: int) -> bytes:
    dims = b"".join(struct.pack("<Q", n) for n in reversed(shape))
    return text(name) + struct.pack("<I", len(shape)) + dims + struct.pack("<IQ", kind, offset)


def file(keys: list[bytes], infos: list[bytes], data: bytes = b"", version: int = 3) -> bytes:
    head = b"GGUF" + struct.pack("<IQQ", version, len(infos), len(keys))
    head += b"".join(keys) + b"".join(infos)
    return head + b"\0" * (-len(head) % 32) + data


WEIGHTS = np.arange(12, dtype=np.float32).reshape(3, 4)
GOOD = file(
    [
        key("general.architecture", "llama"),
        key("llama.block_count", 2),
        key("tokenizer.ggml.tokens", ["<s>", "ab", "é"]),
        key("tokenizer.ggml.scores", [0.5, -1.0], "f32"),
    ],
    [tensor("w", (3, 4), 0, 0), tensor("h", (32,), 8, 64)],
    WEIGHTS.tobytes() + b"\0" * 16 + np.float16(0.5).tobytes() + bytes(range(240, 256)) * 2,
)


def read(folder: Path, content: bytes) -> Gguf:
    path = folder / "model.gguf"
    path.write_bytes(content)
    return Gguf(path)


def test_keys_and_tensors_are_read(tmp_path: Path) -> None:
    found = read(tmp_path, GOOD)
    assert found.keys["general.architecture"] == "llama"
    assert found.keys["tokenizer.ggml.tokens"] == ["<s>", "ab", "é"]
    assert found.keys["tokenizer.ggml.scores"] == [0.5, -1.0]
    assert (floats(found.tensors["w"]) == WEIGHTS).all()
    eights = floats(found.tensors["h"])
    assert (eights == 0.5 * np.tile(np.arange(-16, 0), 2)).all()


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"GGML" + GOOD[4:],
        file([], [], version=1),
        file([], [], version=0x03000000),
        GOOD[:-1],
        file([key("general.alignment", 24)], [tensor("w", (4,), 0, 0)], bytes(16)),
        file([key("a", 1), key("a", 2)], []),
        file([], [tensor("w", (4,), 0, 0)] * 2, bytes(64)),
        file([], [tensor("w", (4,), 0, 8)], bytes(64)),
        file([], [tensor("w", (4,), 0, 1 << 60)], bytes(64)),
        file([], [tensor("w", (1 << 40, 1 << 40), 0, 0)], bytes(64)),
        file([], [tensor("w", (33,), 8, 0)], bytes(64)),
        file([], [tensor("w", (0,), 0, 0)], bytes(64)),
        file([], [tensor("w", (1,) * 5, 0, 0)], bytes(64)),
        file([], [tensor("w", (4,), 99, 0)], bytes(64)),
        b"GGUF" + struct.pack("<IQQ", 3, 1 << 50, 0),
        file([text("a") + struct.pack("<IIQ", 9, 4, 1 << 60)], []),
        file([text("a") + struct.pack("<IIQ", 9, 9, 1)], [], bytes(64)),
        file([text("a") + struct.pack("<I", 77)], []),
        file([struct.pack("<Q", 2) + b"\xff\xfe" + struct.pack("<IB", 0, 1)], []),
    ],
)
def test_what_is_wrong_with_a_file_is_said(tmp_path: Path, content: bytes) -> None:
    with pytest.raises(ModelError, match=r"model\.gguf"):
        read(tmp_path, content)


@settings(
    max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    st.lists(st.tuples(st.integers(0, len(GOOD) - 1), st.integers(0, 255)), max_size=4), st.data()
)
def test_a_damaged_file_is_refused_or_read_but_nothing_else(
    tmp_path: Path, damage: list[tuple[int, int]], data: st.DataObject
) -> None:
    content = bytearray(GOOD)
    for at, value in damage:
        content[at] = value
    content = content[: data.draw(st.integers(0, len(content)))]
    try:
        found = read(tmp_path, bytes(content))
    except ModelError:
        return
    for each in found.tensors.values():
        with contextlib.suppress(ModelError):
            assert floats(each).shape == each.shape


CUT = """
import mmap, sys
from pathlib import Path
from cotenant.domain.errors import ModelError
from cotenant.engines.llm import gguf

path, content = Path(sys.argv[1]), Path(sys.argv[1]).read_bytes()
read = gguf.Gguf._string
for at in range(64):
    path.write_bytes(content)
    left = [at]

    def cut(self):
        left[0] -= 1
        if left[0] < 0:
            path.write_bytes(b"")
        return read(self)

    gguf.Gguf._string = cut
    try:
        gguf.Gguf(path)
    except ModelError:
        continue
    assert left[0] >= 0, "it was cut off, and nothing was said"
"""


def test_a_file_that_is_cut_off_while_it_is_read_ends_nobody(tmp_path: Path) -> None:
    """As a file is that is copied over. A process of its own, for it might not survive."""
    names = [key("general.architecture", "llama")]
    names += [key(f"a.{n}", "x" * 4096) for n in range(12)]
    path = tmp_path / "model.gguf"
    path.write_bytes(file(names, [tensor("w", (3, 4), 0, 0)], WEIGHTS.tobytes()))
    done = subprocess.run([sys.executable, "-c", CUT, str(path)], capture_output=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("kind", [k for k in KINDS.values() if k.name not in ("Q2_K", "Q3_K")])
def test_numbers_are_unpacked_as_the_format_says(kind: Kind) -> None:
    random = np.random.default_rng(1)
    numbers = random.standard_normal((4, 512)).astype(np.float32)
    if kind.name == "F32":
        data = numbers.view(np.uint8)
        expected = numbers
    else:
        of = reference.GGMLQuantizationType[kind.name]
        raw = random.integers(0, 256, (4, 512 // kind.numbers * kind.size), np.uint8)
        if kind.numbers > 1:
            _sane_halves(raw, kind)
        else:
            raw = reference.quants.quantize(numbers, of).view(np.uint8)
        data, expected = raw, reference.quants.dequantize(raw, of)
    found = floats(Stored("w", (4, 512), kind, np.ascontiguousarray(data).reshape(-1)))
    np.testing.assert_allclose(found, expected, rtol=1e-6)


def _sane_halves(raw: np.ndarray[Any, Any], kind: Kind) -> None:
    """Let the scales of random blocks be numbers."""
    blocks = raw.reshape(-1, kind.size)
    at = {"Q6_K": (208,), "Q4_1": (0, 2), "Q5_1": (0, 2), "Q4_K": (0, 2), "Q5_K": (0, 2)}
    for place, scale in zip(at.get(kind.name, (0,)), (0.37, 0.11), strict=False):
        blocks[:, place : place + 2] = np.frombuffer(np.float16(scale).tobytes(), np.uint8)


def test_a_type_that_is_not_dequantized_is_named() -> None:
    with pytest.raises(ModelError, match="Q2_K"):
        floats(Stored("w", (256,), KINDS[10], np.zeros(84, np.uint8)))
