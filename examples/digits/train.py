"""The training job: keeps learning from recent labelled images and publishes what is surely better.

Any PyTorch program could stand here. It knows nothing of Cotenant but ``cotenant.report``, which
does nothing outside Cotenant, and the layout of a model directory: a version is a directory with a
number for its name, ``model.onnx`` and, for the node's own check of accuracy, ``check.npz``.

    train.py --models DIR --samples FILE --first 480       make version 1 and end
    train.py --models DIR --samples FILE --counter FILE    go on from the newest version for ever
"""

from __future__ import annotations

import argparse
import math
import os
import shutil
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
import onnx
import onnx.numpy_helper
import torch
from counter import Counter
from torch import Tensor, nn

import cotenant

BATCH = 32
"""Few images a step, for many steps: each step costs a slow box less, and the next one knows what
this one has learned."""
PIECES = 4
LEARNING_RATE = 3e-3
LEAST_CHECK = 20
"""Held-out images below which two versions cannot be compared."""
LOOK_EVERY = 4
"""Steps between looks at the file of samples."""
SHIFTS = range(-3, 4)
"""The served model looks at an image in all 49 shifts of up to three pixels and averages."""


class Samples(NamedTuple):
    """Labelled images: to learn from, and held out to judge by."""

    images: Tensor
    labels: Tensor
    check_images: Tensor
    check_labels: Tensor


