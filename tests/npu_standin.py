"""A stand-in for OpenVINO with an NPU: its CPU, behind the names of an NPU.

Names of properties are those that the NPU plugin of OpenVINO 2026.4 lists where no NPU is. What a
real one answers was seen nowhere: what errors of its compiler say, and what ``query_model`` does,
are guesses.
"""

from __future__ import annotations

from typing import Any

from cotenant.engines.openvino import shared_core

NPU = "NPU"
PROPERTIES = (
    "MODEL_PRIORITY",
    "NPU_DEVICE_ALLOC_MEM_SIZE",
    "NPU_DEVICE_TOTAL_MEM_SIZE",
    "NPU_DRIVER_VERSION",
    "PERFORMANCE_HINT",
    "PERFORMANCE_HINT_NUM_REQUESTS",
)


class StandIn:
    """In place of its ``Core``. ``lacks``: operators that ``query_model`` leaves out; ``refuses``:
    one that only compiling shows; ``grows``: bytes in use for each model; ``queries``: whether it
    can be queried."""

    def __init__(
        self,
        lacks: tuple[str, ...] = ("NonZero",),
        refuses: str = "Tan",
        grows: int = 1 << 20,
        queries: bool = True,
    ) -> None:
        self.real = shared_core()
        self.lacks = lacks
        self.refuses = refuses
        self.grows = grows
        self.queries = queries
        self.used = 0
        self.settings: dict[str, Any] = {}
        """Those of the last model."""
        self.available_devices = ["CPU", NPU]

    def read_model(self, path: Any) -> Any:
        return self.real.read_model(path)

    def get_property(self, device: str, key: str) -> Any:
        assert device == NPU
        answers = {
            "FULL_DEVICE_NAME": "Stand-in NPU",
            "NPU_DRIVER_VERSION": 1003,
            "NPU_DEVICE_TOTAL_MEM_SIZE": 1 << 30,
            "NPU_DEVICE_ALLOC_MEM_SIZE": self.used,
            "OPTIMIZATION_CAPABILITIES": ["FP16", "INT8"],
            "SUPPORTED_PROPERTIES": dict.fromkeys(PROPERTIES, "RO"),
        }
        if key not in answers:
            raise RuntimeError(f"Exception from somewhere:1:\nUnsupported configuration key: {key}")
        return answers[key]

    def query_model(self, model: Any, device: str) -> dict[str, str]:
        assert device == NPU
        if not self.queries:
            raise RuntimeError("not implemented")
        ops = model.get_ordered_ops()
        free = [op.get_friendly_name() for op in ops if op.get_type_name() not in self.lacks]
        return dict.fromkeys(free, device)

    def compile_model(self, model: Any, device: str, settings: dict[str, Any]) -> Any:
        assert device == NPU
        ports = (*model.inputs, *model.outputs)
        if any(port.get_partial_shape().is_dynamic for port in ports):
            raise RuntimeError("Exception from plugin:1:\nto_shape was called on a dynamic shape.")
        if any(op.get_type_name() == self.refuses for op in model.get_ops()):
            raise RuntimeError(f"Exception from plugin:2:\n[NPU_VCL] {self.refuses}: not legal")
        self.settings = settings
        self.used += self.grows
        return self.real.compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
