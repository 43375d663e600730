"""The service and the training job in PyTorch: nets of residual blocks.

Without CUDA they run on the processor, small: there they show that the code runs, nothing else.
"""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch import nn

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
TYPE = torch.bfloat16 if CUDA else torch.float32


class Block(nn.Module):
    """Two convolutions and a way around them."""

    def __init__(self, wide_in: int, wide: int, stride: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(wide_in, wide, 3, stride, 1, bias=False)
        self.second = nn.Conv2d(wide, wide, 3, 1, 1, bias=False)
        self.norms = nn.ModuleList([nn.BatchNorm2d(wide), nn.BatchNorm2d(wide)])
        self.around = nn.Conv2d(wide_in, wide, 1, stride) if stride > 1 else nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Images in, images out."""
        y = torch.relu(self.norms[0](self.first(x)))
        found: torch.Tensor = torch.relu(self.norms[1](self.second(y)) + self.around(x))
        return found


def net(wide: int, stages: tuple[int, ...]) -> nn.Module:
    """Stages of so many blocks, each of twice the channels of the last on a quarter of the area."""
    layers: list[nn.Module] = [nn.Conv2d(3, wide, 7, 4, 3), nn.ReLU()]
    channels = wide
    for number, blocks in enumerate(stages):
        for block in range(blocks):
            narrows = number > 0 and block == 0
            layers.append(Block(channels, wide << number, 2 if narrows else 1))
            channels = wide << number
    layers += [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, 1000)]
    made: Any = nn.Sequential(*layers).to(DEVICE, TYPE)
    found: nn.Module = made.to(memory_format=torch.channels_last)
    return found


def size(least: int, most: int) -> int:
    """The first on a processor, the second on a GPU."""
    return most if CUDA else least


class Stream:
    """A stream of the driver's as PyTorch sees it; on a processor there is none."""

    def __init__(self, handle: int) -> None:
        self.torch: Any = torch.cuda.ExternalStream(handle) if CUDA else None

    def on(self) -> contextlib.AbstractContextManager[Any]:
        """What is done within goes to it."""
        return torch.cuda.stream(self.torch) if CUDA else contextlib.nullcontext()


class NetService:
    """Answers one image: copied in, the net as a graph, its scores copied out."""

    def __init__(self, handle: int) -> None:
        self._stream = Stream(handle)
        side = size(32, 224)
        self._net = net(size(4, 64), (1, 1) if not CUDA else (3, 4, 6, 3)).eval()
        image = torch.randn(1, 3, side, side, dtype=TYPE)
        self._host = image.to(memory_format=torch.channels_last)
        self._answer = torch.empty(1, 1000, dtype=TYPE)
        if CUDA:
            self._host, self._answer = self._host.pin_memory(), self._answer.pin_memory()
        self._image = self._host.to(DEVICE, memory_format=torch.channels_last)
        self._graph: Any = None
        with torch.inference_mode(), self._stream.on():
            for _ in range(3):
                self._scores = self._net(self._image)
            if CUDA:
                torch.cuda.synchronize()
                self._graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(
                    self._graph, stream=self._stream.torch, capture_error_mode="thread_local"
                ):
                    self._scores = self._net(self._image)
        self._done = torch.cuda.Event() if CUDA else None

    def run(self) -> None:
        """One request; returns when it is answered."""
        with torch.inference_mode(), self._stream.on():
            self._image.copy_(self._host, non_blocking=True)
            if self._graph is None:
                self._scores = self._net(self._image)
            else:
                self._graph.replay()
            self._answer.copy_(self._scores, non_blocking=True)
            if self._done is not None:
                self._done.record(self._stream.torch)
                self._done.synchronize()


class NetTraining:
    """Steps of training on images that lie on the device; two of them may be on their way."""

    def __init__(self, handle: int) -> None:
        self._stream = Stream(handle)
        batch, side = size(2, 128), size(32, 160)
        with self._stream.on():
            self._net = net(size(4, 64), (1, 1) if not CUDA else (2, 2, 2, 2)).train()
            self._images = torch.randn(batch, 3, side, side, device=DEVICE, dtype=TYPE)
            self._images = self._images.to(memory_format=torch.channels_last)
            self._labels = torch.randint(0, 1000, (batch,), device=DEVICE)
            self._optimiser = torch.optim.SGD(self._net.parameters(), 0.01, momentum=0.9)
        self._loss = nn.CrossEntropyLoss()
        self._events: list[Any] = []

    def step(self) -> None:
        """Put one on the stream; returns when the one before the last is through."""
        with self._stream.on():
            self._optimiser.zero_grad(set_to_none=True)
            self._loss(self._net(self._images).float(), self._labels).backward()
            self._optimiser.step()
            if CUDA:
                self._events.append(torch.cuda.Event())
                self._events[-1].record(self._stream.torch)
                if len(self._events) > 2:
                    self._events.pop(0).synchronize()

    def finish(self) -> None:
        """Wait for what is on its way."""
        for event in self._events:
            event.synchronize()
        self._events.clear()
