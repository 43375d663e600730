"""The jobs API's client: synchronous, with the standard library's HTTP. Each request has a
connection of its own, so one client serves several threads."""

from __future__ import annotations

import http.client
import math
import secrets
import ssl
import time
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryFile
from typing import IO, Any, Final, NamedTuple, TypeVar
from urllib.parse import quote, urlencode, urlsplit

import msgspec

from cotenant.domain import errors
from cotenant.domain.address import is_loopback
from cotenant.domain.errors import (
    CotenantError,
    EnvironmentProblem,
    InvalidRequest,
    NotFound,
    NotReady,
    TooLarge,
)
from cotenant.domain.port import JobStatus
from cotenant.domain.submission import Submission
from cotenant.domain.workload import ENDED_STATES
from cotenant.serving.joblogs import Piece
from cotenant.serving.packing import pack

T = TypeVar("T")

TRIES: Final = 6
"""How often a request is sent that may be sent again."""
FIRST_DELAY_S: Final = 0.2
MOST_DELAY_S: Final = 5.0
UPLOAD_S: Final = 300.0
"""Without progress for so long, an upload is given up; so is an unpacking."""
ANSWER_BYTES: Final = 64 * 2**20
ELSEWHERE: Final = (401, 404, 405)
"""Who answers so, and not as the jobs API does, is another port: that of inference, say."""
UNTIL_AGAIN_S: Final = 1.0
"""Before more of a log is asked for, where the node lets nobody else wait for it."""


class Answer(NamedTuple):
    """What came back. Names of headers are in lower case."""

    status: int
    headers: dict[str, str]
    body: bytes


