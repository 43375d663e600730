"""Training against a parent's answers instead of labels.

The student is to say what the parent says, also to mixtures of rows: L. Beyer and others,
"Knowledge distillation: a good teacher is patient and consistent", CVPR 2022. Scores of classes are
compared by the Kullback-Leibler divergence of softened ones: G. Hinton and others, "Distilling the
knowledge in a neural network", 2015, section 2. Other outputs by squared error.
"""

from __future__ import annotations

import math
import os
from typing import Any, Final

import msgspec
import numpy as np
import torch
from torch import nn

from cotenant.domain.errors import ModelError
from cotenant.engines.base import Array
from cotenant.optimize.parent import Budget, Parent, Told

BATCH: Final = 64
TEMPERATURE: Final = 2.0
RATE: Final = 2e-3
TUNING_RATE: Final = 4e-4
"""For a module that says nearly what it should."""
_SMALL: Final = 1e-7
_SEED: Final = 3


class Lesson(msgspec.Struct):
    """Rows and the parent's answers. ``classes``: whether the first output is of scores, and
    ``shares`` whether those add up to 1."""

    parent: Parent
    rows: list[Array]
    classes: bool
    shares: bool

    @property
    def samples(self) -> int:
        """Rows."""
        return len(self.rows[0])

    def answer(self, rows: list[Array]) -> list[torch.Tensor]:
        """What the parent says to these rows."""
        named = {t.name: a for t, a in zip(self.parent.meta.inputs, rows, strict=True)}
        found = self.parent.engine.run(self.parent.units, named)
        return [torch.from_numpy(np.array(a, dtype=np.float32)) for a in found]


def lesson(parent: Parent) -> Lesson:
    """Of the rows for making. Raises ModelError where these cannot be trained with."""
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    torch.manual_seed(_SEED)
    data, meta = parent.rows.making, parent.meta
    if data.whole(meta.inputs) or not meta.batchable:
        raise ModelError("training needs a model whose first axis is one of rows")
    if any(t.datatype != "FP32" for t in (*meta.inputs, *meta.outputs)):
        raise ModelError("training needs inputs and outputs of FP32")
    rows = [data.inputs[t.name] for t in meta.inputs]
    found = Lesson(parent, rows, False, False)
    first = found.answer([r[:BATCH] for r in rows])[0]
    found.classes = first.ndim == 2 and first.shape[1] > 1
    total = first.sum(dim=1) if found.classes else first
    found.shares = found.classes and bool((first >= 0).all() and (total - 1).abs().max() < 1e-3)
    return found


def train(
    module: nn.Module,
    given: Lesson,
    seconds: float,
    told: Told,
    labels: Array | None = None,
    rate: float = RATE,
) -> float:
    """Train in place for so many seconds of CPU time a core; returns the last loss (the mean over
    some steps). With ``labels`` those are learned in place of the parent's scores. Raises
    ModelError if it comes to no numbers."""
    parameters = [p for p in module.parameters() if p.requires_grad]
    steps = torch.optim.AdamW(parameters, lr=rate, weight_decay=1e-4)
    budget = Budget(seconds, torch.get_num_threads())
    random = np.random.default_rng(_SEED)
    loss_mean, number = math.nan, 0
    while budget.spent < 1:
        for group in steps.param_groups:
            group["lr"] = rate * max(0.01, math.cos(budget.spent * math.pi / 2))
        loss = _loss(module, given, random, labels)
        steps.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(parameters, 1.0)
        steps.step()
        value = float(loss.detach())
        if not math.isfinite(value):
            raise ModelError("training came to no numbers")
        loss_mean = value if number == 0 else 0.98 * loss_mean + 0.02 * value
        number += 1
        if number % 200 == 0:
            told(f"training: {budget.spent:.0%}, loss {loss_mean:.4f}")
    return loss_mean


def _loss(
    module: nn.Module, given: Lesson, random: np.random.Generator, labels: Array | None
) -> torch.Tensor:
    picked = random.integers(0, given.samples, min(BATCH, given.samples))
    rows = [array[picked] for array in given.rows]
    if labels is not None:
        scores = module(*map(torch.from_numpy, rows))[0]
        truth = torch.from_numpy(labels[picked].astype(np.int64))
        return nn.functional.nll_loss(_log(scores, given.shares), truth)
    if random.random() < 0.5:
        share = np.float32(random.random())
        other = random.permutation(len(picked))
        rows = [(share * a + (1 - share) * a[other]).astype(np.float32) for a in rows]
    wanted = given.answer(rows)
    answers = module(*map(torch.from_numpy, rows))
    losses: list[Any] = []
    for number, (mine, its) in enumerate(zip(answers, wanted, strict=True)):
        if number == 0 and given.classes:
            soft = torch.softmax(_logits(its, given.shares) / TEMPERATURE, dim=1)
            own = torch.log_softmax(_logits(mine, given.shares) / TEMPERATURE, dim=1)
            losses.append(nn.functional.kl_div(own, soft, reduction="batchmean") * TEMPERATURE**2)
        else:
            losses.append(nn.functional.mse_loss(mine, its) / (its.var() + _SMALL))
    return torch.stack(losses).sum()


def _logits(scores: torch.Tensor, shares: bool) -> torch.Tensor:
    return (scores + _SMALL).log() if shares else scores


def _log(scores: torch.Tensor, shares: bool) -> torch.Tensor:
    return _logits(scores, True) if shares else torch.log_softmax(scores, dim=1)
