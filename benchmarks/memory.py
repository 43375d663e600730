"""What it costs language models that there is less memory than their pools want, in simulation.

Three of them on one GPU, all asked alike. First they have memory without end: what their pools
want at most, at the same moment, is the peak. Then the budget is that peak divided by each factor
(1: all that is ever wanted; 1.25: the aim's). Per factor: what was lost, how often a block came
from the host, and the time to the first token beside that with memory without end, same seed.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path

import msgspec

from cotenant.domain import actions as a
from cotenant.domain import events as e
from cotenant.domain.plan import Plan
from cotenant.domain.snapshot import Snapshot
from cotenant.policy.planner import Planner
from cotenant.sim.outcome import Outcome
from cotenant.sim.scenario import Scenario
from cotenant.sim.scenario_file import parse_scenario
from cotenant.sim.world import World

SCENARIO = """
name: crowded
duration: 60s
device: {kind: sm, units: 1, kv: {budget: 400GiB, split: elastic}}
services:
"""
SERVICE = """
  - name: NAME
    objective: {ttft: 1s, tpot: 50ms, percentile: 95}
    batch: {max: 64}
    kv: {limit: 400GiB}
    generates:
      prompt: {kind: lognormal, mean: 600, cv: 0.6, most: 2000}
      answer: {kind: lognormal, mean: 250, cv: 0.6, most: 600}
      most: 600
      turn: {fixed: 6ms, token: 25us, pair: 8ns, cv: 0.03}
      block: 8MiB
      tokens: 16
      host: 16GiB
      offload: 350us
      restore: 350us
    arrivals: {kind: poisson, rate: RATE}
"""


class Peak:
    """The most that all pools together wanted, as they said themselves."""

    def __init__(self) -> None:
        self.bytes = 0
        self._wanted: dict[str, int] = {}

    def decided(self, _: int, event: e.Event, __: list[a.Action]) -> None:
        """See Observer."""
        if isinstance(event, e.Held):
            self._wanted[event.holder] = event.wanted
            self.bytes = max(self.bytes, sum(self._wanted.values()))

    def planned(self, now: int, snapshot: Snapshot, plan: Plan | None) -> None:
        """See Observer."""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--rate", type=float, default=4.0, help="requests/s of each service")
    parser.add_argument("--factors", type=float, nargs="+", default=[1.0, 1.25, 1.5, 2.0])
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    service = SERVICE.replace("RATE", str(args.rate))
    services = "".join(service.replace("NAME", name) for name in ("chat", "code", "mail"))
    scenario = parse_scenario(SCENARIO + services, Path())
    found = [sample for seed in range(args.seeds) for sample in run(scenario, seed, args.factors)]
    for factor in args.factors:
        rows = [s for s in found if s["factor"] == factor]
        print(f"the peak is {factor:g} times the budget, by seed")
        for name in ("peak_gib", "ttft_p50", "ttft_p99", "refused", "from_host", "again"):
            values = ", ".join(f"{row[name]:.4g}" for row in rows)
            print(f"  {name:10} {values}   median {statistics.median(r[name] for r in rows):.4g}")
    if args.json:
        args.json.write_text(json.dumps(found, indent=1) + "\n")


def run(scenario: Scenario, seed: int, factors: list[float]) -> list[dict[str, float]]:
    """One seed: a sample for each factor."""
    peak = Peak()
    plenty = World(scenario, Planner(), (seed, 0), observer=peak).run()
    found = []
    for factor in factors:
        (device,) = scenario.devices
        spec = msgspec.structs.replace(device.spec, kv=round(peak.bytes / factor))
        tight = msgspec.structs.replace(
            scenario, devices=(msgspec.structs.replace(device, spec=spec),)
        )
        found.append(sample(World(tight, Planner(), (seed, 0)).run(), plenty, factor))
        found[-1] |= {"seed": seed, "peak_gib": peak.bytes / 2**30}
    return found


def sample(tight: Outcome, plenty: Outcome, factor: float) -> dict[str, float]:
    """Times to the first token as parts of those with plenty, the worst service's; the share of
    requests that was refused beyond what was with plenty, of accesses that went to the host, and of
    tokens that were computed again."""
    ratios: dict[str, float] = {}
    for name, share in (("ttft_p50", 0.5), ("ttft_p99", 0.99)):
        ratios[name] = max(
            service.quantile_ns(share) / plenty.services[key].quantile_ns(share)
            for key, service in tight.services.items()
        )
    tokens = [s.tokens for s in tight.services.values() if s.tokens is not None]
    return {
        "factor": factor,
        **ratios,
        "refused": refused(tight) - refused(plenty),
        "from_host": sum(t.restored for t in tokens) / max(1, sum(t.read for t in tokens)),
        "again": sum(t.again for t in tokens) / max(1, sum(t.prompts + t.said for t in tokens)),
    }


def refused(outcome: Outcome) -> float:
    """Share (0..1) of requests that were refused."""
    services = outcome.services.values()
    return sum(sum(s.refused.values()) for s in services) / max(1, sum(s.offered for s in services))


if __name__ == "__main__":
    main()
