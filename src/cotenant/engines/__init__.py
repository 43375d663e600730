"""Engines run a model on the compute units of a partition: one file an engine.

Nothing that a box does is anybody else's business. ONNX Runtime reports names and hashes of models
to its maker from 1.29 on, unless a variable says no before it is imported; who wants that sets it
to 0.
"""

import os

os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
