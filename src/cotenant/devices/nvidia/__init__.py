"""NVIDIA GPUs: what is there, read through NVML."""
