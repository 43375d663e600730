"""The check for people: lines for each section, and one picture of all."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

AIM_P99, AIM_TRAINING, AIM_DRAIN_US = 1.05, 0.85, 200.0


def lines(name: str, result: dict[str, Any]) -> str:
    """A section's state and its figures; medians with p99 or quartiles."""
    took = f"{result.get('took_s', 0.0):.0f} of {result.get('limit_s', 0.0):.0f} s"
    head = f"== {name}: {result['state']} ({took}) - {result['asks']}"
    said = [head] + [f"   {reason}" for reason in filter(None, result["reason"].split("; "))]
    make = TABLES.get(name, _plain)
    try:
        said += [f"   {line}" for line in make(result["figures"])]
    except (KeyError, TypeError, ValueError):  # a section that was ended halfway
        said += [f"   {line}" for line in _plain(result["figures"])]
    return "\n".join(said)


def number(figure: Any, unit: str = "") -> str:
    """A summary as ``median [p25-p75], p99``; other values as they are."""
    if isinstance(figure, dict) and "n" in figure:
        if not figure["n"]:
            return "-"
        median, low, high, p99 = (_short(figure[key]) for key in ("median", "p25", "p75", "p99"))
        return f"{median} [{low}-{high}]{unit}, p99 {p99}"
    return f"{_short(figure)}{unit}"


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else "-" if value is None else str(value)


def _plain(figures: dict[str, Any], above: str = "") -> Iterator[str]:
    for key, value in figures.items():
        if isinstance(value, dict) and "n" not in value:
            yield from _plain(value, f"{above}{key}.")
        else:
            yield f"{above + key:<40}{number(value)}"


def _loader(figures: dict[str, Any]) -> Iterator[str]:
    for name, found in figures.items():
        seen = f"{found['counted']} of {found['launched']} seen" if "counted" in found else ""
        held = "closed gate holds" if found.get("held") else "closed gate does NOT hold"
        state = f"attached, {seen}, {held}" if found["attached"] else "NOT attached"
        yield f"{name:<10}{found['version']:<16}{state}; {', '.join(found['mapped'])}"


def _gate(figures: dict[str, Any]) -> Iterator[str]:
    for arm, found in figures.get("cost", {}).get("launch_ns", {}).items():
        ratio = number(figures["cost"]["step_ratio"][arm])
        yield f"launch, {arm:<12}{number(found, ' ns'):<40}a step, by bare: {ratio}"
    for bound, kernels in figures.get("drain", {}).items():
        for us, found in kernels.items():
            texts = (
                f"{way} {number(found[way])}"
                for way in ("seat", "page", "event", "by_event")
                if way in found
            )
            yield f"drain (us), bound {bound:>5} us, kernels of {us:>6} us: {'; '.join(texts)}"


def _colocate(figures: dict[str, Any]) -> Iterator[str]:
    yield f"{figures['tenants']}, a request takes {figures['service_ms']:.3g} ms"
    heads = ("p99 / alone", "training / left")
    yield f"{'arm':<14}{'p50 ms':>9}{'p99 ms':>9}  {heads[0]:<22}{heads[1]:<22}drain us"
    for arm, found in figures.get("arms", {}).items():
        middles = [_middle(found, name) for name in ("p50_ms", "p99_ms")]
        ratios = [_spread(found, name) for name in ("p99_vs_alone", "train_vs_left")]
        drain = _middle(found, "drain_us")
        yield f"{arm:<14}{middles[0]:>9}{middles[1]:>9}  {ratios[0]:<22}{ratios[1]:<22}{drain}"


def _middle(found: dict[str, Any], name: str) -> str:
    return f"{found[name]['median']:.3g}" if found.get(name, {}).get("n") else "-"


def _spread(found: dict[str, Any], name: str) -> str:
    figure = found.get(name, {})
    if not figure.get("n"):
        return "-"
    return f"{figure['median']:.2f} [{figure['p25']:.2f}-{figure['p75']:.2f}]"


TABLES: dict[str, Callable[[dict[str, Any]], Iterator[str]]] = {
    "loader": _loader,
    "gate": _gate,
    "colocate": _colocate,
}


# --- the picture ------------------------------------------------------------------------------


def plot(document: dict[str, Any], path: Path) -> str:
    """Draw it, and say where it is, or why there is none."""
    try:
        import matplotlib
    except ImportError:
        return "no picture: matplotlib is missing"
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(2, 3, figsize=(17, 9.5))
    sections = document["sections"]
    panels = (
        ("loader", "libraries", _draw_loader),
        ("gate", "drain of a closed gate", _draw_drain),
        ("gate", "what the open gate costs", _draw_cost),
        ("vmm", "mapping memory", _draw_mapping),
        ("green", "green contexts", _draw_green),
        ("colocate", "a service beside training", _draw_colocate),
    )
    for axis, (name, title, draw) in zip(axes.flat, panels, strict=True):
        result = sections.get(name, {"state": "not run", "reason": "", "figures": {}})
        axis.set_title(f"{title} ({result['state']})")
        try:
            draw(axis, result["figures"])
        except (KeyError, IndexError, TypeError, ValueError) as error:
            reason = result["reason"] or f"nothing to draw ({type(error).__name__})"
            axis.clear()
            axis.set_title(f"{title} ({result['state']})")
            axis.text(0.02, 0.95, _wrapped(reason), va="top", fontsize=8)
            axis.axis("off")
    facts = sections.get("facts", {}).get("figures", {})
    device = facts.get("device", {}).get("name", "no device")
    driver = facts.get("nvml", {}).get("driver", "")
    figure.suptitle(f"gpu-check: {device}, driver {driver}, {document['date']}{_moved(sections)}")
    if document["standin"] is not False:
        what = "STAND-IN: no GPU" if document["standin"] else "device not known"
        figure.text(0.5, 0.5, what, fontsize=60, color="red", alpha=0.25)
        figure.texts[-1].set(ha="center", va="center", rotation=25)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
    return f"{path}: the picture"


