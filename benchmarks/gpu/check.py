"""What only a GPU can tell, in one command: ``make gpu-check``.

Sections run one after the other, each in processes of its own, each with a part of the time. One
that fails, hangs or is not possible says why, and the others go on. Nothing is downloaded, no
setting of the card is changed. Figures go to one JSON file, with raw samples, and to one picture.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import report
from record import Setting

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
DEADLINE_S = 510.0
RESERVE_S = 6.0
"""For the picture, and for ending what hangs; a quarter of the time at most."""
SOFT = 0.85
"""Of the time after which a section is ended, it is told that it has so much."""
TAIL = 2_000


@dataclass(frozen=True)
class Section:
    """``weight``: its part of the time that is left, beside the others' to come. ``least_s``: it
    gets so much if there is that much left; what it does not use is the others'."""

    name: str
    weight: float
    asks: str
    least_s: float = 0.0


SECTIONS = (
    Section("facts", 25, "what is this machine?", 5),
    Section("loader", 100, "does each library go through the shim, and is every launch seen?", 4),
    Section("gate", 95, "what does an open gate cost, and how long does a closed one drain?", 8),
    Section("vmm", 25, "what does mapping memory cost, and how fast are copies?", 2),
    Section("green", 30, "does a green context have what it says, beside a neighbour too?", 3),
    Section("evict", 80, "how fast do 20 GB leave and come back, and are they what they were?", 3),
    Section("colocate", 200, "what do a service and a training job lose beside each other?", 8),
    Section("channel", 25, "can a kernel that runs be stopped, by its process's own channels?", 4),
)


class Check:
    """The sections of one run. ``seconds``: for all of it, from now on."""

    def __init__(
        self, sections: Sequence[Section], seconds: float, setting: dict[str, Any]
    ) -> None:
        self._sections = sections
        self._begun = time.monotonic()
        self._end = self._begun + seconds - min(RESERVE_S, seconds / 4)
        self._setting = setting
        self.found: dict[str, dict[str, Any]] = {}

    def run(self, after: Path | None = None) -> None:
        """All sections; ``after`` each of them the file is written anew."""
        for number, section in enumerate(self._sections):
            weights = sum(each.weight for each in self._sections[number:])
            left = self._end - time.monotonic()
            limit = min(left, max(section.least_s, left * section.weight / weights))
            begun = time.monotonic()
            found = self._one(section, limit)
            found["took_s"] = time.monotonic() - begun
            found["limit_s"] = limit
            self.found[section.name] = {"asks": section.asks, **found}
            print(report.lines(section.name, self.found[section.name]), flush=True)
            if after is not None:
                self.write(after)

    def write(self, path: Path) -> None:
        """What was found so far."""
        document = {
            "benchmark": "gpu-check",
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "standin": self.standin,
            "took_s": time.monotonic() - self._begun,
            "sections": self.found,
        }
        new = path.with_suffix(".new")
        new.write_text(json.dumps(document))
        new.rename(path)

    @property
    def standin(self) -> bool | None:
        """Whether what was measured is no GPU; None if that is not known."""
        found: bool | None = self.found.get("facts", {}).get("figures", {}).get("standin")
        return found

    def _one(self, section: Section, limit: float) -> dict[str, Any]:
        if limit <= 0:
            return _result("skipped", "the time is up")
        shared = Path("/dev/shm")
        prefix = f"gpu-check-{section.name}-"
        with tempfile.TemporaryDirectory(
            prefix=prefix, dir=shared if shared.is_dir() else None, ignore_cleanup_errors=True
        ) as name:
            folder = Path(name)
            setting = Setting(
                name=section.name,
                out=str(folder / "out.json"),
                seconds=SOFT * limit,
                folder=name,
                **self._setting,
            )
            setting.write(folder / "setting.json")
            code = _run(folder, limit)
            errors = (folder / "stderr").read_text(errors="replace")[-TAIL:]
            try:
                found: dict[str, Any] = json.loads((folder / "out.json").read_text())
            except (OSError, ValueError):
                found = {"figures": {}, "samples": {}, "why": {}}
        return {**_state(code, found, errors), **found, "stderr": errors}


