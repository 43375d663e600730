"""CDI specs: what a container runtime adds to a container that uses a claim.

One file a claim, one device a request: the environment, the mounts, and a hook that has the node
adopt the container's process before its program starts. CDI can set a variable, not put something
in front of what an image sets: a list such as ``LD_PRELOAD`` is set as a whole.

Format: the Container Device Interface's SPEC.md, version 0.5.0 (names that start with a digit).
"""

from __future__ import annotations

import re
import stat
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import msgspec

from cotenant.domain.errors import InvalidRequest
from cotenant.domain.reservation import ReservationStatus
from cotenant.kube import files
from cotenant.kube.checkpoint import Edits
from cotenant.kube.names import DRIVER

KIND: Final = f"{DRIVER}/claim"
VERSION: Final = "0.5.0"
REPORT_SOCKET: Final = "COTENANT_REPORT_SOCKET"
"""Where ``cotenant.report`` in the container says how far it is."""
HOOK_S: Final = 10
"""After which the runtime ends a hook. The hook gives up by itself before."""
_OURS = re.compile(rf"{re.escape(DRIVER)}-claim_([A-Za-z0-9-]+)\.json")
_PATH = "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


def device_id(uid: str, request: str) -> str:
    """The name by which the kubelet asks the container runtime for a request's device."""
    return f"{KIND}={_name(uid, request)}"


def merged(request: str, statuses: Sequence[ReservationStatus]) -> Edits:
    """What a container needs for all reservations of a request. Raises InvalidRequest where two
    need a variable to be different things. It reports as the first of them."""
    env: dict[str, str] = {}
    lists: dict[str, list[str]] = {}
    for status in statuses:
        for name, value in status.env.items():
            if env.setdefault(name, value) != value:
                raise InvalidRequest(
                    f"the devices of request {request!r} cannot be used by one process: they want"
                    f" different values of {name}; ask for them in claims of different containers"
                )
        for name, value in status.prepend.items():
            lists.setdefault(name, []).extend(value.split(":"))
    mounts = [mount for status in statuses for mount in status.mounts]
    if reports := next((status.reports for status in statuses if status.reports), ""):
        env[REPORT_SOCKET] = f"{reports}/sock"
        mounts.append(reports)
    return Edits(
        ids=tuple(status.reservation.id for status in statuses),
        env=env,
        prepend={name: ":".join(dict.fromkeys(paths)) for name, paths in lists.items()},
        mounts=tuple(dict.fromkeys(mounts)),
    )


def spec(uid: str, edits: Mapping[str, Edits], hook: Sequence[str]) -> dict[str, Any]:
    """A claim's spec. ``hook`` is the command that reservations' ids are added to; its first word
    is an absolute path on the host."""
    return {
        "cdiVersion": VERSION,
        "kind": KIND,
        "devices": [
            {"name": _name(uid, request), "containerEdits": _container_edits(each, hook)}
            for request, each in edits.items()
        ],
    }


def _container_edits(edits: Edits, hook: Sequence[str]) -> dict[str, Any]:
    libraries = {path for paths in edits.prepend.values() for path in paths.split(":")}
    nodes = [path for path in edits.mounts if _is_device_node(path)]
    mounts = [_mount(path, libraries) for path in edits.mounts if path not in nodes]
    made: dict[str, Any] = {
        "hooks": [
            {
                "hookName": "createRuntime",
                "path": hook[0],
                "args": [*hook, *edits.ids],
                "env": [_PATH],
                "timeout": HOOK_S,
            }
        ]
    }
    env = [f"{name}={value}" for name, value in {**edits.env, **edits.prepend}.items()]
    if env:
        made["env"] = env
    if nodes:
        made["deviceNodes"] = [{"path": path} for path in nodes]
    if mounts:
        made["mounts"] = mounts
    return made


def _mount(path: str, libraries: Iterable[str]) -> dict[str, Any]:
    """A library is what a list of paths names, or lies above or below what it names: read-only."""
    own = Path(path)
    library = any(
        own == Path(each) or own in Path(each).parents or Path(each) in own.parents
        for each in libraries
    )
    options = ["rbind", "nosuid", "nodev", "ro"] if library else ["rbind", "nosuid", "nodev", "rw"]
    return {"hostPath": path, "containerPath": path, "options": options}


def _is_device_node(path: str) -> bool:
    try:
        return stat.S_ISCHR(Path(path).stat().st_mode)
    except OSError:
        return False


def _name(uid: str, request: str) -> str:
    return f"{uid}-{request}"


class Specs:
    """Our specs in the container runtime's folder. Files of others are never touched."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def open(self) -> None:
        """Raises EnvironmentProblem if the folder cannot be used."""
        files.make_folder(self._folder)
        files.clean(self._folder, DRIVER)

    def write(self, uid: str, content: dict[str, Any]) -> bool:
        """Whether anything had to be written. Raises EnvironmentProblem."""
        data = msgspec.json.format(msgspec.json.encode(content)) + b"\n"
        path = self.path(uid)
        try:
            if path.read_bytes() == data:
                return False
        except OSError:
            pass  # not there yet, or it is replaced
        files.make_folder(self._folder)  # it goes at every boot
        files.write(path, data, 0o644)
        return True

    def remove(self, uid: str) -> None:
        """No effect if there is none. Raises EnvironmentProblem."""
        files.remove(self.path(uid))

    def claims(self) -> set[str]:
        """Those that have a spec. Raises EnvironmentProblem."""
        try:
            names = [path.name for path in self._folder.iterdir()]
        except FileNotFoundError:
            return set()
        except OSError as exc:
            raise files.problem(self._folder, exc) from None
        return {match[1] for name in names if (match := _OURS.fullmatch(name))}

    def path(self, uid: str) -> Path:
        """Where a claim's spec is."""
        return self._folder / f"{DRIVER}-claim_{uid}.json"
