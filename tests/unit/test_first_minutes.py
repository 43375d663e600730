"""The first five minutes without a node: what a model's file becomes, the line that asks it, what
is checked of a machine, the first configuration, what the demo counts."""

from __future__ import annotations

import errno
import json
import math
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from cotenant.cli import curl, doctor, initial, modelfile
from cotenant.cli.demo import picture, tinymodel
from cotenant.cli.demo.tally import Answer, Moment, Tally, figures, lent
from cotenant.cli.doctor import Check, State
from cotenant.cli.main import main
from cotenant.cli.output import show
from cotenant.cli.wiring import read_config
from cotenant.devices.features import Missing
from cotenant.devices.npu_look import Npus
from cotenant.devices.nvidia.facts import Cause, Driver, Found, Gpu, Mig, Trouble
from cotenant.devices.processor import ProcessorFacts, gate, memory
from cotenant.domain.errors import ConfigError, ModelError
from cotenant.domain.port import ModelMeta, TensorMeta
from cotenant.engines.onnx import OnnxEngine
from cotenant.runtime.repository import Repository
from tests import certificates

WISHES = modelfile.Wishes(latency="25ms")

# --- a model's file ---------------------------------------------------------------------------


def laid(path: Path, state: Path) -> list[str]:
    """The files of the version that a model at ``path`` becomes."""
    model = modelfile.find(path)
    with modelfile.placed(model, state, WISHES) as config:
        found = Repository(Path(config.models)).newest(model.name)
        return sorted(entry.name for entry in found.path.parent.iterdir())


def test_a_file_is_served_under_its_name_and_leaves_no_link(tmp_path: Path) -> None:
    path = tmp_path / "My Digits.v2.onnx"
    path.write_bytes(b"")
    model = modelfile.find(path)
    with modelfile.placed(model, tmp_path / "state", WISHES) as config:
        (service,) = config.services
        assert service.slo.latency == 25_000_000
        assert service.name == model.name == "my-digits-v2"
        assert Repository(Path(config.models)).newest(service.name).path.name == "model.onnx"
    assert list((tmp_path / "state").iterdir()) == []
    assert path.exists()


def test_weights_beside_a_file_come_with_it_and_strangers_do_not(tmp_path: Path) -> None:
    for name in ("net.xml", "net.bin", "other.onnx", "notes.txt"):
        (tmp_path / name).write_bytes(b"")
    found = laid(tmp_path / "net.xml", tmp_path / "state")
    assert {"model.xml", "model.bin"} <= set(found)
    assert not {"other.onnx", "notes.txt"} & set(found)


