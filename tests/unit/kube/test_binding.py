"""The planner is asked before a pod is bound, and what it keeps lives as long as the allocation."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from cotenant.domain.errors import CotenantError, EnvironmentProblem
from cotenant.domain.reservation import Reservation
from cotenant.kube import command, slices
from cotenant.kube.binding import Binding
from cotenant.kube.claims import reservation_ids
from cotenant.kube.claimwatch import ClaimWatch
from cotenant.kube.inventory import inventory
from cotenant.kube.ports import ClusterAway, Conflict, Object
from tests import kube_schema
from tests.kube_fakes import FakeCluster, FakeNode, ask, claim, cpu, npu, says
from tests.kube_oracle import Oracle, binding

EVERY: dict[str, Object] = {"all": {}}
TIME = 'device.attributes["cotenant.dev"].mode == "time"'
CORE = 'device.attributes["cotenant.dev"].kind == "cpu" && ' + TIME.replace("time", "space")
NPU = 'device.attributes["cotenant.dev"].kind == "npu"'


class KnownClaims(ClaimWatch):
    """What was last read, which is when a test says so."""

    def __init__(self, cluster: FakeCluster) -> None:
        super().__init__(cluster, "n1")
        self.seen: list[Object] | None = None
        self.cluster = cluster

    def read(self) -> None:
        self.seen = copy.deepcopy(list(self.cluster.objects.values()))

    def claims(self) -> list[Object] | None:
        if self.seen is None:
            return None
        return [copy.deepcopy(c) for c in self.seen if reservation_ids(c, "n1")]


class Bench:
    def __init__(self, *devices: Object) -> None:
        self.node = FakeNode(*(devices or (cpu(4), npu())))
        self.cluster = FakeCluster()
        pool = slices.wanted(inventory(self.node.devices), slices.Pool(), set())
        self.oracle = Oracle(slices.slices(pool, "n1", 1, None), EVERY)
        self.watch = KnownClaims(self.cluster)
        self.start()

    def start(self) -> None:
        self.binding = Binding(self.node, self.cluster, "n1", self.watch, now=lambda: NOW)

    def schedule(self, name: str, *requests: Object, config: Any = ()) -> Object:
        """A scheduler allocates a claim."""
        found = self.oracle.allocate(name, list(requests), config)
        assert found is not None
        return self.cluster.put(claim(name, found))

    def settle(self) -> None:
        self.watch.read()
        self.binding.settle()
        self.watch.read()

    def state(self, name: str) -> str:
        """What the scheduler does; both kinds of them do the same."""
        found = self.cluster.objects[f"ns/{name}"]
        states = {binding(found, True), binding(found, False)}
        (state,) = states
        return state

    def held(self, name: str) -> int:
        return sum(r.name == f"ns/{name}" for r in self.node.kept.values())


NOW = "2026-01-01T00:00:00Z"


@pytest.fixture
def bench() -> Bench:
    return Bench()


def share(per_cents: str, name: str = "a") -> Object:
    return ask(name, "all", share=per_cents, selector=TIME)


def cores(count: int, name: str = "a") -> Object:
    return ask(name, "all", count, selector=CORE)


def test_a_pod_waits_until_its_claim_is_planned(bench: Bench) -> None:
    bench.schedule("c", share("40"))
    assert bench.state("c") == "waits"
    bench.settle()
    assert bench.state("c") == "binds"
    assert bench.held("c") == 1


def test_what_is_written_is_what_the_api_takes(bench: Bench) -> None:
    bench.schedule("c", share("40"), share("30", "b"))
    bench.settle()
    found = copy.deepcopy(bench.cluster.objects["ns/c"])
    found["spec"]["devices"]["requests"] = [share("40"), share("30", "b")]
    kube_schema.check(found)


def test_each_share_has_its_own_conditions(bench: Bench) -> None:
    held = bench.schedule("c", share("40"), share("30", "b"))
    bench.settle()
    ids = {r["shareID"] for r in held["status"]["allocation"]["devices"]["results"]}
    assert {d["shareID"] for d in bench.cluster.objects["ns/c"]["status"]["devices"]} == ids


def test_what_the_node_has_no_room_for_is_refused(bench: Bench) -> None:
    bench.node.kept["service"] = Reservation("service", "cpu", share=0.8)
    bench.schedule("c", share("40"))
    bench.settle()
    assert bench.state("c") == "fails"
    assert bench.held("c") == 0


def test_an_objective_that_no_layout_holds_is_refused(bench: Bench) -> None:
    bench.schedule("c", share("40"), config=[says(objective="10us")])
    bench.settle()
    assert bench.state("c") == "fails"


@pytest.mark.parametrize("parameters", [{"garantee": 5}, {"limit": 10}, {"memory": "lots"}])
def test_what_cannot_be_understood_is_refused(bench: Bench, parameters: Object) -> None:
    bench.schedule("c", share("40"), config=[says(**parameters)])
    bench.settle()
    assert bench.state("c") == "fails"
    assert bench.node.kept == {}


def test_a_claim_is_planned_whole_or_not_at_all(bench: Bench) -> None:
    bench.node.kept["service"] = Reservation("service", "npu", units=1)
    bench.schedule("c", share("40"), ask("n", "all", selector=NPU))
    bench.settle()
    assert bench.state("c") == "fails"
    assert bench.held("c") == 0


def test_a_claim_for_a_device_that_has_vanished_is_refused(bench: Bench) -> None:
    bench.schedule("c", ask("n", "all", selector=NPU))
    bench.node.devices = [cpu(4)]
    bench.settle()
    assert bench.state("c") == "fails"


def test_nothing_more_is_asked_once_all_is_said(bench: Bench) -> None:
    bench.schedule("c", share("40"))
    bench.schedule("d", share("50"), config=[says(objective="10us")])
    bench.settle()
    writes, asked = bench.cluster.writes, bench.node.asked
    for _ in range(3):
        bench.settle()
    assert (bench.cluster.writes, bench.node.asked) == (writes, asked)


def test_what_is_refused_stays_so_until_it_is_given_back(bench: Bench) -> None:
    bench.node.kept["service"] = Reservation("service", "cpu", share=0.8)
    bench.schedule("c", share("40"))
    bench.settle()
    bench.node.kept.clear()
    bench.settle()
    bench.start()
    bench.settle()
    assert bench.state("c") == "fails"
    bench.oracle.free("c")
    bench.schedule("c", share("40"))
    bench.settle()
    assert bench.state("c") == "binds"


def test_what_was_refused_is_not_planned_by_who_has_not_seen_it(bench: Bench) -> None:
    bench.node.kept["service"] = Reservation("service", "cpu", share=0.8)
    bench.schedule("c", share("40"))
    bench.watch.read()
    before = bench.watch.seen
    bench.settle()
    bench.node.kept.clear()
    bench.start()
    bench.watch.seen = before
    bench.binding.settle()
    assert bench.state("c") == "fails"
    bench.settle()
    assert bench.held("c") == 0


@pytest.mark.parametrize("value", ["\ud800", float("inf"), [[[]]], "x" * 9000, {"\ud800": 1}])
def test_what_anybody_writes_holds_up_nobody(bench: Bench, value: object) -> None:
    bench.schedule("odd", share("40"), config=[says(objective=value)])
    bench.schedule("odder", share("20"), config=[says(**{"\ud800": value})])
    bench.schedule("c", share("30"))
    bench.settle()
    assert (bench.state("odd"), bench.state("odder")) == ("fails", "fails")
    assert bench.state("c") == "binds"
    for found in bench.cluster.objects.values():
        for device in found["status"]["devices"]:
            assert all(c["message"].encode() for c in device["conditions"])


@pytest.mark.parametrize("ends", ["deleted", "deallocated", "allocated elsewhere"])
def test_what_no_claim_has_any_more_is_released(bench: Bench, ends: str) -> None:
    held = bench.schedule("c", share("40"))
    bench.settle()
    if ends == "deleted":
        bench.cluster.drop(held)
    else:
        result = held["status"]["allocation"]["devices"]["results"][0]
        result["pool"] = "n2"
        status = {} if ends == "deallocated" else held["status"]
        bench.cluster.put({**held, "status": status})
    bench.settle()
    assert bench.held("c") == 0


def test_what_the_kubelet_has_prepared_is_kept_whatever_becomes_of_its_claim(bench: Bench) -> None:
    held = bench.schedule("c", share("40"))
    bench.settle()
    prepared = frozenset(bench.node.kept)
    bench.binding.kept = lambda: prepared
    bench.cluster.drop(held)
    bench.settle()
    assert bench.held("c") == 1
    bench.binding.kept = frozenset
    bench.settle()
    assert bench.held("c") == 0


def test_the_command_keeps_what_its_plugin_keeps() -> None:
    node, cluster = FakeNode(cpu(4)), FakeCluster()
    keeps = lambda: frozenset({"k8s:a"})  # noqa: E731
    found, *_ = command.controllers(node, cluster, "n1", keeps)
    assert isinstance(found, Binding)
    assert found.kept is keeps


def test_orphans_of_before_a_start_are_released(bench: Bench) -> None:
    held = bench.schedule("c", share("40"))
    bench.schedule("d", share("30"))
    bench.settle()
    bench.cluster.drop(held)
    bench.start()
    bench.settle()
    assert (bench.held("c"), bench.held("d")) == (0, 1)


def test_what_others_reserved_is_theirs(bench: Bench) -> None:
    bench.node.kept["by hand"] = Reservation("by hand", "cpu", share=0.1, name="ns/x")
    bench.node.kept["k8s:odd"] = Reservation("k8s:odd", "cpu", share=0.1)
    bench.settle()
    assert len(bench.node.kept) == 2


def test_a_name_that_is_too_long_for_the_node_is_still_found(bench: Bench) -> None:
    held = bench.schedule("c" * 253, share("40"))
    bench.settle()
    assert len(bench.node.kept) == 1
    bench.watch.seen = []
    bench.binding.settle()
    assert len(bench.node.kept) == 1
    bench.cluster.drop(held)
    bench.settle()
    assert bench.node.kept == {}


def test_nothing_is_released_while_the_cluster_cannot_be_read(bench: Bench) -> None:
    held = bench.schedule("c", share("40"))
    bench.settle()
    bench.cluster.drop(held)
    bench.watch.read()
    bench.cluster.away = True
    for _ in range(5):
        bench.binding.settle()
    assert bench.held("c") == 1
    bench.cluster.away = False
    bench.settle()
    assert bench.held("c") == 0


def test_nothing_is_released_for_what_was_read_long_ago(bench: Bench) -> None:
    """The kubelet's half may have reserved for a claim that the watch has not seen."""
    bench.watch.read()
    bench.schedule("c", share("40"))
    bench.settle()
    bench.watch.seen = []
    bench.binding.settle()
    assert bench.held("c") == 1