def _moved(sections: dict[str, Any]) -> str:
    said = ""
    for who in ("own", "shim"):
        found = sections.get("evict", {}).get("figures", {}).get(who, {})
        if "same" not in found:
            continue
        size = found["held"]["bytes"] / 1e9
        rates = " and ".join(f"{found[way]['gb_s']['median']:.3g}" for way in ("out", "in"))
        by = "the job itself" if who == "own" else "the shim"
        same = "unchanged" if found["same"] else "CHANGED"
        said += f"\n{size:.3g} GB out and in at {rates} GB/s by {by}: {same}"
    return said


def _wrapped(text: str) -> str:
    lines: list[str] = []
    for word in text.split():
        if not lines or len(lines[-1]) + len(word) > 70:
            lines.append("")
        lines[-1] += f" {word}"
    return "\n".join(lines[:25])


def _draw_loader(axis: Any, figures: dict[str, Any]) -> None:
    rows = []
    for name, found in figures.items():
        seen = f"{found['counted']}/{found['launched']}" if "counted" in found else "-"
        rows.append([name, found["version"], str(found["attached"]), seen, str(found.get("held"))])
    table = axis.table(rows, colLabels=["", "version", "attached", "seen", "held"], loc="center")
    table.scale(1, 1.6)
    axis.axis("off")


def _draw_drain(axis: Any, figures: dict[str, Any]) -> None:
    for bound, kernels in figures["drain"].items():
        for way, style in (("seat", "-o"), ("by_event", ":x")):
            found = [(int(us), k[way]) for us, k in kernels.items() if k.get(way, {}).get("n")]
            if not found:
                continue
            middles = [summary["median"] for _, summary in found]
            above = [max(0.0, summary["p99"] - summary["median"]) for _, summary in found]
            axis.errorbar(
                [us for us, _ in found],
                middles,
                yerr=[[0.0] * len(found), above],
                fmt=style,
                capsize=3,
                label=f"bound {bound} us, {'seen' if way == 'seat' else 'by event'}",
            )
    axis.axhline(AIM_DRAIN_US, linestyle=":", color="grey")
    axis.set(xscale="log", yscale="log", xlabel="a kernel takes (us)")
    axis.set_ylabel("closed until drained (us): median, p99")
    axis.legend(fontsize=7)


def _draw_cost(axis: Any, figures: dict[str, Any]) -> None:
    ratios = figures["cost"]["step_ratio"]
    names = list(ratios)
    middles = [ratios[name]["median"] for name in names]
    low = [max(0.0, ratios[n]["median"] - ratios[n]["p25"]) for n in names]
    high = [max(0.0, ratios[n]["p75"] - ratios[n]["median"]) for n in names]
    axis.bar(names, middles, yerr=[low, high], capsize=4)
    for at, name in enumerate(names):
        ns = figures["cost"]["launch_ns"][name]["median"]
        axis.text(at, 0.02, f"{ns:.0f} ns\na launch", ha="center", color="white")
    axis.set_ylabel("a step of kernels of 10 us, by bare")


def _draw_mapping(axis: Any, figures: dict[str, Any]) -> None:
    sizes = [name for name, found in figures["map"].items() if found]
    for step in figures["map"][sizes[0]]:
        values = [figures["map"][size][step]["median"] for size in sizes]
        axis.plot([int(s.split("_")[0]) for s in sizes], values, "o-", label=step)
    axis.set(xscale="log", yscale="log", xlabel="MB", ylabel="us (median)")
    axis.legend(fontsize=7)


def _draw_green(axis: Any, figures: dict[str, Any]) -> None:
    for state, style in (("alone", "o-"), ("beside", "x--")):
        found = [
            (int(name.split("_")[1]), each)
            for name, each in figures.get(state, {}).items()
            if name.startswith("asked_")
        ]
        for what in ("count", "runs_on"):
            points = [(asked, each[what]) for asked, each in found]
            axis.plot(*zip(*points, strict=True), style, label=f"{what}, {state}")
    axis.set(xlabel="multiprocessors asked for", ylabel="multiprocessors")
    axis.legend(fontsize=7)


def _draw_colocate(axis: Any, figures: dict[str, Any]) -> None:
    drawn = 0
    for arm, found in figures["arms"].items():
        if not (found.get("train_vs_left") and found.get("p99_vs_alone")):
            continue
        x, y = found["train_vs_left"], found["p99_vs_alone"]
        axis.errorbar(
            x["median"],
            y["median"],
            xerr=[[x["median"] - x["p25"]], [x["p75"] - x["median"]]],
            yerr=[[y["median"] - y["p25"]], [y["p75"] - y["median"]]],
            fmt="o",
            capsize=3,
            label=arm,
        )
        drawn += 1
    if not drawn:
        raise ValueError("no arm has both")
    axis.axhline(AIM_P99, linestyle=":", color="grey")
    axis.axvline(AIM_TRAINING, linestyle=":", color="grey")
    axis.set(yscale="log", xlabel="training / what is left (right is better)")
    axis.set_ylabel("p99 / p99 alone (down is better)")
    axis.legend(fontsize=7)
