"""From what was allocated to a claim to what a node is asked to reserve.

One reservation for all units of one device, one for each share of time, one for each instance of
MIG. Their ids follow from the claim alone, so they can be told when the node, or a device, is away.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any, Final

import msgspec

from cotenant.domain.errors import InvalidRequest
from cotenant.domain.reservation import MOST_ID, Reservation
from cotenant.kube import parameters
from cotenant.kube.inventory import MIG, TIME, Part, together
from cotenant.kube.names import DRIVER, RESERVED, SHARE
from cotenant.kube.parameters import Parameters
from cotenant.kube.ports import Object

_DIGITS: Final = 12
_LEVELS: Final = 16


class Result(msgspec.Struct, frozen=True):
    """A device allocated to a request of a claim. ``share_id`` is "" where it is allocated whole;
    ``consumed`` of a share: the quantity as it is written."""

    request: str
    device: str
    share_id: str
    consumed: str
    conditions: tuple[str, ...]
    admin: bool


def results(claim: Object, node: str) -> list[Result]:
    """What is allocated to a claim of this driver's pool of this node."""
    return [
        Result(
            request=str(item.get("request", "")),
            device=str(item.get("device", "")),
            share_id=str(item.get("shareID") or ""),
            consumed=_consumed(item.get("consumedCapacity") or {}),
            conditions=tuple(item.get("bindingConditions") or ()),
            admin=bool(item.get("adminAccess")),
        )
        for item in _devices(claim).get("results") or []
        if item.get("driver") == DRIVER and item.get("pool") == node
    ]


def reservation_ids(claim: Object, node: str) -> list[str]:
    """The ids of ``reservations``, whether they can be made or not."""
    return list(_groups(claim, node))


def reservations(claim: Object, node: str, parts: Mapping[str, Part]) -> list[Reservation]:
    """What the node is to reserve for a claim; ``parts`` are those of ``inventory.inventory``.
    Empty if nothing of the node's is allocated to it. Raises InvalidRequest for what cannot be."""
    config = _devices(claim).get("config") or []
    meta = claim["metadata"]
    name = f"{meta['namespace']}/{meta['name']}"[:MOST_ID]
    return [
        msgspec.structs.replace(_reservation(group, config, parts), id=id, name=name)
        for id, group in _groups(claim, node).items()
    ]


def grouped(claim: Object, node: str) -> dict[str, list[Result]]:
    """Which results each of ``reservations`` is for, by its id."""
    return _groups(claim, node)


def _devices(claim: Object) -> dict[str, Any]:
    allocation = (claim.get("status") or {}).get("allocation") or {}
    return allocation.get("devices") or {}


def _consumed(capacity: Mapping[str, Any]) -> str:
    return str(capacity.get(SHARE, capacity.get(f"{DRIVER}/{SHARE}", "")))


def _groups(claim: Object, node: str) -> dict[str, list[Result]]:
    groups: dict[tuple[str, str], list[Result]] = {}
    for result in results(claim, node):
        key = together(result.device), result.share_id
        groups.setdefault((key[0] or result.device, key[1]), []).append(result)
    config = [entry for entry in _devices(claim).get("config") or [] if parameters.mine(entry)]
    uid = claim["metadata"]["uid"]
    return {
        f"{RESERVED}{uid}/{label}/{_digest(group, config)}": group
        for (label, _), group in groups.items()
    }


def _digest(group: list[Result], config: list[Any]) -> str:
    """Another allocation, or other parameters, are another reservation. What the node says of its
    devices has no part in it: a reservation does not change under the pod that has it."""
    keys = sorted((r.request, r.device, r.share_id, r.consumed) for r in group)
    # Parameters are whatever somebody wrote: letters that are none, levels without end.
    text = json.dumps([keys, _clipped(config, _LEVELS)], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:_DIGITS]


def _clipped(value: Any, levels: int) -> Any:
    if isinstance(value, dict):
        return {k: _clipped(v, levels - 1) for k, v in value.items()} if levels else None
    if isinstance(value, list):
        return [_clipped(v, levels - 1) for v in value] if levels else None
    return value


def _reservation(
    group: list[Result], config: list[dict[str, Any]], parts: Mapping[str, Part]
) -> Reservation:
    for result in group:
        if result.admin:
            raise InvalidRequest(f"request {result.request!r}: there is no access as admin here")
        if result.device not in parts:
            raise InvalidRequest(f"{result.device} is no longer on this node; delete the pod")
    first = parts[group[0].device]
    asked = {r.request: parameters.merged(config, r.request) for r in group}
    if first.mode == TIME:
        # Shares have ids of their own, so this one is of one request.
        return _share(first, group[0], asked[group[0].request])
    for request, wish in asked.items():
        _check_space(request, wish)
    memory = sum(wish.memory or 0 for wish in asked.values())
    if first.mode == MIG:
        if memory > first.memory:
            raise InvalidRequest(
                f"memory is {memory} bytes, but {first.attributes['profile']} has"
                f" {first.memory}; claim a larger profile"
            )
        memory = first.own
    return Reservation(
        id="",
        device=first.device,
        units=sum(parts[r.device].units for r in group),
        memory=memory,
        within=min((w.objective for w in asked.values() if w.objective), default=0),
    )


def _check_space(request: str, wish: Parameters) -> None:
    for name, value in (("guarantee", wish.guarantee), ("limit", wish.limit)):
        if value is not None:
            raise InvalidRequest(
                f"{name} is for shares of time, and request {request!r} has units of its own, all"
                f" of them guaranteed; leave {name} out, or claim a device whose mode is {TIME}"
            )


def _share(part: Part, result: Result, wish: Parameters) -> Reservation:
    try:
        share = parameters.quantity(result.consumed)
    except ValueError as error:
        raise InvalidRequest(f"{SHARE}: {error}") from None
    if share.denominator != 1 or not 1 <= share <= 100:
        raise InvalidRequest(f"{SHARE} is {result.consumed}; it is whole per cents, 1 to 100")
    if wish.limit is not None and wish.limit < share:
        raise InvalidRequest(
            f"limit is {wish.limit}, less than the {SHARE} of {share} that is claimed; raise limit,"
            f" or claim less"
        )
    return Reservation(
        id="",
        device=part.device,
        share=int(share) * (wish.guarantee or 100) / 10_000,
        limit=(wish.limit or 100) / 100,
        memory=wish.memory or 0,
        within=wish.objective or 0,
    )
