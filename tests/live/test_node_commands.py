"""The command line beside a real node: found by its name, asked, rolled back, stopped."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pytest

from cotenant.cli.main import main
from cotenant.domain.errors import ModelError

if TYPE_CHECKING:
    from tests.live.conftest import Box, Boxes

X = np.ones((1, 4), np.float32)


class Ran(NamedTuple):
    returncode: int
    stdout: str
    stderr: str


Cotenant = Callable[..., Ran]


@pytest.fixture
def cotenant(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., Ran]:
    """Runs a command somewhere else than where the node is."""
    monkeypatch.delenv("COTENANT_STATE_DIR", raising=False)
    monkeypatch.chdir(tmp_path)

    def run(*argv: str) -> Ran:
        capsys.readouterr()
        code = main(argv)
        return Ran(code, *capsys.readouterr())

    return run


def ask(cotenant: Cotenant, path: Path) -> Any:
    found = cotenant("infer", "m", "--node", "one", "--input", str(path), "--json")
    assert found.returncode == 0, found.stderr
    (output,) = json.loads(found.stdout)
    return output["data"]


@pytest.fixture(scope="module")
def box(module_boxes: Boxes, tmp_path_factory: pytest.TempPathFactory) -> Box:
    """A node with two versions of one model."""
    box = module_boxes()
    box.model("scale", "m", factor=2.0)
    box.model("scale", "m", version=2, factor=3.0)
    return box.configure([{"name": "m"}], node={"name": "one"}).start()


def test_a_node_is_found_from_anywhere_and_asked(
    box: Box, tmp_path: Path, cotenant: Cotenant
) -> None:
    found = cotenant("nodes", "--json")
    (entry,) = json.loads(found.stdout)
    assert (entry["name"], entry["state_dir"]) == ("one", str(box.state))
    np.save(tmp_path / "x.npy", X[0])
    assert ask(cotenant, tmp_path / "x.npy") == [3, 3, 3, 3]
    (tmp_path / "x.json").write_text('{"x": [1, 1, 1, 2]}')
    assert ask(cotenant, tmp_path / "x.json") == [3, 3, 3, 6]
    tensor = {"name": "x", "datatype": "FP32", "shape": [1, 4], "data": [0, 0, 0, 1]}
    (tmp_path / "x.json").write_text(json.dumps({"inputs": [tensor]}))
    assert ask(cotenant, tmp_path / "x.json") == [0, 0, 0, 3]
    shown = cotenant("infer", "m", "--input", "x.npy")
    assert "y" in shown.stdout and "3" in shown.stdout
    missing = cotenant("infer", "n", "--input", "x.npy")
    assert missing.returncode == 1 and "cotenant models" in missing.stderr
    (tmp_path / "x.json").write_text('{"x": [1, 1]}')
    wrong = cotenant("infer", "m", "--input", "x.json")
    assert wrong.returncode == 1 and "Traceback" not in wrong.stderr
    assert cotenant("logs", "m").returncode == 0


def test_a_rollback_stays_until_the_newest_is_loaded(
    box: Box, tmp_path: Path, cotenant: Cotenant
) -> None:
    np.save(tmp_path / "x.npy", X)
    assert cotenant("models", "rollback", "m").returncode == 0
    assert ask(cotenant, tmp_path / "x.npy") == [2, 2, 2, 2]
    again = cotenant("models", "rollback", "m")
    assert again.returncode == 1 and "none before" in again.stderr
    box.model("scale", "m", version=3, factor=4.0)
    assert box.stop() == 0
    assert json.loads(cotenant("nodes", "--json").stdout) == []
    box.start()
    assert ask(cotenant, tmp_path / "x.npy") == [2, 2, 2, 2]
    listed = json.loads(cotenant("models", "--json").stdout)
    assert [(m["version"], m["state"]) for m in listed] == [("1", "READY")]
    assert "cotenant models load m" in listed[0]["reason"]
    assert cotenant("models", "load", "m").returncode == 0
    assert ask(cotenant, tmp_path / "x.npy") == [4, 4, 4, 4]
    assert cotenant("models", "rollback", "m").returncode == 0
    assert ask(cotenant, tmp_path / "x.npy") == [3, 3, 3, 3]
    assert cotenant("models", "unload", "m").returncode == 0
    away = cotenant("infer", "m", "--input", "x.npy")
    assert away.returncode == 1


def test_a_rollback_where_the_version_before_is_loaded_or_broken(
    boxes: Boxes,
) -> None:
    box = boxes()
    (box.models / "m").mkdir()
    (box.models / "m" / "model.yaml").write_text("keep_versions: 2\n")
    box.model("scale", "m", version=2, factor=2.0)
    box.configure([{"name": "m"}]).start()
    box.model("scale", "m", version=3, factor=3.0)
    box.until(lambda: box.infer("m", x=X).values == [3, 3, 3, 3])
    assert box.control.rollback("m") == "2"
    box.until(lambda: box.infer("m", x=X).values == [2, 2, 2, 2])
    broken = box.models / "m" / "1" / "model.onnx"
    broken.parent.mkdir()
    broken.write_bytes(b"no model")
    with pytest.raises(ModelError):
        box.control.rollback("m")
    assert box.infer("m", x=X).values == [2, 2, 2, 2]
    box.control.load("m")
    assert box.infer("m", x=X).values == [3, 3, 3, 3]


def test_stop_waits_until_the_node_is_gone(boxes: Boxes, cotenant: Cotenant) -> None:
    box = boxes()
    box.configure([], node={"name": "two"}).start()
    assert box.process is not None
    found = cotenant("stop", "--node", "two")
    assert found.returncode == 0, found.stderr
    assert box.process.wait(10) == 0
    gone = cotenant("stop", "--node", "two")
    assert gone.returncode == 1 and "cotenant nodes" in gone.stderr
