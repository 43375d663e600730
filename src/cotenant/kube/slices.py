"""ResourceSlices of a node's pool, from its inventory and from what is published already.

The rules of the API (``resource.k8s.io/v1``) that shape them: counters are in slices of their own,
at most 8 sets a slice; a slice with counters consumed or with taints has at most 64 devices; all
slices of a pool have one generation and say how many they are.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterable, Mapping
from typing import Any, Final

import msgspec

from cotenant.kube.inventory import TIME, Inventory, Part, label
from cotenant.kube.names import AWAY, DRIVER, GONE, PLANNED, REFUSED, SHARE, TROUBLE
from cotenant.kube.ports import Object

API: Final = "resource.k8s.io/v1"
MOST_DEVICES: Final = 64
MOST_SETS: Final = 8
_NAME: Final = 200
"""Characters of a slice's name for the node; the rest counts the slices."""

Taint = dict[str, str]


class Pool(msgspec.Struct):
    """What a pool has, as the API writes it: devices by name, counter sets by name."""

    devices: dict[str, Object] = {}
    counters: dict[str, Object] = {}


def published(slices: Iterable[Object]) -> Pool:
    """What slices say, whichever generation they are of."""
    pool = Pool({}, {})
    for item in slices:
        spec = item.get("spec") or {}
        pool.devices.update((d["name"], d) for d in spec.get("devices") or [])
        pool.counters.update((c["name"], c) for c in spec.get("sharedCounters") or [])
    return pool


def wanted(inventory: Inventory, before: Pool, allocated: Collection[str] | None) -> Pool:
    """What is to be published of a node that has answered. ``allocated``: names of devices that
    claims have; None if that is not known now.

    What the node no longer has is tainted first. It is withdrawn in a later pass, and only if no
    claim has it: one that was allocated meanwhile stays.
    """
    pool = Pool(
        {name: device(part) for name, part in inventory.parts.items()},
        {name: _set(name, counts) for name, counts in inventory.counters.items()},
    )
    for name, old in before.devices.items():
        if name in pool.devices:
            continue
        tainted = any(taint.get("key") == GONE for taint in old.get("taints") or [])
        if not tainted or allocated is None or name in allocated:
            pool.devices[name] = _tainted(old, {"key": GONE, "effect": "NoExecute"})
            _keep_counters(pool, before, old)
    return pool


def without_node(before: Pool) -> Pool:
    """What is to be published of a node that does not answer: all of it, not to be allocated."""
    taint = {"key": AWAY, "effect": "NoSchedule"}
    return Pool(
        {name: _tainted(old, taint) for name, old in before.devices.items()}, dict(before.counters)
    )


def device(part: Part) -> Object:
    """A device as the API writes it."""
    found: Object = {
        "name": part.name,
        "attributes": {name: _attribute(v) for name, v in sorted(part.attributes.items())},
        "capacity": {SHARE: {"value": "100"}},
        "consumesCounters": [_consumption(label(part.device), part.consumes)],
        "bindsToNode": True,
        "bindingConditions": [PLANNED],
        "bindingFailureConditions": [REFUSED],
    }
    if part.mode == TIME:
        found["allowMultipleAllocations"] = True
        # Whole per cents: a step below one is rounded up to one by schedulers of 1.36
        # (kubernetes#140160), and without a step nothing is rounded at all.
        found["capacity"][SHARE]["requestPolicy"] = {
            "default": "100",
            "validRange": {"min": "1", "max": "100", "step": "1"},
        }
    if part.trouble:
        found["taints"] = [{"key": TROUBLE, "effect": "NoSchedule"}]
    return found


def same(one: Pool, other: Pool) -> bool:
    """Whether two pools say the same, but for times that the server added."""
    return _plain(one) == _plain(other) and one.counters == other.counters


def _plain(pool: Pool) -> dict[str, Object]:
    return {
        name: {**found, "taints": [_untimed(taint) for taint in found.get("taints") or []]}
        for name, found in pool.devices.items()
    }


def _untimed(taint: Taint) -> Taint:
    return {key: value for key, value in taint.items() if key != "timeAdded"}


def slices(pool: Pool, node: str, generation: int, owner: Object | None) -> list[Object]:
    """The slices of a pool, counters first. ``owner``: the Node with which they are deleted."""
    counters = _chunks([pool.counters[name] for name in sorted(pool.counters)], MOST_SETS)
    devices = _chunks([pool.devices[name] for name in sorted(pool.devices)], MOST_DEVICES)
    contents = [{"sharedCounters": chunk} for chunk in counters]
    contents += [{"devices": chunk} for chunk in devices or [[]]]
    metadata: Object = {"ownerReferences": [_reference(owner)]} if owner else {}
    return [
        {
            "apiVersion": API,
            "kind": "ResourceSlice",
            "metadata": {"name": slice_name(node, index), **metadata},
            "spec": {
                "driver": DRIVER,
                "nodeName": node,
                "pool": {
                    "name": node,
                    "generation": generation,
                    "resourceSliceCount": len(contents),
                },
                **content,
            },
        }
        for index, content in enumerate(contents)
    ]


def slice_name(node: str, index: int) -> str:
    """The same for each pass, so that one that was broken off leaves nothing behind."""
    if len(node) > _NAME:
        digest = hashlib.sha256(node.encode()).hexdigest()[:8]
        node = f"{node[: _NAME - 9].rstrip('.-')}-{digest}"
    return f"{node}-{DRIVER}-{index}"


def in_order(slices: Collection[Object], node: str) -> bool:
    """Whether slices are one complete generation under the names that they should have."""
    pools = [item["spec"]["pool"] for item in slices]
    names = {item["metadata"]["name"] for item in slices}
    return (
        names == {slice_name(node, index) for index in range(len(slices))}
        and len({pool["generation"] for pool in pools}) == 1
        and all(pool["resourceSliceCount"] == len(pools) for pool in pools)
    )


def _chunks(items: list[Object], size: int) -> list[list[Object]]:
    return [items[at : at + size] for at in range(0, len(items), size)]


def _reference(node: Object) -> Object:
    meta = node["metadata"]
    return {"apiVersion": "v1", "kind": "Node", "name": meta["name"], "uid": meta["uid"]}


def _attribute(value: str | int | bool) -> dict[str, Any]:
    if isinstance(value, bool):
        return {"bool": value}
    return {"int": value} if isinstance(value, int) else {"string": value}


def _counts(counts: Mapping[str, int]) -> Object:
    return {name: {"value": str(count)} for name, count in sorted(counts.items())}


def _set(name: str, counts: Mapping[str, int]) -> Object:
    return {"name": name, "counters": _counts(counts)}


def _consumption(name: str, counts: Mapping[str, int]) -> Object:
    return {"counterSet": name, "counters": _counts(counts)}


def _tainted(old: Object, taint: Taint) -> Object:
    others = [t for t in old.get("taints") or [] if t.get("key") != taint["key"]]
    same_key = [t for t in old.get("taints") or [] if _untimed(t) == taint]
    return {**old, "taints": [*others, *(same_key[:1] or [taint])]}


def _keep_counters(pool: Pool, before: Pool, old: Object) -> None:
    """A device that stays needs the counters that it consumes: without them its pool is invalid."""
    for consumption in old.get("consumesCounters") or []:
        name = consumption["counterSet"]
        known = before.counters.get(name, {"name": name, "counters": {}})["counters"]
        now = pool.counters.setdefault(name, {"name": name, "counters": {}})["counters"]
        for counter in consumption["counters"]:
            now.setdefault(counter, known.get(counter, {"value": "0"}))
