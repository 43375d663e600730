"""What ``cotenant infer`` makes of files, and of answers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cotenant.cli.infer import answer_view
from cotenant.cli.inputs import Input, Output, Request, encoded, read_answer, read_request
from cotenant.cli.output import console
from cotenant.domain.errors import InvalidRequest

X = Input("x", "FP32", (-1, 4))
ROW = np.arange(4, dtype=np.float32)


def parts(request: Request) -> dict[str, tuple[list[int], bytes]]:
    """Shape and bytes of each tensor of a request in binary form."""
    head = json.loads(request.body[: request.head])
    at, found = request.head, {}
    for tensor in head["inputs"]:
        size = tensor["parameters"]["binary_data_size"]
        found[tensor["name"]] = tensor["shape"], request.body[at : at + size]
        at += size
    assert at == len(request.body)
    return found


@pytest.mark.parametrize("shape", [(4,), (1, 4)])
@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.int64])
def test_an_array_is_what_the_model_takes(tmp_path: Path, shape: Any, dtype: Any) -> None:
    np.save(tmp_path / "x.npy", ROW.astype(dtype).reshape(shape))
    found = parts(read_request(tmp_path / "x.npy", [X]))
    assert found == {"x": ([1, 4], ROW.tobytes())}


def test_arrays_by_name_are_several_inputs(tmp_path: Path) -> None:
    np.savez(tmp_path / "in.npz", x=ROW, n=np.array([7]))
    found = parts(read_request(tmp_path / "in.npz", [X, Input("n", "INT32", (1,))]))
    assert found == {"x": ([1, 4], ROW.tobytes()), "n": ([1], b"\x07\0\0\0")}


@pytest.mark.parametrize("document", [{"x": [0, 1, 2, 3]}, {"x": [[0, 1, 2, 3]]}, [0, 1, 2, 3]])
def test_lists_in_json_are_arrays(tmp_path: Path, document: Any) -> None:
    (tmp_path / "in.json").write_text(json.dumps(document))
    assert parts(read_request(tmp_path / "in.json", [X])) == {"x": ([1, 4], ROW.tobytes())}


def test_a_request_in_json_is_sent_as_it_is(tmp_path: Path) -> None:
    text = b'{"inputs": [{"name": "x", "datatype": "FP32", "shape": [1], "data": [1]}]}'
    (tmp_path / "in.json").write_bytes(text)
    assert read_request(tmp_path / "in.json", [X]) == Request(text)


def test_texts_and_pictures_are_inputs(tmp_path: Path) -> None:
    assert encoded(["a", "ž"], Input("t", "BYTES", (-1,))) == (
        b"\x01\0\0\0a\x02\0\0\0" + "ž".encode(), [2],
    )  # fmt: skip
    image = pytest.importorskip("PIL.Image")
    image.new("RGB", (8, 6), (255, 0, 0)).save(tmp_path / "red.png")
    shape, data = parts(read_request(tmp_path / "red.png", [Input("i", "FP32", (-1, 3, 2, 4))]))[
        "i"
    ]
    assert shape == [1, 3, 2, 4]
    assert np.frombuffer(data, np.float32).tolist() == [1.0] * 8 + [0.0] * 16
    shape, data = parts(read_request(tmp_path / "red.png", [Input("i", "UINT8", (-1, -1, -1, 3))]))[
        "i"
    ]
    assert (shape, data) == ([1, 6, 8, 3], b"\xff\0\0" * 48)


@pytest.mark.parametrize(
    ("name", "content", "inputs"),
    [
        ("in.txt", b"1 2 3", [X]),
        ("in.json", b"{", [X]),
        ("in.json", b"7", [X]),
        ("in.json", b'{"y": [1]}', [X]),
        ("in.json", b'{"x": ["a"]}', [X]),
        ("in.json", b'{"x": [[1], [2, 3]]}', [X]),
        ("in.json", b'{"x": [300]}', [Input("x", "UINT8", (-1,))]),
        ("in.npy", b"no array", [X]),
        ("in.npz", b"no arrays", [X]),
        ("in.npy", b"", [X, X]),
    ],
)
def test_what_no_model_takes_is_refused_before_it_is_sent(
    tmp_path: Path, name: str, content: bytes, inputs: list[Input]
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InvalidRequest):
        read_request(tmp_path / name, inputs)


def test_answers_are_read_in_both_forms() -> None:
    plain = {"name": "n", "datatype": "INT64", "shape": [2, 1], "data": [1, 2]}
    binary = {"name": "b", "datatype": "BF16", "shape": [2], "parameters": {"binary_data_size": 4}}
    text = {"name": "t", "datatype": "BYTES", "shape": [1], "parameters": {"binary_data_size": 6}}
    head = json.dumps({"outputs": [plain, binary, text]}).encode()
    body = head + b"\x80\x3f\x00\xc0" + b"\x02\0\0\0hi"
    n, b, t = read_answer(body, len(head))
    assert n.values.tolist() == [[1], [2]]
    assert b.values.tolist() == [1.0, -2.0]
    assert t.values.tolist() == ["hi"]


def test_of_a_long_row_the_largest_values_are_shown(capsys: pytest.CaptureFixture[str]) -> None:
    values = np.zeros((1, 1000), np.float32)
    values[0, 417], values[0, 3] = 0.75, np.nan
    outputs = [Output("y", "FP32", values), Output("t", "BYTES", np.array("word", object))]
    console().print(answer_view(outputs))
    shown = capsys.readouterr().out
    assert "[417] 0.75" in shown and "word" in shown
    assert len(shown) < 400
