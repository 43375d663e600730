"""The command: runs over seeds on all cores, a table with confidence intervals, JSON, a chart."""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import multiprocessing
import os
import signal
import statistics
import sys
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import msgspec
from rich import box
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from cotenant.devices import proctree
from cotenant.domain.errors import ConfigError, EnvironmentProblem
from cotenant.domain.units import S, parse_duration
from cotenant.sim.feasible import Missed, with_changes
from cotenant.sim.outcome import Outcome, merge
from cotenant.sim.policies import POLICIES, Setting, better, choose, simulate, simulate_box
from cotenant.sim.recorded import Recording
from cotenant.sim.scenario import Scenario, SimService, one_box
from cotenant.sim.scenario_file import read_scenario
from cotenant.telemetry.records import read

Figures = dict[str, float]

# Two-sided 95 % quantiles of Student's t by degrees of freedom; beyond, the normal's.
_T95 = (12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26, 2.23, 2.20, 2.18, 2.16, 2.14)
WIDE = 120
"""Columns of the table where no terminal says how many there are."""
_COLUMNS = (
    ("attainment", "attained", "{:.2%}"),
    ("worst_attainment", "worst service", "{:.2%}"),
    ("p99_of_objective", "p99 / SLO", "{:.2f}"),
    ("refused", "refused", "{:.2%}"),
    ("job_rate", "job steps/s", "{:.2f}"),
    ("utilization", "used", "{:.1%}"),
    ("repartitions", "layout changes", "{:.1f}"),
    ("repartition_s", "time lost s", "{:.3f}"),
)
_TOKEN_COLUMNS = (
    ("ttft_p99_s", "TTFT p99 s", "{:.2f}"),
    ("tpot_p99_s", "TPOT p99 s", "{:.3f}"),
    ("tokens_s", "tokens/s", "{:.0f}"),
    ("put_aside", "put aside", "{:.1f}"),
    ("again", "computed again", "{:.2%}"),
    ("from_host", "from host", "{:.3%}"),
)
"""Where a service is a language model."""


_VARIANT_COLUMNS = (("by_variants", "by variants", "{:.1%}"),)
"""Where a service has several variants."""

SEARCH_KEEPS = 3
"""Settings of a policy that are run with all seeds; the first seed alone chooses them."""


class _Run(msgspec.Struct, frozen=True):
    policy: str
    setting: str
    seed: int


class _Result(msgspec.Struct, frozen=True):
    """``services``: the share (0..1) of each one's requests that was answered in time. ``talks``:
    figures of language models."""

    figures: Figures
    services: dict[str, float]
    talks: dict[str, Figures] = {}


_Results = dict[_Run, _Result]


def add_simulate(commands: Any) -> None:
    """Add the command to the parser."""
    parser = commands.add_parser("simulate", help="compare policies on a scenario, in virtual time")
    parser.add_argument(
        "scenario",
        type=Path,
        nargs="?",
        help="a YAML file (see examples/scenarios); beside --from-journal, whose devices to use",
    )
    parser.add_argument(
        "--from-journal",
        type=Path,
        metavar="DIR",
        help="what a live node was asked, at the costs that its journal shows",
    )
    parser.add_argument(
        "--costs", type=Path, metavar="DIR", help="fit costs to this journal instead"
    )
    parser.add_argument(
        "--policies",
        default="cotenant,static,exclusive,spatial,temporal,shared,sliced,reactive,orion,tgs,reef,quotas",
        help=f"some of {','.join(POLICIES)} (default: %(default)s)",
    )
    parser.add_argument("--seeds", type=int, default=5, help="runs of each (default: 5)")
    parser.add_argument("--duration", help="instead of the scenario's, such as 60s")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every run's figures here")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw a PNG (needs matplotlib)")
    parser.add_argument(
        "--html", type=Path, metavar="FILE", help="table, pictures and reasons (needs matplotlib)"
    )
    parser.add_argument(
        "--no-search",
        action="store_true",
        help="do not look for the smallest change by which cotenant would meet an objective that "
        "it misses, which takes some fifteen runs of each seed",
    )
    parser.add_argument("--why", action="store_true", help="print what the planner changed and why")
    parser.set_defaults(func=_simulate)


