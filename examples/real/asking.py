"""What the programs of this directory share: files of installed packages, and one request."""

from __future__ import annotations

import http.client
import importlib.metadata
import json
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
NAMES = {"float32": "FP32", "int32": "INT32", "int64": "INT64"}
"""Of NumPy's types what the Open Inference Protocol calls them."""
TYPES = {name: np.dtype(kind) for kind, name in NAMES.items()}


def found(package: str, name: str) -> Path:
    """The file of an installed package, which is not imported: its imports may be absent.

    Raises SystemExit with what to install.
    """
    try:
        files = importlib.metadata.files(package) or []
    except importlib.metadata.PackageNotFoundError:
        raise SystemExit(f"not installed: pip install --no-deps {package}") from None
    for file in files:
        if file.name == name:
            return Path(str(file.locate()))
    raise SystemExit(f"{package} {importlib.metadata.version(package)} has no {name}")


class Server:
    """One connection to a node, for one thread. ``address`` is HOST:PORT."""

    def __init__(self, address: str) -> None:
        self._connection = http.client.HTTPConnection(address, timeout=60)

    def ask(self, model: str, **inputs: Array) -> dict[str, Array]:
        """The outputs of one inference by name; tensors travel as they lie in memory.

        Raises SystemExit with what the node says if it refuses.
        """
        head = {"inputs": [_described(*item) for item in inputs.items()]}
        head["parameters"] = {"binary_data_output": True}  # type: ignore[assignment]
        text = json.dumps(head).encode()
        body = b"".join([text, *(array.tobytes() for array in inputs.values())])
        headers = {"Inference-Header-Content-Length": str(len(text))}
        self._connection.request("POST", f"/v2/models/{model}/infer", body, headers)
        response = self._connection.getresponse()
        answer = response.read()
        if response.status != 200:
            raise SystemExit(f"{model}: {json.loads(answer)['error']}")
        return _read(answer, int(response.headers["Inference-Header-Content-Length"]))

    def close(self) -> None:
        """Hang up."""
        self._connection.close()


def _described(name: str, array: Array) -> dict[str, Any]:
    return {
        "name": name,
        "datatype": NAMES[array.dtype.name],
        "shape": list(array.shape),
        "parameters": {"binary_data_size": array.nbytes},
    }


def _read(answer: bytes, head: int) -> dict[str, Array]:
    outputs, at = {}, head
    for said in json.loads(answer[:head])["outputs"]:
        kind, shape = TYPES[said["datatype"]], said["shape"]
        outputs[said["name"]] = np.frombuffer(answer, kind, prod(shape), at).reshape(shape)
        at += said["parameters"]["binary_data_size"]
    return outputs