class JobsClient:
    """A node's jobs API. ``timeout`` in seconds, per request; ``ca`` names a PEM file with the
    authority (or the certificate itself) to trust in place of the system's.

    Every method raises EnvironmentProblem if no node answers, Forbidden for a token that is not
    enough, and otherwise the error that the node raised. Requests that may be sent again are, for
    some seconds.
    """

    def __init__(
        self, url: str, token: str, ca: str | Path | None = None, timeout: float = 10.0
    ) -> None:
        self._host, self._tls = _parsed(url, ca)
        self._url = url.rstrip("/")
        self._timeout = timeout
        token = token.strip()  # a file ends with a line end
        if not token or not token.isascii() or not token.isprintable():
            raise InvalidRequest("a token is needed, as cotenant token add printed it")
        self._headers = {"authorization": f"Bearer {token}"}

    def status(self) -> dict[str, Any]:
        """What the node says of itself; see NodePort.status."""
        return self._get("status", dict[str, Any])

    def jobs(self) -> list[JobStatus]:
        """All jobs, oldest first."""
        return self._get("jobs", list[JobStatus])

    def job(self, ref: str) -> JobStatus:
        """One job by id, unique prefix or name; raises NotFound."""
        return self._get(f"jobs/{_quoted(ref)}", JobStatus)

    def submit(self, wanted: Submission, files: Path | None = None) -> str:
        """Queue a job, with what is in the directory ``files``; its id. Safe to repeat: the id is
        chosen here. Raises InvalidRequest, TooLarge, NotFound, Conflict."""
        wanted = msgspec.structs.replace(wanted, id=wanted.id or secrets.token_hex(6))
        if files is not None:
            with TemporaryFile(prefix="cotenant-") as archive:
                sha256 = pack(files, archive)
                self._upload(sha256, archive)
            wanted = msgspec.structs.replace(wanted, files=sha256)
        try:
            body = msgspec.json.encode(wanted)
        except UnicodeEncodeError:
            raise InvalidRequest("command, names and environment must be UTF-8 text") from None
        timeout = UPLOAD_S if wanted.files else self._timeout
        answer = self._ask("POST", "jobs", body, timeout=timeout)
        return str(self._decoded(answer, dict[str, str])["id"])

    def cancel(self, ref: str) -> str:
        """Cancel a job by id, unique prefix or name; returns its id."""
        return self._order(ref, "cancel")

    def hold(self, ref: str) -> str:
        """Keep a job from running until it is resumed; returns its id."""
        return self._order(ref, "hold")

    def resume(self, ref: str) -> str:
        """Let a held job run again; returns its id."""
        return self._order(ref, "resume")

    def checkpoint(self, ref: str, within_s: float = 60.0) -> str:
        """Have a running job write a checkpoint now; the path that it reports. Raises NotFound,
        NotReady where it has not said so in time, InvalidRequest if it cannot be asked."""
        if not 0 < within_s < math.inf:
            raise InvalidRequest(f"{within_s} is no number of seconds to write a checkpoint in")
        body = msgspec.json.encode({"within_s": within_s})
        path = f"jobs/{_quoted(ref)}/checkpoint"
        answer = self._ask("POST", path, body, timeout=within_s + self._timeout, again=False)
        return self._decoded(answer, dict[str, str])["checkpoint"]

    def log(self, ref: str, place: str, wait_s: float) -> tuple[Piece, str]:
        """What of a job's log comes after a place (see ``joblogs``), and the job's state just
        before; waits so long for there to be some."""
        query = urlencode({"offset": place, "wait": f"{wait_s:g}"})
        path, begun = f"jobs/{_quoted(ref)}/log?{query}", time.monotonic()
        answer = self._ask("GET", path, timeout=wait_s + self._timeout)
        headers = answer.headers
        try:
            piece = Piece(
                answer.body, headers["cotenant-next-offset"], "cotenant-log-gap" in headers
            )
            state = headers["cotenant-job-state"]
        except KeyError:
            raise self._strange() from None
        if not (piece.data or piece.gap or state in ENDED_STATES):
            left = begun + wait_s - time.monotonic()
            time.sleep(max(0.0, min(UNTIL_AGAIN_S, left)))
        return piece, state

    # --- requests ---------------------------------------------------------------------------

    def _order(self, ref: str, what: str) -> str:
        answer = self._ask("POST", f"jobs/{_quoted(ref)}/{what}")
        return str(self._decoded(answer, dict[str, str])["id"])

    def _upload(self, sha256: str, archive: IO[bytes]) -> None:
        try:
            self._ask("GET", f"files/{sha256}")
        except NotFound:
            self._ask("PUT", f"files/{sha256}", archive, timeout=UPLOAD_S)

    def _get(self, path: str, kind: type[T]) -> T:
        return self._decoded(self._ask("GET", path), kind)

    def _decoded(self, answer: Answer, kind: type[T]) -> T:
        try:
            return msgspec.json.decode(answer.body, type=kind)
        except (msgspec.DecodeError, UnicodeDecodeError):
            raise self._strange() from None

    def _ask(
        self,
        method: str,
        path: str,
        body: bytes | IO[bytes] | None = None,
        timeout: float = 0.0,
        again: bool = True,
    ) -> Answer:
        """The answer to a request that was accepted; ``again``: it may be sent several times."""
        tries = TRIES if again else 1
        for count in range(1, tries + 1):
            delay = min(MOST_DELAY_S, FIRST_DELAY_S * 2 ** (count - 1))
            try:
                answer = self._once(method, path, body, timeout or self._timeout)
            except (OSError, http.client.HTTPException) as error:
                lasting = isinstance(error, ssl.SSLError) and not isinstance(error, ssl.SSLEOFError)
                if count == tries or lasting:
                    raise self._away(error) from None
            else:
                try:
                    return self._accepted(answer)
                except (NotReady, EnvironmentProblem):
                    if answer.status not in (429, 503) or count == tries:
                        raise
                delay = _retry_after(answer.headers, delay)
            time.sleep(delay)
        raise AssertionError("the last try returns or raises")

    def _once(
        self, method: str, path: str, body: bytes | IO[bytes] | None, timeout: float
    ) -> Answer:
        connection = self._connection(timeout)
        try:
            headers = dict(self._headers)
            if body is not None and not isinstance(body, bytes):
                body.seek(0, 2)
                headers["content-length"] = str(body.tell())
                body.seek(0)
            try:
                connection.request(method, f"/api/v1/{path}", body, headers)
            except (BrokenPipeError, ConnectionResetError, ssl.SSLEOFError):
                if body is None:
                    raise  # else the node may have answered before it had all of it
            response = connection.getresponse()
            found = {name.lower(): value for name, value in response.getheaders()}
            answer = response.read(ANSWER_BYTES + 1)
            if len(answer) > ANSWER_BYTES:
                raise TooLarge(f"{self._url} answers with more than {ANSWER_BYTES} bytes")
            return Answer(response.status, found, answer)
        finally:
            connection.close()

    def _connection(self, timeout: float) -> http.client.HTTPConnection:
        if self._tls is None:
            return http.client.HTTPConnection(self._host, timeout=timeout)
        return http.client.HTTPSConnection(self._host, timeout=timeout, context=self._tls)

    def _accepted(self, answer: Answer) -> Answer:
        if 200 <= answer.status < 300:
            return answer
        try:
            said = msgspec.json.decode(answer.body)["error"]
        except (msgspec.DecodeError, UnicodeDecodeError, KeyError, TypeError):
            raise self._strange(answer.status) from None
        if not isinstance(said, Mapping):
            if answer.status in ELSEWHERE:
                raise self._strange(answer.status)
            raise InvalidRequest(str(said))  # by the HTTP server, before it knew of a route
        kind = getattr(errors, str(said.get("kind")), CotenantError)
        if not (isinstance(kind, type) and issubclass(kind, CotenantError)):
            kind = CotenantError
        raise kind(str(said.get("message")))

    def _strange(self, status: int = 200) -> EnvironmentProblem:
        return EnvironmentProblem(
            f"{self._url} answers (status {status}), but not as a node's jobs API does; is it the "
            "address in node.jobs_api?"
        )

    def _away(self, error: Exception) -> EnvironmentProblem:
        if isinstance(error, ssl.SSLCertVerificationError):
            return EnvironmentProblem(
                f"the certificate of {self._url} is not trusted: {error.verify_message}; name the "
                "file of its authority (ca, COTENANT_CA), and the node as it is named there"
            )
        why = getattr(error, "strerror", None) or str(error) or type(error).__name__
        if isinstance(error, http.client.RemoteDisconnected) and self._tls is None:
            why += "; perhaps it speaks https"
        elif getattr(error, "reason", "") == "WRONG_VERSION_NUMBER":
            why += "; perhaps it speaks http, or is another port"
        return EnvironmentProblem(f"no node answers at {self._url}: {why}")