def test_before_claims_were_read_nothing_is_done(bench: Bench) -> None:
    bench.node.kept["k8s:u/x/1"] = Reservation("k8s:u/x/1", "cpu", share=0.1, name="ns/c")
    bench.binding.settle()
    assert len(bench.node.kept) == 1


def test_a_node_that_is_away_is_asked_again(bench: Bench) -> None:
    bench.schedule("c", share("40"))
    bench.node.away = True
    with pytest.raises(EnvironmentProblem):
        bench.settle()
    bench.watch.read()
    assert bench.state("c") == "waits"
    bench.node.away = False
    bench.settle()
    assert bench.state("c") == "binds"


def test_an_answer_that_cannot_be_written_is_written_later(bench: Bench) -> None:
    bench.schedule("c", share("40"))
    bench.watch.read()
    bench.cluster.away = True
    with pytest.raises(ClusterAway):
        bench.binding.settle()
    bench.cluster.away = False
    bench.settle()
    assert bench.state("c") == "binds"
    assert bench.held("c") == 1


def test_conflicts_are_met_by_reading_afresh(bench: Bench) -> None:
    held = bench.schedule("c", share("40"))
    others = ({**held, "metadata": {**held["metadata"], "labels": {"n": str(n)}}} for n in range(3))
    bench.cluster.between = others
    bench.settle()
    found = bench.cluster.objects["ns/c"]
    assert bench.state("c") == "binds"
    assert found["metadata"]["labels"] == {"n": "2"}


