"""NPUs, emulated or there: what a model instance is told of them."""

from __future__ import annotations

from typing import Final

import msgspec

PREFIX: Final = "npu-emulated:"
"""How ``domain.device.PROCESSOR`` begins for it."""
NAMED: Final = "npu-openvino:"
"""How it begins for an NPU that is there."""
FREE: Final = frozenset({"Parameter", "Constant", "Result"})
"""Operators that every device takes: they compute nothing."""
_COMMON: Final = """
Abs Add AvgPool BatchNormInference Broadcast Clamp Concat Convert ConvertLike Convolution
ConvolutionBackpropData DepthToSpace Divide Elu Equal Erf Exp FakeQuantize Floor Gather Gelu
Greater GroupConvolution GroupConvolutionBackpropData HSigmoid HSwish Identity Interpolate Less Log
MVN MatMul MaxPool Maximum Minimum Mish Mod Multiply Negative PRelu Pad Power ReduceMax ReduceMean
ReduceMin ReduceSum Relu Reshape Select ShapeOf Sigmoid Slice SoftPlus Softmax SpaceToDepth Split
Sqrt SquaredDifference Squeeze StridedSlice Subtract Swish Tanh Tile Transpose Unsqueeze
VariadicSplit
"""
OPERATORS: Final = tuple(_COMMON.split())
"""What it takes unless the configuration says otherwise, as OpenVINO names it: the operators of
networks of convolutions and of attention. Chosen, not read from an NPU: no control flow, no
recurrent cells, no sorting and selecting, no scattering."""


class Emulated(msgspec.Struct, frozen=True):
    """``cores``: how many cores of the CPU compute for it. ``memory``: bytes that a model's weights
    may have (0: any)."""

    cores: int
    memory: int = 0
    operators: tuple[str, ...] = OPERATORS

    @property
    def processor(self) -> str:
        """As a model instance is told of it (``domain.device.PROCESSOR``)."""
        return PREFIX + msgspec.json.encode(self).decode()


def emulated(processor: str) -> Emulated | None:
    """What ``processor`` says of an emulated NPU; None if it is something else."""
    if not processor.startswith(PREFIX):
        return None
    return msgspec.json.decode(processor.removeprefix(PREFIX), type=Emulated)


class Present(msgspec.Struct, frozen=True):
    """An NPU that is there: ``name`` as OpenVINO lists it. ``memory``: bytes that one model may
    have there (0: any)."""

    name: str
    memory: int = 0

    @property
    def processor(self) -> str:
        """As a model instance is told of it (``domain.device.PROCESSOR``)."""
        return NAMED + msgspec.json.encode(self).decode()


def present(processor: str) -> Present | None:
    """What ``processor`` says of an NPU that is there; None if it is something else."""
    if not processor.startswith(NAMED):
        return None
    return msgspec.json.decode(processor.removeprefix(NAMED), type=Present)
