"""A node that serves a PyTorch exported program."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="the extra torch is not installed")

if TYPE_CHECKING:
    from tests.live.conftest import Boxes


class Mlp(torch.nn.Module):  # type: ignore[misc, name-defined]
    """Of a row of 4 to 16 values; its answer is named."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = torch.nn.Sequential(
            torch.nn.Linear(1, 64), torch.nn.ReLU(inplace=True), torch.nn.Linear(64, 1)
        )

    def forward(self, x: Any) -> Any:
        return {"y": self.layers(x.unsqueeze(-1)).mean(1)}


def test_a_node_serves_an_exported_program_and_refuses_a_pickle(boxes: Boxes) -> None:
    box, model = boxes(), Mlp().eval()
    axes = {0: torch.export.Dim("rows"), 1: torch.export.Dim("values", min=4, max=16)}
    program = torch.export.export(model, (torch.ones(2, 5),), dynamic_shapes={"x": axes})
    for name in ("mlp", "pickled"):
        (box.models / name / "1").mkdir(parents=True)
    torch.export.save(program, box.models / "mlp" / "1" / "model.pt2")
    torch.save(model, box.models / "pickled" / "1" / "model.pt2")
    box.configure([{"name": "mlp"}, {"name": "pickled"}]).start(ready=False)
    box.until(lambda: box.service("mlp")["state"] == "READY")

    x = np.arange(12, dtype=np.float32).reshape(3, 4)
    with torch.no_grad():
        wanted = model(torch.from_numpy(x))["y"].numpy().ravel()
    assert np.allclose(box.infer("mlp", x=x).values, wanted, atol=1e-5)
    meta = box.ask("GET", "/v2/models/mlp").json
    assert meta["platform"] == "pytorch_exported"
    assert meta["outputs"] == [{"name": "y", "datatype": "FP32", "shape": [-1, 1]}]
    with box.under_load("mlp", rate=100, x=x[:1]) as load:
        box.until(lambda: box.service("mlp")["answered"] > 20)
    assert load.count(200) == len(load.answers)

    too_long = box.infer("mlp", x=np.ones((1, 17), np.float32))
    assert too_long.status == 400 and "4 to 16" in too_long.error
    assert box.infer("mlp", x=np.ones((2, 16), np.float32)).status == 200
    box.until(lambda: "torch.export.save" in box.index()["pickled", "1"].get("reason", ""))
    assert box.infer("pickled", x=x).status >= 400
