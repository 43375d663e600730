"""An allocator of our own, written from the API's documentation: what a scheduler may give away of
published slices, and when it may bind a pod.

It knows counters, shared capacity with its policies and share ids, taints, selectors, binding
conditions. It tries devices in order, each once for a request, and gives up after so many tries.
"""

from __future__ import annotations

import copy
import itertools
import re
import uuid
from collections.abc import Iterator, Sequence
from fractions import Fraction
from functools import cache
from typing import Any

import celpy

Object = dict[str, Any]

LABEL = re.compile(r"[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?")
IDENTIFIER = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,31}")
DECIMAL = {"n": -9, "u": -6, "m": -3, "": 0, "k": 3, "M": 6, "G": 9, "T": 12, "P": 15, "E": 18}


TRIES = 500
"""Devices looked at for one claim."""


class Invalid(Exception):
    """The API server, or the allocator, does not take these slices."""


class Aborted(Exception):
    """The allocation of a claim was given up with an error, not only put off."""


def amount(text: str) -> Fraction:
    """Of a quantity."""
    found = re.fullmatch(r"([0-9.]+)(?:(Ki|Mi|Gi|Ti)|([numkMGTPE]?))", str(text))
    assert found, text
    if found[2]:
        return Fraction(found[1]) * 1024 ** (1 + "KMGT".index(found[2][0]))
    return Fraction(found[1]) * Fraction(10) ** DECIMAL[found[3]]


# What the API server checks beyond the schema


def check_slice(item: Object) -> None:
    """Raises Invalid."""
    spec = item["spec"]
    devices, sets = spec.get("devices"), spec.get("sharedCounters")
    _rule(not (devices is not None and sets is not None), "devices or sharedCounters, not both")
    _rule(sum(key in spec for key in ("nodeName", "nodeSelector", "allNodes")) == 1, "whose node")
    _rule(spec["pool"]["resourceSliceCount"] > 0 and spec["pool"]["generation"] >= 0, "pool")
    advanced = any(d.get("consumesCounters") or d.get("taints") for d in devices or [])
    _rule(len(devices or []) <= (64 if advanced else 128), "too many devices")
    _rule(len({d["name"] for d in devices or []}) == len(devices or []), "one name, one device")
    _rule(len(sets or []) <= 8, "too many counter sets")
    for counters in sets or []:
        _rule(LABEL.fullmatch(counters["name"]), "name of a counter set")
        _check_counters(counters["counters"])
    for device in devices or []:
        _check_device(device)


def _rule(holds: object, what: str) -> None:
    if not holds:
        raise Invalid(what)


def _check_counters(counters: Object) -> None:
    _rule(0 < len(counters) <= 32, "1 to 32 counters")
    _rule(all(LABEL.fullmatch(name) for name in counters), "name of a counter")


def _check_device(device: Object) -> None:
    _rule(LABEL.fullmatch(device["name"]), "name of a device")
    attributes, capacity = device.get("attributes", {}), device.get("capacity", {})
    _rule(len(attributes) + len(capacity) <= 32, "too many attributes and capacities")
    for name, value in attributes.items():
        _rule(IDENTIFIER.fullmatch(name) and len(value) == 1, "attribute")
        _rule(len(value.get("string", "")) <= 64, "long attribute")
    consumptions = device.get("consumesCounters", [])
    _rule(len(consumptions) <= 2, "counters of at most two sets")
    for consumption in consumptions:
        _check_counters(consumption["counters"])
    _rule(len(device.get("bindingConditions", [])) <= 4, "too many binding conditions")
    _rule(len(device.get("taints", [])) <= 16, "too many taints")
    for entry in capacity.values():
        policy = entry.get("requestPolicy")
        if policy is not None:
            _rule(device.get("allowMultipleAllocations"), "a policy is for shared devices")
            _check_policy(policy, amount(entry["value"]))


def _check_policy(policy: Object, value: Fraction) -> None:
    span, default = policy["validRange"], amount(policy["default"])
    low, high, step = (amount(span[key]) for key in ("min", "max", "step"))
    _rule(low <= default <= high <= value, "order of a range")
    _rule(low + step <= value, "step within the capacity")
    _rule(high % step == 0 and default % step == 0, "multiples of the step")