class Views(nn.Module):
    """A network asked about 49 shifted views of each image; what is exported and served."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, image: Tensor) -> Tensor:
        """(n, 1, 32, 32) to (n, 10)."""
        margin, size = SHIFTS[-1], image.shape[-1]
        wide = nn.functional.pad(image, [margin] * 4)
        views = [
            wide[:, :, margin + y : margin + y + size, margin + x : margin + x + size]
            for y in SHIFTS
            for x in SHIFTS
        ]
        scores: Tensor = self.network(torch.cat(views))
        return scores.reshape(len(views), -1, scores.shape[-1]).mean(0)


def make_network() -> nn.Module:
    """Three convolutions and a linear layer."""
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1, stride=2),
        nn.ReLU(),
        nn.Conv2d(16, 32, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(32, 64, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(64 * 4 * 4, 10),
    )


def read_samples(path: Path) -> Samples:
    """What the file holds now; it is only ever replaced as a whole."""
    with np.load(path) as data:
        images, labels = torch.from_numpy(data["images"]), torch.from_numpy(data["labels"])
        check = torch.from_numpy(data["check"])
    return Samples(images[~check], labels[~check], images[check], labels[check])


def right(network: nn.Module, samples: Samples) -> Tensor:
    """Which of the held-out images the network gets right, without the shifted views: they add a
    little accuracy, but would cost more time here than the training itself."""
    with torch.inference_mode():
        return network(samples.check_images).argmax(1) == samples.check_labels


def accuracy(found: Tensor) -> float:
    """Share of images that were right."""
    return float(found.float().mean())


def surely_better(candidate: Tensor, current: Tensor) -> bool:
    """Whether one network gets more of the same images right than chance explains: only those count
    that one of both gets right (McNemar, Psychometrika 12, 1947), and two standard deviations. A
    version costs the box some seconds, which are lost where it is no better."""
    gained = int((candidate & ~current).sum())
    lost = int((current & ~candidate).sum())
    return gained - lost >= 2 * math.sqrt(gained + lost) > 0


class Publisher:
    """Version directories of one model. All versions have the graph of the first, so that only
    weights are to be written: to export it anew costs as much as several steps."""

    def __init__(self, models: Path) -> None:
        self._models = models
        numbers = [int(d.name) for d in models.iterdir() if d.name.isdigit()]
        self.newest = max(numbers, default=0)
        self.at = -math.inf
        """When it was published (monotonic seconds); long ago if not by us."""
        self._graph = onnx.load(self._file("model.onnx")) if self.newest else None

    def weights(self) -> dict[str, Tensor]:
        """Those of the newest version."""
        found: dict[str, Tensor] = torch.load(self._file("weights.pt"), weights_only=True)
        return found

    def _file(self, name: str) -> Path:
        return self._models / str(self.newest) / name

    def publish(self, network: nn.Module, samples: Samples) -> None:
        """Write the next version beside the others, then let it appear under its number."""
        number = self.newest + 1
        new = self._models / f".new-{number}"
        shutil.rmtree(new, ignore_errors=True)  # of a run that was ended in the middle
        new.mkdir()
        torch.save(network.state_dict(), new / "weights.pt")
        if self._graph is None:
            export(network, new / "model.onnx")
            self._graph = onnx.load(new / "model.onnx")
        else:
            put_weights(self._graph, network)
            onnx.save(self._graph, new / "model.onnx")
        np.savez(
            new / "check.npz",
            image=samples.check_images.numpy(),
            labels=samples.check_labels.numpy(),
        )
        new.rename(self._models / str(number))
        self.newest = number
        self.at = time.monotonic()


def export(network: nn.Module, path: Path) -> None:
    """Write the served form as ONNX, batch axis free."""
    axes = {"image": {0: "n"}, "scores": {0: "n"}}
    with warnings.catch_warnings():
        # The exporter by tracing takes a tenth of a second, its successor several.
        warnings.simplefilter("ignore")
        torch.onnx.export(
            Views(network).eval(),
            (torch.zeros(2, 1, 32, 32),),
            str(path),
            dynamo=False,
            input_names=["image"],
            output_names=["scores"],
            dynamic_axes=axes,
        )
    network.train()


def put_weights(graph: onnx.ModelProto, network: nn.Module) -> None:
    """Replace the weights in a graph that ``export`` wrote."""
    weights = {f"network.{name}": value.numpy() for name, value in network.state_dict().items()}
    held = {tensor.name: tensor for tensor in graph.graph.initializer}
    for name, value in weights.items():
        held[name].CopyFrom(onnx.numpy_helper.from_array(value, name))


class Trainer:
    """A network and its optimiser.

    A batch is cut into pieces that threads take as they come, each with a copy of the network;
    gradients are averaged once a step. Threads that work together inside every operation, as
    torch's own do, would wait for the slowest of them hundreds of times a step, and get little
    out of a core that is theirs between two requests.
    """

    def __init__(self, threads: int, seed: int) -> None:
        torch.manual_seed(seed)
        self.network = make_network()
        self._copies = [make_network() for _ in range(PIECES)]
        self._optimiser = torch.optim.Adam(self.network.parameters(), lr=LEARNING_RATE)
        self._pool = ThreadPoolExecutor(threads)

    def step(self, samples: Samples) -> float:
        """Learn from one random batch, shifted a little; the loss."""
        chosen = torch.randint(len(samples.labels), (BATCH,))
        shift = torch.randint(SHIFTS[0], SHIFTS[-1] + 1, (2,)).tolist()
        images = torch.roll(samples.images[chosen], shift, (2, 3)).chunk(PIECES)
        labels = samples.labels[chosen].chunk(PIECES)
        losses = list(self._pool.map(self._learn, self._copies, images, labels))
        for mine, *theirs in zip(
            self.network.parameters(), *(c.parameters() for c in self._copies), strict=True
        ):
            mine.grad = torch.stack([p.grad for p in theirs if p.grad is not None]).mean(0)
        self._optimiser.step()
        return sum(losses) / PIECES

    def _learn(self, copy: nn.Module, images: Tensor, labels: Tensor) -> float:
        with torch.no_grad():
            for theirs, mine in zip(copy.parameters(), self.network.parameters(), strict=True):
                theirs.copy_(mine)
        copy.zero_grad()
        loss = nn.functional.cross_entropy(copy(images), labels)
        torch.autograd.backward(loss)
        return loss.item()


def make_first(args: argparse.Namespace) -> None:
    """Train from nothing and publish version 1."""
    trainer, samples = Trainer(args.threads, args.seed), read_samples(args.samples)
    began = time.monotonic()
    for _ in range(args.first):
        trainer.step(samples)
    rate = args.first / (time.monotonic() - began)
    Publisher(args.models).publish(trainer.network, samples)
    found = accuracy(right(trainer.network, samples))
    print(f"version 1: accuracy {found:.3f} on held-out images, {rate:.0f} steps/s")


def go_on(args: argparse.Namespace) -> None:
    """Train for ever; each time the samples change, compare and publish if better."""
    publisher, counter = Publisher(args.models), Counter(args.counter)
    trainer = Trainer(args.threads, args.seed)
    trainer.network.load_state_dict(publisher.weights())
    served = make_network()
    served.load_state_dict(publisher.weights())
    samples, seen = read_samples(args.samples), args.samples.stat().st_mtime_ns
    while True:
        loss = trainer.step(samples)
        counter.step()
        cotenant.report(step=counter.steps, loss=loss)
        if counter.steps % LOOK_EVERY or args.samples.stat().st_mtime_ns == seen:
            continue
        seen = args.samples.stat().st_mtime_ns
        samples = read_samples(args.samples)
        if len(samples.check_labels) < LEAST_CHECK:
            continue
        ours, theirs = right(trainer.network, samples), right(served, samples)
        candidate, current = accuracy(ours), accuracy(theirs)
        cotenant.report(step=counter.steps, candidate=candidate, current=current)
        rested = time.monotonic() - publisher.at >= args.pause
        if rested and candidate >= args.floor and surely_better(ours, theirs):
            publisher.publish(trainer.network, samples)
            # Until it serves, the box has a second of computing to do for it. What takes longer
            # then helps nobody: the drift goes on, and steps beside it are slow.
            time.sleep(args.rest)
            served.load_state_dict(trainer.network.state_dict())
            print(
                f"step {counter.steps}: published version {publisher.newest}, "
                f"accuracy {candidate:.3f} (the version before: {current:.3f})",
                flush=True,
            )


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--models", type=Path, required=True, help="the model's directory")
    parser.add_argument("--samples", type=Path, required=True, help="labelled images (.npz)")
    parser.add_argument("--counter", type=Path, help="count steps into this file")
    parser.add_argument("--first", type=int, default=0, help="steps to make version 1 with")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--floor", type=float, default=0.0, help="publish nothing below")
    parser.add_argument("--pause", type=float, default=2.0, help="seconds between versions")
    parser.add_argument("--rest", type=float, default=1.0, help="seconds left to each version")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(1)  # of each of ours
    if args.first:
        make_first(args)
    elif args.counter is None:
        parser.error("--counter is needed (or --first)")
    else:
        go_on(args)


if __name__ == "__main__":
    main()