def test_conflicts_without_end_do_not_hold_up_other_claims(bench: Bench) -> None:
    held = bench.schedule("c", share("40"))
    bench.schedule("d", share("30"))
    bench.cluster.between = endless(held)
    with pytest.raises(Conflict):
        bench.settle()
    bench.cluster.between = iter(())
    bench.settle()
    assert (bench.state("c"), bench.state("d")) == ("binds", "binds")


def endless(held: Object) -> Iterator[Object]:
    while True:
        yield held


def test_a_claim_that_changed_hands_meanwhile_is_not_written(bench: Bench) -> None:
    held = bench.schedule("c", share("40"))
    bench.watch.read()
    bench.cluster.put({**held, "status": {}})
    bench.binding.settle()
    assert bench.cluster.writes == 0
    bench.settle()
    assert bench.held("c") == 0


def test_what_others_say_in_the_status_stays(bench: Bench) -> None:
    held = bench.schedule("c", share("40"))
    result = held["status"]["allocation"]["devices"]["results"][0]
    key = {name: result[name] for name in ("driver", "pool", "device", "shareID")}
    ready = {"type": "Ready", "status": "True"}
    other = {"driver": "gpu.example", "pool": "p", "device": "d", "conditions": [ready]}
    held["status"]["devices"] = [{**key, "data": {"x": 1}, "conditions": [ready]}, other]
    held["status"]["newField"] = {"y": 2}
    bench.cluster.put(held)
    bench.settle()
    status = bench.cluster.objects["ns/c"]["status"]
    assert status["newField"] == {"y": 2}
    assert other in status["devices"]
    (ours,) = [d for d in status["devices"] if d["driver"] == "cotenant.dev"]
    assert ours["data"] == {"x": 1}
    assert ready in ours["conditions"]


