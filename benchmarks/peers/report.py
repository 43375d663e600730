"""The summary table and the plot of a results document."""

from __future__ import annotations

from pathlib import Path
from statistics import median
from typing import Any

Document = dict[str, Any]


def table(document: Document) -> str:
    """One line for each arm and concurrency: medians over the rounds."""
    head = f"{'arm':<44}{'c':>4}{'req/s':>9}{'p50 ms':>9}{'p99 ms':>9}{'CPU ms/req':>12}"
    head += f"{'failed':>8}{'elsewhere':>11}"
    lines = [head, "-" * len(head)]
    for (arm, clients), samples in _cells(document).items():
        mid = {key: median(s[key] for s in samples) for key in _MEASURES}
        failed = sum(s["failed"] for s in samples)
        lines.append(
            f"{arm:<44}{clients:>4}{mid['per_s']:>9.0f}{mid['p50_ms']:>9.2f}"
            f"{mid['p99_ms']:>9.2f}{mid['server_cpu_ms']:>12.2f}{failed:>8}{mid['elsewhere_cores']:>11.2f}"
        )
    lines += [f"skipped {what}: {reason}" for what, reason in document["skipped"].items()]
    return "\n".join(lines)


def plot(document: Document, path: Path) -> None:
    """Requests per second and server CPU per request, a column for each kind of request."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    cells = _cells(document)
    kinds = list(dict.fromkeys(_kind(samples[0]) for samples in cells.values()))
    figure, axes = pyplot.subplots(
        2, len(kinds), figsize=(4.6 * len(kinds), 7), squeeze=False, layout="constrained"
    )
    for column, kind in enumerate(kinds):
        chosen = {key: s for key, s in cells.items() if _kind(s[0]) == kind}
        _bars(axes[0][column], chosen, "per_s", "requests/s")
        _bars(axes[1][column], chosen, "server_cpu_ms", "server CPU ms/request")
        axes[0][column].set_title(kind)
        axes[0][column].legend(fontsize=7)
    figure.supxlabel("concurrent connections")
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


_MEASURES = ("per_s", "p50_ms", "p99_ms", "server_cpu_ms", "elsewhere_cores")
_COLOURS = {
    "cotenant": "tab:red",
    "bare": "tab:gray",
    "triton": "tab:green",
    "mlserver": "tab:blue",
    "litserve": "tab:purple",
}
_Cells = dict[tuple[str, int], list[dict[str, Any]]]


def _cells(document: Document) -> _Cells:
    """Samples by arm and concurrency, in the order first measured."""
    cells: _Cells = {}
    for sample in document["samples"]:
        cells.setdefault((sample["arm"], sample["clients"]), []).append(sample)
    return cells


def _kind(sample: dict[str, Any]) -> str:
    if sample["workload"] == "image":
        return "600 KB tensor"
    return f"1 ms model, batches up to {sample['batch']}" if sample["batch"] > 1 else "1 ms model"


def _bars(axis: Any, cells: _Cells, measure: str, label: str) -> None:
    """Grouped bars with a line from the lowest to the highest round."""
    arms = list(dict.fromkeys(arm for arm, _ in cells))
    clients = sorted({c for _, c in cells})
    width = 0.8 / len(arms)
    for index, arm in enumerate(arms):
        groups = [[s[measure] for s in cells.get((arm, c), [])] or [0.0] for c in clients]
        middle = [median(values) for values in groups]
        low = [mid - min(values) for mid, values in zip(middle, groups, strict=True)]
        high = [max(values) - mid for mid, values in zip(middle, groups, strict=True)]
        at = [group + (index - (len(arms) - 1) / 2) * width for group in range(len(clients))]
        server, *_, wire = arm.split("/")
        look = {"color": _COLOURS.get(server), "hatch": "//" if wire == "grpc" else None}
        axis.bar(at, middle, width, yerr=[low, high], label=f"{server} ({wire})", **look)
    axis.set_xticks(range(len(clients)), [str(c) for c in clients])
    axis.set_ylabel(label)
