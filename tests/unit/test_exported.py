"""PyTorch exported programs: they answer as the model does, and nothing in a file is executed."""

from __future__ import annotations

import io
import json
import os
import pickle
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="the extra torch is not installed")

from cotenant.domain.device import CUDA  # noqa: E402
from cotenant.domain.errors import ModelError  # noqa: E402
from cotenant.engines.base import Engine, Opening, Target  # noqa: E402
from cotenant.engines.exported.kinds import KIND, PASSIVE  # noqa: E402
from cotenant.engines.joining import judge  # noqa: E402
from cotenant.engines.registry import choose  # noqa: E402
from cotenant.engines.samples import make_samples  # noqa: E402

nn = torch.nn
DIM = torch.export.Dim
MODEL = "models/model.json"
Change = Callable[[dict[str, bytes]], None]


class Fn(nn.Module):  # type: ignore[misc, name-defined]
    """A function of ``x`` as a model."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Any) -> Any:
        return self.function(x)


class Net(nn.Module):  # type: ignore[misc, name-defined]
    """A convolution net; its outputs have names."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Conv2d(3, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.relu = nn.ReLU(inplace=True)
        self.last = nn.Linear(8, 5)
        self.register_buffer("bias", torch.arange(5.0), persistent=False)

    def forward(self, image: Any, scale: Any) -> Any:
        found = self.relu(self.norm(self.first(image))).mean((2, 3))
        return {"logits": self.last(found) * scale + self.bias, "features": found}


class Stateful(nn.Module):  # type: ignore[misc, name-defined]
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("count", torch.zeros(3))

    def forward(self, x: Any) -> Any:
        self.count.view(3).add_(1)
        return x + self.count


def export(path: Path, model: Any, *inputs: Any, shapes: Any = None) -> Path:
    program = torch.export.export(model.eval(), inputs, dynamic_shapes=shapes)
    torch.export.save(program, path)
    return path


def load(path: Path) -> Engine:
    engine = KIND.open(Opening(path, (1, 2)))
    assert hasattr(engine, "run")
    return engine


