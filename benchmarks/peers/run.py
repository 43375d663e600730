"""Compare Cotenant with public model servers on this machine.

Each round starts every arm's server in turn, checks one answer, warms up, measures every
concurrency, and ends the server, so arms alternate (A B C, A B C, ...) and only one server lives
at a time. An arm that cannot start is left out of later rounds and named with its reason.
"""

from __future__ import annotations

import argparse
import contextlib
import fnmatch
import http.client
import json
import os
import platform
import shutil
import signal
import sys
import tempfile
import time
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import onnxruntime

import report
from load import LoadFailed, burst, generator_version
from model import SEED, Model, make_models
from procs import CannotStart, Launch, Server, adopt_orphans, end_children, machine_cpu_s
from rivals import RIVALS, Arm
from wire import Payload, read_grpc, read_json

HERE = Path(__file__).resolve().parent
START_TIMEOUT_S = 60.0


@dataclass
class Results:
    """Everything a run writes to JSON."""

    samples: list[dict[str, object]] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)
    versions: dict[str, dict[str, str]] = field(default_factory=dict)


def main() -> int:
    args = parse_args()
    arms = choose_arms(args)
    if args.list:
        print("\n".join(arm.label for arm in arms))
        return 0
    if shutil.which("h2load") is None:
        print("h2load is missing: install nghttp2-client", file=sys.stderr)
        return 1
    for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(signum, signal.default_int_handler)
    adopt_orphans()
    results, started = Results(), datetime.now(UTC)
    with tempfile.TemporaryDirectory(prefix="cotenant-peers-") as scratch:
        models = make_models(Path(scratch) / "models")
        head = describe(args, models, started)
        try:
            measure(arms, models, args, Path(scratch), results)
        except KeyboardInterrupt:
            print("interrupted: what was measured so far follows", flush=True)
        finally:
            end_children()
    document = head | {
        "versions": results.versions,
        "skipped": results.skipped,
        "samples": results.samples,
    }
    if args.json:
        args.json.write_text(json.dumps(document, indent=1) + "\n")
    print(report.table(document))
    if args.plot and results.samples:
        report.plot(document, args.plot)
    return 0 if results.samples else 1


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=5.0, help="measured, for each cell")
    parser.add_argument("--warm-up", type=float, default=1.0, help="seconds before each cell")
    parser.add_argument("--concurrency", default="1,8,32", help="default: %(default)s")
    parser.add_argument("--only", action="append", help="pattern of arms, as '*/tiny/batch8/*'")
    parser.add_argument("--tried", action="store_true", help="also the settings not chosen")
    parser.add_argument("--list", action="store_true", help="name the arms and stop")
    parser.add_argument("--json", type=Path, help="write everything measured here")
    parser.add_argument("--plot", type=Path, help="write a PNG here")
    args = parser.parse_args()
    args.concurrency = [int(clients) for clients in args.concurrency.split(",")]
    return args


def choose_arms(args: argparse.Namespace) -> list[Arm]:
    """The arms asked for, those of one workload beside each other."""
    arms = [arm for rival in RIVALS.values() for arm in rival.arms() if args.tried or not arm.tried]
    arms.sort(key=lambda arm: (arm.workload != "tiny", arm.batch))
    patterns = args.only or ["*"]
    # A literal '[' begins the options of a label; fnmatch would read it as a set.
    escaped = [pattern.replace("[", "[[]") for pattern in patterns]
    chosen = [arm for arm in arms if any(fnmatch.fnmatchcase(arm.label, p) for p in escaped)]
    if not chosen:
        sys.exit(f"--only {' '.join(patterns)}: no arm is named so; --list names them")
    return chosen


def measure(
    arms: list[Arm],
    models: dict[str, Model],
    args: argparse.Namespace,
    scratch: Path,
    results: Results,
) -> None:
    """Run every round, adding to `results` as it goes, so an interrupt keeps what there is."""
    for name in dict.fromkeys(arm.server for arm in arms):
        if (reason := RIVALS[name].missing()) is None:
            results.versions[name] = RIVALS[name].versions()
        else:
            _skip(results, name, reason)
    for round_index in range(args.rounds):
        for arm in arms:
            if arm.label in results.skipped or arm.server in results.skipped:
                continue
            folder = Path(tempfile.mkdtemp(dir=scratch))
            try:
                measure_arm(arm, models[arm.workload], round_index, args, folder, results)
            except (CannotStart, LoadFailed) as error:
                _skip(results, arm.label, _without_paths(str(error), scratch))
            finally:
                shutil.rmtree(folder, ignore_errors=True)


