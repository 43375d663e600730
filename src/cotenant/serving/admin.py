"""What both front ends say about the server and its models, as plain values."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version
from typing import Any

import msgspec

from cotenant.domain.errors import InvalidRequest, NotFound
from cotenant.domain.port import ModelMeta, NodePort

SERVER_NAME = "cotenant"

EXTENSIONS = (
    "binary_tensor_data",
    "generate",
    "model_configuration",
    "model_repository",
    "statistics",
    "system_shared_memory",
)

NO_CUDA_MEMORY = (
    "CUDA shared memory is not supported; use system shared memory"
    " (v2/systemsharedmemory) or send tensors in the request"
)

MODEL_DATA_TYPES: dict[str, tuple[str, int]] = {
    "BOOL": ("TYPE_BOOL", 1),
    "UINT8": ("TYPE_UINT8", 2),
    "UINT16": ("TYPE_UINT16", 3),
    "UINT32": ("TYPE_UINT32", 4),
    "UINT64": ("TYPE_UINT64", 5),
    "INT8": ("TYPE_INT8", 6),
    "INT16": ("TYPE_INT16", 7),
    "INT32": ("TYPE_INT32", 8),
    "INT64": ("TYPE_INT64", 9),
    "FP16": ("TYPE_FP16", 10),
    "FP32": ("TYPE_FP32", 11),
    "FP64": ("TYPE_FP64", 12),
    "BYTES": ("TYPE_STRING", 13),
    "BF16": ("TYPE_BF16", 14),
}
"""A datatype's name and number in a model configuration."""

DURATIONS = ("success", "fail", "queue", "compute_input", "compute_infer", "compute_output")
"""Statistics that have a count and a total in ns. The node counts computing per success."""


class Statistics(msgspec.Struct, frozen=True):
    """Counters of one model version. ``durations`` maps a name to (count, ns)."""

    name: str
    version: str
    last_inference_ms: int
    inference_count: int
    execution_count: int
    durations: dict[str, tuple[int, int]]


def server_version() -> str:
    """The installed version of Cotenant."""
    try:
        return version("cotenant")
    except PackageNotFoundError:  # run from a checkout
        return "0+unknown"


def statistics(node: NodePort, name: str, model_version: str) -> list[Statistics]:
    """Of one version, of all loaded versions, or (``name`` empty) of all loaded models.

    Raises NotFound for an unknown model or version.
    """
    if name:
        versions = (model_version,) if model_version else node.metadata(name).versions
        return [_one(name, v, node.statistics(name, v)) for v in versions]
    if model_version:
        raise InvalidRequest("a version was given without a model; name the model too")
    found = []
    for entry in node.index():
        if entry.state == "READY":
            try:
                counters = node.statistics(entry.name, entry.version)
            except NotFound:  # unloaded since it was listed
                continue
            found.append(_one(entry.name, entry.version, counters))
    return found


def _one(name: str, asked: str, counters: dict[str, Any]) -> Statistics:
    success = int(counters.get("success_count", 0))
    durations = {}
    for key in DURATIONS:
        count = int(counters.get(f"{key}_count", success))
        durations[key] = (count, int(counters.get(f"{key}_ns", 0)))
    return Statistics(
        name,
        str(counters.get("version", asked)),
        int(counters.get("last_inference_ms", 0)),
        int(counters.get("inference_count", 0)),
        int(counters.get("execution_count", 0)),
        durations,
    )


def model_config(meta: ModelMeta) -> dict[str, Any]:
    """A minimal model configuration: what is true of a model here, and nothing more.

    ``max_batch_size`` is 0, which in this format means that shapes are complete (they hold
    the batch axis); whether requests are batched together is not the client's concern. A model is
    ``decoupled`` where it may answer in pieces.
    """
    return {
        "name": meta.name,
        "platform": meta.platform,
        "max_batch_size": 0,
        "model_transaction_policy": {"decoupled": meta.pieces},
        "input": [
            {"name": t.name, "data_type": MODEL_DATA_TYPES[t.datatype][0], "dims": t.shape}
            | ({"optional": True} if t.optional else {})
            for t in meta.inputs
        ],
        "output": [
            {"name": t.name, "data_type": MODEL_DATA_TYPES[t.datatype][0], "dims": t.shape}
            for t in meta.outputs
        ],
    }


def check_load_parameters(names: list[str]) -> None:
    """Refuse to load with an override: a model's files are its whole configuration here."""
    wrong = [n for n in names if n == "config" or n.startswith("file:")]
    if wrong:
        raise InvalidRequest(
            f"loading with {', '.join(sorted(wrong)[:3])} is not supported; put the files into"
            " the model directory and load without parameters"
        )