def test_a_planned_claim_keeps_what_it_has_when_the_node_forgets(bench: Bench) -> None:
    bench.schedule("c", share("40"), cores_on_npu())
    bench.settle()
    lost = next(id for id, r in bench.node.kept.items() if r.device == "npu")
    del bench.node.kept[lost]
    bench.node.kept["service"] = Reservation("service", "npu", units=1)
    bench.settle()
    assert bench.held("c") == 1
    del bench.node.kept["service"]
    bench.settle()
    assert bench.held("c") == 2
    assert bench.state("c") == "binds"


def cores_on_npu() -> Object:
    return ask("n", "all", selector=NPU)


class Histories(RuleBasedStateMachine):
    """Whatever is allocated, given back, cut off and started again."""

    def __init__(self) -> None:
        super().__init__()
        self.bench = Bench(cpu(4), npu())
        self.count = 0

    @rule(wish=st.sampled_from(["30", "60", "2 cores", "npu"]), hard=st.booleans())
    def allocate(self, wish: str, hard: bool) -> None:
        self.count += 1
        name = f"c{self.count}"
        requests = {"2 cores": cores(2), "npu": cores_on_npu()}
        config = [says(objective="10us")] if hard else []
        found = self.bench.oracle.allocate(name, [requests.get(wish) or share(wish)], config)
        if found is not None:
            self.bench.cluster.put(claim(name, found))

    @rule(which=st.integers(0, 9))
    def give_back(self, which: int) -> None:
        claims = list(self.bench.cluster.objects.values())
        if claims:
            gone = claims[which % len(claims)]
            self.bench.cluster.drop(gone)
            self.bench.oracle.free(gone["metadata"]["name"])

    @rule(node=st.booleans(), cluster=st.booleans())
    def cut_off(self, node: bool, cluster: bool) -> None:
        self.bench.node.away, self.bench.cluster.away = node, cluster

    @rule()
    def start_again(self) -> None:
        self.bench.start()

    @rule(fresh=st.booleans())
    def a_pass(self, fresh: bool) -> None:
        if fresh and not self.bench.cluster.away:
            self.bench.watch.read()
        try:
            self.bench.binding.settle()
        except CotenantError:
            assert self.bench.node.away or self.bench.cluster.away

    @invariant()
    def who_binds_has_what_it_was_promised(self) -> None:
        for found in self.bench.cluster.objects.values():
            if binding(found, True) == "binds":
                ids = reservation_ids(found, "n1")
                assert self.bench.node.kept.keys() >= set(ids)

    def teardown(self) -> None:
        self.bench.node.away = self.bench.cluster.away = False
        for _ in range(3):
            self.bench.settle()
        wanted = set()
        for found in self.bench.cluster.objects.values():
            assert binding(found, True) == binding(found, False) != "waits"
            if binding(found, True) == "binds":
                wanted.update(reservation_ids(found, "n1"))
        assert self.bench.node.kept.keys() == wanted


Histories.TestCase.settings = settings(deadline=None, max_examples=25, stateful_step_count=25)
TestHistories = Histories.TestCase
