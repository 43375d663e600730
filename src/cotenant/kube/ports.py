"""What the driver needs of the world: a node, and the API server. Errors of the latter:

CotenantError
├── EnvironmentProblem
│   └── ClusterAway      it cannot be reached, or cannot answer now; try again later
├── ClusterRefused       it will not take this: not allowed, or not valid
├── Conflict             somebody else changed the object; read it afresh
└── Expired              a watch is too far behind; list afresh
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Protocol

from cotenant.domain.errors import CotenantError, EnvironmentProblem
from cotenant.domain.reservation import Answer, Reservation, ReservationStatus

Object = dict[str, Any]
"""An object of the API as JSON, with all that the server said: what is not known to us must survive
when it is written back."""


class ClusterAway(EnvironmentProblem):
    """The API server cannot be reached, or cannot answer now."""


class ClusterRefused(CotenantError):
    """The API server will not take this."""


class Conflict(CotenantError):
    """The object was changed, made or deleted by somebody else since it was read."""


class Expired(CotenantError):
    """What a watch should go on from is no longer known."""


class NodeClient(Protocol):
    """A Cotenant node; ``cotenant.serving.control_client.ControlClient`` is one, and says what each
    operation means. Every method raises EnvironmentProblem if the node does not answer."""

    def status(self) -> dict[str, Any]: ...

    def reserve(self, reservation: Reservation, dry_run: bool = False) -> Answer: ...

    def release(self, id: str) -> None: ...

    def adopt(self, id: str, pid: int) -> None: ...

    def reservations(self) -> list[ReservationStatus]: ...


class Cluster(Protocol):
    """The API server, as far as it is needed. Every method raises ClusterAway, ClusterRefused."""

    def claims(self) -> tuple[list[Object], str]:
        """All ResourceClaims, and the version that a watch goes on from."""
        ...

    def watch_claims(self, version: str) -> Iterator[tuple[str, Object]]:
        """What happens after ``version``: ADDED, MODIFIED, DELETED or BOOKMARK, and the claim. Ends
        after some minutes, to be called again. Raises Expired."""
        ...

    def end_watches(self) -> None:
        """End watches that wait, for good: the driver ends."""
        ...

    def claim(self, namespace: str, name: str) -> Object | None:
        """One claim as it is now; None if there is none."""
        ...

    def update_claim_status(self, claim: Object) -> Object:
        """Write ``status.devices`` of a claim that was read. Raises Conflict."""
        ...

    def slices(self, pool: str) -> list[Object]:
        """This driver's ResourceSlices of a pool."""
        ...

    def create_slice(self, item: Object) -> Object:
        """Raises Conflict if there is one of this name."""
        ...

    def update_slice(self, item: Object) -> Object:
        """Raises Conflict."""
        ...

    def delete_slice(self, name: str) -> None:
        """No effect if there is none."""
        ...

    def node(self, name: str) -> Object | None:
        """The Node of this name; None if there is none."""
        ...