_JUDGED = "cotenant"
"""The policy whose misses are reported."""
NOT_MODELLED = "not modelled where several devices train"
NO_MODELS = "not modelled for these language models and devices"


def _why_left_out(scenario: Scenario) -> str:
    several = sum(d.spec.trains for d in scenario.devices) > 1
    return NOT_MODELLED if several else NO_MODELS


def _simulate(args: argparse.Namespace) -> int:
    policies = choose([name.strip() for name in args.policies.split(",")])
    scenario = _lasting(_scenario(args), args.duration)
    if args.seeds < 1:
        raise ConfigError(f"must be at least 1, got {args.seeds}", "--seeds")
    _check_outputs([path for path in (args.json, args.plot, args.html) if path is not None])
    settings = {(p.name, s): t for p in policies for s, t in p.settings(scenario).items()}
    modelled = {name for name, _ in settings}
    left_out = [p.name for p in policies if p.name not in modelled]
    policies = [p for p in policies if p.name in modelled]
    if not policies:
        raise ConfigError(
            f"{_why_left_out(scenario)}; add cotenant, or another of them", "--policies"
        )
    began = time.monotonic()
    results = _run_all(scenario, settings, [_Run(*key, 0) for key in settings])
    kept = [key for p in policies for key in _leading(p.name, settings, results)]
    settings = {key: settings[key] for key in kept}
    later = [_Run(*key, seed) for key in settings for seed in range(1, args.seeds)]
    results |= _run_all(scenario, settings, later)
    took = time.monotonic() - began
    best = {p.name: _best(p.name, settings, results, args.seeds) for p in policies}
    console = Console() if sys.stdout.isatty() else Console(width=WIDE)
    rows = _rows(scenario, best, results, args.seeds)
    console.print(_table(scenario, rows))
    note = _note(scenario, results, took, left_out)
    console.print(note, style="dim")
    chosen = {name: settings[name, setting] for name, setting in best.items()}
    missed = _missed(scenario, best, results, args.seeds)
    if not args.no_search:
        missed = [_searched(scenario, m, chosen[_JUDGED], args.seeds) for m in missed]
    said = [m.said(_JUDGED) for m in missed]
    for line in said:
        console.print(line, style="yellow", highlight=False)
    if args.why:
        for name, setting in chosen.items():
            _print_reasons(console, scenario, name, setting)
    try:
        if args.json:
            args.json.write_text(json.dumps(_document(scenario, best, results, missed), indent=1))
        if args.plot or args.html:
            _draw(args, scenario, chosen, rows, [*said, note])
    except OSError as error:
        raise EnvironmentProblem(f"cannot write {error.filename}: {error.strerror}") from None
    return 0


def _lasting(scenario: Scenario, given: str | None) -> Scenario:
    """For as long as the option says."""
    if given is None:
        return scenario
    try:
        duration = parse_duration(given)
    except ValueError as error:
        raise ConfigError(str(error), "--duration") from None
    if duration <= 0:
        raise ConfigError("must be longer than 0", "--duration")
    return msgspec.structs.replace(scenario, duration=duration)


def _note(scenario: Scenario, results: _Results, took: float, left_out: list[str]) -> str:
    requests = sum(r.figures["requests"] for r in results.values())
    note = (
        f"{len(results)} runs, {requests:,.0f} requests in {took:.1f} s; execution times: "
        + ", ".join(_sources(s) for s in scenario.services)
        + "; "
        + "; ".join(f"{d.spec.id}: {d.cost.source}" for d in scenario.devices)
    )
    return (
        f"{note}; left out: {', '.join(left_out)} ({_why_left_out(scenario)})" if left_out else note
    )


def _draw(
    args: argparse.Namespace,
    scenario: Scenario,
    settings: dict[str, Setting],
    rows: list[tuple[str, ...]],
    notes: list[str],
) -> None:
    from cotenant.cli.simulate import chart

    shown = {name: simulate(scenario, s, 0, record=True) for name, s in settings.items()}
    if args.plot:
        chart.draw(scenario, shown, args.plot)
    if args.html:
        chart.report(scenario, shown, rows, notes, args.html)