class Oracle:
    """Allocates from one pool. ``claims`` maps what is allocated, by any key."""

    def __init__(self, slices: list[Object], classes: dict[str, Object]) -> None:
        newest = max(item["spec"]["pool"]["generation"] for item in slices)
        pool = [item for item in slices if item["spec"]["pool"]["generation"] == newest]
        self.complete = all(i["spec"]["pool"]["resourceSliceCount"] == len(pool) for i in pool)
        self.driver = pool[0]["spec"]["driver"]
        self.name = pool[0]["spec"]["pool"]["name"]
        self.devices: dict[str, Object] = {}
        self.counters: dict[str, dict[str, Fraction]] = {}
        for item in pool:
            check_slice(item)
            for device in item["spec"].get("devices", []):
                _rule(device["name"] not in self.devices, "one name, one device")
                self.devices[device["name"]] = device
            for found in item["spec"].get("sharedCounters", []):
                _rule(found["name"] not in self.counters, "one name, one set")
                self.counters[found["name"]] = _amounts(found["counters"])
        for device in self.devices.values():
            for found in device.get("consumesCounters", []):
                known = self.counters.get(found["counterSet"], {})
                _rule(known.keys() >= found["counters"].keys(), "counters that there are")
        self.classes = classes
        self._left = 0
        self._selected: dict[tuple[str, str], bool] = {}
        self.claims: dict[Any, list[Object]] = {}

    def allocate(
        self, key: Any, requests: list[Object], config: Sequence[Object] = ()
    ) -> Object | None:
        """An allocation for a claim's requests, as its status has it, or None if there is no room
        now. Raises Aborted."""
        if not self.complete:
            return None
        wanted = [r for r in requests for _ in range(r["exactly"].get("count", 1))]
        self._left = TRIES
        found = next(self._tries(wanted, [], 0), None) if len(wanted) <= 32 else None
        if found is None:
            return None
        self.claims[key] = found
        return {"devices": {"results": found, "config": [*self._config(requests), *config]}}

    def free(self, key: Any) -> None:
        """The claim is gone."""
        del self.claims[key]

    def consumed(self, results: list[Object]) -> dict[str, dict[str, Fraction]]:
        """What counters results take: a shared device takes its part once."""
        total: dict[str, dict[str, Fraction]] = {name: {} for name in self.counters}
        for name in {result["device"] for result in results}:
            for found in self.devices.get(name, {}).get("consumesCounters", []):
                into = total[found["counterSet"]]
                for counter, value in _amounts(found["counters"]).items():
                    into[counter] = into.get(counter, Fraction(0)) + value
        return total

    @property
    def results(self) -> list[Object]:
        return list(itertools.chain.from_iterable(self.claims.values()))

    def _config(self, requests: list[Object]) -> list[Object]:
        return [
            {"source": "FromClass", "requests": [request["name"]], **copy.deepcopy(entry)}
            for request in requests
            for entry in self.classes[request["exactly"]["deviceClassName"]].get("config", [])
        ]

    def _tries(
        self, wanted: list[Object], chosen: list[Object], start: int
    ) -> Iterator[list[Object]]:
        """``start``: the devices before have been tried for this request."""
        if not wanted:
            yield chosen
            return
        devices = list(self.devices.values())
        for index in range(start, len(devices)):
            self._left -= 1
            if self._left < 0:
                return
            result = self._result(wanted[0], devices[index], chosen)
            if result is not None:
                same = len(wanted) > 1 and wanted[1] is wanted[0]
                yield from self._tries(wanted[1:], [*chosen, result], index + 1 if same else 0)

    def _selects(self, expression: str, device: Object) -> bool:
        key = expression, device["name"]
        if key not in self._selected:
            self._selected[key] = selects(expression, self.driver, device)
        return self._selected[key]

    def _result(self, request: Object, device: Object, chosen: list[Object]) -> Object | None:
        exactly = request["exactly"]
        selectors = self.classes[exactly["deviceClassName"]].get("selectors", [])
        for selector in [*selectors, *exactly.get("selectors", [])]:
            if not self._selects(selector["cel"]["expression"], device):
                return None
        if not all(_tolerated(t, exactly) for t in device.get("taints", [])):
            return None
        taken = [r for r in [*self.results, *chosen] if r["device"] == device["name"]]
        shared = device.get("allowMultipleAllocations", False)
        capacity = _consumes(device, exactly.get("capacity", {}).get("requests", {}))
        if (taken and not shared) or capacity is None:
            return None
        result: Object = {
            "request": request["name"],
            "driver": self.driver,
            "pool": self.name,
            "device": device["name"],
            "bindingConditions": device.get("bindingConditions", []),
            "bindingFailureConditions": device.get("bindingFailureConditions", []),
        }
        if shared:
            for name, value in capacity.items():
                before = sum(amount(r["consumedCapacity"][name]) for r in taken)
                if before + value > amount(device["capacity"][name]["value"]):
                    return None
            result["shareID"] = str(uuid.uuid4())
            result["consumedCapacity"] = {name: str(value) for name, value in capacity.items()}
        totals = self.consumed([*self.results, *chosen, result])
        for name, counters in totals.items():
            if any(value > self.counters[name][counter] for counter, value in counters.items()):
                return None
        return result


