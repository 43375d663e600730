"""Benchmarks that come with the command: ``cotenant bench colocate``."""
