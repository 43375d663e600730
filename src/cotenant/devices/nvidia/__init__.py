"""NVIDIA GPUs: so far the launch gate (docs/gate.md)."""
