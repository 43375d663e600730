"""Language models: Cotenant's builds beside llama.cpp, on the same file.

Each arm runs in a process of its own, one after the other, in another order in each round. It reads
a prompt (``prefill``), then says tokens to 1 and to 8 prompts at once, each of other random tokens.
An iteration is one token for each: what is computed, and the choice of the most likely token.
Drafts are off, since llama.cpp is measured without.

Each is given by the clock and by the CPU time of the process. Where other programs use the cores,
the second is the steadier.

The arms: ``rounded``, ``stored`` and ``fp32`` are Cotenant's builds, one of which the exactness
gate serves; ``llama.cpp`` needs ``benchmarks/peers/setup.py --only llama.cpp``.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import resource
import statistics
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

from cotenant.engines.llm.blocks import BlockPool
from cotenant.engines.llm.checkpoint import GgufCheckpoint, open_checkpoint
from cotenant.engines.llm.gate import WINDOW, Reader, check_text, passages
from cotenant.engines.llm.generator import Generator, Question
from cotenant.engines.llm.iteration import Iterations, Limits
from cotenant.engines.llm.runner import Runner, Sizes
from cotenant.engines.llm.sampler import Sampling
from cotenant.engines.llm.text import Text
from cotenant.engines.llm.verdicts import AT_LOAD, described, judgement
from cotenant.engines.llm.weights import Build

PEERS = Path(__file__).resolve().parent / "peers"
RIVAL = "llama.cpp"
BUILDS = {"rounded": Build(rounded=True), "stored": Build(), "fp32": Build(bits=32)}
BLOCK, TOKENS = 16, 512
CLOCK, CPU = 0, 1
Took = tuple[float, float]
"""Milliseconds by the clock, and of CPU time."""
TICKS = os.sysconf("SC_CLK_TCK")


# --- one arm ------------------------------------------------------------------------------------


class Own:
    """A generator of one build, as a worker has it."""

    def __init__(self, task: dict[str, Any], build: Build) -> None:
        checkpoint = open_checkpoint(Path(task["model"]))
        assert isinstance(checkpoint, GgufCheckpoint)
        blocks = 2 * len(task["prompts"]) * -(-task["room"] // BLOCK)
        self._threads = task["threads"]
        sizes = Sizes(blocks, BLOCK, 0, task["room"])
        runner = Runner(checkpoint, build, sizes, (self._threads,))
        core = Iterations(BlockPool(blocks, BLOCK), Limits(tokens=TOKENS, drafts=0))
        self._generator = Generator(Text.from_gguf(checkpoint.file.keys), runner, core)
        self._asked = 0

    def ask(self, prompts: list[list[int]], most: int) -> None:
        """Take questions up; nothing that was read before is found again."""
        for prompt in prompts:
            self._asked += 1
            question = Question(
                prompt=tuple(prompt),
                most=most,
                sampling=Sampling(temperature=0.0, seed=0),
                endless=True,
                salt=str(self._asked),
            )
            self._generator.begin(self._asked, question)

    def step(self) -> tuple[Took, int]:
        """How long an iteration took, and how many tokens were said."""
        began = time.perf_counter(), time.process_time()
        pieces = self._generator.step(self._threads)
        took = (time.perf_counter() - began[0]) * 1e3, (time.process_time() - began[1]) * 1e3
        return took, sum(len(piece.choices) for piece in pieces)


def measure(task: dict[str, Any], build: Build) -> dict[str, list[Took]]:
    """Samples of one arm."""
    model = Own(task, build)
    prefills = []
    for _ in range(task["prefills"] + 1):
        model.ask(task["prompts"][:1], 1)
        took, said = model.step()
        assert said == 1, "a prompt is read in one iteration"
        prefills.append(took)
    samples = {"prefill": prefills[1:]}
    for count in task["counts"]:
        # Who is read first goes on while others are read. The first iteration in which all say
        # something is not counted, for it may read the end of a prompt.
        model.ask(task["prompts"][:count], task["steps"] + count + 1)
        found: list[Took] = []
        while len(found) <= task["steps"]:
            took, said = model.step()
            if said == count:
                found.append(took)
        samples[f"at_{count}"] = found[1:]
        while model.step()[1]:
            pass
    return samples


# --- all of them --------------------------------------------------------------------------------


def run_arm(name: str, task: dict[str, Any]) -> dict[str, Any]:
    """One process; what it measured, and how many cores the rest of the machine kept busy."""
    if name == RIVAL:
        command = [str(python_of_rival()), str(PEERS / "llama.py")]
    else:
        command = [sys.executable, __file__, "--arm", name]
    threads = {"OMP_NUM_THREADS": str(task["threads"]), "OPENBLAS_NUM_THREADS": "1"}
    busy, own, began = _busy_s(), _children_s(), time.monotonic()
    answer = subprocess.run(
        command,
        input=json.dumps(task),
        stdout=subprocess.PIPE,
        env=os.environ | threads,
        text=True,
        check=True,
    )
    wall = time.monotonic() - began
    found: dict[str, Any] = json.loads(answer.stdout.splitlines()[-1])
    found["elsewhere"] = max(0.0, (_busy_s() - busy) - (_children_s() - own)) / wall
    return found


def python_of_rival() -> Path:
    """Its interpreter, which may not be there."""
    return PEERS / ".venvs" / RIVAL / "bin" / "python"


def _busy_s() -> float:
    fields = list(map(int, Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:]))
    return (sum(fields[:3]) + sum(fields[5:8])) / TICKS


def _children_s() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def of_round(sample: dict[str, Any], prompt: int, by: int) -> dict[str, float]:
    """The figures of one arm in one round: medians within it."""
    middle = {n: statistics.median(t[by] for t in each) for n, each in sample["samples"].items()}
    return {
        "ms, 1 sequence": middle["at_1"],
        "ms, 8 sequences": middle["at_8"],
        "prefill, tokens/s": prompt / middle["prefill"] * 1e3,
    }


def spread(values: list[float], digits: int) -> str:
    """Median and extremes."""
    low, high = min(values), max(values)
    middle = statistics.median(values)
    return f"{middle:.{digits}f} [{low:.{digits}f}–{high:.{digits}f}]"


def table(rounds: list[dict[str, dict[str, float]]], against: str) -> str:
    """Medians and extremes over rounds. Those that say "times" are ratios of one round each; above
    1 is faster than ``against``."""
    arms, figures = list(rounds[0]), list(next(iter(rounds[0].values())))
    heads = [*figures, *(f"{figure} (times)" for figure in figures if against in arms)]
    lines = ["| arm | " + " | ".join(heads) + " |", "| --- " * (len(heads) + 1) + "|"]
    for arm in arms:
        cells = [spread([r[arm][figure] for r in rounds], 1) for figure in figures]
        if against in arms:
            cells += [
                spread([_times(r[arm][f], r[against][f], f) for r in rounds], 2) for f in figures
            ]
        lines.append(f"| {arm} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _times(own: float, other: float, figure: str) -> float:
    return other / own if figure.startswith("ms") else own / other


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, help="a GGUF file")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=32, help="iterations of a round")
    parser.add_argument("--prompt", type=int, default=128, help="tokens of a prompt")
    parser.add_argument("--arms", default=",".join((*BUILDS, RIVAL)))
    parser.add_argument("--json", type=Path)
    parser.add_argument("--arm", choices=BUILDS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.arm:
        samples = measure(json.load(sys.stdin), BUILDS[args.arm])
        print(json.dumps({"samples": samples, "version": version("onnxruntime")}))
        return
    if args.model is None or args.prompt > TOKENS:
        parser.error(f"--model is needed, and --prompt is {TOKENS} at most")
    arms = args.arms.split(",")
    if RIVAL in arms and not python_of_rival().exists():
        print(f"{RIVAL} is left out: benchmarks/peers/setup.py --only {RIVAL} was not run")
        arms.remove(RIVAL)
    judged = gate(args.model.resolve(), args.threads)
    print("\n".join(judged), flush=True)
    draw = random.Random(0)
    task = {
        "model": str(args.model.resolve()),
        "threads": args.threads,
        "prompts": [[draw.randrange(100, 4000) for _ in range(args.prompt)] for _ in range(8)],
        "counts": [1, 8],
        "steps": args.steps,
        "prefills": 3,
        "tokens": TOKENS,
        "room": args.prompt + args.steps + 16,
    }
    raw: list[dict[str, Any]] = []
    for number in range(args.rounds):
        turned = arms[number % len(arms) :] + arms[: number % len(arms)]
        found = {name: run_arm(name, task) for name in turned}
        raw.append({name: found[name] for name in arms})
    for by, title in ((CLOCK, "by the clock"), (CPU, "by CPU time")):
        rounds = [{name: of_round(each[name], args.prompt, by) for name in arms} for each in raw]
        print(f"\n{title}, times {RIVAL}:\n\n{table(rounds, RIVAL)}")
    elsewhere = [sample["elsewhere"] for each in raw for sample in each.values()]
    print(f"cores kept busy by others: {spread(elsewhere, 2)}")
    if args.json:
        machine = {"python": platform.python_version(), "kernel": platform.release()}
        document = {"benchmark": "llm", "machine": machine, "gate": judged, "rounds": raw}
        args.json.write_text(json.dumps(document | {"task": {**task, "prompts": "seed 0"}}))


def gate(model: Path, threads: int) -> list[str]:
    """What the exactness gate says of the model; and how often llama.cpp, which rounds
    activations as well, has the most likely token of the same reference."""
    checkpoint = open_checkpoint(model)
    if not isinstance(checkpoint, GgufCheckpoint):
        raise SystemExit(f"{model.name} is no GGUF file")
    text = Text.from_gguf(checkpoint.file.keys)
    said = described(judgement(checkpoint, text, threads, AT_LOAD._replace(seconds=1e9)))
    lines = said.splitlines()
    if not python_of_rival().exists():
        return lines
    script = passages(check_text(model.parent), text, checkpoint.decoder.context)
    expected = Reader(checkpoint, text, script, threads).read(BUILDS["fp32"]).best
    task = {"model": str(model), "threads": threads, "tokens": TOKENS, "room": WINDOW}
    answer = subprocess.run(
        [str(python_of_rival()), str(PEERS / "llama.py")],
        input=json.dumps(task | {"prompts": [[0]], "script": script}),
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    best = [token for passage in json.loads(answer.stdout) for token in passage]
    same = sum(mine == its for mine, its in zip(expected.tolist(), best, strict=True))
    return [*lines, f"{RIVAL}: agreement {same / len(best):.4f} at {len(best)} positions"]


if __name__ == "__main__":
    main()
