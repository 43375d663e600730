"""The jobs API's listener: a configuration becomes a server with tokens, TLS and pages."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Final, TypeVar

from cotenant.domain.address import split_address
from cotenant.domain.errors import CotenantError, EnvironmentProblem
from cotenant.domain.jobs_config import JobsApiConfig
from cotenant.runtime.jobspec import minimal
from cotenant.runtime.node import Node
from cotenant.serving.http_front import HttpFront
from cotenant.serving.intake import Intake
from cotenant.serving.jobs_api.app import JobsApp
from cotenant.serving.jobs_api.submitting import Submitting
from cotenant.serving.jobs_api.uploads import Uploads
from cotenant.serving.tls import Certificate
from cotenant.serving.tokenfile import Keyring
from cotenant.serving.web.app import Web
from cotenant.serving.web.session import Door
from cotenant.serving.web.stream import Stream
from cotenant.serving.web.studied import Studied
from cotenant.serving.web.visitors import JobsKeys

STOP_GRACE_S: Final = 10.0
CONNECTIONS: Final = 512

T = TypeVar("T")

Sources = tuple[Stream, Studied]
"""What pages show, the same on each port."""


async def serve_jobs(
    config: JobsApiConfig,
    node: Node,
    intake: Intake,
    sources: Sources | None,
    stack: AsyncExitStack,
) -> None:
    """Serve the jobs API until the stack unwinds. Raises EnvironmentProblem for files that cannot
    be used, and for an address that is taken."""
    keyring, tls = credentials(config)
    host, port = split_address(config.address)
    state = Path(node.config.state_dir)
    uploads = Uploads(state / "uploads", config.upload)
    submitting = Submitting(node, uploads, state / "jobs", minimal(os.environ))
    door = Door(JobsKeys(keyring), host, tls is not None)
    web = Web(node, intake, door, *sources) if sources else None
    app = JobsApp(node, intake, keyring, uploads, submitting, web)
    front = HttpFront(app, host, port, CONNECTIONS, tls)
    port = await front.start()
    scheme, named = "https" if tls else "http", f"[{host}]" if ":" in host else host
    node.addresses["jobs"] = f"{scheme}://{named}:{port}"
    stack.push_async_callback(front.stop, STOP_GRACE_S)
    stack.callback(app.close)  # before its server: who waits is answered
    if web is not None:
        stack.push_async_callback(web.close)


def credentials(config: JobsApiConfig) -> tuple[Keyring, Certificate | None]:
    """Its tokens and its certificate; raises EnvironmentProblem for files that cannot be used."""
    keyring = _of_key("tokens", lambda: Keyring(Path(config.tokens)))
    if not config.certificate or not config.key:
        return keyring, None
    files = Path(config.certificate), Path(config.key)
    return keyring, _of_key("certificate", lambda: Certificate(*files))


def _of_key(key: str, make: Callable[[], T]) -> T:
    """What a file of the configuration makes; an error names its key."""
    try:
        return make()
    except CotenantError as error:
        raise EnvironmentProblem(f"node.jobs_api.{key}: {error}") from None
