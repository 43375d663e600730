"""A node with jobs that nothing runs, and its jobs API."""

from __future__ import annotations

import asyncio
import http.client
import json
import secrets
import ssl
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import uvloop

from cotenant.domain.errors import Conflict, InvalidRequest
from cotenant.domain.port import JobStatus, find_job
from cotenant.domain.tokens import Scope, Token, digest
from cotenant.domain.workload import JobSpec
from cotenant.serving import tokenfile
from cotenant.serving.http_front import HttpFront
from cotenant.serving.intake import Intake
from cotenant.serving.jobs_api.app import JobsApp
from cotenant.serving.jobs_api.submitting import Submitting
from cotenant.serving.jobs_api.uploads import Uploads
from cotenant.serving.tensors import Limits
from cotenant.serving.tls import Certificate
from cotenant.serving.web.app import Web
from cotenant.serving.web.session import Door
from cotenant.serving.web.stream import Stream
from cotenant.serving.web.studied import Studied
from cotenant.serving.web.visitors import JobsKeys
from tests.certificates import Pair
from tests.contract.fake_node import FakeNode

UPLOAD = 64 * 1024
TOKENS = {
    "reader": ("read",),
    "sender": ("submit",),
    "chief": ("read", "submit", "control"),
}
"""Tokens that each API here knows; the token of NAME is ``token-NAME``."""


class JobsNode(FakeNode):
    """Keeps what is submitted. A job is queued until a test says otherwise (``become``)."""

    def __init__(self, directory: Path) -> None:
        super().__init__()
        self.directory = directory
        self.specs: dict[str, JobSpec] = {}
        self.states: dict[str, str] = {}
        self.problem: Exception | None = None

    def become(self, id: str, state: str) -> None:
        self.states[id] = state

    def submit_job(self, spec: JobSpec) -> str:
        if self.problem is not None:
            raise self.problem
        if (there := self.specs.get(spec.id)) is not None:
            if there != spec:
                raise Conflict(f"another job has the id {spec.id}")
            return spec.id
        if not spec.id:
            spec = msgspec.structs.replace(spec, id=secrets.token_hex(4))
        self.specs[spec.id] = spec
        self.states[spec.id] = "queued"
        return spec.id

    def jobs(self) -> list[JobStatus]:
        return [
            JobStatus(
                id, spec.name, self.states[id], spec.command, 1.0, 0.0, 1.0, 0,
                held=self.states[id] == "held",
            )
            for id, spec in self.specs.items()
        ]  # fmt: skip

    def status(self) -> dict[str, Any]:
        return {"node": "fake", "jobs": [msgspec.to_builtins(job) for job in self.jobs()]}

    def _step(self, ref: str, state: str) -> str:
        job = find_job(self.jobs(), ref)
        if job.state == "succeeded":
            raise InvalidRequest(f"job {job.id} has ended")
        self.states[job.id] = state
        return job.id

    def hold_job(self, ref: str) -> str:
        return self._step(ref, "held")

    def resume_job(self, ref: str) -> str:
        return self._step(ref, "running")

    def cancel_job(self, ref: str) -> str:
        return self._step(ref, "cancelled")

    async def checkpoint_job(self, ref: str, within_s: float) -> str:
        find_job(self.jobs(), ref)
        return f"/checkpoints/{within_s:g}"

    def job_log_path(self, ref: str) -> str:
        path = self.log(find_job(self.jobs(), ref).id)
        path.parent.mkdir(parents=True, exist_ok=True)
        return str(path)

    def log(self, id: str) -> Path:
        return self.directory / "jobs" / id / "log"


def write_tokens(path: Path, tokens: dict[str, tuple[str, ...]], **more: Any) -> None:
    """A token file in which the token of NAME is ``token-NAME``."""
    found = [
        Token(name, digest(f"token-{name}"), tuple(map(Scope, scopes)), 0.0, **more)
        for name, scopes in tokens.items()
    ]
    tokenfile._write(path, tokenfile.write_tokens(found))


class Api:
    """What a test does with a jobs API."""

    def __init__(self, box: SimpleNamespace, tls: Pair | None) -> None:
        self.node: JobsNode = box.node
        self.app: JobsApp = box.app
        self.tokens: Path = box.tokens
        self.port: int = box.port
        self.directory: Path = box.node.directory
        self.tls = tls
        self.at = f"127.0.0.1:{box.port}"
        self.url = f"{'https' if tls else 'http'}://{self.at}"

    def context(self) -> ssl.SSLContext | None:
        if self.tls is None:
            return None
        return ssl.create_default_context(cafile=str(self.tls.certificate))

    def ask(
        self, method: str, path: str, body: Any = None, token: str | None = "chief", **headers: str
    ) -> Any:
        """One request; the answer has ``status``, ``headers``, ``data``, ``json`` and ``error``."""
        if not path.startswith(("/", "http")):
            path = f"/api/v1/{path}"
        context = self.context()
        connection = (
            http.client.HTTPSConnection(self.at, timeout=30, context=context)
            if context
            else http.client.HTTPConnection(self.at, timeout=30)
        )
        given = {k.replace("_", "-"): v for k, v in headers.items()}
        if token is not None:
            given["authorization"] = f"Bearer token-{token}"
        if isinstance(body, dict | list):
            body = json.dumps(body)
        try:
            connection.request(method, path, body, given)
            answer: Any = connection.getresponse()
            answer.data = answer.read()
        finally:
            connection.close()
        answer.text = answer.data.decode(errors="replace")
        if "json" in answer.headers.get("content-type", ""):
            answer.json = json.loads(answer.data)
            answer.error = answer.json.get("error") if isinstance(answer.json, dict) else None
        return answer

    def get(self, path: str, **more: Any) -> Any:
        return self.ask("GET", path, **more)

    def post(self, path: str, body: Any = None, **more: Any) -> Any:
        return self.ask("POST", path, body, **more)

    def submit(self, *command: str, **fields: Any) -> str:
        answer = self.post("jobs", {"command": command or ["train"], **fields})
        assert answer.status == 201, answer.text
        return str(answer.json["id"])


@contextmanager
def serving(directory: Path, tls: Pair | None = None) -> Iterator[Api]:
    """The jobs API with its pages over a JobsNode, in a thread with a loop of its own."""
    loop = uvloop.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    tokens = directory / "tokens.json"
    write_tokens(tokens, TOKENS)

    def run(coroutine: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(coroutine, loop).result(30)

    async def start() -> SimpleNamespace:
        node, intake = JobsNode(directory), Intake(Limits())
        keys, uploads = tokenfile.Keyring(tokens), Uploads(directory / "uploads", UPLOAD)
        submitting = Submitting(node, uploads, directory / "jobs", {"PATH": "/usr/bin:/bin"})
        door = Door(JobsKeys(keys), "127.0.0.1", tls is not None)
        web = Web(node, intake, door, Stream(node), Studied(None))  # type: ignore[arg-type]
        app = JobsApp(node, intake, keys, uploads, submitting, web)
        front = HttpFront(app, "127.0.0.1", 0, 64, Certificate(*tls) if tls else None)
        port = await front.start()
        return SimpleNamespace(
            node=node, app=app, web=web, front=front, port=port, tokens=tokens, intake=intake
        )

    box = None
    try:
        box = run(start())
        yield Api(box, tls)
        assert box.intake.budget.held == 0, "a body's memory was not given back"
    finally:
        if box is not None:
            loop.call_soon_threadsafe(box.app.close)
            run(box.web.close())
            run(box.front.stop(2.0))
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()