def _check_outputs(paths: list[Path]) -> None:
    for path in paths:
        if path.is_dir():
            raise ConfigError(f"{path} is a folder; name a file to write to")
        if not path.absolute().parent.is_dir():
            raise ConfigError(f"there is no folder {path.parent} to write {path.name} to")
    for path in {p for p in paths if paths.count(p) > 1}:
        raise ConfigError(f"{path} is named twice; the second would replace the first")


def _scenario(args: argparse.Namespace) -> Scenario:
    if args.from_journal is None:
        if args.scenario is None:
            raise ConfigError("name a scenario, or a journal with --from-journal")
        if args.costs is not None:
            raise ConfigError("only goes with --from-journal", "--costs")
        return read_scenario(args.scenario)
    recording = Recording(read(args.from_journal))
    costs = Recording(read(args.costs)).costs() if args.costs is not None else None
    devices = read_scenario(args.scenario).devices if args.scenario is not None else None
    return recording.scenario(costs, devices)


def _sources(service: SimService) -> str:
    if service.generates is not None:
        return f"{service.spec.name} turns as stated"
    found = sorted({cost.source for cost in service.costs.values()})
    return f"{service.spec.name} {' and '.join(found)}"


def _run_all(
    scenario: Scenario,
    settings: dict[tuple[str, str], Setting],
    runs: list[_Run],
    title: str = "",
) -> _Results:
    parts: dict[_Run, dict[int, Outcome]] = {run: {} for run in runs}
    with _workers() as pool, Progress(transient=True, disable=not sys.stdout.isatty()) as progress:
        bar = progress.add_task(title or scenario.name, total=len(runs) * scenario.boxes)
        waiting = {
            pool.submit(simulate_box, scenario, settings[run.policy, run.setting], run.seed, box): (
                run,
                box,
            )
            for run in runs
            for box in range(scenario.boxes)
        }
        for done in as_completed(waiting):
            run, box = waiting[done]
            parts[run][box] = done.result()
            progress.advance(bar)
    return {
        run: _result(merge([outcomes[box] for box in sorted(outcomes)]))
        for run, outcomes in parts.items()
    }


@contextlib.contextmanager
def _workers() -> Iterator[ProcessPoolExecutor]:
    """Processes, one per core, that go when this one does, however it ends."""
    pool = ProcessPoolExecutor(os.cpu_count(), initializer=_end_with_parent)
    try:
        yield pool
    except BaseException:
        for process in multiprocessing.active_children():
            process.terminate()
        raise
    finally:
        pool.shutdown(cancel_futures=True)


def _end_with_parent() -> None:
    # Ctrl-C reaches all of a terminal's processes: the parent decides.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    proctree.end_with_parent(signal.SIGTERM)


def _result(outcome: Outcome) -> _Result:
    offered = sum(s.offered for s in outcome.services.values())
    services = {name: s.attainment for name, s in outcome.services.items()}
    models = [name for name, s in outcome.services.items() if s.tokens is not None]
    talks = {name: outcome.token_figures(name) for name in models}
    return _Result(outcome.figures() | {"requests": float(offered)}, services, talks)


def _leading(
    policy: str, settings: Iterable[tuple[str, str]], results: _Results
) -> list[tuple[str, str]]:
    """The best settings of a policy by its first seed."""
    left = [key for key in settings if key[0] == policy]
    found: list[tuple[str, str]] = []
    while left and len(found) < SEARCH_KEEPS:
        best = left[0]
        for key in left[1:]:
            if better(results[_Run(*key, 0)].figures, results[_Run(*best, 0)].figures):
                best = key
        left.remove(best)
        found.append(best)
    return found


def _samples(key: str, policy: str, setting: str, results: _Results, seeds: int) -> list[float]:
    return [results[_Run(policy, setting, seed)].figures[key] for seed in range(seeds)]


def _best(
    policy: str,
    settings: Iterable[tuple[str, str]],
    results: _Results,
    seeds: int,
) -> str:
    """The best setting of a policy by its means over the seeds."""
    best, figures = "", None
    for name, setting in settings:
        if name != policy:
            continue
        means = {
            key: statistics.mean(_samples(key, name, setting, results, seeds))
            for key in ("attainment", "job_rate")
        }
        if figures is None or better(means, figures):
            best, figures = setting, means
    return best


