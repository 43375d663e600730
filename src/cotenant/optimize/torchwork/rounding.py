"""A module that rounds as int8 does: weights per channel, and what goes into their layers."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, Final

import torch
from torch import nn
from torch.nn.utils import parametrize

from cotenant.engines.base import Array
from cotenant.optimize.torchwork.importing import Graph

_ROWS: Final = 64
_LEAST: Final = 1e-8


class _Weight(nn.Module):
    """Signed, 8 bits, one scale for each output channel."""

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        flat = weight.detach().abs().flatten(1).amax(dim=1)
        scale = (flat / 127).clamp(min=_LEAST)
        zero = torch.zeros_like(scale, dtype=torch.int32)
        return torch.fake_quantize_per_channel_affine(weight, scale, zero, 0, -127, 127)


class _Input:
    """Unsigned, 8 bits; the range is that of what was seen."""

    def __init__(self) -> None:
        self.low, self.high, self.observes = 0.0, 0.0, False

    def __call__(self, layer: nn.Module, given: tuple[Any, ...]) -> Any:
        del layer
        (x,) = given
        if self.observes:
            self.low = min(self.low, float(x.min()))
            self.high = max(self.high, float(x.max()))
            return None
        scale = max((self.high - self.low) / 255, _LEAST)
        zero = round(-self.low / scale)
        return (torch.fake_quantize_per_tensor_affine(x, scale, min(255, zero), 0, 255),)


@contextlib.contextmanager
def rounded(module: Graph, rows: list[Array]) -> Iterator[None]:
    """While it is entered the layers round, what goes into them in the range that it has with these
    rows; then their weights are as they were trained."""
    layers = [m for m in module.layers.values() if isinstance(m, nn.Conv1d | nn.Conv2d | nn.Linear)]
    inputs = [_Input() for _ in layers]
    hooks = [
        layer.register_forward_pre_hook(rounds)
        for layer, rounds in zip(layers, inputs, strict=True)
    ]
    try:
        _observe(module, inputs, rows)
        for layer in layers:
            parametrize.register_parametrization(layer, "weight", _Weight())
        yield
    finally:
        for layer, hook in zip(layers, hooks, strict=True):
            hook.remove()
            parametrize.remove_parametrizations(layer, "weight", leave_parametrized=False)


def _observe(module: Graph, inputs: list[_Input], rows: list[Array]) -> None:
    """Find the ranges of what goes into the layers."""
    for rounds in inputs:
        rounds.observes = True
    with torch.no_grad():
        for at in range(0, min(len(rows[0]), 4 * _ROWS), _ROWS):
            module(*(torch.from_numpy(array[at : at + _ROWS]) for array in rows))
    for rounds in inputs:
        rounds.observes = False
