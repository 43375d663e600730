"""The two deciders. Pure: no I/O, no clock, no vendor; ``now`` (ns) is always an argument."""
