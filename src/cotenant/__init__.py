"""Cotenant: serve models under a latency objective and train on everything that is left over.

``cotenant.report(step=...)`` tells the node how far a job has come, ``cotenant.on_memory(give)``
lets it ask the job for memory, ``cotenant.on_checkpoint(save)`` for a checkpoint; elsewhere they do
nothing. ``cotenant.Client`` submits jobs to a node and looks after them.
"""

from cotenant.memory import on_checkpoint, on_memory
from cotenant.report import report

TYPE_CHECKING = False  # ``typing`` would cost a job more to import than all of this
if TYPE_CHECKING:
    from cotenant.client import Client

__version__ = "0.1.0"

__all__ = ["Client", "__version__", "on_checkpoint", "on_memory", "report"]


def __getattr__(name: str) -> object:
    """``Client`` when it is asked for: jobs import this package too, and need next to nothing."""
    if name == "Client":
        from cotenant.client import Client

        return Client
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
