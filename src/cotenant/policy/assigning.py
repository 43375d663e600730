"""Which of several devices carries which service, where any would do.

Services stay where they are while the load is even. New ones, and those whose device can no
longer take them, go one by one to the emptiest device that has the memory, largest first; one
that is more than a device should carry is split. Where the load is uneven all the same, or a
service found no place, an integer program over the devices that have too much and those that
have least says who moves::

    minimise    busiest + OVER · Σ_d over_d + NOWHERE · Σ_s z_s
                + COPY · Σ y_sd + MOVE · Σ_(s was not on d) y_sd
    subject to  Σ_d x_sd + z_s = 1,   LEAST_PART · y_sd ≤ x_sd ≤ y_sd,   y_sd ∈ {0, 1}
                Σ_s memory_sd · y_sd ≤ memory_d
                Σ_s demand_sd · x_sd ≤ busiest,   Σ_s demand_sd · x_sd ≤ RHO_MAX + over_d

with ``x_sd`` the part of service ``s`` that device ``d`` carries and ``demand_sd`` the utilization
of ``d`` if it carried all of ``s``. ``z_s`` is for services that had no place before, and only
services that are in parts, or too much for any device, have an ``x`` that is not their ``y``.
HiGHS solves it (Huangfu and Hall, "Parallelizing the dual revised simplex method", Math. Prog.
Comp. 2018) with one thread and a bound on nodes, never on time, so that the same facts give the
same answer. Its size is bounded, whatever the fleet's: what is left uneven is for a later plan.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from cotenant.policy.prospects import RHO_MAX

LEAST_PART = 0.1
"""A device is not used for less than this part of a service."""
STICK = 0.2
"""Services stay where they are while the busiest device is not busier than the emptiest by this
much utilization."""

NOWHERE = 100.0
OVER = 10.0
COPY = 0.02
MOVE = 0.03
GAIN = 0.02
"""In utilization of the busiest device: what a service without a place costs, a device beyond
``RHO_MAX`` for each unit of utilization, a copy of a service, and a move; and what must be gained
for anything to happen."""

_BUSIEST, _EMPTIEST, _ROOMIEST = 3, 3, 3
"""So many devices are looked at in one program."""
_MOVABLE = 20
"""And so many services on them."""
_NODES = 2000
"""Of branch and bound for a program of one column; fewer, in proportion, for a larger one."""
_GAP = 0.1
"""How far from the best HiGHS may stop, in utilization: moves that are good enough now are better
than the best ones later."""

Shares = dict[str, dict[str, float]]
"""Service to device to the part (0..1) of its load that the device carries; the parts of a service
sum to 1, or there are none where it fits nowhere."""


class Fleet(NamedTuple):
    """Devices that could carry the same services."""

    demands: Mapping[str, Mapping[str, float]]
    """Service to device to the utilization that all of the service would be there. Devices on
    which it cannot run are missing."""
    needs: Mapping[str, Mapping[str, int]]
    """The same for memory, in bytes."""
    memory: Mapping[str, int]
    """Device to its memory in bytes, 0 if not known."""


def settle(fleet: Fleet, before: Shares) -> Shares:
    """``before``, as far as it is still possible, and the rest where there is most room."""
    book = _Book(fleet)
    homeless: list[str] = []
    for name in sorted(fleet.demands, key=lambda name: (-_size(fleet, name), name)):
        old = before.get(name, {})
        if old and all(book.fits(name, device) for device in old):
            total = sum(old.values())
            for device, part in old.items():
                book.put(name, device, part / total)
        else:
            homeless.append(name)
    for name in homeless:
        book.place(name)
    return book.shares


class _Book:
    """Who carries what, and what that leaves of each device."""

    def __init__(self, fleet: Fleet) -> None:
        self.shares: Shares = {name: {} for name in fleet.demands}
        self._fleet = fleet
        self._used = dict.fromkeys(fleet.memory, 0.0)
        self._held = dict.fromkeys(fleet.memory, 0)
        self._guests = dict.fromkeys(fleet.memory, 0)

    def fits(self, name: str, device: str) -> bool:
        """Whether a service can run there beside what is there already."""
        if device not in self._fleet.demands[name]:
            return False
        room = self._fleet.memory[device]
        return not room or self._held[device] + self._fleet.needs[name][device] <= room

    def put(self, name: str, device: str, part: float) -> None:
        """Give a device a part of a service."""
        self.shares[name][device] = part
        self._used[device] += part * self._fleet.demands[name][device]
        self._held[device] += self._fleet.needs[name][device]
        self._guests[device] += 1

    def place(self, name: str) -> None:
        """Put a service where there is room: whole, or in as few parts as its load calls for.
        While loads are not known, services keep out of each other's way."""
        demands, used, mine = self._fleet.demands[name], self._used, self.shares[name]
        able = sorted(
            (device for device in demands if self.fits(name, device)),
            key=lambda device: (used[device] + demands[device], self._guests[device], device),
        )
        if not able:
            return
        left = 1.0
        for device in able:
            demand = demands[device]
            part = min(left, (RHO_MAX - used[device]) / demand) if demand else left
            if left - part < LEAST_PART:
                part = left
            if part < LEAST_PART:
                continue
            self.put(name, device, part)
            left -= part
            if left <= 0.0:
                return
        # Nobody has room for the rest: those that carry it share that too, or one has all.
        if not mine:
            self.put(name, able[0], 1.0)
            return
        for device, part in mine.items():
            mine[device] = part / (1.0 - left)
            used[device] += (mine[device] - part) * demands[device]


