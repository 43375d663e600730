"""A job as somebody who is not on the box describes it: what ``POST /api/v1/jobs`` takes."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Annotated

import msgspec

from cotenant.domain.units import S
from cotenant.domain.workload import JobSpec, RestartPolicy

_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}")
_SHA256 = re.compile(r"[0-9a-f]{64}")

Part = Annotated[float, msgspec.Meta(ge=0, le=1)]
Count = Annotated[int, msgspec.Meta(ge=0, le=2**62)]
Seconds = Annotated[float, msgspec.Meta(ge=0, le=10**9)]


def is_sha256(text: str) -> bool:
    """Whether a text is a SHA-256, in lower-case hexadecimal."""
    return _SHA256.fullmatch(text) is not None


class Submission(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """Fields as those of JobSpec, sizes in bytes, times in seconds.

    ``id`` makes it safe to send again: the same a second time changes nothing, another under that
    id is refused. ``env`` is added to the node's minimal environment. ``cwd`` is an absolute
    directory on the box, "": one of the job's own. ``files``: SHA-256 of an archive that was
    uploaded, which is unpacked there.
    """

    command: Annotated[tuple[str, ...], msgspec.Meta(min_length=1)]
    id: str = ""
    name: str = ""
    cwd: str = ""
    env: dict[str, str] = {}
    weight: Annotated[float, msgspec.Meta(gt=0)] = 1.0
    guaranteed: Part | dict[str, Part] = 0.0
    limit: Part | dict[str, Part] = 1.0
    kinds: tuple[str, ...] = ()
    memory: Count = 0
    memory_guaranteed: Count | None = None
    restart: RestartPolicy = RestartPolicy.ON_FAILURE
    max_restarts: Count = 5
    grace_s: Seconds = 5.0
    log_limit: Annotated[int, msgspec.Meta(ge=2048, le=2**40)] = 64 * 2**20
    time_limit_s: Seconds = 0.0
    after: tuple[str, ...] = ()
    files: str = ""

    def __post_init__(self) -> None:
        if self.id and not _ID.fullmatch(self.id):
            raise ValueError("id: use up to 64 letters, digits, '_' and '-'")
        if self.cwd and not self.cwd.startswith("/"):
            raise ValueError("cwd: name an absolute directory on the box, or leave it out")
        if self.files and not is_sha256(self.files):
            raise ValueError("files: give the SHA-256 of an archive, in lower-case hexadecimal")
        if self.files and self.cwd:
            raise ValueError("files are unpacked into the job's own directory: leave cwd out")

    def spec(self, cwd: str, environment: Mapping[str, str]) -> JobSpec:
        """The job: in ``cwd``, with ``environment`` below what it brings itself."""
        return JobSpec(
            id=self.id,
            name=self.name,
            command=self.command,
            cwd=cwd,
            env={**environment, **self.env},
            weight=self.weight,
            guaranteed=self.guaranteed,
            limit=self.limit,
            kinds=self.kinds,
            memory=self.memory,
            memory_guaranteed=self.memory_guaranteed,
            restart=self.restart,
            max_restarts=self.max_restarts,
            grace=round(self.grace_s * S),
            log_limit=self.log_limit,
            time_limit=round(self.time_limit_s * S),
            after=self.after,
        )