def answer(path: Path, model: Any, *inputs: Any, shapes: Any = None) -> Engine:
    """The engine of a model that was seen to answer as the model itself does."""
    engine = load(export(path, model, *inputs, shapes=shapes))
    given = {t.name: x.numpy().copy() for t, x in zip(engine.meta.inputs, inputs, strict=True)}
    before = {name: array.copy() for name, array in given.items()}
    for array in given.values():
        array.flags.writeable = False
    for units in (1, 2):
        found = engine.run(units, given)
        with torch.no_grad():
            wanted = model(*(x.clone() for x in inputs))
        flat, _ = torch.utils._pytree.tree_flatten(wanted)
        assert len(found) == len(flat) == len(engine.meta.outputs)
        for mine, theirs in zip(found, flat, strict=True):
            assert np.allclose(mine, np.asarray(theirs), rtol=1e-5, atol=1e-6)
    assert all(np.array_equal(before[name], given[name]) for name in given)
    return engine


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """What an engine sets in its own process is not left to those of later tests."""
    for name, value in PASSIVE.items():
        monkeypatch.setenv(name, value)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A net of ``image`` and ``scale``, with 1 to 64 rows."""
    rows = DIM("rows", min=1, max=64)
    inputs = (torch.randn(2, 3, 8, 8), torch.randn(2, 1))
    path = tmp_path_factory.mktemp("net") / "model.pt2"
    return export(path, Net(), *inputs, shapes={"image": {0: rows}, "scale": {0: rows}})


def changed(path: Path, to: Path, change: Change) -> Path:
    """The archive with other members."""
    with zipfile.ZipFile(path) as archive:
        members = {name.partition("/")[2]: archive.read(name) for name in archive.namelist()}
    change(members)
    with zipfile.ZipFile(to, "w") as archive:
        for name, data in members.items():
            archive.writestr(f"model/{name}", data)
    return to


def of_json(member: str, change: Callable[[Any], None]) -> Change:
    def apply(members: dict[str, bytes]) -> None:
        found = json.loads(members[member])
        change(found)
        members[member] = json.dumps(found).encode()

    return apply


# --- answers ------------------------------------------------------------------------------------


def test_a_net_answers_as_the_model_does(saved: Path) -> None:
    engine, model = load(saved), Net().eval()
    names = [(t.name, t.datatype, t.shape) for t in engine.meta.inputs]
    assert names == [("image", "FP32", (-1, 3, 8, 8)), ("scale", "FP32", (-1, 1))]
    assert [(t.name, t.shape) for t in engine.meta.outputs] == [
        ("logits", (-1, 5)),
        ("features", (-1, 8)),
    ]
    random = np.random.default_rng(0)
    for rows in (1, 3, 64):
        image = random.random((rows, 3, 8, 8), np.float32)
        scale = random.random((rows, 1), np.float32)
        logits, features = engine.run(2, {"image": image, "scale": scale})
        with torch.no_grad():
            wanted = model(torch.from_numpy(image), torch.from_numpy(scale))
        assert np.allclose(logits, wanted["logits"], atol=1e-5)
        assert np.allclose(features, wanted["features"], atol=1e-5)


def test_rows_of_requests_may_share_a_batch_where_they_are_independent(saved: Path) -> None:
    engine = load(saved)
    assert engine.meta.batchable
    samples = make_samples(engine, 1, {}, {})
    assert judge(engine, 1, samples, 8) == ""
    assert judge(engine, 1, samples, 100), "more rows than the program takes"


def test_outputs_that_are_nested_have_names_by_their_place(tmp_path: Path) -> None:
    def several(x: Any) -> Any:
        most, where = torch.topk(x, 2)
        return (most, where), {"half": torch.split(x, 2, 1)[0], "positive": x > 0}, x.shape[0]

    engine = answer(
        tmp_path / "model.pt2", Fn(several), torch.randn(4, 4), shapes={"x": {0: DIM("n")}}
    )
    assert [(t.name, t.datatype) for t in engine.meta.outputs] == [
        ("output0.0", "FP32"),
        ("output0.1", "INT64"),
        ("output1.half", "FP32"),
        ("output1.positive", "BOOL"),
        ("output2", "INT64"),
    ]
    assert not engine.meta.batchable, "the number of rows is none of a row's own answers"


@pytest.mark.parametrize(
    ("function", "x"),
    [
        (lambda x: nn.functional.one_hot(x, 10).sum(1), torch.tensor([[1, 2], [3, 9]])),
        (lambda x: (x.int() * 3 // 2, x.to(torch.uint8)), torch.arange(6, dtype=torch.int16)),
        (torch.logical_not, torch.tensor([True, False])),
        (lambda x: (x & (x > 2), x**-1.0), torch.arange(1, 5)),
        (lambda x: x.double().cumsum(0) / 3, torch.randn(3, 2).half()),
        (lambda x: x.to(torch.bfloat16).float().softmax(-1), torch.randn(3, 2)),
        (lambda x: x[:, None, torch.tensor([0, 1])], torch.randn(3, 2)),
        (lambda x: x.masked_fill(x > 0, float("-inf")), torch.randn(3, 2)),
        (lambda x: x, torch.randn(3, 2)),
        (lambda x: x.transpose(0, 1), torch.randn(3, 2)),
        (lambda x: torch.zeros(0, 3) + x, torch.randn(1, 3)),
        (lambda x: torch.cond(x.sum() > 0, lambda x: x + 1, lambda x: x - 1, (x,)), torch.ones(3)),
        (lambda x: x.to(memory_format=torch.channels_last) * 2, torch.randn(1, 3, 4, 4)),
        (lambda x: x.add_(1) * 2, torch.zeros(3)),
        (lambda x: (x.view(-1).mul_(2), x), torch.ones(2, 2)),
    ],
)
def test_all_kinds_of_operators_answer_as_the_model_does(
    tmp_path: Path, function: Callable[..., Any], x: Any
) -> None:
    answer(tmp_path / "model.pt2", Fn(function), x)


def test_graphs_within_the_graph_are_executed(tmp_path: Path) -> None:
    layer = nn.Linear(3, 3)

    class Mixed(nn.Module):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.layer = layer

        def forward(self, x: Any) -> Any:
            with torch.no_grad():
                found = self.layer(x)
            with torch.autocast("cpu", dtype=torch.bfloat16):
                rounded = self.layer(x)
            return found, rounded.float()

    exact, rounded = answer(tmp_path / "model.pt2", Mixed(), torch.randn(2, 3)).run(
        1, {"x": np.ones((2, 3), np.float32)}
    )
    assert not np.array_equal(exact, rounded)


def test_what_a_program_checks_of_its_input_is_an_error_of_the_request(tmp_path: Path) -> None:
    def zeros(x: Any) -> Any:
        count = x.sum().item()
        torch._check(count >= 0)
        torch._check(count < 100)
        return torch.zeros(count)

    engine = answer(tmp_path / "model.pt2", Fn(zeros), torch.tensor([2, 3]))
    with pytest.raises(ModelError, match="99"):
        engine.run(1, {"x": np.array([100, 100])})
    (found,) = engine.run(1, {"x": np.array([1, 1])})
    assert found.shape == (2,)


def test_threads_sleep_while_they_wait(saved: Path) -> None:
    """What spins is taken from the training beside it. OpenMP itself says how it waits."""
    code = f"""