def _used(fleet: Fleet, shares: Shares) -> dict[str, float]:
    """Utilization of each device."""
    used = dict.fromkeys(fleet.memory, 0.0)
    for name, parts in shares.items():
        for device, part in parts.items():
            used[device] += part * fleet.demands[name][device]
    return used


def _cost(fleet: Fleet, shares: Shares, before: Shares, devices: Sequence[str]) -> float:
    """The objective of a program over these devices."""
    all_used = _used(fleet, shares)
    used = [all_used[device] for device in devices]
    copies = sum(len(parts) for parts in shares.values())
    moves = sum(len(parts.keys() - before[name].keys()) for name, parts in shares.items())
    over = sum(max(0.0, u - RHO_MAX) for u in used)
    nowhere = sum(not parts for name, parts in shares.items() if fleet.demands[name])
    return max(used) + OVER * over + NOWHERE * nowhere + COPY * copies + MOVE * moves


def _size(fleet: Fleet, name: str) -> float:
    """How much of a device a service takes: of its time or of its memory."""
    return max(
        (
            max(demand, fleet.needs[name][device] / (fleet.memory[device] or math.inf))
            for device, demand in fleet.demands[name].items()
        ),
        default=0.0,
    )


def uneven(fleet: Fleet, shares: Shares) -> bool:
    """Whether ``improve`` might find something."""
    used = _used(fleet, shares)
    return bool(_ends(fleet, shares, used)) or bool(_whole(fleet, shares, used))


def improve(fleet: Fleet, shares: Shares) -> Shares:
    """``shares`` with services moved where that is worth it, and made whole again where one
    device has room for all of them."""
    used = _used(fleet, shares)
    shares = shares | {name: {to: 1.0} for name, to in _whole(fleet, shares, used).items()}
    devices = _ends(fleet, shares, _used(fleet, shares))
    found = _program(fleet, shares, devices) if devices else None
    if found is None or _homes(settle(fleet, found)) != _homes(found):
        return shares  # the solver's tolerances are not ours
    gain = _cost(fleet, shares, shares, devices) - _cost(fleet, found, shares, devices)
    return found if gain >= GAIN else shares


def _homes(shares: Shares) -> dict[str, set[str]]:
    return {name: set(parts) for name, parts in shares.items()}


def _whole(fleet: Fleet, shares: Shares, used: Mapping[str, float]) -> dict[str, str]:
    """Services in parts that one of their devices could carry easily, and that device."""
    found: dict[str, str] = {}
    full = dict(used)
    for name, parts in shares.items():
        demands = fleet.demands[name]
        for device, part in sorted(parts.items(), key=lambda item: (-item[1], item[0])):
            more = (1.0 - part) * demands[device]
            if len(parts) > 1 and full[device] + more <= RHO_MAX - STICK:
                found[name] = device
                full[device] += more
                break
    return found


