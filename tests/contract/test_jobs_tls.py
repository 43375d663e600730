"""The jobs API over TLS: certificates that are renewed or wrong, handshakes that never end."""

from __future__ import annotations

import os
import shutil
import socket
import ssl
from collections.abc import Iterator
from pathlib import Path

import pytest

from cotenant.domain.errors import EnvironmentProblem
from cotenant.serving import listening
from cotenant.serving.tls import Certificate
from tests.certificates import Pair, made
from tests.contract.fake_jobs import Api, serving
from tests.contract.fake_node import eventually


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    return made(tmp_path_factory.mktemp("pair"))


@pytest.fixture
def api(tmp_path: Path, pair: Pair) -> Iterator[Api]:
    copies = Pair(tmp_path / "certificate.pem", tmp_path / "key.pem")
    for source, copy in zip(pair, copies, strict=True):
        shutil.copy(source, copy)
    with serving(tmp_path, copies) as found:
        yield found


def shown(api: Api) -> bytes | None:
    """The certificate that a new connection is shown."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    with socket.create_connection(("127.0.0.1", api.port), 20) as sock:
        with context.wrap_socket(sock) as secured:
            return secured.getpeercert(binary_form=True)


def test_it_is_spoken_and_nothing_older_is(api: Api) -> None:
    assert api.get("jobs").status == 200
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    context.set_ciphers("DEFAULT:@SECLEVEL=0")
    with pytest.warns(DeprecationWarning):
        context.minimum_version = ssl.TLSVersion.TLSv1
        context.maximum_version = ssl.TLSVersion.TLSv1_1
    with socket.create_connection(("127.0.0.1", api.port), 20) as sock:
        with pytest.raises(OSError):
            context.wrap_socket(sock)
    assert api.get("jobs").status == 200


def test_large_bodies_and_refusals_arrive_whole(api: Api) -> None:
    assert api.ask("PUT", "files/" + "0" * 64, bytes(60_000)).status == 400
    assert api.ask("PUT", "files/" + "0" * 64, bytes(600_000)).status == 413
    id = api.submit()
    api.node.log(id).write_bytes(b"x" * 200_000)
    assert len(api.get(f"jobs/{id}/log").data) == 200_000


def test_what_speaks_no_tls_is_closed(api: Api) -> None:
    with socket.create_connection(("127.0.0.1", api.port), 20) as sock:
        sock.sendall(b"GET /api/v1/status HTTP/1.1\r\nHost: x\r\n\r\n")
        assert b"HTTP" not in sock.recv(4096)
    with socket.create_connection(("127.0.0.1", api.port), 20):
        pass
    assert api.get("jobs").status == 200


def test_what_is_no_http_is_answered(api: Api) -> None:
    context = api.context()
    assert context is not None
    with socket.create_connection(("127.0.0.1", api.port), 20) as sock:
        with context.wrap_socket(sock, server_hostname="localhost") as secured:
            secured.sendall(b"what is this\r\n\r\n")
            assert secured.recv(4096).startswith(b"HTTP/1.1 400")


def test_handshakes_that_never_end_lock_nobody_out(
    api: Api, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(listening, "HANDSHAKES", 4)
    silent = [socket.create_connection(("127.0.0.1", api.port), 20) for _ in range(20)]
    try:
        assert api.get("jobs").status == 200
        silent[0].settimeout(20)
        assert silent[0].recv(1) == b""
    finally:
        for sock in silent:
            sock.close()


def test_a_handshake_has_its_time(api: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(listening, "HANDSHAKE_S", 0.2)
    with socket.create_connection(("127.0.0.1", api.port), 20) as sock:
        assert sock.recv(1) == b""


def test_a_renewed_certificate_is_shown(api: Api, tmp_path: Path) -> None:
    assert api.tls is not None
    before = shown(api)
    new = made(tmp_path / "new")
    api.tls.certificate.write_bytes(new.certificate.read_bytes())  # the key does not fit yet
    assert shown(api) == before
    new.key.replace(api.tls.key)
    assert eventually(lambda: shown(api) not in (before, None))
    assert api.get("jobs").status == 200


def test_a_renewal_is_seen_by_more_than_its_size_and_date(api: Api, tmp_path: Path) -> None:
    assert api.tls is not None
    before, new = shown(api), made(tmp_path / "new")
    for old, source in zip(api.tls, new, strict=True):
        was = old.stat()
        old.write_bytes(source.read_bytes().ljust(was.st_size, b"\n"))
        os.utime(old, ns=(was.st_atime_ns, was.st_mtime_ns))
    assert eventually(lambda: shown(api) not in (before, None))


@pytest.mark.parametrize("wrong", ["missing", "another", "swapped", "empty", "encrypted", "folder"])
def test_a_certificate_that_cannot_be_used_is_refused(
    pair: Pair, tmp_path: Path, wrong: str
) -> None:
    certificate, key = pair
    if wrong == "missing":
        key = tmp_path / "none.pem"
    elif wrong == "another":
        key = made(tmp_path / "other").key
    elif wrong == "swapped":
        certificate, key = key, certificate
    elif wrong == "empty":
        certificate = tmp_path / "empty.pem"
        certificate.write_text("")
    elif wrong == "folder":
        certificate = tmp_path
    else:
        key = tmp_path / "encrypted.pem"
        key.write_text(
            "-----BEGIN ENCRYPTED PRIVATE KEY-----\nAAAA\n-----END ENCRYPTED PRIVATE KEY-----\n"
        )
    with pytest.raises(EnvironmentProblem) as caught:
        Certificate(certificate, key)
    assert ".pem" in str(caught.value) or str(tmp_path) in str(caught.value)
