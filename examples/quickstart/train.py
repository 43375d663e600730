"""A training job that any machine can run: logistic regression by gradient descent, forever."""

from __future__ import annotations

import numpy as np
from sklearn.datasets import load_digits

import cotenant

images, labels = load_digits(return_X_y=True)
x, y = images / 16.0, np.eye(10)[labels]
weights = np.zeros((64, 10))
step = 0
while True:
    scores = x @ weights
    chances = np.exp(scores - scores.max(axis=1, keepdims=True))
    chances /= chances.sum(axis=1, keepdims=True)
    weights -= 0.5 * x.T @ (chances - y) / len(x)
    step += 1
    loss = -np.log(chances[np.arange(len(x)), labels]).mean()
    cotenant.report(step=step, loss=float(loss))
