"""What ``cotenant status`` and ``top`` show, as JSON-ready values (null: not measured yet)."""

from __future__ import annotations

import os
import time
from typing import TYPE_CHECKING, Any

import msgspec

from cotenant import __version__
from cotenant.domain.device import DeviceSpec
from cotenant.domain.units import MS, US
from cotenant.policy.state import PartitionState, ServiceState
from cotenant.telemetry.variants import serving_on

if TYPE_CHECKING:
    from cotenant.runtime.instances import Instances
    from cotenant.runtime.node import Node


def node_status(node: Node) -> dict[str, Any]:
    """The whole node."""
    state = node.core.dispatcher.state
    journal = node.journal
    return {
        "version": __version__,
        "pid": os.getpid(),
        "uptime_s": time.monotonic() - node.started,
        "state_dir": node.config.state_dir,
        "http": node.addresses["http"],
        "grpc": node.addresses["grpc"],
        "jobs_api": node.addresses["jobs"],
        "ready": node.is_ready(),
        "draining": node.requests.draining,
        "devices": [_device(node, spec) for spec in node.specs],
        "plan": {
            "version": state.plan.version,
            "reasons": list(state.plan.reasons),
            "age_s": time.monotonic() - node.planned_at,
        },
        "partitions": [_partition(node, p) for p in state.partitions.values()],
        "services": [_service(node, n, i) for n, i in node.models.services.items()],
        "jobs": [msgspec.to_builtins(job) for job in node.jobs()],
        "journal": {
            "directory": str(journal.directory) if journal else None,
            "dropped": journal.dropped if journal else 0,
            "error": journal.error if journal else None,
        },
    }


def _device(node: Node, spec: DeviceSpec) -> dict[str, Any]:
    memory, levels = node.fleet.memory(spec.id), node.fleet.levels(spec.id)
    return {
        "id": spec.id,
        "kind": spec.kind,
        "units": list(spec.units),
        "compute": spec.compute,
        "memory": spec.memory,
        "mig": spec.mig,
        "hardware": spec.hardware,
        "level": spec.preempt.name,
        "trains": spec.trains,
        "limits": list(spec.limits),
        "trouble": node.fleet.trouble(spec.id),
        "tenants": {
            tenant: {"level": level.name, "memory": memory.get(tenant)}
            for tenant, level in levels.items()
        },
        "holders": [
            msgspec.to_builtins(line) for line in node.core.dispatcher.budgets.lines(spec.id)
        ],
    }


def _partition(node: Node, partition: PartitionState) -> dict[str, Any]:
    meter = node.monitor.partition(partition.id)
    p50, p99 = meter.recent_revoke.quantiles(node.core.clock(), 0.5, 0.99)
    holder = f"job:{partition.job}" if partition.job else "idle"
    if partition.batch:
        service = node.core.dispatcher.state.running[partition.batch].batch.service
        holder = f"batch:{service}"
    return {
        "id": partition.id,
        "device": partition.device,
        "units": list(partition.units),
        "services": list(partition.services),
        "owners": list(partition.owners),
        "holder": holder,
        "slice_ms": partition.slice_ns / MS,
        "busy": dict(meter.last_window),
        "revoke_p50_us": None if p50 is None else p50 / US,
        "revoke_p99_us": None if p99 is None else p99 / US,
        "switches": meter.switches,
    }


def _kv(node: Node, name: str) -> dict[str, int] | None:
    """Bytes of keys and values of a language model's instances: what they may have now (``size``)
    and at most, have, want, and have that nobody reads."""
    workers = node.core.dispatcher.state.workers.values()
    mine = [w for w in workers if w.service == name and w.up and w.pool]
    if not mine:
        return None
    return {
        "size": sum(w.pool_now for w in mine),
        "most": sum(w.pool for w in mine),
        "held": sum(w.held for w in mine),
        "wanted": sum(w.wanted for w in mine),
        "cold": sum(w.cold for w in mine),
    }


def _variants(service: ServiceState) -> dict[str, Any] | None:
    """Which variant serves, by kind of device, and why others cannot; null where there is one."""
    if not any(service.variants.values()):
        return None
    revision = service.versions.get(service.version, service.offer_revision)
    return {"serving": serving_on(service), "failed": service.spoilt.get(revision, {})}


def _serving(node: Node, name: str) -> int:
    """Instances that take requests which name no version."""
    state = node.core.dispatcher.state
    current = state.services[name].version
    workers = (w for w in state.workers.values() if w.service == name and w.version == current)
    return sum(w.up and not w.rests for w in workers)


def _service(node: Node, name: str, instances: Instances) -> dict[str, Any]:
    meter = node.monitor.service(name)
    known = node.core.dispatcher.state.services.get(name)
    p50, p95, p99 = meter.recent.quantiles(node.core.clock(), 0.5, 0.95, 0.99)
    (pace,) = meter.recent_pace.quantiles(node.core.clock(), 0.99)
    current = instances.current
    state = "READY" if node.model_ready(name) else "LOADING" if instances.loading else "UNAVAILABLE"
    if known is not None and known.asleep and not instances.live:
        state = "ASLEEP"
    refused = sum(meter.refused.values()) - meter.refused["CANCELLED"]
    counted = meter.answered + refused
    return {
        "name": name,
        "model": instances.spec.model,
        "version": current.files.version if current else "",
        "state": state,
        "reason": next((why for _, why in reversed(instances.refused.values())), ""),
        "objective_ms": instances.spec.slo.latency / MS,
        "percentile": instances.spec.slo.percentile,
        "pace_ms": instances.spec.slo.pace / MS or None,
        "p99_pace_ms": None if pace is None else pace / MS,
        "rate": meter.rate.level,
        "queue": known.queued if known else 0,
        "batch_mean": meter.batched_rows / meter.batches if meter.batches else None,
        "p50_ms": None if p50 is None else p50 / MS,
        "p95_ms": None if p95 is None else p95 / MS,
        "p99_ms": None if p99 is None else p99 / MS,
        "attainment": (meter.answered - meter.misses) / counted if counted else None,
        "misses": meter.misses,
        "refused": dict(meter.refused),
        "answered": meter.answered,
        "workers": _serving(node, name) if known else 0,
        "kv": _kv(node, name),
        "accuracy": msgspec.to_builtins(current.accuracy) if current else None,
        "joined": current.meta.batchable if current else None,
        "engines": instances.engines(),
        "variants": _variants(known) if known else None,
        "notes": list(current.notes) if current else [],
    }
