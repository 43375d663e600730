"""Models that somebody trained for a purpose, served by both engines as users would ask them.

They come from packages (``tests/models.txt``), whose code is not imported. The clients are the
programs of ``examples/real``.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import io
import json
import shutil
import sys
import zipfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import tritonclient.grpc

if TYPE_CHECKING:
    from tests.live.conftest import Box, Boxes

PACKAGES = ("magika", "rapidocr-onnxruntime", "silero-vad")
for _package in PACKAGES:
    try:
        importlib.metadata.version(_package)
    except importlib.metadata.PackageNotFoundError:
        _how = "pip install --no-deps -r tests/models.txt"
        pytest.skip(f"{_package} is not installed: {_how}", allow_module_level=True)
pytest.importorskip("PIL", reason="pictures are drawn with Pillow")
sys.path.insert(0, str(Path(__file__).parents[2] / "examples/real"))

import files  # noqa: E402
import ocr  # noqa: E402
import prepare  # noqa: E402
import speech  # noqa: E402
from asking import Array, Server, found  # noqa: E402
from PIL import Image, ImageDraw, ImageFont  # noqa: E402

ENGINES = ("onnxruntime", *(["openvino"] if importlib.util.find_spec("openvino") else []))
SPOKEN = "silero_vad.onnx"
"""As its makers give it: the rate a number without axes, the streams on the state's second axis."""
RAW = "speech-raw"


@pytest.fixture(scope="module")
def box(module_boxes: Boxes) -> Box:
    box = module_boxes()
    for engine in ENGINES:
        aside = box.directory / engine
        prepare.prepare(aside, engine)
        np.savez(aside / "file-types" / "1" / "check.npz", **checks())
        for path in aside.iterdir():
            path.rename(box.models / f"{path.name}-{engine}")
    raw = box.models / RAW / "1" / "model.onnx"
    raw.parent.mkdir(parents=True)
    shutil.copyfile(found("silero-vad", SPOKEN), raw)
    names = [f"{name}-{engine}" for name in prepare.MODELS for engine in ENGINES]
    services = [{"name": name, "batch": {"max": 4}} for name in (*names, RAW)]
    return box.configure(services, node={"grpc": "127.0.0.1:0"}).start()


@pytest.fixture
def server(box: Box) -> Iterator[Server]:
    server = Server(f"127.0.0.1:{box.port}")
    yield server
    server.close()


class Direct:
    """A model of the box by ONNX Runtime in this process, asked as a server is."""

    def __init__(self, box: Box, name: str) -> None:
        import onnxruntime as ort

        options = ort.SessionOptions()
        options.log_severity_level = 4
        path = next((box.models / name).glob("*/model.onnx"))
        self._session = ort.InferenceSession(str(path), options)

    def ask(self, _: str, **inputs: Array) -> dict[str, Array]:
        names = [output.name for output in self._session.get_outputs()]
        return dict(zip(names, self._session.run(names, inputs), strict=True))


def close(some: dict[str, Array], others: dict[str, Array]) -> bool:
    """Equal, but for the order of additions."""
    return some.keys() == others.keys() and all(
        np.allclose(some[name], others[name], rtol=1e-3, atol=1e-4) for name in some
    )


