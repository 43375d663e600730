"""Engines run a model on the compute units of a partition: one file an engine."""