def _run(folder: Path, limit: float) -> int | None:
    """The section's exit code; None: it was ended, with all that it had started."""
    with (folder / "stderr").open("wb") as errors:
        process = subprocess.Popen(
            [sys.executable, str(HERE / "section.py"), str(folder / "setting.json")],
            stdin=subprocess.DEVNULL,
            stdout=errors,
            stderr=errors,
            env=_environment(),
            start_new_session=True,
        )
        try:
            return process.wait(limit)
        except subprocess.TimeoutExpired:
            return None
        finally:
            # Also what a section that ended well may have left behind.
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            with contextlib.suppress(subprocess.TimeoutExpired):  # the driver holds it fast
                process.wait(5)


def _environment() -> dict[str, str]:
    """Without a gate of the caller's, and with our own packages."""
    found = {k: v for k, v in os.environ.items() if not k.startswith("COTENANT_GATE")}
    paths = (str(ROOT / "src"), str(HERE), found.get("PYTHONPATH"))
    found["PYTHONPATH"] = ":".join(filter(None, paths))
    return found


def _state(code: int | None, found: dict[str, Any], errors: str) -> dict[str, Any]:
    figures, why = found["figures"], found["why"]
    if code is None:
        return _result("ended", "it was not done in its time")
    if code:
        last = (errors.strip().splitlines() or ["it said nothing"])[-1]
        return _result("failed", f"exit code {code}: {last}")
    if why:
        state = "partial" if figures else "not possible"
        return _result(state, "; ".join(f"{part}: {reason}" for part, reason in why.items()))
    return _result("done", "")


def _result(state: str, reason: str) -> dict[str, Any]:
    return {"state": state, "reason": reason, "figures": {}, "samples": {}, "why": {}}


# --- what is built first ----------------------------------------------------------------------


def build(folder: Path) -> dict[str, str]:
    """Shim and loops, in this folder. Raises RuntimeError with a reason."""
    spec = importlib.util.spec_from_file_location("native_build", ROOT / "native" / "build.py")
    assert spec is not None and spec.loader is not None
    native = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(native)
    if reason := native.why_not():
        raise RuntimeError(reason)
    import loop

    native.build(folder / "shim")
    loop.build(folder / "loop.so")
    return {"shim": str(folder / "shim"), "loop": str(folder / "loop.so")}


def parse(words: Sequence[str] | None = None) -> argparse.Namespace:
    """The options; ends the program where they are wrong."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names = [section.name for section in SECTIONS]
    parser.add_argument("--json", type=Path, required=True, help="figures and raw samples")
    parser.add_argument("--plot", type=Path, help="picture (needs matplotlib)")
    parser.add_argument(
        "--seconds", type=float, default=DEADLINE_S, help="for everything (%(default)s)"
    )
    parser.add_argument("--only", nargs="+", choices=names, metavar="SECTION", default=names)
    parser.add_argument("--driver", default="", help="the real libcuda.so.1, where it is known")
    parser.add_argument(
        "--most-mb", type=int, default=0, help="memory that sections may move about (0: all)"
    )
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args(words)
    if not 1 <= args.seconds <= 3600:
        parser.error(f"--seconds {args.seconds:g}: from 1 to 3600")
    if args.most_mb < 0:
        parser.error(f"--most-mb {args.most_mb}: 0 or more")
    return args


def main(words: Sequence[str] | None = None) -> int:
    """Build, run, report; 0 if there is a device, whatever sections found."""
    args = parse(words)
    begun = time.monotonic()
    for path in filter(None, (args.json, args.plot)):
        path.parent.mkdir(parents=True, exist_ok=True)
    made = Path(tempfile.mkdtemp(prefix="gpu-check-"))
    try:
        try:
            built = build(made)
        except (RuntimeError, OSError, subprocess.CalledProcessError) as error:
            print(f"nothing can be checked: {error}", file=sys.stderr)
            return 1
        setting = {
            **built,
            "driver": args.driver,
            "most_bytes": args.most_mb << 20,
            "seed": args.seed,
        }
        chosen = [each for each in SECTIONS if each.name in ("facts", *args.only)]
        check = Check(chosen, args.seconds - (time.monotonic() - begun), setting)
        check.run(args.json)
        print(f"{args.json}: figures and raw samples")
        if args.plot:
            print(report.plot(json.loads(args.json.read_text()), args.plot))
        if check.standin is None:
            print("no device was reached: see facts", file=sys.stderr)
            return 1
        return 0
    finally:
        shutil.rmtree(made, ignore_errors=True)


if __name__ == "__main__":
    for signum in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(signum, signal.default_int_handler)
    sys.exit(main())
