"""What must hold after every event. Tests call ``check`` after each; it is too slow for live."""

from __future__ import annotations

from cotenant.domain.device import PreemptLevel
from cotenant.policy.dispatcher import Dispatcher
from cotenant.policy.memory.account import Kind
from cotenant.policy.queues import able_count, has_worker
from cotenant.policy.state import DispatcherState, Hold, Phase


def check(dispatcher: Dispatcher) -> None:
    """Raise AssertionError naming the law that is broken."""
    state = dispatcher.state
    _holders(state, {d.id: d.preempt for d in dispatcher.devices})
    _tenants(state)
    _apart(state)
    _workers(state)
    _residency(state)
    _queues(state)
    _residents(state)
    _jobs(state, dispatcher.compute)
    _work_conserving(state)
    _timers(state)
    _memory(dispatcher)


def _memory(dispatcher: Dispatcher) -> None:
    state = dispatcher.state
    assert not dispatcher.books.touched, "a ledger changed and nobody was told"
    for device, ledger in dispatcher.books.devices.items():
        ledger.check()
        for name, holder in ledger.account.holders.items():
            if holder.terms.kind == Kind.JOB:
                assert name in state.tenants, f"{name} has memory of {device}, and is gone"
            elif holder.terms.kind == Kind.INSTANCE:
                worker = state.workers.get(name)
                assert worker is not None, f"{name} has memory of {device}, and is gone"
                booked = holder.has >= min(worker.memory, holder.terms.limit)
                assert booked or worker.pending or worker.up, f"{name}: loaded without memory"
    for ledger in dispatcher.books.pools.values():
        ledger.check()
    for service in state.services.values():
        assert service.unloads or not service.asleep, f"{service.name}: asleep against its will"
        known = {*service.versions.values(), service.offer_revision}
        assert known >= set(service.asleep), f"{service.name}: a version that is gone is asleep"
    for worker in state.workers.values():
        asleep = state.services[worker.service].asleep.get(worker.revision, {})
        there = worker.site in asleep and not worker.retiring
        assert not there, f"{worker.id}: there, and asleep"


def _holders(state: DispatcherState, levels: dict[str, PreemptLevel]) -> None:
    taken: set[tuple[str, int]] = set()
    for p in state.partitions.values():
        assert (p.job == "") == (p.hold == Hold.NONE), f"{p.id}: holder {p.job!r} but {p.hold!r}"
        if p.batch and p.job:
            job = state.jobs[p.job]
            level = job.levels.get(p.device, levels[p.device])
            fast = level >= PreemptLevel.PRIORITY or job.stopping
            assert fast, f"{p.id}: batch and job at level {level!r}"
            assert p.hold in (Hold.CLOSING, Hold.STOPPING), f"{p.id}: batch beside a held job"
        if p.batch:
            assert p.batch in state.running, f"{p.id}: unknown batch {p.batch}"
            assert state.running[p.batch].partition == p.id
        if p.at_hand:
            assert p.batch and p.at_hand != p.batch, f"{p.id}: a batch at hand and none under way"
            now, then = state.running[p.batch], state.running[p.at_hand]
            assert (then.partition, then.worker) == (p.id, now.worker), f"{p.id}: not its worker"
            assert then.after == p.batch, f"{p.id}: {p.at_hand} is not to follow {p.batch}"
        mine = {(p.device, unit) for unit in p.units}
        assert not taken & mine, f"{p.id}: units {taken & mine} belong to two partitions"
        taken |= mine
    for running in state.running.values():
        partition, worker = state.partitions[running.partition], state.workers[running.worker]
        assert running.batch.id in (partition.batch, partition.at_hand)
        assert worker.batch == partition.batch
        assert worker.site == partition.site, f"{worker.id}: runs where it is not bound"


def _apart(state: DispatcherState) -> None:
    for tenant in state.tenants.values():
        if tenant.phase in (Phase.QUEUED, Phase.STOPPING):
            continue
        apart = set(tenant.devices).intersection(tenant.apart)
        for p in state.partitions.values():
            there = p.device in apart and tenant.place in ("", p.id)
            assert not (there and p.services), f"{tenant.id}: it is to be apart, and {p.id} serves"


def _workers(state: DispatcherState) -> None:
    for service in state.services.values():
        idle = [w for pool in service.idle.values() for ws in pool.values() for w in ws]
        assert len(idle) == len(set(idle)), f"{service.name}: a worker is idle twice"
        for name in idle:
            assert state.workers[name].batch == 0, f"{name}: idle and busy"
            assert not state.workers[name].retiring, f"{name}: idle and retiring"
            assert not state.workers[name].standby, f"{name}: idle and only stands by"
        mine = [
            w
            for w in state.workers.values()
            if w.service == service.name and w.up and not w.standby
        ]
        assert service.workers == sum(not w.retiring for w in mine), f"{service.name}: count"
        for site, count in service.at.items():
            there = sum(w.site == site and not w.retiring for w in mine)
            assert there == count, f"{service.name}: count at {site}"
        busy = sum(1 for w in mine if w.batch and not w.retiring)
        assert busy + len(idle) == service.workers, f"{service.name}: a worker is lost"


