"""NVIDIA GPUs: what is there, MIG instances, and the launch gate. No node uses them yet."""