def _parsed(url: str, ca: str | Path | None) -> tuple[str, ssl.SSLContext | None]:
    """Host with port, and how to speak TLS; raises InvalidRequest, EnvironmentProblem."""
    try:
        parts = urlsplit(url)
        (parts.hostname or "").encode("idna")
        bare = parts.path in ("", "/") and not (parts.query or parts.fragment or parts.username)
        wrong = parts.scheme not in ("http", "https") or not parts.hostname or not bare
        wrong = wrong or any(map(str.isspace, parts.netloc))
        parts.port  # noqa: B018 - raises ValueError, as the encoding does
    except ValueError:
        wrong = True
    if wrong:
        raise InvalidRequest(f"{url!r} is no address such as https://box:8443")
    if parts.scheme == "http":
        if not is_loopback(f"{parts.hostname}:0"):
            raise InvalidRequest(f"{url}: a token goes to another machine over https alone")
        return parts.netloc, None
    try:
        return parts.netloc, ssl.create_default_context(cafile=str(ca) if ca else None)
    except OSError as error:  # ssl.SSLError is one
        raise EnvironmentProblem(
            f"{ca} cannot be used to check certificates, as a PEM file could: "
            f"{error.strerror or error}"
        ) from None


def _retry_after(headers: Mapping[str, str], usual: float) -> float:
    text = headers.get("retry-after", "")
    return min(MOST_DELAY_S, float(text)) if text.isascii() and text.isdigit() else usual


def _quoted(ref: str) -> str:
    if not ref or "/" in ref:
        raise InvalidRequest(f"{ref!r}: give a job's id; a name must not have a / here")
    try:
        return quote(ref, safe="")
    except UnicodeEncodeError:
        raise InvalidRequest(f"{ref!r} is no job: names are UTF-8 text") from None
