"""Benchmarks that come with the command: ``weft bench colocate``."""