def _missed(
    scenario: Scenario, best: dict[str, str], results: _Results, seeds: int
) -> list[Missed]:
    """The services that miss their objective under the policy that is judged."""

    def attained(policy: str, service: str) -> float:
        runs = (_Run(policy, best[policy], seed) for seed in range(seeds))
        return statistics.mean(results[run].services[service] for run in runs)

    found = []
    for spec in (s.spec for s in scenario.services):
        wanted = spec.slo.percentile / 100
        by = {policy: attained(policy, spec.name) for policy in best}
        if by.get(_JUDGED, 1.0) < wanted:
            others = tuple(p for p, share in by.items() if share >= wanted)
            found.append(
                Missed(spec.name, spec.slo.latency, spec.slo.percentile, by[_JUDGED], others)
            )
    return found


def _searched(scenario: Scenario, missed: Missed, setting: Setting, seeds: int) -> Missed:
    """With the smallest changes that would do, found on one of the boxes."""
    settings = {(_JUDGED, ""): setting}
    runs = [_Run(_JUDGED, "", seed) for seed in range(seeds)]

    def attempt(changed: Scenario) -> float:
        results = _run_all(changed, settings, runs, f"what {missed.service} would need")
        return statistics.mean(r.services[missed.service] for r in results.values())

    return with_changes(one_box(scenario, 0), missed, attempt)


def _rows(
    scenario: Scenario, best: dict[str, str], results: _Results, seeds: int
) -> list[tuple[str, ...]]:
    """The table's cells, head first."""
    alone = len(scenario.services) < 2
    columns = [c for c in _COLUMNS if not (alone and c[0] == "worst_attainment")]
    if any(service.generates is not None for service in scenario.services):
        columns += _TOKEN_COLUMNS
    if any(service.others for service in scenario.services):
        columns += _VARIANT_COLUMNS
    rows = [("policy", *(title for _, title, _ in columns))]
    for policy, setting in best.items():
        cells = []
        for key, _, shape in columns:
            samples = _samples(key, policy, setting, results, seeds)
            cell = shape.format(statistics.mean(samples))
            half = interval(samples)
            cells.append(f"{cell} ±{shape.format(half)}" if half else cell)
        rows.append((f"{policy} {setting}".strip(), *cells))
    return rows


def _table(scenario: Scenario, rows: list[tuple[str, ...]]) -> Table:
    table = Table(
        title=f"{scenario.name}: {scenario.story}" if scenario.story else scenario.name,
        box=box.SIMPLE_HEAD,
        pad_edge=False,
        padding=(0, 1, 0, 0),
    )
    head, *body = rows
    table.add_column(head[0], overflow="fold")
    for title in head[1:]:
        table.add_column(title, justify="right")
    for row in body:
        table.add_row(*row)
    return table


def interval(samples: list[float]) -> float:
    """Half the width of the 95 % confidence interval of the mean (Student's t); 0 for one."""
    if len(samples) < 2:
        return 0.0
    freedom = len(samples) - 1
    t = _T95[freedom - 1] if freedom <= len(_T95) else 1.96
    return t * statistics.stdev(samples) / math.sqrt(len(samples))


def _print_reasons(console: Console, scenario: Scenario, name: str, setting: Setting) -> None:
    for at, reasons in simulate(scenario, setting, 0).reasons:
        for reason in reasons:
            console.print(f"{name} {at / S:7.1f} s  {reason}", highlight=False)


def _document(
    scenario: Scenario, best: dict[str, str], results: _Results, missed: list[Missed]
) -> dict[str, Any]:
    return {
        "scenario": scenario.name,
        "duration_s": scenario.duration / S,
        "best_setting": best,
        "missed": [msgspec.to_builtins(m) for m in missed],
        "runs": [
            msgspec.structs.asdict(run)
            | result.figures
            | {"services": result.services}
            | ({"language_models": result.talks} if result.talks else {})
            for run, result in results.items()
        ],
    }
