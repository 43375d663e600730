"""Weft: serve models under a latency objective and train on everything that is left over.

``weft.report(step=...)`` tells the node how far a job has come; outside Weft it does nothing.
"""

from weft.report import report

__version__ = "0.1.0"

__all__ = ["__version__", "report"]