import sys
from pathlib import Path
from cotenant.engines.base import Opening
from cotenant.engines.registry import choose
opening = Opening(Path({str(saved)!r}), (1, 2))
kind = choose(opening)
assert "torch" not in sys.modules
kind.open(opening)
"""
    env = {**os.environ, "OMP_DISPLAY_ENV": "true"}
    env.pop("OMP_WAIT_POLICY", None)
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, check=False, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "OMP_WAIT_POLICY = 'PASSIVE'" in done.stderr


# --- sizes --------------------------------------------------------------------------------------


def test_a_size_out_of_range_names_the_range(saved: Path) -> None:
    image = np.zeros((65, 3, 8, 8), np.float32)
    with pytest.raises(ModelError, match=r"'image' has 65 along axis 0.*1 to 64"):
        load(saved).run(1, {"image": image, "scale": np.zeros((65, 1), np.float32)})


def test_sizes_that_must_be_equal_are_compared(saved: Path) -> None:
    image = np.zeros((2, 3, 8, 8), np.float32)
    with pytest.raises(ModelError, match=r"'scale' has 3 .*'image' has 2"):
        load(saved).run(1, {"image": image, "scale": np.zeros((3, 1), np.float32)})


def test_a_size_may_be_a_formula_of_others(tmp_path: Path) -> None:
    class Two(nn.Module):  # type: ignore[misc, name-defined]
        def forward(self, x: Any, y: Any) -> Any:
            return torch.cat([x, y])

    n = DIM("n", min=3, max=10)
    path = export(
        tmp_path / "model.pt2",
        Two(),
        torch.randn(4, 2),
        torch.randn(8, 2),
        shapes={"x": {0: n}, "y": {0: 2 * n}},
    )
    engine = load(path)
    assert not engine.meta.batchable
    (found,) = engine.run(1, {"x": np.zeros((3, 2), "f"), "y": np.zeros((6, 2), "f")})
    assert found.shape == (9, 2)
    with pytest.raises(ModelError, match=r"'y' has 5 .*takes 6"):
        engine.run(1, {"x": np.zeros((3, 2), "f"), "y": np.zeros((5, 2), "f")})
    with pytest.raises(ModelError, match="3 to 10"):
        engine.run(1, {"x": np.zeros((2, 2), "f"), "y": np.zeros((4, 2), "f")})


# --- refusals -----------------------------------------------------------------------------------


def refusal(path: Path) -> str:
    with pytest.raises(ModelError) as refused:
        load(path)
    return str(refused.value)


def test_normalization_that_goes_on_learning_is_refused(tmp_path: Path) -> None:
    class Learning(nn.Module):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("mean", torch.zeros(3))
            self.register_buffer("var", torch.ones(3))

        def forward(self, x: Any) -> Any:
            return nn.functional.batch_norm(x, self.mean, self.var, training=True)

    assert "mean" in refusal(export(tmp_path / "model.pt2", Learning(), torch.ones(2, 3)))


@pytest.mark.filterwarnings("ignore::FutureWarning")  # of PyTorch's decompositions to itself
def test_a_program_that_changes_itself_is_refused(tmp_path: Path) -> None:
    assert "count" in refusal(export(tmp_path / "model.pt2", Stateful(), torch.zeros(3)))
    program = torch.export.export(Stateful(), (torch.zeros(3),)).run_decompositions()
    torch.export.save(program, tmp_path / "flat.pt2")
    assert "count" in refusal(tmp_path / "flat.pt2")


def test_a_weight_that_is_changed_unseen_fails_the_request(tmp_path: Path) -> None:
    class Sly(nn.Module):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("count", torch.zeros(3))

        def forward(self, x: Any) -> Any:
            return x + nn.functional.dropout(self.count, 0.0, training=False).add_(1)

    engine = load(export(tmp_path / "model.pt2", Sly(), torch.zeros(3)))
    for _ in range(2):
        with pytest.raises(ModelError, match="changed its own weights"):
            engine.run(1, {"x": np.zeros(3, np.float32)})


def test_a_custom_operator_is_refused_by_its_name(tmp_path: Path) -> None:
    @torch.library.custom_op("cotenant_test::twice", mutates_args=())
    def twice(x: torch.Tensor) -> torch.Tensor:
        return x * 2

    @twice.register_fake
    def _(x: torch.Tensor) -> torch.Tensor:
        return torch.empty_like(x)

    said = refusal(export(tmp_path / "model.pt2", Fn(twice), torch.ones(3)))
    assert "cotenant_test.twice" in said


def test_types_that_no_protocol_carries_are_refused(tmp_path: Path) -> None:
    path = export(tmp_path / "model.pt2", Fn(lambda x: x.to(torch.bfloat16)), torch.ones(3))
    assert "bfloat16" in refusal(path)


def test_an_input_that_is_a_number_is_refused(tmp_path: Path) -> None:
    class Count(nn.Module):  # type: ignore[misc, name-defined]
        def forward(self, x: Any, count: int) -> Any:
            return x.repeat(count)

    fixed = export(tmp_path / "fixed.pt2", Count(), torch.ones(3), 2)
    assert [t.name for t in load(fixed).meta.inputs] == ["x"]
    shapes = {"x": None, "count": DIM.DYNAMIC}
    free = export(tmp_path / "free.pt2", Count(), torch.ones(3), 2, shapes=shapes)
    assert "'count' is a number" in refusal(free)


def test_another_processor_is_refused(saved: Path) -> None:
    with pytest.raises(ModelError, match="CPU"):
        choose(Opening(saved, (1,), target=Target(f"{CUDA}GPU-1")))
    assert choose(Opening(saved, (1,))) is KIND


def test_files_of_other_kinds_are_refused_with_what_to_do(tmp_path: Path, saved: Path) -> None:
    path = tmp_path / "model.pt2"
    for data in (b"", b"no zip at all", pickle.dumps([1]), saved.read_bytes()[:1000]):
        path.write_bytes(data)
        assert "torch.export.save" in refusal(path)
    torch.save(nn.Linear(2, 2).state_dict(), path)
    assert "pickle" in refusal(path) and "torch.export.save" in refusal(path)
    with zipfile.ZipFile(path, "w"):
        pass
    assert "torch.export.save" in refusal(path)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("serialized_exported_program.json", "{}")
    assert "2.7" in refusal(path)
    path.unlink()
    assert "cannot be read" in refusal(path)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda m: m.update({"data/aotinductor/model/x.so": b"ELF"}), "AOTInductor"),
        (lambda m: m.pop(MODEL), MODEL),
        (lambda m: m.update({MODEL: b"{}"}), "schema_version"),
        (lambda m: m.update({MODEL: b"[" * 100_000}), MODEL),
        (lambda m: m.update({"archive_version": b"7"}), "format"),
        (lambda m: m.update({"byteorder": b"big"}), "byte order"),
        (lambda m: m.update({"data/weights/model.pt": b""}), "pickle"),
        (lambda m: m.update({"data/weights/weight_0": b"123"}), "first.weight"),
        (lambda m: m.pop("data/weights/weight_0"), "weight_0"),
        (of_json(MODEL, lambda p: p["schema_version"].update(major=9)), "9.*export it"),
        (of_json(MODEL, lambda p: p["graph_module"]["graph"]["nodes"].pop(0)), "before"),
        (of_json(MODEL, lambda p: p["graph_module"]["graph"]["inputs"].pop()), "cannot be read"),
    ],
)
def test_archives_that_are_not_right_are_refused(
    tmp_path: Path, saved: Path, change: Change, said: str
) -> None:
    path = changed(saved, tmp_path / "model.pt2", change)
    with pytest.raises(ModelError, match=said):
        load(path)


# --- files that are out to do harm --------------------------------------------------------------


class Bomb:
    """Writes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self._path,)