def _residency(state: DispatcherState) -> None:
    for service in state.services.values():
        assert service.version in ("", *service.versions), f"{service.name}: its version is gone"
        assert len(service.versions) <= max(1, service.keep), f"{service.name}: too many versions"
        known = {*service.versions.items()}
        if service.offer:
            known.add((service.offer, service.offer_revision))
        for worker in state.workers.values():
            if worker.service == service.name and not worker.retiring:
                which = (worker.version, worker.revision)
                assert which in known, f"{worker.id}: of a version that is not to be served"
    for worker in state.workers.values():
        assert worker.service in state.services, f"{worker.id}: of a service that is gone"
        assert worker.up or not worker.batch, f"{worker.id}: executes and is not up"
        assert not worker.place or worker.place in state.partitions, f"{worker.id}: bound nowhere"
    for name in state.leaving:
        worker = state.workers[name]
        busy = worker.batch or any(r.worker == name for r in state.residents.values())
        assert worker.retiring and busy, f"{name}: is to go, has nothing to do, and stays"


def _queues(state: DispatcherState) -> None:
    running = {r for run in state.running.values() for r in run.batch.requests}
    assert not running & set(state.queued), "a request is queued and running"
    assert set(state.retried) <= running | set(state.queued), "a retried request was forgotten"
    for service in state.services.values():
        mine = [r for r in state.queued.values() if r.service == service.name]
        assert service.queued == len(mine), f"{service.name}: queue length"
        assert sum(service.rows) == sum(r.rows for r in mine), f"{service.name}: rows"
        live = {e[2] for lane in service.lanes.values() for e in lane.heap} & set(state.queued)
        assert live == {r.id for r in mine}, f"{service.name}: a queued request is in no lane"
        for lane in service.lanes.values():
            assert lane.live == sum(e[2] in state.queued for e in lane.heap)
        for partition in state.partitions.values():
            waits = service.name in partition.waiting
            assert waits == (service.queued > 0 and partition.id in service.partitions)


def _residents(state: DispatcherState) -> None:
    queued_at = {
        entry[2]: lane.worker
        for service in state.services.values()
        for lane in service.lanes.values()
        for entry in lane.heap
        if entry[2] in state.queued
    }
    running_at = {r: run.worker for run in state.running.values() for r in run.batch.requests}
    for request, resident in state.residents.items():
        assert resident.worker in state.workers, f"{request}: resident on a worker that is gone"
        where = queued_at.get(request) or running_at.get(request)
        assert where == resident.worker, f"{request}: resident on {resident.worker}, is at {where}"
    strays = {r for r, worker in queued_at.items() if worker} - set(state.residents)
    assert not strays, f"{strays}: queued for one worker, and not resident"


def _tenants(state: DispatcherState) -> None:
    running = [t for t in state.tenants.values() if t.phase != Phase.QUEUED]
    counted = sum(not t.device for t in running)
    assert not state.most_jobs or counted <= state.most_jobs, "too many jobs"
    assert set(state.jobs) <= {t.id for t in running}, "a job that was never started is lent space"
    for part in state.plan.partitions:
        needs = [t.memory for t in running if t.place == part.id]
        fit = len(needs) < 2 or not part.memory or (all(needs) and sum(needs) <= part.memory)
        assert fit, f"{part.id}: the jobs that are bound to it do not fit beside each other"
    for tenant in running:
        assert not tenant.place or tenant.place in state.partitions, f"{tenant.id}: bound nowhere"
        assert not tenant.stop_by or (state.armed and state.armed <= tenant.stop_by)
    for p in state.partitions.values():
        if p.hold == Hold.CLOSING:
            assert p.watched and state.armed, f"{p.id}: nobody looks whether it was left"


def _jobs(state: DispatcherState, compute: dict[str, int]) -> None:
    for job in state.jobs.values():
        assert all(state.partitions[p].kind == job.kind for p in job.held), f"{job.id}: kinds"
        assert all(job.place in ("", p) for p in job.held), f"{job.id}: not where it is bound"
        there = {state.partitions[p].device for p in job.held}
        assert not job.device or there <= {job.device}, f"{job.id}: not on its device"
        held = [p for p in state.partitions.values() if p.job == job.id]
        assert sorted(job.held) == sorted(p.id for p in held), f"{job.id}: holds {job.held}"
        assert job.units == sum(p.compute for p in held) <= compute.get(job.kind, 0)
        assert job.units <= max(job.limit, 0) or not held, f"{job.id}: over its limit"
    for p in state.partitions.values():
        assert not p.job or p.job in state.jobs, f"{p.id}: held by the unknown job {p.job}"
        assert 0 <= p.slice_ns <= state.plan.slice_max


def _work_conserving(state: DispatcherState) -> None:
    """No free partition idles while a request that could run waits, and no partition stays
    lent while one waits that no other partition is being taken back for. In between arrivals
    that belong together nothing is started."""
    if state.unplaced:
        return
    for p in state.partitions.values():
        if p.batch or p.retiring or p.hold in (Hold.CLOSING, Hold.STOPPING):
            continue
        for name in p.waiting:
            service = state.services[name]
            mine = [state.partitions[q] for q in service.partitions]
            if service.max_queue_delay and any(q.wake for q in mine):
                continue
            beside = [q for q in mine if q.site == p.site]
            closing = sum(not q.batch and q.hold == Hold.CLOSING for q in beside)
            if p.hold != Hold.NONE and closing >= able_count(state, service, p.site):
                continue
            for lane in service.lanes.values():
                able = has_worker(state, service, lane, p.site)
                assert not (lane.live and able), f"{p.id} idles while {name} waits"


def _timers(state: DispatcherState) -> None:
    for p in state.partitions.values():
        if p.wake:
            assert (p.wake, p.id) in state.timers, f"{p.id}: wake-up lost"
            assert state.armed and state.armed <= p.wake, f"{p.id}: wake-up not ordered"