def _amounts(counters: Object) -> dict[str, Fraction]:
    return {name: amount(counter["value"]) for name, counter in counters.items()}


def _consumes(device: Object, asked: dict[str, str]) -> dict[str, Fraction] | None:
    """What a request takes of each capacity, rounded as the policy says; None if it cannot."""
    capacities = device.get("capacity", {})
    if asked.keys() - capacities.keys():
        return None
    found = {}
    for name, capacity in capacities.items():
        value, policy = amount(capacity["value"]), capacity.get("requestPolicy")
        if name not in asked:
            found[name] = amount(policy["default"]) if policy else value
            continue
        found[name] = amount(asked[name])
        if policy:
            span = policy["validRange"]
            low, high, step = (amount(span[key]) for key in ("min", "max", "step"))
            steps = -((low - max(found[name], low)) // step)
            found[name] = low + steps * step
            if found[name] > high:
                return None
        if found[name] > value:
            return None
    return found


def _tolerated(taint: Object, exactly: Object) -> bool:
    if taint["effect"] not in ("NoSchedule", "NoExecute"):
        return True
    return any(
        toleration.get("key", taint["key"]) == taint["key"]
        and toleration.get("effect", taint["effect"]) == taint["effect"]
        for toleration in exactly.get("tolerations", [])
    )


def selects(expression: str, driver: str, device: Object) -> bool:
    """Whether a selector takes a device. Raises Aborted where it says neither."""
    attributes = {n: next(iter(v.values())) for n, v in device.get("attributes", {}).items()}
    context = {
        "driver": driver,
        "attributes": {driver: attributes},
        "capacity": {driver: {n: c["value"] for n, c in device.get("capacity", {}).items()}},
        "allowMultipleAllocations": device.get("allowMultipleAllocations", False),
    }
    try:
        found = _program(expression).evaluate({"device": celpy.json_to_cel(context)})
    except celpy.CELEvalError as error:
        raise Aborted(f"{expression}: {error}") from None
    if not isinstance(found, celpy.celtypes.BoolType):
        raise Aborted(f"{expression} is neither true nor false")
    return bool(found)


@cache
def _program(expression: str) -> Any:
    environment = celpy.Environment()
    return environment.program(environment.compile(expression))


def binding(claim: Object, by_share: bool) -> str:
    """What a scheduler does with a pod that waits for a claim: ``binds``, ``waits`` or ``fails``.
    Those up to 1.37 do not look at share ids (``by_share`` false)."""
    state = "binds"
    for result in claim["status"]["allocation"]["devices"]["results"]:
        if not result.get("bindingConditions"):
            continue
        keys = ["driver", "pool", "device", *(["shareID"] if by_share else [])]
        devices = claim["status"].get("devices", [])
        entry = next((d for d in devices if all(d.get(k) == result.get(k) for k in keys)), {})
        holds = {c["type"] for c in entry.get("conditions", []) if c["status"] == "True"}
        if holds & set(result["bindingFailureConditions"]):
            return "fails"
        if not holds >= set(result["bindingConditions"]):
            state = "waits"
    return state