def pickled(path: Path) -> bytes:
    """``torch.save`` of a bomb."""
    buffer = io.BytesIO()
    torch.save(Bomb(path), buffer)
    return buffer.getvalue()


def of_target(target: str, path: Path) -> Change:
    """The first operator is ``target``, of one argument: a path."""

    def change(program: Any) -> None:
        node = program["graph_module"]["graph"]["nodes"][1]
        node["target"] = target
        node["inputs"] = [{"name": "", "arg": {"as_string": str(path)}, "kind": 1}]

    return of_json(MODEL, change)


def of_weight(path: Path) -> Change:
    """The first weight is a pickle."""

    def change(members: dict[str, bytes]) -> None:
        members["data/weights/weight_0"] = pickled(path)
        config = "data/weights/model_weights_config.json"
        of_json(config, lambda c: c["config"]["first.weight"].update(use_pickle=True))(members)

    return change


def of_constant(path: Path) -> Change:
    """The first constant is a pickled object."""

    def change(members: dict[str, bytes]) -> None:
        members["data/constants/opaque_obj_0"] = pickle.dumps(Bomb(path))
        where = {"path_name": "opaque_obj_0", "use_pickle": True, "tensor_meta": None}
        config = "data/constants/model_constants_config.json"
        of_json(config, lambda c: c["config"]["bias"].update(where))(members)

    return change