def measure_arm(
    arm: Arm,
    model: Model,
    round_index: int,
    args: argparse.Namespace,
    folder: Path,
    results: Results,
) -> None:
    """Start the server of one arm, check it, and measure each concurrency."""
    rival = RIVALS[arm.server]
    launch, payload = rival.launch(arm, model, folder), rival.payload(arm, model)
    port = launch.grpc_port if payload.grpc and launch.grpc_port else launch.http_port
    with Server(launch, folder) as server:
        server.wait_ready(START_TIMEOUT_S)
        _record_server_version(launch, results.versions[arm.server])
        check_answer(payload, port, model)
        for clients in args.concurrency:
            burst(payload, port, clients, args.warm_up, folder)
            before, machine_before = server.cpu_s(), machine_cpu_s()
            measured = burst(payload, port, clients, args.seconds, folder)
            server_s, machine_s = server.cpu_s() - before, machine_cpu_s() - machine_before
            cpu_ms = server_s / measured.answered * 1000
            generator_s = measured.generator_cpu_ms * measured.answered / 1000
            sample = {
                "arm": arm.label,
                "server": arm.server,
                "workload": arm.workload,
                "batch": arm.batch,
                "wire": arm.wire,
                "options": dict(arm.options),
                "round": round_index,
                "clients": clients,
                "server_cpu_ms": round(cpu_ms, 4),
                "elsewhere_cores": round((machine_s - server_s - generator_s) / args.seconds, 2),
                **measured.as_dict(),
            }
            results.samples.append(sample)
            print(
                f"round {round_index} {arm.label} c={clients}: {measured.per_s:.0f}/s, "
                f"p50 {measured.p50_ms:.2f} ms, p99 {measured.p99_ms:.2f} ms, "
                f"server CPU {cpu_ms:.2f} ms/request, failed {measured.failed}",
                flush=True,
            )


def check_answer(payload: Payload, port: int, model: Model) -> None:
    """Send one request and compare the answer with NumPy's."""
    answer = read_grpc(_call_grpc(payload, port)) if payload.grpc else _call_rest(payload, port)
    expected = model.expected.ravel()
    if answer.shape != expected.shape or not np.allclose(answer, expected, rtol=1e-3, atol=1e-4):
        raise CannotStart(f"answered {answer[:3]}..., expected {expected[:3]}...")


def _call_rest(payload: Payload, port: int) -> np.ndarray:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
    try:
        connection.request("POST", payload.path, payload.body, dict(payload.headers))
        response = connection.getresponse()
        reply = response.read()
        if response.status != 200:
            raise CannotStart(f"answered {response.status}: {reply[:200].decode(errors='replace')}")
        return read_json(reply)
    except (OSError, http.client.HTTPException) as error:
        raise CannotStart(f"the first request failed: {error!r}") from error
    finally:
        connection.close()


def _call_grpc(payload: Payload, port: int) -> bytes:
    try:
        import grpc
    except ImportError as error:
        raise CannotStart("grpcio, needed to check gRPC answers, is not installed") from error
    with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
        try:
            # The body's first five bytes are framing, which the channel adds itself.
            reply: bytes = channel.unary_unary(payload.path)(payload.body[5:], timeout=10)
        except grpc.RpcError as error:
            raise CannotStart(f"the first gRPC request failed: {error}") from error
    return reply


def _record_server_version(launch: Launch, versions: dict[str, str]) -> None:
    """Add what the server says of itself at ``/v2``, where it speaks that protocol."""
    connection = http.client.HTTPConnection("127.0.0.1", launch.http_port, timeout=5)
    with contextlib.suppress(OSError, http.client.HTTPException, ValueError, KeyError, TypeError):
        connection.request("GET", "/v2")
        said = json.loads(connection.getresponse().read())
        versions["server"] = f"{said['name']} {said['version']}"
    connection.close()


def describe(
    args: argparse.Namespace, models: dict[str, Model], started: datetime
) -> dict[str, object]:
    """The machine, the options and the models, for the head of the JSON document."""
    return {
        "benchmark": "peers",
        "started": started.isoformat(timespec="seconds"),
        "machine": {
            "cpu": _cpu_name(),
            "cores": os.cpu_count(),
            "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30),
            "kernel": platform.release(),
            "python": platform.python_version(),
            "load_average_before": os.getloadavg()[0],
        },
        "generator": generator_version(),
        "seed": SEED,
        "rounds": args.rounds,
        "seconds": args.seconds,
        "warm_up_seconds": args.warm_up,
        "models": {
            model.name: {
                "sha256": model.sha256,
                "input": list(model.input.shape),
                "one_thread_ms": time_model(model),
            }
            for model in models.values()
        },
    }


def time_model(model: Model) -> dict[str, float]:
    """Median milliseconds of one call in this process on one thread, for batches of 1 and 8."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(str(model.path), options)
    medians = {}
    for rows in (1, 8):
        x, taken = np.repeat(model.input, rows, axis=0), []
        for _ in range(100):
            began = time.perf_counter()
            session.run(None, {"x": x})
            taken.append(time.perf_counter() - began)
        medians[str(rows)] = round(float(np.median(taken)) * 1000, 4)
    return medians


def _cpu_name() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


def _without_paths(text: str, scratch: Path) -> str:
    """`text` without this machine's folders, since results are shared."""
    for path, name in ((scratch, "SCRATCH"), (HERE, "PEERS"), (sys.executable, "python")):
        text = text.replace(str(path), name)
    return text.replace(sys.prefix, "PREFIX").replace(str(Path.home()), "HOME")


def _skip(results: Results, what: str, reason: str) -> None:
    results.skipped[what] = reason
    print(f"skipped {what}: {reason}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