def _ends(fleet: Fleet, shares: Shares, used: Mapping[str, float]) -> list[str]:
    """Devices between which services might move: the busiest, if one of their services would be
    better off elsewhere (or, if there are none such, those that could at best exchange services),
    the emptiest that could take some, and the roomiest where a service has no place. None if the
    load is even enough and every service has a place."""
    if len(used) < 2:
        return []
    guests: dict[str, list[str]] = {device: [] for device in used}
    free = {device: float(memory or math.inf) for device, memory in fleet.memory.items()}
    for name, parts in shares.items():
        for device in parts:
            guests[device].append(name)
            free[device] -= fleet.needs[name][device]
    least = min(used.values())
    busy = sorted(
        (
            device
            for device, mine in guests.items()
            if used[device] > RHO_MAX or (len(mine) > 1 and used[device] > least + STICK)
        ),
        key=lambda device: (-used[device], device),
    )
    targets = {
        device: _targets(fleet, shares, (used, free), device, guests[device]) for device in busy
    }
    busy = [device for device in busy if targets[device]] or busy
    homeless = [name for name, demands in fleet.demands.items() if demands and not shares[name]]
    if not homeless and (not busy or least >= RHO_MAX):
        return []
    found = busy[:_BUSIEST]
    wanted = {device for each in found for device in targets[each]}
    able = {device for each in found for name in guests[each] for device in fleet.demands[name]}
    order = sorted(able, key=lambda device: (device not in wanted, used[device], device))
    found += [device for device in order if device not in found][:_EMPTIEST]
    able = {device for name in homeless for device in fleet.demands[name]}
    order = sorted(able, key=lambda device: (-free[device], device))
    found += [device for device in order if device not in found][:_ROOMIEST]
    return found


def _targets(
    fleet: Fleet,
    shares: Shares,
    state: tuple[Mapping[str, float], Mapping[str, float]],
    device: str,
    guests: Sequence[str],
) -> set[str]:
    """Where a service of a device, or the least part of one that is too large for any, would find
    less company and the memory that it needs. ``state``: utilization and free memory."""
    used, free = state
    found: set[str] = set()
    for name in guests:
        demands = fleet.demands[name]
        part = LEAST_PART if min(demands.values()) > RHO_MAX else shares[name][device]
        found |= {
            other
            for other, demand in demands.items()
            if other not in shares[name]
            and free[other] >= fleet.needs[name][other]
            and used[other] + part * demand < used[device]
        }
    return found


class _Pair(NamedTuple):
    """What a service might be given of a device."""

    name: str
    device: str
    cost: float
    x: int
    """The column of the part."""
    y: int
    """That of whether there is one: the same where all or nothing is given."""


def _program(fleet: Fleet, shares: Shares, here: Sequence[str]) -> Shares | None:
    """What the program makes of the services on these devices; None if it finds nothing."""
    movable = _movable(fleet, shares, here)
    pairs = _pairs(fleet, shares, movable, here)
    if not pairs:
        return None
    used = _used(fleet, shares)
    rest = {device: used[device] for device in here}
    held = dict.fromkeys(here, 0)
    for name, parts in shares.items():
        for device, part in parts.items():
            if device not in held:
                continue
            if name in movable:
                rest[device] -= part * fleet.demands[name][device]
            else:
                held[device] += fleet.needs[name][device]
    homeless = [name for name in movable if not shares[name]]
    values = _solve(fleet, pairs, here, homeless, (rest, held))
    if values is None:
        return None
    found = dict(shares)
    for name in movable:
        mine = {
            pair.device: values[pair.x]
            for pair in pairs
            if pair.name == name and values[pair.y] > 0.5
        }
        total = sum(mine.values())
        found[name] = {device: part / total for device, part in mine.items()}
    return found