def of_size(path: Path) -> Change:
    """A size is source text."""
    text = f"__import__('pathlib').Path({str(path)!r}).touch() or 1"

    def change(program: Any) -> None:
        sizes = program["graph_module"]["graph"]["tensor_values"]["image"]["sizes"]
        sizes[0] = {"as_expr": {"expr_str": text, "hint": None}}

    return of_json(MODEL, change)


@pytest.mark.parametrize(
    "attack",
    [
        lambda path: lambda m: m.update({"data/sample_inputs/model.pt": pickled(path)}),
        lambda path: lambda m: m.update({"data/sample_inputs/model.pt": pickle.dumps(Bomb(path))}),
        of_weight,
        of_constant,
        of_size,
        lambda path: of_target("torch.os.mkdir", path),
        lambda path: of_target("torch.ops.aten.from_file.default", path),
        lambda path: of_target("torch.ops.aten.save.default", path),
        lambda path: of_target("torch.ops.aten.__class__.__subclasses__", path),
        lambda path: of_target("torch.ops.load_library", path),
        lambda path: of_target("_operator.attrgetter", path),
    ],
)
def test_nothing_in_a_file_is_executed(
    tmp_path: Path, saved: Path, attack: Callable[[Path], Change]
) -> None:
    written = tmp_path / "written"
    path = changed(saved, tmp_path / "model.pt2", attack(written))
    try:
        engine = load(path)
    except ModelError:
        pass
    else:
        rows = {"image": np.zeros((1, 3, 8, 8), "f"), "scale": np.zeros((1, 1), "f")}
        engine.run(1, rows)
    assert not written.exists()


@pytest.mark.filterwarnings("ignore")
def test_the_files_that_are_out_to_do_harm_would(tmp_path: Path, saved: Path) -> None:
    """PyTorch's own loader does what they say: the test before this one tests something."""
    for number, attack in enumerate((of_weight, of_constant, of_size)):
        written = tmp_path / f"written{number}"
        path = changed(saved, tmp_path / "model.pt2", attack(written))
        try:
            torch.export.load(path)
        except Exception as error:  # after the deed
            print(error)
        assert written.exists()
