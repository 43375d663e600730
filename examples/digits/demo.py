"""A model is served under an objective while its data drift and a job retrains it beside.

    python examples/digits/demo.py                      some minutes, three arms
    python examples/digits/demo.py --arms cotenant --seconds 20

Handwritten digits are sent as a stream of requests; every few seconds the camera turns, and the
model's accuracy falls. A training job learns from the labels that arrive a second late and
publishes new versions, which the node checks, warms and swaps in. The same stream runs in three
arms, one after another: Cotenant; no scheduling; a fixed split of the cores. See README.md.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import os
import platform
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
NEEDED = ("torch", "sklearn", "scipy", "onnx", "matplotlib")
FIRST_STEPS = 480
SECONDS = 34.0
"""Length of an arm where training alone makes ``USUAL_RATE`` steps/s. On a slower box the camera
turns as much more slowly, so that there is time to learn; an arm takes twice that at most."""
USUAL_RATE = 100.0
FIRST_IMAGES = 1200


def main() -> int:
    """Entry point; 130 after Ctrl-C."""
    args = _arguments()
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        print(
            f"the demo needs {', '.join(missing)}; install what it needs with:"
            " pip install 'cotenant[demo]'",
            file=sys.stderr,
        )
        return 2
    from cleanup import nothing_left

    from cotenant.domain.errors import CotenantError

    try:
        args.out.mkdir(parents=True, exist_ok=True)
        with nothing_left() as directory:
            _tell(args, directory)
    except KeyboardInterrupt:
        print("\nstopped; nothing is left behind", file=sys.stderr)
        return 130
    except (CotenantError, OSError) as error:
        print(f"demo: {error}", file=sys.stderr)
        return 1
    return 0


def _tell(args: argparse.Namespace, directory: Path) -> None:
    """The whole story."""
    from arms import ARMS
    from figures import summary

    from live import summary_table

    began = time.monotonic()
    box = _prepare(args, directory)
    runs: dict[str, Any] = {}
    spans: list[Any] = []
    for name in args.arms:
        print(f"\n{ARMS[name]}: {_ABOUT[name]}", flush=True)
        if name == "split" and len(box.cores) == 1:
            print("(one core: server and job have to share it here, too)")
        runs[name], found = _run_arm(name, box, args.seconds)
        spans = found or spans
    summaries = {
        name: summary(run, box.stream, box.digits, len(box.cores)) for name, run in runs.items()
    }
    print(f"\n{summary_table(summaries)}\n")
    _write(args, box, runs, summaries, spans)
    print(f"{time.monotonic() - began:.0f} s in all; see {args.out / 'demo.png'}")


_ABOUT = {
    "cotenant": "the job runs on every core that no request needs at the moment",
    "unscheduled": "a plain server and the job, both on all cores",
    "split": "the server on the first core, the job on the others",
}


def _prepare(args: argparse.Namespace, directory: Path) -> Any:
    """Data, arrivals, and the version that all arms begin with."""
    import numpy as np
    from arms import OBJECTIVE_MS, Box
    from stream import TEST, make_digits, make_stream, write_samples

    from cotenant.cli.bench.arrivals import poisson

    cores = sorted(os.sched_getaffinity(0))
    digits = make_digits(args.seed)
    images = directory / "images.npy"
    np.save(images, digits.images)
    first = directory / "first" / "model"
    first.mkdir(parents=True)
    chosen = np.flatnonzero(digits.groups != TEST)[:FIRST_IMAGES]
    samples = first.parent / "samples.npz"
    write_samples(samples, digits, chosen, np.zeros_like(chosen))
    command = [sys.executable, str(HERE / "train.py"), f"--models={first}", f"--samples={samples}"]
    made = subprocess.run(
        [*command, f"--first={FIRST_STEPS}", f"--seed={args.seed}"],
        capture_output=True,
        text=True,
        check=False,
    )
    if made.returncode:
        raise OSError(f"the first version could not be trained: {made.stderr[-1500:]}")
    print(made.stdout.strip())
    if args.seconds is None:
        rate = float(made.stdout.split()[-2])
        args.seconds = round(SECONDS * min(2.0, max(1.0, USUAL_RATE / rate)))
    print(
        f"{len(cores)} core{'s' * (len(cores) > 1)}; {args.rate:g} requests/s, 99% of them to be"
        f" answered within {OBJECTIVE_MS:g} ms; {args.seconds:g} s an arm"
    )
    due = poisson(args.rate, args.seconds, args.seed)
    stream = make_stream(due, args.seconds, digits, args.seed)
    return Box(directory, cores, digits, stream, images, first)


def _run_arm(name: str, box: Any, seconds: float) -> tuple[Any, list[Any]]:
    """One arm from start to end: what was seen, and (Cotenant only) who had the cores."""
    from arms import Arm
    from cores import read_spans
    from judge import served_right

    from live import HEAD, Live

    arm = Arm(name, box)
    try:
        arm.start()
        print(HEAD)
        run = arm.run(seconds, Live(box.stream, box.digits, len(box.cores)).watch)
    finally:
        arm.stop()
    run.served_right = served_right(run, arm.models, box.stream, box.digits)
    spans = read_spans(arm.journal, run.start_ns, seconds) if name == "cotenant" else []
    return run, spans


def _write(
    args: argparse.Namespace,
    box: Any,
    runs: dict[str, Any],
    summaries: dict[str, dict[str, float]],
    spans: list[Any],
) -> None:
    from picture import draw

    from cotenant import __version__

    document = {
        "cotenant": __version__,
        "date": time.strftime("%Y-%m-%d"),
        "machine": {
            "cores": len(box.cores),
            "kernel": platform.release(),
            "python": platform.python_version(),
        },
        "options": {"seconds": args.seconds, "rate": args.rate, "seed": args.seed},
        "stream": {
            "due_s": [round(due, 6) for due in box.stream.due],
            "stage": box.stream.stage.tolist(),
            "label": box.digits.labels[box.stream.digit].tolist(),
            "group": box.digits.groups[box.stream.digit].tolist(),
        },
        "arms": {
            name: {"summary": _plain(summaries[name]), **_samples(run)}
            for name, run in runs.items()
        },
        "cotenant_core_spans": [
            [s.core, round(s.since, 6), round(s.until, 6), s.holder] for s in spans
        ],
    }
    (args.out / "demo.json").write_text(json.dumps(document, allow_nan=False))
    draw(args.out / "demo.png", box, runs, summaries, spans)


def _samples(run: Any) -> dict[str, Any]:
    from figures import swaps

    answers = run.answers
    return {
        "status": answers["status"].tolist(),
        "predicted": answers["predicted"].tolist(),
        "version": answers["version"].tolist(),
        "latency_ms": [round(float(x), 4) for x in answers["latency_ms"]],
        "lag_ms": [round(float(x), 4) for x in answers["lag_ms"]],
        "refusals": run.refusals,
        "published_s": run.published,
        "swapped_in_s": swaps(run),
        "core_seconds": [
            {"at": round(s.at, 3), "steps": s.steps, **s.time._asdict()} for s in run.samples
        ],
    }


def _plain(figures: dict[str, float]) -> dict[str, float | None]:
    """JSON has no nan."""
    return {key: None if math.isnan(value) else value for key, value in figures.items()}


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--seconds", type=_seconds, help="per arm (default: 34, on a slow box up to 68)"
    )
    parser.add_argument("--rate", type=_rate, default=150.0, help="requests/s (default: 150)")
    parser.add_argument(
        "--arms",
        type=_arms,
        default=list(_ABOUT),
        help=f"some of {','.join(_ABOUT)}, in this order (default: all)",
    )
    parser.add_argument("--out", type=Path, default=Path("demo-out"), help="(default: demo-out)")
    parser.add_argument("--seed", type=int, default=1)
    return parser.parse_args()


def _arms(text: str) -> list[str]:
    arms = list(dict.fromkeys(text.split(",")))
    wrong = [name for name in arms if name not in _ABOUT]
    if wrong:
        raise argparse.ArgumentTypeError(f"unknown: {', '.join(wrong)}; known: {', '.join(_ABOUT)}")
    return arms


def _seconds(text: str) -> float:
    return _within(text, 4, 3600)


def _rate(text: str) -> float:
    return _within(text, 5, 2000)


def _within(text: str, low: float, high: float) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not low <= value <= high:
        raise argparse.ArgumentTypeError(f"{text!r}: expected a number from {low:g} to {high:g}")
    return value


if __name__ == "__main__":
    sys.exit(main())
