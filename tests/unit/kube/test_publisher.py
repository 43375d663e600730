"""What is published when the node, its devices and the API server come and go."""

from __future__ import annotations

from typing import Any

import pytest

from cotenant.kube import slices
from cotenant.kube.names import AWAY, GONE
from cotenant.kube.ports import ClusterAway, Conflict, Object
from cotenant.kube.publisher import Publisher
from tests import kube_schema
from tests.kube_fakes import FakeCluster, FakeNode, ask, cpu, gpu_mig, npu
from tests.kube_oracle import Oracle

EVERY: dict[str, Object] = {"all": {}}


class Bench:
    def __init__(self, *devices: Object) -> None:
        self.node = FakeNode(*devices)
        self.cluster = FakeCluster()
        self.allocated: set[str] | None = set()
        self.publisher = self.again()

    def again(self) -> Publisher:
        return Publisher(self.node, self.cluster, "n1", lambda: self.allocated, patience=2)

    def publish(self, passes: int = 1) -> None:
        for _ in range(passes):
            self.publisher.publish()
        found = list(self.cluster.written.values())
        assert slices.in_order(found, "n1") or not found
        for item in found:
            bare = dict(item["metadata"])
            bare.pop("resourceVersion")
            kube_schema.check({**item, "metadata": bare})

    @property
    def devices(self) -> dict[str, Object]:
        return slices.published(self.cluster.written.values()).devices

    @property
    def generation(self) -> int:
        (found,) = {i["spec"]["pool"]["generation"] for i in self.cluster.written.values()}
        return int(found)

    def taints(self, name: str) -> set[str]:
        return {taint["key"] for taint in self.devices[name].get("taints", [])}


def test_nothing_is_written_while_nothing_changes() -> None:
    bench = Bench(cpu(70), gpu_mig())
    bench.publish()
    writes, generation = bench.cluster.writes, bench.generation
    bench.publish(3)
    bench.publisher = bench.again()
    bench.publish(3)
    assert (bench.cluster.writes, bench.generation) == (writes, generation)


def test_a_change_is_a_generation_of_all_slices() -> None:
    bench = Bench(cpu(70))
    bench.publish()
    before = bench.generation
    bench.node.devices.append(npu())
    bench.publish()
    assert bench.generation > before
    assert "npu-whole" in bench.devices


def test_slices_that_are_no_longer_needed_are_deleted() -> None:
    bench = Bench(cpu(150), npu())
    bench.publish()
    many = len(bench.cluster.written)
    bench.node.devices = [npu()]
    bench.publish(3)
    assert len(bench.cluster.written) < many
    assert set(bench.devices) == {"npu-whole"}


def test_what_vanishes_is_withdrawn_unless_it_is_allocated() -> None:
    bench = Bench(cpu(4), npu())
    bench.publish()
    bench.allocated = {"npu-whole"}
    bench.node.devices = [cpu(3)]
    bench.publish(5)
    assert bench.taints("npu-whole") == {GONE}
    assert "cpu-unit-3" not in bench.devices
    Oracle(list(bench.cluster.written.values()), EVERY)
    bench.allocated = set()
    bench.publish(2)
    assert "npu-whole" not in bench.devices


def test_what_is_allocated_while_it_vanishes_stays() -> None:
    bench = Bench(cpu(4), npu())
    bench.publish()
    bench.node.devices = [cpu(4)]
    bench.publish()
    bench.allocated = {"npu-whole"}
    bench.publish(3)
    assert bench.taints("npu-whole") == {GONE}


def test_nothing_is_withdrawn_while_claims_are_not_known() -> None:
    bench = Bench(cpu(4), npu())
    bench.publish()
    bench.allocated = None
    bench.node.devices = [cpu(4)]
    bench.publish(5)
    assert bench.taints("npu-whole") == {GONE}


def test_a_device_that_comes_back_can_be_had_again() -> None:
    bench = Bench(cpu(4), npu())
    bench.publish()
    bench.allocated = {"npu-whole"}
    bench.node.devices = [cpu(4)]
    bench.publish(2)
    bench.node.devices = [cpu(4), npu()]
    bench.publish()
    assert bench.taints("npu-whole") == set()


def test_a_node_that_is_away_is_tainted_and_not_withdrawn() -> None:
    bench = Bench(cpu(4), npu())
    bench.publish()
    names = set(bench.devices)
    bench.node.away = True
    bench.publish(4)
    assert set(bench.devices) == names
    assert all(bench.taints(name) == {AWAY} for name in names)
    oracle = Oracle(list(bench.cluster.written.values()), EVERY)
    assert oracle.allocate("c", [ask("a", "all")]) is None
    generation = bench.generation
    bench.publish(4)
    assert bench.generation == generation
    bench.node.away = False
    bench.publish()
    assert all(bench.taints(name) == set() for name in names)


def test_a_short_silence_of_the_node_changes_nothing() -> None:
    bench = Bench(cpu(4))
    bench.publish()
    writes = bench.cluster.writes
    bench.node.away = True
    bench.publish()
    bench.node.away = False
    bench.publish()
    assert bench.cluster.writes == writes


def test_a_node_that_never_answered_is_not_published() -> None:
    bench = Bench(cpu(4))
    bench.node.away = True
    bench.publish(4)
    assert bench.cluster.written == {}


def test_a_pass_that_was_broken_off_is_made_good() -> None:
    bench = Bench(cpu(150))
    bench.publish()
    bench.node.devices = [cpu(160), npu()]
    write, calls = bench.cluster.update_slice, iter(range(100))

    def breaks(item: Object) -> Object:
        if next(calls) == 1:
            raise ClusterAway("gone")
        return write(item)

    bench.cluster.update_slice = breaks  # type: ignore[method-assign]
    with pytest.raises(ClusterAway):
        bench.publisher.publish()
    bench.publisher = bench.again()
    bench.publish()
    assert "npu-whole" in bench.devices


def test_slices_that_somebody_changed_are_put_right() -> None:
    bench = Bench(cpu(4), npu())
    bench.publish()
    spoilt: Any = next(i for i in bench.cluster.written.values() if "devices" in i["spec"])
    spoilt["spec"]["devices"][0]["attributes"]["units"] = {"int": 99}
    bench.publish()
    assert bench.devices["cpu-time"]["attributes"]["units"] == {"int": 4}


def test_a_conflict_is_for_the_next_pass() -> None:
    bench = Bench(cpu(4))
    bench.publish()
    bench.node.devices.append(npu())
    read = bench.cluster.slices

    def overtaken(pool: str) -> list[Object]:
        found = read(pool)
        for item in found:
            bench.cluster.update_slice(item)
        return found

    bench.cluster.slices = overtaken  # type: ignore[method-assign]
    with pytest.raises(Conflict):
        bench.publisher.publish()
    bench.cluster.slices = read  # type: ignore[method-assign]
    bench.publish()
    assert "npu-whole" in bench.devices


def test_the_times_of_taints_are_kept() -> None:
    bench = Bench(cpu(4), npu())
    bench.publish()
    bench.allocated = {"npu-whole"}
    bench.node.devices = [cpu(4)]
    bench.publish()
    (before,) = bench.devices["npu-whole"]["taints"]
    bench.node.devices = [cpu(3)]
    bench.publish(3)
    (after,) = bench.devices["npu-whole"]["taints"]
    assert after == before
