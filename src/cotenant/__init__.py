"""Cotenant: serve models under a latency objective and train on everything that is left over.

``cotenant.report(step=...)`` tells the node how far a job has come, ``cotenant.on_memory(give)``
lets it ask the job for memory, ``cotenant.on_checkpoint(save)`` for a checkpoint; elsewhere they do
nothing.
"""

from cotenant.memory import on_checkpoint, on_memory
from cotenant.report import report

__version__ = "0.1.0"

__all__ = ["__version__", "on_checkpoint", "on_memory", "report"]