def test_directories_are_models_whole_named_or_with_versions(tmp_path: Path) -> None:
    for name in ("whole/model.onnx", "named/net.onnx", "named/weights", "kept/3/model.onnx"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    assert laid(tmp_path / "whole", tmp_path / "state") == ["model.onnx"]
    assert laid(tmp_path / "named", tmp_path / "state") == ["model.onnx", "weights"]
    assert laid(tmp_path / "kept", tmp_path / "state") == ["model.onnx"]


def test_links_of_a_node_that_was_killed_go(tmp_path: Path) -> None:
    old = tmp_path / "state" / f"{modelfile.PLACE}{2**22 + 1}"
    old.mkdir(parents=True)
    (tmp_path / "net.onnx").write_bytes(b"")
    laid(tmp_path / "net.onnx", tmp_path / "state")
    assert not old.exists()


def test_a_language_model_is_promised_its_first_token(tmp_path: Path) -> None:
    (tmp_path / "chat.gguf").write_bytes(b"")
    model = modelfile.find(tmp_path / "chat.gguf")
    with modelfile.placed(model, tmp_path / "state", WISHES) as config:
        assert model.speaks and config.services[0].slo.latency == 25_000_000


def test_what_is_no_model_is_said(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"\.onnx"):
        modelfile.find(tmp_path)
    (tmp_path / "a.onnx").write_bytes(b"")
    (tmp_path / "b.onnx").write_bytes(b"")
    with pytest.raises(ModelError):
        modelfile.find(tmp_path)
    with pytest.raises(ModelError):
        modelfile.find(tmp_path / "nothing.onnx")


def test_options_are_refused_as_a_file_s_keys_are(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = tmp_path / "net.onnx"
    model.write_bytes(b"")
    state = ("--state-dir", str(tmp_path / "state"), "--check")
    assert main(["serve", str(model), "--latency", "25ms", *state]) == 0
    assert main(["serve", str(model), "--latency", "25", *state]) == 1
    assert "--latency" in capsys.readouterr().err
    assert main(["serve", str(model), "--http", "0.0.0.0:80", *state]) == 1
    assert "--token-file" in capsys.readouterr().err
    (tmp_path / "photo.png").write_bytes(b"\x89PNG\xff")
    assert main(["serve", str(tmp_path / "photo.png")]) == 1
    assert ".onnx" in capsys.readouterr().err
    (tmp_path / "cotenant.yaml").write_text("node: {}")
    assert main(["serve", str(tmp_path / "cotenant.yaml"), "--latency", "25ms"]) == 1


# --- the line that asks it --------------------------------------------------------------------


def meta(*inputs: TensorMeta, context: int = 0) -> ModelMeta:
    return ModelMeta("net", ("1",), "p", inputs, (), pieces=context > 0, context=context)


def test_a_small_input_is_written_out_with_free_axes_of_one() -> None:
    inputs = TensorMeta("x", "FP32", (-1, 3)), TensorMeta("s", "BYTES", (-1, 1))
    line = curl.line(meta(*inputs), "127.0.0.1:1", {}, None)
    words = shlex.split(line)
    body = json.loads(words[words.index("-d") + 1])
    assert [tensor["shape"] for tensor in body["inputs"]] == [[1, 3], [1, 1]]
    assert len(body["inputs"][0]["data"]) == 3 and isinstance(body["inputs"][1]["data"][0], str)
    assert words[0] == "curl" and "http://127.0.0.1:1/v2/models/net/infer" in words


def test_a_large_input_is_sent_as_zero_bytes() -> None:
    line = curl.line(
        meta(TensorMeta("x", "FP16", (-1, 3, -1, 64))), "h:1", {"x": (1, 3, 64, 64)}, None
    )
    assert f"head -c {2 * 3 * 64 * 64} /dev/zero" in line and len(line) < 400


def test_a_token_is_read_from_its_file() -> None:
    line = curl.line(meta(context=100), "h:1", {}, "a file")
    assert "$(cat 'a file')" in line and "/v1/completions" in line


# --- the machine ------------------------------------------------------------------------------


def facts(cores: int = 2, realtime: bool = True) -> ProcessorFacts:
    features = gate(realtime), memory("", "this machine has no swap")
    return ProcessorFacts("a processor", tuple(range(cores)), cores, 2**30, features)


def gpu() -> Gpu:
    return Gpu(0, "GPU-1", "H", "", 2**34, 0, 0, (9, 0), 132, None, Mig(False, False), None)


CHECKS = [
    (doctor.check_python([], (3, 11)), State.OK),
    (doctor.check_python(["numpy"], (3, 11)), State.FAIL),
    (doctor.check_policy(True), State.OK),
    (doctor.check_policy(False), State.WARN),
    (doctor.check_cores(facts(2)), State.OK),
    (doctor.check_cores(facts(1)), State.WARN),
    (doctor.check_realtime(True, 0, False), State.OK),
    (doctor.check_realtime(False, 0, False), State.WARN),
    (doctor.check_realtime(False, 0, True), State.WARN),
    (doctor.check_reclaim("memory.reclaim", ""), State.OK),
    (doctor.check_reclaim("", "no swap"), State.WARN),
    (doctor.check_files(1024, 10**6), State.OK),
    (doctor.check_files(10, 10), State.WARN),
    (doctor.check_shm(None, False), State.FAIL),
    (doctor.check_shm(1, True), State.WARN),
    (doctor.check_shm(2**34, True), State.OK),
    (doctor.check_port("http", "127.0.0.1:80", 0), State.OK),
    (doctor.check_port("http", "127.0.0.1:80", errno.EADDRINUSE), State.FAIL),
    (doctor.check_port("http", "127.0.0.1:80", errno.EACCES), State.FAIL),
    (doctor.check_port("http", "1.2.3.4:80", errno.EADDRNOTAVAIL), State.FAIL),
    (doctor.check_jobs_api("no tokens", "", False), State.FAIL),
    (doctor.check_jobs_api("", "key.pem", True), State.WARN),
    (doctor.check_jobs_api("", "", False), State.OK),
    (doctor.check_disk(Path("/"), False, 0), State.FAIL),
    (doctor.check_disk(Path("/"), True, 1), State.WARN),
    (doctor.check_disk(Path("/"), True, 2**40), State.OK),
    (doctor.check_npu(Npus((), (), Missing("none", "buy"), Cause.ABSENT), False), State.OK),
    (doctor.check_npu(Npus((), (), Missing("none", "buy"), Cause.ABSENT), True), State.FAIL),
    (doctor.check_npu(Npus((), (), Missing("closed", "open"), Cause.ACCESS), False), State.WARN),
]


@pytest.mark.parametrize(("check", "state"), CHECKS)
def test_what_is_wrong_has_a_fix(check: Check, state: State) -> None:
    assert check.state is state
    assert check.found
    if state is State.FAIL:
        assert check.fix and doctor.exit_code([check]) == 1
    else:
        assert doctor.exit_code([check]) == 0


@pytest.mark.parametrize("wanted", [False, True])
@pytest.mark.parametrize("cause", list(Cause))
def test_gpus_that_cannot_be_used_matter_where_one_is_wanted(cause: Cause, wanted: bool) -> None:
    (check,) = doctor.check_gpus(Found(trouble=Trouble(cause, "what", "how")), wanted)
    assert (check.state is State.FAIL) == wanted
    assert (check.state is State.OK) == (cause is Cause.ABSENT and not wanted)


def test_gpus_are_shown_with_driver_and_mig() -> None:
    names = [c.name for c in doctor.check_gpus(Found(Driver("570.1", (12, 8)), (gpu(),)), True)]
    assert any("driver" in name for name in names) and any("MIG" in name for name in names)


def test_doctor_says_whether_models_can_be_served(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "cotenant.yaml"
    service = "services: [{name: net, objective: {latency: 25ms}}]"
    path.write_text(f"node: {{http: '127.0.0.1:0', grpc: null}}\n{service}")
    assert main(["doctor", str(path), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["serves"] is True
    assert {check["state"] for check in found["checks"]} <= {"ok", "warn"}
    path.write_text("nodes: {}")
    assert main(["doctor", str(path)]) == 1
    assert "configuration" in capsys.readouterr().out


def test_files_of_the_jobs_api_are_tried(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pair = certificates.made(tmp_path)
    pair.key.chmod(0o604)
    tokens = tmp_path / "tokens"
    path = tmp_path / "cotenant.yaml"
    api = {"address": "127.0.0.1:0", "tokens": str(tokens)}
    api |= {"certificate": str(pair.certificate), "key": str(pair.key)}
    path.write_text(json.dumps({"node": {"http": None, "grpc": None, "jobs_api": api}}))
    assert row(path, capsys)["state"] == "fail"  # no tokens yet
    assert main(["token", "add", "me", "--scope", "read", "--file", str(tokens)]) == 0
    capsys.readouterr()
    assert row(path, capsys)["state"] == "warn"
    pair.key.chmod(0o640)
    assert row(path, capsys)["state"] == "ok"
    pair.key.write_text("no key")
    assert row(path, capsys)["state"] == "fail"


def row(path: Path, capsys: pytest.CaptureFixture[str]) -> dict[str, str]:
    """What is found of the jobs API."""
    main(["doctor", str(path), "--json"])
    checks = json.loads(capsys.readouterr().out)["checks"]
    return next(check for check in checks if check["name"] == "jobs API")


@pytest.mark.parametrize("package", ["uvicorn", "msgspec", "rich"])
def test_a_package_that_is_missing_is_said_in_one_line(package: str) -> None:
    program = f"import sys; sys.modules[{package!r}] = None; import cotenant.__main__ as m; "
    words = [sys.executable, "-c", program + "sys.exit(m.main())", "doctor"]
    done = subprocess.run(words, check=False, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert len(done.stderr.splitlines()) == 1 and package in done.stderr


# --- the first configuration ------------------------------------------------------------------


def test_init_writes_a_file_that_loads_and_keeps_one_that_is_there(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "models" / "net" / "2").mkdir(parents=True)
    (tmp_path / "models" / "net" / "2" / "model.onnx").write_bytes(b"")
    (tmp_path / "models" / "no model").mkdir()
    assert main(["init", str(tmp_path)]) == 0
    path = tmp_path / "cotenant.yaml"
    assert [service.name for service in read_config(path).services] == ["net"]
    path.write_text("mine")
    assert main(["init", str(tmp_path)]) == 1
    assert path.read_text() == "mine" and "--force" in capsys.readouterr().err
    assert main(["init", str(tmp_path), "--force"]) == 0
    assert path.read_text() != "mine"


@pytest.mark.parametrize("cause", [None, *Cause])
def test_what_init_writes_loads_whatever_is_found(tmp_path: Path, cause: Cause | None) -> None:
    gpus = Found(Driver("570.1", (12, 8)), (gpu(),))
    npus = Npus()
    if cause is not None:
        gpus = Found(trouble=Trouble(cause, "a: what,\nand more.", "- do: this"))
        npus = Npus((), (), Missing("it is: closed", "#open it"), cause)
    path = tmp_path / "cotenant.yaml"
    path.write_text(initial.document(initial.Box(facts(), gpus, npus)))
    kinds = [device.kind for device in read_config(path).devices]
    assert kinds == (["cpu"] if cause else ["cpu", "cuda"])


# --- the demo ---------------------------------------------------------------------------------


def test_the_built_in_model_is_an_onnx_file(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(tinymodel.document(3))
    engine = OnnxEngine(path, (1,))
    assert engine.meta.batchable
    assert [tensor.shape for tensor in engine.meta.inputs] == [(-1, tinymodel.WIDTH)]
    import onnx

    onnx.checker.check_model(str(path), full_check=True)


def test_late_and_refused_answers_count() -> None:
    found = figures([Answer(0, 200, 5.0), Answer(0, 200, 50.0), Answer(0, 503, 1.0)], 25.0)
    assert (found.answered, found.refused, found.p99_ms) == (2, 1, 50.0)
    assert found.in_time == pytest.approx(1 / 3)
    assert math.isnan(figures([], 25.0).p99_ms)


def test_only_what_came_lately_is_recent() -> None:
    tally = Tally()
    tally.add([Answer(0, 200, 50.0)], 0.0)
    tally.add([Answer(100, 200, 5.0)], 100.0)
    assert tally.recent(25.0).p99_ms == 5.0 and tally.whole(25.0).p99_ms == 50.0


def test_cores_lent_are_those_that_jobs_had() -> None:
    partitions: list[dict[str, object]] = [
        {"units": [1], "busy": {"job:a": 0.5, "service:x": 0.25}},
        {"units": [0], "busy": {}},
    ]
    assert lent(partitions) == (0.0, 0.5)


def test_the_picture_shows_both_ways_at_any_width(capsys: pytest.CaptureFixture[str]) -> None:
    tally = Tally()
    moments = [Moment(0.0, False, tally.recent(25.0), math.nan, None)]
    tally.add([Answer(1, 200, 30.0)], 1.0)
    tally.seconds, tally.steps = 1.0, 10
    moments.append(Moment(1.0, True, tally.recent(25.0), 10.0, (0.5, 1.0)))
    for width in (40, 80, 300):
        show(picture.picture(moments, "127.0.0.1:1", width))
        assert "127.0.0.1:1" in capsys.readouterr().out
    assert "10.0 steps/s" in picture.line(moments[-1], 1.0)
    show(picture.summary({True: tally, False: Tally()}))
    assert "10.0" in capsys.readouterr().out


def test_an_impossible_percentile_is_refused(tmp_path: Path) -> None:
    (tmp_path / "net.onnx").write_bytes(b"")
    wrong = modelfile.Wishes(latency="25ms", percentile=250.0)
    with pytest.raises(ConfigError):
        with modelfile.placed(modelfile.find(tmp_path / "net.onnx"), tmp_path / "s", wrong):
            pass