def _movable(fleet: Fleet, shares: Shares, here: Sequence[str]) -> list[str]:
    """Services on these devices alone: those without a place first, then the largest, by turns
    from the devices in their order."""
    rank = {device: number for number, device in enumerate(here)}
    chosen = [
        name
        for name, parts in shares.items()
        if parts.keys() <= rank.keys() and fleet.demands[name].keys() & rank.keys()
    ]
    chosen.sort(key=lambda name: (-_size(fleet, name), name))
    seen = dict.fromkeys(here, 0)
    turns: dict[str, tuple[int, int]] = {}
    for name in chosen:
        home = min(shares[name], key=lambda device: rank[device], default="")
        turns[name] = (seen[home], rank[home]) if home else (-1, 0)
        if home:
            seen[home] += 1
    chosen.sort(key=lambda name: (turns[name], name))
    homeless = [name for name in chosen if not shares[name]][: _MOVABLE // 2]
    return [*homeless, *[name for name in chosen if shares[name]]][:_MOVABLE]


def _pairs(
    fleet: Fleet, shares: Shares, movable: Sequence[str], here: Sequence[str]
) -> list[_Pair]:
    pairs: list[_Pair] = []
    for name in movable:
        demands = fleet.demands[name]
        divisible = len(shares[name]) > 1 or min(demands.values()) > RHO_MAX
        for device in here:
            if device in demands:
                x = pairs[-1].y + 1 if pairs else 0
                cost = COPY + (0.0 if device in shares[name] else MOVE)
                pairs.append(_Pair(name, device, cost, x, x + divisible))
    return pairs


def _solve(
    fleet: Fleet,
    pairs: Sequence[_Pair],
    devices: Sequence[str],
    homeless: Sequence[str],
    fixed: tuple[Mapping[str, float], Mapping[str, int]],
) -> list[float] | None:
    """Solve the program; the values of its columns, None without a solution. ``fixed``:
    utilization and memory of what does not move."""
    import highspy

    rest, held = fixed
    busiest = pairs[-1].y + 1
    over = {device: busiest + 1 + number for number, device in enumerate(devices)}
    nowhere = {name: busiest + 1 + len(devices) + number for number, name in enumerate(homeless)}
    columns = busiest + 1 + len(over) + len(nowhere)
    cost = [0.0] * busiest + [1.0] + [OVER] * len(over) + [NOWHERE] * len(nowhere)
    kinds = [highspy.HighsVarType.kContinuous] * columns
    for pair in pairs:
        cost[pair.y] = pair.cost
        kinds[pair.y] = highspy.HighsVarType.kInteger
    for column in nowhere.values():
        kinds[column] = highspy.HighsVarType.kInteger
    lp = highspy.HighsLp()
    lp.col_cost_ = cost
    lp.col_lower_ = [0.0] * columns
    lp.col_upper_ = [1.0] * busiest + [highspy.kHighsInf] * (columns - busiest)
    lp.integrality_ = kinds
    rows = _Rows(highspy.kHighsInf)
    for name in dict.fromkeys(pair.name for pair in pairs):
        parts = [(pair.x, 1.0) for pair in pairs if pair.name == name]
        if name in nowhere:
            parts.append((nowhere[name], 1.0))
        rows.add(1.0, 1.0, parts)
    for pair in pairs:
        if pair.x != pair.y:
            rows.at_most(0.0, [(pair.x, 1.0), (pair.y, -1.0)])
            rows.at_most(0.0, [(pair.x, -1.0), (pair.y, LEAST_PART)])
    for device in devices:
        mine = [pair for pair in pairs if pair.device == device]
        load = [(pair.x, fleet.demands[pair.name][device]) for pair in mine]
        rows.at_most(-rest[device], [*load, (busiest, -1.0)])
        rows.at_most(RHO_MAX - rest[device], [*load, (over[device], -1.0)])
        room = fleet.memory[device]
        if room:  # as parts of the device's, for the solver's tolerances are absolute
            need = [(pair.y, fleet.needs[pair.name][device] / room) for pair in mine]
            rows.at_most(1.0 - held[device] / room, need)
    lp.num_col_, lp.num_row_ = columns, len(rows.lower)
    lp.row_lower_, lp.row_upper_ = rows.lower, rows.upper
    lp.a_matrix_.format_ = highspy.MatrixFormat.kRowwise
    lp.a_matrix_.start_, lp.a_matrix_.index_ = rows.start, rows.index
    lp.a_matrix_.value_ = rows.value
    return _optimum(highspy, lp, 1 + _NODES // busiest)


def _optimum(highspy: Any, lp: Any, nodes: int) -> list[float] | None:
    solver = highspy.Highs()
    options = {
        "output_flag": False,
        "threads": 1,
        "random_seed": 0,
        "mip_max_nodes": nodes,
        "mip_rel_gap": 0.0,
        "mip_abs_gap": _GAP,
    }
    for option, value in options.items():
        solver.setOptionValue(option, value)
    solver.passModel(lp)
    solver.run()
    if solver.getInfo().primal_solution_status != highspy.SolutionStatus.kSolutionStatusFeasible:
        return None
    return [float(value) for value in solver.getSolution().col_value]


class _Rows:
    """Constraints, row by row, as HiGHS takes them."""

    def __init__(self, infinity: float) -> None:
        self.lower: list[float] = []
        self.upper: list[float] = []
        self.start = [0]
        self.index: list[int] = []
        self.value: list[float] = []
        self._infinity = infinity

    def add(self, lower: float, upper: float, terms: Sequence[tuple[int, float]]) -> None:
        """``lower`` ≤ Σ value · column ≤ ``upper``."""
        self.lower.append(lower)
        self.upper.append(upper)
        self.index += [index for index, _ in terms]
        self.value += [value for _, value in terms]
        self.start.append(len(self.index))

    def at_most(self, upper: float, terms: Sequence[tuple[int, float]]) -> None:
        """Σ value · column ≤ ``upper``."""
        self.add(-self._infinity, upper, terms)