def picture(*lines: str, size: tuple[int, int] = (480, 192)) -> Image.Image:
    """Dark text on white, a line below the other."""
    made = Image.new("RGB", size, "white")
    draw, font = ImageDraw.Draw(made), ImageFont.load_default(size=32)
    for number, line in enumerate(lines):
        draw.text((24, 20 + number * size[1] // len(lines)), line, fill="black", font=font)
    return made


def voice(pitch: float) -> Array:
    """A second of what has the pitch, the vowels and the syllables of a voice: FP32 [16,000]."""
    time = np.arange(speech.RATE) / speech.RATE
    phase = 2 * np.pi * np.cumsum(pitch * (1 + 0.05 * np.sin(6 * np.pi * time))) / speech.RATE
    buzz = np.sum([np.cos(k * phase) / k for k in range(1, 30)], axis=0)
    vowels = ((700, 1200, 2500), (300, 2200, 3000), (400, 800, 2600), (600, 1700, 2500))
    parts = []
    for part, vowel in zip(np.split(buzz, len(vowels)), vowels, strict=True):
        waves = np.fft.rfftfreq(len(part), 1 / speech.RATE)
        gain = np.sum([1 / (1 + ((waves - centre) / 90) ** 2) for centre in vowel], axis=0)
        parts.append(np.fft.irfft(np.fft.rfft(part) * gain, len(part)))
    made = np.concatenate(parts) * (1 - np.cos(8 * np.pi * time))
    return (0.3 * made / np.abs(made).max()).astype(np.float32)


def hear(server: Any, model: str, sound: Array) -> list[float]:
    stream = speech.Stream(server, model)
    return [stream.hear(chunk) for chunk in speech.chunks(sound)]


def inputs_of(name: str) -> list[dict[str, Array]]:
    """Requests of several shapes to a model."""
    random = np.random.default_rng(3)
    if name == "file-types":
        source = files.tokens(Path(__file__).read_bytes(), files.rules())
        assert source is not None
        return [{"bytes": np.concatenate([source] * rows)} for rows in (1, 3)]
    if name == "speech":
        sound = np.stack([voice(120)[:576], voice(210)[4000:4576]])
        memory = random.standard_normal((2, 2, 128)).astype(np.float32) / 9
        return [{"input": sound[:rows], "memory": memory[:rows]} for rows in (1, 2)]
    drawn = picture("Cotenant 2026", "one box")
    if name == "text-boxes":
        return [{"x": ocr.whole(drawn, most)} for most in (480, 256)]
    strip = drawn.crop((0, 10, 480, 70))
    if name == "text-angle":
        return [{"x": ocr.line(strip, 192, 192)}]
    return [{"x": ocr.line(strip, least)} for least in (320, 512)]


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("name", prepare.MODELS)
def test_answers_are_those_of_onnx_runtime_by_itself(
    box: Box, server: Server, name: str, engine: str
) -> None:
    direct = Direct(box, f"{name}-{engine}")
    for inputs in inputs_of(name):
        answer = server.ask(f"{name}-{engine}", **inputs)
        assert close(answer, direct.ask("", **inputs))


def contents() -> dict[str, bytes]:
    """Files of known kinds."""
    held = io.BytesIO()
    picture("a picture").save(held, "PNG")
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a.txt", "some text " * 200)
    said = {"name": "cotenant", "devices": [{"kind": "cpu", "cores": [0, 1]}], "grpc": None}
    return {
        "png": held.getvalue(),
        "zip": packed.getvalue(),
        "python": Path(__file__).read_bytes(),
        "json": json.dumps(said, indent=1).encode(),
        "xml": b'<?xml version="1.0"?>\n<net><layers><layer id="0" type="Relu"/></layers></net>\n',
    }


def checks() -> dict[str, Array]:
    """Those files as check data: what the model takes, and the numbers of their kinds."""
    how = files.rules()
    known = contents()
    rows = [files.tokens(content, how) for content in known.values()]
    labels = [how.kinds.index(kind) for kind in known]
    return {
        "bytes": np.concatenate([row for row in rows if row is not None]),
        "labels": np.array(labels),
    }


@pytest.mark.parametrize("engine", ENGINES)
def test_files_are_known_by_their_bytes(box: Box, server: Server, engine: str) -> None:
    assert box.service(f"file-types-{engine}")["accuracy"]["value"] == 1
    how = files.rules()
    for kind, content in contents().items():
        tokens = files.tokens(content, how)
        assert tokens is not None
        answer = server.ask(f"file-types-{engine}", bytes=tokens)
        assert files.kind(answer["target_label"][0], how)[0] == kind


def test_a_model_with_an_input_without_axes_is_served(box: Box, server: Server) -> None:
    inputs = {
        "input": voice(120)[None, :576],
        "state": np.zeros((2, 1, 128), np.float32),
        "sr": np.array(speech.RATE, np.int64),
    }
    wanted = Direct(box, RAW).ask("", **inputs)
    assert close(server.ask(RAW, **inputs), wanted)
    assert not box.service(RAW)["joined"]
    given = []
    for name, array in inputs.items():
        kind = "INT64" if name == "sr" else "FP32"
        given.append(tritonclient.grpc.InferInput(name, list(array.shape), kind))
        given[-1].set_data_from_numpy(array)
    with tritonclient.grpc.InferenceServerClient(box.status()["grpc"]) as client:
        answer = client.infer(RAW, given)
    assert close({name: answer.as_numpy(name) for name in wanted}, wanted)


@pytest.mark.parametrize("engine", ENGINES)
def test_streams_beside_each_other_hear_what_they_hear_alone(box: Box, engine: str) -> None:
    model = f"speech-{engine}"
    silence = np.zeros(speech.RATE, np.float32)
    sounds = [voice(120), silence, voice(180), np.concatenate([silence[:8000], voice(210)[8000:]])]
    direct = Direct(box, model)
    alone = [hear(direct, model, sound) for sound in sounds]

    def client(sound: Array) -> list[float]:
        server = Server(f"127.0.0.1:{box.port}")
        try:
            return hear(server, model, sound)
        finally:
            server.close()

    def together() -> bool:
        """All at once; whether any of it shared a batch."""
        with ThreadPoolExecutor(len(sounds)) as pool:
            assert np.allclose(list(pool.map(client, sounds)), alone, atol=1e-3)
        return bool(box.service(model)["batch_mean"] > 1)

    assert box.service(model)["joined"]
    box.until(together)
    assert max(alone[0]) > speech.SPEECH > max(alone[1])


@pytest.mark.parametrize("engine", ENGINES)
def test_pictures_of_different_sizes_are_read_at_once(
    box: Box, engine: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    ask = Server.ask
    monkeypatch.setattr(Server, "ask", lambda s, name, **i: ask(s, f"{name}-{engine}", **i))
    path = box.models / f"text-lines-{engine}" / "characters.json"
    known, address = json.loads(path.read_text()), f"127.0.0.1:{box.port}"
    lines = ("Serve under a deadline", "CPU 42% busy")
    turned = picture(*lines[:1], size=(480, 96)).rotate(180)
    asked = [
        (picture(*lines), 480, [*lines]),
        (picture(*lines, size=(640, 320)), 640, [*lines]),
        (picture(*lines, size=(800, 480)), 416, [*lines]),
        (turned, 480, [*lines[:1]]),
    ]
    with ThreadPoolExecutor(len(asked)) as pool:
        read = pool.map(lambda one: ocr.read(address, one[0], known, one[1]), asked)
        assert list(read) == [right for _, _, right in asked]
