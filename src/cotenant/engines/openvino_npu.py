"""OpenVINO on an NPU: one compiled model, of fixed shapes, one request in flight.

1. The compiler of an NPU wants fixed shapes. Free axes are fixed to ``warmup_shapes``, else to 1; a
   request of another shape is refused before it is queued.
2. What it does not take is not computed on the CPU. Operators that OpenVINO says the device lacks
   are named; beyond that what the compiler says is passed on.
3. Its weights are compared with the device's memory before it is compiled, and what the device then
   has more of in use once it was.
4. It goes before what others on this machine have on the NPU (``MODEL_PRIORITY``). Of a node's
   models one executes at a time.
5. It computes in what the NPU has, in general FP16: a note says so.

Names of properties are those that the NPU plugin of OpenVINO 2026.4 lists. Those that a plugin does
not list are left out. **Untested on hardware.**
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from cotenant.domain.config import ModelSettings
from cotenant.domain.errors import ModelError
from cotenant.domain.npu import FREE, Present
from cotenant.domain.units import format_bytes
from cotenant.engines.base import Array, Room
from cotenant.engines.openvino import (
    OpenVinoEngine,
    check_beside,
    copied,
    described,
    imported,
    said,
    shared_core,
    weigh,
)
from cotenant.engines.placement import Executed

SETTINGS: Final = {
    "PERFORMANCE_HINT": "LATENCY",
    "PERFORMANCE_HINT_NUM_REQUESTS": 1,
    "MODEL_PRIORITY": "HIGH",
}
IN_USE: Final = "NPU_DEVICE_ALLOC_MEM_SIZE"
"""Bytes of the NPU that are in use, by whomever."""


class OpenVinoNpuEngine(OpenVinoEngine):
    """A model file compiled for the NPU ``npu``. ``core``: what stands for OpenVINO's in tests."""

    def __init__(self, path: Path, settings: ModelSettings, npu: Present, core: Any = None) -> None:
        check_beside(path)
        core = core or shared_core()
        try:
            model = core.read_model(path)
            self._fixed = fix(model, settings)
            self._meta = described(model, path)
            refuse(core, model, npu)
            self._operators = Counter(op.get_type_name() for op in model.get_ops())
            self._compiled = {1: self._compile(core, model, npu)}
            self._requests = {1: self._compiled[1].create_infer_request()}
        except ModelError:
            raise
        except Exception as error:  # OpenVINO raises whatever its parts do
            raise ModelError(f"{npu.name} does not take {path.name}: {said(error)}") from error
        self._tensor = imported().Tensor
        tensors = (*self._meta.inputs, *self._meta.outputs)
        self._axes = {t.name: ("",) * len(t.shape) for t in tensors}
        self._name = npu.name

    def _compile(self, core: Any, model: Any, npu: Present) -> Any:
        known = core.get_property(npu.name, "SUPPORTED_PROPERTIES")
        settings = {key: value for key, value in SETTINGS.items() if key in known}
        before = _in_use(core, npu, known)
        compiled = core.compile_model(model, npu.name, settings)
        grown = _in_use(core, npu, known) - before
        if npu.memory and grown > npu.memory:
            raise ModelError(
                f"compiled it takes {format_bytes(grown)}, and {npu.name} may have "
                f"{format_bytes(npu.memory)}"
            )
        return compiled

    @property
    def notes(self) -> Sequence[str]:
        """Where it is executed, and which axes were fixed."""
        fixed = f"; free axes are fixed (warmup_shapes): {self._fixed}" if self._fixed else ""
        return [f"executed on {self._name} in what that computes in, in general FP16{fixed}"]

    def executed(self) -> tuple[Executed, ...]:
        """Those of the model, which it takes as a whole or not at all (``query_model``)."""
        found = sorted(self._operators.items())
        return tuple(Executed(self._name, kind, count) for kind, count in found)

    def run_into(self, units: int, inputs: dict[str, Array], room: Room) -> list[Array]:
        return copied(self._execute(units, self._arrays(inputs)), room)


def fix(model: Any, settings: ModelSettings) -> str:
    """Fix the free axes of the model's inputs; says which shapes that made. Raises ModelError where
    the model does not take them."""
    shapes: dict[int, list[int]] = {}
    texts = []
    for index, port in enumerate(model.inputs):
        axes = port.get_partial_shape()
        name = port.get_any_name()
        if axes.rank.is_dynamic or axes.is_static:
            continue
        wanted = settings.shapes.get(name, (1,) * len(axes))
        if len(wanted) != len(axes):
            raise ModelError(
                f"warmup_shapes of {name!r} has {len(wanted)} axes, the model {len(axes)}"
            )
        pairs = zip(axes, wanted, strict=True)
        shapes[index] = [a.get_length() if a.is_static else max(1, size) for a, size in pairs]
        texts.append(f"{name} {shapes[index]}")
    if not shapes:
        return ""
    try:
        model.reshape(shapes)
    except Exception as error:
        text = ", ".join(texts)
        raise ModelError(f"it does not take {text}; set warmup_shapes: {said(error)}") from error
    return ", ".join(texts)


def refuse(core: Any, model: Any, npu: Present) -> None:
    """Raises ModelError for what the NPU says it does not take."""
    ops = model.get_ops()
    try:
        taken = core.query_model(model, npu.name)
    except Exception:  # not every driver answers; the compiler will say what is wrong
        taken = None
    if taken is not None:
        left = {op.get_type_name() for op in ops if op.get_friendly_name() not in taken} - FREE
        if left:
            raise ModelError(f"{npu.name} does not support {', '.join(sorted(left))}")
    weights = weigh(ops)
    if npu.memory and weights > npu.memory:
        raise ModelError(
            f"its weights are {format_bytes(weights)}, and {npu.name} may have "
            f"{format_bytes(npu.memory)}"
        )


def _in_use(core: Any, npu: Present, known: Any) -> int:
    try:
        return int(core.get_property(npu.name, IN_USE)) if IN_USE in known else 0
    except Exception:  # a driver that does not say
        return 0
