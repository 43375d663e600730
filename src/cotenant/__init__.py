"""Cotenant: serve models under a latency objective and train on everything that is left over.

``cotenant.report(step=...)`` tells the node how far a job has come; elsewhere it does nothing.
"""

from cotenant.report import report

__version__ = "0.1.0"

__all__ = ["__version__", "report"]
